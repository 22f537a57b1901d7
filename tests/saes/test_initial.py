"""Initial weights in chunks and in shards are those of one call."""

from __future__ import annotations

import pytest
import torch

from pvsae.saes import initial


@pytest.mark.parametrize("chunk", [2**22, 1000, 16])
@pytest.mark.parametrize(("d_sae", "d_model"), [(1, 1), (5, 3), (15, 1), (17, 1), (33, 1), (80, 24), (49, 5), (700, 33)])
def test_they_are_the_same_numbers(monkeypatch, chunk: int, d_sae: int, d_model: int) -> None:
    monkeypatch.setattr(initial, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(7)
    whole = torch.nn.functional.normalize(torch.randn(d_sae, d_model, generator=generator), dim=1)
    for start, stop in ((0, d_sae), (0, d_sae // 3), (d_sae // 3, d_sae // 2), (d_sae // 2, d_sae)):
        out = torch.full((stop - start, d_model), torch.nan)
        initial.unit_rows_(out, d_sae, 7, start)
        assert torch.equal(out, whole[start:stop])


def test_no_more_is_made_than_a_chunk_at_a_time(monkeypatch) -> None:
    made = []
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *shape, **options: made.append(shape) or randn(*shape, **options))
    monkeypatch.setattr(initial, "CHUNK", 800)
    initial.unit_rows_(torch.empty(100, 10), 1000, 0, 100)
    assert max(rows for rows, _ in made) == 80
    assert sum(rows for rows, _ in made) == 240, "what comes after the rows that are wanted is not made"
