"""Checkpoints of a training in progress: one file, and one a shard of the latents where processes share them.

Knows: the files' names, the order in which they are written, which of them belong together, and the version of what is in them.
Does not know: what is in them.

    checkpoint.pt                   everything that the next step depends on, but for what shards hold
    checkpoint.STEP.1of2.pt ...     the learners of a shard of the latents, where there are several

A process that is killed leaves a checkpoint.pt whose shards are all there: shards have the step in their names, they are written
first, and the ones before them go last. Nothing is ever unpickled (weights_only).
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch

from pvsae.errors import UserError
from pvsae.runs import atomic_path
from pvsae.saes.grid import Grid

FILE = "checkpoint.pt"
VERSION = 1  # of the layout of all that is in them: raise it where the state of a stream, a buffer or a learner gets another form
_SHARD = re.compile(r"^checkpoint\.(\d+)\.(\d+)of(\d+)\.pt$")


def save(folder: Path, step: int, state: dict[str, Any], learners: list[dict[str, Any]], grid: Grid) -> None:
    """Writes the checkpoint of a step. Every process calls this; those that hold what nobody else does write.

    Args:
        state: what all processes share. learners: what this process' latents have.
    """
    if grid.width.size == 1:
        if grid.everyone.rank == 0:
            _write(folder / FILE, {**state, "learners": learners})
            _remove_shards(folder)  # what a run that was killed in its first checkpoint, or while it was removed, left there
        return
    if grid.data.rank:
        return
    _write(_shard(folder, step, grid.width.rank, grid.width.size), {"learners": learners})
    grid.width.wait()
    if grid.width.rank == 0:
        _write(folder / FILE, {**state, "step": step})
    grid.width.wait()
    _remove_shards(folder, but=step)  # each file goes once, and a folder that not all processes see is clean too


def load(folder: Path, grid: Grid) -> dict[str, Any] | None:
    """The state in a folder, with the learners of this process' latents as "learners"; None if there is none.

    Raises:
        UserError: it was written by processes that shared the latents in another way, or by another version; a shard is missing,
            or a file is damaged.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    check(folder, grid.width.size)
    state = _read(file)
    if grid.width.size == 1:
        return state
    shard = _shard(folder, state["step"], grid.width.rank, grid.width.size)
    if not shard.is_file():
        raise UserError(f"{file} needs {shard.name}, which is missing", "all files of a checkpoint", "copy it too, or start anew")
    return {**state, **_read(shard)}


def check(folder: Path, shards: int) -> None:
    """Raises UserError if the checkpoint in a folder has the latents in other shards. Only the names of files are read."""
    if not (folder / FILE).is_file():
        return
    found = {int(name[3]) for file in folder.glob("checkpoint.*.pt") if (name := _SHARD.match(file.name))} or {1}
    if shards not in found:
        there = min(found)
        raise UserError(
            f"{folder / FILE} has the latents in {_parts(there)}, and this training has them in {_parts(shards)}",
            f"training.width_shards={there}, as when it began",
            "go on with as many, choose another --out, or delete that folder",
        )


def remove(folder: Path) -> None:
    """Deletes what is there of a checkpoint."""
    (folder / FILE).unlink(missing_ok=True)
    _remove_shards(folder)


def _remove_shards(folder: Path, but: int | None = None) -> None:
    for file in folder.glob("checkpoint.*.pt"):
        found = _SHARD.match(file.name)
        if found and int(found[1]) != but:
            file.unlink(missing_ok=True)


def _shard(folder: Path, step: int, rank: int, size: int) -> Path:
    return folder / f"checkpoint.{step}.{rank + 1}of{size}.pt"


def _write(file: Path, state: dict[str, Any]) -> None:
    with atomic_path(file) as path:
        torch.save({"version": VERSION, **state}, path)


def _read(file: Path) -> dict[str, Any]:
    anew = f"delete {file.parent} to start anew, or choose another --out"
    try:
        state = torch.load(file, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{file} is damaged and cannot be read ({reason:.200})", "a checkpoint that is whole", anew) from error
    found = state.pop("version", None) if isinstance(state, dict) else None
    if found != VERSION:
        raise UserError(
            f"{file} is of another version of pvsae: its layout is {found or 'older'}",
            f"layout {VERSION}",
            f"go on with the pvsae that wrote it, or {anew}",
        )
    return dict(state)


def _parts(n: int) -> str:
    return f"{n} shards" if n > 1 else "one piece"
