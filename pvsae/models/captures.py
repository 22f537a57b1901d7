"""Captures: what is read from the residual stream, reduced on the spot, as frozen dataclasses.

Knows: how a residual and the positions of a batch become one small fp32 result a row.
Does not know: modules, hooks, batches; `hooks.py` calls `read` inside a forward pass, after every intervention at that block.

Every capture has `key` (a stable name for its result), `blocks` (which blocks' outputs it reads), `needed_span` (the span that no
row may lack, or None), `d_model` (what it expects of the model, or None) and `problem()` (why it cannot be taken, or None).
`read(h, positions)` gives [rows, ...] or a list with one tensor a row; `join` puts the parts of several blocks together. Nothing
is detached: a loss may be made of a capture.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pvsae.models.batch import Positions
from pvsae.models.interventions import Dictionary, Direction, feature_acts, outliers_of

Read = Tensor | list[Tensor]
SPANS = ("prompt", "answer", "all", "system", "user")


class Capture(Protocol):
    """What hooks.py asks of a capture; see the head of this module."""

    @property
    def key(self) -> str: ...
    @property
    def blocks(self) -> tuple[int, ...]: ...
    @property
    def needed_span(self) -> str | None: ...
    @property
    def d_model(self) -> int | None: ...
    def problem(self) -> str | None: ...
    def read(self, h: Float[Tensor, "batch pos d_model"], positions: Positions) -> Read: ...
    def join(self, parts: list[Read]) -> Read: ...


@dataclass(frozen=True)
class SpanMean:
    """Mean residual over a span's tokens: [rows, len(blocks), d_model] in fp32 (paper, extraction: prompt and response averages).

    A span by role ("system", "user") is the content of the last message of that role. Rows without such tokens are NaN in a
    forward pass of one's own, and an error in `ChatModel.capture`.
    """

    blocks: tuple[int, ...]
    span: str = "answer"
    d_model: ClassVar[None] = None

    @property
    def key(self) -> str:
        return f"mean:{self.span}:{_blocks(self.blocks)}"

    @property
    def needed_span(self) -> str | None:
        return self.span

    def problem(self) -> str | None:
        return _span_problem(self.span)

    def read(self, h: Float[Tensor, "batch pos d_model"], positions: Positions) -> Float[Tensor, "batch d_model"]:
        return span_mean(h, positions.span(self.span))

    def join(self, parts: list[Read]) -> Read:
        return torch.stack(_tensors(parts), dim=1)


@dataclass(frozen=True)
class LastPrompt:
    """Residual of the last prompt token: [rows, len(blocks), d_model] in fp32 (paper, monitoring before the answer)."""

    blocks: tuple[int, ...]
    needed_span: ClassVar[None] = None
    d_model: ClassVar[None] = None

    @property
    def key(self) -> str:
        return f"last_prompt:{_blocks(self.blocks)}"

    def problem(self) -> str | None:
        return None

    def read(self, h: Float[Tensor, "batch pos d_model"], positions: Positions) -> Float[Tensor, "batch d_model"]:
        at = positions.last_prompt.int().argmax(1)
        here = h[torch.arange(h.shape[0], device=h.device), at].float()
        # A decode step has no last prompt token; argmax of nothing is 0, which would be a wrong row rather than none.
        return here.masked_fill(~positions.last_prompt.any(1, keepdim=True), float("nan"))

    def join(self, parts: list[Read]) -> Read:
        return torch.stack(_tensors(parts), dim=1)


@dataclass(frozen=True)
class Projection:
    """Projection on UNIT directions at one block: per token, or the mean over a span (paper, monitoring).

    Result: with a span, [rows, n_directions]; without, a list with one [tokens, n_directions] a row, over every real token.
    """

    directions: tuple[Direction, ...]
    block: int
    span: str | None = None

    @property
    def key(self) -> str:
        names = hashlib.sha256("".join(d.sha256 for d in self.directions).encode()).hexdigest()[:12]
        return f"projection:{self.span or 'tokens'}:{self.block}:{names}"

    @property
    def blocks(self) -> tuple[int, ...]:
        return (self.block,)

    @property
    def needed_span(self) -> str | None:
        return self.span

    @property
    def d_model(self) -> int | None:
        return self.directions[0].d_model if self.directions else None

    def problem(self) -> str | None:
        if not self.directions:
            return "a Projection without directions"
        if len({d.d_model for d in self.directions}) > 1:
            return "a Projection on directions of different d_model"
        broken = [d.problem(needs_length=True) for d in self.directions]
        return next((b for b in broken if b), None) or (_span_problem(self.span) if self.span else None)

    def read(self, h: Float[Tensor, "batch pos d_model"], positions: Positions) -> Read:
        # Stacked anew at each forward: [n, d_model] is nothing beside a residual, and the capture stays a plain value.
        units = torch.stack([d.unit for d in self.directions]).to(h.device)
        projected = h.float() @ units.T
        if self.span:
            return span_mean(projected, positions.span(self.span))
        return per_row(projected, positions.all)

    def join(self, parts: list[Read]) -> Read:
        return parts[0]


@dataclass(frozen=True)
class Residual:
    """The residuals of a span's tokens at one block: a list with one [tokens, d_model] a row, in fp32."""

    block: int
    span: str = "all"
    needed_span: ClassVar[None] = None
    d_model: ClassVar[None] = None

    @property
    def key(self) -> str:
        return f"residual:{self.span}:{self.block}"

    @property
    def blocks(self) -> tuple[int, ...]:
        return (self.block,)

    def problem(self) -> str | None:
        return _span_problem(self.span)

    def read(self, h: Float[Tensor, "batch pos d_model"], positions: Positions) -> Read:
        return per_row(h, positions.span(self.span))

    def join(self, parts: list[Read]) -> Read:
        return parts[0]


