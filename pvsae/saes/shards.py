"""Shards: activations kept on disk, so that several runs on the same stream share its forward passes.

Knows: safetensors files, a manifest with their checksums, and which of them are whole.
Does not know: how activations are made. Whoever asks for a shard that is missing or damaged makes it again and saves it here.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pvsae.errors import UserError
from pvsae.runs import atomic_path, read_json, sha256_of, write_json

log = logging.getLogger(__name__)


class Shards:
    """A folder of shards; shard i holds the passes of window i of a stream, before any token is filtered out."""

    def __init__(self, folder: str | Path, about: dict[str, Any]) -> None:
        """Opens or makes the folder.

        Args:
            about: everything that the activations depend on.

        Raises: UserError if the folder holds the activations of another stream.
        """
        self.folder, self._about = Path(folder), json.loads(json.dumps(about))
        self._shards: dict[str, dict[str, Any]] = {}
        if not (self.folder / "manifest.json").exists():
            return
        try:
            manifest = read_json(self.folder / "manifest.json", "the manifest of activation shards")
            found, self._shards = manifest["stream"], dict(manifest["shards"])
        except (UserError, KeyError, TypeError):
            log.warning("%s has a damaged manifest: its shards are made again", self.folder)
            return
        if found != self._about:
            other = sorted(k for k in found.keys() | self._about.keys() if found.get(k) != self._about.get(k))
            raise UserError(
                f"{self.folder} holds the activations of another stream; it differs in: {', '.join(other)}",
                "a folder for each model, corpus, set of blocks and batch size",
                "name another folder, or delete that one",
            )

    def load(self, number: int) -> list[dict[int, Tensor]] | None:
        """The passes of a window, each block -> [tokens d_model]; None if the shard is missing or damaged."""
        known = self._shards.get(str(number))
        path = self._path(number)
        if known is None:
            return None
        if not path.is_file() or path.stat().st_size != known["bytes"] or sha256_of(path) != known["sha256"]:
            log.warning("activation shard %s is missing or damaged: it is made again", path)
            return None
        try:
            with safe_open(path, framework="pt") as file:
                held = {int(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        except SafetensorError:
            return None
        parts = {block: tensor.split(known["passes"]) for block, tensor in held.items()}
        return [{block: parts[block][i] for block in parts} for i in range(len(known["passes"]))]

    def save(self, number: int, passes: Sequence[dict[int, Tensor]]) -> None:
        """Writes the passes of a window, and then their checksum into the manifest."""
        path = self._path(number)
        joined = {str(block): torch.cat([p[block] for p in passes]).cpu().contiguous() for block in passes[0]}
        with atomic_path(path) as tmp:
            save_file(joined, tmp)
        sizes = [len(next(iter(p.values()))) for p in passes]
        self._shards[str(number)] = {
            "file": path.name,
            "sha256": sha256_of(path),
            "bytes": path.stat().st_size,
            "passes": sizes,
        }
        write_json(self.folder / "manifest.json", {"version": 1, "stream": self._about, "shards": self._shards})

    def _path(self, number: int) -> Path:
        return self.folder / f"activations-{number:06d}.safetensors"
