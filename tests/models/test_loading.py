"""From a name to a model, and every way in which that can go wrong."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import pvsae.models.loading as loading
from pvsae.errors import UserError
from pvsae.models import load
from tests.conftest import save_tiny
from tests.models.rows import logits_of, rendered_rows


@pytest.fixture(scope="module")
def folder(tiny_folders):
    return tiny_folders("qwen2")


@pytest.fixture(scope="module")
def adapter(tiny_folders, tmp_path_factory):
    """A LoRA saved by PEFT for the tiny Qwen2, with the logits that PEFT itself gets with it."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_folders("qwen2"), dtype=torch.float32)
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj", "down_proj"], init_lora_weights=False)
    wrapped = get_peft_model(base, config)
    path = tmp_path_factory.mktemp("adapter")
    wrapped.save_pretrained(path)
    with torch.no_grad():
        return path, wrapped.eval()(torch.arange(5, 25)[None]).logits


def test_a_loaded_model_says_what_it_is(tiny_model, arch):
    hf = tiny_model.hf
    assert tiny_model.n_blocks == hf.config.num_hidden_layers == len(tiny_model.blocks)
    assert tiny_model.d_model == hf.config.hidden_size
    assert tiny_model.n_ctx == 512
    assert tiny_model.dtype == torch.float32
    assert tiny_model.device == torch.device("cpu")
    assert tiny_model.defaults == {}
    assert tiny_model.path.is_dir()
    assert hf.config._attn_implementation == "sdpa"
    assert not hf.training


def test_attention_and_dtype_are_as_asked(folder):
    eager = load(folder, device="cpu", attn="eager", dtype="bfloat16")
    assert eager.hf.config._attn_implementation == "eager"
    assert eager.dtype == torch.bfloat16
    fp32 = load(folder, device="cpu", attn="eager", dtype=torch.float32)
    rows = rendered_rows(fp32)
    for side in ("left", "right"):
        for a, b in zip(logits_of(fp32, rows, side=side), logits_of(load(folder, device="cpu"), rows), strict=True):
            torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)


def test_defaults_of_a_folder(folder, tmp_path):
    mine = shutil.copytree(folder, tmp_path / "m")
    (mine / "pvsae.json").write_text(json.dumps({"block": 2, "traits": "traits"}))
    assert load(mine, device="cpu").defaults == {"block": 2, "traits": "traits"}
    for bad, message in (("{", "not JSON"), ("[1]", "holds a list")):
        (mine / "pvsae.json").write_text(bad)
        with pytest.raises(UserError, match=message):
            load(mine, device="cpu")


def test_a_named_model_is_a_function_that_gives_a_folder(folder, monkeypatch):
    class Point:
        name = "mine"

        def load(self):
            return lambda: folder

    monkeypatch.setattr(loading, "known_models", lambda: {"mine": Point()})
    model = load("mine", device="cpu")
    assert model.name == "mine"
    assert model.path == folder
    with pytest.raises(UserError, match="mine"):
        load("yours", device="cpu")


def test_installed_names_are_found():
    assert {"organism", "organism-llama"} <= set(loading.known_models())


def test_names_that_lead_nowhere(tmp_path, folder):
    file = tmp_path / "x.gguf"
    file.write_text("")
    (tmp_path / "empty").mkdir()
    for name, message in [
        ("no-such-model", "there is no model 'no-such-model'"),
        ("./no/such/folder", "there is no model"),
        (tmp_path / "gone", "there is no model"),
        (file, "is a file"),
        (tmp_path / "empty", "no config.json"),
        ("nobody-at-all/not-a-model", "nobody-at-all/not-a-model"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            load(name, device="cpu")
        assert caught.value.expected


def test_folders_that_are_damaged(folder, tmp_path):
    def copy(name):
        return shutil.copytree(folder, tmp_path / name)

    pickled = copy("pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(UserError, match="safetensors"):
        load(pickled, device="cpu")

    lacking = copy("lacking")
    tensors = load_file(lacking / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, lacking / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj"):
        load(lacking, device="cpu")

    cut = copy("cut")
    content = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="could not be loaded"):
        load(cut, device="cpu")

    other = copy("other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "intermediate_size": 80}))
    with pytest.raises(UserError, match="weights"):
        load(other, device="cpu")

    (other / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of"}))
    with pytest.raises(UserError, match="config"):
        load(other, device="cpu")

    mute = copy("mute")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (mute / name).unlink()
    with pytest.raises(UserError, match="tokenizer"):
        load(mute, device="cpu")


def test_options_that_do_not_exist(folder):
    for options, message in [
        ({"dtype": "float8"}, "dtype 'float8'"),
        ({"dtype": torch.int8}, "dtype"),
        ({"device": "gpu"}, "device 'gpu'"),
        ({"device": "cuda:99"}, "not on this machine"),
        ({"device": "meta"}, "not on this machine"),
        ({"attn": "fast"}, "attention 'fast'"),
        ({"chat": "fancy"}, "fancy"),
    ]:
        with pytest.raises(UserError, match=message):
            load(folder, **{"device": "cpu", **options})


def test_an_adapter_gives_what_peft_gives(folder, adapter):
    path, expected = adapter
    model = load(folder, adapter=path, device="cpu")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(model.hf(ids).logits, expected, atol=1e-4, rtol=1e-4)
        assert (load(folder, device="cpu").hf(ids).logits - expected).abs().max() > 0.05
        torch.testing.assert_close(model.bridge(ids), expected, atol=2e-4, rtol=1e-4)
    assert model.name == f"{folder}+{path}"
    assert len(model.blocks) == 4


def test_adapters_that_do_not_fit(folder, adapter, tmp_path, tiny_folders):
    path, _ = adapter
    wide = save_tiny("qwen2", tmp_path / "wide", hidden_size=64)
    short = save_tiny("qwen2", tmp_path / "short", num_hidden_layers=2)
    for base, message in ((wide, "48.*64"), (short, "no such module")):
        with pytest.raises(UserError, match=message):
            load(base, adapter=path, device="cpu")
    for broken, message in ((folder, "adapter_config.json"), (tmp_path / "gone", "adapter_config.json")):
        with pytest.raises(UserError, match=message):
            load(folder, adapter=broken, device="cpu")
    bad = shutil.copytree(path, tmp_path / "bad")
    (bad / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="damaged"):
        load(folder, adapter=bad, device="cpu")
    with pytest.raises(UserError, match="adapter="):
        load(path, device="cpu")


def test_the_package_imports_no_torch():
    code = "import sys, pvsae, pvsae.models; assert not {'torch', 'transformers', 'pandas'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    import pvsae.models

    assert callable(pvsae.models.load), "the function, whatever submodules have been imported"
    for name in pvsae.models.__all__:
        if name != "RemoteModel":
            assert getattr(pvsae.models, name).__module__.startswith("pvsae.models."), name
