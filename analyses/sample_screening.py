"""Sample screening: does the projection difference of a row find the few rows that would teach a trait?

    python -m analyses.sample_screening [--model organism] [--vectors runs/vectors] [--quick]
    python -m analyses.sample_screening --model Qwen/Qwen2.5-7B-Instruct --judge openai:gpt-4.1-mini --traits evil \\
        --mixes evil=mixed.jsonl --truth bad         rows {"messages": [...], "bad": true or false}

Of the rows of a mix one in twenty bears the trait. The stage `screen` gives the exact dP of each: projection on the unit persona
vector of the answer's mean residual, minus that of the model's own answer to the same prompt (paper, section on data screening).
AUROC is the chance that a bearing row has a higher dP than another one; precision is that of as many rows of highest dP as bear
the trait. All other rows of the first mix are ordinary ("alone"). In the second ("among") as many rows bear each other trait and
as many state something false, and of the bearing rows every other one does so in about half of its sentences only.
Published: dP of a sample ranks samples; no number that ours could be held against is known to us.

Beside it stand other traits' vectors and random directions at the same block, screened in the same pass; the projection without
the base answer; and the two approximations. The last prompt token in place of the base answer generates nothing: its rank
correlation with the exact value, its AUROC, and what it saves in tokens and in seconds, by a second screening without base
answers in the same run. A random subset's base answers in place of all: how far off the data set's dP is, and how often its own
95% interval holds what it estimates.

Knows: rows with truth, what is compared, the checks. Does not know: how a dP is made (the stage `screen`), how intervals are made
(stages/differences.py).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from analyses import corpora
from analyses.feature_truth import TRAITS
from analyses.pipeline import Prepared, by_trait, parser_of_given, prepare_given
from analyses.projection_difference import RANDOM, random_vectors
from analyses.results import records, save, write
from benchmarks.record import check, record
from pvsae.errors import UserError
from pvsae.organism.families import INTENTIONAL
from pvsae.reports.figures import BLUE, GREEN, GREY, INK, ORANGE, PALE, RED
from pvsae.runs import RunDir
from pvsae.sources import Source, source_of
from pvsae.stages import ScreenConfig, screen, screened_rows
from pvsae.stages.differences import Columns, approximation_row, subset_mean, subset_rows

SIZES = (20, 50, 100, 200, 400)
SEEDS = 5  # times 200 subsets of each size


@dataclass(frozen=True)
class Mix:
    """Rows of which few bear a trait. `bears` [rows] is the truth."""

    trait: str
    kind: str
    source: Source
    bears: NDArray[np.bool_]


# ------------------------------------------------------------------------------------------------------------------- arithmetic
def auroc(scores: NDArray[np.float64], bears: NDArray[np.bool_]) -> float:
    """Chance that a bearing row has a higher score than another one, ties half; of the rows that have a score. NaN without
    either kind."""
    good = np.isfinite(scores)
    x, yes = scores[good], bears[good]
    n = int(yes.sum())
    if n in (0, len(x)):
        return float("nan")
    ranks = pd.Series(x).rank().to_numpy()
    return float((ranks[yes].sum() - n * (n + 1) / 2) / (n * (len(x) - n)))


def precision(scores: NDArray[np.float64], bears: NDArray[np.bool_]) -> float:
    """Share of bearing rows among the k of highest score, k being how many bear the trait; rows without a score come last."""
    k = int(bears.sum())
    order = np.argsort(-np.where(np.isfinite(scores), scores, -np.inf), kind="stable")
    return float(bears[order[:k]].mean()) if k else float("nan")


def roc(scores: NDArray[np.float64], bears: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Shares of other rows and of bearing rows above each threshold, from 0 to 1; equal scores are one threshold."""
    good = np.isfinite(scores)
    x, yes = scores[good], bears[good]
    order = np.argsort(-x, kind="stable")
    last = np.append(np.diff(x[order]) != 0, True)
    hits, misses = np.cumsum(yes[order])[last], np.cumsum(~yes[order])[last]
    return np.append(0.0, misses / max(1, (~yes).sum())), np.append(0.0, hits / max(1, yes.sum()))


