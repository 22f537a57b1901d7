"""The other trainers: where one is not there, a benchmark says so, and no code is taken from a folder that anybody may fill."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import peers
from benchmarks.peers import PEERS, Recipe
from pvsae.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SMALL, FIRST = Recipe(8, 16, 2, 4), torch.zeros(4, 8)


@pytest.mark.parametrize("peer", ["saelens", "saelens_bf16"])
def test_without_saelens_the_error_says_what_to_install(monkeypatch, peer: str) -> None:
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(UserError, match=r"pip install 'pvsae\[sae\]'"):
        PEERS[peer](SMALL, FIRST)


def test_where_dictionary_learning_cannot_be_installed_nothing_is_left(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PVSAE_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    assert peers.place() == tmp_path / "peers" / "dictionary-learning-0.1.0"
    with pytest.raises(UserError, match="could not be installed"):
        PEERS["dictionary_learning"](SMALL, FIRST)
    assert not [file for file in tmp_path.rglob("*") if file.name != "peers"]


def test_a_missing_peer_ends_a_benchmark_without_a_traceback(tmp_path) -> None:
    (tmp_path / "sae_lens.py").write_text("raise ImportError('no such thing here')")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.sae_training", "--memory-of", "saelens", "8", "16", "2", "4"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("SAELens cannot be imported: no such thing here")
