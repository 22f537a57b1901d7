"""Bucket sums against the same numbers from the rows themselves, and against noise of a known size."""

from __future__ import annotations

import pytest
import torch

from pvsae.vectors.stability import bootstrap, group_buckets, half_split_cosine, random_buckets


def gram_of(differences: torch.Tensor, buckets: torch.Tensor) -> torch.Tensor:
    sums = torch.zeros(int(buckets.max()) + 1, differences.shape[1], dtype=torch.float64).index_add_(0, buckets, differences)
    return (sums @ sums.T)[None]


def noisy(n: int, d: int, signal: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d, generator=generator, dtype=torch.float64)
    rows[:, 0] += signal
    return rows


def test_buckets_are_even_random_and_repeat():
    buckets = random_buckets(103, 20, seed=1)
    assert torch.bincount(buckets).tolist() == [6] * 3 + [5] * 17
    assert torch.equal(buckets, random_buckets(103, 20, seed=1))
    assert not torch.equal(buckets, random_buckets(103, 20, seed=2))
    assert random_buckets(3, 20, seed=0).tolist() != [0, 0, 0]
    assert sorted(random_buckets(3, 20, seed=0).tolist()) == [0, 1, 2]


def test_a_group_is_never_split():
    groups = [7, 7, 3, 3, 9, 7, 40]
    buckets = group_buckets(groups, 20).tolist()
    assert buckets == [1, 1, 0, 0, 2, 1, 3]
    assert max(group_buckets(list(range(100)), 20).tolist()) == 19


@pytest.mark.parametrize("signal", [0.0, 0.3, 2.0])
def test_half_split_cosine_is_what_noise_of_that_size_gives(signal):
    n, d = 400, 100
    rows = noisy(n, d, signal)
    measured = float(half_split_cosine(gram_of(rows, random_buckets(n, 20, 0)))[0])
    # Halves of n / 2 rows: signal s, noise of squared length 2 d / n on either side.
    expected = signal**2 / (signal**2 + 2 * d / n)
    assert measured == pytest.approx(expected, abs=0.06)


def test_bootstrap_covers_the_spread_of_fresh_samples():
    n, d, signal = 400, 10, 1.0
    numbers = bootstrap(gram_of(noisy(n, d, signal), random_buckets(n, 20, 0)), torch.full((20,), 20))
    fresh = torch.stack([noisy(n, d, signal, seed).mean(0).norm() for seed in range(1, 200)])
    spread = float(fresh.quantile(0.975) - fresh.quantile(0.025))
    assert float(numbers["norm_high"] - numbers["norm_low"]) == pytest.approx(spread, rel=0.4)
    assert float(numbers["norm_low"]) < float(fresh.mean()) < float(numbers["norm_high"])
    assert 0.9 < float(numbers["cosine_low"]) < 1


def test_bootstrap_equals_a_direct_redraw():
    n, d = 60, 5
    rows, buckets = noisy(n, d, 0.5), random_buckets(60, 6, 3)
    numbers = bootstrap(gram_of(rows, buckets), torch.bincount(buckets), seed=5, n_draws=300)
    drawn = torch.randint(6, (300, 6), generator=torch.Generator().manual_seed(5))
    norms = torch.stack([torch.cat([rows[buckets == b] for b in draw.tolist()]).mean(0).norm() for draw in drawn])
    assert float(numbers["norm_low"]) == pytest.approx(float(norms.quantile(0.025)), rel=1e-9)
    assert float(numbers["norm_high"]) == pytest.approx(float(norms.quantile(0.975)), rel=1e-9)


def test_one_bucket_says_nothing():
    gram = gram_of(noisy(3, 4, 1.0), torch.zeros(3, dtype=torch.long))
    assert bool(half_split_cosine(gram).isnan().all())
    assert all(bool(v.isnan().all()) for v in bootstrap(gram, torch.tensor([3])).values())
