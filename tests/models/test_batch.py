"""Padding, masks of positions, length sorting, and going on after running out of memory."""

import pytest
import torch

from pvsae.errors import UserError
from pvsae.models import Positions, Rendered, TokenBatch, halving_on_oom, length_sorted_batches
from tests.models.rows import rendered_rows


def row(n_prompt, n_answer, stop=1, first=10):
    """A row with its system content at [1, 2), user content at [2, n_prompt - 1), and `stop` tokens behind the answer."""
    ids = tuple(range(first, first + n_prompt + n_answer + stop))
    return Rendered(ids, n_prompt, (n_prompt, n_prompt + n_answer), (("system", 1, 2), ("user", 2, n_prompt - 1)), "")


@pytest.mark.parametrize("side", ["left", "right"])
def test_masks_agree_with_the_rows_spans(side):
    rows = [row(5, 3), row(4, 0, stop=0), row(6, 2)]
    batch = TokenBatch.build(rows, pad_id=7, side=side)
    width = max(len(r.ids) for r in rows)
    assert batch.input_ids.shape == (3, width)
    for i, r in enumerate(rows):
        offset = width - len(r.ids) if side == "left" else 0

        def at(mask, i=i, offset=offset):
            return [int(p) - offset for p in mask[i].nonzero().flatten()]

        p = batch.positions
        assert batch.input_ids[i, offset : offset + len(r.ids)].tolist() == list(r.ids)
        assert at(batch.attention_mask) == at(p.all) == at(p.span("all")) == list(range(len(r.ids)))
        assert at(p.prompt) == at(p.span("prompt")) == list(range(r.n_prompt))
        assert at(p.answer) == list(range(r.n_prompt, len(r.ids)))
        assert at(p.last_prompt) == [r.n_prompt - 1]
        assert at(p.response) == list(range(r.n_prompt - 1, len(r.ids)))
        for name in ("answer", "system", "user"):
            assert at(p.span(name)) == list(range(*r.span(name))), name
        assert not p.span("tool").any()
        assert batch.position_ids[i, offset : offset + len(r.ids)].tolist() == list(range(len(r.ids)))
    padding = ~batch.attention_mask.bool()
    assert (batch.input_ids[padding] == 7).all()
    assert batch.left_padded == (side == "left")


def test_short_cuts_say_the_same_as_the_masks():
    batches = [
        TokenBatch.build([row(5, 3), row(6, 2)]),
        TokenBatch.build([row(5, 0, stop=0), row(5, 0, stop=0)], side="left"),
        TokenBatch.build([row(5, 0, stop=0), row(3, 0, stop=0)], side="left"),
        TokenBatch.build([row(5, 1), row(3, 4)]),
    ]
    seen = set()
    for positions in [*(b.positions for b in batches), Positions.decode(3)]:
        for name, mask in (("prompt", positions.prompt), ("response", positions.response), ("all", positions.all)):
            short = positions.edit_mask(name)
            assert torch.equal(torch.full_like(mask, short) if isinstance(short, bool) else short, mask)
            seen.add((name, short if isinstance(short, bool) else "mask"))
    assert {("all", True), ("all", "mask"), ("prompt", True), ("prompt", False), ("response", True)} <= seen


def test_length_sorted_batches_hold_their_limits_and_every_row_once():
    lengths = [3, 50, 7, 7, 1, 20, 33, 2, 19, 4]
    for batch_tokens, batch_size in [(60, None), (None, 3), (60, 2), (10, None)]:
        batches = length_sorted_batches(lengths, batch_tokens=batch_tokens, batch_size=batch_size)
        assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
        flat = [lengths[i] for b in batches for i in b]
        assert flat == sorted(flat, reverse=True)
        for b in batches:
            assert batch_size is None or len(b) <= batch_size
            assert batch_tokens is None or len(b) == 1 or len(b) * max(lengths[i] for i in b) <= batch_tokens
    assert length_sorted_batches([], batch_size=4) == []
    assert len(length_sorted_batches([10] * 6, batch_tokens=30)) == 2, "rows are packed up to the limit"
    with pytest.raises(UserError, match="batch_size"):
        length_sorted_batches([1], batch_size=0)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("out of memory"), MemoryError()])
def test_out_of_memory_halves_and_goes_on(error):
    tried = []

    def run(rows):
        tried.append(list(rows))
        if len(rows) > 3:
            raise error
        return sum(rows)

    batches = [list(range(8)), list(range(8, 16)), [16]]
    done = list(halving_on_oom(batches, run))
    assert [i for rows, _ in done for i in rows] == list(range(17)), "every row once, in order"
    assert all(result == sum(rows) for rows, result in done)
    assert [len(rows) for rows in tried[:3]] == [8, 4, 2]
    second = [rows for rows in tried if rows and 8 <= rows[0] < 16]
    assert max(len(rows) for rows in second) <= 3, "the next batch is cut before it fails again"


def test_out_of_memory_with_one_row_is_said_and_other_errors_pass():
    def run(rows):
        raise RuntimeError("out of memory" if rows[0] == 2 else "something else")

    with pytest.raises(UserError, match="row 2"):
        list(halving_on_oom([[2, 3]], run))
    with pytest.raises(RuntimeError, match="something else"):
        list(halving_on_oom([[4, 5]], run))


def test_packed_rows_fill_lines_and_keep_their_positions(tiny_models) -> None:
    rows = rendered_rows(tiny_models("qwen2"))
    batch, places = TokenBatch.pack(rows, pad_id=7, width=2 * max(len(row.ids) for row in rows))
    assert batch.packed
    assert batch.to("cpu").packed
    assert sorted(places)[0] == (0, 0)
    assert len(batch.input_ids) < len(rows)
    for row, (line, at) in zip(rows, places, strict=True):
        here = slice(at, at + len(row.ids))
        assert batch.input_ids[line, here].tolist() == list(row.ids)
        assert batch.position_ids[line, here].tolist() == list(range(len(row.ids)))
        assert batch.positions.prompt[line, here].sum() == row.n_prompt
        assert batch.positions.last_prompt[line, at + row.last_prompt]
        assert batch.positions.answer[line, here].nonzero()[0] == row.n_prompt
    assert int(batch.positions.all.sum()) == sum(len(row.ids) for row in rows)
    assert int(batch.positions.last_prompt.sum()) == len(rows)
    assert (batch.input_ids[~batch.positions.all] == 7).all()
