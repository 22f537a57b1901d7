"""Shuffle buffer: every token comes out once, mixed, the same for all blocks, and nothing is moved."""

from __future__ import annotations

import pytest
import torch

from pvsae.errors import UserError
from pvsae.saes.buffer import ShuffleBuffer


def tokens(start: int, n: int, blocks=(2, 5), d_model: int = 8):
    """Tokens that are known by their number: column 0 holds it (exact in bf16 up to 256), the block is in column 1."""
    numbers = torch.arange(start, start + n).float()
    return {b: torch.stack([numbers, torch.full((n,), float(b)), *[-numbers] * (d_model - 2)], dim=1) for b in blocks}


def drawn(buffer, n):
    batch = buffer.take(n)
    numbers = {b: x[:, 0].float().int().tolist() for b, x in batch.items()}
    assert all((x[:, 1] == b).all() for b, x in batch.items())
    first = next(iter(numbers.values()))
    assert all(v == first for v in numbers.values())  # the same tokens for every block
    return first


def test_every_token_comes_out_once_in_random_order() -> None:
    buffer = ShuffleBuffer((2, 5), 64, 8, seed=0)
    seen, at = [], 0
    while at < 256 or len(buffer):
        while at < 256 and buffer.free >= 16:
            buffer.add(tokens(at, 16))
            at += 16
        seen += drawn(buffer, 8)
    assert sorted(seen) == list(range(256))
    assert seen != sorted(seen)
    late = [position - number for position, number in enumerate(seen)]
    assert max(late) > 48  # some stay long
    assert min(late) >= -64


def test_draws_are_uniform() -> None:
    counts = torch.zeros(20)
    for seed in range(400):
        buffer = ShuffleBuffer((1,), 20, 4, seed=seed)
        buffer.add(tokens(0, 10, (1,), 4))
        buffer.add(tokens(10, 10, (1,), 4))
        counts[torch.tensor(drawn(buffer, 5))] += 1
    assert (counts - 100).abs().max() < 4.5 * (400 * 0.25 * 0.75) ** 0.5


def test_nothing_is_copied_as_a_whole() -> None:
    buffer = ShuffleBuffer((2,), 32, 8)
    buffer.add(tokens(0, 32, (2,)))
    place, before = buffer.data[2].data_ptr(), buffer.data[2].clone()
    out = set(drawn(buffer, 12))
    assert torch.equal(buffer.data[2], before)  # taking moves nothing
    buffer.add(tokens(100, 7, (2,)))
    assert buffer.data[2].data_ptr() == place
    changed = (buffer.data[2] != before).any(1)
    assert int(changed.sum()) == 7  # only what came in was written,
    assert set(before[changed][:, 0].int().tolist()) <= out  # and only over what had been taken


def test_it_holds_bf16_or_what_was_asked_for() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        buffer = ShuffleBuffer((1,), 16, 8, dtype=dtype)
        values = torch.randn(16, 8)
        buffer.add({1: values})
        assert buffer.data[1].dtype is dtype
        assert buffer.data[1].shape == (16, 8)
        out = buffer.take(16)[1]
        assert out.dtype is dtype
        assert torch.equal(out[:, 0].sort().values, values.to(dtype)[:, 0].sort().values)


def test_only_kept_tokens_go_in_and_batches_are_tensors_of_their_own() -> None:
    buffer = ShuffleBuffer((2, 5), 16, 8)
    buffer.add(tokens(0, 10), torch.tensor([1, 3, 8]))
    assert len(buffer) == 3
    batch = buffer.take(3)
    assert sorted(batch[2][:, 0].int().tolist()) == [1, 3, 8]
    batch[2].zero_()
    assert buffer.data[2][:3].any()


def test_a_restored_buffer_gives_the_same_bits() -> None:
    def draws(buffer):
        found = [buffer.take(5)]
        buffer.add(tokens(200, 5))
        return [*found, buffer.take(7), buffer.take(3)]

    buffer = ShuffleBuffer((2, 5), 32, 8, seed=3)
    buffer.add(tokens(0, 32))
    buffer.take(9)
    buffer.add(tokens(100, 4))
    state = buffer.state()
    wanted = draws(buffer)
    other = ShuffleBuffer((2, 5), 32, 8, seed=99)
    other.add(tokens(50, 30))
    for again in (other, buffer):
        again.restore(state)
        assert len(again) == 27
        for a, b in zip(wanted, draws(again), strict=True):
            assert all(torch.equal(a[k], b[k]) for k in a)


def test_misuse_is_told() -> None:
    buffer = ShuffleBuffer((2,), 8, 8)
    with pytest.raises(ValueError, match="room for 8"):
        buffer.add(tokens(0, 9, (2,)))
    with pytest.raises(ValueError, match="holds 0"):
        buffer.take(1)
    with pytest.raises(UserError, match="blocks"):
        ShuffleBuffer((3,), 8, 8).restore(buffer.state())
    with pytest.raises(UserError, match="no memory"):
        ShuffleBuffer((2,), 1 << 50, 4096)
