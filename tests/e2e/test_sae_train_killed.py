"""`pvsae sae train`, killed without warning behind a checkpoint. Started again, it ends with the same dictionary, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pvsae.saes.folders import load
from pvsae.stages import sae_train
from tests.saes.corpora import write_texts

NAME = "block-2_width-96_k-4"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def start(tmp_path, tiny_folders):
    """A function that starts the command on a run folder in a process of its own."""
    (tmp_path / "c.yaml").write_text(
        f"""
model: {{name: {tiny_folders("qwen2")}, device: cpu}}
corpus:
  sources: [{{path: {write_texts(tmp_path / "a.jsonl", 200)}, repeat: true}}]
  context: 64
  held_out: 0.2
stream: {{batch_tokens: 256, buffer_tokens: 2048, calibration_tokens: 512}}
training:
  dictionaries: {{block: 2, d_sae: 96, k: 4, lr: 1e-3}}
  tokens: 25_600
  batch: 128
  log_every: 5
  checkpoint_every: 20
  calibration_tokens: 500
"""
    )
    threads = str(torch.get_num_threads())  # the sums of products depend on them
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": str(ROOT), "PVSAE_CACHE": str(tmp_path / "cache")}

    def run(out: Path) -> subprocess.Popen[bytes]:
        line = [sys.executable, "-m", "pvsae", "sae", "train", str(tmp_path / "c.yaml"), "--out", str(out)]
        log = (tmp_path / "stderr.txt").open("w")  # a pipe that nobody reads would fill up
        return subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=log, env=environment)

    return run


def steps(out: Path) -> list[int]:
    metrics = out / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("\n")]


@pytest.mark.slow  # processes of its own; the quick tests stop the same training inside of one
def test_a_training_killed_on_the_way_ends_with_the_same_bits(start, tmp_path, monkeypatch) -> None:
    whole, broken, log = tmp_path / "whole", tmp_path / "broken", tmp_path / "stderr.txt"
    monkeypatch.setenv("PVSAE_CACHE", str(tmp_path / "cache"))
    sae_train.run(sae_train.load_config(tmp_path / "c.yaml"), whole, progress=False)  # here: every process costs its imports

    process = start(broken)
    deadline = time.monotonic() + 240
    while not any(step > 25 for step in steps(broken)):  # behind the checkpoint of step 20, and not at one
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, "no step was logged"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL, "it was over too soon"
    assert (broken / "checkpoint.pt").exists()
    assert not (broken / NAME / "cfg.json").exists()

    assert start(broken).wait(timeout=300) == 0, log.read_text()
    ours, theirs = load(broken / NAME), load(whole / NAME)
    for array in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"):
        assert torch.equal(getattr(ours, array), getattr(theirs, array)), array
    assert ours.info == theirs.info
    assert (broken / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert (broken / "result.json").read_bytes() == (whole / "result.json").read_bytes()
    assert not (broken / "checkpoint.pt").exists()
