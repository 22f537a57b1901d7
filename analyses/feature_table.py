"""The table of features that `sae_features` prints: which features are tried, which are kept, and which pass.

Knows: columns of the stages' tables, the rules of choosing and passing, the figure and the Markdown.
Does not know: how anything was measured.

A feature's own facet is the one that most of its 100 strongest activations fall in. Where the judge tells facets, a feature
passes as `pvsae.stages.facets.specificity` says: its own facet at 5 times what it is without steering, above the trait's other
facets, at coherence 70. Where it does not, a feature passes whose trait score lies, with its whole interval, above what any
random feature or direction of its length reaches at a coherent strength.

Strength and features are chosen on one set of questions and held to it on another. Controls have no facet of their own and no
strength chosen beforehand, so each is given the facet and the strength that suit it best.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analyses.results import save
from pvsae.reports.figures import BLUE, GREY, INK, ORANGE, PALE
from pvsae.stages.facets import COHERENT, specificity
from pvsae.stages.feature_conditions import FEATURE, RANDOM_DIRECTION, RANDOM_FEATURE, VECTOR

KEYS = ["trait", "condition", "feature", "of"]
MEASURED = ["facet", "coef", "score", "unsteered", "times", "runner_up", "coherence", "trait_score", "passes"]
CONTROLS = (RANDOM_FEATURE, RANDOM_DIRECTION, VECTOR)
KNOWN = {
    "label": "own", "label_purity": "own_purity", "label_recall": "own_recall", "group": "group", "group_purity": "group_purity",
}  # fmt: skip
READ = ("cosine", "own_null", "beyond_null", "nonnegative", "difference", "q", "other_traits_with_it", "best_other")
PASS, FAIL, UNKNOWN = "pass", "fail", "not measured"


# ----------------------------------------------------------------------------------------------------------------- the choice
def candidates(decomposition: pd.DataFrame, activity: pd.DataFrame, truth: pd.DataFrame | None, top: int) -> pd.DataFrame:
    """The `top` latents of highest cosine with a trait's vector, with what is known of each.

    Args:
        decomposition: of that trait, as the stage `decompose` writes it.
        activity: latent, density, max, as the stage `sae_eval` writes them.
        truth: `Truth.table()`, or None where nobody knows what sentences mean.

    Returns: a row a latent, nearest first: trait, place, feature, the columns READ that there are, density, max, those of KNOWN
        (NaN without truth), and `tried`: it is active somewhere, points along the vector, and its own facet is the trait's.
    """
    found = decomposition.sort_values("rank").head(top)
    found = found[[c for c in ("trait", "rank", "latent", *READ) if c in found]].rename(columns={"rank": "place"})
    found = found.merge(activity[["latent", "density", "max"]], on="latent", how="left", validate="one_to_one")
    tried = (found["density"] > 0) & (found["max"] > 0) & (found["cosine"] > 0)
    if truth is not None:
        known = truth[["latent", *KNOWN]].rename(columns=KNOWN)
        found = found.merge(known, on="latent", how="left", validate="one_to_one")
        tried &= found["own"].fillna("").str.partition("/")[0] == found["trait"]
    else:
        found = found.assign(own=None, own_purity=math.nan, own_recall=math.nan, group=None, group_purity=math.nan)
    found = found.rename(columns={"latent": "feature"})
    found["feature"] = found["feature"].astype(str)
    return found.assign(tried=tried).reset_index(drop=True)


def own_facets(found: pd.DataFrame) -> dict[str, str]:
    """Feature -> its own facet, without the trait's name, of those that are tried and have one."""
    rows = found[found["tried"] & found["own"].notna()]
    return {row.feature: row.own.partition("/")[2] for row in rows.itertuples()}


