"""Training dictionaries."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def geometric_median(x: Float[Tensor, "n d_model"], n_steps: int = 50) -> Float[Tensor, " d_model"]:
    """The point with the smallest sum of distances to the rows (Weiszfeld's iteration), where b_dec starts."""
    guess = x.mean(0)
    for _ in range(n_steps):
        weight = 1 / torch.linalg.vector_norm(x - guess, dim=1).clamp_min(1e-8)
        moved = weight @ x / weight.sum()
        close = bool(torch.linalg.vector_norm(moved - guess) <= 1e-5 * torch.linalg.vector_norm(guess).clamp_min(1e-8))
        guess = moved
        if close:
            break
    return guess
