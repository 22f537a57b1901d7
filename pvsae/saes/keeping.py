"""For each of many features the few best documents of a stream, in memory of fixed size.

Knows: keys (smaller is better), that a document counts once a feature, and a strip of values around each place that is kept.
Does not know: what a key is made of (evidence.py), tokens, texts.

What is kept is a function of everything that was ever offered, not of the order or the batches in which it came: keys, then
documents decide, and a document that was pushed out can only come back with a better key than it had.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float16, Float32, Float64, Int, Int32, Int64

from pvsae.errors import UserError

AT_ONCE = 16_384  # slots whose cells are looked at together
FIELDS = ("key", "value", "document", "row", "position", "strip")


class Offers(NamedTuple):
    """Places that may be kept, at most one for each feature and document.

    Attributes:
        slot: the feature, as an index into the features that are looked at.
        key: what it is ranked by, smallest first; finite.
        value: activation there.
        document: number of the document.
        row, position: where that is.
    """

    slot: Int[np.ndarray, " n"]
    key: Float64[np.ndarray, " n"]
    value: Float32[np.ndarray, " n"]
    document: Int64[np.ndarray, " n"]
    row: Int[np.ndarray, " n"]
    position: Int[np.ndarray, " n"]

    def take(self, which: Int[np.ndarray, " m"] | Bool[np.ndarray, " n"]) -> Offers:
        """Some of them."""
        return Offers(*(column[which] for column in self))


class Kept:
    """The `size` best documents of each feature, one place in each.

    Attributes:
        key, value, document, row, position: [slots size], in no order; an empty cell has key inf.
        strip: [slots size width] fp16, the activations around the place, as shares of the activation there.
        worst: [slots] the key that a new document has to better; inf while there is room.
    """

    def __init__(self, slots: int, size: int, width: int) -> None:
        """Room for `size` documents a feature. UserError for a size below 1."""
        if size < 1:
            raise UserError(f"{size} examples a feature", "at least 1")
        self.size, self.width = size, width
        self.key: Float64[np.ndarray, "slots size"] = np.full((slots, size), np.inf)
        self.value: Float32[np.ndarray, "slots size"] = np.zeros((slots, size), np.float32)
        self.document: Int64[np.ndarray, "slots size"] = np.full((slots, size), -1, np.int64)
        self.row: Int32[np.ndarray, "slots size"] = np.zeros((slots, size), np.int32)
        self.position: Int32[np.ndarray, "slots size"] = np.zeros((slots, size), np.int32)
        self.strip: Float16[np.ndarray, "slots size width"] = np.zeros((slots, size, width), np.float16)
        self.worst: Float64[np.ndarray, " slots"] = np.full(slots, np.inf)

    @staticmethod
    def bytes_a_slot(size: int, width: int) -> int:
        """Memory that a feature takes."""
        return size * (8 + 4 + 8 + 4 + 4 + 2 * width) + 8

    def offer(self, offers: Offers, strip_of: Callable[[Int[np.ndarray, " m"]], Float[np.ndarray, "m width"]]) -> None:
        """Keeps what is better than what is held.

        Args:
            strip_of: indices into `offers` -> values around those places, over the value there; asked for what is kept alone.
        """
        hopeful = np.flatnonzero(offers.key <= self.worst[offers.slot])
        hopeful = hopeful[np.argsort(offers.slot[hopeful], kind="stable")]
        rank = _rank(offers.slot[hopeful])
        cells, of = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for turn in range(int(rank.max(initial=-1)) + 1):  # one place of each slot at a time
            mine = hopeful[rank == turn]
            for start in range(0, len(mine), AT_ONCE):
                some = mine[start : start + AT_ONCE]
                cell, taken = self._put(offers.take(some))
                cells.append(cell)
                of.append(some[taken])
        # A cell may have been written more than once; the last one counts.
        cell, at = np.concatenate(cells)[::-1], np.concatenate(of)[::-1]
        cell, last = np.unique(cell, return_index=True)
        if len(cell):
            self.strip.reshape(-1, self.width)[cell] = strip_of(at[last])

    def _put(self, new: Offers) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " m"]]:
        """Puts places of distinct slots where they belong; the cells (counted over all slots) and indices of those that stay."""
        slot, each = new.slot, np.arange(len(new.slot))
        keys, documents = self.key[slot], self.document[slot]
        same = documents == new.document[:, None]
        again = same.any(axis=1)
        last = np.where(keys == keys.max(axis=1, keepdims=True), documents, -2).argmax(axis=1)
        cell = np.where(again, same.argmax(axis=1), last)
        # A document is compared with itself by place, with others by number, where keys are equal.
        mine = (new.key, np.where(again, new.row, new.document), np.where(again, new.position, 0))
        row, position = self.row[slot, cell], self.position[slot, cell]
        other = (keys[each, cell], np.where(again, row, documents[each, cell]), np.where(again, position, 0))
        better = mine[0] < other[0]
        equal = mine[0] == other[0]
        for a, b in zip(mine[1:], other[1:], strict=True):
            better |= equal & (a < b)
            equal &= a == b
        taken = np.flatnonzero(better)
        slot, cell = slot[taken], cell[taken]
        for name in ("key", "value", "document", "row", "position"):
            getattr(self, name)[slot, cell] = getattr(new, name)[taken]
        self.worst[slot] = self.key[slot].max(axis=1)
        return slot * np.int64(self.size) + cell, taken

    def best(self, slot: int) -> Int[np.ndarray, " n"]:
        """The cells of a feature that hold something, best first."""
        cells = np.flatnonzero(np.isfinite(self.key[slot]))
        return cells[np.lexsort((self.document[slot, cells], self.key[slot, cells]))]

    def state(self) -> dict[str, np.ndarray]:
        """Everything, as arrays."""
        return {name: getattr(self, name) for name in FIELDS}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Goes on where `state` was taken."""
        for name in FIELDS:
            getattr(self, name)[...] = state[name]
        self.worst[:] = self.key.max(axis=1)


def _rank(slot: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """How many of the same slot stand before each; equal slots stand together."""
    starts = np.flatnonzero(np.r_[True, slot[1:] != slot[:-1]]) if len(slot) else np.zeros(0, np.int64)
    return np.arange(len(slot)) - np.repeat(starts, np.diff(np.r_[starts, len(slot)]))
