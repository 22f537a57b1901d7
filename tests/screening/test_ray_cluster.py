"""The Ray engine on a cluster of two workers on this machine, one of which is killed: the numbers of one process."""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from pvsae.errors import UserError
from pvsae.screening import ray_cluster
from pvsae.stages import ScreenConfig, screen
from pvsae.stages.screened_rows import read_rows
from pvsae.vectors import PersonaVectors

from .chats import chats, write_jsonl

pytest.importorskip("ray.data", reason="Ray is not installed (pip install 'pvsae[ray]')")


@pytest.fixture(scope="module")
def cluster():
    """Two CPUs, so two workers at once. Ended with the module."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_AUTH_MODE"] = "disabled"  # else Ray leaves a token in the home folder
    import ray

    ray_cluster._start(ray, num_cpus=2, log_to_driver=False, logging_level="warning", object_store_memory=10**8)
    yield ray
    ray.shutdown()


@pytest.fixture
def config(tmp_path, tiny_folders, tiny_models):
    folder, model = tiny_folders("qwen2"), tiny_models("qwen2")
    values = torch.randn(model.n_blocks, model.d_model, generator=torch.Generator().manual_seed(0))
    vector = PersonaVectors("gloomy", {"response_avg_diff": values}).save(tmp_path / "gloomy.safetensors")
    data = write_jsonl(tmp_path / "data.jsonl", [*chats(17), b"broken"])

    def make(**options) -> ScreenConfig:
        return ScreenConfig(
            model=str(folder), data=(str(data),), vectors=(str(vector),), blocks=(1, 2), max_new_tokens=6, part_rows=3, **options
        )

    return make


def same(a: Path, b: Path) -> None:
    pd.testing.assert_frame_equal(read_rows(a), read_rows(b), rtol=1e-5, atol=1e-5)


@pytest.mark.slow  # a cluster and its workers take half a minute to start
def test_a_killed_worker_changes_nothing(cluster, config, tmp_path, monkeypatch) -> None:
    here = screen.run(config(), tmp_path / "here")
    notes, killed = [], []
    real = screen._engine
    monkeypatch.setattr(screen, "_engine", lambda *a: (notes.append(one[2]) or one for one in real(*a)))

    def kill_the_first() -> None:
        while not killed:
            for file in (tmp_path / "ray" / ".parts").rglob("*.json"):
                process = json.loads(file.read_text())["process"]
                if b"ray::" in Path(f"/proc/{process}/cmdline").read_bytes() and not killed:
                    os.kill(process, signal.SIGKILL)
                    killed.append(process)
            time.sleep(0.01)

    watcher = threading.Thread(target=kill_the_first, daemon=True)
    watcher.start()
    there = screen.run(config(engine="ray", workers=2), tmp_path / "ray")
    watcher.join(timeout=1)
    assert killed
    assert len(notes) == 6
    workers = {note["process"] for note in notes}
    assert os.getpid() not in workers
    assert workers - set(killed)  # somebody went on
    same(here.rows["data"], there.rows["data"])
    pd.testing.assert_frame_equal(here.table, there.table, rtol=1e-5, atol=1e-5)
    assert there.counts["malformed"].tolist() == [1]


@pytest.mark.slow
def test_a_run_goes_on_with_another_engine(cluster, config, tmp_path, monkeypatch) -> None:
    whole = screen.run(config(), tmp_path / "whole")
    real = screen._engine

    def cut(*args):
        for n, one in enumerate(real(*args)):
            if n == 2:
                raise KeyboardInterrupt
            yield one

    monkeypatch.setattr(screen, "_engine", cut)
    with pytest.raises(KeyboardInterrupt):
        screen.run(config(), tmp_path / "run")
    monkeypatch.setattr(screen, "_engine", real)
    result = screen.run(config(engine="ray"), tmp_path / "run")
    same(whole.rows["data"], result.rows["data"])
    spent = json.loads((tmp_path / "run" / "result.json").read_text())["spent in this start"]
    assert spent["shards_found"] == 3


def test_what_an_actor_does_is_what_one_process_does(config, tmp_path, monkeypatch) -> None:
    """The actor by itself, without a cluster: from the job as Ray carries it (pickled, paths made absolute)."""
    monkeypatch.chdir(tmp_path)
    jobs = []
    real = screen._engine

    def keeping(config, job, model, todo):
        jobs.append(job)
        return real(config, job, model, todo)

    monkeypatch.setattr(screen, "_engine", keeping)
    here = screen.run(config(), "here")
    job = pickle.loads(pickle.dumps(ray_cluster.everywhere(jobs[0])))
    assert job.shards.is_absolute()
    assert Path(job.data[0].parts[0].file).is_absolute()
    monkeypatch.chdir("/")
    actor = ray_cluster.Actor(replace(job, shards=tmp_path / "there", answers=tmp_path / "new"))
    (data,) = job.data
    found = actor({"data": [0] * len(data.parts), "part": [part.number for part in data.parts]})
    assert [json.loads(note)["rows"] for note in found["note"]] == [3] * 6
    shards = [actor.job.shard(data, part) for part in data.parts]
    pd.testing.assert_frame_equal(
        pd.concat([pd.read_parquet(s) for s in shards], ignore_index=True),
        read_rows(tmp_path / here.rows["data"]),
        check_dtype=False,
    )
    # what one engine made, the other takes for its own
    assert {actor.job.state(data, part) for part in data.parts} == {"done"}
    assert jobs[0].about(jobs[0].data[0], jobs[0].data[0].parts[1]) == job.about(data, data.parts[1])


@pytest.fixture
def job(config, tmp_path, monkeypatch):
    """The job of a run, of which nothing is done yet."""
    jobs = []

    def stopping(config, job, *_):
        jobs.append(job)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(screen, "_engine", stopping)
        with pytest.raises(KeyboardInterrupt):
            screen.run(config(), tmp_path / "run")
    return jobs[0]


def test_what_an_actor_has_to_say_to_the_user_is_in_place_of_a_note(job, tmp_path) -> None:
    batch = {"data": [0, 0], "part": [0, 1]}
    for note in ray_cluster.Actor(replace(job, fingerprint="0"))(batch)["note"]:  # found as it starts
        what, expected, _ = json.loads(note)["refusal"]
        assert "another model" in what
        assert "the same weights" in expected
    actor = ray_cluster.Actor(job)
    (tmp_path / "data.jsonl").unlink()
    assert ["cannot be read" in json.loads(note)["refusal"][0] for note in actor(batch)["note"]] == [True, True]


@pytest.mark.slow
def test_what_a_worker_has_to_say_to_the_user_arrives(cluster, job) -> None:
    (data,) = job.data
    todo = [(data, part) for part in data.parts]
    with pytest.raises(UserError, match="another model") as refused:
        list(ray_cluster.screen_on_ray(replace(job, fingerprint="0"), todo, workers=2))
    assert refused.value.expected.startswith("the same weights")


@pytest.mark.slow
def test_a_busy_cluster_is_waited_for_and_then_used_as_far_as_it_is_free(cluster, job, caplog) -> None:
    class Somebody:
        def here(self) -> bool:
            return True

    others = [cluster.remote(num_cpus=1)(Somebody).remote() for _ in range(2)]
    assert cluster.get([other.here.remote() for other in others]) == [True, True]

    def leave_when_waited_for() -> None:
        while "waiting for room" not in caplog.text:
            time.sleep(0.01)
        time.sleep(1)
        cluster.kill(others[0])

    threading.Thread(target=leave_when_waited_for, daemon=True).start()
    (data,) = job.data
    made = list(ray_cluster.screen_on_ray(job, [(data, part) for part in data.parts], workers=2))
    assert "waiting for room for a worker (a worker takes 1 CPU; free: 0 CPU)" in caplog.text
    assert sorted(part.number for _, part, _ in made) == [0, 1, 2, 3, 4, 5]
    assert len({note["process"] for _, _, note in made}) == 1  # the other's CPU was never free
    assert cluster.get(others[1].here.remote())
    cluster.kill(others[1])


@pytest.mark.slow  # for the cluster; what is tested is over at once
def test_what_a_cluster_can_never_hold_is_not_waited_for(cluster, job) -> None:
    (data,) = job.data
    with pytest.raises(UserError, match="it has 2 CPU and 0 GPU on 1 machine"):
        list(ray_cluster.screen_on_ray(job, [(data, part) for part in data.parts], workers=2, gpus=1))


def test_an_address_where_nobody_listens_is_said_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # ours, and not listened to
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        started = time.monotonic()
        for one in (address, f"ray://{address}"):
            with pytest.raises(UserError, match=f"no Ray cluster at {one}: .*refused"):
                ray_cluster._connect(ray_cluster._ray(), one, 2)
        assert time.monotonic() - started < 60  # Ray by itself: a quarter of an hour
    with pytest.raises(UserError, match="no Ray cluster at nonsense"):
        ray_cluster._connect(ray_cluster._ray(), "nonsense", 2)


def test_without_ray_the_stage_says_so_before_anything(config, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as Python sees a package that is not there
    with pytest.raises(UserError, match="Ray is not installed") as missing:
        screen.run(config(engine="ray"), tmp_path / "run")
    assert missing.value.fix == "pip install 'pvsae[ray]'"
    assert not (tmp_path / "run").exists()


def test_ray_is_not_imported_unless_asked_for_and_reports_nothing() -> None:
    code = (
        "import os, sys, pvsae.stages.screen, pvsae.screening.ray_cluster as r; assert 'ray' not in sys.modules; "
        "r._ray(); assert 'ray' in sys.modules; "
        "from ray._common.usage.usage_lib import usage_stats_enabled; print(usage_stats_enabled())"
    )
    environment = {k: v for k, v in os.environ.items() if k != "RAY_USAGE_STATS_ENABLED"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