@dataclass(frozen=True)
class FeatureActs:
    """Feature activations of a dictionary on a span's tokens: a list with one [tokens, n_features] a row, in fp32.

    `indices` keeps those features alone, in that order; None keeps all of them. Only the span's tokens are encoded. At a token
    that the dictionary takes for an outlier every activation is 0.
    """

    dictionary: Dictionary
    block: int
    span: str = "answer"
    indices: tuple[int, ...] | None = None
    needed_span: ClassVar[None] = None

    @property
    def key(self) -> str:
        some = "all" if self.indices is None else hashlib.sha256(repr(self.indices).encode()).hexdigest()[:12]
        return f"features:{self.dictionary.ref}:{self.span}:{self.block}:{some}"

    @property
    def blocks(self) -> tuple[int, ...]:
        return (self.block,)

    @property
    def d_model(self) -> int | None:
        return self.dictionary.W_dec.shape[1]

    def problem(self) -> str | None:
        d_sae = self.dictionary.W_dec.shape[0]
        wrong = [i for i in self.indices or () if not 0 <= i < d_sae]
        if wrong:
            return f"features {wrong[:5]} of a dictionary with {d_sae} features (0..{d_sae - 1})"
        return _span_problem(self.span)

    def read(self, h: Float[Tensor, "batch pos d_model"], positions: Positions) -> Read:
        mask = positions.span(self.span)
        tokens = h[mask]
        some = self.indices
        acts = self.dictionary.encode(tokens).float() if some is None else feature_acts(self.dictionary, tokens, some)
        left = outliers_of(self.dictionary, tokens)
        if left is not None:
            acts = acts.masked_fill(left.to(acts.device)[:, None], 0.0)
        return list(acts.split(mask.sum(1).tolist()))

    def join(self, parts: list[Read]) -> Read:
        return parts[0]


def span_mean(x: Float[Tensor, "batch pos n"], mask: Bool[Tensor, "batch pos"]) -> Float[Tensor, "batch n"]:
    """Mean over masked positions in fp32. What stands outside of the mask does not count, not even NaN; no position gives NaN."""
    total = torch.where(mask[..., None], x, 0).sum(1, dtype=torch.float32)
    return total / mask.sum(1, keepdim=True)


def per_row(x: Float[Tensor, "batch pos n"], mask: Bool[Tensor, "batch pos"]) -> list[Tensor]:
    """The masked positions of every row as tensors [tokens, n] of fp32."""
    return list(x[mask].float().split(mask.sum(1).tolist()))


def _blocks(blocks: tuple[int, ...]) -> str:
    """Blocks in short: "0-27" for a run, "3,7" otherwise."""
    if len(blocks) > 2 and blocks == tuple(range(blocks[0], blocks[-1] + 1)):
        return f"{blocks[0]}-{blocks[-1]}"
    return ",".join(map(str, blocks))


def _span_problem(span: str) -> str | None:
    return None if span in SPANS else f"span {span!r} (there are: {', '.join(SPANS)})"


def _tensors(parts: list[Read]) -> list[Tensor]:
    return [part for part in parts if isinstance(part, Tensor)]
