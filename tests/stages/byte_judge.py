"""A judge that needs no model: a score is a hash of the answer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from pvsae.judges import Metric, Score


class ByteJudge:
    """Scores an answer by a hash of its text: repeatable, spread over 0-100, and of no opinion. Coherence is always 80.

    Every `fail_every`th answer or so gets no score, as from a judge that refuses.
    """

    name = "bytes"

    def __init__(self, fail_every: int = 0) -> None:
        self.fail_every = fail_every
        self.asked = 0

    def score(self, metric: Metric, pairs: Sequence[tuple[str, str]], progress: str | None = None) -> list[Score]:
        self.asked += len(pairs)
        return [self._one(metric, answer) for _, answer in pairs]

    def _one(self, metric: Metric, answer: str) -> Score:
        number = int.from_bytes(hashlib.sha256(answer.encode()).digest()[:4], "big")
        failed = bool(self.fail_every) and number % self.fail_every == 0
        value = None if failed else 80.0 if metric.name == "coherence" else float(number % 101)
        return Score(
            value=value,
            mode="failed" if failed else "rules",
            mass=None,
            refusal=False,
            top=(),
            judge=self.name,
            prompt_hash="0",
            error="refused" if failed else None,
        )


class BlindJudge(ByteJudge):
    """A byte judge that sees nothing of one trait: its scores are all 0."""

    def __init__(self, trait: str) -> None:
        super().__init__()
        self.trait = trait

    def _one(self, metric: Metric, answer: str) -> Score:
        score = super()._one(metric, answer)
        return replace(score, value=0.0) if metric.name == self.trait else score
