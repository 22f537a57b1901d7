"""One table and its metadata in one Parquet file.

Knows: Parquet, and where the metadata sits in its schema.
Does not know: what the columns mean.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from pvsae.errors import UserError

_KEY = b"pvsae"


def write_parquet(path: str | Path, table: pd.DataFrame, meta: dict[str, Any]) -> Path:
    """Write `table` (without its index) and `meta` (JSON) atomically."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pvsae.runs import atomic_path

    arrow = pa.Table.from_pandas(table, preserve_index=False)
    arrow = arrow.replace_schema_metadata({**(arrow.schema.metadata or {}), _KEY: json.dumps(meta, ensure_ascii=False).encode()})
    path = Path(path)
    with atomic_path(path) as tmp:
        pq.write_table(arrow, tmp, compression="zstd")
    return path


def read_parquet(path: str | Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The table and its metadata ({} if there is none). UserError when the file is missing or damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    if not path.is_file():
        raise UserError(f"no file at {path}", "an existing Parquet file")
    try:
        arrow = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet ({error})", "a whole Parquet file", "make it again") from error
    meta = json.loads((arrow.schema.metadata or {}).get(_KEY, b"{}"))
    return arrow.to_pandas(), meta
