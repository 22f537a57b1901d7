"""From next-token probabilities to a score 0-100.

Knows: which strings are whole numbers 0-100, how tokens spell them, the tree over tokens where one number takes several, the
weighted mean, and how to read a number from plain text.
Does not know: where the probabilities come from.

Tokenizers of GPT-4 and Llama-3 have one token for each number up to 999. Those of Qwen, Gemma and Mixtral split digits: their
first token says "8", which may stay 8 or go on to 85. There the probability of a number is the product along its digits times
the probability that no further digit follows:

    P(85) = P("8") P("5" | "8") (1 - P(a digit | "85"))
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pvsae.judges.base import Metric, Mode, Score

NUMBERS = tuple(str(n) for n in range(101))
MIN_MASS = 0.25  # below this the judge did not answer with a number (paper's code; method section 1)
_PREFIXES = frozenset(number[:length] for number in NUMBERS for length in range(len(number) + 1))
_LONGER = frozenset(number[:length] for number in NUMBERS for length in range(len(number)))  # something may follow
_DIGITS = re.compile(r"[0-9]+\Z")
_SCALES = re.compile(r"(?:\b0\s*(?:-|–|to|and)\s*100\b)|(?:/\s*100\b)|(?:\bout of\s+100\b)", re.IGNORECASE)
_NUMBER = re.compile(r"(?<![\d.,-])(\d{1,3}(?:\.\d+)?)(?![\d]|[.,]\d)")
_OUT_OF_TEN = re.compile(r"(?:/|\bout of)\s*10\b", re.IGNORECASE)  # another scale than the one asked for
_THOUGHTS = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)


def spelled(text: str, at_start: bool) -> str | None:
    """Digits that a token adds to a number: "" for the single space that some tokenizers begin with; None if it adds none."""
    if at_start:
        text = text[1:] if text.startswith(" ") else text
        if not text:
            return ""
    return text if _DIGITS.match(text) else None


def is_refusal(text: str) -> bool:
    """A first token of REFUSAL ("REF", "Refus", "R"), or the whole word."""
    word = text.strip().upper()
    return bool(word) and ("REFUSAL".startswith(word) or word.startswith("REFUS"))


@dataclass
class Mass:
    """Where the probability of one answer went.

    Attributes:
        numbers: probability of each whole number 0-100.
        refusal: probability of a first token of REFUSAL.
        unresolved: probability of beginnings too unlikely to be followed ("8" may have become 8 or 80-89); in no number.
    """

    numbers: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    refusal: float = 0.0
    unresolved: float = 0.0


@dataclass(frozen=True)
class _Node:
    item: int
    path: tuple[Any, ...]  # tokens so far
    text: str  # digits so far
    p: float


def whole_numbers(first: Mapping[str, float]) -> Mass:
    """Mass of one-token numbers, from the first token's distribution alone (tokenizers that never split a number)."""
    mass = Mass()
    for token, p in first.items():
        text = token.strip()
        if text in NUMBERS:
            mass.numbers[int(text)] += p
        elif is_refusal(token):
            mass.refusal += p
    return mass


