"""The dictionary itself: its arithmetic, its chunks, what it refuses."""

import itertools

import pytest
import torch

from pvsae.errors import UserError
from pvsae.models import Dictionary
from pvsae.saes import dictionary
from pvsae.saes.dictionary import SAE, OutlierFilter, SAEInfo
from tests.saes.small import D_MODEL, D_SAE, make_sae, residuals


def by_hand(sae, x):
    """Activations from the definition, one latent and token at a time."""
    out = torch.zeros(*x.shape[:-1], sae.d_sae)
    for at in itertools.product(*(range(n) for n in x.shape[:-1])):
        h = x[at] - (sae.b_dec if sae.apply_b_dec_to_input else 0)
        pre = torch.stack([h @ sae.W_enc[:, f] + sae.b_enc[f] for f in range(sae.d_sae)])
        if sae.top_k is None:
            out[at] = torch.where(pre > sae.threshold, pre, 0)
        else:
            keep = pre.argsort(descending=True)[: sae.top_k]
            out[at][keep] = pre[keep].clamp(min=0)
    return out


@pytest.fixture(params=["jumprelu", "topk", "no b_dec on input"])
def sae(request):
    options = {"jumprelu": {}, "topk": {"top_k": 5, "threshold": 0.0}, "no b_dec on input": {"apply_b_dec_to_input": False}}
    return make_sae(**options[request.param])


@pytest.fixture(autouse=True, params=["one chunk", "many chunks"])
def chunking(request, monkeypatch):
    """Every test holds however many chunks the latents are read in; the last one is smaller than the others."""
    if request.param == "many chunks":
        monkeypatch.setattr(dictionary, "CHUNK_BYTES", 4 * D_MODEL * 7)


@pytest.mark.parametrize("shape", [(), (3,), (2, 5)])
def test_encode_and_decode_follow_the_definition(sae, shape):
    x = residuals(*shape)
    acts = sae.encode(x)
    assert acts.shape == (*shape, D_SAE)
    torch.testing.assert_close(acts, by_hand(sae, x))
    assert 0 < (acts > 0).float().mean() < 0.9
    torch.testing.assert_close(sae.decode(acts), acts @ sae.W_dec + sae.b_dec)
    torch.testing.assert_close(sae(x), sae.decode(acts))
    assert sae(x).shape == x.shape


def test_some_latents_are_the_same_numbers(sae):
    x = residuals(2, 5)
    torch.testing.assert_close(sae.encode_latents(x, [7, 0, 7, 39]), sae.encode(x)[..., [7, 0, 7, 39]])
    assert sae.encode_latents(x, []).shape == (2, 5, 0)


def test_sparse_activations_are_the_dense_ones(sae):
    x = residuals(2, 5)
    token, latent, value = sae.encode_sparse(x)
    dense = sae.encode(x).reshape(10, -1)
    where = dense.nonzero(as_tuple=True)  # sorted by token, then by latent
    assert torch.equal(token, where[0])
    assert torch.equal(latent, where[1])
    torch.testing.assert_close(value, dense[where])
    silent = make_sae(threshold=1e9)
    acts = silent.encode_sparse(x)
    assert len(acts.value) == 0
    torch.testing.assert_close(silent(x), silent.b_dec.expand_as(x))


def test_top_is_a_sorted_search_of_all_latents(sae):
    x = residuals(2, 5)
    dense = sae.encode(x)
    for k in (1, 4, D_SAE):
        values, latents = sae.top(x, k)
        torch.testing.assert_close(values, dense.sort(-1, descending=True).values[..., :k])
        torch.testing.assert_close(dense.gather(-1, latents), values)


def test_cosines_with_every_row(sae):
    v = 7 * residuals(3)
    sae.W_dec[4] *= 3  # rows need not be unit
    sae.W_dec[5] = 0
    expected = torch.cosine_similarity(v[:, None], sae.W_dec[None], dim=-1)
    torch.testing.assert_close(sae.cosines(v), expected)
    torch.testing.assert_close(sae.cosines(v[0]), expected[0])
    assert (sae.cosines(v)[:, 5] == 0).all()
    assert (sae.cosines(torch.zeros(D_MODEL)) == 0).all()


def test_no_activation_is_negative_whatever_the_threshold():
    assert (make_sae(threshold=-1.0).encode(residuals(20)) >= 0).all()
    assert torch.equal(make_sae(threshold=-1.0).encode(residuals(20)), make_sae(threshold=0.0).encode(residuals(20)))


def test_gradients_flow_to_the_residual(sae):
    x = residuals(4).double().requires_grad_()
    wide = sae.to(dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda h: wide(h), x, eps=1e-7)
    torch.testing.assert_close(wide(x), wide(x.detach()))


def test_another_scale_is_folded_into_the_biases():
    sae, x, scale = make_sae(), residuals(6), 3.7
    raw = sae.unscaled(scale)
    torch.testing.assert_close(raw.encode(x / scale), sae.encode(x) / scale)
    torch.testing.assert_close(raw(x / scale), sae(x) / scale)
    assert raw.W_dec.data_ptr() == sae.W_dec.data_ptr()


