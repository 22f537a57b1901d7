"""Harvest: the residuals that `ChatModel.capture` reads, of the wanted tokens alone, and no block too many is run."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pvsae.errors import UserError
from pvsae.models import Rendered, Residual
from pvsae.saes.corpus import Row
from pvsae.saes.harvest import harvest, passes_of, windows


def make_rows(model, lengths=(12, 30, 7, 30, 19), seed=0):
    g = np.random.default_rng(seed)
    vocab = model.hf.get_input_embeddings().weight.shape[0]
    return [Row(g.integers(3, vocab, n).astype(np.int32), g.random(n) < 0.6) for n in lengths]


def captured(model, rows, block):
    """The same by the public way: every row on its own, every token, then the mask."""
    parts = []
    for row in rows:
        n = len(row.ids)
        rendered = Rendered(tuple(row.ids.tolist()), n, (n, n), (), "")
        (residual,) = model.capture([rendered], [Residual(block)])[f"residual:all:{block}"]
        parts.append(residual[torch.from_numpy(row.keep)])
    return torch.cat(parts)


def test_it_reads_what_capture_reads(tiny_model) -> None:
    rows = make_rows(tiny_model)
    blocks = (2, 0)
    found = harvest(tiny_model, rows, blocks, torch.float32)
    assert set(found) == {0, 2}
    for block in blocks:
        wanted = captured(tiny_model, rows, block)
        assert found[block].shape == wanted.shape
        torch.testing.assert_close(found[block], wanted, rtol=2e-4, atol=2e-4)


def test_one_row_alone_is_the_same_to_the_bit(tiny_models) -> None:
    model = tiny_models("qwen2")
    (row,) = make_rows(model, (25,))
    assert torch.equal(harvest(model, [row], [1], torch.float32)[1], captured(model, [row], 1))
    assert torch.equal(harvest(model, [row], [1], torch.bfloat16)[1], captured(model, [row], 1).bfloat16())


def test_only_the_needed_blocks_run_and_once(tiny_models) -> None:
    model = tiny_models("qwen2")
    ran: list[int] = []
    handles = [b.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, b in enumerate(model.blocks)]
    handles.append(model.hf.get_output_embeddings().register_forward_hook(lambda *_: ran.append(99)))
    try:
        harvest(model, make_rows(model), (2, 0), torch.float32)
    finally:
        for handle in handles:
            handle.remove()
    assert ran == [0, 1, 2]
    assert not model.stack._handles


def test_an_unknown_block_is_an_error(tiny_models) -> None:
    with pytest.raises(UserError, match="block 4"):
        harvest(tiny_models("qwen2"), make_rows(tiny_models("qwen2")), (4,), torch.float32)


def test_what_does_not_fit_into_memory_is_run_in_parts(tiny_models, monkeypatch) -> None:
    model = tiny_models("qwen2")
    rows = make_rows(model)
    whole = harvest(model, rows, (1,), torch.float32)[1]
    forward, sizes = model.forward, []

    def small(batch, **options):
        sizes.append(len(batch.input_ids))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(batch, **options)

    monkeypatch.setattr(model, "forward", small)
    torch.testing.assert_close(harvest(model, rows, (1,), torch.float32)[1], whole, rtol=1e-4, atol=1e-4)
    assert max(sizes[-2:]) <= 2


def test_passes_hold_every_row_once_and_keep_to_the_limit() -> None:
    rows = [Row(np.full(1 + (i * 7) % 40, i, np.int32), np.ones(1 + (i * 7) % 40, bool)) for i in range(300)]
    groups = list(windows(iter(rows), 256, 4))
    assert [r.ids[0] for g in groups for r in g] == list(range(300))
    assert all(1024 <= sum(len(r.ids) for r in g) < 1024 + 41 for g in groups[:-1])
    padding = 0
    for number, group in enumerate(groups):
        passes = passes_of(group, 256, (0, number))
        assert sorted(r.ids[0] for p in passes for r in p) == [r.ids[0] for r in group]
        for some in passes:
            width = max(len(r.ids) for r in some)
            assert width * len(some) <= 256
            padding += sum(width - len(r.ids) for r in some)
        again = [[r.ids[0] for r in p] for p in passes_of(group, 256, (0, number))]
        assert again == [[r.ids[0] for r in p] for p in passes]
    assert padding < 0.25 * sum(len(r.ids) for r in rows)
