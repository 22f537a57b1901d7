"""A chat request, its reply, and the file that keeps replies.

Knows: what makes two requests the same, and how a reply survives the death of the process that received it.
Does not know: servers, retries, money (llm.py).
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pvsae.errors import UserError


def request_key(model: str, request: Request) -> str:
    """sha256 of the request's canonical JSON and the model's name; the server's address is no part of it."""
    body = asdict(request)
    if body["extra"] is None:
        del body["extra"]
    text = json.dumps({"model": model, **body}, sort_keys=True, separators=(",", ":"), default=dict)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def reply_from_json(text: str) -> Reply:
    """Read what `json.dumps(asdict(reply))` wrote."""
    data = json.loads(text)
    if data["logprobs"] is not None:
        data["logprobs"] = tuple(tuple((token, value) for token, value in row) for row in data["logprobs"])
    for name in ("usage", "tokens"):
        data[name] = tuple(data[name]) if data[name] is not None else None
    return Reply(**data)


@dataclass(frozen=True)
class Request:
    """One chat completion. Equal content (and model) means equal cache key.

    Attributes:
        messages: chat messages, each with `role` and `content`.
        max_tokens: most tokens to generate.
        logprobs: how many top tokens to return at each position; None asks for none.
        tag: told to the cache only, e.g. the sample's number where the same prompt is sampled many times.
        extra: further fields of the request's body that the server understands (e.g. `chat_template_kwargs`).
    """

    messages: tuple[Mapping[str, Any], ...]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    logprobs: int | None = None
    tag: str = ""
    extra: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Reply:
    """What came back, or why nothing did (`error`; every other content field is then None).

    Attributes:
        text: the answer.
        logprobs: a position's top tokens with natural-log probability, most likely first; None where the server gave none.
        finish: "stop", "length" or the server's own word.
        usage: (tokens in, tokens out) as the server counted them.
        cached: came from the cache, or from an equal request of the same call; nothing was paid.
        error: why this item has no answer.
        tokens: the generated tokens, one a position of `logprobs`.
    """

    text: str | None
    logprobs: tuple[tuple[tuple[str, float], ...], ...] | None
    finish: str | None
    usage: tuple[int, int] | None
    model: str
    cached: bool = False
    error: str | None = None
    tokens: tuple[str, ...] | None = None


def open_database(path: Path, table: str, what: str) -> sqlite3.Connection:
    """A connection to a SQLite file with one table, for any thread, each statement a commit that survives the death of the
    process (WAL; other processes can read along).

    Raises:
        UserError: the file cannot be used as `what`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        database = sqlite3.connect(path, timeout=30, check_same_thread=False, isolation_level=None)
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=NORMAL")
        database.execute(table)
    except (OSError, sqlite3.Error) as error:
        raise UserError(
            f"cannot use {path} as a {what}: {error}",
            "a writable folder, and a file that is absent or was written by pvsae",
            "name another file, or remove this one",
        ) from error
    return database


class ReplyCache:
    """Replies by key in one SQLite file."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        table = "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, model TEXT, reply TEXT, at TEXT)"
        self._db = open_database(self.path, table, "cache of replies")

    def get_many(self, keys: Iterable[str]) -> dict[str, Reply]:
        found: dict[str, Reply] = {}
        keys = list(dict.fromkeys(keys))
        with self._lock:
            for start in range(0, len(keys), 500):
                part = keys[start : start + 500]
                marks = ",".join("?" * len(part))
                for key, text in self._db.execute(f"SELECT key, reply FROM replies WHERE key IN ({marks})", part):
                    found[key] = reply_from_json(text)
        return found

    def put(self, key: str, reply: Reply) -> None:
        row = (key, reply.model, json.dumps(asdict(reply)), datetime.now(UTC).isoformat(timespec="seconds"))
        with self._lock:
            self._db.execute("INSERT OR REPLACE INTO replies VALUES (?, ?, ?, ?)", row)

    def close(self) -> None:
        with self._lock:
            self._db.close()
