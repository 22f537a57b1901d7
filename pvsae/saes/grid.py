"""Processes in a grid, data x width: what each of them holds, and what the largest activations of all of them are.

Knows: which tokens and which latents a process holds, joint selection and its ties.
Does not know: dictionaries, gradients, or how processes talk to each other (parallel.py).

The processes of a row have the same tokens, the r-th of equal runs of the joint batch, and the c-th of them has the c-th of
equal runs of the latents. The processes of a column have the same latents. With that order the joint step does to every number
what a single process would do, up to the order of sums. Neighbours are in one row: what they send each other, reconstructions
of every token, is more than what goes along columns where there is more than one node.

Joint selection is radix selection: all processes count the digits of their values, counts are summed, and the digit of the one
that is wanted is read off. What is sent are a few thousand counts, however many values there are, and nothing waits for a number
from a device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from pvsae.errors import UserError
from pvsae.saes.kernels import kth_largest
from pvsae.saes.parallel import ALONE, Group

DIGIT_BITS = 11
VALUE_BITS = 31  # a positive fp32, as an integer


@dataclass(frozen=True)
class Grid:
    """data x width processes.

    Attributes:
        everyone: all of them; process data.rank * width.size + width.rank.
        data: those with this process' latents (its column).
        width: those with this process' tokens (its row).
    """

    everyone: Group = ALONE
    data: Group = ALONE
    width: Group = ALONE

    @property
    def row(self) -> Grid:
        """This process' row by itself: a whole dictionary on tokens that nobody else counts."""
        return Grid(self.width, ALONE, self.width)

    def largest(self, index: Int[Tensor, " n"], value: Float[Tensor, " n"], k: int, batch: int, d_sae: int) -> tuple[float, int]:
        """The k-th largest value over all processes, and how many of the values equal to it this process keeps, so that k are
        kept in all: those of the first tokens, and within a token of the first latents.

        Args:
            index: token * d_sae + latent, counted within this process, ascending.
            value: above 0; all processes have at least k together.
            batch, d_sae: tokens and latents of one process.
        """
        if self.everyone.size == 1:
            threshold = kth_largest(value, k)
            return threshold, k - int((value > threshold).sum())
        key, rank = kth_smallest(_falling(value), k, VALUE_BITS, self.everyone)
        threshold = float(_value_of(key))
        if self.width.size == 1:  # the ranks' own order is that of the tokens
            before = self.data.stack((value == threshold).sum())[: self.data.rank].sum()
            return threshold, max(0, int(rank - before))
        places = self.places(index[value == threshold], batch, d_sae)
        last, _ = kth_smallest(places, rank, self.place_bits(batch, d_sae), self.everyone)
        return threshold, int((places <= last).sum())

    def kth_largest(self, values: Float[Tensor, " n"], k: int) -> Float[Tensor, ""]:
        """The k-th largest of values from 0 on that all processes have together, on their device."""
        return _value_of(kth_smallest(_falling(values), k, VALUE_BITS, self.everyone)[0])

    def places(self, index: Int[Tensor, " n"], batch: int, d_sae: int) -> Int[Tensor, " n"]:
        """token * d_sae + latent within this process -> the same, counted over all processes. Args as `largest`."""
        token = torch.div(index, d_sae, rounding_mode="floor")
        start = self.data.rank * batch * d_sae * self.width.size + self.width.rank * d_sae
        return index + token * (d_sae * (self.width.size - 1)) + start

    def here(self, places: Int[Tensor, " n"], batch: int, d_sae: int) -> Int[Tensor, " n"]:
        """The inverse of `places`, for those that are this process' own."""
        token = torch.div(places, d_sae * self.width.size, rounding_mode="floor")
        start = self.data.rank * batch * d_sae + self.width.rank * d_sae
        return places - token * (d_sae * (self.width.size - 1)) - start

    def place_bits(self, batch: int, d_sae: int) -> int:
        """Bits of the largest of the joint places."""
        return (self.everyone.size * batch * d_sae - 1).bit_length()


SINGLE = Grid()


def check_shards(processes: int, width: int) -> None:
    """Raises UserError if the processes do not fill whole rows of `width`."""
    if processes % width:
        raise UserError(
            f"training.width_shards is {width}, and there {_processes(processes)}",
            f"a number of processes that is a multiple of {width}",
            f"start it with torchrun --nproc_per_node {width}, or set training.width_shards=1",
        )


def grid_of(everyone: Group, width: int) -> Grid:
    """The grid with `width` processes a row. Every process has to call this, with the same width. UserError as `check_shards`."""
    check_shards(everyone.size, width)
    if width == 1:
        return Grid(everyone, everyone, ALONE)
    if width == everyone.size:
        return Grid(everyone, ALONE, everyone)
    n = everyone.size // width
    row, column = divmod(everyone.rank, width)
    # All processes make all groups, in the same order: torch.distributed asks for that.
    rows = [dist.new_group([r * width + c for c in range(width)]) for r in range(n)]
    columns = [dist.new_group([r * width + c for r in range(n)]) for c in range(width)]
    return Grid(everyone, Group(row, n, columns[column]), Group(column, width, rows[row]))


def kth_smallest(keys: Int[Tensor, " n"], k: int | Int[Tensor, ""], bits: int, group: Group) -> tuple[Tensor, Tensor]:
    """The k-th smallest of the keys of all processes, and k less the number of smaller ones; both int64 on the device.

    Args:
        keys: from 0 to below 2**bits, in any order; a process may have none.
        k: from 1 on, and no more than there are keys in all.
    """
    found = torch.zeros((), dtype=torch.int64, device=keys.device)
    rank = found + k
    for shift in range((max(bits, 1) - 1) // DIGIT_BITS * DIGIT_BITS, -1, -DIGIT_BITS):
        agrees = (keys >> shift >> DIGIT_BITS) == (found >> shift >> DIGIT_BITS)
        counts = torch.zeros(2**DIGIT_BITS, dtype=torch.int64, device=keys.device)
        counts.scatter_add_(0, (keys >> shift) & (2**DIGIT_BITS - 1), agrees.long())
        group.sum_((counts,))
        upto = counts.cumsum(0)
        digit = (upto < rank).sum()
        rank = rank - (counts * (upto < rank)).sum()
        found = found | (digit << shift)
    return found, rank


def _falling(values: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
    """fp32 from 0 on (-0 is 0) -> integers below 2**31 that are smaller for larger values."""
    return (2**VALUE_BITS - 1) - values.float().abs().contiguous().view(torch.int32).long()


def _value_of(key: Int[Tensor, ""]) -> Float[Tensor, ""]:
    return (2**VALUE_BITS - 1 - key).to(torch.int32).view(torch.float32)


def _processes(n: int) -> str:
    return f"are {n} processes" if n > 1 else "is one process"
