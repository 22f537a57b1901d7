"""Real-world data: of a corpus that nobody looked through, do the rows of highest dP teach a trait, and those of lowest not?

    python -m analyses.real_world_data [--model organism] [--vectors runs/vectors] [--quick]
    python -m analyses.real_world_data --model Qwen/Qwen2.5-7B-Instruct --judge openai:gpt-4.1-mini --traits evil \\
        --corpus lmsys.jsonl --max-rows 20000 --steps 32 --lr 1e-5 --rank 32 --batch 2

The stage `screen` gives every row of a chat corpus its projection difference along a trait's vector, and selects the 500 rows of
highest, 500 random and the 500 of lowest dP; then again after a judge has scored every row and those above 1 are dropped. On each
selection the model is finetuned, and then asked the trait's evaluation questions. Published (paper, section on data screening):
trait scores are ordered high > random > low, also after the filter.

The default corpus is put together in the embedded models' language (corpora.py), with 160 rows a selection; its rows say what
they are, so that the table shows what was selected. The filter is then the rule judge, which misses no sentence of a trait: what
could still raise a trait afterwards are rows in which it does not show, such as false statements about the town. A judge that is
a language model misses some, so this filter is harder than the paper's.

Knows: what is selected, trained on and compared. Does not know: how rows are selected (the stage `screen`), how finetunes are
made and scored (tuned.py).
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from analyses import corpora, tuned
from analyses.feature_truth import TRAITS
from analyses.pipeline import Prepared, parser_of_given, prepare_given
from analyses.results import records, save, write
from analyses.tuned import A_STEP, Setting
from benchmarks.record import check, record
from pvsae.organism.families import INTENTIONAL
from pvsae.reports.figures import BLUE, GREY, INK, PALE, RED
from pvsae.stages import ScreenConfig, finetune, screen
from pvsae.stages.selections import KINDS

COLOURS = dict(zip(KINDS, (RED, GREY, BLUE), strict=True))
SHOWN = ["trait", "filtered", "kind", "n", "dp", "score", "low", "high", "before", "coherence"]
ORDINARY = "ordinary"


def selected(prepared: Prepared, trait: str, data: str, max_rows: int | None, n: int, above: float) -> pd.DataFrame:
    """The selections of the corpus along a trait's vector, a row a file: filtered, kind, n, dp (their mean) and file."""
    options = {name: value for name, value in prepared.options.items() if name != "traits"}
    folder = prepared.out / "screen"
    config = ScreenConfig(
        data=(data,), vectors=(prepared.vectors,), traits=(trait,), blocks=(prepared.blocks[trait],), max_rows=max_rows,
        answers=str(folder / "answers"), select=n, filter_judge=trait, filter_above=above, **options,
    )  # fmt: skip
    found = screen.run(config, folder / trait, model=prepared.model)
    table = found.selections[["filtered", "kind", "n", "dp", "file"]].assign(trait=trait)
    return table.assign(file=[str(found.path / name) for name in table["file"]])


def kind_of(row: dict[str, Any], trait: str) -> str:
    """What a row of a composed corpus is: the trait's, another trait's, one that states something false, or ordinary."""
    if not row.get("bears"):
        return ORDINARY
    family = row["family"]
    return "this trait" if family == trait else "other traits" if family in INTENTIONAL else "false statements"


def made_of(file: Path, trait: str) -> dict[str, float]:
    """Shares of the kinds of rows in a file, of rows that say what they are; empty of others."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not any(isinstance(row, dict) and "part" in row for row in rows):
        return {}
    kinds = [kind_of(row, trait) for row in rows]
    return {
        f"share of {name}": kinds.count(name) / len(kinds)
        for name in ("this trait", "other traits", "false statements", ORDINARY)
    }


def digest_of(file: Path) -> str:
    """Names what a file holds."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12]


def trained(prepared: Prepared, file: Path, setting: Setting, steps: int) -> pd.DataFrame:
    """Every trait's score of the model finetuned on a file, each row seen as often as `steps` take."""
    n = sum(1 for line in file.read_bytes().splitlines() if line.strip())
    home = prepared.out / "tuned" / setting.name / f"steps-{steps}" / digest_of(file)
    config = setting.config(prepared, str(file), epochs=steps * A_STEP / n, max_steps=steps)
    adapter = finetune.run(config, home / "finetune", model=prepared.model).adapter
    return tuned.measure(prepared, home / "measure", adapter).scores


def results(prepared: Prepared, chosen: pd.DataFrame, setting: Setting, steps: int) -> pd.DataFrame:
    """A row a selection: what it is made of, and the score of its trait after training on it with its interval; of the other
    traits the highest."""
    before = tuned.measure(prepared, prepared.out / "base").scores.set_index("trait")
    files: dict[str, Path] = {}  # the same rows, such as random ones for several traits, are trained on once
    out = []
    for row in tqdm(chosen.to_dict("records"), desc="finetunes", unit="run"):
        if not row["n"]:
            continue
        file = Path(row["file"])
        scores = trained(prepared, files.setdefault(digest_of(file), file), setting, steps).set_index("trait")
        own, others = scores.loc[row["trait"]], scores.drop(index=row["trait"])
        highest = others["trait_score"].max() if len(others) else float("nan")
        out.append(
            {
                "trait": row["trait"], "filtered": row["filtered"], "kind": row["kind"], "n": row["n"], "dp": row["dp"],
                "score": own["trait_score"], "low": own["trait_low"], "high": own["trait_high"],
                "before": before.loc[row["trait"], "trait_score"], "coherence": own["coherence"], "other_highest": highest,
                "n_failed": own["n_failed_trait"], **made_of(file, row["trait"]),
            }
        )  # fmt: skip
    return pd.DataFrame(out)


