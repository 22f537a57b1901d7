"""What the training loop of `pvsae finetune` costs beside a bare one, and that both train the same.

    python -m benchmarks.finetuning [--quick] [--model NAME]

The same adapter is trained on the same rows in the same order twice: by `finetuning.trainer.train` (transformers' Trainer, the
hook API around every step, metrics), and by a loop of our own in plain torch and PEFT that does the same work and nothing else:
forward pass, cross-entropy of the learnt tokens alone, backward pass, clipping, AdamW, learning rate. Once without a treatment
and all 16 rows of a step in one forward pass; once under preventative steering, which the plain loop does by a forward hook of
torch, and two rows a pass. The small model is where bookkeeping weighs most. What is taken is the time from the first forward
pass of a step to that of the next one, by the clock, and of the processor, which other programs disturb less; what a training
needs beside its steps (making the adapter and taking it out, and ours a Trainer and a checkpoint) is given by itself. The two
take turns, after one warm-up each; medians over all steps.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import check, record
from pvsae.finetuning.lora import LoraSettings, attached
from pvsae.finetuning.rows import Row, order
from pvsae.finetuning.trainer import TrainSettings, train
from pvsae.finetuning.treatments import Treatment
from pvsae.models import Add, ChatModel, Direction, load
from pvsae.stages.finetune import FinetuneConfig, read_data

MOST, TARGET_ERROR = 1.1, 1e-4
LORA = LoraSettings(rank=16, alpha=32)
A_STEP = 16  # rows


@dataclass(frozen=True)
class Case:
    """What is trained: rows a forward pass, and how strongly it is steered meanwhile (0: not at all)."""

    name: str
    batch: int
    coef: float = 0.0

    def settings(self, steps: int) -> TrainSettings:
        return TrainSettings(learning_rate=1e-3, batch=self.batch, accumulation=A_STEP // self.batch, max_steps=steps)


CASES = (Case("plain, 16 rows a pass", A_STEP), Case("steered, 2 rows a pass", 2, 2.0))


def ours(model: ChatModel, rows: Sequence[Row], case: Case, steps: int, add: Add) -> list[float]:
    """Loss of every step, by the trainer of `pvsae finetune`."""
    treatment = Treatment((add,) if case.coef else ())
    with tempfile.TemporaryDirectory() as name:
        lines = train(
            model, rows, treatment, case.settings(steps), LORA, Path(name), lambda peft: None, progress=False
        )  # fmt: skip
    return [line["loss"] for line in lines]


def bare(model: ChatModel, rows: Sequence[Row], case: Case, steps: int, add: Add) -> list[float]:
    """The same by a plain loop; of ours are only the making of the adapter, so that it starts the same, and the rows' order."""
    from transformers import get_scheduler

    settings = case.settings(steps)
    seen = [rows[i] for i in order(len(rows), settings.seen(len(rows)), settings.seed)]
    losses = []
    with attached(model, LORA, settings.seed) as peft, _hooked(model, case, add):
        peft.train()
        free = [p for p in peft.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(free, lr=settings.learning_rate, weight_decay=settings.weight_decay)
        schedule = get_scheduler(settings.scheduler, optimiser, settings.warmup_steps, steps)
        for step in range(steps):
            some = seen[step * A_STEP : (step + 1) * A_STEP]
            learnt = sum(row.n_learnt for row in some)
            total = 0.0
            for first in range(0, A_STEP, case.batch):
                loss = _loss(peft, some[first : first + case.batch], model.pad_id) / learnt
                loss.backward()
                total += float(loss.detach())
            torch.nn.utils.clip_grad_norm_(free, settings.max_grad_norm)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
            losses.append(total)
    return losses


def _loss(peft: Any, rows: Sequence[Row], pad_id: int) -> Tensor:
    """Sum of -log p of the learnt tokens, in nats; logits of the places before them alone. Rows are padded on the right, where
    causal attention needs no mask."""
    width = max(len(row.rendered.ids) for row in rows)
    ids = torch.tensor([[*row.rendered.ids, *[pad_id] * (width - len(row.rendered.ids))] for row in rows])
    labels = torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        for start, end in row.learnt:
            labels[i, start:end] = ids[i, start:end]
    wanted = labels[:, 1:]
    keep = (wanted != -100).any(0).nonzero().flatten()
    logits = peft(input_ids=ids, use_cache=False, logits_to_keep=keep).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted[:, keep].flatten(), reduction="sum")


