"""Logs beside metrics.jsonl: sent where they were asked for, and an error that says what to install where they cannot be."""

from __future__ import annotations

import json
import struct
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pvsae.errors import UserError
from pvsae.saes.logs import open_logs

LINE = {"step": 10, "tokens": 1280, "dictionary": "block-1_width-64_k-4", "fvu": 0.25, "l0": 4.0, "n_dead": 3}


def test_no_names_no_log(tmp_path: Path) -> None:
    with open_logs((), tmp_path, {}) as log:
        assert log is None


def test_an_unknown_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown log 'paper'(?s:.*)tensorboard, wandb"), open_logs(["paper"], tmp_path, {}):
        pass


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_package_that_is_not_installed_is_named(tmp_path: Path, monkeypatch, name: str, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError) as error, open_logs([name], tmp_path, {}):
        pass
    assert f"the package {name} is not installed" in str(error.value)
    assert "pvsae[log]" in str(error.value)


def test_tensorboard_has_every_number_once_after_a_kill_too(tmp_path: Path) -> None:
    """Read back from the event files, as TensorBoard does."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (pip install 'pvsae[log]')")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps in ((10, 20, 30), (20, 30, 40)):  # killed behind step 30, and gone on with from a checkpoint at step 10
        with open_logs(["tensorboard"], tmp_path, {}) as log:
            assert log is not None
            for step in steps:
                log({**LINE, "step": step, "fvu": 1 / step})
                log({**LINE, "step": step, "dictionary": "another"})
        time.sleep(1.1)  # event files are told apart by the second in which they were begun
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    names = {f"{d}/{metric}" for d in (LINE["dictionary"], "another") for metric in ("fvu", "l0", "n_dead")}
    assert set(found.Tags()["scalars"]) == names
    shown = [(event.step, event.value) for event in found.Scalars(f"{LINE['dictionary']}/fvu")]
    assert shown == [(step, pytest.approx(1 / step)) for step in (10, 20, 30, 40)]
    assert [event.value for event in found.Scalars("another/n_dead")] == [3.0] * 4


def test_wandb_offline_keeps_the_run_and_its_id(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed (pip install 'pvsae[log]')")
    ids = []
    for step in (10, 20):
        with open_logs(["wandb"], tmp_path, {"model": {"name": "tiny"}}) as log:
            assert log is not None
            log({**LINE, "step": step})
            log({**LINE, "step": step, "dictionary": "another"})
        ids.append((tmp_path / ".wandb-run").read_text())
    assert ids[0] == ids[1]
    kept = sorted((tmp_path / "wandb").rglob("run-*.wandb"))
    assert len(kept) == 2
    assert all(ids[0] in file.name for file in kept)
    name = LINE["dictionary"]
    for step, file in zip((10, 20), kept, strict=True):
        until = time.monotonic() + 30  # W&B's own process may still be writing when it has said that the run is finished
        while not (history := [row for row in wandb_history(file) if "another/fvu" in row]) and time.monotonic() < until:
            time.sleep(0.1)
        assert [(row[f"{name}/fvu"], row[f"{name}/n_dead"], row["another/l0"]) for row in history] == [(0.25, 3, 4.0)]
        assert [(row["_step"], row["tokens"]) for row in history] == [(step, 1280)]


def wandb_history(file: Path) -> list[dict[str, Any]]:
    """What was logged, from W&B's own file: a header, then records in LevelDB's log format, in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, found, whole = file.read_bytes(), 7, [], b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no room for a record's header: the block is filled up
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        part, at = data[at + 7 : at + 7 + length], at + 7 + length
        whole = part if kind in (1, 2) else whole + part  # full, first | middle, last
        if kind in (1, 4):
            found.append(Record.FromString(whole))
    rows = [{".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in r.history.item} for r in found]
    return [row for row in rows if row]
