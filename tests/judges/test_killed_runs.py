"""500 answers through a server that fails in every way, killed twice on the way: nothing lost, nothing paid twice."""

from __future__ import annotations

from benchmarks.judging import checks_of, measure


def test_killed_twice_nothing_lost_nothing_paid_twice(tmp_path):
    found = measure(tmp_path)
    assert [check for check in checks_of(found) if not check["ok"]] == [], found
