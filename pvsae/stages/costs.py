"""What a run cost at servers: rows for `result.json`, and from there for the page.

Knows: that a judge, or a model that answers elsewhere, may keep a `ledger` of its requests.
Does not know: how it is kept (ledger.py), nor prices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def ledger_of(asked: Any) -> dict[str, Any]:
    """Counts of a judge or a model that sends requests; empty for one that sends none, and for None."""
    return dict(getattr(asked, "ledger", None) or {})


def costs(judge: Any, before: Mapping[str, Any], answerer: Any = None) -> list[dict[str, Any]]:
    """A row for everyone who sent requests: server, calls, cached, failed, retries, tokens_in, tokens_out, cost (US dollars, or
    None without prices). No row: no server was asked.

    A judge that the run opened for itself counts over all starts of the run; of one that was given to it, only what it was
    asked since, and its row says so: how it keeps what it spent is its owner's affair.

    Args:
        before: `ledger_of` the judge that was given to the run.
        answerer: who wrote the answers, if not the model here.
    """
    rows = []
    if now := ledger_of(judge):
        since = {name: value if value is None else value - (before.get(name) or 0) for name, value in now.items()}
        rows.append({"server": f"judge {judge.name}{' (this start alone)' if before else ''}", **since})
    if now := ledger_of(answerer):
        rows.append({"server": f"answers of {answerer.name}", **now})
    return rows
