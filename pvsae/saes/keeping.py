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
        if not len(hopeful):
            return
        new = offers.take(hopeful)
        touched, inverse = np.unique(new.slot, return_inverse=True)
        held, cell = np.nonzero(np.isfinite(self.key[touched]))
        old = Offers(
            held, *(getattr(self, name)[touched[held], cell] for name in ("key", "value", "document", "row", "position"))
        )
        both = Offers(*(np.concatenate(pair) for pair in zip(old, new._replace(slot=inverse), strict=True)))
        origin = np.concatenate([-1 - cell, np.arange(len(hopeful))])  # below 0: a cell that is held already
        kept = _best(both, self.size)
        both, origin = both.take(kept), origin[kept]
        stays = origin < 0
        used = np.zeros((len(touched), self.size), dtype=bool)
        used[both.slot[stays], -1 - origin[stays]] = True
        self.key[touched] = np.where(used, self.key[touched], np.inf)
        fresh, of = both.take(~stays), origin[~stays]
        if len(of):
            free = np.argsort(used, axis=1, kind="stable")[fresh.slot, _rank(fresh.slot)]
            at = touched[fresh.slot], free
            for name in ("key", "value", "document", "row", "position"):
                getattr(self, name)[at] = getattr(fresh, name)
            self.strip[at] = strip_of(hopeful[of])
        self.worst[touched] = self.key[touched].max(axis=1)

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


def _best(offers: Offers, size: int) -> Int[np.ndarray, " kept"]:
    """Indices of the best place in each document of the `size` best documents of each slot, slot by slot."""
    order = np.lexsort((offers.position, offers.row, offers.key, offers.document, offers.slot))
    slot, document = offers.slot[order], offers.document[order]
    first = np.ones(len(order), dtype=bool)
    first[1:] = (slot[1:] != slot[:-1]) | (document[1:] != document[:-1])
    order = order[first]
    order = order[np.lexsort((offers.document[order], offers.key[order], offers.slot[order]))]
    return order[_rank(offers.slot[order]) < size]


def _rank(slot: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """How many of the same slot stand before each; equal slots stand together."""
    starts = np.flatnonzero(np.r_[True, slot[1:] != slot[:-1]]) if len(slot) else np.zeros(0, np.int64)
    return np.arange(len(slot)) - np.repeat(starts, np.diff(np.r_[starts, len(slot)]))
