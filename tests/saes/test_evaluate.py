"""Evaluation on text: against a calculation by hand, against sae_lens.evals, and what it must not count."""

import math

import numpy as np
import pytest
import torch

from pvsae.errors import UserError
from pvsae.models import Residual
from pvsae.saes.dictionary import OutlierFilter
from pvsae.saes.evaluate import TokenRow, evaluate, token_rows
from pvsae.saes.folders import save
from tests.models.rows import batch_of, rendered_rows
from tests.saes.small import make_sae, need_sae_lens

BLOCK = 1


def good_sae(model, rows, **changes):
    """A dictionary whose reconstructions are near the residuals: centred on their mean, two opposite latents a dimension."""
    x = torch.cat(residuals_of(model, rows))
    sae = make_sae(d_model=model.d_model, d_sae=2 * model.d_model)
    eye = torch.eye(model.d_model)
    sae = sae._with(
        W_enc=torch.cat([eye, -eye]).T,
        W_dec=torch.cat([eye, -eye]),
        b_enc=torch.zeros(sae.d_sae),
        b_dec=x.mean(0),
        threshold=torch.full((sae.d_sae,), 0.3 * float(x.std())),
    )
    return sae.with_info(**{"block": BLOCK, "outliers": None, "drop_first": 0, **changes})


def residuals_of(model, rows):
    from pvsae.models import Rendered

    rendered = [Rendered(tuple(row.ids), len(row.ids), (len(row.ids),) * 2, (), "") for row in rows]
    return model.capture(rendered, [Residual(BLOCK)])[Residual(BLOCK).key]


def text_rows(model, length=24):
    """Rows of one length, cut out of chats: special tokens among them."""
    ids = [i for row in rendered_rows(model) for i in row.ids]
    return token_rows(model, [ids[at : at + length] for at in range(0, len(ids) - length, length)])


def test_every_measure_by_hand(tiny_model):
    rows = text_rows(tiny_model)
    rows = [TokenRow(row.ids[: len(row.ids) - i], row.keep[: len(row.ids) - i]) for i, row in enumerate(rows)]  # padding
    sae = good_sae(tiny_model, rows, drop_first=2)
    x = residuals_of(tiny_model, rows)
    norms = torch.cat([h[2:] for h in x]).norm(dim=-1)
    sae = sae.with_info(outliers=OutlierFilter(1.0, float(norms.quantile(0.9))))
    found = evaluate(sae, tiny_model, rows, batch_tokens=60, loss_batch_tokens=50)

    keep = [torch.tensor(row.keep) & (torch.arange(len(row.ids)) >= 2) for row in rows]
    kept = [k & ~sae.outliers(h) for k, h in zip(keep, x, strict=True)]
    assert 0 < sum(int(k.sum()) for k in kept) < sum(int(k.sum()) for k in keep) < sum(len(row.ids) for row in rows)
    for name, masks in (("kept", kept), ("with outliers", keep), ("all tokens", [torch.ones_like(k) for k in keep])):
        h = torch.cat([a[m] for a, m in zip(x, masks, strict=True)]).double()
        error = (h - sae(h.float())).square().sum()
        assert found.of("tokens", name) == len(h)
        assert found.of("fvu", name) == pytest.approx(float(error / (h - h.mean(0)).square().sum()), rel=1e-4)
    acts = sae.encode(torch.cat([a[m] for a, m in zip(x, kept, strict=True)]))
    assert found.l0_summary["mean"] == pytest.approx(float((acts > 0).sum(1).float().mean()))
    np.testing.assert_allclose(found.features["density"], (acts > 0).float().mean(0).numpy(), atol=1e-6)
    assert found.dead == int((acts > 0).any(0).logical_not().sum())
    assert found.dense == int(((acts > 0).float().mean(0) > 0.1).sum())

    mean = torch.cat([a[m] for a, m in zip(x, kept, strict=True)]).mean(0)
    edits = {
        "original": lambda h, m: h,
        "spliced": lambda h, m: torch.where(m[:, None], sae(h), h),
        "zero": lambda h, m: torch.zeros_like(h),
        "mean": lambda h, m: torch.where(m[:, None], mean, h),
    }
    truth = {}
    for name, edit in edits.items():
        ce, kl = [], []
        for i, row in enumerate(rows):
            handle = tiny_model.blocks[BLOCK].register_forward_hook(
                lambda module, args, out, i=i, edit=edit: (
                    edit(out[0], kept[i])[None] if isinstance(out, torch.Tensor) else (edit(out[0][0], kept[i])[None], *out[1:])
                )
            )
            with torch.no_grad():
                edited = tiny_model.hf(torch.tensor([row.ids])).logits[0].log_softmax(-1)
            handle.remove()
            with torch.no_grad():
                plain = tiny_model.hf(torch.tensor([row.ids])).logits[0].log_softmax(-1)
            at = keep[i].nonzero()[:, 0]
            kl += (plain[at].exp() * (plain[at] - edited[at])).sum(-1).tolist()
            at = at[at + 1 < len(row.ids)]
            ce += (-edited[at, torch.tensor(row.ids)[at + 1]]).tolist()
        truth[name] = np.mean(ce), np.mean(kl)
        assert found.loss_of("ce", name) == pytest.approx(truth[name][0], rel=1e-4)
        assert found.loss_of("kl", name) == pytest.approx(truth[name][1], rel=1e-3, abs=1e-6)
    for name in ("zero", "mean"):
        expected = (truth[name][0] - truth["spliced"][0]) / (truth[name][0] - truth["original"][0])
        assert found.loss_of("recovered", name) == pytest.approx(expected, rel=1e-2, abs=1e-2)
    assert found.loss_of("kl", "original") == 0
    assert found.loss_of("kl") < found.loss_of("kl", "mean"), "the reconstruction is a better guess than the mean"


