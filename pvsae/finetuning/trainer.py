"""The training loop of an adapter: transformers' Trainer, with the hook API around every step.

Knows: batches, the loss on learnt tokens, the order of steps, checkpoints, metrics.
Does not know: where rows and directions come from, what is in an adapter, run folders.

What the Trainer's bookkeeping costs beside a bare loop is measured by `python -m benchmarks.finetuning`, on a model of a million
parameters, where it weighs most. What is changed in the Trainer, and why:
- Rows stand in the data set in the order in which they are seen, all passes one behind the other, so that going on is counting.
- A step's loss is the mean over the learnt tokens of all rows of the step, however they are spread over forward passes.
- Interventions are open around forward AND backward pass: gradient checkpointing runs blocks again in the backward pass, with or
  without their hooks, as the release of transformers has it.
- A checkpoint counts when it is marked as whole, and random numbers outside of the training stay what they were.
- One process, the model's own device: the Trainer would take the first GPU, or all of them by copies that have no hooks.
"""

from __future__ import annotations

import json
import math
import os
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from pvsae.errors import UserError
from pvsae.finetuning import checkpoints
from pvsae.finetuning.lora import LoraSettings, attached
from pvsae.finetuning.rows import Row, order
from pvsae.finetuning.treatments import ShiftPenalty, Treatment
from pvsae.models.batch import TokenBatch, is_oom
from pvsae.models.chatmodel import ChatModel
from pvsae.runs import atomic_write_text

METRICS = "metrics.jsonl"
UNLEARNT = -100
COLUMNS = ("step", "loss", "penalty", "grad_norm", "learning_rate", "strength", "rows", "tokens", "learnt")


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How an adapter is trained; defaults are those of the paper's code.

    Attributes:
        learning_rate: at its highest.
        scheduler: of the learning rate behind the warm-up: "linear", "cosine" or "constant".
        warmup_steps: over which it rises from 0.
        epochs: passes over the rows; need not be whole.
        max_steps: optimiser steps, in place of `epochs`.
        batch: rows a forward pass.
        accumulation: forward passes a step.
        weight_decay, max_grad_norm: of AdamW, and the length to which gradients are cut.
        gradient_checkpointing: keep activations at block borders alone, and compute the rest twice.
        packing: lay the rows of a forward pass one behind the other instead of padding each. Steps, rows and loss are the same.
        save_every: steps between checkpoints.
        seed: of the adapter's first weights, the rows' order, dropout.
    """

    learning_rate: float = 1e-5
    scheduler: str = "linear"
    warmup_steps: int = 5
    epochs: float = 1.0
    max_steps: int | None = None
    batch: int = 2
    accumulation: int = 8
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    packing: bool = False
    save_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if self.scheduler not in ("linear", "cosine", "constant"):
            raise UserError(f"scheduler {self.scheduler!r}", "linear, cosine or constant")
        for name in ("learning_rate", "epochs", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)}", "a positive number")
        for name, least in (("batch", 1), ("accumulation", 1), ("save_every", 1), ("warmup_steps", 0), ("weight_decay", 0)):
            if not getattr(self, name) >= least:
                raise UserError(f"{name} is {getattr(self, name)}", f"{least} or more")
        if self.max_steps is not None and self.max_steps < 1:
            raise UserError(f"max_steps is {self.max_steps}", "at least 1, or nothing, for whole passes over the rows")

    def seen(self, n_rows: int) -> int:
        """Rows that are seen in all, repeated ones counted again."""
        if self.max_steps is not None:
            return self.max_steps * self.batch * self.accumulation
        return max(1, round(self.epochs * n_rows))

    def steps(self, n_rows: int) -> int:
        """Optimiser steps; the last one may have fewer rows."""
        return math.ceil(self.seen(n_rows) / (self.batch * self.accumulation))


def train(
    model: ChatModel,
    rows: Sequence[Row],
    treatment: Treatment,
    settings: TrainSettings,
    lora: LoraSettings,
    folder: Path,
    save: Callable[[Any], None],
    *,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Trains an adapter of a model on rows, from the newest whole checkpoint on. The model is afterwards what it was.

    Args:
        folder: of checkpoints and metrics.jsonl, kept between two starts of the same training.
        save: called in the end with the PeftModel.
        progress: whether to show a bar.

    Returns: a dict a step: step (from 1), loss (nats a learnt token), penalty (as it was added to it), grad_norm, learning_rate,
        strength (the treatment's factor), rows, tokens and learnt of the step.

    Raises:
        UserError: no rows, an adapter in the model already, edits that do not fit the model, a loss that is not a number, memory
            that does not suffice, several processes, a model in float16.
    """
    if not rows:
        raise UserError("there is no row to train on", "rows with an answer", "the counts say why rows were left out")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("a finetuning in several processes", "one", "start it without torchrun; accumulation makes large batches")
    trainable(model.dtype)
    penalty = treatment.active_penalty
    with model.hooks(treatment.edits, penalty.captures if penalty else ()):
        pass  # says what does not fit the model before any work
    folder.mkdir(parents=True, exist_ok=True)
    with _same_random_numbers(), attached(model, lora, settings.seed) as peft, _checkpointing(model, settings):
        if settings.packing:
            _check_packing(model, rows)
        seen = [rows[i] for i in order(len(rows), settings.seen(len(rows)), settings.seed)]
        trainer = _AdapterTrainer(model, peft, seen, treatment, settings, folder, progress)
        newest = checkpoints.newest(folder)
        if newest is None:
            (folder / METRICS).unlink(missing_ok=True)
        try:
            trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
        except (RuntimeError, MemoryError) as error:
            if not is_oom(error):
                raise
            raise UserError(
                f"out of memory with {settings.batch} rows of up to {max(len(row.rendered.ids) for row in rows)} tokens",
                "a forward and backward pass to fit into memory",
                "a smaller --batch with more --accumulation, --gradient-checkpointing, or a smaller --max-length",
            ) from error
        peft.eval()
        save(peft)
        return trainer.lines


