"""`pvsae finetune`, killed without warning, also at random moments. Started again, it ends with the same adapter, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pvsae.finetuning import checkpoints
from pvsae.stages import FinetuneConfig, finetune
from tests.saes.corpora import write_chats

ROOT = Path(__file__).resolve().parents[2]


def steps(out: Path) -> int:
    """Steps that the training in a run folder has logged."""
    metrics = out / ".parts" / "adapter" / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


@pytest.fixture
def started(tmp_path, tiny_folders):
    """A function of options of a training and its run folder: the config, and a function that starts it as a process."""
    data, model = write_chats(tmp_path / "chats.jsonl", 24), str(tiny_folders("qwen2"))

    def make(out: Path, **options: int) -> tuple[FinetuneConfig, Callable[[], subprocess.Popen[bytes]]]:
        options = {"batch": 3, "accumulation": 1, "rank": 4, "alpha": 8, "seed": 7, **options}
        config = FinetuneConfig(data=(data,), model=model, device="cpu", learning_rate=1e-3, dropout=0.1, **options)
        line = [sys.executable, "-m", "pvsae", "finetune", data, "--model", model, "--device", "cpu", "--out", str(out)]
        line += [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        line += ["--learning-rate", "1e-3", "--dropout", "0.1"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}

        def start() -> subprocess.Popen[bytes]:
            with out.with_name("stderr.txt").open("w") as stderr:  # a pipe that nobody reads would fill up
                return subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=stderr, env=environment)

        return config, start

    return make


def wait_for(out: Path, n: int, process: subprocess.Popen[bytes]) -> None:
    """Until the process has logged so many steps."""
    deadline = time.monotonic() + 240
    while steps(out) < n:
        assert process.poll() is None, out.with_name("stderr.txt").read_text()
        assert time.monotonic() < deadline, "no step was logged"
        time.sleep(0.002)


def same_run(here: finetune.FinetuneResult, there: finetune.FinetuneResult) -> None:
    for name in ("adapter_model.safetensors", "pvsae_metrics.jsonl"):
        assert (here.adapter / name).read_bytes() == (there.adapter / name).read_bytes(), name
    assert (here.path / "result.json").read_bytes() == (there.path / "result.json").read_bytes()
    assert not (here.path / ".parts" / "adapter").exists()


@pytest.mark.slow  # processes of its own; the quick tests stop the same training inside of one
def test_a_training_killed_on_the_way_ends_with_the_same_bits(tmp_path, started) -> None:
    broken = tmp_path / "broken"
    config, start = started(broken, max_steps=20, save_every=6)
    there = finetune.run(config, tmp_path / "whole", progress=False)
    process = start()
    wait_for(broken, 8, process)  # behind the checkpoint of step 6, and not at one
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL, "it was over too soon"
    assert not (broken / "adapter").exists()
    assert checkpoints.newest(broken / ".parts" / "adapter") is not None
    same_run(finetune.run(config, broken, progress=False), there)


@pytest.mark.slow  # six processes
def test_a_training_killed_five_times_ends_with_the_same_bits(tmp_path, started) -> None:
    broken = tmp_path / "broken"
    config, start = started(broken, max_steps=300, save_every=7)
    there = finetune.run(config, tmp_path / "whole", progress=False)
    rng = random.Random(0)
    went_on = []
    for number in range(5):
        before = steps(broken)
        process = start()
        if number == 2:  # once while it starts; how long that takes differs between machines
            time.sleep(rng.uniform(0, 4))
        else:
            wait_for(broken, before + 1, process)
            time.sleep(rng.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=60) == -signal.SIGKILL, "it was over too soon"
        went_on.append(steps(broken) > before)
    assert sum(went_on) >= 4
    assert not (broken / "adapter").exists()
    assert start().wait() == 0
    same_run(finetune.run(config, broken, progress=False), there)
