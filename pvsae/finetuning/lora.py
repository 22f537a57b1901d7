"""The adapter: rs-LoRA matrices put into a ChatModel for a while, and saved as a plain PEFT folder.

Knows: PEFT, which linear layers get matrices, what has to be as it was afterwards.
Does not know: data, losses, training.

The folder holds what PEFT writes (adapter_config.json, adapter_model.safetensors), so that `peft.PeftModel.from_pretrained`,
servers and `pvsae.load(model, adapter=FOLDER)` open it, and beside it pvsae_finetune.json, which says how it came about.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pvsae.errors import UserError
from pvsae.models.chatmodel import ChatModel
from pvsae.runs import write_json

ABOUT = "pvsae_finetune.json"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Shape of the adapter; defaults are those of the paper's code.

    Attributes:
        rank: columns of each pair of matrices.
        alpha: their product is multiplied by alpha / sqrt(rank) with `rslora`, else by alpha / rank.
        rslora: rank-stabilised scaling.
        dropout: of the adapters' input.
        targets: names of linear layers, as their last part in the model; ("all-linear",) takes every one but the head.
    """

    rank: int = 32
    alpha: int = 64
    rslora: bool = True
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"rank is {self.rank}", "at least 1")
        if self.alpha < 1:
            raise UserError(f"alpha is {self.alpha}", "at least 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout is {self.dropout}", "a share from 0 to below 1")
        if not self.targets:
            raise UserError("no layers are named for the adapter", "names of linear layers, such as q_proj")


@contextmanager
def attached(model: ChatModel, settings: LoraSettings, seed: int) -> Iterator[Any]:
    """The model with a fresh adapter in it, as a PeftModel over the very modules of `model`, ready to be trained.

    What the model does is unchanged, since one matrix of each pair is 0. Afterwards the model is what it was: its own linear
    layers, the same weights, nothing of the adapter, the same mode and the same gradients wanted.

    Args:
        seed: of the other matrix. Random numbers drawn elsewhere are not touched.

    Raises:
        UserError: an adapter is in the model already, or no layer has one of the names.
    """
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    hf = model.hf
    if any(isinstance(module, BaseTunerLayer) for module in hf.modules()):
        raise UserError(
            f"{model.name} has an adapter already",
            "a model without one, to put a new adapter into",
            "merge that adapter into the weights, save the model, and finetune the result",
        )
    check_targets(hf, settings, model.name)
    targets: Any = "all-linear" if _everything(settings) else list(settings.targets)
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, use_rslora=settings.rslora, lora_dropout=settings.dropout,
        target_modules=targets, bias="none", task_type="CAUSAL_LM",
    )  # fmt: skip
    wanted = {name: parameter.requires_grad for name, parameter in hf.named_parameters()}
    training, cache = hf.training, getattr(hf.config, "use_cache", None)
    peft = None
    try:
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # PEFT asks for a property that transformers has renamed
                peft = get_peft_model(hf, config)
        # Where it can be found again by any tool: a named model is a folder to them.
        peft.peft_config["default"].base_model_name_or_path = str(model.path.resolve() if model.path else model.name)
        yield peft
    finally:
        if peft is not None:
            peft.unload()
        for name, parameter in hf.named_parameters():
            parameter.requires_grad_(wanted[name])
        hf.train(training)
        if cache is not None:
            hf.config.use_cache = cache  # the Trainer turns it off: answers would be slow, and the model count as another one


def _everything(settings: LoraSettings) -> bool:
    return tuple(settings.targets) == ("all-linear",)


def _is_linear(module: torch.nn.Module) -> bool:
    """Whether PEFT gives a layer matrices under our targets; GPT-2's layers are linear ones with the weights turned round."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (torch.nn.Linear, Conv1D))


def check_targets(hf: Any, settings: LoraSettings, name: str) -> None:
    """UserError where a model, whose weights need not be there, has no linear layer of one of the names."""
    names = {where.rpartition(".")[2] for where, module in hf.named_modules() if _is_linear(module)}
    missing = [] if _everything(settings) else [target for target in settings.targets if target not in names]
    if missing:  # PEFT would go on with those that it finds, and stop at one that is not linear
        raise UserError(
            f"{name} has no linear layers called {', '.join(missing)}",
            "names of its linear layers",
            "--targets all-linear takes them all",
        )


def size(hf: Any, settings: LoraSettings) -> int:
    """Parameters that an adapter of these settings would have in a model, whose weights need not be there."""
    head = hf.get_output_embeddings()
    everything = _everything(settings)
    layers = [
        module
        for name, module in hf.named_modules()
        if _is_linear(module) and (module is not head if everything else name.rpartition(".")[2] in settings.targets)
    ]
    return sum(settings.rank * sum(layer.weight.shape) for layer in layers)  # in + out, in either order


def save(peft: Any, folder: Path, about: Mapping[str, Any]) -> None:
    """Writes the adapter and, beside it, a JSON of how it came about."""
    peft.save_pretrained(str(folder))
    write_json(folder / ABOUT, about)
