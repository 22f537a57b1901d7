"""Estimates of projection differences: of whole data sets, with intervals, and of what the cheap approximations miss.

Knows: the columns that a screening writes. Does not know: models, files, how a projection came about.

dP = mean over rows of [a(x, y) - a(x, y')] . v^ (paper, section on data screening). Rows that share a prompt share the base
answer y', so prompts are the clusters of every interval (statistics.clustered_mean).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pvsae.stages.statistics import Estimate, Z, clustered_error, clustered_mean, pearson, rank_correlation

SHARES = (0.02, 0.05, 0.1, 0.2, 0.5)
DRAWS = 200


def student(freedom: int) -> float:
    """The 97.5% point of Student's distribution, by the expansion of Cornish and Fisher around the normal one; from 5 degrees of
    freedom on it is off by less than 0.01."""
    z, n = Z, max(freedom, 1)
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )


@dataclass(frozen=True)
class Columns:
    """What is known of the rows of one data set along one vector at one block; [rows] each, NaN where there is none."""

    proj: NDArray[np.float64]
    base: NDArray[np.float64]
    last: NDArray[np.float64]
    prompts: NDArray[Any]

    @property
    def exact(self) -> NDArray[np.float64]:
        """dP of each row that has a base answer."""
        return self.proj - self.base

    @property
    def by_prompt(self) -> NDArray[np.float64]:
        """The last prompt token's projection in place of the base answer's."""
        return self.proj - self.last

    @property
    def by_subset(self) -> NDArray[np.float64]:
        """The mean of the base answers that there are in place of each row's own."""
        some = self.base[np.isfinite(self.base)]
        return self.proj - (some.mean() if some.size else np.nan)

    def of(self, base: str) -> NDArray[np.float64]:
        """The best that a run has of each row: base "all", "subset" or "none"."""
        return {"all": self.exact, "subset": self.by_subset, "none": self.by_prompt}[base]


def data_set_row(columns: Columns, base: str) -> dict[str, Any]:
    """dP of a data set, and what the approximations make of it."""
    by_prompt = clustered_mean(columns.by_prompt, columns.prompts)
    if base == "all":
        found = clustered_mean(columns.exact, columns.prompts)
    elif base == "subset":
        found = subset_mean(columns.proj, columns.base, columns.prompts)
    else:
        found = by_prompt
    return {
        "dp": found.value, "low": found.low, "high": found.high, "n": found.n, "n_missing": found.n_missing,
        "by": {"all": "every row's base answer", "subset": "base answers of a subset", "none": "last prompt token"}[base],
        "proj": float(np.nanmean(columns.proj)) if np.isfinite(columns.proj).any() else float("nan"),
        "dp_prompt_last": by_prompt.value, "dp_prompt_last_low": by_prompt.low, "dp_prompt_last_high": by_prompt.high,
    }  # fmt: skip


def subset_mean(proj: NDArray[np.float64], base: NDArray[np.float64], prompts: NDArray[Any]) -> Estimate:
    """Mean of `proj` over all rows minus mean of `base` over the rows that have one, as an estimate for rows of this kind.

    A row moves the estimate by (p - mean p) / n - [has a base answer] (b - mean b) / m, all [rows]; the 95% interval stands on
    these sums by prompt, for rows of one prompt have one base answer.
    """
    rows = np.isfinite(proj)
    n, both = int(rows.sum()), rows & np.isfinite(base)
    m = int(both.sum())
    if m < 2:
        return Estimate(float("nan"), float("nan"), float("nan"), m, int(proj.size) - m)
    value = float(proj[rows].mean() - base[both].mean())
    influence = np.where(rows, (proj - proj[rows].mean()) / n, 0.0) - np.where(both, (base - base[both].mean()) / m, 0.0)
    error = clustered_error(influence[rows], prompts[rows])
    return Estimate(value, value - Z * error, value + Z * error, m, int(proj.size) - m)


def subset_rows(columns: Columns, sizes: Sequence[int], seed: int) -> list[dict[str, Any]]:
    """What base answers of a random subset would have given, beside the exact value of these very rows.

    The interval is that of a mean over m of n rows, drawn without replacement: t s / sqrt(m) sqrt(1 - m / n), t of Student's
    distribution with m - 1 degrees of freedom. It is about these n rows alone, of which rows and not prompts are drawn, so shared
    prompts do not matter to it. `covered` is the share of DRAWS subsets whose interval holds the exact value;
    `error` is that of the first.
    """
    known = np.isfinite(columns.exact)
    proj, base = columns.proj[known], columns.base[known]
    n = int(known.sum())
    exact = float((proj - base).mean()) if n else float("nan")
    rng = np.random.default_rng(seed)
    out = []
    for m in sorted({size for size in sizes if 5 <= size < n}):
        estimates, halves = np.empty(DRAWS), np.empty(DRAWS)
        for k in range(DRAWS):
            some = base[rng.choice(n, m, replace=False)]
            estimates[k] = proj.mean() - some.mean()
            halves[k] = student(m - 1) * some.std(ddof=1) / np.sqrt(m) * np.sqrt(1 - m / n)
        out.append(
            {
                "subset": m, "n": n, "estimate": estimates[0], "low": estimates[0] - halves[0], "high": estimates[0] + halves[0],
                "exact": exact, "error": estimates[0] - exact, "half_width": halves[0],
                "mean_abs_error": float(np.abs(estimates - exact).mean()), "mean_half_width": float(halves.mean()),
                "covered": float((np.abs(estimates - exact) <= halves).mean()), "draws": DRAWS,
            }
        )  # fmt: skip
    return out


def approximation_row(columns: Columns) -> dict[str, Any]:
    """How the last-prompt-token approximation ranks rows, and how far it is off, over the rows whose exact dP is known."""
    exact, by_prompt = columns.exact, columns.by_prompt
    known = np.isfinite(exact) & np.isfinite(by_prompt)
    return {
        "n": int(known.sum()),
        "rank_correlation": rank_correlation(by_prompt, exact),
        "pearson": pearson(by_prompt[known], exact[known]),
        "rank_correlation_proj": rank_correlation(columns.proj, exact),
        "mean_error": float((by_prompt - exact)[known].mean()) if known.any() else float("nan"),
        "exact_sd": float(exact[known].std()) if known.any() else float("nan"),
    }


def histogram_rows(values: NDArray[np.float64], edges: NDArray[np.float64]) -> list[dict[str, Any]]:
    """Counts of the finite values between edges."""
    counts, _ = np.histogram(values[np.isfinite(values)], edges)
    return [{"low": a, "high": b, "rows": int(k)} for a, b, k in zip(edges[:-1], edges[1:], counts, strict=True)]
