"""Rankings of latents: nulls against simulation, ranks and correlations against their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from pvsae.errors import UserError
from pvsae.saes.ranking import analytic_null, ends, extremes, overlap, rank_correlation, ranks, shuffled
from tests.saes.small import make_sae


def test_the_analytic_null_is_the_number_of_the_paper_and_what_random_directions_reach() -> None:
    assert analytic_null(3584, 131072) == pytest.approx(0.083, abs=0.001)
    g = torch.Generator().manual_seed(77)
    sae = make_sae(d_model=256, d_sae=4096)
    found = extremes(sae.cosines(torch.randn(50, 256, generator=g)))
    assert 0.8 < found.mean / analytic_null(256, 4096) < 1, "a little below the first term of the expansion that the null is"
    assert found.mean < found.limit < float(torch.maximum(found.highest, -found.lowest).max())
    assert (found.highest > 0).all()
    assert (found.lowest < 0).all()


@pytest.mark.parametrize("n", [6, 40, 41])
def test_shuffled_vectors_hold_nothing_of_what_all_pairs_share(n: int) -> None:
    g = torch.Generator().manual_seed(0)
    trait = torch.zeros(30)
    trait[0] = 5.0
    noise = torch.randn(n, 30, generator=g)
    noise[:, 0] = 0
    nulls = shuffled(trait + noise, 200, seed=1)
    assert nulls.shape == (200, 30)
    assert nulls[:, 0].abs().max() < 1e-5, "labels drawn pair by pair would leave 5 / sqrt(n) here"
    spread = nulls[:, 1:].pow(2).mean().sqrt()
    assert float(spread) == pytest.approx(1 / n**0.5, rel=0.25), "as long as the noise of a mean of n pairs"
    assert torch.equal(nulls, shuffled(trait + noise, 200, seed=1))
    assert not torch.equal(nulls, shuffled(trait + noise, 200, seed=2))


def test_one_pair_gives_no_null() -> None:
    with pytest.raises(UserError, match="1 pair"):
        shuffled(torch.ones(1, 4), 5, 0)


def test_ends_come_from_the_outside_in() -> None:
    high, low = ends(torch.tensor([0.1, -0.9, 0.5, 0.0, -0.2, 0.9]), 2)
    assert high.tolist() == [5, 2]
    assert low.tolist() == [1, 4]
    assert [len(end) for end in ends(torch.arange(5.0), 50)] == [2, 2]


def test_ranks_are_places_in_the_sorted_list() -> None:
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 50, generator=g)
    scores[1, 4] = scores[1, 7]
    latents = torch.tensor([4, 7, 0, 49])
    expected = [[1 + int((row > row[i]).sum()) for i in latents] for row in scores]
    assert ranks(scores, latents).tolist() == expected


def test_agreement_of_two_rankings() -> None:
    scores = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.0, -1.0])
    assert overlap(scores, scores, 3) == 1
    assert overlap(scores, scores.flip(0), 3) == pytest.approx(0)
    assert overlap(scores, torch.tensor([9.0, 0, 0, 0, 0, 0, 0]), 3) == 1, "the one latent of the shorter list is in both"
    assert math.isnan(overlap(scores, torch.zeros(7), 3))
    assert rank_correlation(scores, 2 * scores) == (pytest.approx(1), 6), "the latent without a score is in no correlation"
    assert rank_correlation(scores, -scores) == (pytest.approx(-1), 6)
    assert math.isnan(rank_correlation(scores, torch.zeros(7))[0])


def test_scores_that_agree_correlate_however_many_there_are() -> None:
    """Over the tops alone, noise that chooses them makes two scores of one truth seem to have nothing in common."""
    g = torch.Generator().manual_seed(0)
    truth = torch.randn(100_000, generator=g)
    first, second = (truth + 0.5 * torch.randn(100_000, generator=g) for _ in range(2))
    correlation, n = rank_correlation(first, second)
    assert n == 100_000
    assert correlation == pytest.approx(0.79, abs=0.02)


def test_rank_correlation_is_spearmans() -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy is the reference")
    g = torch.Generator().manual_seed(0)
    for _ in range(5):
        a, b = torch.randint(0, 6, (2, 30), generator=g).double()
        both = (a != 0) & (b != 0)
        assert rank_correlation(a, b) == (pytest.approx(stats.spearmanr(a[both], b[both]).statistic), int(both.sum()))
