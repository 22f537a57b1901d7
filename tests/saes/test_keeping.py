"""The best documents of each feature, against sorting everything."""

from __future__ import annotations

import numpy as np
import pytest

from pvsae.errors import UserError
from pvsae.saes.keeping import Kept, Offers

SLOTS, SIZE, WIDTH = 7, 5, 4


def offers(seed: int, n: int = 3000) -> Offers:
    """Places with many ties of keys and documents that come more than once, one for each (slot, document) of a batch."""
    g = np.random.default_rng(seed)
    return Offers(
        g.integers(0, SLOTS, n), g.integers(0, 40, n) / 8.0, g.random(n).astype(np.float32), g.integers(0, 60, n),
        g.integers(0, 9, n), g.permutation(n),
    )  # fmt: skip


def batches(every: Offers, size: int) -> list[Offers]:
    """In the order given, each batch with one place a slot and document, as the accumulator offers them."""
    out = []
    for at in range(0, len(every.slot), size):
        part = every.take(np.arange(at, min(at + size, len(every.slot))))
        order = np.lexsort((part.position, part.row, part.key))
        _, first = np.unique(part.slot[order] * 1000 + part.document[order], return_index=True)
        out.append(part.take(order[first]))
    return out


def held(kept: Kept, slot: int) -> list[tuple]:
    return [
        (kept.key[slot, c], kept.document[slot, c], kept.row[slot, c], kept.position[slot, c], kept.strip[slot, c].tolist())
        for c in kept.best(slot)
    ]


def filled(every: Offers, size: int, start: Kept | None = None) -> Kept:
    kept = start or Kept(SLOTS, SIZE, WIDTH)
    for part in batches(every, size):
        kept.offer(part, lambda some, part=part: np.repeat(part.position[some, None] % 50, WIDTH, 1) / 64)
    return kept


def test_the_best_of_distinct_documents_are_kept():
    every = offers(0)
    kept = filled(every, 100)
    for slot in range(SLOTS):
        mine = [(float(k), int(d), int(r), int(p)) for s, k, _, d, r, p in zip(*every, strict=True) if s == slot]
        best: dict[int, tuple] = {}
        for key, document, row, position in mine:
            best[document] = min(best.get(document, (9e9,)), (key, row, position))
        expected = sorted((key, document, row, position) for document, (key, row, position) in best.items())[:SIZE]
        assert [h[:4] for h in held(kept, slot)] == expected
        assert all(h[4] == [(h[3] % 50) / 64] * WIDTH for h in held(kept, slot)), "the strip is that of the place"
        assert kept.worst[slot] == expected[-1][0]


@pytest.mark.parametrize("size", [1, 17, 3000])
def test_order_and_batches_change_nothing(size):
    every = offers(1, 800)
    shuffled = every.take(np.random.default_rng(5).permutation(800))
    one, other = filled(every, 64), filled(shuffled, size)
    assert all(held(one, s) == held(other, s) for s in range(SLOTS))


def test_it_goes_on_from_its_state():
    every = offers(2)
    whole = filled(every, 100)
    half = filled(every.take(np.arange(1500)), 100)
    again = Kept(SLOTS, SIZE, WIDTH)
    again.restore({name: array.copy() for name, array in half.state().items()})
    filled(every.take(np.arange(1500, 3000)), 100, again)
    for name, array in whole.state().items():
        np.testing.assert_array_equal(array, again.state()[name])


def test_memory_is_what_is_said():
    kept = Kept(SLOTS, SIZE, WIDTH)
    arrays = [*kept.state().values(), kept.worst]
    assert sum(a.nbytes for a in arrays) == SLOTS * Kept.bytes_a_slot(SIZE, WIDTH)
    with pytest.raises(UserError, match="0 examples"):
        Kept(3, 0, 4)
