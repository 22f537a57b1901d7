"""Captures against one row at a time with output_hidden_states, and what a capture refuses."""

from dataclasses import replace

import pytest
import torch

from pvsae.errors import UserError
from pvsae.models import Add, Direction, FeatureActs, LastPrompt, Projection, Rendered, Residual, SpanMean
from tests.models.rows import batch_of, direction, rendered_rows
from tests.models.test_hooks import dictionary_for

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@torch.no_grad()
def reference(model, row):
    """[n_blocks, tokens, d_model] of the plain model: hidden_states[b + 1]; for the last block, what the final norm is given."""
    before_norm = []
    handle = model.decoder.norm.register_forward_pre_hook(lambda module, args: before_norm.append(args[0]))
    try:
        states = model.hf(torch.tensor([row.ids]), output_hidden_states=True).hidden_states
    finally:
        handle.remove()
    return torch.cat([*states[1:-1], before_norm[0]])


def test_every_capture_is_what_a_plain_forward_pass_shows(tiny_model):
    rows, blocks = rendered_rows(tiny_model), tuple(range(tiny_model.n_blocks))
    v, w, d = direction(tiny_model, 1, norm=3.0), direction(tiny_model, 2, norm=0.1), dictionary_for(tiny_model)
    reads = {
        "prompt": SpanMean(blocks, "prompt"),
        "answer": SpanMean((3, 1), "answer"),
        "user": SpanMean((0,), "user"),
        "all": SpanMean((2,), "all"),
        "last": LastPrompt(blocks),
        "tokens": Projection((v, w), 2),
        "mean": Projection((v, w), 1, "answer"),
        "residual": Residual(3, "answer"),
        "features": FeatureActs(d, 1, "answer"),
        "some": FeatureActs(d, 1, "prompt", (4, 0)),
        "system": Residual(0, "system"),
    }
    found = tiny_model.capture(rows, list(reads.values()), batch_tokens=10**6)
    assert list(found) == [r.key for r in reads.values()]
    got = {name: found[r.key] for name, r in reads.items()}
    n, width = len(rows), tiny_model.d_model
    assert got["prompt"].shape == got["last"].shape == (n, tiny_model.n_blocks, width)
    assert got["answer"].shape == (n, 2, width)
    assert got["mean"].shape == (n, 2)
    assert {v.dtype for v in got.values() if isinstance(v, torch.Tensor)} == {torch.float32}
    units = torch.stack([v.values / v.values.norm(), w.values / w.values.norm()])
    for i, row in enumerate(rows):
        h = reference(tiny_model, row)
        answer, user, system = slice(*row.answer), slice(*row.span("user")), slice(*row.span("system"))
        expected = {
            "prompt": h[:, : row.n_prompt].mean(1),
            "answer": h[[3, 1], answer].mean(1),
            "user": h[[0], user].mean(1),
            "all": h[[2]].mean(1),
            "last": h[:, row.n_prompt - 1],
            "tokens": h[2] @ units.T,
            "mean": (h[1, answer] @ units.T).mean(0),
            "residual": h[3, answer],
            "features": d.encode(h[1, answer]),
            "some": d.encode(h[1, : row.n_prompt])[:, [4, 0]],
            "system": h[0, system],
        }
        for name, values in expected.items():
            scale = max(float(values.abs().max()), 1.0) if values.numel() else 1.0
            torch.testing.assert_close(got[name][i] / scale, values / scale, **CLOSE, msg=lambda m, name=name: f"{name}: {m}")
    assert got["system"][1].shape == (0, width), "a row without a system message has no such tokens"


def test_rows_come_back_in_their_order_whatever_the_batches(tiny_model):
    rows = rendered_rows(tiny_model) * 2
    reads = [SpanMean((1, 2), "answer"), Residual(2, "prompt")]
    whole = tiny_model.capture(rows, reads, batch_tokens=10**6)
    small = tiny_model.capture(rows, reads, batch_tokens=1)
    streamed = {i: (k, v[j]) for idx, read in tiny_model.capture_batches(rows, reads[:1], batch_tokens=90)
                for k, v in read.items() for j, i in enumerate(idx)}  # fmt: skip
    torch.testing.assert_close(whole[reads[0].key], small[reads[0].key], atol=1e-4, rtol=1e-4)
    for i, row in enumerate(rows):
        assert len(whole[reads[1].key][i]) == len(small[reads[1].key][i]) == row.n_prompt
        torch.testing.assert_close(streamed[i][1], whole[reads[0].key][i], atol=1e-4, rtol=1e-4)


def test_out_of_memory_halves_and_the_numbers_stay(tiny_model):
    rows, read = rendered_rows(tiny_model) * 2, SpanMean((2,), "answer")
    expected = tiny_model.capture(rows, [read])[read.key]
    sizes: list[int] = []

    def scarce(module, args):
        sizes.append(args[0].shape[0])
        if args[0].shape[0] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")

    handle = tiny_model.blocks[1].register_forward_pre_hook(scarce)
    try:
        found = tiny_model.capture(rows, [read])[read.key]
    finally:
        handle.remove()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert sizes[0] == 6
    assert max(sizes[-3:]) <= 2


