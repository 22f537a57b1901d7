"""One figure a stage, drawn from the tables in its run folder.

Knows: the columns of the tables that the stages write, matplotlib.
Does not know: models, judges, how a number came about. Drawing again never changes a number.

Every figure is a function from a table to a `Figure`; `draw` finds the tables of a run folder and saves the PNGs beside
them. Nothing here touches pyplot's global state, so it works in threads, notebooks and servers alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from pvsae.errors import UserError
from pvsae.runs import RunDir, atomic_path

# Okabe and Ito's palette: distinct for the colour-blind, and in grey print
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#B8A800"
GREY, INK, PALE = "#8A8A8A", "#222222", "#E6E6E6"
CYCLE = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY, YELLOW)
LINES = ("-", "--", ":")
DPI = 150
SMOOTH = 8  # tokens


# --------------------------------------------------------------------------------------------------------------- canvas
def _figure(n_panels: int, *, columns: int = 2, panel: tuple[float, float] = (4.2, 3.0)) -> tuple[Figure, list[Axes]]:
    """A grid of `n_panels` axes with the house style; unused cells of the grid are left empty."""
    columns = max(1, min(columns, n_panels))
    rows = math.ceil(n_panels / columns)
    figure = Figure(figsize=(panel[0] * columns, panel[1] * rows), dpi=DPI, layout="constrained")
    figure.patch.set_facecolor("white")
    axes = []
    for i in range(n_panels):
        ax = figure.add_subplot(rows, columns, i + 1)
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(GREY)
        ax.tick_params(colors=INK, labelsize=8)
        ax.grid(True, color=PALE, linewidth=0.7)
        ax.set_axisbelow(True)
        axes.append(ax)
    return figure, axes


def _title(ax: Axes, text: str, detail: str = "") -> None:
    ax.set_title(text, loc="left", fontsize=10, fontweight="bold", color=INK)
    if detail:
        ax.set_title(detail, loc="right", fontsize=8, color=GREY)


def _score_axis(ax: Axes) -> None:
    ax.set_ylim(-4, 104)
    ax.set_yticks([0, 25, 50, 75, 100])


def _save(figure: Figure, path: Path) -> Path:
    with atomic_path(path) as tmp, matplotlib.rc_context({"svg.hashsalt": "pvsae"}):
        figure.savefig(tmp, metadata={"Software": "pvsae"})
    return path


def _names(values: Iterable[object]) -> list[str]:
    return list(dict.fromkeys(str(value) for value in values))


# -------------------------------------------------------------------------------------------------------------- extract
def extraction_figure(traits: pd.DataFrame, blocks: pd.DataFrame) -> Figure:
    """Left: what the opposing system prompts did to the trait score. Right: how stable the vector is at each block."""
    figure, (left, right) = _figure(2, panel=(4.6, max(2.6, 0.5 + 0.42 * len(traits))))
    y = np.arange(len(traits))[::-1]
    left.hlines(y, traits["neg_score"], traits["pos_score"], color=PALE, linewidth=4)
    left.scatter(traits["neg_score"], y, color=BLUE, s=36, zorder=3, label="suppressing prompt")
    left.scatter(traits["pos_score"], y, color=RED, s=36, zorder=3, label="eliciting prompt")
    left.set_yticks(y, [f"{t} ({k}/{n})" for t, k, n in zip(traits["trait"], traits["kept"], traits["pairs"], strict=True)])
    left.set_xlim(-4, 104)
    left.set_ylim(-0.7, len(traits) - 0.3)
    left.set_xlabel("mean trait score of the answers", fontsize=9)
    left.legend(fontsize=7, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    for i, (trait, part) in enumerate(blocks.groupby("trait", sort=False)):
        style = LINES[i // len(CYCLE) % len(LINES)]
        right.plot(part["block"], part["half_split_cosine"], style, color=CYCLE[i % len(CYCLE)], marker="o", ms=3, label=trait)
    right.set_xlabel("block", fontsize=9)
    right.set_ylabel("cosine of two halves' vectors", fontsize=9)
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.set_ylim(min(0.0, float(np.nanmin([*blocks["half_split_cosine"], 1.0])) - 0.05), 1.04)
    right.legend(fontsize=7, frameon=False, loc="lower right")
    return figure


# --------------------------------------------------------------------------------------------------------------- layers
def layers_figure(table: pd.DataFrame) -> Figure:
    """Steering effect by block: trait score (solid) and coherence (dotted) at each strength; the choice is ringed."""
    traits = _names(table["trait"])
    figure, axes = _figure(len(traits))
    for ax, trait in zip(axes, traits, strict=True):
        part = table[table["trait"] == trait].sort_values("block")
        for i, (coef, rows) in enumerate(part.groupby("coef")):
            ax.plot(
                rows["block"], rows["trait_score"], color=CYCLE[i % len(CYCLE)], marker="o", ms=4, label=f"coefficient {coef:g}"
            )
            ax.plot(rows["block"], rows["coherence"], color=CYCLE[i % len(CYCLE)], ls=":", lw=1.3)
        chosen = part[part["chosen"]]
        ax.scatter(chosen["block"], chosen["trait_score"], s=120, facecolors="none", edgecolors=RED, linewidths=2, zorder=4)
        _title(ax, trait, f"chosen: block {int(chosen['block'].iloc[0])}" if len(chosen) else "")
        _score_axis(ax)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_xlabel("block", fontsize=9)
    axes[0].set_ylabel("score; dotted: coherence", fontsize=9)
    axes[0].legend(fontsize=7, frameon=False, loc="best")
    return figure


# ---------------------------------------------------------------------------------------------------------------- steer
def _curve(ax: Axes, part: pd.DataFrame, colour: str, label: str, *, band: bool = True) -> None:
    part = part.sort_values("coef")
    ax.plot(part["coef"], part["trait_score"], color=colour, marker="o", ms=4, lw=2, label=label)
    ax.plot(part["coef"], part["coherence"], color=colour, ls=":", lw=1.3)
    if band:
        ax.fill_between(part["coef"], part["trait_low"], part["trait_high"], color=colour, alpha=0.15, linewidth=0)


def _with_origin(part: pd.DataFrame, unsteered: pd.DataFrame) -> pd.DataFrame:
    """A curve passes through the unsteered answers at strength 0."""
    return pd.concat([unsteered.assign(coef=0.0), part]) if len(unsteered) else part


def steering_figure(table: pd.DataFrame) -> Figure:
    """Trait score (solid, 95% band) and coherence (dotted) against strength, with every control in the same panel."""
    traits = _names(table["trait"])
    figure, axes = _figure(len(traits))
    unit = str(table["unit"].iloc[0])
    for ax, trait in zip(axes, traits, strict=True):
        part = table[table["trait"] == trait]
        unsteered = part[part["condition"] == "unsteered"]
        vector = part[part["condition"].isin(["vector", "sign flip"])]
        blocks = _names(vector["block"])
        for i, (block, rows) in enumerate(vector.groupby("block", sort=False)):
            label = "persona vector" + (f", block {block}" if len(blocks) > 1 else "")
            _curve(ax, _with_origin(rows, unsteered), CYCLE[i % len(CYCLE)], label)
        random = part[part["condition"].str.startswith("random")]
        for i, (_, rows) in enumerate(random.groupby(["condition", "block"], sort=False)):
            _curve(ax, _with_origin(rows, unsteered), GREY, "random direction" if i == 0 else "_", band=False)
        for condition, colour in (("prompt pos", ORANGE), ("prompt neg", GREEN)):
            for value in part.loc[part["condition"] == condition, "trait_score"]:
                name = "eliciting" if condition.endswith("pos") else "suppressing"
                ax.axhline(value, color=colour, ls="--", lw=1.2, label=f"{name} prompt, no vector")
        _title(ax, trait, f"block {blocks[0]}" if len(blocks) == 1 else "")
        _score_axis(ax)
        ax.set_xlabel(f"coefficient ({unit})", fontsize=9)
    axes[0].set_ylabel("score; dotted: coherence", fontsize=9)
    axes[0].legend(fontsize=6.5, frameon=True, framealpha=0.85, edgecolor="none", loc="best")
    return figure


def feature_steering_figure(table: pd.DataFrame, facets: pd.DataFrame | None) -> Figure:
    """A panel a trait and feature: trait score, its facets and coherence against strength, with the feature's own controls."""
    steered = table[table["condition"].isin(["feature", "together"])]
    panels = list(dict.fromkeys(zip(steered["trait"], steered["condition"], steered["feature"].astype(str), strict=True)))
    figure, axes = _figure(len(panels))
    for ax, (trait, condition, feature) in zip(axes, panels, strict=True):
        part = table[table["trait"] == trait]
        unsteered = part[part["condition"] == "unsteered"]
        own = part[(part["condition"] == condition) & (part["feature"].astype(str) == feature)]
        controls = part[part["of"].astype(str) == feature]
        kinds = {"random feature": (GREY, "-"), "random direction": (GREY, "--"), "vector": (ORANGE, "-")}
        for kind, (colour, line) in kinds.items():
            some = controls[controls["condition"] == kind]
            for i, (_, rows) in enumerate(some.groupby("feature", sort=False)):
                curve = _with_origin(rows, unsteered).sort_values("coef")
                ax.plot(curve["coef"], curve["trait_score"], line, color=colour, lw=1.2, label=kind if i == 0 else "_")
        _curve(ax, _with_origin(own, unsteered), BLUE, "the trait")
        if facets is not None and len(facets):
            of = facets[(facets["trait"] == trait)]
            mine = of[(of["condition"] == condition) & (of["feature"].astype(str) == feature)]
            plain = of[of["condition"] == "unsteered"]
            for i, facet in enumerate(_names(mine["facet"])):
                curve = _with_origin(mine[mine["facet"] == facet], plain[plain["facet"] == facet]).sort_values("coef")
                colour = (RED, GREEN, PURPLE, YELLOW, SKY)[i % 5]
                ax.plot(curve["coef"], curve["score"], color=colour, lw=1.0, marker=".", ms=4, label=facet)
        _title(ax, f"{trait}, {feature}", f"block {own['block'].iloc[0]}")
        _score_axis(ax)
        ax.set_xlabel(f"strength ({own['unit'].iloc[0]})", fontsize=9)
    axes[0].set_ylabel("score; dotted: coherence", fontsize=9)
    axes[0].legend(fontsize=6, frameon=True, framealpha=0.85, edgecolor="none", loc="best")
    return figure