def verdicts(
    table: pd.DataFrame,
    facets: pd.DataFrame,
    own: Mapping[str, str],
    *,
    coefs: Mapping[str, float] | None = None,
    coherent: float = COHERENT,
) -> pd.DataFrame:
    """What each steered condition does, a row each: KEYS and MEASURED; NaN from `coef` on where no strength is coherent.

    Args:
        table, facets: of one trait, as the stage `feature_steer` gives them.
        own: feature -> its own facet.
        coefs: feature -> the strength to hold it to; without it the best of all strengths is taken.
    """
    features = table[table["condition"] == FEATURE]
    if coefs is not None:
        features = features[features["coef"] == features["feature"].map(coefs)]
    controls = table[table["condition"].isin(CONTROLS)]
    if len(facets):
        parts = [
            specificity(features, facets, own=own, coherent=coherent), specificity(controls, facets, coherent=coherent),
        ]  # fmt: skip
        return pd.concat([part for part in parts if len(part)]).rename(columns={"specific": "passes"})[[*KEYS, *MEASURED]]
    plain = float(table.loc[table["condition"] == "unsteered", "trait_score"].iloc[0])
    best = _most(controls, coherent)
    random = best.loc[best["condition"] != VECTOR, "trait_score"]
    highest = max([plain, *random.dropna()])
    found = pd.concat([_most(features, coherent), best])
    found = found.assign(
        facet=None, score=found["trait_score"], unsteered=plain, times=math.nan, runner_up=highest,
        passes=(found["condition"] == FEATURE) & (found["trait_low"] > highest),
    )  # fmt: skip
    return found[[*KEYS, *MEASURED]].reset_index(drop=True)


def _most(table: pd.DataFrame, coherent: float) -> pd.DataFrame:
    """Each condition at the coherent strength at which it has the highest trait score."""
    rows = []
    for key, part in table.groupby(KEYS, sort=False):
        some = part[part["coherence"] >= coherent].sort_values("trait_score", ascending=False)
        rows.append(some.iloc[0].to_dict() if len(some) else dict(zip(KEYS, key, strict=True)))
    columns = [*KEYS, "coef", "trait_score", "trait_low", "coherence"]
    return pd.DataFrame(rows, columns=columns)


def chosen(found: pd.DataFrame, n: int) -> dict[str, float]:
    """Feature -> strength, of the n best verdicts: those that pass before others, then those with the largest lead."""
    lead = found["score"] - found[["runner_up", "unsteered"]].max(axis=1)
    order = found.assign(lead=lead)[found["coef"].notna()].sort_values(["passes", "lead"], ascending=False, kind="stable")
    return {row.feature: float(row.coef) for row in order.head(n).itertuples()}


# ------------------------------------------------------------------------------------------------------------------ the table
def assemble(
    found: pd.DataFrame,
    evidence: pd.DataFrame,
    choice: pd.DataFrame,
    kept: Mapping[str, float],
    measured: pd.DataFrame,
    cosines: Mapping[str, float],
    densities: Mapping[str, float],
) -> pd.DataFrame:
    """One trait's rows: every candidate, then the controls of those that were kept.

    Args:
        found: `candidates`.
        evidence: feature, promotes, passage, and label and link where there are any.
        choice, measured: `verdicts` on the questions of the choice, and on those held out.
        kept: `chosen`.
        cosines, densities: of random features, by name.

    Returns: KEYS, what is known of the feature, choice_coef, choice_score, choice_passes, `kept`, and MEASURED on the questions
        held out, with `verdict` in place of `passes`: what was not kept is UNKNOWN there.
    """
    first = choice.loc[choice["condition"] == FEATURE, ["feature", "coef", "score", "passes"]].rename(
        columns=lambda c: c if c == "feature" else f"choice_{c}"
    )
    rows = found.merge(evidence, on="feature", how="left").merge(first, on="feature", how="left")
    rows = rows.assign(condition=FEATURE, of="-", kept=rows["feature"].isin(list(kept)))
    own = measured[measured["condition"] == FEATURE].drop(columns=["trait", "condition", "of"])
    rows = rows.merge(own, on="feature", how="left")
    controls = measured[measured["condition"] != FEATURE]
    random = controls["feature"].where(controls["condition"] == RANDOM_FEATURE)  # directions have numbers of their own
    cosine = random.map(cosines).mask(controls["condition"] == VECTOR, 1.0)
    controls = controls.assign(cosine=cosine, density=random.map(densities), kept=False, tried=False)
    parts = [part.dropna(axis=1, how="all") for part in (rows, controls) if len(part)]
    columns = [*KEYS, *(c for c in rows.columns if c not in (*KEYS, *MEASURED)), *MEASURED]
    both = pd.concat(parts, ignore_index=True).reindex(columns=columns)
    both["passes"] = both["passes"].map({True: PASS, False: FAIL}).fillna(UNKNOWN)
    return both.rename(columns={"passes": "verdict"})


