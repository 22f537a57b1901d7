"""The few statistics that the stages report: means and correlations with confidence intervals.

Knows: numpy arrays and groups of rows. Does not know: models, traits, files.

Rows that answer the same question are not independent, so the unit of every interval is a whole group of rows. Two ways lead to
one. `mean_ci` resamples groups: for scores, of which there are tens and many stand at an end of the scale. `clustered_mean` takes
Z standard errors of the sums of groups: for the rows of a data set, of which there may be millions. A missing value (NaN) leaves
a mean only through one of these, which count it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

N_BOOT = 1000
Z = 1.959964  # half of a 95% interval, in standard errors of a normal distribution


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% interval, the number of rows it stands on and the number of rows that had no value."""

    value: float
    low: float
    high: float
    n: int
    n_missing: int


def _groups(labels: Sequence[object] | None, n: int) -> list[NDArray[np.intp]]:
    """Row numbers of each group, groups in order of first appearance; every row its own group if there are no labels."""
    if labels is None:
        return [np.array([i]) for i in range(n)]
    rows: dict[object, list[int]] = {}
    for i, label in enumerate(labels):
        rows.setdefault(label, []).append(i)
    return [np.array(members) for members in rows.values()]


def _bootstrap(
    statistic: Callable[[NDArray[np.intp]], float], groups: list[NDArray[np.intp]], n_boot: int, seed: int
) -> tuple[float, float]:
    """Percentile 2.5 and 97.5 of `statistic(rows)` over resampled groups; NaN where it is not asked for or not possible."""
    if len(groups) < 2 or n_boot == 0:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(n_boot):
        picked = rng.integers(0, len(groups), len(groups))
        value = statistic(np.concatenate([groups[i] for i in picked]))
        if np.isfinite(value):
            draws.append(value)
    if len(draws) < n_boot // 2:  # mostly undefined (a constant column): an interval would pretend to know something
        return float("nan"), float("nan")
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def mean_ci(values: ArrayLike, groups: Sequence[object] | None = None, *, n_boot: int = N_BOOT, seed: int = 0) -> Estimate:
    """Mean over the finite `values` [rows] with a bootstrap interval over `groups` [rows] (questions)."""
    x = np.asarray(values, dtype=np.float64)
    good = np.flatnonzero(np.isfinite(x))
    if good.size == 0:
        return Estimate(float("nan"), float("nan"), float("nan"), 0, int(x.size))
    kept = x[good]
    labels = None if groups is None else [groups[i] for i in good.tolist()]
    low, high = _bootstrap(lambda rows: float(kept[rows].mean()), _groups(labels, kept.size), n_boot, seed)
    return Estimate(float(kept.mean()), low, high, int(good.size), int(x.size - good.size))


def means_ci(
    values: ArrayLike, groups: Sequence[object] | None = None, *, n_boot: int = N_BOOT, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """`mean_ci` of many columns at once: (means, lows, highs), [columns] each, of values [rows, columns].

    All columns are resampled alike. A row with a value that is not finite leaves all means: pair rows before.
    """
    x = np.asarray(values, dtype=np.float64)
    good = np.flatnonzero(np.isfinite(x).all(1))
    if good.size == 0:
        nothing = np.full(x.shape[1], np.nan)
        return nothing, nothing.copy(), nothing.copy()
    members = _groups(None if groups is None else [groups[i] for i in good.tolist()], good.size)
    sums = np.stack([x[good[rows]].sum(0) for rows in members])
    sizes = np.array([len(rows) for rows in members], dtype=np.float64)
    mean = x[good].mean(0)
    if len(members) < 2 or n_boot == 0:
        return mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan)
    rng = np.random.default_rng(seed)
    times = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=n_boot).astype(np.float64)
    draws = (times @ sums) / (times @ sizes)[:, None]
    low, high = np.percentile(draws, [2.5, 97.5], axis=0)
    return mean, low, high


