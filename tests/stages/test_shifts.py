"""The finetuning shift of made-up residuals, beside the formula written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pvsae.stages.shifts import shift_table, shifts
from pvsae.stages.statistics import mean_ci, means_ci

D, BLOCKS, ROWS = 24, 3, 30


@pytest.fixture(scope="module")
def made_up():
    g = torch.Generator().manual_seed(0)
    vectors = {name: torch.randn(BLOCKS, D, generator=g) * 4 for name in ("evil", "calm", "loud")}
    vectors["loud"][0] = 0.0  # no vector at this block
    base = torch.randn(ROWS, BLOCKS, D, generator=g) * torch.linspace(0.1, 3, D)
    unit = vectors["evil"][1] / vectors["evil"][1].norm()
    moved = 0.2 * torch.randn(ROWS, BLOCKS, D, generator=g)
    moved[:, 1] += 3.0 * unit
    return vectors, base, moved


def test_the_shift_is_the_projection_of_the_mean_move_on_the_unit_vector(made_up) -> None:
    vectors, base, moved = made_up
    table = shift_table(moved, base, vectors)
    assert len(table) == 3 * BLOCKS - 1
    for row in table.itertuples():
        v = vectors[row.trait][row.block].double()
        mean = moved[:, row.block].double().mean(0)
        assert row.shift == pytest.approx(float(mean @ v / v.norm()), abs=1e-9)
        assert row.gaps == pytest.approx(row.shift / float(v.norm()))
        assert row.cosine == pytest.approx(row.shift / float(mean.norm()))
        assert row.low < row.shift < row.high
        assert row.n == ROWS
    top = table.loc[table["shift"].idxmax()]
    assert (top["trait"], top["block"]) == ("evil", 1)
    assert top["random_rank"] == top["natural_rank"] == 1.0


def test_the_shift_of_a_row_is_along_the_unit_vector() -> None:
    moved = torch.tensor([[1.0, 4.0], [3.0, 8.0]])
    directions = torch.tensor([[0.0, 5.0], [-3.0, -3.0], [0.0, 0.0]])
    root = math.sqrt(2)
    np.testing.assert_allclose(shifts(moved, directions), [[4.0, -5 / root, 0.0], [8.0, -11 / root, 0.0]])


def test_the_joint_fit_leaves_nothing_to_a_trait_that_is_only_alike(made_up) -> None:
    """`alike` has most of `evil` in it, so the plain shift along it is large; nothing moved in its own direction."""
    vectors, base, moved = made_up
    alike = vectors["evil"] + 0.8 * vectors["calm"]
    table = shift_table(moved, base, {"evil": vectors["evil"], "alike": alike})
    at = table[table["block"] == 1].set_index("trait")
    assert at.loc["alike", "shift"] > 1.5
    assert abs(at.loc["alike", "joint"]) < 0.25
    assert at.loc["evil", "joint"] == pytest.approx(3.0, abs=0.3)
    explained = at.loc["evil", "explained"]
    assert 0.9 < explained <= 1.0
    assert at.loc["alike", "explained"] == explained


def test_the_null_of_random_directions_has_the_right_width(made_up) -> None:
    vectors, base, moved = made_up
    table = shift_table(moved, base, vectors, n_null=20_000)
    row = table[(table["trait"] == "calm") & (table["block"] == 1)].iloc[0]
    assert row["random_limit"] == pytest.approx(1.96 * row["moved"] / math.sqrt(D), rel=0.06)
    # Where residuals vary most a direction shaped like them points more often, so its null is another one.
    strong = torch.zeros(ROWS, BLOCKS, D)
    strong[..., -1] = 1.0
    wide = shift_table(strong, base, vectors, n_null=5000)
    assert (wide["natural_limit"] > 1.3 * wide["random_limit"]).all()


def test_rows_that_are_missing_count_for_nothing_and_questions_are_the_units(made_up) -> None:
    vectors, base, moved = made_up
    holes = torch.cat([moved, torch.full((2, BLOCKS, D), float("nan"))])
    groups = [i // 3 for i in range(ROWS)] + [98, 99]
    table, plain = shift_table(holes, base, vectors, groups), shift_table(moved, base, vectors, groups[:ROWS])
    assert (table["n"] == ROWS).all()
    np.testing.assert_allclose(table["shift"], plain["shift"])
    np.testing.assert_allclose(table["low"], plain["low"])
    twice = shift_table(moved.repeat_interleave(4, 0), base, vectors, np.repeat(np.arange(ROWS), 4).tolist())
    naive = shift_table(moved.repeat_interleave(4, 0), base, vectors)
    width = (twice["high"] - twice["low"]) / (naive["high"] - naive["low"])
    assert (width > 1.6).all(), "copies of a row are no news"


def test_nothing_moved_and_nothing_known() -> None:
    still = torch.zeros(5, 2, 8)
    table = shift_table(still, torch.randn(5, 2, 8), {"evil": torch.ones(2, 8)})
    assert (table["shift"] == 0).all()
    assert table["cosine"].isna().all()
    assert (table["random_rank"] == 0).all()
    assert shift_table(still * float("nan"), still, {"evil": torch.ones(2, 8)}).empty


def test_means_of_many_columns_have_the_intervals_of_each() -> None:
    rng = np.random.default_rng(0)
    values, groups = rng.normal(size=(60, 4)) + np.arange(4), (np.arange(60) // 2).tolist()
    means, lows, highs = means_ci(values, groups, n_boot=4000)
    for i in range(4):
        one = mean_ci(values[:, i], groups, n_boot=4000)
        assert means[i] == pytest.approx(one.value)
        assert (lows[i], highs[i]) == pytest.approx((one.low, one.high), abs=0.03)
    assert np.isnan(means_ci(values[:1])[1]).all()
    assert np.isnan(means_ci(np.full((3, 2), np.nan))[0]).all()


def test_rows_of_the_base_without_an_answer_do_not_shape_the_null(made_up) -> None:
    vectors, base, moved = made_up
    holes = torch.cat([base, torch.full_like(base[:3], math.nan)])
    with_holes, without = shift_table(moved, holes, vectors), shift_table(moved, base, vectors)
    assert with_holes["natural_limit"].tolist() == without["natural_limit"].tolist()
    assert without["natural_limit"].notna().all()
