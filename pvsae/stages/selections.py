"""Selections: the rows of highest, lowest and of no particular dP, copied out unchanged; with or without what a filter dropped.

Knows: numbers a row, where the rows stand, scores of an LLM filter (a column of the rows, a file, or a judge that is asked here).
Does not know: how dP came about, what is trained on a selection.

The paper's test on real chats: finetune on the 500 highest, 500 random and 500 lowest rows, also after an LLM filter dropped
every row that it scored above 1.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pvsae.errors import UserError
from pvsae.parts import parts_of, records, rows_at
from pvsae.runs import RunDir, atomic_path
from pvsae.screening.worker import slug
from pvsae.sources import Bad, Reader

if TYPE_CHECKING:
    from pvsae.judges.base import Judge, Metric
    from pvsae.screening.worker import DataSet

KINDS = ("top", "random", "bottom")


def choose(scores: NDArray[np.float64], allowed: NDArray[np.bool_], n: int, seed: int) -> dict[str, list[int]]:
    """Rows (indices) of each kind, at most n: of the allowed rows that have a score. Equal scores go by the order of the rows."""
    there = np.flatnonzero(np.isfinite(scores) & allowed)
    order = there[np.argsort(scores[there], kind="stable")]
    drawn = np.random.default_rng(seed).choice(there, min(n, there.size), replace=False)
    return {"top": order[::-1][:n].tolist(), "random": sorted(drawn.tolist()), "bottom": order[:n].tolist()}


def write_rows(data: DataSet, rows: Sequence[int], path: Path) -> None:
    """These rows as JSONL, unchanged, in the order given. Reads the data once more, and keeps only what is chosen."""
    found = {record.row: record.jsonl() for record in rows_at(data.parts, rows)}
    with atomic_path(path) as tmp, tmp.open("wb") as out:
        out.writelines(found[row] for row in rows)


def excerpts(data: DataSet, rows: Sequence[int], most: int = 200) -> dict[int, str]:
    """The beginning of the answer of each of these rows (of the raw line, where there is no answer)."""
    reader = Reader(data.source)
    out = {}
    for record in rows_at(data.parts, rows):
        value = reader.value(record.raw)
        usable = not isinstance(value, Bad) and not isinstance(value, str) and len(value) > 0
        text = value[-1]["content"] if usable else record.jsonl().decode(errors="replace")  # type: ignore[index]
        text = " ".join(str(text).split())
        out[record.row] = text if len(text) <= most else text[: most - 1] + "…"
    return out


# -------------------------------------------------------------------------------------------------------------- filter
def given_scores(data: DataSet, given: str) -> NDArray[np.float64]:
    """Scores of an LLM filter, a row each, NaN where there is none.

    Args:
        given: a field of the rows, or a file (.csv, .jsonl, .parquet) with a line a row; of several columns, "score" counts.

    Raises:
        UserError: no row has the field, or a file of another length or without scores.
    """
    path = Path(given)
    if path.suffix in (".csv", ".jsonl", ".parquet"):
        values = _file_scores(path)
        if len(values) != data.rows:
            raise UserError(f"{path} has {len(values)} scores, and {data.name} {data.rows} rows", "one for each row, in order")
        return values
    values = np.array([_number(_field(record.raw, given)) for part in data.parts for record in records(part)])
    if not np.isfinite(values).any():
        raise UserError(
            f"no row of {data.name} has a number in the field {given!r}", "a filter's score in it", "another field, or a file"
        )
    return values


def _file_scores(path: Path) -> NDArray[np.float64]:
    if path.suffix == ".csv":
        try:
            with path.open(newline="", encoding="utf-8") as handle:
                rows: list[Any] = list(csv.DictReader(handle))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}", "a file of scores") from error
    else:
        rows = [record.raw for part in parts_of([path], 4096) for record in records(part)]
        rows = [_parsed(row) for row in rows]
    names = {name for row in rows if isinstance(row, dict) for name in row}
    name = "score" if "score" in names else next(iter(names)) if len(names) == 1 else None
    if name is None and any(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} has the columns {', '.join(sorted(names))}", 'one column, or one that is called "score"')
    return np.array([_number(row.get(name) if isinstance(row, dict) else row) for row in rows], dtype=np.float64)


def _parsed(row: Any) -> Any:
    try:
        return json.loads(row) if isinstance(row, bytes) else row
    except ValueError:
        return None


def _field(raw: Any, name: str) -> Any:
    row = _parsed(raw)
    return row.get(name) if isinstance(row, dict) else None


def _number(value: Any) -> float:
    if isinstance(value, bool):
        return float("nan")
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")


def judged_scores(
    data: DataSet, usable: NDArray[np.bool_], judge: Judge, metric: Metric, folder: RunDir, progress: Callable[[int], Any]
) -> tuple[NDArray[np.float64], int]:
    """A judge's scores of the rows' answers, each part a step of the run; NaN where it gave none; and how many it failed to give.

    The question is the last user message.
    """
    reader = Reader(data.source)
    values, failed = [], 0
    for part in data.parts:
        name = f"filter/{slug(data.name)}/{metric.name}-{part.number:06d}"

        def compute(part: Any = part) -> pd.DataFrame:
            return pd.DataFrame(_judge_part(list(records(part)), usable, reader, judge, metric))

        table = folder.do_table(name, compute)
        values.append(table["score"].to_numpy(dtype=np.float64))
        failed += int(table["failed"].sum())
        progress(part.rows)
    return np.concatenate(values), failed


def _judge_part(
    found: Sequence[Any], usable: NDArray[np.bool_], reader: Reader, judge: Judge, metric: Metric
) -> Iterator[dict[str, Any]]:
    pairs, at = [], []
    for i, record in enumerate(found):
        value = reader.value(record.raw)
        if usable[record.row] and not isinstance(value, Bad | str):
            question = next((m["content"] for m in reversed(value[:-1]) if m["role"] == "user"), "")
            pairs.append((question, value[-1]["content"]))
            at.append(i)
    scores = dict(zip(at, judge.score(metric, pairs), strict=True)) if pairs else {}
    for i in range(len(found)):
        score = scores.get(i)
        number = float("nan") if score is None or score.value is None else float(score.value)
        yield {"score": number, "failed": score is not None and score.value is None}


def dropped(scores: NDArray[np.float64], above: float) -> NDArray[np.bool_]:
    """Rows that a filter takes away: scored above the threshold, or not scored at all, since nobody knows about those."""
    return ~np.isfinite(scores) | (scores > above)
