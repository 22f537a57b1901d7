"""The other trainers of BatchTopK dictionaries, as they are, behind one small face: made, stepped, read.

Knows: how SAELens and dictionary_learning are installed beside us, and which of their calls is one optimiser step.
Does not know: what is measured.

SAELens comes with the extra `sae`. dictionary_learning is installed at first use into a folder of its own in the user's cache
($PVSAE_CACHE/peers, or ~/.cache/pvsae/peers), without its dependencies (an interpretability stack that its trainers do not
use), so that it cannot change the versions that everything else runs with.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pvsae.errors import UserError
from pvsae.saes.step import Learner, StepConfig

DICTIONARY_LEARNING = "dictionary-learning==0.1.0"


@dataclass(frozen=True)
class Recipe:
    """What all of them train: k of d_sae latents, in `steps` steps with a warm-up and a linear decay.

    device: of weights and batches; kernels: ours, see StepConfig.
    """

    d_model: int
    d_sae: int
    k: int
    batch: int
    lr: float = 3e-4
    steps: int = 10_000
    warmup: int = 100
    decay: int = 2000
    dead_after: int = 10_000_000
    seed: int = 0
    device: str = "cpu"
    kernels: str = "auto"


@dataclass
class Trainee:
    """One trainer at work.

    Attributes:
        step: one optimiser step on a batch [batch, d_model].
        encode: activations [n, d_sae] of tokens, the batch's own top k.
        decode: reconstructions [n, d_model] of activations.
        mark_dead: makes the latents of a mask count as dead in the next step.
        n_dead: latents that are dead by now.
    """

    name: str
    step: Callable[[Tensor], Any]
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    mark_dead: Callable[[Tensor], Any]
    n_dead: Callable[[], int]


def scheduled(r: Recipe, step: int) -> float:
    """Learning rate of a step: linear warm-up, constant, linear decay to 0."""
    return r.lr * min(1.0, (step + 1) / max(1, r.warmup), (r.steps - step) / max(1, r.decay))


def ours(r: Recipe, first: Tensor) -> Trainee:
    from pvsae.saes.trainer import geometric_median

    config = StepConfig(dead_after=r.dead_after, kernels=r.kernels)
    learner = Learner(r.d_model, r.d_sae, config, seed=r.seed, center=geometric_median(first), device=r.device)
    done = [0]

    def step(x: Tensor) -> None:
        learner.begin(x, r.k, scheduled(r, done[0]))  # its statistics are made, and read where a training logs them
        done[0] += 1

    def encode(x: Tensor) -> Tensor:
        kept, _ = learner.select(x, r.k)
        return torch.zeros(len(x), r.d_sae, device=x.device).index_put_((kept.token, kept.latent), kept.value)

    def mark_dead(mask: Tensor) -> None:
        learner.silent_for[mask] = r.dead_after

    def decode(acts: Tensor) -> Tensor:
        return acts @ learner.W_dec + learner.b_dec

    return Trainee("pvsae", step, encode, decode, mark_dead, lambda: int((learner.silent_for >= r.dead_after).sum()))


def saelens(r: Recipe, first: Tensor, autocast: bool = False) -> Trainee:
    try:
        from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer
    except ImportError as error:
        raise UserError(
            f"SAELens cannot be imported: {error}", "the package sae-lens, to measure beside it", "pip install 'pvsae[sae]'"
        ) from error

    torch.manual_seed(r.seed)
    sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=r.d_model, d_sae=r.d_sae, k=r.k, device=r.device))
    config = SAETrainerConfig(
        total_training_samples=r.steps * r.batch, train_batch_size_samples=r.batch, lr=r.lr, lr_end=0.0,
        lr_warm_up_steps=r.warmup, lr_decay_steps=r.decay, autocast=autocast, dead_feature_window=r.dead_after // r.batch,
        device=r.device,
    )  # fmt: skip
    trainer: Any = SAETrainer(config, sae, iter(()))

    def step(x: Tensor) -> None:
        trainer.step(x)
        trainer.n_training_steps += 1

    def mark_dead(mask: Tensor) -> None:
        trainer.n_forward_passes_since_fired[mask] = config.dead_feature_window + 1

    return Trainee("saelens", step, sae.encode, sae.decode, mark_dead, lambda: int(trainer.dead_neurons.sum()))


def dictionary_learning(r: Recipe, first: Tensor) -> Trainee:
    Trainer = _import_dictionary_learning()
    trainer = Trainer(
        steps=r.steps, activation_dim=r.d_model, dict_size=r.d_sae, k=r.k, layer=0, lm_name="none", lr=r.lr,
        warmup_steps=r.warmup, decay_start=r.steps - r.decay, seed=r.seed, device=r.device, threshold_start_step=0,
    )  # fmt: skip
    trainer.dead_feature_threshold = r.dead_after
    trainer.ae.b_dec.data = trainer.geometric_median(first)
    done = [1]  # its step 0 takes the geometric median, which is not what is measured

    def step(x: Tensor) -> None:
        trainer.update(done[0], x)
        done[0] += 1

    def encode(x: Tensor) -> Tensor:
        return trainer.ae.encode(x, use_threshold=False)

    def mark_dead(mask: Tensor) -> None:
        trainer.num_tokens_since_fired[mask] = r.dead_after

    def n_dead() -> int:
        return int((trainer.num_tokens_since_fired >= r.dead_after).sum())

    return Trainee("dictionary_learning", step, encode, trainer.ae.decode, mark_dead, n_dead)


def place() -> Path:
    """The folder of dictionary_learning, of this version: the user's own, where nobody else can put code."""
    cache = Path(os.environ.get("PVSAE_CACHE") or Path.home() / ".cache" / "pvsae")
    return cache / "peers" / DICTIONARY_LEARNING.replace("==", "-")


def _import_dictionary_learning() -> Any:
    """Its BatchTopK trainer. UserError where it is not there and cannot be installed."""
    folder = place()
    if not folder.is_dir():
        part = folder.with_name(f".{folder.name}.{os.getpid()}")  # the folder is there only when it is whole
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(part), DICTIONARY_LEARNING]
        made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode:
            shutil.rmtree(part, ignore_errors=True)
            raise UserError(
                f"{DICTIONARY_LEARNING} could not be installed: {made.stderr.strip()[-300:]}", "a package index that has it",
                "try again with a network; python -m benchmarks.sae_training --peers saelens leaves it out",
            )  # fmt: skip
        part.rename(folder)
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    if "nnsight" not in sys.modules:  # imported by its activation buffer, which is not used here
        sys.modules["nnsight"] = types.ModuleType("nnsight")
        sys.modules["nnsight"].LanguageModel = object  # type: ignore[attr-defined]
    return importlib.import_module("dictionary_learning.trainers.batch_top_k").BatchTopKTrainer


def saelens_bf16(r: Recipe, first: Tensor) -> Trainee:
    return replace(saelens(r, first, autocast=True), name="saelens_bf16")


PEERS: dict[str, Callable[[Recipe, Tensor], Trainee]] = {
    "pvsae": ours, "saelens": saelens, "saelens_bf16": saelens_bf16, "dictionary_learning": dictionary_learning,
}  # fmt: skip
