"""The sums over a stream against numpy on the whole, and the agreement of two decoders."""

import math

import numpy as np
import pytest
import torch

from pvsae.errors import UserError
from pvsae.saes.measures import Activity, Variance, agreement
from tests.saes.small import D_MODEL, D_SAE, make_sae, residuals


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_variance_is_that_of_the_whole_however_it_is_cut(offset):
    sae = make_sae()
    x = residuals(500) + offset  # far from 0, where a difference of large sums would lose every digit
    out = x + 0.3 * residuals(500, seed=9)
    whole, parts = Variance(), Variance()
    whole.add(x, out)
    for start, end in ((0, 1), (1, 1), (1, 300), (300, 500)):
        parts.add(x[start:end], out[start:end])
    a = x.double().numpy()
    b = out.double().numpy()
    fvu = ((a - b) ** 2).sum() / ((a - a.mean(0)) ** 2).sum()
    for variance in (whole, parts):
        row = variance.row()
        assert row["tokens"] == 500
        assert row["fvu"] == pytest.approx(fvu, rel=1e-5)
        assert row["explained_variance"] == pytest.approx(1 - fvu, rel=1e-5)
        assert row["mse"] == pytest.approx(((a - b) ** 2).sum(1).mean(), rel=1e-4)
        norms = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
        assert row["cosine"] == pytest.approx(((a * b).sum(1) / norms[0] / norms[1]).mean(), rel=1e-5)
        assert row["norm_ratio"] == pytest.approx((norms[1] / norms[0]).mean(), rel=1e-5)
        np.testing.assert_allclose(variance.mean.numpy(), a.mean(0), rtol=1e-5, atol=1e-5)
    assert sae.d_model == D_MODEL


def test_variance_of_nothing_is_nan_and_not_zero():
    empty = Variance()
    empty.add(residuals(0), residuals(0))
    assert empty.row()["tokens"] == 0
    assert all(math.isnan(v) for name, v in empty.row().items() if name != "tokens")
    with pytest.raises(UserError, match="no token"):
        _ = empty.mean


def test_activity_is_that_of_the_dense_activations():
    sae, x = make_sae(), residuals(200)
    dense = sae.encode(x)
    activity = Activity(D_SAE)
    for part in x.split([1, 0, 150, 49]):
        activity.add(sae.encode_sparse(part), len(part))
    torch.testing.assert_close(activity.density, (dense > 0).float().mean(0))
    l0 = (dense > 0).sum(1).double().numpy()
    found = activity.l0_summary()
    assert found["mean"] == pytest.approx(l0.mean())
    assert found["std"] == pytest.approx(l0.std())
    assert found["max"] == l0.max()
    for name, q in (("p05", 0.05), ("median", 0.5), ("p95", 0.95)):
        assert found[name] == np.quantile(l0, q, method="inverted_cdf")
    table = activity.l0_table()
    assert dict(zip(table["l0"], table["tokens"], strict=True)) == dict(zip(*np.unique(l0, return_counts=True), strict=True))
    features = activity.features()
    np.testing.assert_allclose(features["max"], dense.amax(0).numpy(), rtol=1e-6)
    assert list(features["latent"]) == list(range(D_SAE))
    active = dense.sum(0) / (dense > 0).sum(0)
    np.testing.assert_allclose(features["mean_active"], active.numpy(), rtol=1e-5)


def test_silent_tokens_and_latents_are_counted():
    sae = make_sae(threshold=1e9)
    activity = Activity(D_SAE)
    activity.add(sae.encode_sparse(residuals(7)), 7)
    assert activity.l0_table().to_dict("records") == [{"l0": 0, "tokens": 7}]
    assert activity.l0_summary()["mean"] == 0
    assert (activity.density == 0).all()
    assert activity.density_table()["latents"].sum() == 0
    assert math.isnan(Activity(3).l0_summary()["mean"])


def test_density_histogram_holds_every_active_latent():
    sae, x = make_sae(), residuals(300)
    activity = Activity(D_SAE)
    activity.add(sae.encode_sparse(x), 300)
    table = activity.density_table()
    assert table["latents"].sum() == (activity.density > 0).sum()
    logs = activity.density[activity.density > 0].log10().numpy()
    for _, row in table.iterrows():
        inside = (logs >= row["low"]) & ((logs < row["high"]) | (row["high"] == 0))
        assert row["latents"] == inside.sum()


def test_agreement_is_the_highest_cosine():
    a, b = make_sae(0), make_sae(1, d_sae=25)
    found = agreement(a, b, rows=7)
    cosines = torch.cosine_similarity(a.W_dec[:, None], b.W_dec[None], dim=-1)
    torch.testing.assert_close(found.best, cosines.amax(1))
    assert found.mmcs == pytest.approx(float(cosines.amax(1).mean()))
    assert agreement(b, a).best.shape == (25,)
    some = torch.tensor([3, 30])
    torch.testing.assert_close(agreement(a, b, latents=some).best, cosines.amax(1)[some])
    shuffled = make_sae(0)
    shuffled.W_dec = 2 * a.W_dec.flip(0)
    assert agreement(a, shuffled).mmcs == pytest.approx(1.0)
    assert agreement(a, shuffled).share_above(0.99) == 1.0
    assert agreement(a, b).share_above(0.99) < 0.5
    with pytest.raises(UserError, match="d_model"):
        agreement(a, make_sae(d_model=8))
    with pytest.raises(UserError, match="no latent"):
        agreement(a, b, latents=torch.zeros(0, dtype=torch.long))
