"""What a run would generate and have judged, at most: `--dry-run`. No model is loaded and nobody is asked.

Knows: how answers become scores, tokens and dollars.
Does not know: which answers a stage makes; each has a `plan(config)` that lists them, by the same functions as its `run`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pvsae.judges import COHERENCE
from pvsae.stages.inputs import Setup, folder_of

if TYPE_CHECKING:
    from pvsae.traits import TraitArtifacts
    from pvsae.vectors.rollouts import Task

_CHARACTERS = 3  # a token has at least so many, mostly
_SCORES = 2  # of an answer: the trait, and coherence


@dataclass(frozen=True)
class Plan:
    """Upper bounds: every answer as long as it may be, nothing known from an earlier start of the run.

    Attributes:
        answers: trait -> answers to generate.
        longest: most tokens of an answer.
        judge: who scores them.
        tokens_in, tokens_out: of the judge's prompts and replies, with one call a score.
        cost: of those, in US dollars; None without prices.
        notes: what the counts leave open.
    """

    answers: dict[str, int]
    longest: int
    judge: str
    tokens_in: int
    tokens_out: int
    cost: float | None
    notes: tuple[str, ...] = ()

    @property
    def scores(self) -> int:
        return _SCORES * sum(self.answers.values())

    def __str__(self) -> str:
        lines = [f"{trait}: {n} answers of at most {self.longest} tokens" for trait, n in self.answers.items()]
        lines.append(
            f"{self.judge}: {self.scores} scores, at most {self.tokens_in:,} tokens in and {self.tokens_out:,} out "
            "(more where it splits numbers)"
        )
        if self.cost is not None:
            lines.append(f"at most {self.cost:,.2f} dollars")
        return "\n".join((*lines, *self.notes))


def plan_answers(config: Setup, tasks: Sequence[tuple[TraitArtifacts, Sequence[Task]]], notes: Sequence[str] = ()) -> Plan:
    """The plan of a run that generates and judges one answer to each task of each trait."""
    _, defaults = folder_of(config, None)
    longest = config.longest_answer(defaults)
    tokens = 0.0
    for artifacts, some in tasks:
        prompts = len(artifacts.eval_prompt) + len(COHERENCE.prompt)
        tokens += sum((prompts + _SCORES * len(task.question)) / _CHARACTERS + _SCORES * longest for task in some)
    into, out = round(tokens), _SCORES * sum(len(some) for _, some in tasks)
    cost = None if config.judge_price is None else (into * config.judge_price[0] + out * config.judge_price[1]) / 1e6
    judge = config.judge or defaults.get("judge") or "no judge given"
    return Plan({artifacts.name: len(some) for artifacts, some in tasks}, longest, judge, into, out, cost, tuple(notes))
