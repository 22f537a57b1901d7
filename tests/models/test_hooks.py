"""The laws of the hook API, each on Qwen2, Qwen3, Llama and a real pretrained model."""

import copy
from contextlib import suppress

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from pvsae.errors import UserError
from pvsae.models import (
    Ablate,
    Add,
    AddFeature,
    Cap,
    Clamp,
    Direction,
    LastPrompt,
    Positions,
    Projection,
    Reconstruct,
    Residual,
    SpanMean,
    TokenBatch,
    load,
)
from tests.models.rows import batch_of, direction, logits_of, logits_with_cache, prompt_of, rendered_rows
from tests.models.test_interventions import ReluDictionary

CLOSE = {"atol": 2e-4, "rtol": 1e-4}  # fp32; logits are of the order of 10
POSITIONS = ("prompt", "response", "all")


def dictionary_for(model):
    g = torch.Generator().manual_seed(5)
    return ReluDictionary(torch.randn(model.d_model, 7, generator=g), torch.randn(7, model.d_model, generator=g))


def each_kind(model, positions):
    """One intervention of every kind, on different blocks, all of them with an effect."""
    d = dictionary_for(model)
    return [
        Add(direction(model, 1), 0, 1.5, positions),
        Cap(direction(model, 2), 1, -0.1, "above", positions),
        Ablate(direction(model, 3), 1, positions),
        AddFeature(d, 2, 1.0, 2, positions),
        Clamp(d, 3, 2.0, 2, positions),
        Reconstruct(d, 2, 3, tuple(model.tokenizer.all_special_ids), positions),
    ]


def count_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf.modules())


def test_strength_zero_gives_the_same_bits(tiny_model):
    rows = rendered_rows(tiny_model)
    plain = logits_of(tiny_model, rows, side="left")
    v = direction(tiny_model)
    zero = [Add(v, 0, 0.0), Add(v, 1, -0.0, "response"), AddFeature(dictionary_for(tiny_model), 1, 0.0, 2)]
    assert all(torch.equal(a, b) for a, b in zip(plain, logits_of(tiny_model, rows, zero, "left"), strict=True))
    assert not torch.equal(plain[0], logits_of(tiny_model, rows, [Add(v, 0, 0.5)], "left")[0])


@pytest.mark.parametrize("positions", POSITIONS)
def test_batched_with_padding_is_one_by_one(tiny_model, positions):
    rows, edits = rendered_rows(tiny_model), each_kind(tiny_model, positions)
    alone = [logits_of(tiny_model, [row], edits)[0] for row in rows]
    plain = logits_of(tiny_model, rows)
    for side in ("left", "right"):
        for together, one, unedited in zip(logits_of(tiny_model, rows, edits, side), alone, plain, strict=True):
            torch.testing.assert_close(together, one, **CLOSE)
            assert (one - unedited).abs().max() > 0.05, "the edits do something"


@pytest.mark.parametrize("positions", POSITIONS)
def test_with_a_cache_is_without(tiny_model, positions):
    """Positions mean the same at prefill and at every decode step, or these would differ."""
    rows, edits = rendered_rows(tiny_model), each_kind(tiny_model, positions)
    for cached, whole in zip(logits_with_cache(tiny_model, rows, edits), logits_of(tiny_model, rows, edits), strict=True):
        torch.testing.assert_close(cached, whole, **CLOSE)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_an_edit_takes_place_at_its_positions_and_nowhere_else(tiny_model, positions, side):
    rows = rendered_rows(tiny_model)
    v, block = direction(tiny_model), 1
    batch = batch_of(tiny_model, rows, side)
    seen = []
    handle = tiny_model.blocks[block + 1].register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    try:
        for edits in ([], [Add(v, block, 3.0, positions)]):
            with torch.no_grad(), tiny_model.hooks(edits):
                tiny_model.forward(batch)
    finally:
        handle.remove()
    plain, edited = seen
    for i, row in enumerate(rows):
        offset = batch.input_ids.shape[1] - len(row.ids) if side == "left" else 0
        start, end = {"prompt": (0, row.n_prompt), "response": (row.n_prompt - 1, len(row.ids)), "all": (0, len(row.ids))}[
            positions
        ]
        here = torch.zeros(batch.input_ids.shape[1], dtype=torch.bool)
        here[offset + start : offset + end] = True
        torch.testing.assert_close(edited[i][here], plain[i][here] + 3.0 * v.values)
        assert torch.equal(edited[i][~here], plain[i][~here]), "not a bit elsewhere, padding included"


