"""What the finished rows of a screening hold: columns of a probe, rows by status, tokens, the bins of a histogram.

Knows: the columns of a data set's file of rows. Does not know: how rows came about, projection differences, selections.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from pvsae.screening.rows import OK, STATUSES
from pvsae.stages.differences import Columns

if TYPE_CHECKING:
    from pvsae.screening.reading import Probe
    from pvsae.screening.worker import DataSet

BINS = 60
SHOWN_BAD = 1000  # unusable rows listed in a table; all of them are counted, and stand in the rows' files


def read_rows(path: Path, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Columns of a data set's file of rows."""
    return pd.read_parquet(path, columns=None if columns is None else list(columns))


def read_columns(path: Path, probe: Probe, model: str | None = None) -> Columns:
    """What a file of rows holds of one probe."""
    names = [probe.column(q, model) for q in ("proj", "base_proj", "prompt_last_proj")]
    table = read_rows(path, [*names, "prompt"])
    proj, base, last = (table[name].to_numpy(dtype=np.float64) for name in names)
    return Columns(proj, base, last, table["prompt"].to_numpy())


def shared_edges(values: Sequence[np.ndarray]) -> np.ndarray:
    """Bins that all data sets share."""
    together = np.concatenate([v[np.isfinite(v)] for v in values])
    if not together.size:
        return np.linspace(-1.0, 1.0, BINS + 1)
    low, high = float(together.min()), float(together.max())
    return np.linspace(low, high if high > low else low + 1.0, BINS + 1)


def status_counts(files: Mapping[str, Path], data: Sequence[DataSet]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows by status and by base answers (none where one was made and is empty), and a list of those that cannot be used, by file
    and line."""
    counts, bad = [], []
    for one in data:
        path = files[one.name]
        table = read_rows(path, ["row", "line", "status", "reason", "n_cut", "n_base"])
        found = table["status"].value_counts()
        usable = table[table["status"] == OK]
        counts.append(
            {
                "data": one.name, "rows": len(table), **{status: int(found.get(status, 0)) for status in STATUSES},
                "cut": int((usable["n_cut"] > 0).sum()),
                "no base answer": int((usable["n_base"] == 0).sum()), "with base answer": int((usable["n_base"] > 0).sum()),
            }
        )  # fmt: skip
        some = table[table["status"] != OK].head(SHOWN_BAD)
        begins = [part.row for part in one.parts]
        where = [one.parts[bisect_right(begins, row) - 1].file for row in some["row"]]
        bad.append(some[["line", "status", "reason"]].assign(data=one.name, file=where))
    return pd.DataFrame(counts), pd.concat(bad, ignore_index=True)[["data", "file", "line", "status", "reason"]]


def token_counts(files: Mapping[str, Path]) -> pd.DataFrame:
    """Tokens that the exact value and the last-prompt-token approximation take, whatever was in the cache before."""
    out = []
    for name, path in files.items():
        table = read_rows(path, ["prompt", "n_prompt", "n_answer", "base_tokens", "status"])
        table = table[table["status"] == OK]
        own = int((table["n_prompt"] + table["n_answer"]).sum())
        based = table[table["base_tokens"].notna()]
        again = int((based["n_prompt"] + based["base_tokens"]).sum())
        once = based.drop_duplicates("prompt")
        generated, prompts = int(once["base_tokens"].sum()), int(once["n_prompt"].sum())
        out.append(
            {
                "data": name, "read_own": own, "read_base": again, "prompts_of_base": prompts, "generated": generated,
                "saved_by_prompt_last": 1 - own / max(1, own + again + prompts + generated),
            }
        )  # fmt: skip
    return pd.DataFrame(out)
