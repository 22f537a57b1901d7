"""Run folders: atomic files, steps that are done once, and a record of what was run on what.

Knows: paths, hashes, JSON, the manifest of finished steps, the environment a run was made in.
Does not know: tensors, models or traits. What a step computes, writes and reads back is the caller's business.

A run folder::

    config.json        command, config and seed; a folder is resumed only under the same three
    environment.json   one entry a session: python, package versions, machine, git commit, argv
    manifest.json      finished steps: their files with sha256 and size, and how long they took
    <step name>/       what the step wrote (a step's name may hold slashes: "evil/rollouts_pos")
    tables/NAME.csv    figures/NAME.png    result.json
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import errno
import hashlib
import importlib.metadata
import io
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from pvsae.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: no advisory locks, so two writers are not told apart there
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")

PACKAGES = ("pvsae", "torch", "transformers", "transformer-lens", "peft", "tokenizers", "numpy", "pandas", "openai")
_CUT_SHORT = re.compile(r"^\..+\.(\d+)\.tmp(\.[^.]+)?$")  # names that `atomic_path` makes
_UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT, errno.EEXIST, errno.EISDIR, errno.ENOSPC}


# ---------------------------------------------------------------------------------------------------------------- files
@contextlib.contextmanager
def _writable(path: Path) -> Iterator[None]:
    """Turn the errors of a folder that cannot be written into one UserError; let every other error through."""
    try:
        yield
    except OSError as error:
        about_us = error.filename is None or Path(error.filename).parent in (path.parent, *path.parents)
        if error.errno not in _UNWRITABLE or not about_us:
            raise
        raise UserError(
            f"cannot write {path}: {error.strerror}",
            expected="a folder that can be made and written, with space left",
            fix="choose another output folder with --out, or change its permissions",
        ) from error


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success it takes the place of `path`, on failure nothing remains.

    A reader sees the old file or the whole new one. The data is synced before the rename. The temporary name keeps
    the suffix of `path`, because many writers choose a format by it.

    Raises:
        UserError: the folder cannot be made or written, or `path` is a folder.
    """
    path = Path(path)
    with _writable(path):
        if path.is_dir():  # "..", "." and "/" among them, which have no name that a file could take
            raise UserError(f"{path} is a folder", "the name of a file", f"{path / 'NAME'}")
    tmp = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        with _writable(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            tmp.touch()
        with _writable(path):
            yield tmp
        with _writable(path):
            with tmp.open("rb+") as handle:
                os.fsync(handle.fileno())
            os.replace(tmp, path)
            _sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            tmp.unlink(missing_ok=True)


def _remove_cut_short(folder: Path) -> None:
    """Deletes what killed processes left of files that `atomic_path` was writing: a checkpoint may be as large as the disk."""
    for file in folder.rglob(".*.tmp*"):
        found = _CUT_SHORT.match(file.name)
        if found and not _alive(int(found[1])):
            with contextlib.suppress(OSError):
                file.unlink()


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` so that `path` is never seen half-written. Raises UserError when it cannot be written."""
    with atomic_path(path) as tmp:
        tmp.write_bytes(data)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 `text` so that `path` is never seen half-written. Raises UserError when it cannot be written."""
    atomic_write_bytes(path, text.encode("utf-8"))


def _sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable where the system can (Windows cannot open folders)."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with Path(path).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def read_json(path: str | Path, what: str = "JSON file") -> Any:
    """Parse a JSON file.

    Raises:
        UserError: the file is missing, is not UTF-8 or is not JSON (with the line and column of the fault).
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{what} not found: {path}", expected="an existing file", fix="check the path") from None
    except IsADirectoryError:
        raise UserError(f"{what} is a folder: {path}", expected="a file", fix="name the file inside it") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{what} is not UTF-8 text: {path} ({error.reason})", expected="UTF-8 JSON") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{what} is not valid JSON: {path}, line {error.lineno} column {error.colno}: {error.msg}",
            expected="one JSON document",
            fix="look at that line; a trailing comma or a missing quote is usual",
        ) from None


def jsonable(value: Any) -> Any:
    """Reduce a value to strict JSON: dataclasses and mappings to objects, sequences to lists, paths to text, NaN to null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: jsonable(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(jsonable(item) for item in value)
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # a numpy scalar or array, without importing numpy
        return jsonable(value.tolist())
    raise TypeError(f"{type(value).__name__} has no JSON form here; convert it first")


def write_json(path: str | Path, value: Any) -> None:
    """Write any `jsonable` value, indented, atomically."""
    atomic_write_text(path, json.dumps(jsonable(value), indent=2, ensure_ascii=False) + "\n")


# ---------------------------------------------------------------------------------------------------------- provenance
def git_commit(folder: Path | None = None) -> str | None:
    """The commit that `folder` (this package's source by default) stands at, with "+changes" if the tree differs from it."""
    folder = folder or Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        status = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if status else "")


def environment() -> dict[str, Any]:
    """What numbers may depend on besides the config: versions, machine, commit, command line. Imports none of them."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "started": now(),
        "argv": list(sys.argv),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "commit": git_commit(),
        "versions": versions,
    }


def now() -> str:
    """The time in UTC, ISO 8601, whole seconds."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")


def differing_keys(old: Any, new: Any, prefix: str = "") -> list[str]:
    """The dotted keys whose values differ between two JSON-like trees."""
    if isinstance(old, dict) and isinstance(new, dict):
        found: list[str] = []
        for key in sorted(old.keys() | new.keys()):
            here = f"{prefix}.{key}" if prefix else key
            if key not in old or key not in new:
                found.append(here)
            else:
                found += differing_keys(old[key], new[key], here)
        return found
    return [] if old == new else [prefix]


# ----------------------------------------------------------------------------------------------------------- run folder
@dataclass(frozen=True)
class Step:
    """One step inside `RunDir.step`: `done` says whether its files are there already, `folder` is where they (go) stand."""

    name: str
    done: bool
    folder: Path


class RunDir:
    """A run folder that can be killed at any point and opened again. Make one with `open`; read a finished one with `read`."""

    def __init__(self, path: Path, command: str, config: dict[str, Any], seed: int, *, lock: IO[str] | None) -> None:
        self.path, self.command, self.config, self.seed = path, command, config, seed
        self._lock = lock  # held while this object lives; the system frees it even after SIGKILL
        self._steps: dict[str, dict[str, Any]] = self._read_manifest()

    # ------------------------------------------------------------------------------------------------ open and close
    @classmethod
    def open(cls, path: str | Path, command: str, config: Mapping[str, Any] | Any, seed: int = 0) -> RunDir:
        """Create the run folder, or resume the one that is there.

        Args:
            path: the folder.
            command: the stage's name.
            config: a dataclass or mapping that `jsonable` accepts; everything that the results depend on.
            seed: the seed all random numbers of the run come from.

        Raises:
            UserError: the folder cannot be written, holds another run (the differing keys are named), holds foreign
                files, or is in use by a process that is still alive.
        """
        path = Path(path)
        wanted = {"command": command, "config": jsonable(config), "seed": seed}
        with _writable(path):
            path.mkdir(parents=True, exist_ok=True)
            lock = (path / ".lock").open("a+")
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                lock.close()
                raise UserError(
                    f"{path} is being written by another process",
                    expected="one process a run folder",
                    fix="wait until it has finished, or choose another --out",
                ) from None
        try:
            cls._check_same_run(path, wanted)
            if fcntl is not None:  # nobody else goes on with this run
                _remove_cut_short(path)
            write_json(path / "config.json", wanted)
            run = cls(path, command, wanted["config"], seed, lock=lock)
            sessions = read_json(path / "environment.json") if (path / "environment.json").exists() else []
            write_json(path / "environment.json", [*sessions, environment()])
        except BaseException:
            lock.close()
            raise
        return run

    @classmethod
    def read(cls, path: str | Path) -> RunDir:
        """Open an existing run folder for reading only. Raises UserError where `path` is not a run folder."""
        path = Path(path)
        if not (path / "config.json").is_file():
            raise UserError(
                f"not a run folder: {path}",
                expected="a folder that a pvsae command wrote (it holds config.json and manifest.json)",
                fix="give the folder named after --out when the run was made",
            )
        stored = read_json(path / "config.json", "the run's config")
        try:
            return cls(path, stored["command"], stored["config"], stored["seed"], lock=None)
        except (KeyError, TypeError):
            raise UserError(f"{path / 'config.json'} is not the config of a run", expected="command, config, seed") from None

    @staticmethod
    def _check_same_run(path: Path, wanted: dict[str, Any]) -> None:
        file = path / "config.json"
        if file.exists():
            keys = differing_keys(read_json(file, "the run's config"), wanted)
            started = (path / "manifest.json").exists() or (path / ".parts").exists()
            if keys and started:  # a run that stopped at a typing mistake has nothing to lose and may be put right
                raise UserError(
                    f"{path} holds a run with another configuration; it differs in: {', '.join(keys)}",
                    expected="the same command, config and seed, so that the run can go on",
                    fix="choose another --out, or delete that folder",
                )
        elif any(not item.name.startswith(".") for item in path.iterdir()):  # dot files: our lock, or a write cut short
            raise UserError(
                f"{path} is not empty and is not a run folder",
                expected="a new or empty folder, or an earlier run to resume",
                fix="choose another --out",
            )

    def close(self) -> None:
        """Give the folder free for other processes."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --------------------------------------------------------------------------------------------------------- steps
    @property
    def finished(self) -> list[str]:
        """Names of the finished steps, in the order in which they were finished."""
        return list(self._steps)

    def _read_manifest(self) -> dict[str, dict[str, Any]]:
        file = self.path / "manifest.json"
        try:
            return dict(json.loads(file.read_text(encoding="utf-8"))["steps"])
        except (OSError, ValueError, KeyError, TypeError):
            return {}  # none yet, or damaged: then every step is redone, which is slow but right

    def _intact(self, name: str) -> bool:
        entry = self._steps.get(name)
        if entry is None:
            return False
        folder = self.path / name
        for file, known in entry["files"].items():
            path = folder / file
            if not path.is_file() or path.stat().st_size != known["bytes"] or sha256_of(path) != known["sha256"]:
                return False
        return True

    def is_done(self, name: str) -> bool:
        """Whether a step is finished and its files are there as it wrote them; for steps that share their work with others."""
        return self._intact(name)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[Step]:
        """A step that is done once::

            with run.step("evil/vectors") as step:
                if not step.done:
                    write_something(step.folder / "vectors.safetensors")

        While the body runs, `folder` is a scratch folder; it becomes `<run>/<name>/` when the body ends without an error,
        and only then is the step in the manifest. A finished step whose files are missing or damaged is not `done`.
        """
        folder = self.path / name
        if self._intact(name):
            shutil.rmtree(self.parts(name), ignore_errors=True)
            yield Step(name, True, folder)
            return
        started = time.monotonic()
        scratch = folder.with_name(f".{folder.name}.partial")
        with _writable(folder):
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
        yield Step(name, False, scratch)
        with _writable(folder):
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(scratch, folder)
        files = {
            file.relative_to(folder).as_posix(): {"sha256": sha256_of(file), "bytes": file.stat().st_size}
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }
        self._steps.pop(name, None)
        self._steps[name] = {"files": files, "seconds": round(time.monotonic() - started, 3), "finished": now()}
        write_json(self.path / "manifest.json", {"version": 1, "command": self.command, "steps": self._steps})
        shutil.rmtree(self.parts(name), ignore_errors=True)

    def parts(self, name: str) -> Path:
        """A folder for the finished parts of a long step, kept until the step is done (it is not made here)."""
        return self.path / ".parts" / name

    def do(self, name: str, fn: Callable[[], T], save: Callable[[T, Path], Any], load: Callable[[Path], T]) -> T:
        """The value of step `name`: loaded if the step is finished, else computed by `fn` and saved.

        `save(value, folder)` writes files into a folder that exists; `load(folder)` reads them back. The value that is
        returned always went through `load`, so that a resumed run and an uninterrupted one go on with the same thing.
        """
        with self.step(name) as step:
            if not step.done:
                save(fn(), step.folder)
        return load(self.path / name)

    def do_json(self, name: str, fn: Callable[[], Any]) -> Any:
        """`do` for values that are JSON."""
        return self.do(name, fn, lambda value, folder: write_json(folder / "value.json", value), _load_value)

    def do_table(self, name: str, fn: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """`do` for a pandas DataFrame, stored as Parquet so that types and missing values survive."""
        import pandas as pd

        return self.do(
            name,
            fn,
            lambda frame, folder: frame.to_parquet(folder / "table.parquet", index=False),
            lambda folder: pd.read_parquet(folder / "table.parquet"),
        )

    # ------------------------------------------------------------------------------------------------------- outputs
    def table(self, name: str, frame: pd.DataFrame) -> Path:
        """Write a tidy table to tables/NAME.csv (full float precision) and give its path."""
        path = self.path / "tables" / f"{name}.csv"
        buffer = io.StringIO()
        frame.to_csv(buffer, index=False)
        atomic_write_text(path, buffer.getvalue())
        return path

    def figure(self, name: str, suffix: str = ".png") -> Path:
        """The path figures/NAME.png; its folder is made."""
        path = self.path / "figures" / f"{name}{suffix}"
        with _writable(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def result(self, summary: Mapping[str, Any]) -> Path:
        """Write the run's summary to result.json and give its path."""
        path = self.path / "result.json"
        write_json(path, summary)
        return path


def _load_value(folder: Path) -> Any:
    return read_json(folder / "value.json")
