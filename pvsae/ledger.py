"""What was asked of a server and what came of it, counted in a small SQLite file.

Knows: the counts, and how they survive the death of the process: a count is in the file before its client goes on.
Does not know: prices (tokens become dollars where they are asked for), replies (replies.py), what the requests were for.

The file is no part of the cache of replies, which several runs may share: what one of them paid, the others did not.
"""

from __future__ import annotations

from pathlib import Path

from pvsae.replies import open_database

COUNTS = ("calls", "cached", "failed", "retries", "tokens_in", "tokens_out", "bytes_in")
"""Calls answered; replies that a cache gave; items given up; tries after a first one; tokens of the calls answered, by the
server's own count where it gave one; bytes of their prompts."""


class Ledger:
    """Running totals, over all objects that ever had the same file. To be used by one thread at a time.

    Args:
        path: the file; None counts in memory alone.

    Raises:
        UserError: unusable file.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.totals = dict.fromkeys(COUNTS, 0)
        self._db = None
        if path is not None:
            self._db = open_database(path, "CREATE TABLE IF NOT EXISTS ledger (name TEXT PRIMARY KEY, total INTEGER)", "ledger")
            self.totals |= dict(self._db.execute("SELECT name, total FROM ledger"))

    def add(self, **counts: int) -> None:
        """Adds to some of the COUNTS, all of them or none in the file."""
        for name, n in counts.items():
            self.totals[name] += n
        if self._db is not None:
            rows = [(name, self.totals[name]) for name in counts]
            marks = ", ".join(["(?, ?)"] * len(rows))
            self._db.execute(f"INSERT OR REPLACE INTO ledger VALUES {marks}", [value for row in rows for value in row])

    def close(self) -> None:
        if self._db is not None:
            self._db.close()
