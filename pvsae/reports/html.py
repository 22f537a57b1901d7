"""One self-contained HTML page from one run folder, or from a folder of run folders.

Knows: the files of a run folder (config, environment, result.json, tables, figures) and a Jinja template.
Does not know: models, judges, how any number was made. The page loads nothing: figures are embedded, there is no script.

`result.json` of a stage may hold, for the page: `title`, `about`, `headline` [{label, value}], `notes` [str],
`failures` [{what, n}], `prompts` [{label, text}] (what the chat template rendered), `examples` [{label, text}] and `costs`
[{server, calls, cached, failed, retries, tokens_in, tokens_out, cost}] (empty: no server was asked).
"""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from pvsae.errors import UserError
from pvsae.reports.figures import draw, read_table
from pvsae.runs import RunDir, atomic_write_text, now, read_json

MAX_ROWS = 60
FIRST = (
    "extraction",
    "layers",
    "steering",
    "specificity",
    "feature_steering",
    "correlations",
    "finetune",
    "rows",
    "decomposition",
    "checks",
    "offending",
    "capability",
    "data_sets",
    "drift",
    "scores",
    "quality",
    "loss",
    "agreement",
    "dictionaries",
)  # tables to open on; the others follow by name
HIDDEN = ("profile", "trace", "points", "l0", "density", "metrics", "histogram")  # shown as coloured text and as figures
ORDER = (
    "extract",
    "layers",
    "steer",
    "feature_steer",
    "monitor",
    "finetune",
    "sae_train",
    "sae_eval",
    "sae_features",
    "decompose",
    "capability",
    "screen",
    "gate",
    "drift",
)
COST_COLUMNS = {
    "server": "server", "calls": "calls", "cached": "from the cache", "failed": "failed", "retries": "retries",
    "tokens_in": "tokens in", "tokens_out": "tokens out", "cost": "US dollars",
}  # fmt: skip
CAPTIONS = {
    "extraction": (
        "Left: mean trait score of the answers under the suppressing and the eliciting system prompts; in brackets, the pairs "
        "kept. Right: cosine of the vectors of two halves of the data; near 1, more data would not change the direction."
    ),
    "layers": "What adding the vector does at each block, at equal strength; the ring marks the chosen block.",
    "steering": (
        "Solid: trait score with its 95% interval. Dotted: coherence. Grey: random directions of the same length. Dashed: what "
        "the system prompt alone does. Strength 0 is the unsteered model."
    ),
    "feature_steering": (
        "A panel a trait and feature. Blue: trait score with its 95% interval; thin: the trait's facets; dotted: coherence. "
        "Grey: features that are active as often (solid) and random directions (dashed); orange: the whole persona vector; all "
        "at the length that the feature adds. Strength 0 is the unsteered model."
    ),
    "monitoring": (
        "Each point is one prompt: where its last token lies along the vector before anything is answered, and how the answer "
        "is then scored. Dark to light: from strongly suppressing to strongly eliciting prompts."
    ),
    "decomposition": (
        "Left: latents of the highest cosines with the vector, from both ends; between the dashed lines lie 95% of the nulls. "
        "Middle: how much of the vector the first atoms of a pursuit explain, beside a random direction (grey). Right: cosine "
        "against the difference of encodings, of the latents that any method lists."
    ),
    "drift": (
        "Left: how far the last prompt token moved along each trait's vector, with its 95% interval over questions; behind it, "
        "what random directions reach. Right: trait scores of both models' answers."
    ),
    "profile": "The shift at every block. Grey: what 95% of random directions stay below.",
    "moved_features": "The latents that moved most, with the trait whose vector is nearest to each and their cosine.",
    "capability": (
        "Value of each task against strength. Grey: random directions of the vector's length. Band: 95% interval of the change "
        "on the same questions. Dashed: the direction taken out. Strength 0 is the untouched model."
    ),
    "causal": "Trait score (bars, 95% interval) and coherence (dots) when the model is steered with each part by itself.",
    "finetuning": "Loss on the tokens that are learnt; beside it the penalty and the treatment's strength, where they change.",
    "screening": (
        "How many rows have which projection difference, a line a data set; dots: the means with their 95% intervals. "
        "0 is where the base model's own answers lie."
    ),
    "training": "Unexplained variance, active latents a token and dead latents at each logged step of training.",
    "quality": "How much of the residuals' variance the dictionary misses. A few long outlier tokens can hide what it misses.",
    "loss": "What the model loses where the reconstruction, the mean or nothing stands in place of its residual.",
    "l0": "How many latents are active at a token; the line is the mean.",
    "density": "How often latents are active. At the right edge stand those that nearly always are.",
    "trace": "Where the tokens of a conversation lie along the vectors; the model never saw the prompts behind these answers.",
}