def test_order_is_the_order_given_and_outer_contexts_come_first(tiny_model):
    rows = rendered_rows(tiny_model)[:1]
    v, w = direction(tiny_model, 1), direction(tiny_model, 1, norm=5.0)
    read = Residual(1)
    key = read.key
    plain = tiny_model.capture(rows, [read])[key][0]
    u = v.unit
    ablated = plain - (plain @ u)[:, None] * u
    first_add = tiny_model.capture(rows, [read], [Add(w, 1), Ablate(v, 1)])[key][0]
    first_ablate = tiny_model.capture(rows, [read], [Ablate(v, 1), Add(w, 1)])[key][0]
    torch.testing.assert_close(first_add, ablated, **CLOSE)
    torch.testing.assert_close(first_ablate, ablated + w.values, **CLOSE)
    with tiny_model.hooks([Add(w, 1)]):
        torch.testing.assert_close(tiny_model.capture(rows, [read], [Ablate(v, 1)])[key][0], ablated, **CLOSE)
    with tiny_model.hooks([Ablate(v, 1)]):
        torch.testing.assert_close(tiny_model.capture(rows, [read], [Add(w, 1)])[key][0], ablated + w.values, **CLOSE)
    with tiny_model.hooks([], [read]) as outer, tiny_model.hooks([Add(w, 1)]), torch.no_grad():
        tiny_model.forward(batch_of(tiny_model, rows))
        torch.testing.assert_close(outer.take()[key][0][0], plain + w.values, **CLOSE)
        assert outer.take() == {key: []}, "what is taken is gone"


def test_a_capture_sees_the_edited_residual_and_later_blocks_feel_it(tiny_model):
    rows = rendered_rows(tiny_model)
    v, blocks = direction(tiny_model), tuple(range(tiny_model.n_blocks))
    read = SpanMean(blocks, "answer")
    plain = tiny_model.capture(rows, [read])[read.key]
    edited = tiny_model.capture(rows, [read], [Add(v, 1, 2.0, "response")])[read.key]
    assert torch.equal(plain[:, 0], edited[:, 0])
    torch.testing.assert_close(edited[:, 1], plain[:, 1] + 2.0 * v.values, **CLOSE)
    assert (edited[:, 2] - plain[:, 2]).norm(dim=-1).min() > 0.5


