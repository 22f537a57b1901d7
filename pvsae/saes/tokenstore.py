"""Token store: a source's samples as token ids and flags on disk, made once, opened memory-mapped.

Knows: chunks of samples, their checksums, how a chunk is made again, and that one process at a time writes.
Does not know: what a sample is (it is told how to read and tokenise), rows, masks, mixtures.

A folder for each source, tokenizer and options::

    chunk-00000/ids.npy flags.npy offsets.npy    samples i..j: ids[offsets[k]:offsets[k + 1]]
    chunk-00000/keys.npy                         a hash of each sample's content, as it was read
    chunk-00000/chunk.json                       written last: a chunk without it does not count
"""

from __future__ import annotations

import contextlib
import shutil
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import UInt64
from tqdm.auto import tqdm

from pvsae.errors import UserError
from pvsae.runs import atomic_path, read_json, sha256_of, write_json
from pvsae.saes.tokenising import Tokens
from pvsae.sources import Bad, Reader, Value, content_key

try:
    import fcntl
except ImportError:  # Windows: no advisory locks
    fcntl = None  # type: ignore[assignment]

ARRAYS = ("ids", "flags", "offsets", "keys")
MOST_OPEN = 64  # chunks whose files are open at once: each takes two of the thousand or so that a process may have
AT_ONCE = 256  # rows that are read and tokenised together
Encode = Callable[[list[Value], list[int]], list[Tokens | Bad]]


@dataclass(frozen=True)
class Chunk:
    """Some of a source's samples in a row.

    Attributes:
        folder: where it stands.
        first: index of its first sample in the source.
        samples, tokens: how many it holds.
        bad: rows that were left out, by reason.
        rows: rows of the source up to its end, good and bad.
        last: whether the source ends here.
        after: where the source's reader goes on.
    """

    folder: Path
    first: int
    samples: int
    tokens: int
    bad: Mapping[str, int]
    rows: int
    last: bool
    after: Mapping[str, Any]

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """ids [tokens], flags [tokens] (both memory-mapped) and offsets [samples + 1]."""
        ids, flags = (np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS[:2])
        return ids, flags, np.load(self.folder / "offsets.npy")

    def keys(self) -> UInt64[np.ndarray, " samples"]:
        """A hash of each sample's content."""
        return np.load(self.folder / "keys.npy")


