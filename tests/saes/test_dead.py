"""Which latents are dead, and which of them a step works on."""

from __future__ import annotations

import torch

from pvsae.saes import dead
from pvsae.saes.parallel import ALONE


def silences(n_dead: int, n: int = 40, silence: int = 100) -> torch.Tensor:
    out = torch.zeros(n, dtype=torch.int64)
    out[torch.randperm(n, generator=torch.Generator().manual_seed(0))[:n_dead]] = silence
    return out


def test_the_silent_ones_are_dead() -> None:
    silent = silences(7)
    found = dead.find_later(silent, 100, 20, 10, ALONE)()
    assert torch.equal(found.rows, (silent == 100).nonzero()[:, 0])
    assert (found.chosen, found.total) == (7, 7)
    assert dead.find_later(silent, 101, 20, 10, ALONE)()[1:3] == (0, 0)


def test_of_many_some_are_chosen_and_others_the_next_time() -> None:
    seen = set()
    for silence in range(100, 400, 10):
        found = dead.find_later(silences(30, silence=silence), 100, 5, 10, ALONE)()
        assert (found.chosen, found.total) == (5, 30)
        rows = set(found.rows.tolist())
        assert len(rows) == 5
        assert rows <= set(silences(30).nonzero()[:, 0].tolist())
        seen |= rows
    assert len(seen) == 30, "each has its turn"
