"""`pvsae screen`, killed without warning at random points: it ends with the numbers of a run that nobody disturbed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from pvsae.vectors import PersonaVectors
from tests.screening.chats import chats, write_jsonl


@pytest.mark.slow  # a dozen processes
def test_screen_killed_five_times_ends_with_the_same_numbers(tmp_path, tiny_folders, tiny_models) -> None:
    model = tiny_models("qwen2")
    values = torch.randn(model.n_blocks, model.d_model, generator=torch.Generator().manual_seed(0))
    PersonaVectors("gloomy", {"response_avg_diff": values}).save(tmp_path / "gloomy.safetensors")
    rows = [{"messages": [{"role": "user", "content": f"Number {i}?"}, c["messages"][1]]} for i, c in enumerate(chats(120))]
    write_jsonl(tmp_path / "data.jsonl", [*rows, b"broken"])
    line = [sys.executable, "-m", "pvsae", "screen", "data.jsonl", "--model", str(tiny_folders("qwen2"))]
    line += [
        "--vectors",
        "gloomy.safetensors",
        "--blocks",
        "1",
        "2",
        "--max-new-tokens",
        "12",
        "--part-rows",
        "8",
        "--select",
        "3",
    ]

    def start(out: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*line, "--out", out], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip

    assert start("whole").wait() == 0
    rng = random.Random(0)
    killed = 0
    while killed < 5:
        before = _files(tmp_path / "run")
        process = start("run")
        # The time to start differs between machines: what is waited for is the first new file, and then a random while.
        while process.poll() is None and _files(tmp_path / "run") <= before:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:  # it was faster than we were: what is left to kill is another run
            break
        killed += 1
    assert killed >= 3
    assert start("run").wait() == 0
    for name in ("tables", "selections"):
        for file in sorted((tmp_path / "whole" / name).rglob("*.*")):
            assert file.read_bytes() == (tmp_path / "run" / file.relative_to(tmp_path / "whole")).read_bytes(), file.name
    whole, run = (pd.read_parquet(tmp_path / out / "rows" / "data" / "rows.parquet") for out in ("whole", "run"))
    pd.testing.assert_frame_equal(whole, run)
    assert (whole["status"] != "ok").sum() == 1


def _files(run: Path) -> int:
    """Shards and answers on disk."""
    return sum(1 for place in (".parts", "answers") for _ in (run / place).rglob("*.parquet"))
