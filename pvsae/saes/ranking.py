"""Latents ranked for a direction, and what such ranks are worth: nulls, ranks for other directions, agreement of two rankings.

Knows: cosines with a decoder's rows, numbers a latent.
Does not know: encoders, models, where a direction comes from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pvsae.errors import UserError

Scores = Float[Tensor, " d_sae"]


def analytic_null(d_model: int, d_sae: int) -> float:
    """About the largest |cosine| of d_sae directions with a random one in d_model dimensions: sqrt(2 ln 2F) / sqrt(d).

    The 2F is for both signs. It is the first term of an expansion, a little above what is found, and holds for directions that
    are spread evenly over the space, which residuals are not.
    """
    return math.sqrt(2 * math.log(2 * d_sae)) / math.sqrt(d_model)


def shuffled(differences: Float[Tensor, "n_pairs d_model"], draws: int, seed: int) -> Float[Tensor, "draws d_model"]:
    """Mean differences with the labels of half of the pairs swapped, drawn at random: vectors of the same answers and no trait.

    Exactly half: were each pair's labels drawn by themselves, the sum would keep a random multiple of the vector itself, of the
    same size as the noise wherever the pairs agree. Of an odd number of pairs one, drawn anew, is left out.

    Raises: UserError for fewer than two pairs.
    """
    n = len(differences)
    if n < 2:
        raise UserError(f"{n} pair of answers for a null", "at least 2 pairs")
    generator = torch.Generator().manual_seed(seed)
    half = n // 2
    signs = torch.zeros(draws, n)
    for row in signs:
        order = torch.randperm(n, generator=generator)
        row[order[:half]] = 1.0
        row[order[half : 2 * half]] = -1.0
    return (signs.double() @ differences.double() / (2 * half)).float()


@dataclass(frozen=True)
class Extremes:
    """Of each null vector the largest and the smallest cosine with any row."""

    highest: Float[Tensor, " draws"]
    lowest: Float[Tensor, " draws"]

    @property
    def limit(self) -> float:
        """The |cosine| that 95% of the null vectors do not reach, with no row and no sign."""
        return float(torch.maximum(self.highest, -self.lowest).quantile(0.95))

    @property
    def mean(self) -> float:
        """The largest |cosine|, over null vectors on average."""
        return float(torch.maximum(self.highest, -self.lowest).mean())


def extremes(cosines: Float[Tensor, "draws d_sae"]) -> Extremes:
    """Of the cosines of null vectors."""
    cosines = cosines.reshape(-1, cosines.shape[-1])
    return Extremes(cosines.amax(-1).cpu(), cosines.amin(-1).cpu())


def ends(scores: Scores, n: int) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """(the n latents of the highest scores, the n of the lowest), from the outside in; at most half of all each."""
    n = min(n, max(1, len(scores) // 2))
    order = torch.sort(scores, descending=True, stable=True).indices
    return order[:n], order.flip(0)[:n]


def ranks(scores: Float[Tensor, "n d_sae"], latents: Int[Tensor, " k"]) -> Int[Tensor, "n k"]:
    """Where latents stand in rankings by score, highest first, counted from 1; equals share the better place."""
    out = torch.empty(len(scores), len(latents), dtype=torch.long)
    for row, values in enumerate(scores):
        ordered = values.sort().values
        # How many are higher: those behind the last that is not.
        out[row] = (len(values) - torch.searchsorted(ordered, values[latents].contiguous(), right=True) + 1).cpu()
    return out


def overlap(first: Scores, second: Scores, n: int) -> float:
    """Share that the top n of two rankings have in common; scores of 0 and less are no place in a ranking.

    NaN where one of the two has no latent at all. Of two short lists the shorter one's length counts.
    """
    one, two = (_top(scores, n) for scores in (first, second))
    shorter = min(len(one), len(two))
    return len(one & two) / shorter if shorter else math.nan


def rank_correlation(first: Scores, second: Scores) -> tuple[float, int]:
    """(Spearman's correlation of two scores, over how many latents): over all that have a score other than 0 from both.

    Not over the tops of the two: of latents that are chosen because one score is high the other one is lower by the choice alone,
    so that two scores that agree would seem not to. NaN for fewer than three latents.
    """
    one, two = (scores.double().cpu() for scores in (first, second))
    both = (one != 0) & (two != 0)
    if int(both.sum()) < 3:
        return math.nan, int(both.sum())
    places = [_midranks(scores[both]) for scores in (one, two)]
    a, b = (p - p.mean() for p in places)
    scale = float((a @ a).sqrt() * (b @ b).sqrt())
    return float(a @ b) / scale if scale > 0 else math.nan, int(both.sum())


def _top(scores: Scores, n: int) -> set[int]:
    best = scores.topk(min(n, len(scores)))
    return {int(i) for i, value in zip(best.indices, best.values, strict=True) if value > 0}


def _midranks(values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Ranks, equals sharing the mean of their places."""
    _, which, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0).double() - (counts.double() - 1) / 2)[which]
