"""README's examples run as they are written: marked blocks, in order, in an empty folder, Python blocks in one interpreter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"
ROOT = README.parent
_BLOCK = re.compile(r"<!-- test: (?P<kind>bash|python) -->\n```(?P<language>\w+)\n(?P<code>.*?)```", re.DOTALL)


def blocks(kind: str) -> list[str]:
    return [m["code"] for m in _BLOCK.finditer(README.read_text(encoding="utf-8")) if m["kind"] == kind]


def run(command: list[str], folder: Path) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_the_command_line_examples(tmp_path: Path) -> None:
    (script,) = blocks("bash")
    assert script.count("pvsae ") == 9
    out = run(["bash", "-euo", "pipefail", "-c", script], tmp_path)
    page = (tmp_path / "runs" / "report.html").read_text(encoding="utf-8")
    assert out.count("report:") == 8
    titles = (
        "Extraction",
        "Choice of the block",
        "Steering",
        "Monitoring",
        "Training of",
        "Evaluation of a dictionary",
        "Decomposition",
        "Finetuning",
    )
    assert all(title in page for title in titles)


def test_the_python_examples(tmp_path: Path) -> None:
    parts = blocks("python")
    assert len(parts) == 4
    out = run([sys.executable, "-c", "\n".join(parts)], tmp_path)
    assert "'kept'" in out
    assert "unsteered" in out
    assert "indices=tensor" in out
    assert (tmp_path / "runs" / "python" / "report.html").is_file()


@pytest.mark.parametrize("folder", ["analyses", "benchmarks"])
def test_every_analysis_and_benchmark_is_listed_and_nothing_else(folder: str) -> None:
    text = README.read_text(encoding="utf-8")
    listed = set(re.findall(rf"python -m {folder}\.(\w+)", text))
    runnable = {f.stem for f in (ROOT / folder).glob("*.py") if '__name__ == "__main__"' in f.read_text(encoding="utf-8")}
    assert listed == runnable


def test_every_name_that_the_package_offers_exists() -> None:
    import pvsae

    missing = [name for name in pvsae.__all__ if getattr(pvsae, name, None) is None]
    assert missing == []
