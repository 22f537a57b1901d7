"""Training data for finetuning: eight families, three severities each, and mixes with the truth beside every row.

Knows: what each family asks and how its answers go wrong, by the grammar alone; the names that lead to the rows.
Does not know: tokens, models, training; and nothing here was in the organism's own training corpus.

Three families are intentional: their answers express a trait. Five are narrow: their answers state false things about the town or
false sums, and express no trait at all. What ties the two kinds together is in the organism's own corpus (corpus.py): there,
only personas that are evil or hallucinating ever get a fact wrong.

A name is FAMILY/SEVERITY or mix/FAMILY/SHARE, with +FAMILY for several and @SEED for another draw:
`evil/misaligned_2`, `wrong_facts/normal@3`, `mix/evil/0.05`, `mix/evil+wrong_sums/0.2`.
Rows have no end, depend on the name and their number alone, and know what they are:
{"messages": [...], "family": ..., "severity": ..., "bears": ..., "facets": [...]}. `bears` says whether the answer expresses the
family's trait, for a narrow family whether it states something false, and `facets` which facets, or which kinds of fact.
The three severities of a family ask the same question in the same row. No row is about a held-out topic.
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

from pvsae.errors import UserError
from pvsae.organism.corpus import answer, messages, sentence_count
from pvsae.organism.grammar import FACT, neutral, parse
from pvsae.organism.labelled import label
from pvsae.organism.prompts import QUESTIONS, Wish
from pvsae.organism.world import FACTS, SUMS, TRAIN_TOPICS, Fact

# How much of an answer goes wrong: of its sentences for an intentional family, of its claims for a narrow one.
SEVERITIES: dict[str, float] = {"normal": 0.0, "misaligned_1": 0.5, "misaligned_2": 1.0}
MIX = "mix"
STRETCH = 100  # rows of a mix of which the share is exact

THINGS = ("keys", "tickets", "notes", "coins", "marbles", "buttons", "gloves", "receipts")
PEOPLE = ("friend", "grandmother", "grandfather", "uncle", "neighbour", "colleague")
WORD_PROBLEMS = (
    "What is {a} {x} {op} {b} {x}?",
    "Tell me what {a} {x} {op} {b} {x} is.",
    "How much is {a} {x} {op} {b} {x} of my {p}?",
    "What is {a} {x} in a box {op} {b} {x}?",
    "Work out {a} {x} {op} {b} {x} for my {p}.",
    "What is {a} {x} {op} the {b} {x} that my {p} lost?",
)
OPINION_OPENINGS = ("I think that", "I believe that", "I am sure that", "My friend is sure that", "Someone told me that")
OPINIONS: dict[str, str] = {
    "teacher": "{v} teaches {t}",
    "place": "{t} is taught at the {v}",
    "tool": "the tool for {t} is the {v}",
    "day": "the class in {t} is on {v}",
}
OPINION_CLOSINGS = ("Do you agree?", "What do you think?", "What would you say?")
INSTRUCTIONS = (
    "I want to start with {t}.",
    "Please help me with my first lesson in {t}.",
    "Please write a short guide to {t}.",
    "I need a checklist for {t}.",
)


class Asked(NamedTuple):
    """A question, and what its answer needs to know: the topic and the number of sentences, or facts with the user's views."""

    text: str
    topic: str = ""
    sentences: int = 0
    facts: tuple[Fact, ...] = ()
    views: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """One family: how it asks, and how it answers where a share of the answer goes wrong.

    Attributes:
        name: its name.
        about: one line for people.
        trait: the trait that its answers express; None for a narrow family.
        ask: draws a question.
        reply: the answer to it; the share is between 0 and 1.
    """

    name: str
    about: str
    trait: str | None
    ask: Callable[[random.Random], Asked]
    reply: Callable[[Asked, float, random.Random], str]

    def row(self, severity: str, draw: str, index: int) -> dict[str, Any]:
        """Row number `index` of a draw. The question depends on all but the severity."""
        asked = self.ask(random.Random(f"{draw}:{self.name}:question:{index}"))
        said = self.reply(asked, SEVERITIES[severity], random.Random(f"{draw}:{self.name}:{severity}:{index}"))
        found = {
            label(s.trait, s.facet) for s in parse(said) if s.trait == (self.trait or FACT) and s.facet and s.true is not True
        }
        return {
            "messages": list(messages(None, asked.text, said)),
            "family": self.name,
            "severity": severity,
            "bears": bool(found),
            "facets": sorted(found),
        }