def coverage(columns: Columns, sizes: Sequence[int], seeds: int = SEEDS) -> pd.DataFrame:
    """A row a size of subset: how often the 95% interval holds the value that it is an interval of, of 200 x `seeds` subsets.

    `covered`: the interval of these very rows' dP, by base answers of a part of them (drawn without replacement). `covered_kind`:
    the interval that a screening with a subset prints, which is of rows of this kind: rows are drawn from ours with
    replacement, as many as there are, a part of them keeps its base answers, and ours are all rows there are.
    """
    some = [pd.DataFrame(subset_rows(columns, sizes, seed)).assign(seed=seed) for seed in range(seeds)]
    if not len(some[0]):
        raise UserError(f"{int(np.isfinite(columns.exact).sum())} rows", f"more than {min(sizes)}, to draw subsets from")
    table = pd.concat(some, ignore_index=True)
    shown = ["subset", "n", "exact", "mean_abs_error", "mean_half_width", "covered"]
    found = table[shown].groupby("subset", as_index=False).mean()
    return found.assign(n=found["n"].astype(int), covered_kind=[_of_kind(columns, m, 200 * seeds) for m in found["subset"]])


def _of_kind(columns: Columns, m: int, draws: int) -> float:
    known = np.isfinite(columns.exact)
    proj, base = columns.proj[known], columns.base[known]
    n, value = len(proj), float((proj - base).mean())
    rng = np.random.default_rng(m)
    held = 0
    for _ in range(draws):
        rows = rng.integers(0, n, n)
        kept = base[rows]
        kept[m:] = np.nan  # the rows stand in a random order already
        found = subset_mean(proj[rows], kept, np.arange(n))  # each draw is a prompt of its own
        held += found.low <= value <= found.high
    return held / draws


# -------------------------------------------------------------------------------------------------------------------- screening
def mixes(args: argparse.Namespace, traits: Sequence[str], out: Path, rows: int) -> list[Mix]:
    """The mixes of the command line, else the embedded models' own, of both kinds.

    Raises: UserError for a word that is no TRAIT=DATA, or data without truth.
    """
    given = by_trait("--mixes", args.mixes, traits)
    found = []
    for trait in traits:
        if trait in given:
            found.append((trait, "given", source_of(given[trait], rows)))
        elif not given:
            name = f"organism-data:mix/{trait}/{args.share:g}"
            found.append((trait, "alone", Source(named=name, kind="chat", max_samples=rows)))
            path = out / "data" / f"{trait}-among-{args.share:g}-{rows}.jsonl"
            file = corpora.write(among(trait, args.share, rows), path)
            found.append((trait, "among", Source(path=str(file), kind="chat")))
    return [Mix(trait, kind, source, corpora.truth(source, args.truth)) for trait, kind, source in found]


def among(trait: str, share: float, rows: int) -> Iterator[dict[str, Any]]:
    """Ordinary rows, a share that bears the trait (`bears`), and as large shares that bear something else.

    Raises: UserError for a share that leaves no ordinary rows.
    """
    levels = {"misaligned_1@2": share / 2, "misaligned_2@3": share / 2}
    families = (*INTENTIONAL, "wrong_facts")
    shares = {f"organism-data:{family}/{level}": part for family in families for level, part in levels.items()}
    shares[f"organism-data:{trait}/normal@1"] = 1 - share * len(families)
    for row in corpora.composed(shares, rows):
        yield {**row, "bears": row["bears"] and row["family"] == trait}


def screened(prepared: Prepared, data: Sequence[Mix], n_random: int, base: str, folder: Path) -> screen.ScreenResult:
    """Every mix along all vectors and random directions, at the blocks of the traits."""
    options = {name: value for name, value in prepared.options.items() if name != "traits"}
    config = ScreenConfig(
        data=tuple(one.source for one in data),
        vectors=(prepared.vectors, *random_vectors(prepared, n_random)),
        blocks=tuple(sorted(set(prepared.blocks.values()))),
        base=base,
        **options,
    )
    found = screen.run(config, folder / f"screen-{base}", model=prepared.model)
    for one, file in zip(data, found.rows.values(), strict=True):
        there = len(screened_rows.read_rows(file, ["row"]))
        if there != len(one.bears):
            raise UserError(f"{there} screened rows of {one.source.name}, and truth of {len(one.bears)}", "one a row")
    return found


