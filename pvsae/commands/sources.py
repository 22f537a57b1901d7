"""Options that say which rows of a source are meant, the same for every command that reads data.

Knows: their names. Does not know: how a source is read (sources.py).
"""

from __future__ import annotations

from typing import Any


def add_rows_of(group: Any, field: str) -> None:
    """Adds --split, --subset and --field to a parser or a group of options; `field` says what the field holds."""
    group.add_argument("--split", help="of datasets, by name or in folders (default: train)")
    group.add_argument("--subset", metavar="NAME", help="of datasets that have several")
    group.add_argument("--field", help=f"the field that holds {field}")