def test_the_encoder_is_a_view_of_rows_after_every_move():
    sae = make_sae()
    assert sae.W_enc.T.is_contiguous()
    assert sae.to("cpu", torch.float32) is sae
    half = sae.to(dtype=torch.bfloat16)
    assert half.W_enc.T.is_contiguous()
    assert half.dtype == torch.bfloat16
    assert half.b_enc.dtype == half.encode(residuals(3)).dtype == half(residuals(3)).dtype == torch.float32
    torch.testing.assert_close(half(residuals(3)), sae(residuals(3)), atol=0.1, rtol=0.1)


def test_outliers_are_told_by_their_length_alone():
    sae = make_sae()
    x = torch.ones(3, D_MODEL) * torch.tensor([[1.0], [9.9], [10.1]])
    assert sae.outliers(x).tolist() == [False, False, True]
    assert sae.outliers(x.bfloat16()).tolist() == [False, False, True]
    assert sae.with_info(outliers=None).outliers(x).tolist() == [False] * 3
    unknown = sae.with_info(outliers=OutlierFilter(10.0, None))
    assert unknown.outliers(x).tolist() == [False] * 3
    assert unknown.calibrated(D_MODEL**0.5).outliers(x).tolist() == [False, False, True]


def test_info_survives_plain_values():
    info = make_sae().info
    assert SAEInfo.from_dict(info.to_dict()) == info
    assert SAEInfo.from_dict({**info.to_dict(), "of a later version": 1}) == info
    assert info.hook_name == "blocks.1.hook_resid_post"
    with pytest.raises(UserError, match="description"):
        SAEInfo.from_dict({"outliers": {"many": 1}})


def test_it_is_what_hooks_ask_for():
    assert isinstance(make_sae(), Dictionary)


def test_what_does_not_fit_is_said():
    sae, x = make_sae(), residuals(2)
    W, b, d = sae.W_dec, sae.b_enc, sae.b_dec
    wrong = {
        "do not fit": lambda: SAE(W, b, W, d),
        "floating dtype": lambda: SAE(W.T.half(), b, W, d),
        r"b_enc of shape \[3\]": lambda: SAE(W.T, b[:3], W, d),
        r"b_dec of shape": lambda: SAE(W.T, b, W, b),
        "threshold has values that are NaN": lambda: SAE(W.T, b, W, d, float("nan")),
        "top_k is 41": lambda: SAE(W.T, b, W, d, top_k=41),
        "d_model 13.*\n.*d_model 12, as tiny has": lambda: sae.encode(torch.zeros(2, 13)),
        "activations of 12 latents": lambda: sae.decode(x),
        "latents .*40": lambda: sae.encode_latents(x, [40]),
        "latents .*-1": lambda: sae.encode_latents(x, [-1]),
        "top 41": lambda: sae.top(x, 41),
        "scale is 0": lambda: sae.unscaled(0),
        "median_norm .* is -1": lambda: sae.calibrated(-1),
        "not trained with an outlier filter": lambda: sae.with_info(outliers=None).calibrated(1.0),
    }
    for message, act in wrong.items():
        with pytest.raises(UserError, match=message):
            act()
    for fn in (sae.cosines, sae.encode_sparse, sae.forward, lambda v: sae.top(v, 2)):
        with pytest.raises(UserError, match="d_model 13"):
            fn(torch.zeros(2, 13))


def test_it_is_checked_against_a_model(tiny_models):
    model = tiny_models("qwen2")
    fits = make_sae(d_model=model.d_model)
    assert fits.check_model(model) is fits
    with pytest.raises(UserError, match="d_model 12"):
        make_sae().check_model(model)
    with pytest.raises(UserError, match="block 4"):
        fits.with_info(block=4).check_model(model)


def test_it_is_of_the_model_that_it_says() -> None:
    """The last part of a name counts, in a folder, at a hub and in the hub's cache; adapters do not."""
    sae = make_sae().with_info(model="Qwen/Qwen2.5-7B-Instruct")
    for name in ("Qwen/Qwen2.5-7B-Instruct", "/models/qwen2.5-7b-instruct/", "Qwen/Qwen2.5-7B-Instruct+runs/lora",
                 "/hub/models--Qwen--Qwen2.5-7B-Instruct/snapshots/0a1b"):  # fmt: skip
        assert sae.check_trained_on(name) is sae, name
    assert make_sae().with_info(model=None).check_trained_on("anything").info.notes == ()
    with pytest.raises(UserError, match=r"is of Qwen/Qwen2.5-7B-Instruct, the model is Qwen/Qwen2.5-7B(.|\n)*--other-model"):
        sae.check_trained_on("Qwen/Qwen2.5-7B")
    meant = sae.check_trained_on("Qwen/Qwen2.5-7B", other_model=True)
    assert "Two models" in meant.info.notes[0]
    assert meant.check_trained_on("Qwen/Qwen2.5-7B", other_model=True) is meant