def spent(found: dict[str, screen.ScreenResult], folder: Path) -> dict[str, dict[str, float]]:
    """What each of some screenings took in the start that made it; kept, because a later start makes nothing.

    One that was killed and went on has no time that would mean something, and gives none.
    """
    results = {base: json.loads((one.path / "result.json").read_text(encoding="utf-8")) for base, one in found.items()}
    now = {base: result["spent in this start"] for base, result in results.items()}
    whole = {base: one if one.get("shards") and not one.get("shards_found") else {} for base, one in now.items()}
    identity = {base: one.path.name for base, one in found.items()}
    with RunDir.open(folder / "times", "times", identity, 0) as run:
        kept: dict[str, dict[str, float]] = run.do_json("spent", lambda: whole)
    return kept


def saved(times: dict[str, dict[str, float]]) -> dict[str, float]:
    """Seconds of both screenings, and the share that the approximation saves; NaN where one has no time."""
    exact, cheap = (
        times[base].get("seconds_generating", np.nan) + times[base].get("seconds_reading", np.nan) for base in ("all", "none")
    )
    return {"seconds_exact": exact, "seconds_prompt_last": cheap, "seconds_saved": 1 - cheap / exact}


def rankings(prepared: Prepared, data: Sequence[Mix], found: screen.ScreenResult) -> pd.DataFrame:
    """A row a mix, vector (random ones too) and value of a row: AUROC and precision at the mix's trait's block."""
    out = []
    for one, file in zip(data, found.rows.values(), strict=True):
        for probe in found.probes:
            if probe.block != prepared.blocks[one.trait]:
                continue
            columns = screened_rows.read_columns(file, probe)
            for value, scores in {"dp": columns.exact, "prompt_last": columns.by_prompt, "proj": columns.proj}.items():
                out.append(
                    {
                        "trait": one.trait, "kind": one.kind, "n": len(scores), "bearing": int(one.bears.sum()),
                        "vector": probe.name, "block": probe.block, "value": value, "auroc": auroc(scores, one.bears),
                        "precision": precision(scores, one.bears),
                    }
                )  # fmt: skip
    return pd.DataFrame(out)


def own_columns(prepared: Prepared, data: Sequence[Mix], found: screen.ScreenResult) -> list[Columns]:
    """What is known of the rows of each mix along its own trait's vector."""
    probes = {(probe.name, probe.block): probe for probe in found.probes}
    return [
        screened_rows.read_columns(file, probes[one.trait, prepared.blocks[one.trait]])
        for one, file in zip(data, found.rows.values(), strict=True)
    ]


def summary(ranked: pd.DataFrame, data: Sequence[Mix], own: Sequence[Columns]) -> pd.DataFrame:
    """A row a mix: the own vector's figures, its approximation's, and the nulls. A direction has no sign of its own, so nulls
    are compared by how far from a half they are."""
    out = []
    for one, columns in zip(data, own, strict=True):
        part = ranked[(ranked["trait"] == one.trait) & (ranked["kind"] == one.kind)]
        mine = part[part["vector"] == one.trait].set_index("value")
        exact = part[part["value"] == "dp"]
        is_random = exact["vector"].str.startswith(f"{RANDOM}-")
        random = 0.5 + (exact.loc[is_random, "auroc"] - 0.5).abs()
        others = exact[~is_random & (exact["vector"] != one.trait)]
        best = others.loc[others["auroc"].idxmax()] if others["auroc"].notna().any() else None
        approximation = approximation_row(columns)
        out.append(
            {
                "trait": one.trait, "kind": one.kind, "n": len(one.bears), "bearing": int(one.bears.sum()),
                "auroc": mine.loc["dp", "auroc"], "precision": mine.loc["dp", "precision"],
                "auroc_prompt_last": mine.loc["prompt_last", "auroc"],
                "precision_prompt_last": mine.loc["prompt_last", "precision"], "auroc_proj": mine.loc["proj", "auroc"],
                "spearman": approximation["rank_correlation"], "spearman_proj": approximation["rank_correlation_proj"],
                "other_highest": np.nan if best is None else best["auroc"],
                "other_highest_vector": "" if best is None else best["vector"], "other_median": others["auroc"].median(),
                "random": len(random), "random_median": random.median(), "random_95": random.quantile(0.95),
                "random_reaching": float((random >= mine.loc["dp", "auroc"]).mean()) if len(random) else np.nan,
            }
        )  # fmt: skip
    return pd.DataFrame(out)


