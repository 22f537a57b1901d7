"""Small corpora that the tests of this folder share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pvsae.saes.corpus import Corpus, CorpusConfig
from pvsae.sources import Source

WORDS = (
    "the", "ferry", "leaves", "harbour", "nine", "comes", "back", "before", "dark", "nobody", "knows", "why", "old", "clock",
    "kitchen", "stopped", "everybody", "theory",
)  # fmt: skip


def text(i: int, least: int = 3, most: int = 30) -> str:
    """A text that is known by its number, of a length that varies."""
    n = least + (i * 7) % (most - least + 1)
    return f"{i}: " + " ".join(WORDS[(i + j * (i % 5 + 1)) % len(WORDS)] for j in range(n))


def chat(i: int, system: str | None = None, turns: int = 1) -> list[dict[str, str]]:
    """A chat that is known by its number."""
    head = [{"role": "system", "content": system}] if system else []
    for turn in range(turns):
        head += [
            {"role": "user", "content": f"Question {i}.{turn}?"},
            {"role": "assistant", "content": f"Answer {i}.{turn}, " + text(i, 2, 9)},
        ]
    return head


def write_jsonl(path: Path, rows: list[Any]) -> str:
    """Writes rows, each as JSON unless it is a string already; gives the path as text."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def write_texts(path: Path, n: int = 200, start: int = 0) -> str:
    return write_jsonl(path, [{"text": text(i)} for i in range(start, start + n)])


def write_chats(path: Path, n: int = 100, system: str | None = None, turns: int = 1) -> str:
    return write_jsonl(path, [{"messages": chat(i, system, turns)} for i in range(n)])


def open_corpus(model: Any, folder: Path, *sources: Source, chunk_tokens: int | None = None, **options: Any) -> Corpus:
    """A corpus of these sources with rows of 32 tokens, its tokens kept in `folder`/tokens."""
    config = CorpusConfig(sources=sources, **{"context": 32, **options})
    return Corpus(model, config, folder / "tokens", chunk_tokens=chunk_tokens, progress=False)