def test_reconstruct_leaves_first_and_special_tokens_alone(tiny_model):
    """Which tokens those are is the same with padding on either side, in a raw call, and one token at a time with a cache."""
    rows, block = rendered_rows(tiny_model), 1
    special = tuple(dict.fromkeys([*tiny_model.tokenizer.all_special_ids, rows[0].ids[-1]]))  # one that an answer holds, too
    edit = Reconstruct(dictionary_for(tiny_model), block, 2, special)
    read = Residual(block)
    plain = tiny_model.capture(rows, [read])[read.key]
    edited = tiny_model.capture(rows, [read], [edit])[read.key]
    for row, before, after in zip(rows, plain, edited, strict=True):
        left = torch.tensor([i < 2 or token in special for i, token in enumerate(row.ids)])
        assert torch.equal(after[left], before[left])
        torch.testing.assert_close(after[~left], edit.dictionary(before)[~left], **CLOSE)
        assert (~left).any()
    whole = logits_of(tiny_model, rows, [edit])
    for side in ("left", "right"):
        for together, one in zip(logits_of(tiny_model, rows, [edit], side), whole, strict=True):
            torch.testing.assert_close(together, one, **CLOSE)
    for cached, one in zip(logits_with_cache(tiny_model, rows, [edit]), whole, strict=True):
        torch.testing.assert_close(cached, one, **CLOSE)
    batch = batch_of(tiny_model, rows, "left")
    real = batch.attention_mask.bool()
    with torch.no_grad(), tiny_model.hooks([edit]):
        raw = tiny_model.hf(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids
        ).logits
        again = tiny_model.hf(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits  # positions from the mask
        for i, one in enumerate(whole):
            torch.testing.assert_close(raw[i][real[i]], one, **CLOSE)
        assert again.shape == raw.shape
        with pytest.raises(UserError, match="embeddings"):
            tiny_model.hf(inputs_embeds=torch.zeros(1, 3, tiny_model.d_model))


def test_where_a_token_stands_is_known_without_position_ids(tiny_model):
    """From the mask where there is one, else from the length of the cache: the first tokens keep their residual, others not."""
    rows, block, first = rendered_rows(tiny_model), 1, 2
    edit = Reconstruct(dictionary_for(tiny_model), block, first, tuple(tiny_model.tokenizer.all_special_ids))
    batch = batch_of(tiny_model, rows, "left")
    seen = []
    handle = tiny_model.blocks[block + 1].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )

    @torch.no_grad()
    def kept(edits, **call):
        """Which residuals an edited call leaves as they are in the call without edits, and what it returns."""
        seen.clear()
        with tiny_model.hooks([]):
            tiny_model.hf(**{**call, "past_key_values": copy.deepcopy(call.get("past_key_values"))})
        with tiny_model.hooks(edits):
            out = tiny_model.hf(**call, use_cache=True)
        before, after = seen
        return (before == after).all(-1), out

    try:
        same, _ = kept([edit], input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        for row, mask, found in zip(rows, batch.attention_mask.bool(), same, strict=True):
            wanted = [i < first or token in edit.skip_ids for i, token in enumerate(row.ids)]
            assert found[mask].tolist() == wanted
        ids = torch.tensor([[token for token in rows[0].ids if token not in edit.skip_ids][:7]], device=tiny_model.device)
        same, out = kept([edit], input_ids=ids[:, :4])
        assert same.tolist() == [[True, True, False, False]]
        same, _ = kept([edit], input_ids=ids[:, 4:], past_key_values=out.past_key_values)
        assert same.tolist() == [[False, False, False]], "a cached step goes on counting"
    finally:
        handle.remove()


def test_hooks_are_gone_after_an_exception(tiny_model):
    rows = rendered_rows(tiny_model)
    before = count_hooks(tiny_model)
    plain = logits_of(tiny_model, rows)

    class Fails(Add):
        def edit(self, device, dtype):
            raise RuntimeError("inside of a hook")

    with pytest.raises(RuntimeError, match="inside of a hook"):
        logits_of(tiny_model, rows, [Add(direction(tiny_model), 0), Fails(direction(tiny_model), 2)])
    assert count_hooks(tiny_model) == before
    assert tiny_model.stack.positions is None
    with suppress(KeyError), tiny_model.hooks([Add(direction(tiny_model), 0)], [LastPrompt((1,))]):
        assert count_hooks(tiny_model) > before
        raise KeyError
    assert count_hooks(tiny_model) == before
    assert all(torch.equal(a, b) for a, b in zip(plain, logits_of(tiny_model, rows), strict=True))


def test_only_the_blocks_that_are_needed_run(tiny_model):
    rows = rendered_rows(tiny_model)
    ran = []
    norm = tiny_model.decoder.norm
    watched = {**dict(enumerate(tiny_model.blocks)), "norm": norm, "head": tiny_model.hf.lm_head}
    handles = [m.register_forward_pre_hook(lambda *_, name=name: ran.append(name)) for name, m in watched.items()]

    def run(captures, **options):
        ran.clear()
        with torch.no_grad(), tiny_model.hooks([Add(direction(tiny_model), 2)], captures) as session:
            tiny_model.forward(batch_of(tiny_model, rows), **options)
            return session.take()

    try:
        taken = run([LastPrompt((1, 0))], logits=None)
        assert ran == [0, 1]
        assert [len(v) for v in taken.values()] == [1]
        run([LastPrompt((0,)), SpanMean((2,), "prompt")], logits=None)
        assert ran == [0, 1, 2]
        run([], logits=None)
        assert ran == []
        run([LastPrompt((0,))], logits="last")
        assert ran == [*range(tiny_model.n_blocks), "norm", "head"]
        run([LastPrompt((0,))], logits=None, use_cache=True)
        assert ran == [*range(tiny_model.n_blocks), "norm"]
    finally:
        for handle in handles:
            handle.remove()


def test_last_logits_are_those_after_each_rows_last_token(tiny_model):
    rows = rendered_rows(tiny_model)
    last = torch.stack([x[-1] for x in logits_of(tiny_model, rows)])
    for side in ("left", "right"):
        with torch.no_grad():
            found = tiny_model.forward(batch_of(tiny_model, rows, side), logits="last").logits
        torch.testing.assert_close(found, last, **CLOSE)
    edits = [Add(direction(tiny_model), 1, 2.0, "response")]
    found = tiny_model.next_token_logprobs(rows, edits, batch_size=2)
    prompts = [prompt_of(row) for row in rows]
    expected = torch.stack([x[-1] for x in logits_of(tiny_model, prompts, edits)]).log_softmax(-1)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_bad_input_is_refused_before_any_forward_pass(tiny_model):
    v, n = direction(tiny_model), tiny_model.n_blocks
    ran = []
    handle = tiny_model.blocks[0].register_forward_pre_hook(lambda *_: ran.append(1))
    wrong = [
        ([Add(v, n)], [], f"block {n} of a model with {n} blocks"),
        ([Add(v, -1)], [], "block -1"),
        ([Add(Direction(torch.ones(tiny_model.d_model + 1)), 0)], [], "d_model"),
        ([Add(Direction(torch.full((tiny_model.d_model,), float("nan"))), 0)], [], "NaN"),
        ([Add(v, 0, positions="answers")], [], "'answers'"),
        ([], [LastPrompt((0, n))], f"block {n}"),
        ([], [LastPrompt(())], "no block"),
        ([], [SpanMean((0,), "reply")], "'reply'"),
        ([], [SpanMean((0,)), SpanMean((0,))], "same key"),
    ]
    try:
        for edits, reads, message in wrong:
            with pytest.raises(UserError, match=message), tiny_model.hooks(edits, reads):
                pass
            with pytest.raises(UserError, match=message):
                tiny_model.capture(rendered_rows(tiny_model), reads or [LastPrompt((0,))], edits)
    finally:
        handle.remove()
    assert not ran


def test_a_raw_call_edits_every_real_token_and_refuses_what_it_cannot_know(tiny_model):
    rows = rendered_rows(tiny_model)
    edits = [Add(direction(tiny_model), 1, 2.0)]
    batch = batch_of(tiny_model, rows, "left")
    real = batch.attention_mask.bool()
    with torch.no_grad(), tiny_model.hooks(edits, [SpanMean((1,), "all")]) as session:
        raw = tiny_model.hf(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids
        ).logits
        (means,) = session.take().values()
        alone = tiny_model.hf(torch.tensor([rows[0].ids])).logits[0]
    for i, expected in enumerate(logits_of(tiny_model, rows, edits)):
        torch.testing.assert_close(raw[i][real[i]], expected, **CLOSE)
    torch.testing.assert_close(alone, logits_of(tiny_model, rows[:1], edits)[0], **CLOSE)
    known = tiny_model.capture(rows, [SpanMean((1,), "all")], edits)
    torch.testing.assert_close(means[0], *known.values(), **CLOSE)
    ids = torch.tensor([rows[0].ids])
    for edit in (Add(direction(tiny_model), 1, positions="prompt"), Ablate(direction(tiny_model), 0, "response")):
        with pytest.raises(UserError, match="positions"), tiny_model.hooks([edit]), torch.no_grad():
            tiny_model.hf(ids)
    for read in (LastPrompt((0,)), SpanMean((0,), "answer")):
        with pytest.raises(UserError, match="prompt"), tiny_model.hooks([], [read]), torch.no_grad():
            tiny_model.hf(ids)


def test_session_at_tells_a_raw_call_its_positions(tiny_model):
    rows = rendered_rows(tiny_model)[:1]
    edits = [Add(direction(tiny_model), 1, 2.0, "response")]
    with torch.no_grad(), tiny_model.hooks(edits) as session, session.at(batch_of(tiny_model, rows).positions):
        raw = tiny_model.hf(torch.tensor([rows[0].ids])).logits[0]
    torch.testing.assert_close(raw, logits_of(tiny_model, rows, edits)[0], **CLOSE)


def test_inference_mode_leaves_nothing_that_training_could_not_use(tiny_models):
    model = tiny_models("llama")
    row = rendered_rows(model)[:1]
    with model.hooks([Ablate(direction(model), 1)]):
        with torch.inference_mode():
            model.forward(batch_of(model, row))
        loss = model.forward(batch_of(model, row)).logits.square().mean()
        grad = torch.autograd.grad(loss, model.hf.get_input_embeddings().weight)[0]
    assert grad.abs().max() > 0


# --- training ---------------------------------------------------------------------------------------------------------


def trainable(folder, chat, dtype=torch.float64):
    """A fresh model in double precision with a LoRA whose B is not zero, and its LoRA parameters."""
    model = load(folder, device="cpu", chat=chat)
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], init_lora_weights=False)
    inject_adapter_in_model(config, model.hf)
    model.hf.to(dtype)
    return model, [p for name, p in model.hf.named_parameters() if "lora_" in name]


