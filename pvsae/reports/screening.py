"""The figure of a screening: how the rows of each data set lie along each vector.

Knows: the tables that `pvsae screen` writes. Does not know: how a number came about.
"""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from pvsae.reports.figures import CYCLE, GREY, LINES, _figure, _names, _title


def screening_figure(histogram: pd.DataFrame, data_sets: pd.DataFrame) -> Figure:
    """A panel a vector and block: share of each data set's rows by dP, and above it each data set's mean with its interval."""
    panels = list(dict.fromkeys(zip(data_sets["vector"], data_sets["block"], strict=True)))
    figure, axes = _figure(len(panels))
    for ax, (vector, block) in zip(axes, panels, strict=True):
        part = histogram[(histogram["vector"] == vector) & (histogram["block"] == block)]
        means = data_sets[(data_sets["vector"] == vector) & (data_sets["block"] == block)]
        top = 0.0
        for i, name in enumerate(_names(means["data"])):
            rows = part[part["data"].astype(str) == name]
            share = rows["rows"] / max(1, rows["rows"].sum())
            top = max(top, float(share.max()))
            ax.stairs(
                share, [*rows["low"], rows["high"].iloc[-1]], color=CYCLE[i % len(CYCLE)], ls=LINES[i // len(CYCLE) % len(LINES)],
                lw=1.4, label=name,
            )  # fmt: skip
        for i, row in enumerate(means.to_dict("records")):
            colour, y = CYCLE[i % len(CYCLE)], top * (1.08 + 0.07 * i)
            ax.plot([row["low"], row["high"]], [y, y], color=colour, lw=2)
            ax.plot([row["dp"]], [y], "o", color=colour, ms=4)
        ax.axvline(0.0, color=GREY, lw=1, ls=":")
        _title(ax, str(vector), f"block {block}")
        ax.set_xlabel("projection difference of a row", fontsize=9)
    axes[0].set_ylabel("share of rows", fontsize=9)
    axes[0].legend(fontsize=7, frameon=False, loc="best")
    return figure
