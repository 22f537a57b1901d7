"""The benchmark for GPUs runs to its end in Triton's interpreter, so that it will on a GPU as far as one can tell without one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("triton", "sae_lens")


@pytest.mark.slow
@pytest.mark.skipif(any(importlib.util.find_spec(name) is None for name in NEEDED), reason="Triton and SAELens are needed")
def test_the_benchmark_of_kernels_runs_on_a_tiny_shape() -> None:
    results = ROOT / "benchmarks" / "results" / "sae_kernels.json"
    before = results.read_bytes()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.sae_kernels", "--check"],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for other in ("eager", "saelens", "saelens_bf16"):
        assert done.stdout.count(f"  {other} ") >= 2, "live and with dead latents"
    assert results.read_bytes() == before, "times of an interpreter are not recorded"
