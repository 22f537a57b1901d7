"""Means and correlations: known answers, missing scores, clusters."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from pvsae.stages.statistics import clustered_mean, correlation, mean_ci, pearson, rank_correlation, within_correlation


def test_missing_scores_leave_the_mean_and_are_counted() -> None:
    estimate = mean_ci([10.0, 20.0, float("nan"), 30.0])
    assert estimate.value == 20.0
    assert (estimate.n, estimate.n_missing) == (3, 1)
    assert estimate.low <= 20.0 <= estimate.high
    empty = mean_ci([float("nan")] * 3)
    assert math.isnan(empty.value)
    assert (empty.n, empty.n_missing) == (0, 3)


def test_interval_of_the_mean_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        estimate = mean_ci(rng.normal(5.0, 2.0, 40), n_boot=200, seed=trial)
        hits += estimate.low <= 5.0 <= estimate.high
    assert 180 <= hits <= 198


def test_repeating_rows_of_a_question_does_not_shrink_its_interval() -> None:
    rng = np.random.default_rng(1)
    once = rng.normal(0, 1, 30)
    tenfold = np.repeat(once, 10)
    questions = [f"q{i}" for i in np.repeat(np.arange(30), 10)]
    single, clustered, naive = mean_ci(once), mean_ci(tenfold, questions), mean_ci(tenfold)
    assert clustered.high - clustered.low == pytest.approx(single.high - single.low, rel=0.15)
    assert naive.high - naive.low < 0.5 * (single.high - single.low)


def test_the_interval_holds_the_truth_as_often_as_it_says_where_prompts_repeat() -> None:
    rng = np.random.default_rng(0)
    inside = naive = 0
    for _ in range(300):
        clusters = np.repeat(np.arange(60), 4)
        values = np.repeat(rng.normal(0, 1, 60), 4) + rng.normal(0, 0.3, 240)
        found = clustered_mean(values, clusters)
        alone = clustered_mean(values, np.arange(240))
        inside += found.low <= 0 <= found.high
        naive += alone.low <= 0 <= alone.high
    assert 0.90 <= inside / 300 <= 0.985
    assert naive / 300 < 0.8  # what it would be if rows counted as independent


def test_a_mean_without_rows_or_with_one_prompt_claims_nothing() -> None:
    assert np.isnan(clustered_mean(np.array([np.nan]), np.array(["a"])).value)
    one = clustered_mean(np.array([1.0, 2.0]), np.array(["a", "a"]))
    assert (one.value, np.isnan(one.low)) == (1.5, True)


def test_both_ways_to_an_interval_agree_on_many_groups() -> None:
    rng = np.random.default_rng(4)
    questions = np.repeat(np.arange(150), 3)
    values = np.repeat(rng.normal(size=150), 3) + rng.normal(size=450)
    values[7] = np.nan
    drawn, counted = mean_ci(values, questions.tolist(), n_boot=4000), clustered_mean(values, questions)
    assert (drawn.value, drawn.n, drawn.n_missing) == (counted.value, counted.n, counted.n_missing)
    assert counted.high - counted.low == pytest.approx(drawn.high - drawn.low, rel=0.05)


def test_pearson_is_numpys_and_undefined_for_constants() -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=50)
    y = 0.4 * x + rng.normal(size=50)
    assert pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-12)
    assert math.isnan(pearson(x, np.full(50, 0.1)))
    assert math.isnan(pearson(x[:2], y[:2]))


def test_within_type_correlation_ignores_what_the_type_alone_explains() -> None:
    rng = np.random.default_rng(3)
    kinds = np.repeat(np.arange(8), 40)
    x = kinds * 10.0 + rng.normal(size=320)
    y = kinds * 5.0 + rng.normal(size=320)  # inside a type x says nothing about y
    assert correlation(x, y).value > 0.98
    assert abs(within_correlation(x, y, list(kinds)).value) < 0.15
    z = y + 2.0 * (x - kinds * 10.0)
    assert within_correlation(x, z, list(kinds)).value > 0.8


def test_a_missing_score_leaves_the_correlation_and_is_counted() -> None:
    x = [1.0, 2.0, 3.0, 4.0, float("nan")]
    y = [2.0, 4.0, 6.0, 8.0, 0.0]
    estimate = correlation(x, y)
    assert (estimate.value, estimate.n, estimate.n_missing) == (pytest.approx(1.0), 4, 1)


def test_rank_correlation_is_spearmans_over_rows_that_have_both() -> None:
    x = np.array([1.0, 5.0, 2.0, np.nan])
    assert rank_correlation(x, np.array([10.0, 1000.0, 11.0, 0.0])) == pytest.approx(1.0)
    rng = np.random.default_rng(5)
    a, b = rng.integers(0, 6, 40), rng.integers(0, 6, 40)
    assert rank_correlation(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert math.isnan(rank_correlation(a, np.ones(40)))
