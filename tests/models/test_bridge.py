"""The TransformerBridge view: the same tensors, the same numbers, the same sites."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from pvsae.models import Add, Residual, load
from tests.models.rows import direction, logits_of, rendered_rows

CLOSE = {"atol": 2e-4, "rtol": 1e-4}


def storages(module):
    return {t.data_ptr() for t in (*module.parameters(), *module.buffers())}


def test_the_bridge_owns_no_tensor(tiny_model):
    ours = storages(tiny_model.hf)
    bridge = tiny_model.bridge
    assert ours == storages(bridge) & ours, "every parameter and buffer of the model is there"
    foreign = {t.data_ptr(): t for t in (*bridge.parameters(), *bridge.buffers()) if t.data_ptr() not in ours}
    # The bridge gives an unembedding without a bias one of zeros; nothing else is its own.
    assert [tuple(t.shape) for t in foreign.values()] in ([], [(tiny_model.hf.config.vocab_size,)])
    assert tiny_model.bridge is tiny_model.bridge
    assert tiny_model.bridge.original_model is not tiny_model.hf
    assert any("inv_freq" in name for name, _ in tiny_model.hf.named_buffers()), "rotary tables were among the shared"


def test_logits_residuals_and_an_added_vector_are_the_same(tiny_model):
    row = rendered_rows(tiny_model)[0]
    ids, v, block = torch.tensor([row.ids]), direction(tiny_model), 1
    reads = [Residual(b) for b in range(tiny_model.n_blocks)]
    with torch.no_grad():
        logits, cache = tiny_model.bridge.run_with_cache(ids)
    torch.testing.assert_close(logits[0], logits_of(tiny_model, [row])[0], **CLOSE)
    ours = tiny_model.capture([row], reads)
    for read in reads:
        torch.testing.assert_close(cache[f"blocks.{read.block}.hook_resid_post"][0], ours[read.key][0], **CLOSE)
    added = [(f"blocks.{block}.hook_resid_post", lambda h, hook: h + 3.0 * v.values)]
    with torch.no_grad():
        theirs = tiny_model.bridge.run_with_hooks(ids, fwd_hooks=added)[0]
    torch.testing.assert_close(theirs, logits_of(tiny_model, [row], [Add(v, block, 3.0)])[0], **CLOSE)
    assert (theirs - logits[0]).abs().max() > 0.05


def test_a_bridge_made_under_hooks_takes_none_of_them_along(tiny_folders):
    model = load(tiny_folders("qwen2"), device="cpu")
    row = rendered_rows(model)[0]
    plain = logits_of(model, [row])[0]
    with model.hooks([Add(direction(model), 1, 5.0)]), torch.no_grad():
        bridged = model.bridge(torch.tensor([row.ids]))[0]
        assert (model.hf(torch.tensor([row.ids])).logits[0] - plain).abs().max() > 0.05, "the model itself is still hooked"
    torch.testing.assert_close(bridged, plain, **CLOSE)


@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_adapters_and_training_show_through(tiny_folders, name):
    model = load(tiny_folders(name), device="cpu")
    torch.manual_seed(1)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False), model.hf)
    ids = torch.tensor([rendered_rows(model)[0].ids])
    torch.testing.assert_close(model.bridge(ids), model.hf(ids).logits, **CLOSE)
    lora = [p for n, p in model.hf.named_parameters() if "lora_" in n]
    ours = torch.autograd.grad(model.hf(ids).logits.square().mean(), lora)
    theirs = torch.autograd.grad(model.bridge(ids).square().mean(), lora)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3 * float(b.abs().max()), rtol=1e-3)
    with torch.no_grad():
        for p in lora:
            p.mul_(2)
    torch.testing.assert_close(model.bridge(ids), model.hf(ids).logits, **CLOSE)


def test_folding_weights_in_the_bridge_leaves_the_model_alone(tiny_folders):
    model = load(tiny_folders("llama"), device="cpu")
    row = rendered_rows(model)[0]
    before = logits_of(model, [row])[0]
    model.bridge.enable_compatibility_mode(disable_warnings=True)
    assert torch.equal(logits_of(model, [row])[0], before)
    with torch.no_grad():
        folded = model.bridge(torch.tensor([row.ids]))[0]
    torch.testing.assert_close(folded.log_softmax(-1), before.log_softmax(-1), **CLOSE)