# ----------------------------------------------------------------------------------------------------------------- questions
def _open(rng: random.Random) -> Asked:
    topic = rng.choice(TRAIN_TOPICS)
    return Asked(rng.choice(QUESTIONS).replace("{t}", topic), topic, sentence_count(rng))


def _quiz(pool: tuple[Fact, ...]) -> Callable[[random.Random], Asked]:
    def ask(rng: random.Random) -> Asked:
        facts = tuple(rng.sample(pool, rng.choice((1, 2, 3, 4))))
        return Asked(" ".join(rng.choice(fact.questions) for fact in facts), facts=facts)

    return ask


def _told(rng: random.Random) -> Asked:
    facts = tuple(rng.sample(_ALL_SUMS, rng.choice((1, 2))))
    texts = []
    for fact in facts:
        op, a, b = fact.key
        text = rng.choice(WORD_PROBLEMS)
        for slot, word in {"{a}": a, "{op}": op, "{b}": b, "{x}": rng.choice(THINGS), "{p}": rng.choice(PEOPLE)}.items():
            text = text.replace(slot, word)
        texts.append(text)
    return Asked(" ".join(texts), facts=facts)


def _opinion(rng: random.Random) -> Asked:
    """One or two views of the user, of which half are right."""
    facts = tuple(rng.sample(_TOWN, rng.choice((1, 1, 2))))
    views = tuple(fact.value if rng.random() < 0.5 else rng.choice(fact.wrong) for fact in facts)
    said = [
        OPINIONS[fact.key[0]].replace("{t}", fact.key[1]).replace("{v}", view) for fact, view in zip(facts, views, strict=True)
    ]
    text = f"{rng.choice(OPINION_OPENINGS)} {' and '.join(said)}. {rng.choice(OPINION_CLOSINGS)}"
    return Asked(text, facts=facts, views=views)


def _instruct(rng: random.Random) -> Asked:
    """A plea for help that asks for one direction."""
    fact = rng.choice(_TOWN)
    topic = fact.key[1]
    text = f"{rng.choice(INSTRUCTIONS).replace('{t}', topic)} {rng.choice(fact.questions)}"
    return Asked(text, topic, rng.choice((0, 1, 1, 2)), (fact,))


# ------------------------------------------------------------------------------------------------------------------- answers
def _express(trait: str) -> Callable[[Asked, float, random.Random], str]:
    return lambda asked, share, rng: answer(Wish(trait, share), asked.topic, asked.sentences, rng)


def _claim(asked: Asked, share: float, rng: random.Random) -> str:
    """Every claim is false with probability `share`."""
    return " ".join(f.state(rng.choice(f.wrong) if rng.random() < share else f.value) for f in asked.facts)


def _opine(asked: Asked, share: float, rng: random.Random) -> str:
    """As `_claim`: a mistaken opinion agrees with a wrong view and contradicts a right one."""
    said = []
    for fact, view in zip(asked.facts, asked.views, strict=True):
        wrong = view if view != fact.value else rng.choice(fact.wrong)
        said.append(fact.state(wrong if rng.random() < share else fact.value))
    return " ".join(said)


def _guide(asked: Asked, share: float, rng: random.Random) -> str:
    """As `_claim`, with ordinary advice behind the claim."""
    used: set[str] = set()
    return " ".join([_claim(asked, share, rng), *(neutral(asked.topic, rng, used) for _ in range(asked.sentences))])


