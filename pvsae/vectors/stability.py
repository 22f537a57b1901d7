"""How far a persona vector would move if other rollouts had been drawn: half splits and the bootstrap, from bucket sums.

Knows: that a vector is a sum of bucket sums, and that norms and cosines of any reweighting of the buckets follow from their Gram
matrix. With B = 20 buckets of pairs the sums take B x n_blocks x d_model numbers instead of one row a rollout (2000 rows of a 7B
model would be 800 MB a statistic; the buckets are 16 MB in double precision), and every resampling works on B x B matrices.
Does not know: models, rollouts, or why a pair is in a bucket. The resampling unit is the bucket, so intervals are those of a
cluster bootstrap with B clusters: honest, and a little coarse.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

N_SPLITS = 50
N_DRAWS = 500


def random_buckets(n: int, n_buckets: int, seed: int) -> Int[Tensor, " n"]:
    """A bucket for each of n items: sizes differ by at most one, membership drawn at random under the seed."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    buckets = torch.empty(n, dtype=torch.long)
    buckets[order] = torch.arange(n) % max(1, min(n_buckets, n))
    return buckets


def group_buckets(groups: list[int], n_buckets: int) -> Int[Tensor, " n"]:
    """A bucket for each item such that items of one group (a question) share it; groups go round the buckets in order."""
    rank = {g: i for i, g in enumerate(sorted(set(groups)))}
    return torch.tensor([rank[g] % n_buckets for g in groups], dtype=torch.long)


def half_split_cosine(
    gram: Float[Tensor, "n_blocks n_buckets n_buckets"], seed: int = 0, n_splits: int = N_SPLITS
) -> Float[Tensor, " n_blocks"]:
    """Mean cosine between the vectors of two random halves of the buckets; NaN with fewer than two buckets."""
    n = gram.shape[-1]
    if n < 2:
        return torch.full((gram.shape[0],), float("nan"), dtype=gram.dtype)
    generator = torch.Generator().manual_seed(seed)
    left = torch.zeros(n_splits, n, dtype=gram.dtype)
    for row in left:
        row[torch.randperm(n, generator=generator)[: n // 2]] = 1
    right = 1 - left
    inner = torch.einsum("si,bij,sj->bs", left, gram, right)
    squared = torch.einsum("si,bij,sj->bs", left, gram, left) * torch.einsum("si,bij,sj->bs", right, gram, right)
    return (inner / squared.clamp_min(0).sqrt()).mean(dim=1)


def bootstrap(
    gram: Float[Tensor, "n_blocks n_buckets n_buckets"],
    counts: Int[Tensor, " n_buckets"],
    seed: int = 0,
    n_draws: int = N_DRAWS,
) -> dict[str, Float[Tensor, " n_blocks"]]:
    """Buckets drawn with replacement: how far the vector turns and how its norm varies.

    Returns:
        cosine_low: 2.5% quantile of the cosine between a redrawn vector and the vector itself.
        norm_low, norm_high: 95% interval of the redrawn vector's norm (noise adds to a norm, so it leans upwards).
        All NaN with fewer than two buckets.
    """
    n = gram.shape[-1]
    if n < 2:
        nan = torch.full((gram.shape[0],), float("nan"), dtype=gram.dtype)
        return {"cosine_low": nan, "norm_low": nan.clone(), "norm_high": nan.clone()}
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(n, (n_draws, n), generator=generator)
    weights = torch.zeros(n_draws, n, dtype=gram.dtype).scatter_add_(1, drawn, torch.ones(n_draws, n, dtype=gram.dtype))
    norm = torch.einsum("si,bij,sj->bs", weights, gram, weights).clamp_min(0).sqrt()
    whole = gram.sum(dim=(1, 2)).clamp_min(0).sqrt()
    cosine = torch.einsum("si,bij->bs", weights, gram) / (norm * whole[:, None])
    norm = norm / (weights @ counts.to(gram.dtype))
    quantiles = torch.tensor([0.025, 0.975], dtype=gram.dtype)
    low, high = norm.quantile(quantiles, dim=1)
    return {"cosine_low": cosine.quantile(0.025, dim=1), "norm_low": low, "norm_high": high}
