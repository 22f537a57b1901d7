"""Folders of dictionary_learning: every class by its definition, the threshold of -1, and what is not read."""

import json
import pickle

import pytest
import torch

from pvsae.errors import UserError
from pvsae.saes.folders import load, save
from pvsae.saes.foreign import CLASSES, load_dictionary_learning, threshold_for
from tests.saes.foreign_folders import make_arrays, make_config, write_folder
from tests.saes.small import make_sae, residuals


def by_definition(kind, a, x):
    """(activations, reconstruction) as its classes compute them."""
    encoder = a["W_enc"] if "W_enc" in a else a["encoder.weight"].T
    decoder = a["W_dec"] if "W_dec" in a else a["decoder.weight"].T
    b_enc = a.get("b_enc", a.get("encoder.bias"))
    b_dec = next(a[name] for name in ("b_dec", "bias", "decoder.bias") if name in a)
    centred = x if kind in ("AutoEncoderNew", "JumpReluAutoEncoder") else x - b_dec
    pre = centred @ encoder + b_enc
    if kind == "AutoEncoderTopK":
        kept = pre.relu().topk(int(a["k"]), dim=-1)
        acts = torch.zeros_like(pre).scatter(-1, kept.indices, kept.values)
    else:
        acts = pre.relu() * (pre > a["threshold"]) if "threshold" in a else pre.relu()
    return acts, acts @ decoder + b_dec


@pytest.mark.parametrize("kind", CLASSES)
def test_every_class_by_its_definition(kind, tmp_path):
    sae, x = load(write_folder(tmp_path, kind)), residuals(3, 7)
    acts, out = by_definition(kind, make_arrays(kind), x)
    torch.testing.assert_close(sae.encode(x), acts)
    torch.testing.assert_close(sae(x), out)
    torch.testing.assert_close(sae.in_memory()(x), out)
    assert sae.in_memory().W_dec.is_contiguous()
    torch.testing.assert_close(sae.cosines(x[0, 0]), sae.in_memory().cosines(x[0, 0]))


@pytest.mark.parametrize("kind", ["BatchTopKSAE", "AutoEncoderTopK", "AutoEncoder", "JumpReluAutoEncoder"])
def test_the_package_itself_gives_these_numbers(kind, tmp_path):
    package = pytest.importorskip("dictionary_learning.dictionary", reason="dictionary_learning is not installed")
    trainers = pytest.importorskip("dictionary_learning.trainers", reason="dictionary_learning is not installed")
    made = getattr(package, kind, None) or {
        "BatchTopKSAE": trainers.batch_top_k.BatchTopKSAE, "AutoEncoderTopK": trainers.top_k.AutoEncoderTopK
    }[kind]  # fmt: skip
    folder, x = write_folder(tmp_path, kind), residuals(21)
    options = {"normalize_decoder": False} if kind == "AutoEncoder" else {}
    theirs = made.from_pretrained(str(folder / "ae.pt"), **options)
    with torch.no_grad():
        torch.testing.assert_close(load(folder).encode(x), theirs.encode(x))
        torch.testing.assert_close(load(folder)(x), theirs(x))


def test_it_says_what_the_config_says_and_no_more(tmp_path):
    sae = load(write_folder(tmp_path / "resid_post_layer_19" / "trainer_1"))
    info = sae.info
    assert (info.model, info.block, info.site, info.k) == ("Qwen/Qwen2.5-7B-Instruct", 19, "resid_post", 5)
    assert (info.context_size, info.prepend_bos) == (1024, None)
    assert info.training["trainer"]["norm_factor"] == 12.5
    assert info.notes == ()
    folder = write_folder(tmp_path / "b", config=make_config("BatchTopKSAE", add_special_tokens=False))
    assert load(folder).info.prepend_bos is False
    folder = write_folder(tmp_path / "d", config=make_config("BatchTopKSAE", add_special_tokens=True))
    assert load(folder).info.prepend_bos is None, "Qwen's tokenizer has no BOS token to add"
    assert "whether a BOS token is among them" in load(folder).info.notes[0]
    wrong = make_config("BatchTopKSAE", layer=20)
    wrong["trainer"]["submodule_name"] = "resid_post_layer_19"
    info = load(write_folder(tmp_path / "c", config=wrong)).info
    assert info.block == 19
    assert "layer 20" in info.notes[0]


