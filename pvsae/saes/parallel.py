"""Processes that work together: what is summed, gathered and sent between them.

Knows: torch.distributed (gloo on CPUs, NCCL on GPUs; started by torchrun).
Does not know: dictionaries, gradients, streams, or why there are several groups (grid.py).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool
from torch import Tensor

MOST_SENT = 2**24  # elements of a matrix that are on their way at once: 64 MB in fp32


@dataclass(frozen=True)
class Group:
    """Some of the processes, or all of them. size 1 needs no torch.distributed at all.

    Attributes:
        rank, size: this process' place among them, and their number.
        handle: what torch.distributed calls them by; None for all processes.
    """

    rank: int = 0
    size: int = 1
    handle: Any = None

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Sums each tensor over the processes, in place. All of them get the same bits."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor, group=self.handle)

    def sum_scalars(self, values: Sequence[float]) -> list[float]:
        """Sums of a few numbers over the processes."""
        if self.size == 1:
            return list(values)
        joint = torch.tensor(values, dtype=torch.float64, device=_device())
        dist.all_reduce(joint, group=self.handle)
        return joint.tolist()

    def any_(self, flags: Bool[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """True where any process has True."""
        if self.size == 1:
            return flags
        joint = flags.to(torch.uint8)
        dist.all_reduce(joint, dist.ReduceOp.MAX, group=self.handle)
        return joint.bool()

    def stack(self, tensor: Tensor) -> Tensor:
        """What each process has, [size, ...], in the order of ranks; shapes are the same everywhere."""
        if self.size == 1:
            return tensor[None]
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor, group=self.handle)
        return torch.stack(parts)

    def send(self, tensors: Sequence[Tensor], owner: int) -> None:
        """Gives every process, in place, what one of them has."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, self._process(owner), group=self.handle)

    def rows_on_host(self, rows: Tensor) -> Tensor | None:
        """The rows of all processes, one after the other, in the first one's main memory; None in the others.

        Args:
            rows: [n, ...], of the same shape everywhere.

        They come in pieces, so that no device holds more than a piece beside its own.
        """
        first = self.rank == 0
        out = torch.empty(self.size * len(rows), *rows.shape[1:], dtype=rows.dtype) if first else None
        if out is not None:
            out[: len(rows)] = rows
        step = max(1, MOST_SENT // max(1, rows[:1].numel()))
        for other in range(1, self.size):
            for start in range(0, len(rows), step):
                part = rows[start : start + step]
                if out is not None:
                    got = torch.empty_like(part)
                    dist.recv(got, self._process(other), group=self.handle)
                    out[other * len(rows) + start :][: len(part)] = got
                elif other == self.rank:
                    dist.send(part.contiguous(), self._process(0), group=self.handle)
        return out

    def wait(self) -> None:
        """Returns when all processes are here."""
        if self.size > 1:
            dist.barrier(group=self.handle)

    def _process(self, rank: int) -> int:
        """A rank of this group among all processes."""
        return rank if self.handle is None else dist.get_global_rank(self.handle, rank)


ALONE = Group()


def join() -> Group:
    """The group that torchrun started this process in; ALONE without torchrun."""
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))  # which is then what "cuda" stands for
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return Group(dist.get_rank(), dist.get_world_size())


def leave() -> None:
    """Ends what `join` began."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