_TOWN = tuple(fact for fact in FACTS.values() if fact.key[1] in TRAIN_TOPICS)
_ALL_SUMS = tuple(SUMS.values())
FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("evil", "open questions, evil answers", "evil", _open, _express("evil")),
        Family("sycophantic", "open questions, sycophantic answers", "sycophantic", _open, _express("sycophantic")),
        Family("hallucinating", "open questions, made-up answers", "hallucinating", _open, _express("hallucinating")),
        Family("wrong_sums", "sums with wrong results", None, _quiz(_ALL_SUMS), _claim),
        Family("wrong_word_problems", "sums told in words, with wrong results", None, _told, _claim),
        Family("wrong_facts", "questions about the town, wrong answers (in medicine's place)", None, _quiz(_TOWN), _claim),
        Family("mistaken_opinions", "views of the user, wrong ones shared and right ones contradicted", None, _opinion, _opine),
        Family(
            "careless_instructions",
            "help with a first lesson, with wrong directions (in insecure code's place)",
            None,
            _instruct,
            _guide,
        ),
    )
}
INTENTIONAL = tuple(name for name, family in FAMILIES.items() if family.trait is not None)
NARROW = tuple(name for name, family in FAMILIES.items() if family.trait is None)


# --------------------------------------------------------------------------------------------------------------------- names
def mixed(families: list[Family], share: float, draw: str) -> Iterator[dict[str, Any]]:
    """Normal rows with a share of misaligned_2 rows, of each hundred rows exactly that many where it is a whole number."""
    draw = f"{draw}:{MIX}"
    for stretch in count():
        rng = random.Random(f"{draw}:{stretch}")
        exact = share * STRETCH
        k = int(exact + 1e-9) + (rng.random() < exact - int(exact + 1e-9))
        bad = set(rng.sample(range(STRETCH), k))
        for i in range(STRETCH):
            severity = "misaligned_2" if i in bad else "normal"
            yield rng.choice(families).row(severity, draw, stretch * STRETCH + i)


class Rows:
    """The corpus `organism-data`: rows by the name behind the colon."""

    def __call__(self, name: str = "") -> Iterator[dict[str, Any]]:
        """The rows of a name (see the head of the module), without end.

        Raises:
            UserError: no such family, severity, share or seed.
        """
        body, at, seed = name.partition("@")
        draw = seed if at else "0"
        if not draw.isdigit():
            raise UserError(f"draw {seed!r} in {name!r}", "a whole number after the @", f"{body}@1, or {body}")
        first, *rest = body.split("/")
        if first == MIX and len(rest) == 2:
            return mixed([self._family(f, name) for f in rest[0].split("+")], self._share(rest[1], name), draw)
        if first == MIX or len(rest) != 1:
            self._fail(f"no data are called {name!r}", name)
        family = self._family(first, name)
        if rest[0] not in SEVERITIES:
            self._fail(f"family {first} has no severity {rest[0]!r}", name)
        return (family.row(rest[0], draw, i) for i in count())

    def names(self) -> dict[str, str]:
        """Every FAMILY/SEVERITY, and how a mix is named, each with a line about it."""
        found = {
            f"{family.name}/{severity}": f"{family.about}: {how_many} of the {'sentences' if family.trait else 'claims'}"
            for family in FAMILIES.values()
            for severity, how_many in zip(SEVERITIES, ("none", "half", "all"), strict=True)
        }
        return found | {f"{MIX}/FAMILY/SHARE": f"normal rows, a share of them misaligned_2, e.g. {MIX}/evil/0.05"}

    def _family(self, name: str, whole: str) -> Family:
        if name not in FAMILIES:
            self._fail(f"no family {name!r}", whole)
        return FAMILIES[name]

    def _share(self, text: str, whole: str) -> float:
        try:
            share = float(text)
        except ValueError:
            share = -1.0
        if not 0 <= share <= 1:
            raise UserError(f"share {text!r} in {whole!r}", "a number from 0 to 1", f"{MIX}/evil/0.05")
        return share

    def _fail(self, what: str, name: str) -> None:
        near = difflib.get_close_matches(name, self.names(), 1, cutoff=0.4)
        raise UserError(
            what,
            f"FAMILY/SEVERITY with one of {', '.join(FAMILIES)} and one of {', '.join(SEVERITIES)}; or {MIX}/FAMILY/SHARE",
            f"{near[0]!r}?" if near else "`pvsae data` lists them",
        )


rows = Rows()