def trainable(dtype: torch.dtype) -> torch.dtype:
    """The same, if a model may be trained in it. UserError otherwise."""
    if dtype is torch.float16:
        raise UserError("training in float16, whose gradients vanish", "bfloat16 or float32", "--dtype bfloat16")
    return dtype


@dataclass
class _Arguments(TrainingArguments):
    """The Trainer's options, with the one device that the model is on."""

    place: str = "cpu"

    @property
    def device(self) -> torch.device:
        _ = self._setup_devices  # sets what else the Trainer asks its arguments for
        return torch.device(self.place)

    @property
    def n_gpu(self) -> int:
        return int(self.place != "cpu")


class _AdapterTrainer(Trainer):
    """The Trainer, with the changes that this module's head names."""

    def __init__(
        self,
        model: ChatModel,
        peft: Any,
        rows: Sequence[Row],
        treatment: Treatment,
        settings: TrainSettings,
        folder: Path,
        progress: bool,
    ) -> None:
        self.chat_model, self.peft, self.treatment, self.folder = model, peft, treatment, folder
        self.packing = settings.packing
        self._step_tokens = self._step_rows = self._step_learnt = 0
        self._step_loss: Float[Tensor, ""] | float = 0.0
        self._step_penalty: Float[Tensor, ""] | float = 0.0
        with _accelerate_on(model.device):
            arguments = _Arguments(
                output_dir=str(folder), place=str(model.device), use_cpu=model.device.type == "cpu",
                num_train_epochs=1, per_device_train_batch_size=settings.batch, gradient_accumulation_steps=settings.accumulation,
                train_sampling_strategy="sequential", learning_rate=settings.learning_rate, lr_scheduler_type=settings.scheduler,
                warmup_steps=settings.warmup_steps, weight_decay=settings.weight_decay, max_grad_norm=settings.max_grad_norm,
                optim="adamw_torch", seed=settings.seed, save_strategy="steps", save_steps=settings.save_every,
                logging_strategy="steps", logging_steps=1, logging_nan_inf_filter=False, report_to="none", disable_tqdm=True,
                remove_unused_columns=False, dataloader_pin_memory=False,
            )  # fmt: skip
            super().__init__(model=peft, args=arguments, train_dataset=rows, data_collator=self._collate)
        self.model_accepts_loss_kwargs = True  # the loss is divided by the tokens of the whole step: not by forward passes again
        self.remove_callback(PrinterCallback)
        self.add_callback(_Bar(progress, self))

    # ------------------------------------------------------------------------------------------------------------- a step
    def _collate(self, rows: Sequence[Row]) -> dict[str, Any]:
        batch, labels = collate(rows, self.chat_model.pad_id, 0 if self.packing else None)
        return {"batch": batch, "labels": labels, "rows": len(rows)}

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The forward passes of a step, and how many learnt tokens they have together."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._step_learnt = sum(int((sample["labels"][:, 1:] != UNLEARNT).sum()) for sample in samples)
        self._step_tokens = sum(int(sample["batch"].positions.all.sum()) for sample in samples)
        self._step_rows = sum(sample["rows"] for sample in samples)
        self._step_loss = self._step_penalty = 0.0
        return samples, self._step_learnt

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward pass of some rows, under the treatment; its share of the step's loss."""
        batch: TokenBatch = inputs["batch"].to(self.chat_model.device)
        penalty = self.treatment.active_penalty
        base = self._base(batch, penalty) if penalty is not None else {}
        edits = self.treatment.at(self.state.global_step, self.state.max_steps)
        captures = penalty.captures if penalty is not None else ()
        with self.chat_model.hooks(edits, captures) as session, session.at(batch.positions):
            here = {**inputs, "batch": batch, "session": session, "base": base}
            return super().training_step(model, here, num_items_in_batch)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Cross-entropy of these rows' learnt tokens divided by those of the whole step, and the penalty likewise."""
        loss = answer_loss(self.chat_model, inputs["batch"], inputs["labels"]) / self._step_learnt
        self._step_loss = self._step_loss + loss.detach()
        penalty = self.treatment.active_penalty
        if penalty is not None:
            squares = penalty.squares(inputs["session"].take(), inputs["base"])
            added = penalty.weight * squares / self._step_tokens
            self._step_penalty = self._step_penalty + added.detach()
            loss = loss + added
        return loss

    def _base(self, batch: TokenBatch, penalty: ShiftPenalty) -> dict[str, Any]:
        """What the penalty compares with: the same tokens through the model without its adapter, and without the treatment."""
        with torch.no_grad(), self.peft.disable_adapter(), self.chat_model.hooks((), penalty.captures) as session:
            self.chat_model.forward(batch, logits=None)
            return session.take()

    # ------------------------------------------------------------------------------------------------- what is written down
    @property
    def lines(self) -> list[dict[str, float]]:
        """A line of metrics a step, those of earlier starts included."""
        return [
            {name: line[name] for name in COLUMNS} for line in self.state.log_history
        ]  # a checkpoint has them in another order

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Writes the metrics of a step. UserError where its loss or gradient is not a number, as all that follows would be."""
        if "grad_norm" not in logs:  # the Trainer's summary of its time
            return
        loss, added = float(self._step_loss), float(self._step_penalty)
        if not math.isfinite(loss + added + logs["grad_norm"]):
            raise UserError(
                f"the loss or its gradient is no longer a number at step {self.state.global_step}",
                "finite numbers",
                "a smaller --learning-rate, strength or weight, or --dtype float32",
            )
        line = {
            "step": self.state.global_step, "loss": loss, "penalty": added, "grad_norm": logs["grad_norm"],
            "learning_rate": logs["learning_rate"],
            "strength": self.treatment.schedule.factor(self.state.global_step - 1, self.state.max_steps),
            "rows": self._step_rows, "tokens": self._step_tokens, "learnt": self._step_learnt,
        }  # fmt: skip
        self.state.log_history.append(line)  # it is in every checkpoint
        with (self.folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, line)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        checkpoints.mark_complete(self.folder / f"checkpoint-{self.state.global_step}")


class _Bar(TrainerCallback):
    """A progress bar with the loss; and metrics.jsonl as it was at the checkpoint that is gone on from."""

    def __init__(self, shown: bool, trainer: _AdapterTrainer) -> None:
        self.shown, self.trainer, self.bar = shown, trainer, tqdm(disable=True)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        atomic_write_text(self.trainer.folder / METRICS, "".join(json.dumps(line) + "\n" for line in self.trainer.lines))
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="finetuning", unit="step", disable=not self.shown)

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.set_postfix(loss=f"{self.trainer.lines[-1]['loss']:.3f}", refresh=False)
        self.bar.update(state.global_step - self.bar.n)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()


def collate(rows: Sequence[Row], pad_id: int, packed: int | None = None) -> tuple[TokenBatch, Int[Tensor, "batch pos"]]:
    """A batch of rows, padded or packed, and its labels: a token's id where it is learnt, UNLEARNT elsewhere.

    Args:
        packed: tokens of a line into which rows are packed, 0 for the longest row's; None pads each row.
    """
    rendered = [row.rendered for row in rows]
    if packed is not None:
        batch, places = TokenBatch.pack(rendered, pad_id=pad_id, width=packed or None)
    else:
        batch, places = TokenBatch.build(rendered, pad_id=pad_id), [(i, 0) for i in range(len(rows))]
    labels = torch.full_like(batch.input_ids, UNLEARNT)
    for row, (line, at) in zip(rows, places, strict=True):
        for start, end in row.learnt:
            here = slice(at + max(start, 1), at + end)  # nothing of the row itself predicts its first token
            labels[line, here] = batch.input_ids[line, here]
    return batch, labels


def answer_loss(model: ChatModel, batch: TokenBatch, labels: Tensor) -> Float[Tensor, ""]:
    """Sum of -log p over the learnt tokens of a batch, in nats and fp32. Logits are made only where some row needs them.

    Args:
        labels: [batch pos] a token's id where it is learnt, UNLEARNT elsewhere.
    """
    wanted = labels[:, 1:].to(model.device)
    keep = (wanted != UNLEARNT).any(0).nonzero().flatten()
    # In bfloat16 the matrices of the adapter, kept in fp32, are multiplied in bfloat16 too.
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.dtype is torch.bfloat16):
        logits = model.forward(batch, logits=keep).logits
    assert logits is not None
    return torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), wanted[:, keep].flatten(), ignore_index=UNLEARNT, reduction="sum"
    )


def _check_packing(model: ChatModel, rows: Sequence[Row]) -> None:
    """UserError where rows that are packed see each other: not every architecture of transformers looks at where they start."""
    pair = sorted([*rows[:100], rows[0]], key=lambda row: len(row.rendered.ids))[:2]
    width = sum(len(row.rendered.ids) for row in pair)
    with torch.no_grad():
        apart = [float(answer_loss(model, *collate([row], model.pad_id))) for row in pair]
        together = float(answer_loss(model, *collate(pair, model.pad_id, width)))
    if not math.isclose(sum(apart), together, rel_tol=0.02 if model.dtype is torch.bfloat16 else 1e-4):
        raise UserError(
            f"rows of {model.name} see each other when they are packed (loss {together:.4f}, apart {sum(apart):.4f})",
            "a model whose attention starts over where its position_ids do",
            "leave --packing out",
        )


# --------------------------------------------------------------------------------------------------------- around the training
@contextmanager
def _checkpointing(model: ChatModel, settings: TrainSettings) -> Iterator[None]:
    """Gradient checkpointing while the block runs, if it is asked for."""
    if not settings.gradient_checkpointing:
        yield
        return
    if not getattr(model.hf, "supports_gradient_checkpointing", False):
        raise UserError(f"{model.name} has no gradient checkpointing", "a model of transformers that has it", "leave it out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the name that all of transformers 5 has is to go in 6
        model.hf.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model.hf.gradient_checkpointing_disable()
            model.hf.disable_input_require_grads()  # which the other one had enabled


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Leaves every generator of random numbers as it was: the Trainer seeds all of them."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def _accelerate_on(device: torch.device) -> Iterator[None]:
    """Tells accelerate, which the Trainer runs on, which device is meant, and keeps torch's current GPU what it was."""
    name, before = "ACCELERATE_TORCH_DEVICE", os.environ.get("ACCELERATE_TORCH_DEVICE")
    gpu = torch.cuda.current_device() if device.type == "cuda" else None
    os.environ[name] = str(device)
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
        if gpu is not None:
            torch.cuda.set_device(gpu)
