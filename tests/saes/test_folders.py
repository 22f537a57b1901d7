"""Folders: ours and SAELens', both ways, to the bit where nothing is cast."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from pvsae.errors import UserError
from pvsae.saes.folders import load, save
from tests.saes.small import D_MODEL, D_SAE, make_sae, need_sae_lens, residuals

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(params=["jumprelu", "topk", "no b_dec on input"])
def sae(request):
    options = {"jumprelu": {}, "topk": {"top_k": 5, "threshold": 0.0}, "no b_dec on input": {"apply_b_dec_to_input": False}}
    return make_sae(**options[request.param])


def same(a, b):
    for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert (a.top_k, a.apply_b_dec_to_input) == (b.top_k, b.apply_b_dec_to_input)


def test_what_is_saved_comes_back_to_the_bit(sae, tmp_path):
    again = load(save(sae, tmp_path / "a" / "b"))
    same(again, sae)
    assert again.info == sae.info
    assert again.ref == str(tmp_path / "a" / "b")
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == ["cfg.json", "sae_weights.safetensors"]


def test_sae_lens_loads_it_and_gives_our_numbers(sae, tmp_path):
    lens = need_sae_lens()
    theirs = lens.SAE.load_from_disk(str(save(sae, tmp_path)))
    x = residuals(3, 7)
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode(x), sae.encode(x), **CLOSE)
        torch.testing.assert_close(theirs.decode(theirs.encode(x)), sae.decode(sae.encode(x)), **CLOSE)
        torch.testing.assert_close(theirs(x), sae(x), **CLOSE)
    known = theirs.cfg.metadata
    assert (known.model_name, known.hook_name, known.prepend_bos) == ("tiny", "blocks.1.hook_resid_post", False)
    assert (known.context_size, known.dataset_path) == (64, "a/b")


def test_what_sae_lens_saves_again_keeps_what_we_know(sae, tmp_path):
    lens = need_sae_lens()
    lens.SAE.load_from_disk(str(save(sae, tmp_path / "ours"))).save_model(tmp_path / "theirs")
    again = load(tmp_path / "theirs")
    same(again, sae)
    assert again.info == sae.info


def test_bfloat16_weights_keep_thresholds_whole(tmp_path):
    sae = make_sae()
    again = load(save(sae, tmp_path, dtype=torch.bfloat16))
    same(again, sae.to(dtype=torch.bfloat16))
    assert torch.equal(again.threshold, sae.threshold)
    assert again.info.dtype == "bfloat16"
    lens = need_sae_lens()
    x = residuals(50)
    with torch.no_grad():
        theirs = lens.SAE.load_from_disk(str(tmp_path)).encode(x)
    assert ((theirs > 0) == (again.encode(x) > 0)).float().mean() > 0.98
    # A few latents stand so near their threshold that rounded weights put them on the other side.
    off = (load(tmp_path, dtype=torch.float32).encode(x) - sae.encode(x)).abs()
    assert off.quantile(0.99) < 0.02


def test_it_is_opened_without_reading_it(tmp_path):
    save(make_sae(), tmp_path)
    before = load(tmp_path)
    old = before.W_dec.clone()
    save(make_sae(1), tmp_path)
    assert torch.equal(before.W_dec, old), "what is open stays what it was, since files are replaced and not overwritten"
    assert not torch.equal(load(tmp_path).W_dec, old)


def test_a_write_that_fails_leaves_nothing_to_take_for_a_dictionary(tmp_path, monkeypatch):
    import safetensors.torch

    save(make_sae(), tmp_path)

    def fails(*args, **kwargs):
        raise RuntimeError("power cut")

    monkeypatch.setattr(safetensors.torch, "save_file", fails)
    with pytest.raises(RuntimeError, match="power cut"):
        save(make_sae(1), tmp_path)
    with pytest.raises(UserError, match="no dictionary"):
        load(tmp_path)


# ------------------------------------------------------------------------------------------------- folders that SAELens writes
def lens_sae(kind, dtype="float32", **options):
    lens = need_sae_lens()
    classes = {"standard": lens.StandardSAE, "topk": lens.TopKSAE, "jumprelu": lens.JumpReLUSAE, "gated": lens.GatedSAE}
    configs = {
        "standard": lens.StandardSAEConfig,
        "topk": lens.TopKSAEConfig,
        "jumprelu": lens.JumpReLUSAEConfig,
        "gated": lens.GatedSAEConfig,
    }
    metadata = lens.saes.sae.SAEMetadata(model_name="m", hook_name="blocks.2.hook_resid_post", prepend_bos=True, context_size=32)
    made = classes[kind](configs[kind](d_in=D_MODEL, d_sae=D_SAE, dtype=dtype, metadata=metadata, **options))
    g = torch.Generator().manual_seed(2)
    for name, p in made.named_parameters():
        p.data = (torch.rand(p.shape, generator=g) if name == "threshold" else torch.randn(p.shape, generator=g)).to(p.dtype)
    return made


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("standard", {}),
        ("standard", {"apply_b_dec_to_input": False}),
        ("topk", {"k": 6}),
        ("topk", {"k": 6, "rescale_acts_by_decoder_norm": True}),
        ("jumprelu", {}),
        ("jumprelu", {"apply_b_dec_to_input": False}),
    ],
)
def test_folders_of_sae_lens(kind, options, tmp_path):
    theirs, x = lens_sae(kind, **options), residuals(9)
    theirs.save_model(tmp_path)
    ours = load(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(x), theirs.encode(x), **CLOSE)
        torch.testing.assert_close(ours(x), theirs(x), **CLOSE)
    assert (ours.info.model, ours.info.block, ours.info.prepend_bos, ours.info.context_size) == ("m", 2, True, 32)


def test_bfloat16_folders_of_sae_lens(tmp_path):
    theirs, x = lens_sae("jumprelu", "bfloat16"), residuals(9)
    theirs.save_model(tmp_path)
    ours = load(tmp_path)
    assert ours.dtype == torch.bfloat16
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x).float(), atol=0.5, rtol=0.05)
        torch.testing.assert_close(load(tmp_path, dtype=torch.float32)(x), theirs.to(torch.float32)(x), **CLOSE)


def test_a_batchtopk_training_run_of_sae_lens(tmp_path):
    lens = need_sae_lens()
    trained = lens.BatchTopKTrainingSAE(lens.BatchTopKTrainingSAEConfig(d_in=D_MODEL, d_sae=D_SAE, k=4))
    trained.topk_threshold.fill_(0.7)
    trained.save_inference_model(tmp_path / "inference")
    trained.save_model(tmp_path / "training")
    x = residuals(9)
    theirs = lens.SAE.load_from_disk(str(tmp_path / "inference"))
    for name in ("inference", "training"):
        ours = load(tmp_path / name)
        assert float(ours.threshold[0]) == pytest.approx(0.7)
        with torch.no_grad():
            torch.testing.assert_close(ours.encode(x), theirs.encode(x), **CLOSE)
    trained.topk_threshold.fill_(0.0)
    trained.save_model(tmp_path / "unfinished")
    with pytest.raises(UserError, match="without a threshold"):
        load(tmp_path / "unfinished")


def edit(folder, **changes):
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**config, **changes}))


def test_folders_from_before_version_6(tmp_path):
    sae = make_sae(threshold=0.0)
    save(sae, tmp_path)
    arrays = load_file(tmp_path / "sae_weights.safetensors")
    del arrays["threshold"]
    save_file(arrays, tmp_path / "sae_weights.safetensors")
    old = {
        "d_in": D_MODEL, "d_sae": D_SAE, "dtype": "torch.float32", "hook_point": "blocks.3.hook_resid_pre", "model_name": "gpt2",
        "activation_fn_str": "relu", "context_size": 128, "normalize_activations": False,
    }  # fmt: skip
    (tmp_path / "cfg.json").write_text(json.dumps(old))
    ours = load(tmp_path)
    same(ours, sae)
    assert (ours.info.model, ours.info.block, ours.info.site) == ("gpt2", 2, "resid_post")
    (tmp_path / "cfg.json").write_text(json.dumps({**old, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}}))
    assert load(tmp_path).top_k == 3
    (tmp_path / "cfg.json").write_text(json.dumps({**old, "activation_fn_str": "tanh-relu"}))
    with pytest.raises(UserError, match="tanh-relu"):
        load(tmp_path)


def test_scaled_activations_are_folded_back_or_refused(tmp_path):
    sae = make_sae()
    save(sae, tmp_path)
    edit(tmp_path, normalize_activations="expected_average_only_in")
    with pytest.raises(UserError, match="scale="):
        load(tmp_path)
    x = residuals(5)
    torch.testing.assert_close(load(tmp_path, scale=2.0)(x), sae(2 * x) / 2)
    (tmp_path / "activation_scaler.json").write_text('{"scaling_factor": 4.0}')
    torch.testing.assert_close(load(tmp_path)(x), sae(4 * x) / 4)
    edit(tmp_path, normalize_activations="layer_norm")
    with pytest.raises(UserError, match="layer_norm"):
        load(tmp_path)


def test_what_cannot_be_loaded_is_said(tmp_path):
    with pytest.raises(UserError, match="there is no dictionary"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no dictionary in .*\n.*cfg.json"):
        load(tmp_path)
    save(make_sae(), tmp_path)
    good = (tmp_path / "cfg.json").read_text()
    for message, changes in {
        "architecture 'gated'": {"architecture": "gated"},
        "reshaped": {"reshape_activations": "hook_z"},
        "d_in 13, its arrays have 12": {"d_in": 13},
        "d_sae 4, its": {"d_sae": 4},
        "k None": {"architecture": "topk"},
    }.items():
        edit(tmp_path, **changes)
        with pytest.raises(UserError, match=message):
            load(tmp_path)
        (tmp_path / "cfg.json").write_text(good)
    (tmp_path / "cfg.json").write_text("[]")
    with pytest.raises(UserError, match="holds a list"):
        load(tmp_path)
    (tmp_path / "cfg.json").write_text(good)
    weights = tmp_path / "sae_weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:200])
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match="no sae_weights"):
        load(tmp_path)


def test_a_missing_array_or_nan_is_said(tmp_path):
    save(make_sae(), tmp_path)
    arrays = load_file(tmp_path / "sae_weights.safetensors")
    save_file({k: v for k, v in arrays.items() if k != "threshold"}, tmp_path / "sae_weights.safetensors")
    with pytest.raises(UserError, match="lacks threshold"):
        load(tmp_path)
    save_file({**arrays, "b_enc": torch.full_like(arrays["b_enc"], float("nan"))}, tmp_path / "sae_weights.safetensors")
    with pytest.raises(UserError, match="b_enc has values that are NaN"):
        load(tmp_path)


def test_the_bridge_attaches_it(tiny_folders, tmp_path):
    """sae_lens puts the dictionary into the model's view; its activations there are ours, and so is the spliced residual."""
    need_sae_lens()
    from sae_lens import SAE as LensSAE
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    from pvsae.models import Reconstruct, Residual
    from pvsae.models import load as load_model
    from tests.models.rows import logits_of, rendered_rows

    model = load_model(tiny_folders("qwen2"), device="cpu")  # one of its own, for the bridge is made a second time
    sae = make_sae(d_model=model.d_model)
    bridge = SAETransformerBridge.boot_transformers(
        str(model.path), hf_model=model.bridge.original_model, tokenizer=model.tokenizer, device="cpu"
    )
    theirs = LensSAE.load_from_disk(str(save(sae, tmp_path)))
    row = rendered_rows(model)[0]
    read = Residual(1)
    h = model.capture([row], [read])[read.key][0]
    with torch.no_grad():
        bridge.add_sae(theirs)
        spliced, cache = bridge.run_with_cache(torch.tensor([row.ids]))
        bridge.reset_saes()
    torch.testing.assert_close(cache[bridge.get_sae_hook_name(theirs)][0], sae.encode(h), atol=1e-4, rtol=1e-4)
    ours = logits_of(model, [row], [Reconstruct(sae.with_info(outliers=None), 1)])[0]
    torch.testing.assert_close(spliced[0], ours, atol=2e-4, rtol=1e-4)
    assert (ours - logits_of(model, [row])[0]).abs().max() > 0.05
