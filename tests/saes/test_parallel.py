"""Processes that torchrun starts. What they compute together is tested in test_grid.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pvsae.errors import UserError
from pvsae.saes.folders import load
from pvsae.saes.parallel import ALONE, Group, join, leave
from pvsae.saes.trainer import train
from tests.saes.corpora import write_texts
from tests.saes.test_trainer import Made, config

ROOT = Path(__file__).resolve().parents[2]


def curve(folder: Path) -> torch.Tensor:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([[line["loss"], line["fvu"], line["l0"], line["grad_norm"]] for line in lines])


def test_without_torchrun_a_process_is_alone(monkeypatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert join() is ALONE
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert join() is ALONE
    leave()


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="128 tokens on 3 processes"):
        train(Made(), config(), tmp_path, group=Group(0, 3), progress=False)


@pytest.mark.slow
def test_the_command_under_torchrun(tiny_folders, tmp_path: Path) -> None:
    write_texts(tmp_path / "a.jsonl", 200)
    (tmp_path / "c.yaml").write_text(
        f"""
model: {{name: {tiny_folders("qwen2")}, device: cpu}}
corpus: {{sources: [{{path: {tmp_path}/a.jsonl}}], context: 64, held_out: 0.2, repeat: true}}
stream: {{batch_tokens: 256, buffer_tokens: 2048, calibration_tokens: 512, dtype: float32}}
training:
  dictionaries: {{block: 2, d_sae: 96, k: 4, lr: 1e-3}}
  tokens: 5_120
  batch: 256
  log_every: 2
  step: {{product: float32}}
  calibration_tokens: 500
"""
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PVSAE_CACHE": str(tmp_path / "cache")}
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    ways: dict[str, tuple[list[str], list[str]]] = {
        "one": ([], []), "tokens": (two, []), "latents": (two, ["training.width_shards=2"]),
    }  # fmt: skip
    for name, (start, settings) in ways.items():
        command = ["-m", "pvsae", "sae", "train", str(tmp_path / "c.yaml"), *settings, "--out", str(tmp_path / name)]
        done = subprocess.run([sys.executable, *start, *command], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("report:") == 1, "one process speaks"
        assert not list((tmp_path / name).glob("checkpoint*"))
        assert not list((tmp_path / name).glob(".metrics*")), "a process that does not write leaves nothing"
    one = curve(tmp_path / "one")
    assert len(one) == 10
    whole = load(tmp_path / "one" / "block-2_width-96_k-4")
    for name in ("tokens", "latents"):
        torch.testing.assert_close(curve(tmp_path / name)[:, :3], one[:, :3], rtol=1e-4, atol=0)
        other = load(tmp_path / name / "block-2_width-96_k-4")
        assert float((whole.W_dec * other.W_dec).sum(1).mean()) > 0.999
