"""What a stream of activations shows about single features: how often, how strongly, and where they fire.

Knows: counts, histograms, top examples, an even sample of all firings, random windows; all in memory of fixed size.
Does not know: models, dictionaries, texts. Examples are places (row of a corpus, position); the corpus has their tokens.

The same activations give the same evidence bit for bit, in whatever order and batches they come: a random choice is a hash of
the place it is about, and sums are of numbers short enough to be added without rounding (see `_short`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int, Int32, Int64, UInt32, UInt64

from pvsae.errors import UserError
from pvsae.saes.corpus import scrambled
from pvsae.saes.keeping import Kept, Offers

FIRST_OCTAVE, OCTAVES, BINS_AN_OCTAVE = -10, 24, 4  # activations from 2^-10 to 2^14; what lies outside stands in the end bins
BINS = OCTAVES * BINS_AN_OCTAVE
SAMPLE, QUIET, START = range(1, 4)  # what a random number is for


class Context(NamedTuple):
    """A row of a corpus, with its number in the walk; to `harvest` it is a `Row`.

    Attributes:
        ids, keep, parts: as those of `pvsae.saes.corpus.Row`.
        number: how many rows of the walk stood before it.
    """

    ids: Int32[np.ndarray, " pos"]
    keep: Bool[np.ndarray, " pos"]
    parts: tuple[tuple[int, int, int], ...]
    number: int


class Firings(NamedTuple):
    """Activations that are not zero, sorted by cell, then by slot.

    Attributes:
        cell: place among all tokens of the rows, one row behind the other.
        slot: the feature, as an index into the features that are looked at.
        value: the activation.
    """

    cell: Int[np.ndarray, " n"]
    slot: Int[np.ndarray, " n"]
    value: Float32[np.ndarray, " n"]


class Example(NamedTuple):
    """A stretch of tokens of one row.

    Attributes:
        value: activation at `position`; 0 of a window in which the feature is silent.
        row: number of the row in the walk.
        position: in the row.
        start, stop: the stretch, as positions in the row; `position` lies in it.
        values: activation at each of its tokens, 0 where the feature is silent or the token does not count.
        document: number of the document that it lies in.
    """

    value: float
    row: int
    position: int
    start: int
    stop: int
    values: Float[np.ndarray, " pos"]
    document: int


def stretch(position: int, begin: int, end: int, width: int) -> tuple[int, int]:
    """Positions [start, stop) of the `width` tokens shown around one, two thirds of them before it, within [begin, end)."""
    start = max(begin, min(position - 2 * width // 3, end - width))
    return start, min(start + width, end)


def bin_edges() -> Float[np.ndarray, " bins_and_one"]:
    """Edges of the bins of the histogram of activations."""
    return 2.0 ** (FIRST_OCTAVE + np.arange(BINS + 1) / BINS_AN_OCTAVE)


class Evidence:
    """Counts, histograms and examples of some features.

    Attributes:
        latents: [n] which features; a slot is an index into them.
        tokens, rows: how many tokens and rows were looked at.
        fired: [n] at how many of them each was active.
        peak: [n] highest activation.
        histogram: [n bins] activations by size (`bin_edges`).
        top: the documents with the highest activations.
        sample: an even sample of all firings, at most one a document.
        quiet: random windows with what is active in them, for all features together.
    """

    def __init__(
        self, latents: Sequence[int], *, window: int = 32, top: int = 20, samples: int = 100, quiet: int = 500, seed: int = 0
    ) -> None:
        """Empty; all the memory that will be used is taken now, but for the windows.

        Args:
            window: tokens shown around a place.
            top: examples of highest activation, a feature.
            samples: firings in the even sample, a feature.
            quiet: random windows, for all features together.
        """
        if not len(latents) or len(set(latents)) != len(latents):
            raise UserError(f"{len(latents)} features, of which {len(set(latents))} differ", "some features, each of them once")
        if window < 2:
            raise UserError(f"windows of {window} tokens", "at least 2")
        n = len(latents)
        self.latents: Int64[np.ndarray, " n"] = np.asarray(latents, dtype=np.int64)
        self.window, self.seed, self.tokens, self.rows = window, seed, 0, 0
        self.fired: Int64[np.ndarray, " n"] = np.zeros(n, np.int64)
        self.peak: Float32[np.ndarray, " n"] = np.zeros(n, np.float32)
        self.histogram: UInt32[np.ndarray, "n bins"] = np.zeros((n, BINS), np.uint32)
        self._sums: Float64[np.ndarray, " n"] = np.zeros(n)
        self.top, self.sample = Kept(n, top, window), Kept(n, samples, window)
        self.quiet = QuietWindows(quiet)

    @staticmethod
    def bytes_a_feature(window: int, top: int, samples: int) -> int:
        """Memory that a feature takes while the stream runs, in bytes."""
        return 8 + 8 + 4 + 8 + 4 * BINS + Kept.bytes_a_slot(top, window) + Kept.bytes_a_slot(samples, window)

    @property
    def density(self) -> Float[np.ndarray, " n"]:
        """Share of tokens at which each is active."""
        return self.fired / max(self.tokens, 1)

    @property
    def mean(self) -> Float[np.ndarray, " n"]:
        """Mean activation where active; NaN where never."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self._sums / self.fired

    # ------------------------------------------------------------------------------------------------------------- taking in
    def add(self, rows: Sequence[Context], counted: Bool[np.ndarray, " cells"], firings: Firings) -> None:
        """Counts some rows, each of which comes once.

        Args:
            rows: whole rows.
            counted: which of their tokens count, one row behind the other.
            firings: what is active at those.
        """
        grid = _Grid.of(rows)
        self.tokens += int(counted.sum())
        self.rows += len(rows)
        slot, value, cell = firings.slot, firings.value, firings.cell
        n = len(self.latents)
        if len(slot):
            self.fired += np.bincount(slot, minlength=n)
            self._sums += np.bincount(slot, weights=_short(value), minlength=n)
            octave = np.log2(value.astype(np.float64)) - FIRST_OCTAVE
            bins = np.clip(np.floor(octave * BINS_AN_OCTAVE).astype(np.int64), 0, BINS - 1)
            which, times = np.unique(slot * np.int64(BINS) + bins, return_counts=True)
            self.histogram.reshape(-1)[which] += times.astype(np.uint32)
            self._keep(grid, firings)
        self.quiet.add(grid, counted, cell, slot, self.window, self.seed)

    def _keep(self, grid: _Grid, firings: Firings) -> None:
        """Offers of each feature and document the highest firing, and a random one."""
        slot, value, cell = firings.slot, firings.value, firings.cell
        documents, local = np.unique(grid.document[cell], return_inverse=True)
        group = slot * np.int64(len(documents)) + local
        order = np.argsort(group, kind="stable")
        starts = np.flatnonzero(np.r_[True, np.diff(group[order]) > 0])
        lengths = np.diff(np.r_[starts, len(order)])
        highest = np.maximum.reduceat(value[order], starts)
        np.maximum.at(self.peak, slot[order][starts], highest)
        chance = hashed(
            self.seed, SAMPLE, self.latents[slot], grid.document[cell], grid.number[cell].astype(np.int64), grid.position[cell]
        )
        lowest = np.minimum.reduceat(chance[order], starts)
        for kept, ranked, best, sign in ((self.top, value, highest, -1.0), (self.sample, chance, lowest, 1.0)):
            # Among equal ones the first place; `order` has them by place.
            equal = order[np.flatnonzero(ranked[order] == np.repeat(best, lengths))]
            _, first = np.unique(group[equal], return_index=True)
            at = equal[first]
            place = cell[at]
            offers = Offers(
                slot[at], sign * ranked[at].astype(np.float64), value[at], grid.document[place], grid.number[place],
                grid.position[place],
            )  # fmt: skip
            kept.offer(offers, lambda some, at=at: self._strips(grid, firings, at[some]))  # type: ignore[misc]

    def _strips(self, grid: _Grid, firings: Firings, at: Int[np.ndarray, " m"]) -> Float[np.ndarray, "m width"]:
        """Activations in the stretches around some firings, as shares of the activation there."""
        cells = grid.base.size
        wanted_slots = np.zeros(len(self.latents), dtype=bool)
        wanted_slots[firings.slot[at]] = True
        some = np.flatnonzero(wanted_slots[firings.slot])
        key = firings.slot[some] * np.int64(cells) + firings.cell[some]
        order = np.argsort(key, kind="stable")
        key, values = key[order], firings.value[some][order]
        cell, slot = firings.cell[at], firings.slot[at]
        base, begin, end = grid.base[cell], grid.begin[cell], grid.end[cell]
        start = np.maximum(begin, np.minimum(grid.position[cell] - 2 * self.window // 3, end - self.window))
        positions = start[:, None] + np.arange(self.window)
        wanted = slot[:, None] * np.int64(cells) + base[:, None] + positions
        found = np.searchsorted(key, wanted).clip(max=len(key) - 1)
        hit = (key[found] == wanted) & (positions < end[:, None])
        return np.where(hit, values[found], 0.0) / firings.value[at][:, None]

    # ------------------------------------------------------------------------------------------------------------ giving out
    def examples(self, slot: int, kept: Kept, parts: Mapping[int, Context]) -> list[Example]:
        """The examples of a feature, best first.

        Args:
            kept: `top` or `sample`.
            parts: number -> row, of all rows that examples lie in (`rows_needed`).
        """
        out = []
        for cell in kept.best(slot):
            row, position = int(kept.row[slot, cell]), int(kept.position[slot, cell])
            begin, end = part_of(parts[row], position)
            start, stop = stretch(position, begin, end, self.window)
            value = float(kept.value[slot, cell])
            values = kept.strip[slot, cell, : stop - start].astype(np.float64) * value
            out.append(Example(value, row, position, start, stop, values, int(kept.document[slot, cell])))
        return out

    def quiet_for(self, slot: int, n: int) -> list[Example]:
        """At most n of the random windows, those in which a feature is silent, in an order that is random for each feature."""
        silent = [w for w in self.quiet.windows if slot not in w.active]
        order = np.argsort(hashed(self.seed, QUIET, self.latents[slot], np.array([w.document for w in silent], dtype=np.int64)))
        picked = [silent[i] for i in order[:n]]
        return [Example(0.0, w.row, w.start, w.start, w.stop, np.zeros(w.stop - w.start), w.document) for w in picked]

    def rows_needed(self) -> set[int]:
        """Numbers of the rows in which examples lie."""
        rows = {int(w.row) for w in self.quiet.windows}
        for kept in (self.top, self.sample):
            rows |= set(np.unique(kept.row[np.isfinite(kept.key)]).tolist())
        return rows

    # ----------------------------------------------------------------------------------------------------------------- state
    def state(self) -> dict[str, np.ndarray]:
        """Everything, as arrays; `restore` goes on bit for bit."""
        arrays = {"latents": self.latents, "fired": self.fired, "peak": self.peak, "histogram": self.histogram}
        arrays |= {"sums": self._sums, "tokens": np.array(self.tokens), "rows": np.array(self.rows)}
        for name, part in (("top", self.top), ("sample", self.sample), ("quiet", self.quiet)):
            arrays |= {f"{name}.{key}": value for key, value in part.state().items()}
        return arrays

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Goes on where `state` was taken, by an object that was made with the same arguments."""
        for name, array in (("fired", self.fired), ("peak", self.peak), ("histogram", self.histogram), ("sums", self._sums)):
            array[...] = state[name]
        self.tokens, self.rows = int(state["tokens"]), int(state["rows"])
        for name, part in (("top", self.top), ("sample", self.sample), ("quiet", self.quiet)):
            own = {key.partition(".")[2]: value for key, value in state.items() if key.startswith(name + ".")}
            part.restore(own)


class QuietWindow(NamedTuple):
    """A random window: its place, and the slots that are active in it."""

    key: float
    row: int
    start: int
    stop: int
    document: int
    active: frozenset[int]


class QuietWindows:
    """Random windows of a stream, at most one a document and row, and what is active in each of them."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.windows: list[QuietWindow] = []  # by key

    def add(
        self,
        grid: _Grid,
        counted: Bool[np.ndarray, " cells"],
        cell: Int[np.ndarray, " n"],
        slot: Int[np.ndarray, " n"],
        width: int,
        seed: int,
    ) -> None:
        """Takes in the rows of a pass. A window in which less than half of the tokens count is left out."""
        at = np.flatnonzero(grid.position == grid.begin)  # the first token of each part of each row
        where = grid.document[at], grid.number[at].astype(np.int64)
        keys, starts = hashed(seed, QUIET, *where), hashed(seed, START, *where)
        worst = self.windows[-1].key if len(self.windows) == self.size else np.inf
        found = []
        for i in np.flatnonzero(keys < worst):
            first, length = int(at[i]), int(grid.end[at[i]] - grid.begin[at[i]])
            a = first + int(starts[i] * (max(0, length - width) + 1))
            b = min(a + width, first + length)
            if counted[a:b].sum() * 2 < width:
                continue
            low, high = np.searchsorted(cell, (a, b))
            start = int(grid.position[a])
            active = frozenset(slot[low:high].tolist())
            found.append(QuietWindow(float(keys[i]), int(where[1][i]), start, start + b - a, int(where[0][i]), active))
        self.windows = sorted([*self.windows, *found], key=lambda w: (w.key, w.document, w.row))[: self.size]

    def state(self) -> dict[str, np.ndarray]:
        """Everything, as arrays."""
        active = [sorted(w.active) for w in self.windows]
        return {
            "key": np.array([w.key for w in self.windows], dtype=np.float64),
            "place": np.array([w[1:5] for w in self.windows], dtype=np.int64).reshape(-1, 4),
            "counts": np.array([len(a) for a in active], dtype=np.int64),
            "active": np.array([s for a in active for s in a], dtype=np.int64),
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Goes on where `state` was taken."""
        active = np.split(state["active"], np.cumsum(state["counts"])[:-1]) if len(state["key"]) else []
        self.windows = [
            QuietWindow(float(key), row, start, stop, document, frozenset(some.tolist()))
            for key, (row, start, stop, document), some in zip(state["key"], state["place"].tolist(), active, strict=True)
        ]


class _Grid(NamedTuple):
    """For each token of some rows, one row behind the other: where it is. `base` is the cell of its row's first token."""

    number: Int[np.ndarray, " cells"]
    position: Int[np.ndarray, " cells"]
    base: Int[np.ndarray, " cells"]
    begin: Int[np.ndarray, " cells"]
    end: Int[np.ndarray, " cells"]
    document: Int64[np.ndarray, " cells"]

    @staticmethod
    def of(rows: Sequence[Context]) -> _Grid:
        columns: list[list[np.ndarray]] = [[] for _ in _Grid._fields]
        base = 0
        for row in rows:
            n = len(row.ids)
            begins = np.array([0, *(p[0] for p in row.parts[1:])])  # a BOS that was put in front belongs to the first part
            ends = np.r_[begins[1:], n]
            documents = np.array([source << 40 | index for _, source, index in row.parts] or [row.number], dtype=np.int64)
            part = np.searchsorted(begins, np.arange(n), side="right") - 1
            values = (np.full(n, row.number), np.arange(n), np.full(n, base), begins[part], ends[part], documents[part])
            for column, value in zip(columns, values, strict=True):
                column.append(value)
            base += n
        return _Grid(*(np.concatenate(column) for column in columns))


def part_of(row: Context, position: int) -> tuple[int, int]:
    """Positions [begin, end) of the part of a row that a position lies in: of one document alone."""
    begins = [0, *(p[0] for p in row.parts[1:]), len(row.ids)]
    return next((a, b) for a, b in pairwise(begins) if a <= position < b)


def hashed(*keys: Int[np.ndarray, " n"] | int | np.integer) -> Float64[np.ndarray, " n"]:
    """A number in [0, 1) for each place, the same for the same keys: nothing random has to be remembered."""
    x: UInt64[np.ndarray, " n"] = np.zeros(1, dtype=np.uint64)
    for key in keys:
        x = scrambled(x ^ scrambled(np.atleast_1d(np.asarray(key)).astype(np.uint64)))
    return (x >> np.uint64(11)).astype(np.float64) / 2.0**53


def _short(value: Float32[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """Values rounded to 16 significant bits. The 53 of a double then hold the sum of 2^23 of them that differ by a factor of
    2^14 without rounding, so that no order of adding changes it."""
    bits = np.ascontiguousarray(value, dtype=np.float32).view(np.uint32)
    return ((bits + np.uint32(0x80)) & np.uint32(0xFFFFFF00)).view(np.float32).astype(np.float64)
