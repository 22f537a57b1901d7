"""A dictionary inside of a model: captures and interventions with the real thing, its threshold and its outlier filter."""

import json

import pytest
import torch

from pvsae.errors import UserError
from pvsae.models import AddFeature, Clamp, FeatureActs, Reconstruct, Residual, from_config, to_config
from pvsae.saes.dictionary import OutlierFilter
from pvsae.saes.folders import load, save
from tests.models.rows import logits_of, rendered_rows
from tests.saes.small import make_sae

BLOCK, LATENT = 1, 7
READ = Residual(BLOCK)
CLOSE = {"atol": 2e-4, "rtol": 1e-4}


@pytest.fixture
def model(tiny_models):
    return tiny_models("qwen2")


@pytest.fixture
def rows(model):
    return rendered_rows(model)


@pytest.fixture
def sae(model, rows):
    """Half of the latents' pre-activations are under the threshold, a tenth of the tokens are outliers."""
    norms = torch.cat(model.capture(rows, [READ])[READ.key]).norm(dim=-1)
    plain = make_sae(d_model=model.d_model, d_sae=60, threshold=0.5 * float(norms.median()) / model.d_model**0.5)
    return plain.with_info(outliers=OutlierFilter(1.0, float(norms.quantile(0.9))))


@pytest.mark.parametrize("latents", [None, (LATENT, 0)])
def test_captured_features_are_its_activations_but_at_outliers(model, rows, sae, latents):
    read = FeatureActs(sae, BLOCK, "all", latents)
    found = model.capture(rows, [read, READ])
    for acts, h in zip(found[read.key], found[READ.key], strict=True):
        expected = sae.encode(h)[:, list(latents or range(sae.d_sae))]
        torch.testing.assert_close(acts, expected.masked_fill(sae.outliers(h)[:, None], 0.0))
    every = torch.cat(found[READ.key])
    assert 0 < int(sae.outliers(every).sum()) < len(every)
    assert 0.05 < float((torch.cat(found[read.key]) > 0).float().mean()) < 0.9


def test_a_clamped_latent_and_an_added_one(model, rows, sae):
    before = model.capture(rows, [READ])[READ.key]
    clamped = model.capture(rows, [READ], [Clamp(sae, LATENT, 2.0, BLOCK)])[READ.key]
    added = model.capture(rows, [READ], [AddFeature(sae, LATENT, 3.0, BLOCK)])[READ.key]
    for h, after, more in zip(before, clamped, added, strict=True):
        moved = h + (2.0 - sae.encode(h)[:, [LATENT]]) * sae.W_dec[LATENT]
        torch.testing.assert_close(after, torch.where(sae.outliers(h)[:, None], h, moved), **CLOSE)
        torch.testing.assert_close(more, h + 3.0 * sae.W_dec[LATENT], **CLOSE)


def test_clamp_costs_one_latent(model, rows, sae, monkeypatch):
    monkeypatch.setattr(sae, "encode", lambda x: pytest.fail("all latents were encoded for one"))
    logits_of(model, rows, [Clamp(sae, LATENT, 2.0, BLOCK)])


def test_edits_by_a_dictionary_come_back_from_a_config(model, rows, sae, tmp_path):
    saved = load(save(sae, tmp_path / "sae"))
    for edit in (Reconstruct(saved, BLOCK, 1, (0, 2)), Clamp(saved, LATENT, 2.0, BLOCK)):
        config = json.loads(json.dumps(to_config(edit)))
        again = from_config(config, lambda ref: pytest.fail("no direction is in it"), load)
        for a, b in zip(logits_of(model, rows, [edit]), logits_of(model, rows, [again]), strict=True):
            assert torch.equal(a, b)


def test_reconstruct_and_gradients(model, rows, sae):
    """An edit under which a model is trained: gradients pass through the reconstruction, and through the tokens left alone."""
    plain = sae.with_info(outliers=None)
    ids = torch.tensor([rows[0].ids])
    embedded = model.hf.get_input_embeddings()(ids).detach().requires_grad_()
    with model.hooks([Reconstruct(plain, BLOCK)]):
        model.hf(inputs_embeds=embedded).logits.square().mean().backward()
    assert torch.isfinite(embedded.grad).all()
    assert (embedded.grad.abs().sum(-1) > 0).all()


def test_another_models_dictionary_is_refused_before_any_pass(model):
    small = make_sae()
    for edits, reads in (([Reconstruct(small, 0)], []), ([Clamp(small, 0, 1.0, 0)], []), ([], [FeatureActs(small, 0)])):
        with pytest.raises(UserError, match="d_model 12 on a model with d_model 48"), model.hooks(edits, reads):
            pass
