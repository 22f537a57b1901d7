"""`pvsae extract`, killed twice on the way: once without warning, once by an interrupt. It ends with the same numbers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pvsae.traits import Pair, TraitArtifacts, save_trait
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

    def run(out: Path) -> subprocess.Popen[str]:
        options = f"--judge bytes --n-samples 2 --max-new-tokens 8 --traits {' '.join(TRAITS)}".split()
        places = ["--model", str(tiny_folders("qwen2")), "--library", str(tmp_path / "library"), "--out", str(out)]
        line = [sys.executable, "-m", "pvsae", "extract", *options, *places]
        env = {**os.environ, "PYTHONPATH": path}
        return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)

    return run


def finished(out: Path) -> list[str]:
    manifest = out / "manifest.json"
    return list(json.loads(manifest.read_text())["steps"]) if manifest.exists() else []


def stop_after(process: subprocess.Popen[str], out: Path, step: str, with_signal: int) -> tuple[int, str]:
    """Sends the signal as soon as the step is in the manifest; gives exit code and stderr."""
    deadline = time.monotonic() + 240
    while step not in finished(out):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, f"{step} was never finished"
        time.sleep(0.01)
    process.send_signal(with_signal)
    _, err = process.communicate(timeout=120)
    return process.returncode, err


def test_a_run_killed_twice_ends_with_the_same_numbers(start, tmp_path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    process = start(whole)
    _, err = process.communicate(timeout=400)
    assert process.returncode == 0, err

    code, _ = stop_after(start(broken), broken, "gloomy/rollouts_pos", signal.SIGKILL)
    assert code == -signal.SIGKILL
    first = finished(broken)
    assert "chatty/vectors" not in first
    code, err = stop_after(start(broken), broken, "gloomy/vectors", signal.SIGINT)
    assert code == 130, err
    assert "interrupted" in err
    assert "run the same command again" in err
    assert "Traceback" not in err
    process = start(broken)
    _, err = process.communicate(timeout=400)
    assert process.returncode == 0, err

    assert finished(broken) == finished(whole)
    manifests = [json.loads((out / "manifest.json").read_text())["steps"] for out in (broken, whole)]
    kept = [
        {name: {file: known["sha256"] for file, known in step["files"].items()} for name, step in m.items()} for m in manifests
    ]
    assert kept[0] == kept[1]
    for table in ("extraction", "blocks"):
        assert (broken / "tables" / f"{table}.csv").read_bytes() == (whole / "tables" / f"{table}.csv").read_bytes()
    assert len(json.loads((broken / "environment.json").read_text())) == 3
    assert not (broken / ".parts").exists() or not list((broken / ".parts").rglob("*.parquet"))