def passing(table: pd.DataFrame, trait: str, condition: str) -> int:
    """How many of a trait's rows of a kind pass on the questions held out."""
    return int(((table["trait"] == trait) & (table["condition"] == condition) & (table["verdict"] == PASS)).sum())


def effects(causal: pd.DataFrame, coef: float) -> dict[str, float]:
    """Share of the whole vector's effect of its sparse "reconstruction", its "residual", and the highest of a "random" part, at a
    strength; NaN where there is none."""
    rows = causal[causal["coef"] == coef]
    found = {}
    for name in ("reconstruction", "residual", "random"):
        some = rows.loc[rows["condition"].str.startswith(name), "effect"]
        found[name] = float(some.max()) if len(some) else math.nan
    return found


# ------------------------------------------------------------------------------------------------------------------ showing it
def markdown(table: pd.DataFrame, causal: pd.DataFrame, about: str) -> str:
    """The paper's table: kept features with evidence and effect, their controls, and the causal test."""
    lines = [f"# What is inside the vectors, and what each part does\n\n{about}\n"]
    for trait, part in table.groupby("trait", sort=False):
        lines.append(f"\n## {trait}\n")
        lines.append(
            "| place | feature | cosine | fires on (purity) | promotes | strongest passage | strength | without | with | "
            "other facets at most | coherence | trait score | verdict |\n|" + "---|" * 13
        )
        for row in part[(part["condition"] == FEATURE) & part["kept"]].sort_values("place").to_dict("records"):
            lines.append(
                f"| {row['place']:.0f} | {row['feature']} | {row['cosine']:.2f} | {_fires(row)} | {_cell(row.get('promotes'))} | "
                f"{_cell(row.get('passage'))} | {_number(row['coef'], 2)} | {_effect(row)} |"
            )
        lines.append(
            "\n| control | of | best facet | strength | without | with | other facets at most | coherence | trait score | "
            "verdict |\n|" + "---|" * 10
        )
        for row in part[part["condition"] != FEATURE].to_dict("records"):
            lines.append(
                f"| {row['condition']} {row['feature']} | {row['of']} | {_cell(row['facet'])} | {_number(row['coef'], 2)} | "
                f"{_effect(row)} |"
            )
        lines.append("\n| the vector and its parts | strength | trait score | coherence | share of the vector's effect |")
        lines.append("|" + "---|" * 5)
        for row in causal[causal["trait"] == trait].to_dict("records"):
            share = "" if math.isnan(row["effect"]) else f"{row['effect']:.0%}"
            lines.append(
                f"| {row['condition']} | {_number(row['coef'], 2)} | {_number(row['trait_score'])} | "
                f"{_number(row['coherence'])} | {share} |"
            )
    return "\n".join(lines) + "\n"


def _fires(row: Mapping[str, Any]) -> str:
    if isinstance(row["own"], str):
        return f"{row['own']} ({row['own_purity']:.2f})"
    return _cell(row.get("label"))


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else ""
    return text.replace("|", "/").replace("\n", " ")


def _number(value: float, digits: int = 0) -> str:
    return "" if value != value else f"{value:.{digits}f}"


