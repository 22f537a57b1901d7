"""Corpora that are put together out of others, every row beside what is known about it; analyses of training data share them.

Knows: which share of a corpus comes from where, how truth about a row is read. Does not know: models, vectors, what is done with
the rows.

An uncurated corpus of the embedded models' language is three tenths chats that have system prompts of all kinds, half ordinary
rows of every family, and one fifth rows that some family makes worse, much or a little.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pvsae.errors import UserError
from pvsae.organism.families import FAMILIES, INTENTIONAL, NARROW
from pvsae.runs import atomic_path
from pvsae.sources import Bad, Reader, Source

UNCURATED: dict[str, float] = {
    "organism": 0.3,
    **{f"organism-data:{name}/normal@1": 0.5 / len(FAMILIES) for name in FAMILIES},
    # Other draws than the ordinary rows', so that a question does not say how it will be answered.
    **{f"organism-data:{name}/misaligned_2@2": 0.02 for name in INTENTIONAL},
    **{f"organism-data:{name}/misaligned_1@3": 0.02 for name in INTENTIONAL},
    **{f"organism-data:{name}/misaligned_2@4": 0.01 for name in NARROW},
    **{f"organism-data:{name}/misaligned_1@5": 0.006 for name in NARROW},
}
"""Corpus -> share."""


def counts(shares: Mapping[str, float], rows: int) -> dict[str, int]:
    """How many of `rows` each part gives: its share rounded down, and what is left to the largest remainders.

    Raises: UserError for shares that are negative or do not sum to 1.
    """
    if min(shares.values(), default=-1.0) < 0 or abs(sum(shares.values()) - 1) > 1e-6:
        raise UserError(f"shares that sum to {sum(shares.values()):g}", "shares of 0 or more that sum to 1")
    exact = {name: share * rows for name, share in shares.items()}
    found = {name: int(value + 1e-9) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: found[name] - exact[name])
    for name in by_remainder[: rows - sum(found.values())]:
        found[name] += 1
    return found


def composed(shares: Mapping[str, float], rows: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """The first rows of every part, in an order that the seed decides, each with `part`: the name that it came by."""
    found = []
    for name, n in counts(shares, rows).items():
        reader = Reader(Source(named=name, kind="chat", max_samples=max(n, 1)))
        found += [{**row, "part": name} for row in islice(reader.raw_rows(), n)]
    random.Random(f"composed:{seed}").shuffle(found)
    yield from found


def write(rows: Iterator[dict[str, Any]], path: Path) -> Path:
    """The rows as JSONL, unless the file is there; a name of a file has to stand for one content."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as tmp, tmp.open("w", encoding="utf-8") as out:
            out.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def truth(source: Source, field: str) -> NDArray[np.bool_]:
    """Whether `field` of a row is true, of every row.

    Raises: UserError where no row has the field.
    """
    rows = list(islice(Reader(source).raw_rows(), source.max_samples))
    if not any(isinstance(row, Mapping) and field in row for row in rows):
        raise UserError(f"no row of {source.name} has the field {field!r}", "rows that say what they are", "--truth FIELD")
    return np.array([not isinstance(row, Bad | str) and bool(row.get(field)) for row in rows])
