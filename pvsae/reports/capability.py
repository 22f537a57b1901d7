"""The figure of a capability run, from the table in its run folder.

Knows: the columns of that table, matplotlib. Does not know: tasks, models, how a number came about.
"""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pvsae.reports.figures import CYCLE, GREY, INK, _figure, _names, _title
from pvsae.stages.statistics import Z

MAX_PANELS = 6


def capability_figure(table: pd.DataFrame) -> Figure:
    """A panel a task that was asked for: its value against strength, random directions grey, the untouched model at 0."""
    asked = table[table["asked"]]
    panels = list(dict.fromkeys(zip(asked["task"], asked["metric"], asked["filter"].fillna(""), strict=True)))[:MAX_PANELS]
    figure, axes = _figure(len(panels))
    for ax, (task, metric, filtered) in zip(axes, panels, strict=True):
        part = asked[(asked["task"] == task) & (asked["metric"] == metric) & (asked["filter"].fillna("") == filtered)]
        plain = part[part["condition"] == "none"]
        _curves(ax, part[~part["condition"].isin(["none", "ablate"])], plain)
        _point(ax, plain, INK, "untouched")
        for i, (name, row) in enumerate(part[part["condition"].isin(["ablate", "feature ablate"])].groupby("trait", sort=False)):
            label = "direction taken out" + ("" if name == "-" else f": {name}")
            ax.axhline(float(row["value"].iloc[0]), color=CYCLE[(i + 1) % len(CYCLE)], ls="--", lw=1.2, label=label)
        _title(ax, str(task), str(metric))
        units = [unit for unit in _names(part["unit"]) if unit != "-"]
        ax.set_xlabel(f"strength ({units[0]})" if units else "strength", fontsize=9)
        if part["value"].between(0, 1).all():
            ax.set_ylim(-0.04, 1.04)
    if axes:
        axes[0].set_ylabel("value, 95% interval of the change", fontsize=9)
        axes[0].legend(fontsize=6.5, frameon=True, framealpha=0.85, edgecolor="none", loc="best")
    return figure


def _curves(ax: Axes, part: pd.DataFrame, plain: pd.DataFrame) -> None:
    """A line a condition, through the untouched model at strength 0; the band is the change's interval around the value."""
    base = float(plain["value"].iloc[0])
    told: set[str] = set()
    colours = iter(CYCLE * 10)
    for (condition, trait, feature, block), some in part.groupby(["condition", "trait", "feature", "block"], sort=False):
        random = str(condition).startswith("random")
        label = "random direction" if random else f"{trait}, block {block}" if feature == "-" else f"feature {feature}"
        curve = pd.concat([plain.assign(coef=0.0), some]).sort_values("coef")
        colour = GREY if random else next(colours)
        ax.plot(curve["coef"], curve["value"], color=colour, marker="o", ms=4, lw=1.2 if random else 2,
                label="_" if label in told else label)  # fmt: skip
        if not random:
            low, high = base + curve["change_low"], base + curve["change_high"]
            ax.fill_between(curve["coef"], low, high, color=colour, alpha=0.15, linewidth=0)
        told.add(label)


def _point(ax: Axes, plain: pd.DataFrame, colour: str, label: str) -> None:
    for row in plain.itertuples():
        error = None if pd.isna(row.stderr) else Z * float(row.stderr)
        ax.errorbar([0.0], [row.value], yerr=error, color=colour, marker="s", ms=5, capsize=3, label=label)