def _effect(row: Mapping[str, Any]) -> str:
    numbers = [_number(row[name]) for name in ("unsteered", "score", "runner_up", "coherence", "trait_score")]
    return " | ".join([*numbers, row["verdict"]])


def draw(doses: pd.DataFrame, table: pd.DataFrame, path: Path) -> Path:
    """A row of panels a trait, a panel a kept feature: score of its own facet (or of the trait) by strength on the questions held
    out, beside the other facets, its random features, the whole vector at the same length, and coherence.

    Args:
        doses: `dose_response` of each trait with its name in `trait`: a column a facet.
    """
    kept = table[(table["condition"] == FEATURE) & table["kept"]]
    traits = list(dict.fromkeys(kept["trait"]))
    columns = max([1, *kept.groupby("trait").size()])
    figure = Figure(figsize=(3.1 * columns, 2.5 * max(1, len(traits)) + 0.4), dpi=150, layout="constrained")
    for i, trait in enumerate(traits):
        for j, row in enumerate(kept[kept["trait"] == trait].sort_values("place").to_dict("records")):
            ax = figure.add_subplot(len(traits), columns, i * columns + j + 1)
            _panel(ax, doses[doses["trait"] == trait], row)
            if not j:
                ax.set_ylabel(f"{trait}\nscore", fontsize=8)
    if figure.axes:
        handles, names = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=min(5, columns + 1), fontsize=8, frameon=False)
    return save(figure, path)


def _panel(ax: Axes, doses: pd.DataFrame, row: Mapping[str, Any]) -> None:
    facet = row["own"].partition("/")[2] if isinstance(row["own"], str) else ""
    own = facet if facet in doses else "trait_score"
    after = doses.columns[doses.columns.get_loc("n_failed_coherence") + 1 :]
    facets = [c for c in after if c not in ("questions", "trait", own) and doses[c].notna().any()]  # this trait's others
    start = doses[doses["condition"] == "unsteered"]

    def curve(part: pd.DataFrame, column: str) -> tuple[np.ndarray, np.ndarray]:
        """By strength, from the unsteered score on; the highest where several conditions share a strength."""
        highest = pd.concat([start, part]).groupby("coef")[column].max()
        return highest.index.to_numpy(), highest.to_numpy()

    mine = doses[(doses["condition"] == FEATURE) & (doses["feature"] == row["feature"])]
    beside = doses[doses["of"] == row["feature"]]
    for n, facet in enumerate(facets if own != "trait_score" else []):
        ax.plot(*curve(mine, facet), color=GREY, linewidth=0.8, label="other facets" if not n else "_")
    random = beside[beside["condition"] == RANDOM_FEATURE]
    if len(random):
        ax.plot(*curve(random, own), "--", color=INK, linewidth=1, label="random features, highest")
    ax.plot(*curve(beside[beside["condition"] == VECTOR], own), color=ORANGE, linewidth=1.2, label="whole vector, same length")
    ax.plot(*curve(mine, "coherence"), ":", color=BLUE, linewidth=1, label="coherence")
    ax.plot(*curve(mine, own), "o-", color=BLUE, markersize=4, linewidth=2, label="own facet")
    if row["coef"] == row["coef"]:
        ax.axvline(row["coef"], color=PALE, zorder=0, linewidth=4)
    ax.set_title(f"{row['feature']}: {own.replace('_', ' ')}", loc="left", fontsize=9, fontweight="bold", color=INK)
    ax.set_title(row["verdict"], loc="right", fontsize=8, color=BLUE if row["verdict"] == PASS else GREY)
    ax.set_ylim(-4, 104)
    ax.tick_params(colors=INK, labelsize=7)
    ax.set_xlabel("strength, multiples of the highest activation", fontsize=7)
    ax.spines[["top", "right"]].set_visible(False)


def as_records(table: pd.DataFrame, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of some columns, for the record of a run."""
    return table[[c for c in columns if c in table]].to_dict("records")