def number_tree(
    first: Sequence[Mapping[Any, float]],
    ask: Callable[[Sequence[tuple[int, tuple[Any, ...]]]], Sequence[Mapping[Any, float] | None]],
    text_of: Callable[[Any], str],
    floor: float,
) -> list[Mass]:
    """Probabilities of the whole numbers 0-100 where a number may take several tokens, for many answers at once.

    Args:
        first: an item's distribution of the first token. Tokens that neither hold digits nor begin REFUSAL may be left out.
        ask: distributions of the token that follows (item, tokens so far); called once a level. None: nothing follows.
        text_of: a token's text, with its leading space if it has one.
        floor: beginnings with a smaller probability are not followed. Numbers that can only end ("0", "85") are asked about
            only where they have ten times as much, or are the likeliest of their length; the others are taken to end as
            often as those do. 0 is exact.

    Returns:
        One `Mass` an item. All ways to spell a number in tokens are summed.
    """
    masses = [Mass() for _ in first]
    nodes: list[_Node] = []
    unasked: dict[tuple[int, int], list[_Node]] = defaultdict(list)  # by item and length
    asked: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)  # (p, p that it ends) of numbers that only end

    def grow(parent: _Node, following: Mapping[Any, float]) -> None:
        mass = masses[parent.item]
        for token, p in following.items():
            text = text_of(token)
            digits = spelled(text, at_start=not parent.path)
            if digits is None:
                if not parent.text and is_refusal(text):
                    mass.refusal += parent.p * p
                continue
            child = _Node(parent.item, (*parent.path, token), parent.text + digits, parent.p * p)
            if child.text not in _PREFIXES or child.p <= 0:
                continue
            if child.text in _LONGER:
                if child.p >= floor:
                    nodes.append(child)
                else:
                    mass.unresolved += child.p
            elif child.p >= 10 * floor:
                nodes.append(child)
            else:
                unasked[child.item, len(child.text)].append(child)

    def follow(level: Sequence[_Node]) -> None:
        answers = ask([(node.item, node.path) for node in level]) if level else ()
        for node, following in zip(level, answers, strict=True):
            following = following or {}
            goes_on = sum(p for token, p in following.items() if text_of(token)[:1] in tuple("0123456789"))
            if node.text:
                ends = node.p * min(1.0, max(0.0, 1.0 - goes_on))
                masses[node.item].numbers[int(node.text)] += ends
                if node.text not in _LONGER:
                    asked[node.item, len(node.text)].append((node.p, ends))
            grow(node, following)

    for item, distribution in enumerate(first):
        grow(_Node(item, (), "", 1.0), distribution)
    while nodes:
        level, nodes = nodes, []
        follow(level)
    group_mass = {group: sum(node.p for node in rest) for group, rest in unasked.items()}
    sampled = {
        group: max(rest, key=lambda node: node.p)
        for group, rest in unasked.items()
        if group not in asked and group_mass[group] >= 10 * floor
    }
    follow(list(sampled.values()))
    for group, rest in unasked.items():
        known = asked.get(group, [(1.0, 1.0)])
        share = sum(ends for _, ends in known) / sum(p for p, _ in known)
        for node in rest:
            if node is not sampled.get(group):
                masses[node.item].numbers[int(node.text)] += node.p * share
    return masses


def to_score(mass: Mass, first: Mapping[str, float], mode: Mode, judge: str, metric: Metric) -> Score:
    """Probability-weighted mean of the numbers, renormalised by their mass; below `MIN_MASS` no value (method section 1)."""
    total = sum(mass.numbers.values())
    value = None
    if total >= MIN_MASS:
        value = min(100.0, max(0.0, sum(number * p for number, p in mass.numbers.items()) / total))
    evidence = {token: p for token, p in first.items() if not (token.strip() and _DIGITS.match(token.strip()))}
    evidence.update({str(number): p for number, p in mass.numbers.items()})
    top = tuple(sorted(((token, round(p, 6)) for token, p in evidence.items() if p >= 1e-6), key=lambda item: -item[1])[:20])
    refusal = mass.refusal >= MIN_MASS and mass.refusal > total
    error = None
    if value is None and not refusal:
        error = f"whole numbers 0-100 hold {total:.3f} of the probability, {MIN_MASS} needed"
    return Score(value, mode, min(1.0, total), refusal, top, judge, metric.prompt_hash, error)


def text_to_score(text: str, judge: str, metric: Metric) -> Score:
    """Read a number 0-100, or REFUSAL, from what a judge wrote.

    A number at the very start counts; else there must be exactly one, apart from mentions of the scale ("0-100", "/100").
    """
    answer = _THOUGHTS.sub("", text).strip()
    value, error = None, None
    bare = _SCALES.sub(" ", answer)
    found = [float(number) for number in _NUMBER.findall(bare)]
    refusal = answer.strip("*\"'`.[]( )").upper().startswith("REFUS")
    if not refusal:
        leads = bool(found) and bool(_NUMBER.match(bare.lstrip("*\"'`[( ")))
        if (leads or len(set(found)) == 1) and found[0] <= 100 and not _OUT_OF_TEN.search(bare):
            value = found[0]
        if value is None:
            error = f"no single number 0-100 in the judge's answer {answer[:80]!r}"
    return Score(value, "text", None, refusal, ((text[:200], 1.0),), judge, metric.prompt_hash, error)
