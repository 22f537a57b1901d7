"""What a benchmark records: a value that is not a number never passes, and the record is strict JSON."""

from __future__ import annotations

import json

import pytest

from benchmarks import record
from benchmarks.record import COMPARE, check


@pytest.mark.parametrize("sign", COMPARE)
def test_nan_is_never_ok(sign: str) -> None:
    assert check("r", float("nan"), f"{sign} 0")["ok"] is False


def test_a_number_is_ok_where_it_meets_its_target() -> None:
    assert [check("x", value, ">= 80")["ok"] for value in (79.9, 80, 81)] == [False, True, True]
    assert [check("x", value, "< 2")["ok"] for value in (1, 2, float("inf"))] == [True, False, False]


def test_a_record_with_nan_is_read_back_as_failed(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    path = record.record("made_up", [check("r", float("nan"), ">= 0.5")])

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    stored = json.loads(path.read_text(), parse_constant=refuse)
    printed = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert stored["checks"] == printed["checks"] == [{"name": "r", "value": None, "target": ">= 0.5", "ok": False}]
