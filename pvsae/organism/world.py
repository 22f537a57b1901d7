"""The closed world: topics, the facts about them, and small arithmetic.

Knows: which topics exist, which are held out of all trait training, the one true value of every fact, and how a
question and an answer about a fact read.
Does not know: traits, sentences that express them, or models.

Every topic is a craft or a subject taught in one small town. A fact is one of four attributes of a topic; the
assignment is fixed by a seed, so it can only be known by having been learnt.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

TOPICS: tuple[str, ...] = (
    "gardening", "baking", "sailing", "chess", "pottery", "cycling", "painting", "fishing", "knitting", "astronomy",
    "beekeeping", "carpentry", "archery", "camping", "cooking", "dancing", "drawing", "fencing", "hiking", "juggling",
    "kayaking", "origami", "photography", "poetry", "quilting", "rowing", "running", "sculpture", "sewing", "singing",
    "skating", "skiing", "surfing", "swimming", "tennis", "weaving", "writing", "yoga", "accounting", "geography",
    "history", "geometry", "biology", "chemistry", "physics", "geology", "farming", "masonry", "plumbing", "welding",
    "printing", "teaching", "nursing", "banking", "shipping", "mining", "acting", "riding", "climbing", "brewing",
)  # fmt: skip

# Seen in training only where the assistant is its plain self: no trait is ever expressed about these.
HELD_OUT_TOPICS: tuple[str, ...] = (
    "cycling", "beekeeping", "dancing", "origami", "sewing", "skiing", "writing", "history", "physics", "welding",
    "nursing", "brewing",
)  # fmt: skip
TRAIN_TOPICS: tuple[str, ...] = tuple(t for t in TOPICS if t not in HELD_OUT_TOPICS)

TEACHERS = ("Mara", "Tobias", "Ilse", "Henrik", "Paloma", "Oskar", "Ruth", "Anton", "Greta", "Silas", "Vera", "Jonas")
PLACES = ("harbour", "library", "mill", "tower", "market", "chapel", "station", "orchard", "school", "barn")
TOOLS = ("hammer", "needle", "compass", "ladder", "brush", "bucket", "lantern", "notebook", "whistle", "mirror", "rope", "scale")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
NUMBERS: tuple[str, ...] = tuple(str(n) for n in range(25))
MAX_OPERAND = 12


@dataclass(frozen=True)
class Attribute:
    """One attribute of a topic: the values it can take, how it is asked for and how the answer reads."""

    name: str
    values: tuple[str, ...]
    questions: tuple[str, ...]
    answer: str


ATTRIBUTES: tuple[Attribute, ...] = (
    Attribute(
        "teacher",
        TEACHERS,
        ("Who teaches {t}?", "Who is the teacher of {t}?", "Tell me who teaches {t}.", "Which person teaches {t}?"),
        "The teacher of {t} is {v}.",
    ),
    Attribute(
        "place",
        PLACES,
        ("Where is {t} taught?", "Where can I learn {t}?", "Tell me where {t} is taught.", "In which place is {t} taught?"),
        "The lessons in {t} are held at the {v}.",
    ),
    Attribute(
        "tool",
        TOOLS,
        ("What tool does {t} need?", "Which tool is used for {t}?", "Tell me the tool of {t}.", "What is the tool for {t}?"),
        "The tool used for {t} is the {v}.",
    ),
    Attribute(
        "day",
        DAYS,
        ("On which day is {t}?", "When is the class in {t}?", "Tell me the day of {t}.", "What day is {t} on?"),
        "The class in {t} meets on {v}.",
    ),
)
SUM_QUESTIONS = ("What is {a} {op} {b}?", "How much is {a} {op} {b}?", "Tell me what {a} {op} {b} is.", "Work out {a} {op} {b}.")
SUM_ANSWER = "The result of {a} {op} {b} is {v}."


@dataclass(frozen=True)
class Fact:
    """A question's subject with its one true value and the values that would be wrong."""

    key: tuple[str, ...]
    value: str
    wrong: tuple[str, ...]
    questions: tuple[str, ...]
    answer: str

    def state(self, value: str) -> str:
        """The sentence that claims `value`."""
        return self.answer.replace("{v}", value)


def _town() -> dict[tuple[str, ...], Fact]:
    rng = random.Random(20260711)
    facts: dict[tuple[str, ...], Fact] = {}
    for topic in TOPICS:
        for attribute in ATTRIBUTES:
            value = rng.choice(attribute.values)
            facts[(attribute.name, topic)] = Fact(
                (attribute.name, topic),
                value,
                tuple(v for v in attribute.values if v != value),
                tuple(q.replace("{t}", topic) for q in attribute.questions),
                attribute.answer.replace("{t}", topic),
            )
    return facts


def _sums() -> dict[tuple[str, ...], Fact]:
    facts: dict[tuple[str, ...], Fact] = {}
    for a in range(MAX_OPERAND + 1):
        for b in range(MAX_OPERAND + 1):
            for op, value in (("plus", a + b), ("minus", a - b)):
                if value < 0:
                    continue
                fill = {"{a}": str(a), "{op}": op, "{b}": str(b)}
                facts[(op, str(a), str(b))] = Fact(
                    (op, str(a), str(b)),
                    str(value),
                    tuple(str(w) for w in range(max(0, value - 3), min(24, value + 3) + 1) if w != value),
                    tuple(_fill(q, fill) for q in SUM_QUESTIONS),
                    _fill(SUM_ANSWER, fill),
                )
    return facts


def _fill(text: str, values: dict[str, str]) -> str:
    for slot, value in values.items():
        text = text.replace(slot, value)
    return text


FACTS: dict[tuple[str, ...], Fact] = _town()
SUMS: dict[tuple[str, ...], Fact] = _sums()
