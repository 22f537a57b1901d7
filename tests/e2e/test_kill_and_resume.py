"""`pvsae extract`, killed twice on the way: once without warning, once by an interrupt. It ends with the same numbers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from pvsae.traits import Pair, TraitArtifacts, save_trait
from pvsae.vectors import PersonaVectors, Rollouts
from tests.plugin import make_plugin

TRAITS = ("gloomy", "chatty")


@pytest.fixture
def start(tmp_path, tiny_folders):
    """A function that starts the command on a run folder in a process of its own."""
    for name in TRAITS:
        save_trait(
            TraitArtifacts(
                name,
                f"It is {name}.",
                tuple(Pair(f"Be {name}, way {i}.", f"Be anything else, way {i}.") for i in range(5)),
                tuple(f"What about thing {i}?" for i in range(20)),
                tuple(f"What about thing {i}?" for i in range(20, 40)),
                f"How {name}? {{question}} {{answer}} 0-100 or REFUSAL.",
            ),
            tmp_path / "library",
        )
    path = os.pathsep.join([*make_plugin(tmp_path / "plugin"), os.environ.get("PYTHONPATH", "")])

    def run(out: Path) -> subprocess.Popen[bytes]:
        options = f"--judge bytes --n-samples 2 --max-new-tokens 8 --traits {' '.join(TRAITS)}".split()
        places = ["--model", str(tiny_folders("qwen2")), "--library", str(tmp_path / "library"), "--out", str(out)]
        line = [sys.executable, "-m", "pvsae", "extract", *options, *places]
        # Into files: a pipe that nobody reads fills up with progress bars, and the process would wait for ever.
        log = (tmp_path / "stderr.txt").open("w")
        # A shell that runs the tests in the background has them ignore SIGINT, which a child would inherit.
        hear = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        environment = {**os.environ, "PYTHONPATH": path}
        return subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=log, env=environment, preexec_fn=hear)

    return run


def finished(out: Path) -> list[str]:
    manifest = out / "manifest.json"
    return list(json.loads(manifest.read_text())["steps"]) if manifest.exists() else []


def stop_after(process: subprocess.Popen[bytes], out: Path, step: str, with_signal: int) -> int:
    """Sends the signal as soon as the step is in the manifest; gives the exit code."""
    deadline = time.monotonic() + 240
    while step not in finished(out):
        assert process.poll() is None, (out.parent / "stderr.txt").read_text()
        assert time.monotonic() < deadline, f"{step} was never finished"
        time.sleep(0.01)
    process.send_signal(with_signal)
    return process.wait(timeout=120)


def test_a_run_killed_twice_ends_with_the_same_numbers(start, tmp_path) -> None:
    whole, broken, log = tmp_path / "whole", tmp_path / "broken", tmp_path / "stderr.txt"
    assert start(whole).wait(timeout=400) == 0, log.read_text()

    assert stop_after(start(broken), broken, "gloomy/rollouts_pos", signal.SIGKILL) == -signal.SIGKILL
    assert "chatty/vectors" not in finished(broken)
    assert stop_after(start(broken), broken, "gloomy/vectors", signal.SIGINT) == 130, log.read_text()
    said = log.read_text()
    assert "interrupted" in said
    assert "run the same command again" in said
    assert "Traceback" not in said
    assert start(broken).wait(timeout=400) == 0, log.read_text()

    assert finished(broken) == finished(whole)
    for trait in TRAITS:
        ours, theirs = (PersonaVectors.load(out / trait / "vectors" / "vectors.safetensors") for out in (broken, whole))
        assert all(torch.equal(ours.of(statistic), theirs.of(statistic)) for statistic in theirs.statistics)
        assert ours.meta == theirs.meta
        for polarity in ("pos", "neg"):
            ours, theirs = (Rollouts.load(out / trait / f"rollouts_{polarity}" / "rollouts.parquet") for out in (broken, whole))
            assert ours.table.equals(theirs.table)
    for table in ("extraction", "blocks"):
        assert (broken / "tables" / f"{table}.csv").read_bytes() == (whole / "tables" / f"{table}.csv").read_bytes()
    assert len(json.loads((broken / "environment.json").read_text())) == 3
    assert not (broken / ".parts").exists() or not list((broken / ".parts").rglob("*.parquet"))