def find_runs(folder: str | Path) -> list[RunDir]:
    """The run folders in `folder` (itself, or its subfolders), in the order of the pipeline. UserError if there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"no such folder: {folder}", "a run folder, or a folder of run folders", "make one, e.g. with `pvsae demo`"
        )
    places = [folder] if (folder / "config.json").is_file() else sorted(p.parent for p in folder.glob("*/config.json"))
    runs = [RunDir.read(place) for place in places]
    if not runs:
        raise UserError(f"no run folder in {folder}", "config.json in it or in a subfolder", "give the folder named after --out")
    return sorted(runs, key=lambda run: ORDER.index(run.command) if run.command in ORDER else len(ORDER))


def write_report(folder: str | Path, out: str | Path | None = None, *, title: str = "Persona vectors") -> Path:
    """Draw the figures of every run in `folder` and write report.html there (or to `out`). Gives the page's path.

    Raises:
        UserError: there is no run folder, or the page cannot be written.
    """
    runs = find_runs(folder)
    out = Path(out) if out is not None else Path(folder) / "report.html"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("report.html.jinja").render(
        title=title, made=now(), sections=[_section(run) for run in runs], models=_models(runs), cost_columns=COST_COLUMNS
    )
    atomic_write_text(out, page)
    return out


def _models(runs: list[RunDir]) -> str:
    models = [run.config.get("model") for run in runs]
    names = [model.get("name") if isinstance(model, dict) else model for model in models]
    return ", ".join(dict.fromkeys(str(name) for name in names if name)) or "no model"


def _section(run: RunDir) -> dict[str, Any]:
    result_file = run.path / "result.json"
    result = read_json(result_file, "the run's result") if result_file.is_file() else {}
    environment_file = run.path / "environment.json"
    environment = read_json(environment_file) if environment_file.is_file() else []
    figures = draw(run)
    trace = read_table(run, "trace")
    return {
        "id": run.path.name,
        "command": run.command,
        "finished": bool(result),
        "result": result,
        "failures": [f for f in result.get("failures", []) if f["n"]],
        "figures": [{"name": f.stem, "data": _embedded(f), "caption": CAPTIONS.get(f.stem, "")} for f in figures],
        "costs": _costs(result["costs"]) if "costs" in result else None,
        "tables": _tables(run.path / "tables"),
        "traces": [] if trace is None else _traces(trace),
        "config": json.dumps({"seed": run.seed, **run.config}, indent=2, ensure_ascii=False),
        "environment": json.dumps(environment[-1] if environment else {}, indent=2, ensure_ascii=False),
        "sessions": len(environment),
    }


def _costs(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Cells of the table of servers, a list a row, in the order of COST_COLUMNS."""
    return [
        [
            {"text": row["server"], "number": False},
            *({"text": f"{row[name]:,}", "number": True} for name in list(COST_COLUMNS)[1:-1]),
            {"text": "no price given" if row["cost"] is None else f"{row['cost']:,.4f}", "number": True},
        ]
        for row in rows
    ]


def _embedded(figure: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(figure.read_bytes()).decode("ascii")


def _tables(folder: Path) -> list[dict[str, Any]]:
    files = [path for path in folder.glob("*.csv") if path.stem not in HIDDEN]
    return [_table(path) for path in sorted(files, key=lambda path: (path.stem not in FIRST, path.stem))]


def _table(path: Path) -> dict[str, Any]:
    frame = pd.read_csv(path)
    return {
        "name": path.stem,
        "columns": [str(column) for column in frame.columns],
        "rows": [[_cell(value) for value in row] for row in frame.head(MAX_ROWS).itertuples(index=False)],
        "left": max(0, len(frame) - MAX_ROWS),
        "file": f"tables/{path.name}",
    }


def _cell(value: Any) -> dict[str, Any]:
    """Text of a table cell, and whether it is a number (numbers are set flush right)."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return {"text": "–", "number": True}
        return {"text": f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}", "number": True}
    return {"text": str(value), "number": isinstance(value, int) and not isinstance(value, bool)}


def _traces(trace: pd.DataFrame) -> list[dict[str, Any]]:
    """Coloured tokens of each conversation and trait: blue below, red above the trait's mean projection in that conversation."""
    out = []
    for (conversation, trait), part in trace.groupby(["conversation", "trait"], sort=False):
        values = part["projection"].to_numpy(dtype=float)
        centre, spread = values.mean(), max(1e-9, float(abs(values - values.mean()).max()))
        tokens = [
            {"text": str(token), "value": f"{value:+.2f}", "role": role, "colour": _colour((value - centre) / spread)}
            for token, value, role in zip(part["token"].fillna(""), values, part["role"], strict=True)
        ]
        out.append({"conversation": conversation, "trait": trait, "tokens": tokens})
    return out


def _colour(x: float) -> str:
    """White at 0, red at +1, blue at -1, as a CSS colour."""
    x = max(-1.0, min(1.0, x))
    hot = (213, 94, 0) if x > 0 else (0, 114, 178)
    red, green, blue = (round(255 + (c - 255) * abs(x) * 0.75) for c in hot)
    return f"rgb({red},{green},{blue})"
