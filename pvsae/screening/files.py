"""Files: Parquet tables whose checksum lies beside them, so that half a file or a flipped bit is never read as numbers.

Knows: Parquet, checksums. Does not know: what the tables hold.

The note with the checksum is written first: a process that sees a table without a note, or with another one, sees damage.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from pvsae.runs import atomic_write_bytes, jsonable, sha256_of, write_json


def save_table(path: Path, table: pd.DataFrame, note: Mapping[str, Any]) -> None:
    """Writes a table, and `note` beside it with the checksum of the file."""
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False, compression="zstd")
    data = buffer.getvalue()
    write_json(note_of(path), {**jsonable(note), "sha256": hashlib.sha256(data).hexdigest()})
    atomic_write_bytes(path, data)


def read_note(path: Path) -> dict[str, Any] | None:
    """The note beside a table; None where there is none that can be read."""
    try:
        found = json.loads(note_of(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def is_whole(path: Path) -> bool:
    """Whether a table is there, and is the one that was written."""
    note = read_note(path)
    return note is not None and path.is_file() and sha256_of(path) == note.get("sha256")


def remove(path: Path) -> None:
    """Takes a table and its note away."""
    for file in (path, note_of(path)):
        with contextlib.suppress(OSError):
            file.unlink()


def note_of(path: Path) -> Path:
    """Where the note of a table lies."""
    return path.with_suffix(".json")
