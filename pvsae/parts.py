"""Parts: pieces of a local file of rows that can be read by themselves, each row with the line that it stands in.

Knows: where rows begin in JSONL files and in Parquet files, and how a row is copied out unchanged.
Does not know: what a row holds (sources.py), who reads which part.

A part never goes over the end of a file, so that whoever reads it opens one file, goes to one place and reads on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pvsae.errors import UserError


@dataclass(frozen=True)
class Part:
    """A run of rows of one file.

    Attributes:
        number: of the part, counted over all files.
        file: where it lies.
        start: where its first row begins: a byte of a JSONL file, a row of a Parquet file.
        line: the line of its first row, counted from 1 (of a Parquet file: the row).
        row: the row of the whole source that it begins with, counted from 0.
        rows: how many there are.
    """

    number: int
    file: str
    start: int
    line: int
    row: int
    rows: int


@dataclass(frozen=True)
class Record:
    """One row: its place in the source (from 0) and in its file (from 1), and what stands there: a JSONL file's bytes, else a
    mapping."""

    row: int
    line: int
    raw: Any

    def jsonl(self) -> bytes:
        """The row as a line of JSONL: of a JSONL file the very bytes, whatever they are."""
        if isinstance(self.raw, bytes):
            return self.raw.rstrip(b"\r\n") + b"\n"
        return json.dumps(self.raw, ensure_ascii=False, default=str).encode() + b"\n"


def divisible(files: Sequence[Path]) -> bool:
    """Whether there are files, and all of them can be read from the middle."""
    return bool(files) and all(file.suffix in (".jsonl", ".parquet") and file.is_file() for file in files)


def parts_of(files: Sequence[Path], size: int, most: int | None = None) -> list[Part]:
    """Cuts files into parts of at most `size` rows; of all rows only the first `most`. One pass over a JSONL file's bytes.

    Raises:
        UserError: a size below 1, a file that is missing or cannot be read.
    """
    if size < 1:
        raise UserError(f"{size} rows a part", "at least 1")
    found: list[Part] = []
    row = 0
    for file in files:
        ends = _jsonl_ends(file, size) if file.suffix == ".jsonl" else _parquet_ends(file, size)
        for start, line, rows in ends:
            rows = rows if most is None else min(rows, most - row)
            if rows > 0:
                found.append(Part(len(found), str(file), start, line, row, rows))
                row += rows
    return found


def records(part: Part) -> Iterator[Record]:
    """The rows of a part, in order."""
    file = Path(part.file)
    reading = _jsonl(part) if file.suffix == ".jsonl" else _parquet(part)
    for i, (line, raw) in enumerate(reading):
        yield Record(part.row + i, line, raw)


def rows_at(parts: Sequence[Part], wanted: Sequence[int]) -> Iterator[Record]:
    """The records of these rows of a source, in the order of the source; only the parts that hold them are read."""
    left = sorted(set(wanted))
    for part in parts:
        here = {row for row in left if part.row <= row < part.row + part.rows}
        if here:
            yield from (record for record in records(part) if record.row in here)


def _jsonl_ends(file: Path, size: int) -> Iterator[tuple[int, int, int]]:
    """(byte, line, rows) of each part; blank lines are no rows, and are counted as lines."""
    start, line, first, rows, at = 0, 0, 1, 0, 0
    with _opened(file) as handle:
        for text in handle:
            line += 1
            if text.strip():
                if rows == 0:
                    start, first = at, line
                rows += 1
            at += len(text)
            if rows == size:
                yield start, first, rows
                rows = 0
    if rows:
        yield start, first, rows


def _jsonl(part: Part) -> Iterator[tuple[int, bytes]]:
    line, rows = part.line - 1, 0
    with _opened(Path(part.file)) as handle:
        handle.seek(part.start)
        for text in handle:
            line += 1
            if text.strip():
                yield line, text
                rows += 1
                if rows == part.rows:
                    return


def _opened(file: Path) -> Any:
    try:
        return file.open("rb")
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}", "a file of rows", "check the path") from error


def _parquet_ends(file: Path, size: int) -> Iterator[tuple[int, int, int]]:
    total = _parquet_file(file).metadata.num_rows
    for start in range(0, total, size):
        yield start, start + 1, min(size, total - start)


def _parquet(part: Part) -> Iterator[tuple[int, Any]]:
    opened = _parquet_file(Path(part.file))
    groups: list[int] = []
    before = first = 0
    for group in range(opened.metadata.num_row_groups):
        rows = opened.metadata.row_group(group).num_rows
        if before + rows > part.start and before < part.start + part.rows:
            first = before if not groups else first
            groups.append(group)
        before += rows
    at = first
    for batch in opened.iter_batches(batch_size=1024, row_groups=groups):
        begin, end = max(part.start - at, 0), min(part.start + part.rows - at, batch.num_rows)
        if begin < end:
            for i, row in enumerate(batch.slice(begin, end - begin).to_pylist()):
                yield at + begin + i + 1, row
        at += batch.num_rows


def _parquet_file(file: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{file} is not a Parquet file: {error}", "a file that a Parquet writer finished") from error
