"""Run folders: atomic writes, memoised steps, resuming, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest

from pvsae.errors import UserError
from pvsae.runs import RunDir, atomic_path, atomic_write_text, jsonable, read_json


@dataclass(frozen=True)
class Config:
    model: str = "m"
    blocks: tuple[int, ...] = (1, 2)
    out: Path = Path("x")


def load_text(folder: Path) -> str:
    return (folder / "a.txt").read_text()


def save_text(value: str, folder: Path) -> None:
    (folder / "a.txt").write_text(value)


def test_atomic_path_leaves_the_old_file_when_the_writer_fails(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file.json"
    atomic_write_text(target, "old")

    def interrupted() -> None:
        with atomic_path(target) as tmp:
            assert tmp.suffix == ".json"
            tmp.write_text("half of the n")
            raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        interrupted()
    assert target.read_text() == "old"
    assert [p.name for p in target.parent.iterdir()] == ["file.json"]


@pytest.mark.parametrize("where", ["file/below.txt", "file/deeper/below.txt"])
def test_unwritable_places_are_user_errors(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("a regular file, so nothing can be made below it")
    with pytest.raises(UserError, match="cannot write"):
        atomic_write_text(tmp_path / where, "x")
    with pytest.raises(UserError, match="cannot write"):
        RunDir.open(tmp_path / where, "extract", {}, 0)


@pytest.mark.parametrize("where", ["/", ".", "..", "{}"])
def test_a_folder_is_no_file(tmp_path: Path, where: str) -> None:
    with pytest.raises(UserError, match="is a folder"):
        atomic_write_text(where.format(tmp_path), "text")


def test_a_step_is_computed_once_and_survives_reopening(tmp_path: Path) -> None:
    calls = []

    def compute() -> str:
        calls.append(1)
        return "value"

    for _ in range(3):
        with RunDir.open(tmp_path / "run", "extract", Config(), 7) as run:
            assert run.do("evil/pos", compute, save_text, load_text) == "value"
    assert len(calls) == 1
    assert run.finished == ["evil/pos"]
    assert len(read_json(tmp_path / "run" / "environment.json")) == 3


@pytest.mark.parametrize("damage", ["delete", "change", "truncate", "manifest"])
def test_a_damaged_step_is_redone(tmp_path: Path, damage: str) -> None:
    with RunDir.open(tmp_path / "run", "extract", {}, 0) as run:
        run.do("a", lambda: "value", save_text, load_text)
        assert run.is_done("a")
    file = tmp_path / "run" / "a" / "a.txt"
    match damage:
        case "delete":
            file.unlink()
        case "change":
            file.write_text("VALUE")
        case "truncate":
            file.write_text("")
        case "manifest":
            (tmp_path / "run" / "manifest.json").write_text('{"steps": {"a"')
    with RunDir.open(tmp_path / "run", "extract", {}, 0) as run:
        assert not run.is_done("a")
        assert run.do("a", lambda: "made again", save_text, load_text) == "made again"


def test_a_step_that_fails_is_not_finished(tmp_path: Path) -> None:
    with RunDir.open(tmp_path / "run", "extract", {}, 0) as run:

        def fails_half_way(value: str, folder: Path) -> None:
            save_text(value, folder)
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            run.do("a", lambda: "half", fails_half_way, load_text)
        assert not (run.path / "a").exists()
        assert run.do("a", lambda: "whole", save_text, load_text) == "whole"


def test_another_config_is_refused_and_named(tmp_path: Path) -> None:
    with RunDir.open(tmp_path / "run", "steer", {"model": "a", "grid": {"blocks": [1], "n": 2}}, 0) as run:
        run.do_json("a", lambda: 1)
    with pytest.raises(UserError) as caught:
        RunDir.open(tmp_path / "run", "steer", {"model": "a", "grid": {"blocks": [2], "n": 2}}, 1)
    assert "config.grid.blocks" in str(caught.value)
    assert "seed" in str(caught.value)
    assert "config.model" not in str(caught.value)


def test_a_run_that_did_nothing_yet_may_be_put_right(tmp_path: Path) -> None:
    RunDir.open(tmp_path / "run", "steer", {"model": "typo"}, 0).close()
    with RunDir.open(tmp_path / "run", "steer", {"model": "right"}, 0) as run:
        (run.parts("a/b")).mkdir(parents=True)
    assert RunDir.read(tmp_path / "run").config == {"model": "right"}
    with pytest.raises(UserError, match=r"config\.model"):
        RunDir.open(tmp_path / "run", "steer", {"model": "other"}, 0)


def test_parts_of_a_step_live_until_it_is_done(tmp_path: Path) -> None:
    with RunDir.open(tmp_path / "run", "steer", {}, 0) as run:

        def compute() -> str:
            run.parts("a/b").mkdir(parents=True)
            (run.parts("a/b") / "0").write_text("half")
            return "whole"

        run.do("a/b", compute, save_text, load_text)
        assert not run.parts("a/b").exists()


def test_foreign_folders_and_two_writers_are_refused(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"")
    with pytest.raises(UserError, match="not a run folder"):
        RunDir.open(tmp_path / "photos", "steer", {}, 0)
    with (
        RunDir.open(tmp_path / "run", "steer", {}, 0),
        pytest.raises(UserError, match="another process"),
    ):
        RunDir.open(tmp_path / "run", "steer", {}, 0)
    RunDir.open(tmp_path / "run", "steer", {}, 0).close()


def test_reading_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        RunDir.read(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="not the config of a run"):
        RunDir.read(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"), [(b'{"a": 1,}', "line 1 column"), (b"\xff\xfe", "UTF-8"), (b"", "not valid JSON")]
)
def test_broken_json_says_where(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_json(tmp_path / "a.json")


def test_tables_and_results_are_plain_files(tmp_path: Path) -> None:
    frame = pd.DataFrame({"x": [0.1, 1 / 3], "name": ["ä,b", None]})
    with RunDir.open(tmp_path / "run", "steer", {}, 0) as run:
        back = run.do_table("t", lambda: frame)
        pd.testing.assert_frame_equal(back, frame)
        pd.testing.assert_frame_equal(pd.read_csv(run.table("t", frame)), frame)
        assert json.loads(run.result({"r": float("nan"), "n": frame["x"].iloc[0]}).read_text()) == {"r": None, "n": 0.1}
        assert run.figure("f").parent.is_dir()
        assert run.do_json("j", lambda: {"a": (1, 2)}) == {"a": [1, 2]}


def test_jsonable_refuses_what_it_cannot_keep() -> None:
    assert jsonable(Config()) == {"model": "m", "blocks": [1, 2], "out": "x"}
    with pytest.raises(TypeError, match="object"):
        jsonable(object())


def test_what_a_killed_process_left_half_written_is_deleted(tmp_path: Path) -> None:
    code = f"import os; from pvsae.runs import atomic_path\nwith atomic_path({str(tmp_path / 'run' / 'deep' / 'a.pt')!r}) as p: "
    code += "p.write_bytes(b'half'); os.kill(os.getpid(), 9)"
    RunDir.open(tmp_path / "run", "x", {}).close()
    killed = subprocess.run([sys.executable, "-c", code])
    assert killed.returncode == -9
    (left,) = (tmp_path / "run" / "deep").iterdir()
    mine = tmp_path / "run" / f".b.{os.getpid()}.tmp.pt"  # of a process that is alive, as are other files
    others = [mine, tmp_path / "run" / ".c.tmp.pt", tmp_path / "run" / "d.1.tmp.pt"]
    for file in others:
        file.touch()
    RunDir.open(tmp_path / "run", "x", {}).close()
    assert not left.exists()
    assert all(file.exists() for file in others)


def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """SIGKILL in the third of five steps; the second session computes only the last three."""
    script = tmp_path / "job.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, signal, sys
            from pathlib import Path
            from pvsae.runs import RunDir
            run = RunDir.open(sys.argv[1], "job", {}, 0)
            for i in range(5):
                def compute():
                    print("computed", i, flush=True)
                    if i == 2 and sys.argv[2] == "die":
                        os.kill(os.getpid(), signal.SIGKILL)
                    return str(i)
                run.do(f"s/{i}", compute, lambda v, d: (d / "v").write_text(v), lambda d: (d / "v").read_text())
            """
        )
    )

    def start(mode: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, str(script), str(tmp_path / "run"), mode], capture_output=True, text=True)

    assert start("die").returncode == -signal.SIGKILL
    second = start("live")
    assert second.returncode == 0, second.stderr
    assert second.stdout.split() == ["computed", "2", "computed", "3", "computed", "4"]
    assert RunDir.read(tmp_path / "run").finished == [f"s/{i}" for i in range(5)]
    assert list((tmp_path / "run").rglob("*.partial")) == []


def test_runs_is_a_light_module() -> None:
    code = "import sys, pvsae.runs; print([m for m in ('torch', 'pandas', 'numpy', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ}, check=True)
    assert done.stdout.strip() == "[]"
