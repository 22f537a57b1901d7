"""Harvest: rows in, the residuals of their wanted tokens out, for several blocks from one forward pass.

Knows: the hook API, how rows are grouped into passes of like length and padded, that nothing above the highest block is run.
Does not know: where rows come from, filters, buffers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from pvsae.models import ChatModel, Positions, TokenBatch, halving_on_oom, length_sorted_batches
from pvsae.models.captures import Read
from pvsae.saes.buffer import Batch
from pvsae.saes.corpus import Row


@dataclass(frozen=True, eq=False)
class TokenResiduals:
    """A capture: the residuals of some tokens of a padded batch, [tokens d_model] for each block, in one piece and one dtype.

    Its result is a list with one tensor a block. Unlike `Residual` it is told where the tokens are, so that a GPU need not be
    waited for to find out how many there are, and it splits nothing by rows.

    Attributes:
        blocks: which blocks' outputs to read.
        index: positions in the batch, flattened: row * width + position.
        dtype: of the result.
    """

    blocks: tuple[int, ...]
    index: Int[Tensor, " tokens"]
    dtype: torch.dtype
    needed_span: ClassVar[None] = None
    d_model: ClassVar[None] = None

    @property
    def key(self) -> str:
        return "tokens:" + ",".join(map(str, self.blocks))

    def problem(self) -> str | None:
        return None

    def read(self, h: Float[Tensor, "batch pos d_model"], positions: Positions) -> Read:
        return h.flatten(0, 1).index_select(0, self.index).to(self.dtype)

    def join(self, parts: list[Read]) -> Read:
        return [part for part in parts if isinstance(part, Tensor)]


def harvest(model: ChatModel, rows: Sequence[Row], blocks: Sequence[int], dtype: torch.dtype) -> Batch:
    """Residuals of the rows' wanted tokens: block -> [tokens d_model], rows in the order given, on the model's device.

    One forward pass, which ends at the highest of the blocks; rows that do not fit into memory together are run in parts.

    Raises: UserError for an unknown block, and if a single row does not fit into memory.
    """
    capture_blocks = tuple(sorted(set(blocks)))

    def run(indices: list[int]) -> list[Tensor]:
        batch, index = padded([rows[i] for i in indices], model)
        capture = TokenResiduals(capture_blocks, index, dtype)
        with torch.no_grad(), model.hooks(captures=[capture]) as session:
            model.forward(batch, logits=None)
            read = session.take()[capture.key][0]
        assert isinstance(read, list)
        return read

    parts = [read for _, read in halving_on_oom([range(len(rows))], run)]
    if len(parts) == 1:
        return dict(zip(capture_blocks, parts[0], strict=True))
    return {b: torch.cat([part[i] for part in parts]) for i, b in enumerate(capture_blocks)}


def padded(rows: Sequence[Row], model: ChatModel) -> tuple[TokenBatch, Int[Tensor, " tokens"]]:
    """Rows padded on the right to the longest one, and the flat indices of their wanted tokens, both on the model's device."""
    width = max(len(row.ids) for row in rows)
    ids = np.full((len(rows), width), model.pad_id, dtype=np.int64)
    real, keep = np.zeros((2, len(rows), width), dtype=bool)
    for i, row in enumerate(rows):
        n = len(row.ids)
        ids[i, :n], real[i, :n], keep[i, :n] = row.ids, True, row.keep
    is_real, index = torch.from_numpy(real), torch.from_numpy(np.flatnonzero(keep))
    input_ids = torch.from_numpy(ids)
    if model.device.type == "cuda":  # pinned, so that copying does not wait for what the GPU is at
        input_ids, is_real, index = (t.pin_memory().to(model.device, non_blocking=True) for t in (input_ids, is_real, index))
    nowhere = torch.zeros_like(is_real)
    places = torch.arange(width, device=is_real.device).expand_as(input_ids)
    positions = Positions(is_real, nowhere, nowhere)
    return TokenBatch(input_ids, is_real.long(), places, positions, left_padded=False), index


def windows(rows: Iterator[Row], batch_tokens: int, passes: int) -> Iterator[list[Row]]:
    """Rows in groups that are worth `passes` forward passes, so that rows of like length can be found for each of them."""
    window: list[Row] = []
    tokens = 0
    for row in rows:
        window.append(row)
        tokens += len(row.ids)
        if tokens >= batch_tokens * passes:
            yield window
            window, tokens = [], 0
    if window:
        yield window


def passes_of(window: Sequence[Row], batch_tokens: int, seed: Sequence[int]) -> list[list[Row]]:
    """A window's rows as forward passes of at most `batch_tokens` tokens, padding counted, each of rows of like length.

    Their order is random, so that long rows do not come first in every window.
    """
    batches = length_sorted_batches([len(row.ids) for row in window], batch_tokens=batch_tokens)
    order = np.random.default_rng(tuple(seed)).permutation(len(batches))
    return [[window[i] for i in batches[j]] for j in order]
