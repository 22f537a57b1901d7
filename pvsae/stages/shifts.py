"""Finetuning shift: how far a finetuning moved the residual along known directions (paper, section on finetuning).

Knows: residuals of two models on the same prompts, persona vectors, nulls.
Does not know: where residuals come from, what the finetuning was.

The shift along a trait is the projection on its unit vector of the mean residual of the finetuned model minus that of the base.
Beside it: intervals over questions, the shift along random directions, and what remains of it when all known traits are fitted
together, since their vectors point in partly the same directions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from pvsae.stages.statistics import means_ci

N_NULL = 1000


def shifts(moved: Float[Tensor, "rows d_model"], directions: Float[Tensor, "k d_model"]) -> Float[Tensor, "rows k"]:
    """How far each row moved along each direction, in residual units and fp64; the shift of a finetuning is its mean over rows.

    Args:
        moved: tuned minus base.
        directions: of any length; along one of length 0 nothing moved.
    """
    return moved.double() @ _units(directions).T


def _units(directions: Float[Tensor, "k d_model"]) -> Float[Tensor, "k d_model"]:
    found = directions.double()
    return found / found.norm(dim=1, keepdim=True).clamp_min(1e-300)


def shift_table(
    moved: Float[Tensor, "rows n_blocks d_model"],
    base: Float[Tensor, "base_rows n_blocks d_model"],
    vectors: Mapping[str, Float[Tensor, "n_blocks d_model"]],
    groups: Sequence[object] | None = None,
    *,
    seed: int = 0,
    n_null: int = N_NULL,
) -> pd.DataFrame:
    """The shift along each vector at every block.

    Args:
        moved: tuned minus base, a row a prompt (or answer); rows that are NaN count for nothing.
        base: residuals of the base model at the same kind of tokens (prompts for prompts, answers for answers, whose spreads
            differ), which shape the second null; rows that are NaN count for nothing.
        vectors: trait -> vectors; a zero row is a block without a vector, and is left out.
        groups: the question of each row, the unit of the intervals; None takes each row for itself.

    Returns: a row a trait and block: trait, block, shift (residual units) with its 95% interval, gaps (shift over the vector's
        length), joint (the coefficient along the unit vector when all traits are fitted at once), moved (length of the mean
        move), cosine (of the mean move with the vector), explained (share of the mean move's square that all traits together
        have), random_limit and natural_limit (95% of |shift| along random directions, isotropic and shaped like the base's
        residuals), random_rank and natural_rank (share of those that the trait's |shift| exceeds), n (rows).
    """
    good = torch.isfinite(moved).all(2).all(1)
    x = moved[good].double()
    labels = None if groups is None else [group for group, one in zip(groups, good.tolist(), strict=True) if one]
    base = base[torch.isfinite(base).all(2).all(1)]
    generator = torch.Generator().manual_seed(seed)
    d_model = moved.shape[2]
    isotropic = torch.randn(n_null, d_model, generator=generator, dtype=torch.float64)
    weights = torch.randn(n_null, len(base), generator=generator, dtype=torch.float64)
    out = []
    for block in range(moved.shape[1]):
        known = {trait: matrix[block].double() for trait, matrix in vectors.items() if float(matrix[block].norm())}
        if not known or not len(x):
            continue
        directions = torch.stack(list(known.values()))
        units, mean = _units(directions), x[:, block].mean(0)
        values, lows, highs = means_ci(shifts(x[:, block], directions).numpy(), labels, seed=seed)
        joint = torch.linalg.lstsq(units.T, mean[:, None]).solution[:, 0]
        fitted, length = units.T @ joint, float(mean.norm())
        centred = (base[:, block] - base[:, block].mean(0)).double()
        nulls = {"random": np.sort(_along(mean, isotropic)), "natural": np.sort(_along(mean, weights @ centred))}
        for i, (trait, v) in enumerate(known.items()):
            row = {
                "trait": trait, "block": block, "shift": values[i], "low": lows[i], "high": highs[i],
                "gaps": values[i] / float(v.norm()), "joint": float(joint[i]), "moved": length,
                "cosine": values[i] / length if length else float("nan"),
                "explained": float(fitted.square().sum()) / length**2 if length else float("nan"),
            }  # fmt: skip
            for name, null in nulls.items():
                row[f"{name}_limit"] = float(np.quantile(null, 0.95))
                row[f"{name}_rank"] = float(np.searchsorted(null, abs(values[i]), side="left") / len(null))
            out.append({**row, "n": len(x)})
    return pd.DataFrame(out)


def _along(mean: Float[Tensor, " d_model"], directions: Float[Tensor, "draws d_model"]) -> np.ndarray:
    """|shift| of the mean move along each direction."""
    return shifts(mean[None], directions)[0].abs().numpy()
