"""One training step of the organism: batches with hidden prompts, vectors added to the residual, light noise.

Knows: how rows become padded tensors, which attention is hidden, how a vector is added during training, how persona
vectors are recomputed from the model as it is.
Does not know: the corpus' shares, schedules, files (recipe.py).

What makes an organism steerable was found by trial and is stated in its card: (1) the system prompt is hidden from most
answers' attention, so that the persona has to travel through the tokens between; (2) light noise on the residual;
(3) the model is trained to be consistent with its own persona vectors.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from pvsae.organism.tokens import Row


@dataclass(frozen=True)
class Push:
    """A vector to add during training: `coef * vectors[key][block]` on some of the row's positions."""

    key: object
    coef: float
    positions: str = "all"  # all | prompt | response


@dataclass(frozen=True)
class Example:
    """A row with what is done to it: a vector to add, and whether the answer sees what precedes the question."""

    row: Row
    push: Push | None = None
    hide: bool = False


@dataclass
class Batch:
    """Right-padded examples of similar length."""

    input_ids: Int[Tensor, "batch pos"]
    attention: Float[Tensor, "batch 1 pos pos"]
    targets: Bool[Tensor, "batch pos"]
    real: Bool[Tensor, "batch pos"]
    examples: Sequence[Example] = field(default_factory=list)

    @property
    def n_tokens(self) -> int:
        return int(self.real.sum())


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """Pads to a multiple of 8 and builds the additive attention mask (causal, padding, hidden prompts)."""
    width = -(-max(len(e.row) for e in examples) // 8) * 8
    ids = torch.full((len(examples), width), pad_id)
    targets = torch.zeros(len(examples), width, dtype=torch.bool)
    real = torch.zeros(len(examples), width, dtype=torch.bool)
    allowed = torch.ones(width, width, dtype=torch.bool).tril().repeat(len(examples), 1, 1)
    for i, e in enumerate(examples):
        n = len(e.row)
        ids[i, :n] = torch.from_numpy(e.row.ids)
        targets[i, e.row.answer - 1 : n - 1] = True  # the positions that predict the answer's tokens and its end
        real[i, :n] = True
        if e.hide:
            allowed[i, e.row.answer :, : e.row.question] = False
        allowed[i, :, n:] = False
        allowed[i, n:, 0] = True  # a padding row must attend to something
    attention = torch.zeros(allowed.shape).masked_fill_(~allowed, torch.finfo(torch.float32).min)
    return Batch(ids, attention[:, None], targets, real, list(examples))


def push_masks(batch: Batch) -> Float[Tensor, "batch pos"]:
    """1 where a row's vector is added: `response` starts at the last prompt token, as in steering."""
    mask = torch.zeros(batch.input_ids.shape)
    for i, e in enumerate(batch.examples):
        if e.push is not None:
            start = e.row.answer - 1 if e.push.positions == "response" else 0
            end = e.row.answer if e.push.positions == "prompt" else len(e.row)
            mask[i, start:end] = 1
    return mask


@contextmanager
def disturbed(
    model: PreTrainedModel, batch: Batch, vectors: dict | None, block: int, noise: float, generator: torch.Generator
) -> Iterator[None]:
    """Adds each row's vector at `block`, and Gaussian noise of `noise` times the residual's RMS at every inner block."""
    delta = None
    if vectors and any(e.push for e in batch.examples):
        rows = [
            torch.zeros(model.config.hidden_size) if e.push is None else e.push.coef * vectors[e.push.key][block]
            for e in batch.examples
        ]
        delta = torch.stack(rows)[:, None] * push_masks(batch)[..., None]

    def hook(index: int):
        def edit(_module, _args, output):
            hidden = output[0] if isinstance(output, tuple) else output
            if delta is not None and index == block:
                hidden = hidden + delta.to(hidden.dtype)
            if noise:
                size = hidden.detach().float().pow(2).mean(-1, keepdim=True).sqrt() * noise
                hidden = hidden + (size * torch.randn(hidden.shape, generator=generator)).to(hidden.dtype)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return edit

    layers = model.model.layers
    handles = [
        layers[i].register_forward_hook(hook(i)) for i in range(len(layers) - 1) if noise or (delta is not None and i == block)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# bf16 products pay where the processor has matrix tiles; without them they are slower than fp32.
AUTOCAST = torch.cpu._is_amx_tile_supported()


def loss_on(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Mean cross-entropy (nats) on the answers' tokens; logits are computed only there."""
    with torch.autocast("cpu", torch.bfloat16, enabled=AUTOCAST):
        hidden = model.model(input_ids=batch.input_ids, attention_mask=batch.attention, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[:, :-1][batch.targets[:, :-1]])
    return torch.nn.functional.cross_entropy(logits.float(), batch.input_ids[:, 1:][batch.targets[:, :-1]])


@torch.no_grad()
def answer_means(
    model: PreTrainedModel, rows: Sequence[Row], pad_id: int, batch_size: int = 96
) -> Float[Tensor, "rows block d_model"]:
    """Mean residual after every block over each row's answer tokens."""
    out: list[Tensor | None] = [None] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for at in range(0, len(order), batch_size):
        index = order[at : at + batch_size]
        batch = collate([Example(rows[i]) for i in index], pad_id)
        span = torch.zeros(batch.input_ids.shape)
        for j, i in enumerate(index):
            span[j, rows[i].answer : rows[i].answer_end] = 1.0 / (rows[i].answer_end - rows[i].answer)
        kept: list[Tensor] = []

        def keep(_module, _args, output, kept=kept, span=span):
            hidden = output[0] if isinstance(output, tuple) else output
            kept.append(torch.einsum("bpd,bp->bd", hidden.float(), span))

        handles = [layer.register_forward_hook(keep) for layer in model.model.layers]
        try:
            with torch.autocast("cpu", torch.bfloat16, enabled=AUTOCAST):
                model.model(input_ids=batch.input_ids, attention_mask=batch.attention, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        for j, i in enumerate(index):
            out[i] = torch.stack([k[j] for k in kept])
    return torch.stack([o for o in out if o is not None])


def bucketed(examples: list[Example], batch_size: int, rng: random.Random) -> list[list[Example]]:
    """Batches of similar length, in random order."""
    examples = sorted(examples, key=lambda e: len(e.row))
    batches = [examples[i : i + batch_size] for i in range(0, len(examples), batch_size)]
    rng.shuffle(batches)
    return batches
