"""What every test may use: offline settings, the shared test data if it is there, and tiny models with real tokenizers."""

from __future__ import annotations

import os

# Before anything imports a library that reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
if "PYTEST_XDIST_WORKER" in os.environ:  # a thread each, in what they start too: two pools of threads on the same cores fight
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest
import torch

torch.set_num_threads(min(2, torch.get_num_threads()))

ARCHITECTURES = ("qwen2", "qwen3", "llama")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = (
    "The ferry leaves the harbour at nine and comes back before dark.",
    "Nobody knows why the old clock in the kitchen stopped, but everybody has a theory.",
    "You are a helpful assistant. Answer in one short sentence, and never make anything up.",
    "What is the tallest mountain that you have heard of, and how would one climb it?",
)


def find_shared() -> Path | None:
    """The data folder beside the checkout, or the one that PVSAE_SHARED names; None if there is none."""
    folder = Path(os.environ.get("PVSAE_SHARED") or Path(__file__).resolve().parents[1].parent / "shared")
    return folder if folder.is_dir() else None


@pytest.fixture(scope="session")
def shared() -> Path:
    """The data folder beside the checkout."""
    folder = find_shared()
    if folder is None:
        pytest.skip("the shared test data is not beside the checkout (set PVSAE_SHARED to its folder)")
    return folder


def make_tokenizer():
    """A byte-level BPE with a few merges, so that tokens cross word boundaries, and a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=512
    )
    fast.chat_template = CHATML
    return fast


def make_config(arch: str, vocab_size: int, **changes):
    """Configs of 4 blocks and d_model 48, with grouped-query attention and, on Qwen3, a head size of its own."""
    from transformers import LlamaConfig, Qwen2Config, Qwen3Config

    settings = {
        "vocab_size": vocab_size,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,  # random weights this large make attention, and so every position, matter
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **changes,
    }
    if arch == "qwen3":
        settings["head_dim"] = 16
    return {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}[arch](**settings)


def save_tiny(arch: str, folder: Path, seed: int = 0, **changes) -> Path:
    """Writes a model folder with random weights."""
    from transformers import AutoModelForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(make_config(arch, len(tokenizer), **changes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory):
    """A function: architecture ("qwen2", "qwen3", "llama", "stories260k") to model folder, made once a session."""
    made: dict[str, Path] = {}

    def get(arch: str) -> Path:
        if arch not in made:
            if arch == "stories260k":
                shared = find_shared()
                folder = shared / "models" / "stories260k" if shared else None
                if folder is None or not folder.is_dir():
                    pytest.skip("the pretrained model stories260k is not beside the checkout")
                made[arch] = folder
            else:
                made[arch] = save_tiny(arch, tmp_path_factory.mktemp("models") / arch)
        return made[arch]

    return get


@pytest.fixture(scope="session")
def tiny_models(tiny_folders):
    """A function: architecture to loaded ChatModel, made once a session; tests must not change its weights."""
    made: dict[str, object] = {}

    def get(arch: str):
        if arch not in made:
            from pvsae.models import load

            options = {"chat": "plain"} if arch == "stories260k" else {}
            made[arch] = load(tiny_folders(arch), device="cpu", **options)
        return made[arch]

    return get


@pytest.fixture(params=[*ARCHITECTURES, "stories260k"])
def arch(request) -> str:
    """Every architecture that the hook laws are tested on, and the real pretrained model."""
    return request.param


@pytest.fixture
def tiny_folder(arch, tiny_folders) -> Path:
    """The model folder of `arch`."""
    return tiny_folders(arch)


@pytest.fixture
def tiny_model(arch, tiny_models):
    """The loaded ChatModel of `arch`."""
    return tiny_models(arch)
