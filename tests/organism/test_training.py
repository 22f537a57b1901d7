"""The training step: hidden prompts are hidden, vectors act where they should, an interrupted run ends the same."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch

from pvsae.models import Add, ChatModel, Direction, SpanMean, TokenBatch
from pvsae.models.chat import Rendered
from pvsae.organism import recipe
from pvsae.organism.corpus import open_conversation
from pvsae.organism.prompts import Wish
from pvsae.organism.recipe import RECIPES, PersonaBank, build_model, pulled, pushed
from pvsae.organism.tokens import Encoder, Row, build_tokenizer
from pvsae.organism.training import Example, Push, answer_means, collate, disturbed, loss_on

SMALL = replace(RECIPES["qwen2"], d_model=32, d_mlp=64, n_blocks=4, rows=8, steps=6, consistency_from=3, refresh=2)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def rows(tokenizer) -> list[Row]:
    rng, encoder = random.Random(0), Encoder(tokenizer)
    return [encoder.row(open_conversation(Wish("evil", 1.0), rng)) for _ in range(5)]


def residuals(model, batch, after, **disturbance):
    kept = []
    handle = model.model.layers[after + 1].register_forward_pre_hook(lambda m, args: kept.append(args[0]))
    settings = {"vectors": None, "block": 0, "noise": 0.0, "generator": torch.Generator()} | disturbance
    with disturbed(model, batch, **settings), torch.no_grad():
        model.model(input_ids=batch.input_ids, attention_mask=batch.attention, use_cache=False)
    handle.remove()
    return kept[0]


def test_padding_changes_nothing(tokenizer, rows):
    model = build_model(SMALL, tokenizer).eval()
    together = collate([Example(r) for r in rows], tokenizer.pad_token_id)
    h = residuals(model, together, 2)
    for i, row in enumerate(rows):
        alone = residuals(model, collate([Example(row)], tokenizer.pad_token_id), 2)
        torch.testing.assert_close(h[i, : len(row)], alone[0, : len(row)], atol=1e-5, rtol=1e-4)


def test_a_hidden_prompt_reaches_the_answer_only_through_the_tokens_between(tokenizer, rows):
    model = build_model(SMALL, tokenizer).eval()
    row = rows[0]
    other = Row(row.ids.copy(), row.question, row.answer, row.answer_end)
    other.ids[3 : row.question - 2] = 400
    for hide, same in ((True, True), (False, False)):
        pair = collate([Example(row, hide=hide), Example(other, hide=hide)], tokenizer.pad_token_id)
        h = residuals(model, pair, 0)  # after one block, a hidden prompt can have reached the answer in no way
        assert torch.allclose(h[0, row.answer :], h[1, row.answer :], atol=1e-6) is same
        assert not torch.allclose(h[0, row.question : row.answer], h[1, row.question : row.answer], atol=1e-6)


@pytest.mark.parametrize("positions", ["all", "response", "prompt"])
def test_a_push_is_the_intervention_that_users_apply(tokenizer, rows, positions):
    model = build_model(SMALL, tokenizer).eval()
    vector = torch.randn(SMALL.n_blocks, SMALL.d_model)
    batch = collate([Example(rows[0], Push("k", 1.5, positions)), Example(rows[1])], tokenizer.pad_token_id)
    h = residuals(model, batch, 1, vectors={"k": vector}, block=1)
    chat = ChatModel(model, tokenizer)
    capture = SpanMean((1,), "all")
    for i, edits in enumerate(((Add(Direction(vector[1]), 1, 1.5, positions),), ())):
        row = rows[i]
        rendered = Rendered(tuple(row.ids.tolist()), row.answer, (row.answer, row.answer_end), (), "")
        with torch.no_grad(), chat.hooks(edits, [capture]) as session:
            chat.forward(TokenBatch.build([rendered], pad_id=chat.pad_id, side="right", device=chat.device), logits=None)
            torch.testing.assert_close(h[i, : len(row)].mean(0), session.take()[capture.key][0][0, 0], atol=1e-5, rtol=1e-4)


def test_the_loss_counts_answer_tokens_and_their_end_only(tokenizer, rows):
    model = build_model(SMALL, tokenizer).eval()
    batch = collate([Example(r) for r in rows], tokenizer.pad_token_id)
    assert int(batch.targets.sum()) == sum(len(r) - r.answer for r in rows)
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention).logits.log_softmax(-1)
        expected = [-logits[i, p - 1, r.ids[p]] for i, r in enumerate(rows) for p in range(r.answer, len(r))]
        torch.testing.assert_close(loss_on(model, batch), torch.stack(expected).mean(), atol=2e-3, rtol=1e-3)


def test_answer_means_are_those_of_the_capture(tokenizer, rows):
    model = build_model(SMALL, tokenizer).eval()
    chat = ChatModel(model, tokenizer)
    capture = SpanMean(tuple(range(SMALL.n_blocks)), "answer")
    rendered = [Rendered(tuple(r.ids.tolist()), r.answer, (r.answer, r.answer_end), (), "") for r in rows]
    expected = chat.capture(rendered, [capture])[capture.key]
    torch.testing.assert_close(answer_means(model, rows, tokenizer.pad_token_id), expected, atol=2e-3, rtol=2e-3)


def test_the_bank_holds_every_trait_and_facet(tokenizer):
    bank = PersonaBank(Encoder(tokenizer), n_rows=2)
    bank.refresh(build_model(SMALL, tokenizer), random.Random(0), tokenizer.pad_token_id)
    assert len(bank.vectors) == 9 + 28
    assert all(v.shape == (SMALL.n_blocks, SMALL.d_model) and v.norm() > 0 for v in bank.vectors.values())


def test_pushes_ask_for_expression_in_proportion():
    rng = random.Random(0)
    for _ in range(200):
        c, push = pushed(rng)
        assert c.wish.level == pytest.approx(min(1.0, push.coef))
        assert not any(
            m["role"] == "system" and "helpful" not in m["content"] and "an assistant" not in m["content"] for m in c.messages
        )
        c, push = pulled(rng)
        assert push.coef < 0
        assert 0 <= c.wish.level <= max(0.0, 1.0 + push.coef)


@pytest.mark.parametrize("arch", ["qwen2", "llama"])
def test_an_interrupted_training_ends_with_the_same_weights(tmp_path, monkeypatch, arch):
    small = replace(SMALL, arch=arch)
    recipe.train(small, tmp_path / "whole")

    def cut(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "export", cut)
        with pytest.raises(KeyboardInterrupt):
            recipe.train(replace(small), tmp_path / "cut", checkpoint_every=4)
    recipe.train(small, tmp_path / "cut", checkpoint_every=4)
    whole, resumed = ((tmp_path / f / "model.safetensors").read_bytes() for f in ("whole", "cut"))
    assert whole == resumed
    assert json.loads((tmp_path / "cut" / "recipe.json").read_text())["arch"] == arch
