"""The size that a plan says of an adapter is what PEFT makes of it."""

from __future__ import annotations

import pytest
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from pvsae.finetuning.lora import LoraSettings, check_targets, size

GPT2 = (GPT2LMHeadModel, GPT2Config(vocab_size=40, n_embd=24, n_layer=2, n_head=2, n_positions=16))
QWEN2 = (
    Qwen2ForCausalLM,
    Qwen2Config(
        vocab_size=40, hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    ),
)  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "targets"),
    [(GPT2, ("c_attn",)), (GPT2, ("c_attn", "c_fc", "c_proj")), (GPT2, ("all-linear",)), (QWEN2, ("k_proj", "up_proj"))],
)
def test_the_size_is_that_of_the_matrices_that_are_trained(kind, targets) -> None:
    """GPT-2's layers are Conv1D, whose weights stand the other way round."""
    make, config = kind
    settings, model = LoraSettings(rank=4, targets=targets), make(config)
    check_targets(model, settings, "tiny")
    said = size(model, settings)
    wanted = "all-linear" if targets == ("all-linear",) else list(targets)
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=wanted, task_type="CAUSAL_LM", fan_in_fan_out=kind is GPT2))
    assert said == sum(p.numel() for p in tuned.parameters() if p.requires_grad) > 0
