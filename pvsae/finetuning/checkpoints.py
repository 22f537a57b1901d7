"""Checkpoints of a finetuning: folders that the Trainer writes file by file, and a mark that says that one is whole.

Knows: names of folders, the mark, which checkpoint is gone on from.
Does not know: what is in a checkpoint.

A process may be killed between any two files. The mark is written last, after everything before it is on the disk, and lists
every file with its size; a folder without it, or with other files than it lists, is never gone on from.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from pvsae.errors import UserError
from pvsae.runs import read_json, write_json

MARK = "complete.json"
_NAME = re.compile(r"^checkpoint-(\d+)$")


def mark_complete(checkpoint: Path) -> None:
    """Marks a checkpoint, all of whose files are written, as whole, and deletes the others beside it."""
    sizes = {}
    for file in _files(checkpoint):
        with file.open("rb+") as handle:
            os.fsync(handle.fileno())
        sizes[file.relative_to(checkpoint).as_posix()] = file.stat().st_size
    write_json(checkpoint / MARK, sizes)
    for other in _all(checkpoint.parent):
        if other != checkpoint:
            _remove(other)


def newest(folder: Path) -> Path | None:
    """The whole checkpoint with the most steps in a folder, or None. Those that are not whole are deleted."""
    for checkpoint in sorted(_all(folder), key=_step, reverse=True):
        if _whole(checkpoint):
            return checkpoint
        _remove(checkpoint)
    return None


def _whole(checkpoint: Path) -> bool:
    try:
        sizes = read_json(checkpoint / MARK)
    except UserError:
        return False
    return sizes == {file.relative_to(checkpoint).as_posix(): file.stat().st_size for file in _files(checkpoint)}


def _files(checkpoint: Path) -> list[Path]:
    return [file for file in sorted(checkpoint.rglob("*")) if file.is_file() and file.name != MARK and file.name[0] != "."]


def _all(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if _NAME.match(path.name)]


def _step(checkpoint: Path) -> int:
    found = _NAME.match(checkpoint.name)
    assert found is not None
    return int(found[1])


def _remove(checkpoint: Path) -> None:
    """Deletes a checkpoint, its mark first: what is half deleted is not whole."""
    (checkpoint / MARK).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)
