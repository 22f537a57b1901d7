"""Tiny judging models: random weights, with the output layer leaning towards digits."""

from __future__ import annotations

import pytest
import torch


def make_number_model(folder, whole: bool):
    """A Qwen2 of 2 blocks; byte-level BPE whose pre-tokenizer splits digits, or has a token for each number 0-100.

    Its logits of tokens that are digits are raised by about as much everywhere, so that numbers hold a fair share of the
    probability; which digit follows which is still up to the random weights and the prompt.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    from pvsae.models import load

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the question and the answer", "Rate the answer to the question"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    if whole:
        fast.add_tokens([AddedToken(str(n), normalized=False, special=False) for n in range(10, 101)])
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    config = Qwen2Config(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.08,
        tie_word_embeddings=False,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    torch.manual_seed(11)
    model = Qwen2ForCausalLM(config)
    digits = [i for i in range(len(fast)) if (fast.convert_ids_to_tokens(i) or "").isdigit()]
    with torch.no_grad():  # every residual gets a common part, and digits answer to it
        common = torch.randn(32)
        model.model.embed_tokens.weight.normal_(std=1.0).add_(common)
        model.lm_head.weight.normal_(std=0.2)
        model.lm_head.weight[digits] += 0.2 * common
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return load(folder, device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def number_model(tmp_path_factory):
    """Digits are tokens of their own, as with Qwen."""
    return make_number_model(tmp_path_factory.mktemp("numbers") / "split", whole=False)


@pytest.fixture(scope="session")
def whole_number_model(tmp_path_factory):
    """One token for each number 0-100, as with Llama-3."""
    return make_number_model(tmp_path_factory.mktemp("numbers") / "whole", whole=True)