class TokenStore:
    """The tokens of one source. Chunks are made in order, when they are asked for; a damaged one is made again, the same."""

    def __init__(
        self,
        folder: Path,
        reader: Reader,
        encode: Encode,
        *,
        chunk_tokens: int = 1 << 24,
        progress: bool = True,
    ) -> None:
        """Opens the store of a source.

        Args:
            folder: of this source, tokenizer and options alone; the caller puts their hash into its name.
            reader: the source.
            encode: (values, the row of the source that each of them is) -> tokens of each.
            chunk_tokens: least tokens a chunk (unless it is the last one).
            progress: whether to show bars.
        """
        self.folder, self.reader, self.encode = folder, reader, encode
        self.chunk_tokens, self.progress = chunk_tokens, progress
        self._chunks: list[Chunk] = []
        self._firsts: list[int] = []
        self._alone = False
        self._reading: tuple[int, Iterator[Value | Bad]] | None = None  # rows that were read, and the others
        chunks = self._chunks
        self._arrays = lru_cache(maxsize=MOST_OPEN)(lambda number: chunks[number].arrays())

    @property
    def chunks(self) -> list[Chunk]:
        """The chunks that are open so far."""
        return self._chunks

    @property
    def samples(self) -> int:
        """Samples in the chunks that are open so far."""
        return sum(c.samples for c in self._chunks)

    @property
    def bad(self) -> Counter[str]:
        """Rows that were left out so far, by reason."""
        return sum((Counter(c.bad) for c in self._chunks), Counter())

    def make_all(self) -> None:
        """Makes every chunk that is not there yet, alone: in turn with others, each would have to find its place anew."""
        with self._bar() as bar, contextlib.ExitStack() as writing:
            while not (self._chunks and self._chunks[-1].last):
                self._append(_intact(self._next) or self._make_as(writing, bar))

    def _make_as(self, writing: contextlib.ExitStack, bar: Any) -> Chunk:
        """The next chunk, made as the one writer until `writing` ends."""
        if not self._alone:
            writing.enter_context(_locked(self.folder))
            self._alone = True
            writing.callback(setattr, self, "_alone", False)
        return _intact(self._next) or self._make(self._next, bar)  # another process may have made it while we waited

    def chunk(self, number: int) -> Chunk | None:
        """A chunk, made now if it was not before; None behind the last one."""
        while len(self._chunks) <= number:
            if self._chunks and self._chunks[-1].last:
                return None
            with contextlib.ExitStack() as writing:
                self._append(_intact(self._next) or self._make_as(writing, None))
        return self._chunks[number]

    @property
    def _next(self) -> Path:
        return self.folder / f"chunk-{len(self._chunks):05d}"

    def _append(self, chunk: Chunk) -> None:
        self._chunks.append(chunk)
        self._firsts.append(chunk.first)

    def sample(self, index: int) -> Tokens:
        """The tokens of a sample, as views of the memory map."""
        while index >= self.samples and self.chunk(len(self._chunks)) is not None:
            pass
        number = bisect_right(self._firsts, index) - 1
        ids, flags, offsets = self._arrays(number)
        at = index - self._firsts[number]
        here = slice(*offsets[at : at + 2].tolist())
        return Tokens(ids[here], flags[here])

    def keys(self) -> UInt64[np.ndarray, " samples"]:
        """Hashes of the samples' contents, of the chunks that are open so far: of the same text the same hash."""
        return np.concatenate([np.zeros(0, np.uint64), *(chunk.keys() for chunk in self._chunks)])

    # ----------------------------------------------------------------------------------------------------------- making
    def _make(self, folder: Path, bar: Any) -> Chunk:
        before = self._chunks[-1] if self._chunks else None
        first, row = (before.first + before.samples, before.rows) if before else (0, 0)
        most = self.reader.source.max_samples
        shutil.rmtree(folder, ignore_errors=True)
        made: list[Tokens] = []
        keys: list[int] = []
        tokens, bad, last = 0, Counter[str](), False
        reading, self._reading = self._reading, None  # whatever happens here, it does not stand there any more
        rows = reading[1] if reading and reading[0] == row else self.reader.rows(before.after if before else None)
        with self._bar() if bar is None else contextlib.nullcontext(bar) as bar:
            while tokens < self.chunk_tokens and not last:
                values = list(islice(rows, AT_ONCE))
                good = [(row + i, v) for i, v in enumerate(values) if not isinstance(v, Bad)]
                encoded = self.encode([v for _, v in good], [i for i, _ in good])
                bad.update(v.reason for v in values if isinstance(v, Bad))
                for (_, value), found in zip(good, encoded, strict=True):
                    if isinstance(found, Bad):
                        bad[found.reason] += 1
                    elif most is None or first + len(made) < most:
                        made.append(found)
                        keys.append(content_key(value))
                        tokens += len(found.ids)
                row += len(values)
                last = len(values) < AT_ONCE or (most is not None and first + len(made) >= most)
                bar.update(len(values))
                bar.set_postfix(tokens=f"{tokens:,}", bad=sum(bad.values()), refresh=False)
        self._reading = None if last else (row, rows)
        offsets = np.cumsum([0, *(len(t.ids) for t in made)], dtype=np.int64)
        arrays = {
            "ids": np.concatenate([t.ids for t in made]) if made else np.zeros(0, np.int32),
            "flags": np.concatenate([t.flags for t in made]) if made else np.zeros(0, np.uint8),
            "offsets": offsets,
            "keys": np.array(keys, np.uint64),
        }
        for name, array in arrays.items():
            with atomic_path(folder / f"{name}.npy") as tmp, tmp.open("wb") as handle:
                np.save(handle, array)
        about = {
            "first": first, "samples": len(made), "tokens": tokens, "bad": dict(bad), "rows": row, "last": last,
            "after": self.reader.place(row), "sha256": {name: sha256_of(folder / f"{name}.npy") for name in ARRAYS},
        }  # fmt: skip
        write_json(folder / "chunk.json", about)
        return _chunk(folder, about)

    def _bar(self) -> Any:
        return tqdm(desc=f"tokenising {self.reader.source.name}", unit=" rows", disable=not self.progress)


def _chunk(folder: Path, about: Mapping[str, Any]) -> Chunk:
    return Chunk(folder, **{name: value for name, value in about.items() if name != "sha256"})


def _intact(folder: Path) -> Chunk | None:
    """The chunk in a folder if it is whole."""
    try:
        about = read_json(folder / "chunk.json", "a chunk of tokens")
        whole = all(sha256_of(folder / f"{name}.npy") == about["sha256"][name] for name in ARRAYS)
        return _chunk(folder, about) if whole else None
    except (UserError, OSError, KeyError, TypeError):  # not there, or damaged
        return None


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One writer at a time, in whatever process."""
    folder.mkdir(parents=True, exist_ok=True)
    lock: IO[str]
    with (folder / ".lock").open("a+") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
