"""Figures of a decomposition, from the tables in its run folder.

Knows: the columns of those tables, matplotlib. Does not know: vectors, dictionaries, how a number came about.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from pvsae.reports.figures import BLUE, GREEN, GREY, ORANGE, RED, SKY, _figure, _names, _title

SHOWN = 12  # latents a panel, from each end half


def decomposition_figure(decomposition: pd.DataFrame, curve: pd.DataFrame, nulls: pd.DataFrame) -> Figure:
    """A row of three panels a trait: highest cosines beside the null, the explained share, cosine against encodings."""
    traits = _names(decomposition["trait"])
    figure, axes = _figure(3 * len(traits), columns=3, panel=(3.7, 3.2))
    for i, trait in enumerate(traits):
        cosines, explained, encodings = axes[3 * i : 3 * i + 3]
        part = decomposition[decomposition["trait"] == trait]
        _cosines(cosines, part, nulls[nulls["trait"] == trait])
        _title(cosines, trait)
        _explained(explained, curve[curve["trait"] == trait])
        _encodings(encodings, part)
    return figure


def _cosines(ax: Axes, part: pd.DataFrame, nulls: pd.DataFrame) -> None:
    high = part.sort_values("rank").head(SHOWN // 2)
    low = part[~part["latent"].isin(high["latent"])].sort_values("rank_from_below").head(SHOWN // 2)
    shown = pd.concat([high, low[::-1]])
    y = np.arange(len(shown))[::-1]
    limit = float(nulls["limit"].iloc[-1])
    colours = [GREY if abs(value) <= limit else RED if value > 0 else BLUE for value in shown["cosine"]]
    ax.barh(y, shown["cosine"], color=colours, height=0.7)
    ax.set_yticks(y, [str(latent) for latent in shown["latent"]])
    for sign in (-1, 1):
        ax.axvline(sign * limit, color=GREY, ls="--", lw=1)
    ax.set_xlabel("cosine with the latent's row", fontsize=9)
    ax.set_ylabel("latent", fontsize=9)


def _explained(ax: Axes, curve: pd.DataFrame) -> None:
    for mode, colour, label in (("signed", BLUE, "signed"), ("nonnegative", ORANGE, "non-negative")):
        part = curve[(curve["mode"] == mode) & (curve["vector"] == "vector")]
        ax.plot(part["k"], part["explained"], color=colour, marker="o", ms=4, lw=2, label=label)
    for vector, style in (("random direction", "--"), ("shuffled pairs", ":")):
        part = curve[(curve["mode"] == "signed") & (curve["vector"] == vector)]
        if len(part):
            ax.plot(part["k"], part["explained"], color=GREY, ls=style, lw=1.4, label=vector)
    ax.set_xscale("log")
    ticks = sorted(curve["k"].unique())
    ax.set_xticks(ticks, [str(k) for k in ticks])
    ax.minorticks_off()
    ax.set_ylim(0, 1.03)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_xlabel("latents", fontsize=9)
    ax.set_ylabel("of |v|² explained", fontsize=9)
    ax.legend(fontsize=7, frameon=False, loc="best")


def _encodings(ax: Axes, part: pd.DataFrame) -> None:
    if "difference" not in part or part["difference"].isna().all():
        ax.text(0.5, 0.5, "no answers were read", ha="center", va="center", color=GREY, fontsize=9, transform=ax.transAxes)
        ax.set_axis_off()
        return
    sure = (part["q"] < 0.05).to_numpy()
    for chosen, colour, label in ((~sure, GREY, "q ≥ 0.05"), (sure, GREEN, "q < 0.05")):
        rows = part[chosen]
        ax.scatter(rows["cosine"], rows["difference"], s=16, color=colour, alpha=0.8, linewidths=0, label=label)
    ax.axhline(0, color=GREY, lw=0.7)
    ax.axvline(0, color=GREY, lw=0.7)
    ax.set_xlabel("cosine", fontsize=9)
    ax.set_ylabel("difference of encodings", fontsize=9)
    ax.legend(fontsize=7, frameon=False, loc="best")


def causal_figure(causal: pd.DataFrame) -> Figure:
    """A panel a trait and strength: what each part does to the trait score, with coherence."""
    cells = [(trait, coef) for trait in _names(causal["trait"]) for coef in sorted({c for c in causal["coef"] if c != 0})]
    rows = int(causal["condition"].nunique())
    figure, axes = _figure(len(cells), panel=(4.6, 0.9 + 0.26 * rows))
    for ax, (trait, coef) in zip(axes, cells, strict=True):
        part = causal[(causal["trait"] == trait) & (causal["coef"].isin([0.0, coef]))]
        y = np.arange(len(part))[::-1]
        colours = [
            GREY if name.startswith("random") or name == "unsteered" else SKY if name.startswith("latent") else BLUE
            for name in part["condition"]
        ]
        score = part["trait_score"].to_numpy(dtype=float)
        spread = [score - part["trait_low"].to_numpy(dtype=float), part["trait_high"].to_numpy(dtype=float) - score]
        ax.barh(y, score, color=colours, height=0.7)
        ax.errorbar(score, y, xerr=np.nan_to_num(np.clip(spread, 0, None)), fmt="none", ecolor=GREY, lw=1)
        ax.plot(part["coherence"], y, "o", color=ORANGE, ms=4, label="coherence")
        ax.set_yticks(y, list(part["condition"]))
        _title(ax, trait, f"{coef:g} times the vector")
        ax.set_ylim(-0.6, len(part) - 0.4)
        ax.set_yticks(y, list(part["condition"]))
        ax.set_xlim(0, 104)
        ax.set_xlabel("trait score", fontsize=9)
    axes[0].legend(fontsize=7, frameon=False, loc="best")
    return figure
