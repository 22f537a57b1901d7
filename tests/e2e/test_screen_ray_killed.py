"""`pvsae screen --engine ray`, its own process, its workers and a machine of its cluster killed: the numbers of one process."""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from pvsae.vectors import PersonaVectors
from tests.screening.chats import chats, write_jsonl

pytest.importorskip("ray.data", reason="Ray is not installed (pip install 'pvsae[ray]')")

MARK = "PVSAE_TEST_MARK"
ROWS = 480
STRIKES = ("driver", "driver", "worker", "worker", "machine")


@dataclass(frozen=True)
class Marked:
    """Everything that was started under a mark, which a process hands down to those that it starts."""

    value: str

    def environment(self) -> dict[str, str]:
        """Threads as Ray gives them to a worker of one CPU: the sums of products depend on them."""
        return {
            **os.environ, MARK: self.value, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path),
            "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled",
        }  # fmt: skip

    def processes(self, title: str = "") -> list[int]:
        """Ids of the processes whose command line begins with `title`; not this one, and none that has ended."""
        mark, found = f"{MARK}={self.value}".encode(), []
        for place in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if place.name.isdigit() and int(place.name) != os.getpid() and mark in (place / "environ").read_bytes():
                    line = (place / "cmdline").read_bytes()
                    if line and line.startswith(title.encode()):
                        found.append(int(place.name))
        return found

    def workers(self) -> list[int]:
        return self.processes("ray::MapWorker")

    def end(self) -> None:
        for process in self.processes():
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)


@pytest.fixture
def marked(monkeypatch) -> Iterator[Marked]:
    """What a test starts. Whatever a driver that was killed leaves behind ends with the test."""
    mark = Marked(secrets.token_hex(8))
    for name, value in mark.environment().items():
        monkeypatch.setenv(name, value)
    yield mark
    mark.end()


@pytest.fixture
def cluster(marked) -> Iterator[Any]:
    """Two machines of one CPU each, as far as Ray knows."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": 10**8})
    made.add_node(num_cpus=1, object_store_memory=10**8)
    yield made
    made.shutdown()


@pytest.fixture
def start(tmp_path, tiny_folders, tiny_models, marked) -> Callable[..., subprocess.Popen[bytes]]:
    """A function that starts the command on a run folder in a process of its own."""
    model = tiny_models("qwen2")
    values = torch.randn(model.n_blocks, model.d_model, generator=torch.Generator().manual_seed(0))
    PersonaVectors("gloomy", {"response_avg_diff": values}).save(tmp_path / "gloomy.safetensors")
    rows = [{"messages": [{"role": "user", "content": f"Number {i}?"}, c["messages"][1]]} for i, c in enumerate(chats(ROWS))]
    write_jsonl(tmp_path / "data.jsonl", [*rows[:100], b"broken", *rows[100:]])
    line = [sys.executable, "-m", "pvsae", "screen", "data.jsonl", "--vectors", "gloomy.safetensors", "--blocks", "1", "2"]
    line += ["--model", str(tiny_folders("qwen2")), "--device", "cpu"]
    line += ["--max-new-tokens", "12", "--part-rows", "8", "--select", "3"]

    def run(out: str, *options: str) -> subprocess.Popen[bytes]:
        with (tmp_path / "stderr.txt").open("w") as stderr:
            return subprocess.Popen(
                [*line, "--out", out, *options], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=stderr, env=marked.environment()
            )

    return run


def until(holds: Callable[[], Any], what: str, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def shards(run: Path) -> int:
    return sum(1 for _ in (run / ".parts").rglob("*.parquet"))


def same_run(whole: Path, run: Path) -> None:
    """Every row once, and every table and selection byte for byte."""
    for name in ("tables", "selections"):
        files = {path.relative_to(whole): path.read_bytes() for path in sorted((whole / name).rglob("*.*"))}
        assert files
        assert files == {path.relative_to(run): path.read_bytes() for path in sorted((run / name).rglob("*.*"))}
    here, there = (pd.read_parquet(out / "rows" / "data" / "rows.parquet") for out in (whole, run))
    pd.testing.assert_frame_equal(here, there)
    assert there["row"].tolist() == list(range(ROWS + 1))
    assert there["line"][there["status"] != "ok"].tolist() == [101]


@pytest.mark.slow  # four drivers, and a cluster that loses half of itself
def test_struck_five_times_it_ends_with_the_same_numbers(tmp_path, marked, cluster, start) -> None:
    seed = 0
    rng = random.Random(seed)
    strikes = rng.sample(STRIKES, len(STRIKES))
    said = f"seed {seed}, {strikes}"
    assert start("whole").wait() == 0, (tmp_path / "stderr.txt").read_text()
    run = tmp_path / "run"
    (machine,) = cluster.worker_nodes
    raylet = machine.all_processes["raylet"][0].process.pid
    process = None
    for strike in strikes:
        before = shards(run)
        process = process or start("run", "--engine", "ray", "--workers", "2", "--ray-address", cluster.address)
        # The time to start differs between machines: what is waited for are some new shards, and then a random while.
        enough = before + rng.randint(1, 6)
        until(lambda n=enough, one=process: one.poll() is not None or shards(run) >= n, f"no shards before {strike}: {said}")
        time.sleep(rng.uniform(0, 0.3))
        assert process.poll() is None, f"over before {strike}, {said}: {(tmp_path / 'stderr.txt').read_text()}"
        print(f"{strike} after {shards(run)} shards")
        if strike == "driver":
            assert marked.workers()
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            until(lambda: not marked.workers(), f"workers outlive their driver: {said}", 120)
            process = None
        else:
            os.kill(rng.choice(marked.workers()) if strike == "worker" else raylet, signal.SIGKILL)
    process = process or start("run", "--engine", "ray", "--workers", "2", "--ray-address", cluster.address)
    assert process.wait(timeout=400) == 0, f"{said}: {(tmp_path / 'stderr.txt').read_text()}"
    same_run(tmp_path / "whole", run)


@pytest.mark.slow
def test_killed_with_a_cluster_of_its_own_it_leaves_nothing_behind(tmp_path, marked, start) -> None:
    run = tmp_path / "run"
    options = ("--engine", "ray", "--workers", "2", "--max-rows", "80")
    process = start("run", *options)
    until(lambda: process.poll() is not None or shards(run), "no shard")
    assert marked.workers()
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    # Ray's own processes look for each other for a minute before they give up, after a good end too.
    until(lambda: not marked.processes(), "what the killed driver had started outlives it", 180)
    assert start("run", *options).wait() == 0, (tmp_path / "stderr.txt").read_text()
    until(lambda: not marked.processes(), "what the driver had started outlives it", 180)
    found = pd.read_parquet(run / "rows" / "data" / "rows.parquet")
    assert found["row"].tolist() == list(range(80))
