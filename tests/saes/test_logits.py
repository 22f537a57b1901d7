"""Promoted tokens against the plain computation, for norms of either kind."""

from __future__ import annotations

import pytest
import torch

from pvsae.errors import UserError
from pvsae.saes.logits import promoted
from pvsae.saes.pieces import Pieces


def test_promoted_tokens_are_those_of_the_plain_computation(tiny_model):
    d = torch.randn(5, tiny_model.d_model, generator=torch.Generator().manual_seed(0))
    gamma, unembed = tiny_model.decoder.norm.weight.detach(), tiny_model.hf.lm_head.weight.detach()
    n = min(len(unembed), len(tiny_model.tokenizer))
    normed = gamma * d / (d.square().mean(-1, keepdim=True) + tiny_model.hf.config.rms_norm_eps).sqrt()
    logits = (normed @ unembed.T)[:, :n]
    logits = logits - logits.mean(-1, keepdim=True)
    found = promoted(tiny_model, d, 7)
    torch.testing.assert_close(found.up_values, logits.topk(7).values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.down_values, -(-logits).topk(7).values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits.gather(1, found.up), found.up_values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits.gather(1, found.down), found.down_values, rtol=1e-4, atol=1e-5)


def test_length_does_not_matter_and_a_tokens_own_direction_promotes_it(tiny_models):
    model = tiny_models("qwen2")
    unembed = model.hf.lm_head.weight.detach()
    token = int(unembed[: len(model.tokenizer)].norm(dim=-1).argmax())
    d = unembed[token] * model.decoder.norm.weight.detach()
    one, ten = promoted(model, d[None], 3), promoted(model, 10 * d[None], 3)
    assert one.up[0, 0] == token
    torch.testing.assert_close(one.up_values, ten.up_values, rtol=1e-4, atol=1e-4)


def test_a_norm_with_a_bias_leaves_the_bias_out():
    from transformers import GPT2Config, GPT2LMHeadModel

    from pvsae.models.chatmodel import ChatModel
    from tests.conftest import make_tokenizer

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = GPT2Config(vocab_size=len(tokenizer) + 9, n_embd=24, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=2)
    hf = GPT2LMHeadModel(config).eval()
    torch.nn.init.normal_(hf.transformer.ln_f.bias)
    model = ChatModel(hf, tokenizer)
    d = torch.randn(2, 24)
    gamma = hf.transformer.ln_f.weight.detach()
    centred = d - d.mean(-1, keepdim=True)
    logits = (gamma * centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()) @ hf.lm_head.weight.detach().T
    logits = logits[:, : len(tokenizer)]
    logits = logits - logits.mean(-1, keepdim=True)
    found = promoted(model, d, 4)
    torch.testing.assert_close(found.up_values, logits.topk(4).values, rtol=1e-4, atol=1e-5)
    assert int(found.up.max()) < len(tokenizer), "rows that are padding are left out"


def test_another_d_model_is_refused(tiny_models):
    with pytest.raises(UserError, match="d_model 7"):
        promoted(tiny_models("qwen2"), torch.randn(1, 7))


@pytest.mark.parametrize("kind", ["qwen2", "stories260k"])
def test_pieces_put_together_are_the_text(tiny_models, kind):
    tokenizer = tiny_models(kind).tokenizer
    pieces = Pieces(tokenizer)
    for text in ("Once upon a time there was a dog.", "He said: “no”, and left — naïve 🙂 end", "a  b\n\nc"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        texts = pieces.texts(ids)
        assert len(texts) == len(ids)
        assert "".join(texts).strip() == text
    spaced = tokenizer("the dog dog", add_special_tokens=False)["input_ids"]
    assert "".join(pieces.of(i) for i in spaced).endswith(" dog dog")