def loss_of(model, batch):
    logits = model.forward(batch).logits
    targets = batch.input_ids[:, 1:][batch.positions.answer[:, 1:]]
    return torch.nn.functional.cross_entropy(logits[:, :-1][batch.positions.answer[:, 1:]], targets)


@pytest.fixture
def chat(arch):
    return "plain" if arch == "stories260k" else "auto"


def test_gradients_through_an_add_are_those_of_a_bias(tiny_folder, chat):
    """Adding a vector to a block's output is a bias of its down projection, which autograd knows without any hook of ours."""
    model, lora = trainable(tiny_folder, chat)
    batch = batch_of(model, rendered_rows(model))
    v = direction(model)
    with model.hooks([Add(v, 1, 2.5)]):
        hooked = loss_of(model, batch)
        hooked_grads = torch.autograd.grad(hooked, lora)
    down = model.blocks[1].mlp.down_proj
    down.base_layer.bias = torch.nn.Parameter(2.5 * v.values.double(), requires_grad=False)
    explicit = loss_of(model, batch)
    explicit_grads = torch.autograd.grad(explicit, lora)
    torch.testing.assert_close(hooked, explicit, rtol=1e-5, atol=0)
    for a, b in zip(hooked_grads, explicit_grads, strict=True):  # norms work in fp32 whatever the model's dtype
        assert (a - b).norm() <= 1e-4 * b.norm()
        assert b.norm() > 0


