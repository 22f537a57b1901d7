"""How a batch is shared between processes: what is summed, and how the largest activations of all of them are found.

Knows: torch.distributed (gloo on CPUs, NCCL on GPUs; started by torchrun).
Does not know: dictionaries, gradients, streams.

Process r holds the r-th of equal runs of the joint batch's rows. With that order the joint step does to every number what a
single process would do, up to the order of sums.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor

from pvsae.saes.kernels import kth_largest


@dataclass(frozen=True)
class Group:
    """Processes that work on one batch. size 1 needs no torch.distributed at all."""

    rank: int = 0
    size: int = 1

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Sums each tensor over the processes, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def sum_scalars(self, values: Sequence[float]) -> list[float]:
        """Sums of a few numbers over the processes."""
        if self.size == 1:
            return list(values)
        joint = torch.tensor(values, dtype=torch.float64, device=_device())
        dist.all_reduce(joint)
        return joint.tolist()

    def any_(self, flags: Bool[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """True where any process has True."""
        if self.size == 1:
            return flags
        joint = flags.to(torch.uint8)
        dist.all_reduce(joint, dist.ReduceOp.MAX)
        return joint.bool()

    def largest(self, values: Float[Tensor, " n"], k: int) -> tuple[float, int]:
        """The k-th largest value over all processes, and how many of the values equal to it this process keeps, so that k are
        kept in all: those of the first rows."""
        everyone = [values] if self.size == 1 else self._gather(values)
        joint = everyone[0] if self.size == 1 else torch.cat(everyone)
        threshold = kth_largest(joint, k)
        ties = k - int((joint > threshold).sum())
        before = sum(int((v == threshold).sum()) for v in everyone[: self.rank])
        return threshold, max(0, ties - before)

    def send(self, tensors: Sequence[Tensor], owner: int) -> None:
        """Gives every process, in place, what one of them has."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, owner)

    def _gather(self, values: Float[Tensor, " n"]) -> list[Tensor]:
        counts = [torch.zeros(1, dtype=torch.int64, device=values.device) for _ in range(self.size)]
        dist.all_gather(counts, torch.tensor([len(values)], device=values.device))
        lengths = [int(c) for c in counts]
        padded = values.new_zeros(max(lengths))
        padded[: len(values)] = values
        out = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(out, padded)
        return [part[:n] for part, n in zip(out, lengths, strict=True)]


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