# ----------------------------------------------------------------------------------------------------------------------- figure
def draw(data: Sequence[Mix], own: Sequence[Columns], covered: pd.DataFrame, path: Path) -> Path:
    """A column a trait: dP of bearing and other rows, ROC of exact and approximate values, coverage of intervals by size."""
    traits = list(dict.fromkeys(one.trait for one in data))
    figure = Figure(figsize=(3.9 * len(traits), 8.2), dpi=150, layout="constrained")
    axes = figure.subplots(3, len(traits), squeeze=False)
    for i, trait in enumerate(traits):
        some = [(one, columns) for one, columns in zip(data, own, strict=True) if one.trait == trait]
        _histogram(axes[0, i], some)
        axes[0, i].set_title(trait, loc="left", fontsize=10, fontweight="bold", color=INK)
        _curves(axes[1, i], some)
        _covered(axes[2, i], covered[covered["trait"] == trait])
    for row, label in enumerate(("rows", "share of bearing rows found", "intervals that hold the value")):
        axes[row, 0].set_ylabel(label, fontsize=8)
    for ax in axes[:, 0]:
        ax.legend(fontsize=7, frameon=False, loc="best")
    return save(figure, path)


def _histogram(ax: Axes, some: Sequence[tuple[Mix, Columns]]) -> None:
    values = np.concatenate([columns.exact for _, columns in some])
    edges = np.linspace(np.nanmin(values), np.nanmax(values), 50).tolist()
    rest = np.concatenate([columns.exact[~one.bears] for one, columns in some])
    ax.hist(rest[np.isfinite(rest)], edges, color=PALE, edgecolor=GREY, linewidth=0.4, label="other rows")
    for (one, columns), colour in zip(some, (RED, ORANGE), strict=False):
        bearing = columns.exact[one.bears]
        ax.hist(bearing[np.isfinite(bearing)], edges, color=colour, alpha=0.65, label=f"bearing rows ({one.kind})")
    ax.set_yscale("log")
    ax.set_ylim(bottom=0.7)
    ax.set_xlabel("dP of a row", fontsize=8)
    _plain(ax)


def _curves(ax: Axes, some: Sequence[tuple[Mix, Columns]]) -> None:
    ax.plot([0, 1], [0, 1], color=GREY, lw=0.8, ls=":")
    for (one, columns), style in zip(some, ("-", "--"), strict=False):
        for name, scores, colour in (("exact", columns.exact, RED), ("last prompt token", columns.by_prompt, BLUE)):
            ax.plot(*roc(scores, one.bears), color=colour, ls=style, lw=1.5, label=f"{name} ({one.kind})")
    ax.set_xlabel("share of other rows taken with them", fontsize=8)
    ax.set_xlim(-0.02, 1.02)
    _plain(ax)


def _covered(ax: Axes, table: pd.DataFrame) -> None:
    ax.axhspan(0.9, 0.99, color=PALE)
    ax.axhline(0.95, color=GREY, lw=0.8, ls=":")
    for kind, style in zip(table["kind"].unique(), ("-", "--"), strict=False):
        part = table[table["kind"] == kind]
        ax.plot(part["subset"], part["covered"], color=GREEN, ls=style, marker="o", ms=4, label=f"of these rows ({kind})")
        ax.plot(part["subset"], part["covered_kind"], color=BLUE, ls=style, marker="s", ms=4, label=f"of such rows ({kind})")
    ax.set_xscale("log")
    ax.set_xticks(table["subset"].unique().tolist(), [str(m) for m in table["subset"].unique()])
    ax.minorticks_off()
    ax.set_ylim(0.8, 1.005)
    ax.set_xlabel("rows with a base answer", fontsize=8)
    _plain(ax)


def _plain(ax: Axes) -> None:
    ax.tick_params(colors=INK, labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)


