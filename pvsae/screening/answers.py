"""Answers: the base model's own answers, kept on disk, each under its prompt, so that none is generated twice.

Knows: Parquet files with a checksum beside each, and which prompts they hold answers to.
Does not know: models. What the answers depend on besides the prompt (weights, sampling) is one hash, and names their folder.

Several processes may write at once, each files of its own name (with its id and a random number in it). A file that is damaged is
left out, and what it held is asked for again. What is kept in memory of an answer is its place; what is read there counts only
where it stands under its own prompt.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from pvsae.screening.files import is_whole, remove, save_table

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """Generated ids without the stop token, and how the answer ended ("stop" or "length")."""

    ids: tuple[int, ...]
    finish: str


class Answers:
    """A folder of answers of one model under one sampling. `remade` counts damaged files that were found."""

    def __init__(self, folder: str | Path, about: Mapping[str, object]) -> None:
        """
        Args:
            folder: for answers of any kind; those of this kind lie in a subfolder.
            about: all that an answer depends on besides its prompt and sample; JSON.
        """
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        self.folder = Path(folder) / digest[:16]
        self.remade = 0
        self._places: dict[bytes, tuple[int, int]] = {}  # key -> (file, row)
        self._files: list[str] = []

    def find(self, keys: Iterable[str]) -> dict[str, Answer]:
        """The answers that there are. Looks for files that other processes wrote in the meantime."""
        self._look()
        by_file: dict[int, dict[int, str]] = {}
        for key in keys:
            place = self._places.get(bytes.fromhex(key))
            if place is not None:
                by_file.setdefault(place[0], {})[place[1]] = key
        found = {}
        for file, rows in by_file.items():
            table = self._read(self._files[file])
            if table is None:
                self._forget(file)
                continue
            for row, key in rows.items():
                if row >= len(table) or table["key"].iat[row] != key:  # the file is another one than it was
                    continue
                found[key] = Answer(tuple(int(i) for i in table["ids"].iat[row]), str(table["finish"].iat[row]))
        return found

    def add(self, name: str, answers: Mapping[str, Answer]) -> None:
        """Keeps answers in a file whose name begins with `name`."""
        table = pd.DataFrame(
            {
                "key": list(answers),
                "ids": pd.Series([list(a.ids) for a in answers.values()], dtype=object),
                "finish": [a.finish for a in answers.values()],
            }
        )
        file = f"{name}-{len(self._files):03d}-{os.getpid()}-{secrets.token_hex(4)}.parquet"
        save_table(self.folder / file, table, {})
        self._index(file, answers)

    def _look(self) -> None:
        known = set(self._files)
        if self.folder.is_dir():
            for path in sorted(self.folder.glob("*.parquet")):
                if path.name not in known and not path.name.startswith("."):
                    table = self._read(path.name)
                    if table is not None:
                        self._index(path.name, table["key"])

    def _index(self, name: str, keys: Iterable[str]) -> None:
        self._files.append(name)
        for row, key in enumerate(keys):
            self._places[bytes.fromhex(key)] = (len(self._files) - 1, row)

    def _forget(self, file: int) -> None:
        """No answer is looked for in a file that is gone."""
        self._places = {key: place for key, place in self._places.items() if place[0] != file}

    def _read(self, name: str) -> pd.DataFrame | None:
        """A file's table; None where it is damaged, and then it is gone."""
        path = self.folder / name
        if is_whole(path):
            return pd.read_parquet(path)
        if path.exists():
            log.warning("%s is damaged: its answers are made again", path)
            self.remade += 1
            remove(path)
        return None