class Store:
    """As much of SAELens' ActivationsStore as its evals ask for."""

    def __init__(self, tokens):
        self.tokens, self.context_size, self.store_batch_size_prompts = tokens, tokens.shape[1], len(tokens)

    def get_batch_tokens(self, batch_size=None):
        return self.tokens

    def reset_input_dataset(self):
        pass


@pytest.mark.parametrize("name", ["qwen2", "stories260k"])
def test_sae_lens_evals_says_the_same(name, tiny_models, tmp_path):
    lens = need_sae_lens()
    from sae_lens.evals import get_eval_everything_config, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler

    model = tiny_models(name)
    rows = text_rows(model) if name == "qwen2" else token_rows(model, torch.randint(5, 500, (4, 24)).tolist())
    sae = good_sae(model, rows)
    ours = evaluate(sae, model, rows)
    theirs = lens.SAE.load_from_disk(str(save(sae, tmp_path)))
    config = get_eval_everything_config(len(rows), n_eval_reconstruction_batches=1, n_eval_sparsity_variance_batches=1)
    store = Store(torch.tensor([row.ids for row in rows]))
    special = {i for row in rows for i, kept in zip(row.ids, row.keep, strict=True) if not kept}  # it knows fewer by itself
    skipped = special or True
    metrics, features = run_evals(theirs, store, model.bridge, ActivationScaler(), config, exclude_special_tokens=skipped)
    loss, close = metrics["model_performance_preservation"], {"rel": 2e-4, "abs": 2e-5}
    assert ours.of("explained_variance") == pytest.approx(metrics["reconstruction_quality"]["explained_variance"], **close)
    assert ours.of("mse") == pytest.approx(metrics["reconstruction_quality"]["mse"], **close)
    assert ours.of("cosine") == pytest.approx(metrics["reconstruction_quality"]["cossim"], **close)
    assert ours.of("norm_ratio") == pytest.approx(metrics["shrinkage"]["l2_ratio"], **close)
    assert ours.l0_summary["mean"] == pytest.approx(metrics["sparsity"]["l0"], **close)
    np.testing.assert_allclose(ours.features["density"], features["feature_density"], atol=1e-5)
    for variant, key in (("original", "without_sae"), ("spliced", "with_sae"), ("zero", "with_ablation")):
        assert ours.loss_of("ce", variant) == pytest.approx(loss[f"ce_loss_{key}"], **close)
    assert ours.loss_of("recovered", "zero") == pytest.approx(loss["ce_loss_score"], rel=5e-3, abs=5e-3)
    divergence = metrics["model_behavior_preservation"]
    assert ours.loss_of("kl") == pytest.approx(divergence["kl_div_with_sae"], rel=1e-3, abs=1e-4)
    assert ours.loss_of("kl", "zero") == pytest.approx(divergence["kl_div_with_ablation"], rel=1e-3)


def test_a_perfect_dictionary_changes_nothing(tiny_models):
    model = tiny_models("qwen2")
    rows = text_rows(model)
    sae = good_sae(model, rows)
    found = evaluate(sae._with(threshold=torch.zeros(sae.d_sae)), model, rows)
    assert found.of("fvu") < 1e-9
    assert found.loss_of("kl") < 1e-6
    assert found.loss_of("recovered", "zero") == pytest.approx(1, abs=1e-4)
    assert found.loss_of("recovered", "mean") == pytest.approx(1, abs=1e-3)