def test_nan_activations_are_an_error_that_names_row_and_block(tiny_model):
    rows = rendered_rows(tiny_model)

    def poison(module, args, output):  # in row 0 alone, which is told by its length
        h = output[0] if isinstance(output, tuple) else output
        if h.shape[1] != len(rows[0].ids):
            return None
        bad = h.clone()
        bad[:, -1, 3] = float("nan")
        return (bad, *output[1:]) if isinstance(output, tuple) else bad

    handle = tiny_model.blocks[2].register_forward_hook(poison)
    try:
        fine = tiny_model.capture(rows, [SpanMean((0, 1), "answer")], batch_tokens=1)
        assert all(bool(v.isfinite().all()) for v in fine.values())
        for read in (SpanMean((1, 2, 3), "answer"), Residual(2, "all"), SpanMean((2,), "all")):
            with pytest.raises(UserError, match=r"row 0 at block 2"):
                tiny_model.capture(rows, [read], batch_tokens=1)
    finally:
        handle.remove()


def test_rows_that_cannot_be_captured_are_refused_before_any_forward_pass(tiny_model):
    rows = rendered_rows(tiny_model)
    bare = Rendered(rows[0].ids[: rows[0].n_prompt], rows[0].n_prompt, (rows[0].n_prompt, rows[0].n_prompt), (), "")
    long = Rendered((5,) * (tiny_model.n_ctx + 1), tiny_model.n_ctx, (tiny_model.n_ctx, tiny_model.n_ctx + 1), (), "")
    ran = []
    handle = tiny_model.blocks[0].register_forward_pre_hook(lambda *_: ran.append(1))
    try:
        with pytest.raises(UserError, match="row 3 has no 'answer'"):
            tiny_model.capture([*rows, bare], [SpanMean((0,), "answer")])
        with pytest.raises(UserError, match="row 1 has no 'system'"):
            tiny_model.capture(rows, [Projection((direction(tiny_model),), 0, "system")])
        with pytest.raises(UserError, match=f"row 3 has {tiny_model.n_ctx + 1} tokens"):
            tiny_model.capture([*rows, long], [LastPrompt((0,))])
        with pytest.raises(UserError, match="feature"):
            tiny_model.capture(rows, [FeatureActs(dictionary_for(tiny_model), 0, "answer", (7,))])
        with pytest.raises(UserError, match="d_model"):
            tiny_model.capture(rows, [Projection((Direction(torch.ones(tiny_model.d_model - 1)),), 0)])
    finally:
        handle.remove()
    assert not ran
    assert tiny_model.capture([], [LastPrompt((0,))]) == {LastPrompt((0,)).key: []}


def test_features_of_outliers_are_none(tiny_models):
    model = tiny_models("qwen2")
    rows, all_tokens = rendered_rows(model), dictionary_for(model)
    h = model.capture(rows, [Residual(1, "answer")])[Residual(1, "answer").key]
    norms = torch.cat(h).norm(dim=-1)
    picky = replace(all_tokens, limit=float(norms.median()))
    for some in (None, (4, 0)):
        reads = [FeatureActs(d, 1, "answer", some) for d in (all_tokens, picky)]
        plain, kept = (torch.cat(model.capture(rows, [read])[read.key]) for read in reads)
        long = norms > picky.limit
        assert (kept[long] == 0).all()
        assert torch.equal(kept[~long], plain[~long])
        assert (plain[long] > 0).any()


def test_keys_tell_captures_apart_and_are_stable(tiny_models):
    model = tiny_models("qwen2")
    v, w = direction(model, 1), direction(model, 2)
    reads = [
        SpanMean((0, 1, 2)), SpanMean((0, 2)), SpanMean((0,), "prompt"), LastPrompt((0, 1, 2)),
        Projection((v,), 0), Projection((w,), 0), Projection((v, w), 0),
        Projection((v,), 0, "answer"), Residual(0), Residual(1), FeatureActs(dictionary_for(model), 0),
        FeatureActs(dictionary_for(model), 0, indices=(1,)), FeatureActs(dictionary_for(model), 0, indices=(2,)),
    ]  # fmt: skip
    assert len({r.key for r in reads}) == len(reads)
    assert SpanMean((0, 1, 2)).key == "mean:answer:0-2"
    assert Projection((Direction(v.values, "another name"),), 0).key == Projection((v,), 0).key


def test_nothing_bigger_than_the_result_is_kept(tiny_models):
    """A session's results must not be views into whole residuals, which would stay alive with them."""
    model = tiny_models("qwen2")
    rows = rendered_rows(model)
    reads = [SpanMean((0, 1), "answer"), LastPrompt((0, 3)), Projection((direction(model),), 1), Residual(2, "answer")]
    with torch.no_grad(), model.hooks([Add(direction(model), 0)], reads) as session:
        model.forward(batch_of(model, rows), logits=None)
        taken = session.take()
    for read in reads:
        values = taken[read.key][0]
        tensors = values if isinstance(values, list) else [values]
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        assert sum(held.values()) <= sum(t.numel() * 4 for t in tensors), read.key


def test_a_decode_step_has_no_last_prompt_token(tiny_models):
    model = tiny_models("llama")
    from pvsae.models import Positions, TokenBatch

    step = TokenBatch(torch.tensor([[5]]), torch.ones(1, 1).long(), torch.zeros(1, 1).long(), Positions.decode(1), False)
    reads = [LastPrompt((1,)), SpanMean((1,), "answer"), Projection((direction(model),), 1)]
    with torch.no_grad(), model.hooks([], reads) as session:
        model.forward(step, logits=None)
        last, mean, projected = (values[0] for values in session.take().values())
    assert last.isnan().all()
    assert mean.isfinite().all()
    torch.testing.assert_close(mean[0] @ direction(model).unit[:, None], projected[0])
