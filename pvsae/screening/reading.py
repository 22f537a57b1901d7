"""Reading: what a forward pass leaves of a row, reduced inside the hook: projections and one length, never a residual.

Knows: persona vectors at blocks, the names of their columns, the released code's names for them.
Does not know: rows, files, where base answers come from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from pvsae.models.captures import Read, span_mean
from pvsae.models.interventions import Direction

if TYPE_CHECKING:
    from pvsae.models import ChatModel
    from pvsae.models.batch import Positions
    from pvsae.models.chat import Rendered

QUANTITIES = ("dp", "proj", "base_proj", "prompt_last_proj", "cos_sim")
"""Projection difference; mean answer residual on the unit vector, of the data's answer and of the base model's; the last prompt
token's residual on it; cosine of the data's mean answer residual with it."""


@dataclass(frozen=True)
class Probe:
    """A vector at a block.

    Attributes:
        name: the trait, or what tells several vectors of one trait apart; begins the names of its columns.
        stem: the name that the released code's file of this vector has, without its suffix.
        block: where it is read.
        direction: the vector, of any length.
    """

    name: str
    stem: str
    block: int
    direction: Direction

    @property
    def label(self) -> str:
        return f"{self.name}, block {self.block}"

    def column(self, quantity: str, model: str | None = None) -> str:
        """Name of a column. With a model's name it is the released code's: MODEL_STEM_QUANTITY_layerL, L = block + 1."""
        if model is None:
            return f"{self.name}_{quantity}_block{self.block}"
        return f"{model}_{self.stem}_{quantity}_layer{self.block + 1}"


@dataclass(frozen=True)
class AnswerReading:
    """Of n directions at one block: [rows, 2n + 1]: projections of the mean answer residual, projections of the last prompt
    token's residual, both on the unit directions, and the length of the mean. A row without an answer has NaN but in the second.
    """

    directions: tuple[Direction, ...]
    block: int
    needed_span: ClassVar[None] = None

    @property
    def key(self) -> str:
        names = hashlib.sha256("".join(d.sha256 for d in self.directions).encode()).hexdigest()[:12]
        return f"answer_reading:{self.block}:{names}"

    @property
    def blocks(self) -> tuple[int, ...]:
        return (self.block,)

    @property
    def d_model(self) -> int | None:
        return self.directions[0].d_model if self.directions else None

    def problem(self) -> str | None:
        return next((p for p in (d.problem(needs_length=True) for d in self.directions) if p), None)

    def read(self, h: Float[Tensor, "batch pos d_model"], positions: Positions) -> Float[Tensor, "batch n"]:
        units = torch.stack([d.unit for d in self.directions]).to(h.device)
        mean = span_mean(h, positions.span("answer"))
        last = h[torch.arange(len(h), device=h.device), positions.last_prompt.int().argmax(1)].float()
        return torch.cat([mean @ units.T, last @ units.T, mean.norm(dim=1, keepdim=True)], dim=1)

    def join(self, parts: list[Read]) -> Read:
        return parts[0]


@dataclass(frozen=True)
class Readings:
    """What was read of rows, a column a probe: `proj` and `last` are projections, `cos` is proj / length. fp32."""

    proj: Float[Tensor, "rows probes"]
    last: Float[Tensor, "rows probes"]
    cos: Float[Tensor, "rows probes"]


def read(model: ChatModel, rows: Sequence[Rendered], probes: Sequence[Probe], batch_tokens: int) -> Readings:
    """Reads every probe off rows (prompt and answer, none longer than the context) in one forward pass a batch.

    Raises:
        UserError: a probe that does not fit the model, activations that are not finite.
    """
    captures = captures_of(probes)
    found = model.capture(rows, list(captures), batch_tokens=batch_tokens) if rows else {}
    out = [torch.full((len(rows), len(probes)), float("nan")) for _ in range(3)]
    for capture, indices in captures.items():
        if rows:
            values, n = found[capture.key], len(indices)
            proj, last, length = values[:, :n], values[:, n : 2 * n], values[:, 2 * n :]
            for part, value in zip(out, (proj, last, proj / length), strict=True):
                part[:, indices] = value
    return Readings(*out)


def captures_of(probes: Sequence[Probe]) -> dict[AnswerReading, list[int]]:
    """One capture a block, and which probes stand in its columns."""
    at: dict[int, list[int]] = {}
    for i, probe in enumerate(probes):
        at.setdefault(probe.block, []).append(i)
    return {AnswerReading(tuple(probes[i].direction for i in some), block): some for block, some in at.items()}
