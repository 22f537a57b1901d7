"""Logs beside metrics.jsonl: sent where they were asked for, and an error that says what to install where they cannot be."""

from __future__ import annotations

import sys
import types
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


def test_tensorboard_gets_every_number_at_its_step(tmp_path: Path, monkeypatch) -> None:
    written: list[Any] = []

    class Writer:
        def __init__(self, folder: str) -> None:
            written.append(folder)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def close(self) -> None:
            written.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    with open_logs(["tensorboard"], tmp_path, {}) as log:
        assert log is not None
        log(LINE)
    name = LINE["dictionary"]
    assert written == [
        str(tmp_path / "tensorboard"), (f"{name}/fvu", 0.25, 10), (f"{name}/l0", 4.0, 10), (f"{name}/n_dead", 3, 10), "closed",
    ]  # fmt: skip


def test_tensorboard_itself(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (pip install 'pvsae[log]')")
    with open_logs(["tensorboard"], tmp_path, {}) as log:
        assert log is not None
        log(LINE)
    assert list((tmp_path / "tensorboard").glob("events.*"))


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
    kept = [file for file in (tmp_path / "wandb").rglob("run-*.wandb") if file.stat().st_size]
    assert kept
    assert all(ids[0] in file.name for file in kept)