@pytest.mark.parametrize("positions", POSITIONS)
def test_gradients_through_edits_and_captures_are_finite_differences(tiny_folder, chat, positions):
    model, lora = trainable(tiny_folder, chat)
    batch = batch_of(model, rendered_rows(model))
    edits = [Add(direction(model, 1), 0, 1.5, positions), AddFeature(dictionary_for(model), 2, 1.0, 1, positions)]
    read = SpanMean((2,), "answer")

    def loss():
        with model.hooks(edits, [read]) as session:
            main = loss_of(model, batch)
            return main + 1e-2 * session.take()[read.key][0].double().square().sum()

    grads = torch.autograd.grad(loss(), lora)
    step, eps = [g / torch.cat([x.flatten() for x in grads]).norm() for g in grads], 1e-4
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, s in zip(lora, step, strict=True):
                p += sign * eps * s
            losses.append(loss().item())
            for p, s in zip(lora, step, strict=True):
                p -= sign * eps * s
    slope = (losses[0] - losses[1]) / (2 * eps)
    expected = torch.cat([g.flatten() for g in grads]).norm().item()
    assert slope == pytest.approx(expected, rel=2e-3)


def test_gradient_checkpointing_gives_the_same_gradients(tiny_folders):
    model, lora = trainable(tiny_folders("qwen2"), "auto")
    batch = batch_of(model, rendered_rows(model))
    edits = [Add(direction(model), 1, 2.0, "response"), Ablate(direction(model, 4), 2)]
    model.hf.train()
    with model.hooks(edits):
        plain = torch.autograd.grad(loss_of(model, batch), lora)
        model.hf.gradient_checkpointing_enable()
        loss = loss_of(model, batch)
    again = torch.autograd.grad(loss, lora)
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b)