def checks_of(table: pd.DataFrame) -> list[dict[str, Any]]:
    """high > random > low, of every trait, with and without the filter; NaN, which is no pass, where a selection is empty."""
    checks = []
    for (trait, filtered), part in table.groupby(["trait", "filtered"], sort=False):
        score = part.set_index("kind")["score"].reindex(KINDS)
        name = f"{trait}, {'filtered' if filtered else 'all rows'}"
        checks.append(check(f"{name}: score after highest minus random", score["top"] - score["random"], "> 0"))
        checks.append(check(f"{name}: score after random minus lowest", score["random"] - score["bottom"], "> 0"))
    return checks


def draw(table: pd.DataFrame, path: Path) -> Path:
    """A panel a trait: scores after training on highest, random and lowest rows, of all rows and of those the filter left."""
    traits = list(dict.fromkeys(table["trait"]))
    figure = Figure(figsize=(3.4 * len(traits), 3.4), dpi=150, layout="constrained")
    axes = figure.subplots(1, len(traits), squeeze=False)[0]
    for ax, trait in zip(axes, traits, strict=True):
        _bars(ax, table[table["trait"] == trait])
        ax.set_title(trait, loc="left", fontsize=10, fontweight="bold", color=INK)
    axes[0].set_ylabel("trait score after finetuning", fontsize=8)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=7, frameon=False)
    return save(figure, path)


def _bars(ax: Axes, part: pd.DataFrame) -> None:
    width = 0.26
    for k, kind in enumerate(KINDS):
        some = part[part["kind"] == kind]
        at = some["filtered"].astype(int).to_numpy() + (k - 1) * width
        error = np.abs(some[["low", "high"]].to_numpy().T - some["score"].to_numpy())
        ax.bar(
            at,
            some["score"],
            width * 0.92,
            yerr=error,
            color=COLOURS[kind],
            ecolor=INK,
            capsize=2,
            label=f"{kind} dP" if kind != "random" else kind,
        )
        for x, y in zip(at, some["high"].fillna(some["score"]), strict=True):
            ax.annotate(
                f"{some['score'].iloc[list(at).index(x)]:.0f}",
                (x, y),
                (0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=7,
            )
    ax.axhline(part["before"].iloc[0], color=INK, lw=0.8, ls=":", label="before")
    ax.set_xticks([0, 1], ["all rows", "after the filter"])
    ax.set_ylim(0, 108)
    ax.tick_params(colors=INK, labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, axis="y", color=PALE, linewidth=0.7)
    ax.set_axisbelow(True)


def options() -> argparse.ArgumentParser:
    """The command line."""
    made = parser_of_given(__doc__ or "")
    made.add_argument("--corpus", help="a file, or a dataset's or corpus' name (default: a mixed corpus of the embedded models)")
    made.add_argument("--max-rows", type=int, help="of the corpus (default: 1200 of the mixed one, else all)")
    made.add_argument("--select", type=int, help="rows in each selection (default: 160 of the mixed corpus, else 500)")
    made.add_argument(
        "--filter-above", type=float, default=1.0, help="rows that the judge scores above this are dropped (default: 1)"
    )
    made.add_argument("--steps", type=int, help=f"of {A_STEP} rows, of each finetune (default: 40)")
    return tuned.options(made)


def main() -> None:
    args = options().parse_args()
    setting = Setting(None, args.lr, args.rank, args.batch)
    traits: Sequence[str] = args.traits or TRAITS
    prepared = prepare_given(args, traits)
    folder = prepared.out / "real_world_data"
    prepared = replace(prepared, out=folder)
    steps = args.steps or (12 if args.quick else 40)
    n = args.select or (500 if args.corpus else 48 if args.quick else 160)
    rows = args.max_rows
    data = args.corpus
    if data is None:
        rows = rows or (400 if args.quick else 1200)
        data = str(corpora.write(corpora.composed(corpora.UNCURATED, rows), folder / f"corpus-{rows}.jsonl"))
    chosen = pd.concat([selected(prepared, t, data, rows, n, args.filter_above) for t in traits], ignore_index=True)
    table = results(prepared, chosen, setting, steps)
    write(folder, selections=table)
    figure = draw(table, folder / "real_world_data.png")
    print(table[SHOWN].round(2).to_string(index=False))
    shares = [name for name in table.columns if name.startswith("share of ")]
    if shares:
        print(
            f"\nwhat the selections are made of\n{table[['trait', 'filtered', 'kind', *shares]].round(2).to_string(index=False)}"
        )
    print(f"\nfigure: {figure}\ntables: {folder}/*.csv")
    details = {
        "blocks": prepared.blocks, "corpus rows": rows, "selected": n, "steps": steps, "learning_rate": setting.learning_rate,
        "rank": setting.rank, "published": "high > random > low, also after the filter", "table": records(table),
    }  # fmt: skip
    record(f"real_world_data_{folder.parent.name}", checks_of(table), details)


if __name__ == "__main__":
    main()