# -------------------------------------------------------------------------------------------------------------- monitor
def monitoring_figure(points: pd.DataFrame, correlations: pd.DataFrame) -> Figure:
    """Projection before the answer against the trait score of the answer; colour: how strongly the prompt asks for it."""
    traits = _names(points["trait"])
    figure, axes = _figure(len(traits))
    colours = matplotlib.colormaps["viridis"]
    for ax, trait in zip(axes, traits, strict=True):
        part = points[points["trait"] == trait]
        for kind, marker in (("system", "o"), ("many-shot", "^")):
            rows = part[part["kind"] == kind]
            if len(rows):
                ranks = {level: i for i, level in enumerate(sorted(rows["level"].unique()))}
                shade = [colours(0.92 * ranks[level] / max(1, len(ranks) - 1)) for level in rows["level"]]
                ax.scatter(rows["projection"], rows["trait_score"], c=shade, marker=marker, s=16, alpha=0.8, label=kind, lw=0)
        parts = []
        for scope, name in (("overall", "r"), ("within", "within")):
            row = correlations[
                (correlations["trait"] == trait) & (correlations["scope"] == scope) & (correlations["kind"] == "all")
            ]
            if len(row):
                parts.append(f"{name} = {row['r'].iloc[0]:.2f}")
        _title(ax, trait, ", ".join(parts))
        _score_axis(ax)
        ax.set_xlabel("projection of the last prompt token", fontsize=9)
    axes[0].set_ylabel("trait score of the answer", fontsize=9)
    axes[0].legend(fontsize=7, frameon=False, loc="best")
    return figure


