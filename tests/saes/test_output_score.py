"""Output scores, on dictionaries whose latents are known: some point where the unembedding does, others nowhere."""

from __future__ import annotations

import pytest
import torch

from pvsae.errors import UserError
from pvsae.models import AddFeature, Residual
from pvsae.saes.dictionary import SAE, SAEInfo
from pvsae.saes.output_score import FACTOR, PREFIX, K, output_scores, promoted

TOKENS = (7, 40, 200)  # promoted by latents 0, 1, 2; the other latents are random directions


@pytest.fixture
def model(tiny_models):
    return tiny_models("qwen2")


def planted(model, block: int, d_sae: int = 40) -> SAE:
    """Latents 0..2 write the unembedding of one token each; every latent is active on everything (bias 1, no encoder)."""
    rows = torch.randn(d_sae, model.d_model, generator=torch.Generator().manual_seed(2))
    rows[: len(TOKENS)] = model.hf.get_output_embeddings().weight[list(TOKENS)].detach()
    rows /= rows.norm(dim=1, keepdim=True)
    return SAE(
        torch.zeros(model.d_model, d_sae), 6 * torch.ones(d_sae), rows, torch.zeros(model.d_model), 0.5,
        info=SAEInfo(model="tiny", block=block), ref="planted",
    )  # fmt: skip


@pytest.mark.parametrize("block", [0, 3])
def test_a_latent_that_writes_an_unembedding_scores_high_and_random_ones_low(model, block) -> None:
    table = output_scores(planted(model, block), model, range(40), k=1)
    assert set(table["latent"][:3]) == {0, 1, 2}
    by_latent = table.set_index("latent")
    assert (by_latent.loc[[0, 1, 2], "output_score"] > 0.4).all()
    assert (by_latent.loc[[0, 1, 2], "rank"] == 0).all()
    assert (by_latent.loc[[0, 1, 2], "before"] < 0.02).all(), "it is the latent that says them, not the prefix"
    assert [by_latent.loc[i, "said"] for i in range(3)] == [model.chat.decode([t]) for t in TOKENS]
    assert (by_latent.loc[3:, "output_score"] < 0.25).all()


def test_the_score_is_the_papers_formula_under_the_same_hook_as_steering(model) -> None:
    """One latent, done with AddFeature on the last token: (1 - r / |V|) * p over the K tokens of the logit lens."""
    sae, latent = planted(model, 1), 11
    table = output_scores(sae, model, [latent, 3]).set_index("latent")
    prompt = model.chat.plain(PREFIX)
    read = Residual(1)
    last = model.capture([prompt], [read])[read.key][0][-1]
    add = AddFeature(sae, latent, FACTOR * float(sae.encode(last).max()), 1, "response")
    probs = model.next_token_logprobs([prompt], [add])[0].exp()
    lens = model.hf.lm_head(model.decoder.norm(sae.W_dec[[latent]]))[0]
    tokens = lens.topk(K).indices
    order = probs.argsort(descending=True).tolist()
    rank = min(order.index(t) for t in tokens.tolist())
    assert table.loc[latent, "rank"] == rank
    assert table.loc[latent, "output_score"] == pytest.approx((1 - rank / len(probs)) * float(probs[tokens].max()), rel=1e-4)
    torch.testing.assert_close(promoted(model, sae.W_dec[[latent]])[0], lens)


def test_batches_do_not_matter(model) -> None:
    sae = planted(model, 2)
    one, many = (output_scores(sae, model, range(10), batch_size=size).sort_values("latent") for size in (1, 7))
    assert one["output_score"].tolist() == pytest.approx(many["output_score"].tolist(), rel=1e-3, abs=1e-6)
    assert one["rank"].tolist() == many["rank"].tolist()


@pytest.mark.parametrize(
    ("latents", "options", "message"),
    [
        ([40], {}, "latent 40 of planted"),
        ([-1], {}, "latent -1 of planted"),
        ([1], {"block": 9}, "block 9 is asked for"),
        ([1], {"prefix": ""}, "no prefix"),
        ([1], {"k": 0}, "k is 0"),
    ],
)
def test_what_cannot_be_scored_is_refused(model, latents, options, message) -> None:
    with pytest.raises(UserError, match=message):
        output_scores(planted(model, 2), model, latents, **options)


def test_a_prefix_that_wakes_no_latent_has_no_scale(model) -> None:
    sae = planted(model, 2)
    silent = SAE(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, 100.0, info=sae.info, ref="silent")
    with pytest.raises(UserError, match="no latent of silent is active"):
        output_scores(silent, model, [1])
