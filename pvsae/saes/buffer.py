"""Shuffle buffer: activations go in pass by pass and come out in random batches, the same tokens for every block.

Knows: one preallocated tensor a block, which of its rows are taken, and a seeded generator.
Does not know: models, where activations come from, what a batch is for.

Nothing is ever moved: a batch is gathered from random rows, and what comes in next is written into the rows it left. Only the
list of row numbers is shuffled, after every addition, so each batch is a uniform draw from everything that is in the buffer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from pvsae.errors import UserError
from pvsae.saes.later import to_device

Batch = dict[int, Tensor]  # block -> [tokens d_model], the same tokens for every block


class ShuffleBuffer:
    """Room for `capacity` tokens of every block."""

    def __init__(
        self,
        blocks: Sequence[int],
        capacity: int,
        d_model: int,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        """Allocates the buffer.

        Raises: UserError if there is not so much memory.
        """
        self.capacity = capacity
        try:
            self.data: Batch = {b: torch.empty(capacity, d_model, dtype=dtype, device=device) for b in blocks}
        except (RuntimeError, MemoryError) as error:
            gib = capacity * d_model * dtype.itemsize * len(blocks) / 2**30
            raise UserError(
                f"no memory for a shuffle buffer of {capacity:,} tokens ({gib:.1f} GiB on {device})",
                "a buffer that fits",
                "use fewer buffer_tokens, or buffer_device: cpu",
            ) from error
        self._generator = torch.Generator().manual_seed(seed)
        # The first `_n` rows of `_order` hold tokens and come out from the back; the others are free.
        self._order: Int[Tensor, " capacity"] = torch.arange(capacity)
        self._n = 0

    def __len__(self) -> int:
        """Tokens in the buffer."""
        return self._n

    @property
    def free(self) -> int:
        """Tokens for which there is room."""
        return self.capacity - self._n

    def add(self, activations: Mapping[int, Tensor], keep: Int[Tensor, " kept"] | None = None) -> None:
        """Writes tokens into free rows.

        Args:
            activations: block -> [tokens d_model].
            keep: which of the tokens; None for all.
        """
        some = next(iter(activations.values()))
        n = len(some) if keep is None else len(keep)
        if n > self.free:
            raise ValueError(f"{n} tokens into a buffer with room for {self.free}")
        rows = self._order[self._n : self._n + n]
        for block, data in self.data.items():
            new = activations[block] if keep is None else activations[block].index_select(0, keep)
            data.index_copy_(0, to_device(rows, data.device), new.to(data.device, data.dtype))
        self._n += n
        self._order[: self._n] = self._order[: self._n][torch.randperm(self._n, generator=self._generator)]

    def take(self, n: int) -> Batch:
        """Takes n random tokens out: block -> [n d_model], in tensors of their own."""
        if n > self._n:
            raise ValueError(f"{n} tokens from a buffer that holds {self._n}")
        self._n -= n
        rows = self._order[self._n : self._n + n]
        return {block: data.index_select(0, to_device(rows, data.device)) for block, data in self.data.items()}

    # ------------------------------------------------------------------------------------------------------------ state
    def state(self) -> dict[str, Any]:
        """What is in the buffer, in the order in which it would come out, and the generator: copies on the CPU.

        Copying costs a moment; making the same tokens again would take the forward passes of many times the buffer, since a
        token may stay for long.
        """
        rows = self._order[: self._n]
        return {
            "generator": self._generator.get_state(),
            "activations": {block: data.index_select(0, rows.to(data.device)).cpu() for block, data in self.data.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Puts back what `state` gave. Which row a token stands in does not matter for what comes out."""
        held = {int(block): tensor for block, tensor in state["activations"].items()}
        n = len(next(iter(held.values())))
        if held.keys() != self.data.keys() or n > self.capacity:
            raise UserError(
                f"a buffer of blocks {sorted(held)} with {n:,} tokens", f"blocks {sorted(self.data)}, {self.capacity:,}"
            )
        for block, data in self.data.items():
            data[:n].copy_(held[block])
        self._order, self._n = torch.arange(self.capacity), n
        self._generator.set_state(state["generator"])