def test_one_hook_a_block_and_none_where_nothing_is_done(tiny_model):
    logits_of(tiny_model, rendered_rows(tiny_model))
    before = [len(b._forward_hooks) for b in tiny_model.blocks]
    v = direction(tiny_model)
    with tiny_model.hooks([Add(v, 1), Add(v, 1)], [LastPrompt((1, 3))]), tiny_model.hooks([Ablate(v, 1)]):
        now = [len(b._forward_hooks) - n for b, n in zip(tiny_model.blocks, before, strict=True)]
    assert now == [0, 1, 0, 1] + [0] * (tiny_model.n_blocks - 4)


def test_vectors_are_cast_once_and_not_at_every_step(tiny_models):
    model, casts = tiny_models("qwen2"), []

    class Counting(Add):
        def edit(self, device, dtype):
            casts.append(dtype)
            return super().edit(device, dtype)

    step = TokenBatch(
        torch.tensor([[5]]), torch.ones(1, 1).long(), torch.zeros(1, 1).long(), Positions.decode(1), left_padded=False
    )
    with torch.no_grad(), model.hooks([Counting(direction(model), 1, 1.0, "response")]):
        past = None
        for _ in range(4):
            past = model.forward(step, past=past, use_cache=True).past
    assert casts == [torch.float32]


def test_edits_and_captures_keep_their_precision_under_autocast(tiny_models):
    model = tiny_models("qwen2")
    u, rows = direction(model, norm=1.0), rendered_rows(model)
    watch = Projection((u,), 2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), model.hooks([Ablate(u, 2)], [watch]) as session:
        model.forward(batch_of(model, rows))
    (left,) = session.take()[watch.key]
    assert all(values.dtype is torch.float32 for values in left)
    assert max(float(values.abs().max()) for values in left) < 1e-5  # products in bfloat16 would leave a thousand times as much


def test_logits_at_some_positions_are_those_of_all(tiny_model):
    rows = rendered_rows(tiny_model)
    batch = batch_of(tiny_model, rows)
    keep = torch.tensor([1, 2, batch.input_ids.shape[1] - 1])
    with torch.no_grad():
        some, full = (tiny_model.forward(batch, logits=which).logits for which in (keep, "all"))
    assert torch.allclose(some, full[:, keep], atol=1e-5)
