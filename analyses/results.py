"""What an analysis leaves in its folder beside run folders: tables, figures, rows for its record.

Knows: how they are written. Does not know: what is in them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from pvsae.runs import atomic_path


def write(folder: Path, **tables: pd.DataFrame) -> None:
    """The tables as CSV, each under its name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        with atomic_path(folder / f"{name}.csv") as tmp:
            table.to_csv(tmp, index=False)


def save(figure: Figure, path: Path) -> Path:
    """The figure as PNG. Returns: the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as tmp:
        figure.savefig(tmp, format="png")
    return path


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows with their numbers short enough to read, for a result file."""
    return table.round(4).to_dict("records")