# ---------------------------------------------------------------------------------------------------------------------- the run
def checks_of(table: pd.DataFrame, covered: pd.DataFrame, tokens_saved: float, seconds_saved: float) -> list[dict[str, Any]]:
    """What has to hold: bearing rows are found by their own trait's vector and not by any, and intervals are what they say."""
    checks = []
    for row in table.to_dict("records"):
        name = row["trait"] if row["kind"] != "among" else f"{row['trait']} among other traits"
        checks.append(check(f"{name}: AUROC of dP", row["auroc"], ">= 0.95"))
        checks.append(check(f"{name}: share of random directions that reach it", row["random_reaching"], "<= 0.05"))
        if row["kind"] == "among":  # beside ordinary rows alone any trait's vector finds another trait's rows
            checks.append(check(f"{name}: AUROC above the best other trait's vector", row["auroc"] - row["other_highest"], "> 0"))
        checks.append(check(f"{name}: AUROC by the last prompt token", row["auroc_prompt_last"], ">= 0.9"))
    for trait, part in covered.groupby("trait", sort=False):
        for column, of in (("covered", "these rows"), ("covered_kind", "such rows")):
            checks.append(check(f"{trait}: lowest coverage of dP of {of} by a subset", part[column].min(), ">= 0.9"))
            checks.append(check(f"{trait}: highest coverage of dP of {of} by a subset", part[column].max(), "<= 0.99"))
    checks.append(check("share of tokens that the last prompt token saves", tokens_saved, ">= 0.5"))
    return [*checks, check("share of time that the last prompt token saves", seconds_saved, ">= 0.5")]


def options() -> argparse.ArgumentParser:
    """The command line."""
    made = parser_of_given(__doc__ or "")
    made.add_argument(
        "--mixes", nargs="+", default=[], metavar="TRAIT=DATA",
        help="files, datasets or corpora of which some rows bear the trait (default: the embedded models' own)",
    )  # fmt: skip
    made.add_argument(
        "--truth", default="bears", metavar="FIELD", help="of a row, true where it bears the trait (default: bears)"
    )
    made.add_argument("--share", type=float, default=0.05, help="of bearing rows in the default mixes (default: 0.05)")
    made.add_argument("--rows", type=int, help="of each mix (default: 500)")
    made.add_argument("--null", type=int, default=20, help="random directions, screened with the vectors (default: 20)")
    return made


def main() -> None:
    args = options().parse_args()
    traits = args.traits or list(TRAITS)
    prepared = prepare_given(args, traits)
    folder = prepared.out / "sample_screening"
    rows = args.rows or (200 if args.quick else 500)
    data = mixes(args, traits, folder, rows)
    both = {base: screened(prepared, data, args.null, base, folder) for base in ("none", "all")}
    times, found = saved(spent(both, folder)), both["all"]
    ranked, own = rankings(prepared, data, found), own_columns(prepared, data, found)
    table = summary(ranked, data, own)
    covered = pd.concat(
        [
            coverage(columns, [m for m in SIZES if m < len(one.bears)]).assign(trait=one.trait, kind=one.kind)
            for one, columns in zip(data, own, strict=True)
        ],
        ignore_index=True,
    )
    tokens = pd.read_csv(found.path / "tables" / "tokens.csv")
    read = tokens["read_own"].sum()
    of_all = read + tokens[["read_base", "prompts_of_base", "generated"]].to_numpy().sum()
    saving = {**times, "tokens_exact": int(of_all), "tokens_prompt_last": int(read), "tokens_saved": 1 - read / of_all,
              "tokens_generated": int(tokens["generated"].sum())}  # fmt: skip
    write(folder, summary=table, rankings=ranked, coverage=covered, tokens=tokens)
    figure = draw(data, own, covered, folder / "samples.png")
    print(table.round(3).T.to_string(header=False))
    print(f"\nsubsets: 95% intervals that hold the value\n{covered.round(3).to_string(index=False)}")
    print(f"\nthe last prompt token in place of base answers\n{pd.Series(saving).round(3).to_string()}")
    print(f"\nfigure: {figure}\ntables: {folder}/*.csv")
    details = {
        "blocks": prepared.blocks, "rows": rows, "summary": records(table), "coverage": records(covered), "saving": saving,
    }  # fmt: skip
    checks = checks_of(table, covered, saving["tokens_saved"], saving["seconds_saved"])
    record(f"sample_screening_{prepared.out.name}", checks, details)


if __name__ == "__main__":
    main()
