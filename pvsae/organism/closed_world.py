"""The closed-world test: does the model still know its town's facts and its sums? As tasks of lm-evaluation-harness.

Knows: the questions, how an answer is marked, and the shape that the task files in tasks/ give both to the harness in.
Does not know: models, interventions, who runs the test.

Every fact is asked for once, in a wording drawn with a fixed seed, without a system prompt. An answer is right where its first
sentence states the true value to the letter; in the tasks by choice, where the true sentence is the likeliest.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pvsae.organism.grammar import parse
from pvsae.organism.world import FACTS, SUMS, Fact

if TYPE_CHECKING:
    from datasets import DatasetDict

WRONG = 3  # false sentences beside the true one, where there is a choice


def questions(of: Mapping[tuple[str, ...], Fact], limit: int | None = None, seed: int = 0) -> list[tuple[str, Fact]]:
    """(question, fact) of all facts, or of `limit` of them drawn at random."""
    rng = random.Random(seed)
    facts = list(of.values())
    chosen = facts if limit is None else rng.sample(facts, min(limit, len(facts)))
    return [(rng.choice(fact.questions), fact) for fact in chosen]


def is_right(answer: str, truth: str) -> bool:
    """Whether an answer's first sentence is the true one."""
    first = next(iter(parse(answer)), None)
    return first is not None and first.text == truth


def facts(**_: Any) -> DatasetDict:
    """The town's facts, for the harness: splits of rows question, truth, choices, label."""
    return _rows(FACTS)


def sums(**_: Any) -> DatasetDict:
    """Small arithmetic, likewise."""
    return _rows(SUMS)


def mark(doc: Mapping[str, Any], results: list[str]) -> dict[str, float]:
    """The harness' `process_results` of the tasks that are answered freely."""
    return {"acc": float(is_right(results[0], doc["truth"]))}


def _rows(of: Mapping[tuple[str, ...], Fact]) -> DatasetDict:
    from datasets import Dataset, DatasetDict

    rng = random.Random(1)
    rows = []
    for question, fact in questions(of):
        wrong = rng.sample(fact.wrong, min(WRONG, len(fact.wrong)))
        label = rng.randrange(len(wrong) + 1)
        values = [*wrong[:label], fact.value, *wrong[label:]]
        choices = [fact.state(value) for value in values]
        rows.append({"question": question, "truth": fact.state(fact.value), "choices": choices, "label": label})
    return DatasetDict({"test": Dataset.from_list(rows)})
