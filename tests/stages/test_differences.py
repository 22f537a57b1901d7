from __future__ import annotations

import numpy as np
import pytest

from pvsae.stages.differences import (
    Columns,
    approximation_row,
    data_set_row,
    student,
    subset_mean,
    subset_rows,
)
from pvsae.stages.statistics import rank_correlation


def some(n: int = 400, seed: int = 0) -> Columns:
    rng = np.random.default_rng(seed)
    base = rng.normal(2.0, 1.0, n)
    return Columns(base + rng.normal(0.5, 2.0, n), base, base + rng.normal(-3.0, 0.5, n), np.arange(n))


def test_dp_of_a_data_set_is_the_mean_over_rows_that_have_one() -> None:
    columns = Columns(
        np.array([1.0, 3.0, np.nan]), np.array([0.5, np.nan, 1.0]), np.array([0.0, 1.0, np.nan]), np.array([*"abc"])
    )
    row = data_set_row(columns, "all")
    assert (row["dp"], row["n"], row["n_missing"]) == (0.5, 1, 2)
    assert data_set_row(columns, "none")["dp"] == 1.5
    assert columns.by_subset.tolist()[:2] == [0.25, 2.25]


def test_intervals_of_subsets_hold_the_exact_value_about_95_times_of_100() -> None:
    rows = subset_rows(some(), [5, 20, 100, 399, 400, 3], 0)
    assert [r["subset"] for r in rows] == [5, 20, 100, 399]  # not all of them, and not too few
    assert all(0.9 <= r["covered"] <= 0.995 for r in rows)
    assert rows[0]["mean_abs_error"] > rows[1]["mean_abs_error"] > rows[2]["mean_abs_error"]
    assert all(r["error"] == r["estimate"] - r["exact"] for r in rows)


def test_the_estimate_from_a_subset_has_an_interval_that_holds_the_truth() -> None:
    inside = 0
    for seed in range(200):
        columns = some(300, seed)
        base = np.where(np.arange(300) < 60, columns.base, np.nan)
        found = subset_mean(columns.proj, base, columns.prompts)
        inside += found.low <= 0.5 <= found.high
    assert 0.9 <= inside / 200 <= 0.985


def test_the_estimate_from_a_subset_holds_the_truth_where_prompts_repeat() -> None:
    inside = alone = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        prompts = np.repeat(np.arange(60), 5)
        base = np.repeat(rng.normal(2.0, 2.0, 60), 5)
        proj = rng.normal(2.5, 1.0, 300)
        base[rng.choice(300, 150, replace=False)] = np.nan
        found = subset_mean(proj, base, prompts)
        inside += found.low <= 0.5 <= found.high
        naive = subset_mean(proj, base, np.arange(300))
        alone += naive.low <= 0.5 <= naive.high
    assert 0.9 <= inside / 300 <= 0.985
    assert alone / 300 < 0.8  # what it would be if rows counted as independent


def test_a_subset_of_one_prompt_claims_no_interval() -> None:
    found = subset_mean(np.array([1.0, 3.0, np.nan]), np.array([0.5, 0.5, 1.0]), np.array(["a", "a", "b"]))
    assert (found.value, np.isnan(found.low), found.n) == (1.5, True, 2)


@pytest.mark.parametrize(("freedom", "wanted"), [(5, 2.5706), (10, 2.2281), (30, 2.0423), (1000, 1.9623)])
def test_student_is_that_of_the_tables(freedom, wanted) -> None:
    assert student(freedom) == pytest.approx(wanted, abs=0.01)


def test_the_approximation_is_judged_by_ranks_and_by_its_shift() -> None:
    columns = some()
    row = approximation_row(columns)
    assert row["rank_correlation"] == pytest.approx(rank_correlation(columns.proj - columns.last, columns.exact))
    assert row["rank_correlation"] > 0.9 > row["rank_correlation_proj"]
    assert row["mean_error"] == pytest.approx(3.0, abs=0.1)
