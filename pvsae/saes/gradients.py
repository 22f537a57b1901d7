"""Gradients of a dictionary's parameters: how they are summed over a grid of processes, and their norm.

Knows: which parameters every process has and which of them belong to a shard of the latents.
Does not know: how gradients are made, or what is done with them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pvsae.saes.grid import Grid


@dataclass
class Gradients:
    """Gradients of all parameters, in their layouts; d_sae counts this process' latents.

    along: the component of W_dec's gradient along each row of W_dec that is still in it and does not count; None if it is not.
    """

    W_enc: Float[Tensor, "d_sae d_model"]
    W_dec: Float[Tensor, "d_sae d_model"]
    b_enc: Float[Tensor, " d_sae"]
    b_dec: Float[Tensor, " d_model"]
    along: Float[Tensor, " d_sae"] | None = None

    def tensors(self) -> tuple[Tensor, ...]:
        return self.W_enc, self.W_dec, self.b_enc, self.b_dec

    def sum_(self, grid: Grid) -> None:
        """From this process' share to that of the joint batch: b_dec is everyone's, the others are the column's."""
        grid.data.sum_((self.W_enc, self.W_dec, self.b_enc, *([] if self.along is None else [self.along])))
        grid.everyone.sum_((self.b_dec,))

    def norm(self, grid: Grid) -> Float[Tensor, ""]:
        """Norm over all parameters of all shards, after `sum_`."""
        squares = torch.stack([squared(t) for t in self.tensors()])
        if self.along is not None:  # rows of W_dec have norm 1
            squares[1] = (squares[1] - self.along.double().square().sum()).clamp_min(0)
        # One sum over all processes, in which each number counts once: sums of two rows might differ in their last bits.
        shard, shared = squares[:3].sum() * (grid.data.rank == 0), squares[3] * (grid.everyone.rank == 0)
        total = shard + shared
        grid.everyone.sum_((total,))
        return total.sqrt().float()


def squared(x: Float[Tensor, "... d"]) -> Float[Tensor, ""]:
    """Sum of squares in fp64, of rows in fp32. A norm of all of it would add up millions of numbers in fp32."""
    return torch.linalg.vector_norm(x, dim=-1).double().square().sum() if x.dim() > 1 else x.double().square().sum()
