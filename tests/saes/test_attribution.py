"""First-order effects of latents on answers, beside what silencing the latent really does."""

from __future__ import annotations

import pytest
import torch

from pvsae.errors import UserError
from pvsae.models.batch import TokenBatch
from pvsae.saes.attribution import Effects, attribution, effects
from pvsae.saes.dictionary import SAE, SAEInfo
from pvsae.saes.encodings import Side, encode_pairs, encode_side, latent_diff

BLOCK = 1


@pytest.fixture(scope="module")
def rows(tiny_models):
    model = tiny_models("qwen2")
    prompts = [[{"role": "user", "content": f"What is a {word}?"}] for word in ("ferry", "clock", "kitchen", "mountain")]
    answers = ("A boat in the harbour.", "Nobody knows why.", "It has stopped", "A tall one, and dark.")
    return [model.chat.with_answer_text(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]


@pytest.fixture(scope="module")
def sae(tiny_models) -> SAE:
    """Latents that are mostly active, with rows of their own."""
    g = torch.Generator().manual_seed(0)
    d, n = tiny_models("qwen2").d_model, 32
    dec = torch.randn(n, d, generator=g) / d**0.5
    enc = torch.randn(d, n, generator=g) / d**0.5
    return SAE(enc, torch.zeros(n), dec, torch.zeros(d), torch.full((n,), 0.05), info=SAEInfo(model="tiny", block=BLOCK), ref="t")


def loss_without(model, sae, row, latent: int, share: float) -> float:
    """Mean loss of an answer where a share of the latent's contribution is taken out of the residual, a hook of our own."""
    batch = TokenBatch.build([row])

    def silence(_module, _args, output):
        h = output if torch.is_tensor(output) else output[0]
        h = h - share * sae.encode(h)[..., latent, None] * sae.W_dec[latent]
        return h if torch.is_tensor(output) else (h, *output[1:])

    handle = model.blocks[BLOCK].register_forward_hook(silence)
    try:
        with torch.no_grad():
            logprobs = model.hf(batch.input_ids).logits[0].double().log_softmax(-1)
    finally:
        handle.remove()
    start, end = row.answer
    return -float(logprobs[start - 1 : end - 1].gather(-1, batch.input_ids[0, start:end, None]).mean())


def test_an_effect_is_the_slope_of_the_loss_as_the_latent_is_silenced(tiny_models, sae, rows) -> None:
    model = tiny_models("qwen2")
    model.hf.zero_grad(set_to_none=True)  # other tests share the model
    found = effects(model, sae, BLOCK, rows, range(len(rows)), batch_tokens=64)
    share = 1e-3
    for i, row in enumerate(rows):
        for latent in (0, 7, 31):
            slope = (loss_without(model, sae, row, latent, share) - loss_without(model, sae, row, latent, -share)) / (2 * share)
            assert float(found.effect[i, latent]) == pytest.approx(slope, abs=2e-3, rel=2e-2)
    assert found.loss == pytest.approx(sum(loss_without(model, sae, row, 0, 0.0) for row in rows) / len(rows), abs=1e-4)
    assert all(p.grad is None for p in model.hf.parameters())


def test_batches_and_groups_change_no_number(tiny_models, sae, rows) -> None:
    model = tiny_models("qwen2")
    one = effects(model, sae, BLOCK, rows, "abab", batch_tokens=1)
    all_at_once = effects(model, sae, BLOCK, rows, "abab", batch_tokens=4096)
    each = effects(model, sae, BLOCK, rows, range(4))
    torch.testing.assert_close(one.effect, all_at_once.effect, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(one.effect[0], each.effect[[0, 2]].mean(0), atol=1e-5, rtol=1e-4)


def test_a_planted_cause_is_ranked_first(tiny_models, sae) -> None:
    """A latent whose row is the direction that makes the unwanted answers' tokens likelier, by construction."""
    g = torch.Generator().manual_seed(1)
    wanted, unwanted = torch.randn(12, 40, generator=g) * 0.1, torch.randn(12, 40, generator=g) * 0.1
    unwanted[:, 17] += 1.0
    unwanted[:, 3] -= 0.5
    groups = [str(i) for i in range(12)]
    shuffled = [groups[i] for i in range(11, -1, -1)]
    table = attribution(Effects(unwanted, groups, 1.0), Effects(wanted.flip(0), shuffled, 1.0))
    assert table["latent"].tolist()[:2] == [17, 3]
    assert table["attribution"].iloc[0] == pytest.approx(float((unwanted - wanted)[:, 17].mean()), abs=1e-6)
    assert table["q"].iloc[0] < 1e-4
    with pytest.raises(UserError, match="the same prompts"):
        attribution(Effects(unwanted, groups, 1.0), Effects(wanted, [f"{g}!" for g in groups], 1.0))


def test_one_side_is_what_the_pairs_have_on_that_side(tiny_models, sae, rows, tmp_path) -> None:
    model = tiny_models("qwen2")
    both = encode_pairs(model, sae, BLOCK, (rows[:2], rows[2:]), ["x", "y"])
    first, second = (encode_side(model, sae, BLOCK, some, ["x", "y"]) for some in (rows[:2], rows[2:]))
    torch.testing.assert_close(first.activation, both.activation[0])
    torch.testing.assert_close(second.firing, both.firing[1])
    first.save(tmp_path)
    torch.testing.assert_close(Side.load(tmp_path).activation, first.activation)
    diff = latent_diff(first, second).set_index("latent")
    for latent in diff.index:
        assert diff.loc[latent, "difference"] == pytest.approx(float(both.difference[latent]), abs=1e-5)
    assert diff["difference"].abs().is_monotonic_decreasing
    with pytest.raises(UserError, match="the same prompts"):
        latent_diff(first, Side(second.activation, second.firing, second.highest, ["x", "z"], 1, 0.0))


def test_answers_that_cannot_be_read_are_refused(tiny_models, sae, rows) -> None:
    model = tiny_models("qwen2")
    with pytest.raises(UserError, match="answer 0 is empty"):
        effects(model, sae, BLOCK, [model.chat.prompt([{"role": "user", "content": "Why?"}])], ["a"])
    with pytest.raises(UserError, match="0 answers"):
        effects(model, sae, BLOCK, [], [])