def test_the_block_is_no_number_that_happens_to_stand_in_a_path(tmp_path):
    silent = make_config("BatchTopKSAE", layer=7)
    silent["trainer"]["submodule_name"] = None
    info = load(write_folder(tmp_path / "multilayer_2" / "resid_post_layer_3" / "trainer_1", config=silent)).info
    assert (info.block, info.notes) == (7, ()), "the config says it"
    silent["trainer"]["layer"] = None
    assert load(write_folder(tmp_path / "layer_2" / "resid_post_layer_3" / "trainer_1", config=silent)).info.block == 3
    assert load(write_folder(tmp_path / "layer_2" / "some" / "trainer_1", config=silent)).info.block is None
    assert load(write_folder(tmp_path / "multilayer_2" / "trainer_1", config=silent)).info.block is None


def test_it_becomes_a_folder_of_sae_lens_and_comes_back(tmp_path):
    sae, x = load(write_folder(tmp_path / "a")), residuals(9)
    again = load(save(sae, tmp_path / "b"))
    torch.testing.assert_close(again.encode(x), sae.encode(x))
    assert again.info == sae.info


def test_bfloat16_arrays(tmp_path):
    sae, x = load(write_folder(tmp_path, dtype=torch.bfloat16)), residuals(9)
    assert sae.dtype == torch.bfloat16
    wide = {name: v.float() for name, v in make_arrays("BatchTopKSAE", dtype=torch.bfloat16).items()}
    acts, _ = by_definition("BatchTopKSAE", wide, x)
    torch.testing.assert_close(sae.to(dtype=torch.float32).encode(x), acts)


@pytest.mark.parametrize("kind", ["BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
def test_an_unfinished_threshold_is_an_error_or_computed(kind, tmp_path):
    folder = write_folder(tmp_path, kind, threshold=-1.0)
    with pytest.raises(UserError, match=r"threshold -1.*\n.*\n.*calibrate"):
        load(folder)
    x = residuals(400)
    sae = load_dictionary_learning(folder, calibrate=x)
    assert float((sae.encode(x) > 0).sum(-1).float().mean()) == 5.0
    assert "400 residuals" in sae.info.notes[-1]
    assert torch.equal(load(folder, calibrate=x).threshold, sae.threshold)


def test_the_threshold_leaves_outliers_out_and_needs_enough():
    sae = make_sae(threshold=0.0)
    x = residuals(100)
    with_sinks = torch.cat([x, 1e4 * residuals(10, seed=5)])
    assert threshold_for(sae, with_sinks, 3) == threshold_for(sae, x, 3)
    for k in (1, 2.5, 7):
        t = threshold_for(sae, x, k)
        assert float((make_sae(threshold=t).encode(x) > 0).sum(-1).float().mean()) == pytest.approx(k)
    with pytest.raises(UserError, match="0 residuals"):
        threshold_for(sae, x[:0], 3)
    with pytest.raises(UserError, match="fewer than 39"):
        threshold_for(sae, x, 39)


class Evil:
    def __reduce__(self):
        return (open, ("/tmp/should-not-exist-of-pvsae-tests", "w"))


def test_no_code_is_run_and_damage_is_said(tmp_path):
    folder = write_folder(tmp_path / "a")
    (folder / "ae.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="cannot be read as arrays"):
        load(folder)
    torch.save({"encoder.weight": torch.zeros(2, 2), "who": Evil()}, folder / "ae.pt")
    with pytest.raises(UserError, match="cannot be read as arrays"):
        load(folder)
    torch.save([torch.zeros(2)], folder / "ae.pt")
    with pytest.raises(UserError, match="more than named arrays"):
        load(folder)
    arrays = make_arrays("BatchTopKSAE")
    torch.save({name: v for name, v in arrays.items() if name != "encoder.bias"}, folder / "ae.pt")
    with pytest.raises(UserError, match="lacks 'b_enc'"):
        load(folder)
    (folder / "ae.pt").unlink()
    with pytest.raises(UserError, match=r"there is no .*ae.pt"):
        load_dictionary_learning(folder)
    with pytest.raises(UserError, match="GatedAutoEncoder"):
        load(write_folder(tmp_path / "b", "GatedAutoEncoder"))
    other = write_folder(tmp_path / "c", config=make_config("BatchTopKSAE", k=0))
    config = json.loads((other / "config.json").read_text())
    config["trainer"]["dict_size"] = 7
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="dict_size 7"):
        load(other)
    (other / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no dict_class"):
        load(other)