def trace_figure(trace: pd.DataFrame) -> Figure:
    """Projection along a conversation on each trait's direction, a running mean over SMOOTH tokens of the same speaker.

    Single tokens jump about for reasons of their own (the page's coloured text shows them); background: who speaks.
    """
    conversations = _names(trace["conversation"])
    figure, axes = _figure(len(conversations), columns=1, panel=(8.4, 2.6))
    for ax, name in zip(axes, conversations, strict=True):
        part = trace[trace["conversation"] == name]
        for i, (trait, rows) in enumerate(part.groupby("trait", sort=False)):
            style = LINES[i // len(CYCLE) % len(LINES)]
            turn = (rows["role"] != rows["role"].shift()).cumsum()
            smooth = rows.groupby(turn)["projection"].transform(lambda x: x.rolling(SMOOTH, min_periods=1).mean())
            ax.plot(
                rows["index"], smooth.where(rows["role"] != "template"), style, color=CYCLE[i % len(CYCLE)], lw=1.3, label=trait
            )
        one = part[part["trait"] == part["trait"].iloc[0]]
        for role, colour in (("system", GREEN), ("user", YELLOW), ("assistant", SKY)):
            inside = (one["role"] == role).to_numpy()
            ax.fill_between(
                one["index"], 0, 1, where=inside, color=colour, alpha=0.14, lw=0, transform=ax.get_xaxis_transform(), step="mid"
            )
        _title(ax, name, "shaded: system (green), user (yellow), assistant (blue)")
        ax.set_xlabel("token", fontsize=9)
        ax.set_ylabel(f"projection, mean of {SMOOTH} tokens", fontsize=9)
    axes[0].legend(fontsize=7, frameon=False, loc="best", ncols=2)
    return figure


# ------------------------------------------------------------------------------------------------------------- dictionaries
def quality_figure(quality: pd.DataFrame) -> Figure:
    """Fraction of variance unexplained over the tokens a dictionary is for, with outliers, and over all tokens."""
    figure, (ax,) = _figure(1, panel=(5.2, 2.2))
    y = np.arange(len(quality))[::-1]
    ax.barh(y, quality["fvu"], color=[BLUE, SKY, GREY][: len(quality)], height=0.6)
    for at, value in zip(y, quality["fvu"], strict=True):
        ax.annotate(f" {value:.4f}", (value, at), va="center", fontsize=8)
    ax.set_yticks(y, [f"{name}\n{n:,} tokens" for name, n in zip(quality["set"], quality["tokens"], strict=True)])
    ax.set_xlim(0, 1.2 * max(float(quality["fvu"].max()), 1e-6))
    ax.set_xlabel("fraction of variance unexplained", fontsize=9)
    return figure


def loss_figure(loss: pd.DataFrame) -> Figure:
    """Cross-entropy of the model as it is, with the reconstruction in place of the residual, and with the two ablations."""
    figure, (ax,) = _figure(1, panel=(5.2, 2.4))
    names = {"original": "original", "spliced": "reconstruction", "mean": "mean residual", "zero": "zero"}
    part = loss.set_index("variant").loc[[name for name in names if name in set(loss["variant"])]]
    y = np.arange(len(part))[::-1]
    ax.barh(y, part["ce"], color=[GREEN, BLUE, SKY, GREY][: len(part)], height=0.6)
    for at, value in zip(y, part["ce"], strict=True):
        ax.annotate(f" {value:.3f}", (value, at), va="center", fontsize=8)
    ax.set_yticks(y, [names[str(name)] for name in part.index])
    ax.set_xlim(0, 1.15 * float(part["ce"].max()))
    ax.set_xlabel("cross-entropy, nats a token", fontsize=9)
    return figure


def l0_figure(l0: pd.DataFrame) -> Figure:
    """How many latents are active at once: share of tokens, in at most sixty bins, and the mean."""
    figure, (ax,) = _figure(1, panel=(5.2, 2.8))
    top = int(l0["l0"].max()) + 1
    width = -(-top // 60)
    edges = np.arange(0, top + width, width)  # whole numbers of equal width: else a wider bin looks like a peak
    counts, _ = np.histogram(l0["l0"], edges, weights=l0["tokens"])
    total = float(l0["tokens"].sum())
    ax.bar(edges[:-1], counts / total, width=np.diff(edges), align="edge", color=BLUE, linewidth=0)
    mean = float((l0["l0"] * l0["tokens"]).sum()) / total
    ax.axvline(mean, color=RED, lw=1.5)
    _title(ax, "", f"mean {mean:.1f}")
    ax.set_xlabel("active latents a token", fontsize=9)
    ax.set_ylabel("share of tokens", fontsize=9)
    return figure


def density_figure(density: pd.DataFrame, features: pd.DataFrame) -> Figure:
    """Histogram of log10 density of the latents that were active at all; the others are counted in the title."""
    figure, (ax,) = _figure(1, panel=(5.2, 2.8))
    ax.bar(density["low"], density["latents"], width=density["high"] - density["low"], align="edge", color=BLUE, linewidth=0)
    dead = int((features["density"] == 0).sum())
    _title(ax, "", f"{dead:,} of {len(features):,} never active")
    ax.set_xlabel("log10 of the share of tokens at which a latent is active", fontsize=9)
    ax.set_ylabel("latents", fontsize=9)
    return figure


def training_figure(metrics: pd.DataFrame) -> Figure:
    """Unexplained variance, active latents a token and dead latents against training tokens, a line a dictionary."""
    figure, axes = _figure(3, columns=3, panel=(3.6, 2.8))
    names = _names(metrics["dictionary"])
    shown = {"fvu": "variance unexplained", "l0": "active latents a token", "n_dead": "dead latents"}
    for ax, (column, label) in zip(axes, shown.items(), strict=True):
        for i, name in enumerate(names):
            part = metrics[metrics["dictionary"] == name]
            line = LINES[i // len(CYCLE) % len(LINES)]
            ax.plot(part["tokens"], part[column], line, color=CYCLE[i % len(CYCLE)], lw=1.2, label=name)
        ax.set_xlabel("training tokens", fontsize=9)
        ax.set_ylabel(label, fontsize=9)
        ax.set_xlim(left=0)
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes[0].set_yscale("log")
    axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes[0].yaxis.set_minor_formatter(NullFormatter())
    axes[1].set_ylim(0, 1.15 * float(metrics["l0"].max()))
    axes[2].set_ylim(0, max(5.0, 1.15 * float(metrics["n_dead"].max())))
    axes[2].yaxis.set_major_locator(MaxNLocator(integer=True))
    if len(names) > 1:
        axes[0].legend(fontsize=6, frameon=False)
    return figure


# ----------------------------------------------------------------------------------------------------------- finetuning
def finetuning_figure(metrics: pd.DataFrame) -> Figure:
    """Loss on the learnt tokens at each step with its running mean; beside it what else there was: penalty, or strength."""
    penalised, scheduled = bool((metrics["penalty"] > 0).any()), metrics["strength"].nunique() > 1
    figure, axes = _figure(1 + penalised + scheduled, columns=3, panel=(4.2, 2.8))
    width = max(1, len(metrics) // 20)
    axes[0].plot(metrics["step"], metrics["loss"], color=SKY, lw=1.0, label="step" if width > 1 else "_")
    if width > 1:
        smooth = metrics["loss"].rolling(width, min_periods=1).mean()
        axes[0].plot(metrics["step"], smooth, color=BLUE, lw=1.8, label=f"mean of {width} steps")
        axes[0].legend(fontsize=7, frameon=False)
    axes[0].set_ylabel("loss, nats a learnt token", fontsize=9)
    axes[0].set_ylim(bottom=0)
    rest = iter(axes[1:])
    for there, column, label in (
        (penalised, "penalty", "penalty added to it, nats"),
        (scheduled, "strength", "share of the strength"),
    ):
        if there:
            ax = next(rest)
            ax.plot(metrics["step"], metrics[column], color=RED, lw=1.4)
            ax.set_ylabel(label, fontsize=9)
            ax.set_ylim(bottom=0)
    for ax in axes:
        ax.set_xlabel("step", fontsize=9)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    return figure


# ------------------------------------------------------------------------------------------------------- decompositions
def _decomposition(*tables: pd.DataFrame) -> Figure:
    from pvsae.reports.decomposition import decomposition_figure

    return decomposition_figure(*tables)


def _causal(*tables: pd.DataFrame) -> Figure:
    from pvsae.reports.decomposition import causal_figure

    return causal_figure(*tables)


def _capability(table: pd.DataFrame) -> Figure:
    from pvsae.reports.capability import capability_figure

    return capability_figure(table)


# ------------------------------------------------------------------------------------------------------------ screening
def _screening(*tables: pd.DataFrame) -> Figure:
    from pvsae.reports.screening import screening_figure

    return screening_figure(*tables)


# ---------------------------------------------------------------------------------------------------------------- drift
def _drift(*tables: pd.DataFrame) -> Figure:
    from pvsae.reports.drift import drift_figure

    return drift_figure(*tables)


def _drift_profile(table: pd.DataFrame) -> Figure:
    from pvsae.reports.drift import profile_figure

    return profile_figure(table)


def _drift_features(table: pd.DataFrame) -> Figure:
    from pvsae.reports.drift import features_figure

    return features_figure(table)


# -------------------------------------------------------------------------------------------------------- run -> figures
def read_table(run: RunDir, name: str) -> pd.DataFrame | None:
    """A table of a run, or None if the run has no such table."""
    path = run.path / "tables" / f"{name}.csv"
    return pd.read_csv(path) if path.is_file() else None


# A table with a question mark may be empty or not there.
_FIGURES: dict[str, list[tuple[str, Callable[..., Figure], tuple[str, ...]]]] = {
    "extract": [("extraction", extraction_figure, ("extraction", "blocks"))],
    "layers": [("layers", layers_figure, ("layers",))],
    "steer": [("steering", steering_figure, ("steering",))],
    "feature_steer": [("feature_steering", feature_steering_figure, ("feature_steering", "facets?"))],
    "monitor": [
        ("monitoring", monitoring_figure, ("points", "correlations")),
        ("trace", trace_figure, ("trace",)),
    ],
    "decompose": [
        ("decomposition", _decomposition, ("decomposition", "curve", "nulls")),
        ("causal", _causal, ("causal",)),
    ],
    "finetune": [("finetuning", finetuning_figure, ("metrics",))],
    "capability": [("capability", _capability, ("capability",))],
    "screen": [("screening", _screening, ("histogram", "data_sets"))],
    "gate": [("screening", _screening, ("histogram", "data_sets"))],
    "drift": [
        ("drift", _drift, ("drift", "scores?")),
        ("profile", _drift_profile, ("profile",)),
        ("moved_features", _drift_features, ("features",)),
    ],
    "sae_train": [("training", training_figure, ("metrics",))],
    "sae_eval": [
        ("quality", quality_figure, ("quality",)),
        ("loss", loss_figure, ("loss",)),
        ("l0", l0_figure, ("l0",)),
        ("density", density_figure, ("density", "features")),
    ],
    "sae_features": [],  # a page of its own (features.py)
}


def draw(run: RunDir | str | Path) -> list[Path]:
    """Draw the figures of a run folder into its figures/ folder and give their paths.

    Raises:
        UserError: the folder is not a run folder, or its command has no figure.
    """
    run = run if isinstance(run, RunDir) else RunDir.read(run)
    if run.command not in _FIGURES:
        raise UserError(f"a run of `{run.command}` has no figure", expected=f"one of {', '.join(_FIGURES)}")
    paths = []
    for name, function, needed in _FIGURES[run.command]:
        tables = [read_table(run, table.removesuffix("?")) for table in needed]
        if all(table is not None and len(table) for table, which in zip(tables, needed, strict=True) if which[-1] != "?"):
            paths.append(_save(function(*tables), run.figure(name)))
    return paths
