"""How well one number a data set foretells what a trait scores after training on it: correlations, their nulls, the figure.

Knows: tables of values and scores. Does not know: where a value came from, models, files of runs.

A table of values has a row a data set, trait (whose score is foretold) and vector (along which the value was taken): data,
family, severity, made_for, trait, vector, value, score. Data sets of one family share their prompts, so intervals of r resample
whole families. The data sets made to show a trait are the easy half of the range; beside r of all stands r without them, with the
range of scores that is left: where all of these are alike, it is the r of noise.

Traits' vectors have much in common: all of them point from a model kept plain to one that shows something, and so a value along
one of them is in part a value of any trait. The specific part of a vector (vectors/specificity.py) is what is left of it when the
others' vectors are taken out; it stands beside the vector itself, under the name "specific". It is no part of the paper's method,
and was thought of when the plain vectors' figures were known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from analyses.results import save
from pvsae.reports.figures import BLUE, CYCLE, GREEN, GREY, INK, PALE, RED
from pvsae.stages.statistics import correlation, pearson, rank_correlation
from pvsae.vectors.specificity import specific_rows

SPREAD = 10.0  # points of trait score; r over a smaller range is not shown
SPECIFIC = "specific"
MARKS = ("o", "^", "s", "D", "v")

Nulls = Mapping[str, Float[np.ndarray, "directions data"]]
"""Trait -> values of the data sets, in the order of the table, along random directions."""


def specific_part(vectors: Mapping[str, Float[Tensor, "n_blocks d"]], trait: str) -> Float[Tensor, "n_blocks d"]:
    """A trait's vectors less what other traits' share with them, block by block; themselves where there is no other."""
    return specific_rows(vectors[trait], [rows for name, rows in vectors.items() if name != trait])


def correlations(values: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """A row a trait and vector: own (whether the vector is the trait's), n, r with its 95% interval, spearman, n_others,
    r_others and spearman_others (without the data sets made to show the trait), spread_others (the range of their scores)."""
    rows = []
    for (trait, vector), part in values.groupby(["trait", "vector"], sort=False):
        found = correlation(part["value"], part["score"], part["family"].tolist(), seed=seed)
        others = part[part["made_for"] != trait]
        rows.append(
            {
                "trait": trait, "vector": vector, "own": trait == vector, "n": found.n, "r": found.value, "low": found.low,
                "high": found.high, "spearman": rank_correlation(part["value"], part["score"]), "n_others": len(others),
                "r_others": correlation(others["value"], others["score"], n_boot=0).value,
                "spearman_others": rank_correlation(others["value"], others["score"]),
                "spread_others": others["score"].max() - others["score"].min(),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def by_block(values: pd.DataFrame) -> pd.DataFrame:
    """A row a trait and block of a table of values that has several blocks: r along the trait's vector, r_specific."""
    rows = []
    for (trait, block), part in values.groupby(["trait", "block"], sort=False):
        along = {vector: pearson(one["value"], one["score"]) for vector, one in part.groupby("vector")}
        rows.append({"trait": trait, "block": block, "r": along[trait], "r_specific": along[SPECIFIC]})
    return pd.DataFrame(rows)


def null_rs(values: pd.DataFrame, nulls: Nulls) -> dict[str, np.ndarray]:
    """Trait -> r of every random direction's values with the scores [directions]."""
    found = {}
    for trait, matrix in nulls.items():
        part = values[(values["trait"] == trait) & (values["vector"] == trait)]
        scores = part["score"].to_numpy(dtype=np.float64)
        found[trait] = np.array([pearson(row, scores) for row in np.asarray(matrix, dtype=np.float64)])
    return found


def summary(table: pd.DataFrame, nulls: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """A row a trait: its own vector's correlations, the range over the other traits' vectors, and |r| of random directions.

    A direction has no sign of its own, so nulls are compared by |r|: median, 95% point, and the share that reaches the own r.
    """
    rows = []
    for trait, part in table.groupby("trait", sort=False):
        own = part[part["own"]].iloc[0]
        cross = part[~part["own"] & (part["vector"] != SPECIFIC)]
        part_of = part[part["vector"] == SPECIFIC].iloc[0]
        null = np.abs(nulls[str(trait)])
        rows.append(
            {
                "trait": trait, "n": own["n"], "r": own["r"], "low": own["low"], "high": own["high"], "spearman": own["spearman"],
                "n_others": own["n_others"], "r_others": own["r_others"], "spearman_others": own["spearman_others"],
                "spread_others": own["spread_others"],
                "r_specific": part_of["r"], "specific_low": part_of["low"], "specific_high": part_of["high"],
                "spearman_specific": part_of["spearman"], "r_others_specific": part_of["r_others"],
                "cross_lowest": cross["r"].min(), "cross_highest": cross["r"].max(),
                "cross_highest_vector": cross.loc[cross["r"].idxmax(), "vector"] if cross["r"].notna().any() else "",
                "random": len(null), "random_median": np.median(null), "random_95": np.quantile(null, 0.95),
                "random_reaching": float(np.mean(null >= own["r"])),
                "random_reaching_specific": float(np.mean(null >= part_of["r"])),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def draw(values: pd.DataFrame, table: pd.DataFrame, nulls: Mapping[str, np.ndarray], label: str, path: Path) -> Path:
    """A column a trait: score against value along its vector, and along the specific part, a point a data set; below them r of
    all vectors over a histogram of random ones."""
    traits = list(dict.fromkeys(values["trait"]))
    families = list(dict.fromkeys(values["family"]))
    severities = list(dict.fromkeys(values["severity"]))
    figure = Figure(figsize=(3.9 * len(traits), 8.2), dpi=150, layout="constrained")
    axes = figure.subplots(3, len(traits), squeeze=False, height_ratios=(3, 3, 1.4))
    for i, trait in enumerate(traits):
        for k, (vector, what) in enumerate(((trait, trait), (SPECIFIC, f"the specific part of {trait}"))):
            ax = axes[k, i]
            _scatter(ax, values[(values["trait"] == trait) & (values["vector"] == vector)], families, severities)
            row = table[(table["trait"] == trait) & (table["vector"] == vector)].iloc[0]
            rest = f"{row['r_others']:.2f}" if row["spread_others"] >= SPREAD else f"within {row['spread_others']:.1f} points"
            ax.set_title(f"r {row['r']:.2f}, n {row['n']}; others {rest}", loc="right", fontsize=8, color=GREY)
            ax.set_xlabel(f"{label} along {what}", fontsize=8)
            if not i:
                ax.set_ylabel("trait score after finetuning", fontsize=8)
        axes[0, i].set_title(trait, loc="left", fontsize=10, fontweight="bold", color=INK)
        _histogram(axes[2, i], table[table["trait"] == trait], nulls[trait])
        if not i:
            axes[2, i].set_ylabel("random directions", fontsize=8)
    handles = [Line2D([], [], ls="", marker="o", color=_colour(k), label=name, ms=5) for k, name in enumerate(families)]
    handles += [Line2D([], [], ls="", marker=MARKS[k % len(MARKS)], color=INK, label=s, ms=5) for k, s in enumerate(severities)]
    lines = (("own vector", RED, 2), ("its specific part", GREEN, 2), ("other traits' vectors", BLUE, 1))
    handles += [Line2D([], [], color=colour, lw=width, label=name) for name, colour, width in lines]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=7, frameon=False)
    return save(figure, path)


def _colour(k: int) -> str:
    return (*CYCLE, GREY)[k % (len(CYCLE) + 1)]


def _scatter(ax: Axes, own: pd.DataFrame, families: Sequence[str], severities: Sequence[str]) -> None:
    for row in own.to_dict("records"):
        ax.plot(
            row["value"], row["score"], ls="", marker=MARKS[severities.index(row["severity"]) % len(MARKS)],
            color=_colour(families.index(row["family"])), ms=6, alpha=0.85, mec="white", mew=0.5,
        )  # fmt: skip
    ax.set_ylim(-4, 104)
    _plain(ax)


def _histogram(ax: Axes, table: pd.DataFrame, null: np.ndarray) -> None:
    ax.hist(null[np.isfinite(null)], bins=np.linspace(-1, 1, 41).tolist(), color=PALE, edgecolor=GREY, linewidth=0.4)
    for row in table.to_dict("records"):
        if np.isfinite(row["r"]):
            colour = RED if row["own"] else GREEN if row["vector"] == SPECIFIC else BLUE
            ax.axvline(row["r"], color=colour, lw=1 if colour == BLUE else 2)
    ax.set_xlim(-1.04, 1.04)
    ax.set_xlabel("r with the trait score", fontsize=8)
    _plain(ax)


def _plain(ax: Axes) -> None:
    ax.tick_params(colors=INK, labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, color=PALE, linewidth=0.7)
    ax.set_axisbelow(True)
