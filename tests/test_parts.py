from __future__ import annotations

import json

import pandas as pd
import pytest

from pvsae.errors import UserError
from pvsae.parts import divisible, parts_of, records, rows_at


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 0}\n\n  \n{"a": 1}\nnot json\r\n\xff\n{"a": "\xc3\xa9"}')
    return path


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_parts_of_jsonl_hold_every_row_once_with_its_line_and_its_bytes(jsonl, size) -> None:
    found = [record for part in parts_of([jsonl], size) for record in records(part)]
    assert [r.row for r in found] == [0, 1, 2, 3, 4]
    assert [r.line for r in found] == [1, 4, 5, 6, 7]
    assert b"".join(r.jsonl() for r in found) == b'{"a": 0}\n{"a": 1}\nnot json\n\xff\n{"a": "\xc3\xa9"}\n'


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_parts_of_parquet_may_begin_inside_of_a_row_group(tmp_path, size) -> None:
    path = tmp_path / "a.parquet"
    pd.DataFrame({"a": range(20)}).to_parquet(path, row_group_size=6)
    parts = parts_of([path], size)
    found = [record for part in parts for record in records(part)]
    assert [r.raw["a"] for r in found] == list(range(20))
    assert [r.line for r in found] == list(range(1, 21))
    assert json.loads(found[3].jsonl()) == {"a": 3}
    assert all(part.rows <= size for part in parts)


def test_parts_end_with_their_file_and_rows_are_counted_over_all(jsonl, tmp_path) -> None:
    other = tmp_path / "b.jsonl"
    other.write_text('{"a": 9}\n{"a": 8}\n')
    parts = parts_of([jsonl, other], 4)
    assert [(p.number, p.row, p.rows) for p in parts] == [(0, 0, 4), (1, 4, 1), (2, 5, 2)]
    assert [r.line for r in records(parts[2])] == [1, 2]
    assert [p.rows for p in parts_of([jsonl, other], 4, most=6)] == [4, 1, 1]


def test_rows_are_found_by_number_in_the_parts_that_hold_them(jsonl) -> None:
    parts = parts_of([jsonl], 2)
    assert [(r.row, r.line) for r in rows_at(parts, [4, 1, 1])] == [(1, 4), (4, 7)]
    opened = [p for p in parts if p.row == 4]
    assert [r.row for r in rows_at([*opened], [4])] == [4]


def test_what_can_be_read_from_the_middle(jsonl, tmp_path) -> None:
    assert divisible([jsonl])
    assert not divisible([])
    assert not divisible([tmp_path])
    assert not divisible([tmp_path / "a.jsonl.gz"])


def test_wrong_input_is_said(tmp_path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        parts_of([tmp_path / "none.jsonl"], 2)
    (tmp_path / "no.parquet").write_text("no")
    with pytest.raises(UserError, match="not a Parquet"):
        parts_of([tmp_path / "no.parquet"], 2)
    with pytest.raises(UserError, match="at least 1"):
        parts_of([], 0)