def clustered_mean(values: NDArray[np.float64], clusters: NDArray[Any]) -> Estimate:
    """Mean of the finite `values` [rows] with a 95% interval whose units are `clusters` [rows]."""
    good = np.isfinite(values)
    x, n = values[good].astype(np.float64), int(good.sum())
    if n == 0:
        return Estimate(float("nan"), float("nan"), float("nan"), 0, int(values.size))
    mean = float(x.mean())
    error = clustered_error(x - mean, clusters[good]) / n
    return Estimate(mean, mean - Z * error, mean + Z * error, n, int(values.size) - n)


def clustered_error(parts: NDArray[np.float64], clusters: NDArray[Any]) -> float:
    """Standard error of a sum of `parts` [rows] that are 0 in the mean, where rows of a cluster [rows] move together: the root of
    the sum of the G clusters' squared sums, times G / (G - 1). NaN for one cluster."""
    codes, _ = pd.factorize(clusters)
    groups = int(codes.max()) + 1
    if groups < 2:
        return float("nan")
    sums = np.bincount(codes, weights=parts)
    return float(np.sqrt((sums @ sums) * groups / (groups - 1)))


def pearson(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Pearson's r of two columns [rows]; NaN where it is not defined (fewer than three rows, or a constant column)."""
    if x.size < 3:
        return float("nan")
    a, b = x - x.mean(), y - y.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    # a column whose spread is only rounding has no correlation with anything
    if scale <= 1e-12 * x.size * max(1.0, float(np.abs(x).max()) * float(np.abs(y).max())):
        return float("nan")
    return float(np.clip(a @ b / scale, -1.0, 1.0))


def rank_correlation(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman's correlation of two columns [rows] over the rows where both are finite."""
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    good = np.isfinite(a) & np.isfinite(b)
    ranks = (pd.Series(v[good]).rank().to_numpy(dtype=np.float64) for v in (a, b))
    return pearson(*ranks)


def correlation(
    x: ArrayLike, y: ArrayLike, groups: Sequence[object] | None = None, *, n_boot: int = N_BOOT, seed: int = 0
) -> Estimate:
    """Pearson's r of `x` and `y` [rows] over the rows where both are finite, interval over `groups`."""
    return within_correlation(x, y, None, groups, n_boot=n_boot, seed=seed)


def within_correlation(
    x: ArrayLike,
    y: ArrayLike,
    kinds: Sequence[object] | None,
    groups: Sequence[object] | None = None,
    *,
    n_boot: int = N_BOOT,
    seed: int = 0,
) -> Estimate:
    """Pearson's r after the mean of each kind [rows] (prompt type) was taken out of both columns.

    This is the correlation that is left when differences between prompt types count for nothing, pooled over types
    (paper section on monitoring: "within prompt type"). With `kinds` None it is the plain correlation.
    """
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    good = np.flatnonzero(np.isfinite(a) & np.isfinite(b))
    a, b = a[good], b[good]
    types = np.zeros(good.size, dtype=np.intp)
    if kinds is not None:
        codes: dict[object, int] = {}
        types = np.array([codes.setdefault(kinds[i], len(codes)) for i in good.tolist()], dtype=np.intp)
    labels = None if groups is None else [groups[i] for i in good.tolist()]

    def statistic(rows: NDArray[np.intp]) -> float:
        return pearson(_centred(a[rows], types[rows]), _centred(b[rows], types[rows]))

    low, high = _bootstrap(statistic, _groups(labels, good.size), n_boot, seed)
    everything = np.arange(good.size)
    value = statistic(everything) if good.size else float("nan")
    return Estimate(value, low, high, int(good.size), int(np.asarray(x).size - good.size))


def _centred(values: NDArray[np.float64], types: NDArray[np.intp]) -> NDArray[np.float64]:
    if values.size == 0:
        return values
    counts = np.bincount(types)
    means = np.bincount(types, weights=values) / np.maximum(counts, 1)
    return values - means[types]