@contextmanager
def _hooked(model: ChatModel, case: Case, add: Add) -> Iterator[None]:
    """Adds the vector to a block's output by a hook of torch."""
    if not case.coef:
        yield
        return
    handle = model.blocks[add.block].register_forward_hook(lambda _, __, out: out + add.coef * add.direction.values)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class Timed:
    """One training: milliseconds of each step but the last, by the clock and of the processor; of all else together; losses."""

    clock: list[float]
    processor: list[float]
    beside: float
    losses: list[float]


def timed(model: ChatModel, passes: int, fn: Callable[[], list[float]]) -> Timed:
    """Times a training of `passes` forward passes a step."""
    stamps: list[tuple[float, float]] = []
    handle = model.hf.register_forward_pre_hook(lambda *_: stamps.append((time.perf_counter(), time.process_time())))
    start = time.perf_counter()
    try:
        losses = fn()
    finally:
        handle.remove()
    whole, starts = time.perf_counter() - start, stamps[::passes]
    assert len(starts) == len(losses), "one forward pass for some rows of a step"
    clock, processor = ([1000 * (b[i] - a[i]) for a, b in pairwise(starts)] for i in (0, 1))
    return Timed(clock, processor, 1000 * whole - sum(clock) * len(losses) / len(clock), losses)


def measure(model: ChatModel, rows: Sequence[Row], case: Case, steps: int, turns: int) -> dict[str, Any]:
    """Milliseconds a step of both loops, their ratios, and how far their losses lie apart."""
    values = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))  # what it means is no matter here
    add = Add(Direction(values / values.norm()), model.n_blocks // 2, case.coef or 1.0)
    ways = {"ours": lambda: ours(model, rows, case, steps, add), "bare": lambda: bare(model, rows, case, steps, add)}
    taken: dict[str, list[Timed]] = {way: [] for way in ways}
    for turn in range(turns + 1):
        for way in sorted(ways, reverse=bool(turn % 2)):
            taken[way].append(timed(model, A_STEP // case.batch, ways[way]))
    losses = {way: some[0].losses for way, some in taken.items()}
    apart = [abs(a - b) for a, b in zip(losses["ours"], losses["bare"], strict=True)]
    found: dict[str, Any] = {"first_loss": losses["bare"][0], "last_loss": {way: some[-1] for way, some in losses.items()}}
    for name in ("clock", "processor"):
        median = {way: statistics.median(ms for one in some[1:] for ms in getattr(one, name)) for way, some in taken.items()}
        found[name] = {"ms_a_step": median, "ratio": median["ours"] / median["bare"]}
    found["ms_beside_the_steps"] = {way: statistics.median(one.beside for one in some[1:]) for way, some in taken.items()}
    return {**found, "last_apart": apart[-1], "most_apart": max(apart)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 steps and 1 turn instead of 12 and 3")
    parser.add_argument("--model", default="organism", help="model name, folder or hub id")
    parser.add_argument("--data", default="organism-data:evil/misaligned_2", help="file, dataset or named corpus of chats")
    options = parser.parse_args(argv)
    steps, turns = (4, 1) if options.quick else (12, 3)
    model = load(options.model, dtype="float32", device="cpu")
    config = FinetuneConfig(model=options.model, data=(options.data,), max_rows=steps * A_STEP)
    rows = read_data(config, model).rows
    found, checks = {}, []
    for case in CASES:
        one = found[case.name] = measure(model, rows, case, steps, turns)
        both = one["processor"]["ms_a_step"]
        print(f"{case.name}: ours {both['ours']:.1f}, bare {both['bare']:.1f} ms a step of processor time")
        checks += [
            check(f"finetuning.processor_time_over_bare ({case.name})", one["processor"]["ratio"], f"<= {MOST:g}"),
            check(f"finetuning.time_over_bare ({case.name})", one["clock"]["ratio"], f"<= {MOST:g}"),
            check(f"finetuning.last_loss_apart ({case.name})", one["last_apart"], f"<= {TARGET_ERROR:g}"),
        ]
    details = {
        "model": model.name, "n_blocks": model.n_blocks, "d_model": model.d_model, "rows": len(rows), "steps": steps,
        "threads": torch.get_num_threads(), "cases": found,
    }  # fmt: skip
    record("finetuning" if options.model == "organism" else f"finetuning_{Path(options.model).name}", checks, details)


if __name__ == "__main__":
    main()
