"""Outliers of a stream: tokens whose norm is far above the others', mostly attention sinks, found by a running median.

Knows: norms, medians, and which tokens of a pass are no outliers at any of its blocks.
Does not know: models, passes; what is kept with a dictionary is `info.OutlierFilter`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pvsae.errors import UserError

MEMORY = 100  # passes over which a running median forgets
Norms = dict[int, Tensor]  # block -> [tokens], fp32


def norms_of(activations: Mapping[int, Float[Tensor, "tokens d_model"]]) -> Norms:
    """Norm of each token at each block, in fp32.

    Raises: UserError if one is not finite.
    """
    norms = {b: torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32) for b, x in activations.items()}
    for block, n in norms.items():
        if not bool(n.isfinite().all()):
            raise UserError(
                f"NaN or infinite activations at block {block}", "finite activations", "load the model in float32 or bfloat16"
            )
    return norms


def inliers(norms: Norms, medians: Mapping[int, float], multiple: float | None) -> Bool[Tensor, " tokens"]:
    """Tokens whose norm is at most `multiple` times the median at every block; all tokens if `multiple` is None."""
    keep = torch.ones_like(next(iter(norms.values())), dtype=torch.bool)
    if multiple is not None:
        for block, n in norms.items():
            keep &= n <= multiple * medians[block]
    return keep


class RunningMedians:
    """For each block the mean of the medians of the first passes, which later ones move slowly."""

    def __init__(self, start: Mapping[int, float]) -> None:
        """Starts from medians that were measured before, which count as one pass."""
        self.values, self.passes = {int(b): float(m) for b, m in start.items()}, 1

    def update(self, norms: Norms) -> None:
        """Takes a pass in."""
        if len(next(iter(norms.values()))):
            self.passes = min(self.passes + 1, MEMORY)
            for block, n in norms.items():
                self.values[block] += (float(n.median()) - self.values[block]) / self.passes

    def state(self) -> dict[str, Any]:
        return {"values": dict(self.values), "passes": self.passes}

    @staticmethod
    def of_state(state: Mapping[str, Any]) -> RunningMedians:
        """What `state` was taken of."""
        made = RunningMedians(state["values"])
        made.passes = int(state["passes"])
        return made