def test_long_outliers_would_make_it_look_good(tiny_models):
    """The reason for the two numbers: a few huge tokens, well reconstructed, hide how badly all others are."""
    model = tiny_models("qwen2")
    x = torch.randn(500, model.d_model, generator=torch.Generator().manual_seed(0))
    x[:5] *= 100
    sae = good_sae(model, text_rows(model))
    sae = sae._with(b_dec=torch.zeros(model.d_model), threshold=torch.full((sae.d_sae,), 2.0))
    sae = sae.with_info(outliers=OutlierFilter(10.0, math.sqrt(model.d_model)))
    found = evaluate(sae, activations=x.split(100))
    assert found.of("tokens") == 495
    assert found.of("explained_variance") < 0.6
    assert found.of("explained_variance", "with outliers") > 0.95
    assert found.loss is None
    assert math.isnan(found.loss_of("ce"))


def test_residuals_come_in_any_form_a_stream_has(tiny_models):
    sae = make_sae().with_info(block=BLOCK)
    x = torch.randn(90, sae.d_model, generator=torch.Generator().manual_seed(0))
    whole = evaluate(sae, activations=x).summary()
    for form in (x.split(20), {BLOCK: x, 7: 2 * x}, ({BLOCK: part, 7: part * 2} for part in x.split(31)), iter([x])):
        assert evaluate(sae, activations=form, batch_tokens=13).summary() == pytest.approx(whole, nan_ok=True)
    assert evaluate(sae, activations={BLOCK: x, 7: 2 * x}, block=7).of("mse") > 2 * evaluate(sae, activations=x).of("mse")
    with pytest.raises(UserError, match="blocks \\[7\\]"):
        evaluate(sae, activations={7: x})


def test_batches_do_not_matter_and_hooks_are_gone(tiny_models):
    model = tiny_models("llama")
    rows = text_rows(model)
    sae = good_sae(model, rows)
    before = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf.modules())
    a, b = (evaluate(sae, model, rows, batch_tokens=n, loss_batch_tokens=n) for n in (24, 10**6))
    assert a.summary() == pytest.approx(b.summary(), rel=1e-4, abs=1e-5)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf.modules()) == before
    few = evaluate(sae, model, rows, loss_tokens=1)
    assert set(few.loss["tokens"]) == {sum(rows[0].keep)}
    assert few.of("tokens") == a.of("tokens")
    assert evaluate(sae, model, rows, loss=False).loss is None


def test_an_unpublished_median_is_measured_and_said(tiny_models):
    model = tiny_models("qwen2")
    rows = text_rows(model)
    sae = good_sae(model, rows, outliers=OutlierFilter(1.2, None))
    found = evaluate(sae, model, rows, loss=False)
    x, keep = torch.cat(residuals_of(model, rows)), torch.tensor([k for row in rows for k in row.keep])
    median = float(x[keep].norm(dim=-1).median())
    assert found.sae.info.outliers.median_norm == pytest.approx(median, rel=1e-5)
    assert found.of("tokens") == int((x[keep].norm(dim=-1) <= 1.2 * median).sum())
    assert "was measured on" in found.notes[0]
    assert "no median" in evaluate(sae, activations=[x]).notes[0]


def test_special_tokens_are_not_marked(tiny_models):
    model = tiny_models("qwen2")
    ids = batch_of(model, rendered_rows(model)[:1]).input_ids[0].tolist()
    (row,) = token_rows(model, [ids])
    turn_ends = [i for i in ids if i in (1, 2)]  # <|im_start|> is special to its tokenizer, though it is no BOS, EOS or padding
    assert [i for i, k in zip(ids, row.keep, strict=True) if not k] == turn_ends == [1, 2, 1, 2, 1]
    assert all(token_rows(model, [ids], skip_special=False)[0].keep)


def test_what_cannot_be_evaluated_is_said(tiny_models):
    model = tiny_models("qwen2")
    rows = text_rows(model)
    sae = good_sae(model, rows)
    n = model.n_blocks
    wrong = {
        "d_model": lambda: evaluate(make_sae(), model, rows),
        f"block {n} does not exist": lambda: evaluate(sae.with_info(block=None), model, rows, block=n),
        "dictionary of block 1, and block 2": lambda: evaluate(sae, model, rows, block=2),
        "does not say which block": lambda: evaluate(sae.with_info(block=None), model, rows),
        "reads mlp_out": lambda: evaluate(sae.with_info(site="mlp_out"), model, rows),
        "no row has a token": lambda: evaluate(sae.with_info(drop_first=24), model, rows),
        "row 0 has 600 tokens": lambda: evaluate(sae, model, token_rows(model, [[7] * 600])),
        "a mask of 2": lambda: evaluate(sae, model, [TokenRow([7, 7, 7], [True, True])]),
        "neither or both": lambda: evaluate(sae, model),
        "not one token": lambda: evaluate(sae.with_info(outliers=OutlierFilter(1.0, 1e-3)), model, rows),
    }
    for message, act in wrong.items():
        with pytest.raises(UserError, match=message):
            act()
