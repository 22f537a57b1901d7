"""`pvsae finetune`, killed without warning between two checkpoints. Started again, it ends with the same adapter, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from pvsae.finetuning import checkpoints
from pvsae.stages import FinetuneConfig, finetune
from tests.saes.corpora import write_chats

ROOT = Path(__file__).resolve().parents[2]


def steps(out: Path) -> int:
    """Steps that the training in a run folder has logged."""
    metrics = out / ".parts" / "adapter" / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def test_a_training_killed_on_the_way_ends_with_the_same_bits(tmp_path, tiny_folders) -> None:
    whole, broken, log = tmp_path / "whole", tmp_path / "broken", tmp_path / "stderr.txt"
    data, model = write_chats(tmp_path / "chats.jsonl", 24), str(tiny_folders("qwen2"))
    options = {"max_steps": 20, "save_every": 6, "batch": 3, "accumulation": 1, "rank": 4, "alpha": 8, "seed": 7}
    config = FinetuneConfig(data=(data,), model=model, device="cpu", learning_rate=1e-3, dropout=0.1, **options)
    there = finetune.run(config, whole, progress=False)

    line = [sys.executable, "-m", "pvsae", "finetune", data, "--model", model, "--device", "cpu", "--out", str(broken)]
    line += [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    line += ["--learning-rate", "1e-3", "--dropout", "0.1"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}
    with log.open("w") as stderr:  # a pipe that nobody reads would fill up
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=stderr, env=environment)
    deadline = time.monotonic() + 240
    while steps(broken) < 8:  # behind the checkpoint of step 6, and not at one
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, "no step was logged"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL, "it was over too soon"
    assert not (broken / "adapter").exists()
    assert checkpoints.newest(broken / ".parts" / "adapter") is not None

    here = finetune.run(config, broken, progress=False)
    for name in ("adapter_model.safetensors", "pvsae_metrics.jsonl"):
        assert (here.adapter / name).read_bytes() == (there.adapter / name).read_bytes(), name
    assert (broken / "result.json").read_bytes() == (whole / "result.json").read_bytes()
    assert not (broken / ".parts" / "adapter").exists()
