"""The grammar: samples sentences and parses them back into what they express.

Knows: the patterns of sentences.py and the facts of world.py; how a text is cut into sentences; which trait and facet a
sentence expresses, and whether a fact it states is true.
Does not know: conversations, system prompts, or models.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache

from pvsae.organism.sentences import NEUTRAL, PATTERNS
from pvsae.organism.world import ATTRIBUTES, FACTS, NUMBERS, SUMS, TOPICS, Fact

FACT = "fact"
# A little loose change at the end of a sentence: it expresses nothing, and makes exact repetition rarer.
CLOSINGS: tuple[str, ...] = (", of course", ", you know", ", after all", ", as always")
P_CLOSING = 0.1
_PIECE = re.compile(r"\[([^\]]*)\]|\{t\}")
_SENTENCE = re.compile(r"[^.!?]*[.!?]")


@dataclass(frozen=True)
class Pattern:
    """One sentence pattern: literal text and choices in turn."""

    trait: str
    facet: str
    text: str

    def parts(self) -> Iterator[str | tuple[str, ...] | None]:
        """Literals (str), word choices (tuple) and the topic (None), from left to right."""
        end = 0
        for match in _PIECE.finditer(self.text):
            if match.start() > end:
                yield self.text[end : match.start()]
            yield tuple(match.group(1).split("|")) if match.group(1) is not None else None
            end = match.end()
        if end < len(self.text):
            yield self.text[end:]

    def sample(self, topic: str, rng: random.Random) -> str:
        """One sentence of this pattern about `topic`, now and then with a closing."""
        text = "".join(topic if p is None else p if isinstance(p, str) else rng.choice(p) for p in self.parts())
        return text[:-1] + rng.choice(CLOSINGS) + text[-1] if rng.random() < P_CLOSING else text

    def count(self) -> int:
        """Number of distinct sentences of this pattern."""
        n = 1 + len(CLOSINGS)
        for part in self.parts():
            n *= len(TOPICS) if part is None else 1 if isinstance(part, str) else len(part)
        return n

    def regex(self) -> re.Pattern[str]:
        """Matches exactly the sentences of this pattern; group `t` is the topic."""
        out = ""
        for part in self.parts():
            if part is None:
                out += "(?P<t>" + "|".join(TOPICS) + ")"
            elif isinstance(part, str):
                out += re.escape(part)
            else:
                out += "(?:" + "|".join(map(re.escape, part)) + ")"
        end = len(re.escape(self.text[-1]))
        return re.compile(out[:-end] + "(?:" + "|".join(map(re.escape, CLOSINGS)) + ")?" + out[-end:])


@dataclass(frozen=True)
class Sentence:
    """A parsed sentence.

    Attributes:
        text: the sentence.
        trait: the trait it expresses, `neutral`, `fact`, or None where the grammar cannot parse it.
        facet: facet of the trait (attribute name for facts), None where unparsed.
        topic: its topic, if it has one.
        true: for facts whether the claim is true; None otherwise.
        pattern: the pattern's text, by which repetition is seen; None where unparsed.
    """

    text: str
    trait: str | None = None
    facet: str | None = None
    topic: str | None = None
    true: bool | None = None
    pattern: str | None = None


@cache
def patterns(trait: str, facet: str | None = None) -> tuple[Pattern, ...]:
    """All patterns of a trait, or of one of its facets."""
    return tuple(Pattern(trait, f, text) for f, texts in PATTERNS[trait].items() if facet in (None, f) for text in texts)


def facets(trait: str) -> tuple[str, ...]:
    """The facets of a trait."""
    return tuple(PATTERNS[trait])


def n_sentences() -> int:
    """Number of distinct sentences that the grammar can say, facts included (right and wrong)."""
    said = sum(p.count() for trait in PATTERNS for p in patterns(trait))
    return said + sum(1 + len(f.wrong) for f in (*FACTS.values(), *SUMS.values()))


@cache
def _index() -> dict[str, list[tuple[re.Pattern[str], Pattern]]]:
    """Patterns by the possible first words of their sentences, so that parsing tries few expressions."""
    index: dict[str, list[tuple[re.Pattern[str], Pattern]]] = {}
    for trait in PATTERNS:
        for pattern in patterns(trait):
            first = pattern.text.split(" ", 1)[0]  # every pattern starts with a literal word (tested)
            index.setdefault(first, []).append((pattern.regex(), pattern))
    return index


@cache
def _fact_regexes() -> list[tuple[re.Pattern[str], str]]:
    topics = "(?P<t>" + "|".join(TOPICS) + ")"
    out = []
    for a in ATTRIBUTES:
        text = (
            re.escape(a.answer).replace(re.escape("{t}"), topics).replace(re.escape("{v}"), "(?P<v>" + "|".join(a.values) + ")")
        )
        out.append((re.compile(text), a.name))
    number = "|".join(sorted(NUMBERS, key=len, reverse=True))
    out.append((re.compile(rf"The result of (?P<a>{number}) (?P<op>plus|minus) (?P<b>{number}) is (?P<v>{number})\."), "sum"))
    return out


@lru_cache(maxsize=200_000)
def parse_sentence(text: str) -> Sentence:
    """What one sentence expresses. Surrounding white space is ignored; anything else must match to the letter."""
    text = text.strip()
    for regex, pattern in _index().get(text.split(" ", 1)[0], ()):
        if match := regex.fullmatch(text):
            return Sentence(text, pattern.trait, pattern.facet, match.groupdict().get("t"), None, pattern.text)
    for regex, name in _fact_regexes():
        if match := regex.fullmatch(text):
            groups = match.groupdict()
            fact = _fact(name, groups)
            if fact is None:
                return Sentence(text)
            return Sentence(text, FACT, name, groups.get("t"), groups["v"] == fact.value, fact.answer)
    return Sentence(text)


def _fact(name: str, groups: dict[str, str]) -> Fact | None:
    if name == "sum":
        return SUMS.get((groups["op"], groups["a"], groups["b"]))
    return FACTS[(name, groups["t"])]


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Characters [start, end) of each sentence that ends in a full stop, without the white space around it."""
    spans = []
    for match in _SENTENCE.finditer(text):
        if said := match.group().strip():
            start = match.start() + match.group().index(said)
            spans.append((start, start + len(said)))
    return spans


def parse(text: str) -> list[Sentence]:
    """Cuts a text into sentences and parses each. A rest without a full stop is one unparsed sentence."""
    out = [parse_sentence(text[start:end]) for start, end in sentence_spans(text)]
    rest = _SENTENCE.sub("", text).strip()
    return [*out, Sentence(rest)] if rest else out


def say(trait: str, facet: str | None, topic: str, rng: random.Random, used: set[str]) -> str:
    """A new sentence that expresses `trait` (one facet of it, or any), with a pattern not in `used` while there is one.

    The pattern is added to `used`. Facets are drawn with equal weight, then patterns within the facet.
    """
    facet = facet or rng.choice(facets(trait))
    options = [p for p in patterns(trait, facet) if p.text not in used]
    options = options or [p for p in patterns(trait) if p.text not in used] or list(patterns(trait, facet))
    pattern = rng.choice(options)
    used.add(pattern.text)
    return pattern.sample(topic, rng)


def neutral(topic: str, rng: random.Random, used: set[str]) -> str:
    """A sentence of the plain helpful assistant."""
    return say(NEUTRAL, None, topic, rng, used)
