"""What a run would generate and have judged, about: `--dry-run`. No model is loaded and nobody is asked.

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

_BYTES = 3  # a token has at least so many, mostly: in UTF-8, where letters of other scripts take two to four
_REPLY = 16  # most tokens of a judge's reply that is read as text (OpenAIJudge's `text_tokens`); one where log-probabilities are
_SCORES = 2  # of an answer: the trait, and coherence


@dataclass(frozen=True)
class Plan:
    """Every answer as long as it may be, every reply read as text, nothing known from an earlier start of the run.

    Answers and scores are exact. Tokens in are an estimate, and a judge that splits numbers may be asked several times a score,
    so neither they nor the cost are bounds.

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
            f"{self.judge}: {self.scores} scores, about {self.tokens_in:,} tokens in and {self.tokens_out:,} out if every answer "
            "is as long as it may be (more where it splits numbers)"
        )
        if self.cost is not None:
            lines.append(f"about {self.cost:,.2f} dollars then")
        return "\n".join((*lines, *self.notes))


def plan_answers(config: Setup, tasks: Sequence[tuple[TraitArtifacts, Sequence[Task]]], notes: Sequence[str] = ()) -> Plan:
    """The plan of a run that generates and judges one answer to each task of each trait."""
    _, defaults = folder_of(config, None)
    longest = config.longest_answer(defaults)
    tokens = 0.0
    for artifacts, some in tasks:
        prompts = _bytes(artifacts.eval_prompt) + _bytes(COHERENCE.prompt)
        tokens += sum((prompts + _SCORES * _bytes(task.question)) / _BYTES + _SCORES * longest for task in some)
    into, out = round(tokens), _REPLY * _SCORES * sum(len(some) for _, some in tasks)
    cost = None if config.judge_price is None else (into * config.judge_price[0] + out * config.judge_price[1]) / 1e6
    judge = config.judge or defaults.get("judge") or "no judge given"
    return Plan({artifacts.name: len(some) for artifacts, some in tasks}, longest, judge, into, out, cost, tuple(notes))


def _bytes(text: str) -> int:
    return len(text.encode())
