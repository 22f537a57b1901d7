"""What a training will take, said before anything large is loaded: tokens, memory, disk, time.

Knows: the shapes of a model and of dictionaries, bytes a parameter, and how to time a small piece of the work on this machine.
Does not know: configs and commands. Nothing here reads weights or text.

Time is arithmetic on two measured rates. A step is timed on a dictionary with so few of the latents that it is small, and
multiplied up: product, selection and Adam are all proportional to the number of latents. The model is timed as matrix products
of its own width, 2 operations a parameter and token up to the highest block, plus attention; what else a forward pass does is
not counted, so that the model's part is a lower bound.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from pvsae.models import ModelShape
from pvsae.saes.stream import DTYPES, StreamConfig
from pvsae.saes.trainer import DictionaryConfig, TrainConfig

MOST_ELEMENTS = 2**22  # of a weight matrix that is made to time a step: 64 MB with gradients and moments
WEIGHT, MOMENTS, GRADIENT = 4, 8, 4  # bytes a parameter in fp32


@dataclass(frozen=True)
class Demand:
    """What a training takes in each of the processes that share its latents, and otherwise in one.

    Attributes:
        tokens, steps: of training.
        memory: part -> bytes, on the model's device unless its name says otherwise.
        checkpoint, saved: bytes on disk while it runs, and at the end.
        model_seconds, step_seconds: of all forward passes (a lower bound) and of all steps; None where not estimated.
        notes: how the numbers came about.
    """

    tokens: int
    steps: int
    memory: dict[str, int]
    checkpoint: int
    saved: int
    model_seconds: float | None = None
    step_seconds: float | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {_bytes(n)}" for name, n in self.memory.items())
        lines = [
            f"tokens    {self.tokens:,} in {self.steps:,} steps of {self.tokens // self.steps:,}",
            f"memory    {_bytes(sum(self.memory.values()))}: {parts}",
            f"disk      {_bytes(2 * self.checkpoint)} for the checkpoint and the one that replaces it, while it runs; "
            f"{_bytes(self.saved)} for the dictionaries",
        ]
        if self.model_seconds is not None and self.step_seconds is not None:
            both = self.model_seconds + self.step_seconds
            parts = f"steps {_time(self.step_seconds)}, the model {_time(self.model_seconds)}"
            lines.append(f"time      at least {_time(both)}: {parts}")
        return "\n".join([*lines, *(f"          {note}" for note in self.notes)])


def demand(
    shape: ModelShape,
    dtype: torch.dtype,
    device: torch.device,
    training: TrainConfig,
    stream: StreamConfig,
    context: int,
    *,
    measure: bool = True,
) -> Demand:
    """What a training takes.

    Args:
        shape: of the model.
        dtype, device: of the model.
        context: tokens a row.
        measure: whether to estimate the time, which takes a few seconds of work on the device.
    """
    shards = training.width_shards
    parameters = sum(2 * d.d_sae * shape.d_model + d.d_sae + shape.d_model for d in training.dictionaries)
    held = -(-parameters // shards)
    largest = max(2 * d.d_sae * shape.d_model for d in training.dictionaries)
    buffer = stream.buffer_tokens * shape.d_model * DTYPES[stream.dtype].itemsize * len(training.blocks)
    elsewhere = f" (on {stream.buffer_device})" if stream.buffer_device and stream.buffer_device != device.type else ""
    blocks = max(training.blocks) + 1
    widest = max(shape.block_parameters) // shape.d_model  # values a token that a block's products have in all
    memory = {
        "model": shape.parameters * dtype.itemsize,
        "one forward pass": stream.batch_tokens * (widest // 2 + 4 * shape.d_model) * dtype.itemsize,
        "weights": held * WEIGHT,
        "Adam": held * MOMENTS,
        "gradients": largest // shards * GRADIENT,
        f"shuffle buffer{elsewhere}": buffer,
    }
    if device.type == "cuda" and training.step.product in ("auto", "bfloat16"):
        memory["encoders in bf16"] = sum(d.d_sae for d in training.dictionaries) // shards * shape.d_model * 2
    if shards > 1:
        memory["a whole dictionary at the end (in the main memory of the first process)"] = largest * WEIGHT
    tokens = training.steps * training.batch
    shared = (
        f"for each of {shards} processes that share the latents (torchrun --nproc_per_node {shards}); with n times as many the "
        "time is an nth",
    ) if shards > 1 else ()  # fmt: skip
    made = Demand(tokens, training.steps, memory, parameters * (WEIGHT + MOMENTS) + buffer, parameters * WEIGHT, notes=shared)
    if not measure:
        return made
    rate = _product_rate(shape.d_model, dtype, device, min(stream.batch_tokens, 2048))
    # Attention: each token's products with half a row of keys and of values.
    work = 2.0 * tokens / shards * (sum(shape.block_parameters[:blocks]) + blocks * context * shape.d_model)
    seconds = [_step_seconds(shape.d_model, d, training, device) / shards for d in training.dictionaries]
    shares = [_share(shape.d_model, d) for d in training.dictionaries]
    scaled = f", timed on 1/{round(1 / min(shares))} of the latents" if min(shares) < 1 else ""
    notes = (
        *shared,
        f"on this {device.type}: {sum(seconds):,.3f} s a step{scaled}; {blocks} of {shape.n_blocks} blocks with "
        f"{sum(shape.block_parameters[:blocks]) / 1e6:,.1f}M parameters",
        f"at the {rate / 1e12:.3g} teraflops that products of its width reach; tokens that are left out come on top",
    )
    return replace(made, model_seconds=work / rate, step_seconds=training.steps * sum(seconds), notes=notes)


def _share(d_model: int, d: DictionaryConfig) -> float:
    return min(1.0, MOST_ELEMENTS / (d_model * d.d_sae))


def _step_seconds(d_model: int, d: DictionaryConfig, training: TrainConfig, device: torch.device) -> float:
    """Seconds a step, measured on random activations of mean square norm d_model."""
    from pvsae.saes.step import Learner

    share = _share(d_model, d)
    d_sae = max(1, int(share * d.d_sae))
    learner = Learner(d_model, d_sae, training.step, device=device)
    x = torch.randn(training.batch, d_model, generator=torch.Generator().manual_seed(0)).to(device)
    k = min(d.k, d_sae)
    return _seconds(lambda: learner.step(x, k, 1e-4), device) * d.d_sae / d_sae


def _product_rate(d_model: int, dtype: torch.dtype, device: torch.device, rows: int) -> float:
    """Operations a second of a product [rows, d_model] @ [d_model, 4 d_model]."""
    a = torch.ones(rows, d_model, dtype=dtype, device=device)
    b = torch.ones(d_model, 4 * d_model, dtype=dtype, device=device)
    return 8.0 * rows * d_model**2 / _seconds(lambda: a @ b, device)


def _seconds(work: Callable[[], object], device: torch.device, times: int = 5) -> float:
    """The median of a few runs after one that warms up."""
    taken = []
    for _ in range(times + 1):
        _wait(device)
        started = time.perf_counter()
        work()
        _wait(device)
        taken.append(time.perf_counter() - started)
    return sorted(taken[1:])[times // 2]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _bytes(n: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:,.3g} TB"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 48 * 3600:
        return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:,.0f} days"
