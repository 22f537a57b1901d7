"""Two processes train what one process with the joint batch trains."""

from __future__ import annotations

import json
import os
import socket
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


def _train(rank: int, folder: str, port: int) -> None:
    """A process of two, in the environment that torchrun makes."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    group = join()
    assert (group.rank, group.size) == (rank, 2)
    trained = train(Made(), config(), folder, group=group, progress=False)
    torch.save(trained[0].sae.W_dec, Path(folder) / f"{rank}.pt")
    leave()


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


def test_two_processes_have_the_loss_curve_of_one_with_the_joint_batch(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_train, (str(tmp_path / "two"), port), nprocs=2)
    train(Made(), config(), tmp_path / "one", progress=False)
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert len(one) == 2 * 12
    torch.testing.assert_close(two[:, :3], one[:, :3], rtol=1e-4, atol=0)
    first, second = (torch.load(tmp_path / "two" / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(first, second), "every process ends with the same dictionary"


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
  calibration_tokens: 500
"""
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PVSAE_CACHE": str(tmp_path / "cache")}
    said = []
    for name, start in {"one": [], "two": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]}.items():
        line = [sys.executable, *start, "-m", "pvsae", "sae", "train", str(tmp_path / "c.yaml"), "--out", str(tmp_path / name)]
        done = subprocess.run(line, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        said.append(done.stdout)
    assert [text.count("report:") for text in said] == [1, 1], "one process speaks"
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert len(one) == 10
    torch.testing.assert_close(two[:, :3], one[:, :3], rtol=1e-4, atol=0)
    a, b = (load(tmp_path / name / "block-2_width-96_k-4") for name in ("one", "two"))
    assert float((a.W_dec * b.W_dec).sum(1).mean()) > 0.999
