"""Releases by name, out of a hub cache that is made here; no network."""

import json
import warnings

import pytest
import torch

from pvsae.errors import UserError
from pvsae.saes.folders import load, save
from pvsae.saes.releases import load_release
from tests.saes.foreign_folders import make_config, write_folder
from tests.saes.small import make_sae, need_sae_lens, residuals

QWEN = "qwen2.5-7b-instruct-andyrdt/resid_post_layer_19_trainer_1"
LLAMA = "llama-3.1-8b-instruct-andyrdt/resid_post_layer_15_trainer_1"


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch):
    """A function (repo, path in it) -> folder in an empty hub cache."""
    need_sae_lens()
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))

    def folder(repo, path):
        root = cache / ("models--" + repo.replace("/", "--"))
        (root / "refs").mkdir(parents=True, exist_ok=True)
        (root / "refs" / "main").write_text("0" * 40)
        made = root / "snapshots" / ("0" * 40) / path
        made.mkdir(parents=True)
        return made

    return folder


def test_qwens_release_with_its_facts_put_right(hub):
    config = make_config("BatchTopKSAE", layer=19)
    write_folder(hub("andyrdt/saes-qwen2.5-7b-instruct", "resid_post_layer_19/trainer_1"), config=config)
    with pytest.warns(UserWarning, match="not published"):
        sae = load(QWEN)
    info = sae.info
    assert (info.model, info.block, info.hook_name) == ("Qwen/Qwen2.5-7B-Instruct", 19, "blocks.19.hook_resid_post")
    assert info.prepend_bos is False, "SAELens stamps True on every release of this layout"
    assert info.drop_first == 8
    assert (info.outliers.multiple, info.outliers.median_norm) == (10.0, None)
    assert info.neuronpedia == "qwen2.5-7b-it/19-resid-post-aa"
    assert sae.ref == QWEN
    assert info.notes
    import sae_lens

    theirs = sae_lens.SAE.from_pretrained(*QWEN.split("/"))
    assert theirs.cfg.metadata.prepend_bos is True, "if this fails, SAELens was put right and the note can go"
    x = residuals(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(sae.encode(x), theirs.encode(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(sae(x), theirs(x), atol=1e-5, rtol=1e-5)


def test_llamas_release_began_with_a_bos_that_was_left_out(hub):
    config = make_config("BatchTopKSAE", layer=15)
    config["trainer"]["lm_name"] = "meta-llama/Llama-3.1-8B-Instruct"
    write_folder(hub("andyrdt/saes-llama-3.1-8b-instruct", "resid_post_layer_15/trainer_1"), config=config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        info = load_release(LLAMA).info
    assert (info.model, info.block, info.prepend_bos, info.drop_first) == ("meta-llama/Llama-3.1-8B-Instruct", 15, True, 1)
    assert info.outliers is None
    assert info.neuronpedia == "llama3.1-8b-it/15-resid-post-aa"


def test_a_release_in_sae_lens_own_layout(hub):
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    release, entry = next(
        (name, e) for name, e in get_pretrained_saes_directory().items() if e.conversion_func is None and len(e.saes_map) > 1
    )
    sae_id, path = next(iter(entry.saes_map.items()))
    sae = make_sae()
    save(sae, hub(entry.repo_id, path))
    loaded = load_release(f"{release}/{sae_id}")
    torch.testing.assert_close(loaded(residuals(4)), sae(residuals(4)))
    assert loaded.info.model == entry.model


def test_a_layout_that_sae_lens_has_to_read(hub):
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    release, entry = next((n, e) for n, e in get_pretrained_saes_directory().items() if e.conversion_func == "deepseek_r1")
    sae_id, path = next(iter(entry.saes_map.items()))
    file = hub(entry.repo_id, ".") / path
    file.parent.mkdir(parents=True, exist_ok=True)
    g = torch.Generator().manual_seed(0)
    d_model, d_sae = 4096, 4096 * 16
    thin = {"encoder.weight": torch.zeros(1).expand(d_sae, d_model), "decoder.weight": torch.zeros(1).expand(d_model, d_sae)}
    biases = {"encoder.bias": torch.randn(d_sae, generator=g), "decoder.bias": torch.randn(d_model, generator=g)}
    torch.save({**thin, **biases}, file)
    sae = load_release(f"{release}/{sae_id}")
    assert (sae.d_model, sae.d_sae, sae.apply_b_dec_to_input) == (d_model, d_sae, False)
    torch.testing.assert_close(sae.b_dec, biases["decoder.bias"])


def test_names_that_are_not_known_and_files_that_are_not_there(hub):
    for name, message in {
        "qwen2.5-7b-instruct-andyrd/resid_post_layer_19_trainer_1": "such as qwen2.5-7b-instruct-andyrdt",
        "qwen2.5-7b-instruct-andyrdt/resid_post_layer_20_trainer_1": "resid_post_layer_2",
        "qwen2.5-7b-instruct-andyrdt/": "has no dictionary ''",
        "no/such/folder": "no release 'no'",
        QWEN: r"(?s)cannot be downloaded.*HF_HUB_OFFLINE",
    }.items():
        with pytest.raises(UserError, match=message):
            load(name)
    folder = hub("andyrdt/saes-qwen2.5-7b-instruct", "resid_post_layer_19/trainer_1")
    (folder / "config.json").write_text(json.dumps(make_config("BatchTopKSAE")))
    with pytest.raises(UserError, match=r"ae\.pt .*cannot be downloaded"):
        load(QWEN)
