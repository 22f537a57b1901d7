"""Figures of a comparison of two models, from the tables in its run folder.

Knows: the columns of those tables, matplotlib. Does not know: models, vectors, how a number came about.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pvsae.reports.figures import BLUE, CYCLE, GREY, LINES, ORANGE, PALE, RED, _figure, _names, _title

MAIN = "last prompt token"
SHOWN = 12  # features a panel


def drift_figure(drift: pd.DataFrame, scores: pd.DataFrame | None) -> Figure:
    """Left: the shift along every trait with its interval, beside random directions. Right: trait scores before and after."""
    main = drift[(drift["reading"] == MAIN) & (drift["prompts"] == "own")]
    height = max(2.6, 0.9 + 0.42 * len(main))
    figure, axes = _figure(1 if scores is None else 2, panel=(4.6, height))
    y = np.arange(len(main))[::-1]
    ax = axes[0]
    limits = main[["random_limit", "natural_limit"]].to_numpy()
    for limit, colour, label in (
        (limits[:, 1], PALE, "95% of directions like the residuals"),
        (limits[:, 0], GREY, "95% of random ones"),
    ):
        ax.barh(y, 2 * limit, left=-limit, height=0.8, color=colour, alpha=0.6, label=label)
    ax.barh(y, main["shift"], height=0.45, color=[RED if value > 0 else BLUE for value in main["shift"]])
    errors = np.abs(np.stack([main["shift"] - main["low"], main["high"] - main["shift"]]))
    ax.errorbar(main["shift"], y, xerr=errors, fmt="none", ecolor="black", capsize=3, lw=1)
    ax.scatter(main["joint"], y, marker="|", s=90, color=ORANGE, zorder=4, label="all traits fitted at once")
    ax.set_yticks(y, [f"{trait} (block {block})" for trait, block in zip(main["trait"], main["block"], strict=True)])
    ax.set_ylim(-0.6, len(main) - 0.4)
    ax.axvline(0, color=GREY, lw=1)
    ax.set_xlabel("shift of the last prompt token, residual units", fontsize=9)
    ax.legend(fontsize=6.5, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=1)
    if scores is not None:
        _arrows(axes[1], scores.set_index("trait").loc[main["trait"]].reset_index(), y)
    return figure


def _arrows(ax: Axes, scores: pd.DataFrame, y: np.ndarray) -> None:
    ax.hlines(y, scores["base"], scores["tuned"], color=PALE, linewidth=4)
    for which, colour, label in (("base", BLUE, "before"), ("tuned", RED, "after")):
        errors = np.abs(np.stack([scores[which] - scores[f"{which}_low"], scores[f"{which}_high"] - scores[which]]))
        ax.errorbar(scores[which], y, xerr=errors, fmt="o", color=colour, ms=5, lw=1, label=label)
    ax.set_yticks(y, list(scores["trait"]))
    ax.set_ylim(-0.6, len(scores) - 0.4)
    ax.set_xlim(-4, 104)
    ax.set_xlabel("trait score of the answers", fontsize=9)
    ax.legend(fontsize=7, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)


def profile_figure(profile: pd.DataFrame) -> Figure:
    """A panel a reading: the shift along each trait at every block, on the trait's own questions; grey: random directions."""
    own = profile[profile["prompts"] == "own"]
    readings = _names(own["reading"])
    figure, axes = _figure(len(readings), columns=3)
    traits = _names(own["trait"])
    for ax, reading in zip(axes, readings, strict=True):
        for i, trait in enumerate(traits):
            part = own[(own["reading"] == reading) & (own["trait"] == trait)].sort_values("block")
            colour, style = CYCLE[i % len(CYCLE)], LINES[i // len(CYCLE) % len(LINES)]
            ax.plot(part["block"], part["shift"], style, color=colour, marker="o", ms=3, label=trait)
            ax.fill_between(part["block"], part["low"], part["high"], color=colour, alpha=0.12, linewidth=0)
        limit = own[own["reading"] == reading].groupby("block")["random_limit"].mean()
        ax.fill_between(limit.index, -limit, limit, color=GREY, alpha=0.2, linewidth=0)
        ax.axhline(0, color=GREY, lw=1)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_xlabel("block", fontsize=9)
        _title(ax, reading)
    axes[0].set_ylabel("shift, residual units", fontsize=9)
    axes[0].legend(fontsize=6.5, frameon=True, framealpha=0.85, edgecolor="none", loc="best")
    return figure


def features_figure(features: pd.DataFrame) -> Figure:
    """A panel a list: the latents that moved most, coloured where one of the known traits' vectors is near."""
    lists = (
        ("own", "activation, own answers"),
        ("same", "activation, same answers"),
        ("attribution", "attribution, nats a token"),
    )
    figure, axes = _figure(3, columns=3, panel=(3.7, 3.2))
    for ax, (name, label) in zip(axes, lists, strict=True):
        part = features[features[f"{name}_rank"] <= SHOWN].sort_values(f"{name}_rank")
        y = np.arange(len(part))[::-1]
        ax.barh(y, part[name], height=0.7, color=[RED if value > 0 else BLUE for value in part[name]])
        names = [f"{r.latent} ({r.nearest_trait} {r.cosine:+.2f})" for r in part.itertuples()]
        ax.set_yticks(y, names, fontsize=6.5)
        ax.axvline(0, color=GREY, lw=1)
        ax.set_xlabel(label, fontsize=9)
    return figure
