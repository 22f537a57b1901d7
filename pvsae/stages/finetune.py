"""Stage `finetune`: an adapter trained on chats, with or without something done to the model meanwhile (paper, section 4).

Knows: where rows come from, the run's files, its tables and summary.
Does not know: how an adapter is trained (finetuning/), what a treatment's options mean (treating.py), figures (reports/).

A run folder holds, beside what all have::

    adapter/             a plain PEFT adapter; pvsae_finetune.json and pvsae_metrics.jsonl in it say how it came about
    .parts/adapter/      while it is not finished: checkpoints and metrics.jsonl
    tables/finetune.csv  one row: data, treatment, rows, steps, loss
    tables/rows.csv      what became of every row
    tables/metrics.csv   a row a step
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from pvsae.errors import UserError
from pvsae.finetuning.lora import ABOUT, TARGETS, LoraSettings
from pvsae.finetuning.rows import TOO_LONG, TURNS, Counts, Row, make_rows, with_system
from pvsae.runs import RunDir, atomic_write_text, jsonable, read_json
from pvsae.sources import Bad, Reader, Source, check_of_datasets, source_of
from pvsae.stages.inputs import folder_of, open_model, open_run, open_traits, pin_inputs
from pvsae.stages.treating import NONE, OF_PROMPTS, STEER, Outline, Treated, Treating, check, prompts_of, treated

if TYPE_CHECKING:
    import torch

    from pvsae.finetuning.trainer import TrainSettings
    from pvsae.models import ChatModel
    from pvsae.models.chat import Message

METRICS = "pvsae_metrics.jsonl"
PROMPTED = "given an instruction in front of their own system prompt"
_SHOWN = 2  # rows on the page
_NOT_IDENTITY = frozenset({"save_every"})


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(Treating):
    """What to train on, how, and under which treatment: the options of `Treating`, and

    Attributes:
        data: files or patterns (JSONL, Parquet, ...) of {"messages": [...]}, names of Hugging Face datasets, or of corpora that
            packages offer. Several are read one behind the other.
        split, subset: of datasets, by name or in folders; None is the split train, and the only subset.
        field: the field that holds the messages; None looks for it.
        max_rows: use only the first so many rows of each. Of corpora of packages, which may have no end, it is as many as
            `max_steps` take where that is given, and has to be given otherwise.
        max_length: most tokens of a row, and never more than the model's context.
        too_long: longer rows are cut there ("truncate", as the released code does) or left out ("drop").
        turns: learn all answers of a chat ("all", as the released code does) or the last one.
        rank, alpha, rslora, dropout, targets: of the adapter; see `finetuning.lora.LoraSettings`.
        learning_rate, scheduler, warmup_steps, epochs, max_steps, batch, accumulation, weight_decay, max_grad_norm,
            gradient_checkpointing, packing, save_every: see `finetuning.trainer.TrainSettings`.
    """

    data: tuple[str, ...]
    split: str | None = None
    subset: str | None = None
    field: str | None = None
    max_rows: int | None = None
    max_length: int = 2048
    too_long: str = "truncate"
    turns: str = "all"
    rank: int = 32
    alpha: int = 64
    rslora: bool = True
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data:
            raise UserError("no data to train on", "files, datasets or corpora of chats")
        if self.adapter is not None:
            raise UserError(
                "finetuning a model with an adapter",
                "a model without one",
                "merge that adapter into the weights, save the model, and finetune the result",
            )
        for name, allowed in (("turns", TURNS), ("too_long", TOO_LONG)):
            if getattr(self, name) not in allowed:
                raise UserError(f"{name} is {getattr(self, name)!r}", "one of " + ", ".join(allowed))
        for name, least in (("max_rows", 1), ("max_length", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} is {value}", f"at least {least}")
        _ = self.lora

    def identity(self) -> dict[str, Any]:
        """The options that the adapter depends on."""
        found = {name: value for name, value in super().identity().items() if name not in _NOT_IDENTITY}
        found["split"] = self.split or "train"
        return found if self.field is not None else {name: value for name, value in found.items() if name != "field"}

    @property
    def lora(self) -> LoraSettings:
        """Shape of the adapter."""
        return LoraSettings(
            rank=self.rank, alpha=self.alpha, rslora=self.rslora, dropout=self.dropout, targets=tuple(self.targets)
        )

    @property
    def training(self) -> TrainSettings:
        """How it is trained."""
        from pvsae.finetuning.trainer import TrainSettings

        return TrainSettings(
            learning_rate=self.learning_rate, scheduler=self.scheduler, warmup_steps=self.warmup_steps, epochs=self.epochs,
            max_steps=self.max_steps, batch=self.batch, accumulation=self.accumulation, weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm, gradient_checkpointing=self.gradient_checkpointing, packing=self.packing,
            save_every=self.save_every, seed=self.seed,
        )  # fmt: skip


@dataclass(frozen=True)
class FinetuneResult:
    """The trained adapter.

    Attributes:
        adapter: its folder, for `load(model, adapter=...)` and for PEFT.
        table: one row: data, treatment, traits, blocks, coef, unit, raw_coef, rows (used), left_out, changed, steps, tokens,
            learnt (tokens, over all steps), first_loss and last_loss (mean of the first and of the last tenth of steps, nats
            a learnt token), last_penalty.
        metrics: a row a step; see `finetuning.trainer.train`.
        rows: what became of the rows: what, n, and where the first few of those left out stand.
        path: the run's folder.
    """

    adapter: Path
    table: pd.DataFrame
    metrics: pd.DataFrame
    rows: pd.DataFrame
    path: Path


def run(
    config: FinetuneConfig, run_dir: RunDir | str | Path, *, model: ChatModel | None = None, progress: bool = True
) -> FinetuneResult:
    """Train an adapter into a run folder. Killed at any point it goes on from its last checkpoint; finished, it is read back, if
    data, vectors, dictionaries and model are still those that it was trained with.

    Args:
        model: to use instead of loading the one that the config names; it is afterwards what it was.
        progress: whether to show bars.

    Raises:
        UserError: bad options, a model in float16, unreadable data, no row to learn from, vectors or features that do not fit,
            inputs that changed since the run began, and what `finetuning.trainer.train` raises.
    """
    training = config.training  # its own checks, before anything is opened
    _check_dtype(config, model)
    with open_run(run_dir, "finetune", config) as folder:
        model = model or open_model(config)
        with folder.step("adapter") as step:
            data = read_data(config, model, progress=progress)
            found = treated(config, model, folder, [row.rendered for row in data.rows])
            traits = open_traits(config, model) if config.treatment in OF_PROMPTS and config.prompt is None else []
            # Also of a finished adapter: one that other rows or vectors would have made is not to be taken for theirs.
            pin_inputs(folder, model, traits, found.vectors, {"data": data.sha256, **found.inputs})
            if not step.done:
                _train(config, training, folder, step.folder, model, data, found, progress)
        return _written(config, folder)


def _train(
    config: FinetuneConfig, training: TrainSettings, folder: RunDir, out: Path, model: ChatModel, data: Data, found: Treated,
    progress: bool,
) -> None:  # fmt: skip
    """Trains, and writes the adapter with what is to be known of it."""
    from pvsae.finetuning import lora, trainer

    about = _about(config, model, data, found)
    lines = trainer.train(
        model, data.rows, found.treatment, training, config.lora, folder.parts("adapter"),
        lambda peft: lora.save(peft, out, about), progress=progress,
    )  # fmt: skip
    atomic_write_text(out / METRICS, "".join(json.dumps(line) + "\n" for line in lines))


def plan(config: FinetuneConfig) -> str:
    """What a run would do, for people to read. Vectors, features and texts of the treatment are opened and checked, rows are read
    and counted; no weights are read, nothing is tokenised and no strength is measured.

    Raises:
        UserError: no such model or data, a model in float16, vectors, features or layers that do not fit, traits without texts.
    """
    from pvsae.finetuning.lora import check_targets, size
    from pvsae.models import model_shape
    from pvsae.models.loading import resolve_device, skeleton

    training = config.training
    dtype = _check_dtype(config)
    device = resolve_device(config.device)
    shape = model_shape(config.model)
    check(config, Outline(config.model, shape.n_blocks, shape.d_model, *folder_of(config, None)))
    bare = skeleton(config.model)
    check_targets(bare, config.lora, config.model)
    adapter = size(bare, config.lora)
    bad = [isinstance(chat, str) for _, chat in _chats(config)]
    good = bad.count(False)
    steps = training.steps(good)
    weights = shape.parameters * dtype.itemsize / 2**20
    extra = adapter * 16 / 2**20  # fp32: the matrices, their gradients, two averages of AdamW
    each, kind = config.batch * config.accumulation, str(dtype).removeprefix("torch.")
    lines = [
        f"model      {config.model}: {shape.parameters / 1e6:,.4g}M parameters in {kind} on {device}",
        f"adapter    rank {config.rank}, {adapter / 1e6:,.4g}M parameters in float32",
        f"data       {good:,} rows" + (f", {sum(bad):,} more that cannot be read" if any(bad) else ""),
        f"training   {steps:,} steps of {each} rows ({config.batch} a forward pass)",
        f"treatment  {_treatment_name(config)}",
        f"memory     {weights:,.0f} MB of weights, {extra:,.0f} MB for the adapter's training, and activations",
    ]
    return "\n".join(lines)


def _check_dtype(config: FinetuneConfig, model: ChatModel | None = None) -> torch.dtype:
    """The dtype that the model has, or would be loaded in. UserError for one that cannot be trained in."""
    from pvsae.finetuning.trainer import trainable
    from pvsae.models.loading import resolve_device, resolve_dtype

    return trainable(resolve_dtype(config.dtype, resolve_device(config.device)) if model is None else model.dtype)


# ------------------------------------------------------------------------------------------------------------------------ rows
@dataclass(frozen=True)
class Data:
    """What is trained on.

    Attributes:
        rows: to learn from.
        counts: what became of all that were read.
        places: reason -> where the first few rows stand that it left out, as NAME row N, counted from 1.
    """

    rows: list[Row]
    counts: Counts
    places: dict[str, list[str]]

    @property
    def sha256(self) -> str:
        """Hash of the tokens of all rows, and of which are learnt."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(repr((row.rendered.ids, row.learnt)).encode())
        return digest.hexdigest()


def read_data(config: FinetuneConfig, model: ChatModel, *, progress: bool = False) -> Data:
    """Reads and renders all rows of the config's data.

    Raises: UserError for data that cannot be read, and where nothing can be learnt from any row.
    """
    prompts = prompts_of(config, model)
    starts: list[tuple[Source, int]] = []  # of each source the number of its first row
    own: set[int] = set()  # rows with a system prompt of their own

    def chats() -> Iterator[Sequence[Message] | str]:
        for number, (source, chat) in enumerate(_chats(config)):
            if not starts or starts[-1][0] is not source:
                starts.append((source, number))
            if not isinstance(chat, str) and prompts:
                own.update([number] if chat[0]["role"] == "system" else [])
                yield with_system(chat, prompts[number % len(prompts)])
            else:
                yield chat

    rows, counts = make_rows(
        chats(), model.chat, max_length=min(config.max_length, model.n_ctx), too_long=config.too_long, turns=config.turns,
        progress="rows" if progress else None,
    )  # fmt: skip
    if own:
        counts.changed[PROMPTED] = sum(row.number in own for row in rows)

    def place(number: int) -> str:
        source, start = next((source, start) for source, start in reversed(starts) if start <= number)
        return f"{source.name} row {number - start + 1}"

    places = {reason: [place(number) for number in numbers] for reason, numbers in counts.examples.items()}
    if not rows:
        why = ", ".join(f"{reason}: {n}" for reason, n in counts.left_out.items()) or "the data is empty"
        raise UserError(f"none of {counts.read} rows can be learnt from ({why})", "chats with an answer", "look at the data")
    return Data(rows, counts, places)


def _chats(config: FinetuneConfig) -> Iterator[tuple[Source, tuple[dict[str, str], ...] | str]]:
    """All rows of the data: where from, and messages or why a row has none."""
    for source in _sources(config):
        reader = Reader(source)
        if reader.kind != "chat":
            raise UserError(f"{source.name} holds texts", 'chats: rows {"messages": [{"role": ..., "content": ...}, ...]}')
        for value in islice(reader.rows(), source.max_samples):
            assert not isinstance(value, str)
            yield source, value.reason if isinstance(value, Bad) else value


def _sources(config: FinetuneConfig) -> list[Source]:
    found = [_source(word, config) for word in config.data]
    check_of_datasets(found, config.split, config.subset)
    return found


def _source(word: str, config: FinetuneConfig) -> Source:
    """What a word of `data` stands for."""
    named = source_of(word, config.max_rows, split=config.split, subset=config.subset, field=config.field)
    found = replace(named, kind="chat")
    if found.named is not None and config.max_rows is None:
        if config.max_steps is None:
            raise UserError(
                f"{word} without a number of rows", "one: a corpus of a package may have no end", "--max-rows N, or --max-steps N"
            )
        return replace(found, max_samples=config.max_steps * config.batch * config.accumulation)
    return found


# --------------------------------------------------------------------------------------------------------------- what is written
def _about(config: FinetuneConfig, model: ChatModel, data: Data, found: Treated) -> dict[str, Any]:
    """The metadata beside the adapter: everything that tables and page show but the metrics."""
    shown = [
        {
            "prompt": row.rendered.text,
            "learnt": "\n".join(model.chat.decode(row.rendered.ids[start:end]) for start, end in row.learnt),
        }
        for row in data.rows[:_SHOWN]
    ]
    counts = data.counts
    return {
        "format": 1,
        "model": {"name": model.name, "dtype": str(model.dtype).removeprefix("torch."), "template_notes": list(model.chat.notes)},
        "config": jsonable(config),
        "treatment": {"name": config.treatment, "raw_coef": found.raw, "blocks": found.where, **found.treatment.describe()},
        "rows": {
            "read": counts.read, "used": counts.used, "left_out": dict(counts.left_out), "changed": dict(counts.changed),
            "places": data.places, "tokens": counts.tokens, "learnt": counts.learnt,
        },
        "examples": shown,
    }  # fmt: skip


def _written(config: FinetuneConfig, folder: RunDir) -> FinetuneResult:
    """Tables and summary from what the finished adapter's folder says."""
    adapter = folder.path / "adapter"
    about = read_json(adapter / ABOUT)
    lines = (adapter / METRICS).read_text(encoding="utf-8").splitlines()
    metrics = pd.DataFrame([json.loads(line) for line in lines])
    counts, treatment = about["rows"], about["treatment"]
    rows = pd.DataFrame(
        [
            {"what": "read", "n": counts["read"], "where": ""},
            {"what": "used", "n": counts["used"], "where": ""},
            *({"what": f"used, but {what}", "n": n, "where": ""} for what, n in counts["changed"].items()),
            *(
                {"what": f"left out: {what}", "n": n, "where": _where(counts["places"][what], n)}
                for what, n in counts["left_out"].items()
            ),
        ]
    )
    tenth = max(1, len(metrics) // 10)
    table = pd.DataFrame(
        [
            {
                "data": " ".join(config.data), "treatment": config.treatment, "traits": " ".join(config.traits) or "-",
                "blocks": treatment["blocks"], "coef": config.strength if config.treatment == STEER else math.nan,
                "unit": config.unit_used if config.treatment == STEER else "-", "raw_coef": treatment["raw_coef"],
                "rows": counts["used"], "left_out": sum(counts["left_out"].values()), "changed": sum(counts["changed"].values()),
                "steps": len(metrics), "tokens": int(metrics["tokens"].sum()), "learnt": int(metrics["learnt"].sum()),
                "first_loss": float(metrics["loss"].head(tenth).mean()), "last_loss": float(metrics["loss"].tail(tenth).mean()),
                "last_penalty": float(metrics["penalty"].iloc[-1]),
            }
        ]
    )  # fmt: skip
    folder.table("finetune", table)
    folder.table("rows", rows)
    folder.table("metrics", metrics)
    folder.result(_summary(config, table, about))
    return FinetuneResult(adapter, table, metrics, rows, folder.path)


def _where(places: Sequence[str], n: int) -> str:
    return ", ".join(places) + (", ..." if n > len(places) else "")


def _treatment_name(config: FinetuneConfig) -> str:
    """The treatment in words."""
    if config.treatment in OF_PROMPTS:
        return f"{config.treatment} by " + (
            "a given prompt" if config.prompt else f"the instructions of {', '.join(config.traits)}"
        )
    if config.treatment == NONE:
        return "none"
    what = ", ".join(config.features) or f"vectors of {', '.join(config.traits)}"
    kind = config.over_time.kind
    how = {STEER: f" at {config.strength:g} {config.unit_used}" + ("" if kind == "constant" else f" ({kind})")}
    return f"{config.treatment}: {what}{how.get(config.treatment, '')}" + (", every block" if config.multi_layer else "")


def _summary(config: FinetuneConfig, table: pd.DataFrame, about: dict[str, Any]) -> dict[str, Any]:
    row, counts = table.iloc[0], about["rows"]
    headline = [
        {"label": "treatment", "value": _treatment_name(config)},
        {"label": "rows", "value": f"{counts['used']:,} of {counts['read']:,}"},
        {"label": "steps", "value": f"{row['steps']:,} of {config.batch * config.accumulation} rows"},
        {"label": "loss, nats a learnt token", "value": f"{row['first_loss']:.3f} to {row['last_loss']:.3f}"},
    ]
    notes = [f"Chat template: {note}." for note in about["model"]["template_notes"]]
    notes += [f"{n:,} rows were {what}." for what, n in counts["changed"].items()]
    notes.append("The treatment was there in training only: the adapter by itself is what is measured afterwards.")
    return {
        "title": "Finetuning",
        "about": (
            f"An adapter of {about['model']['name']}, trained on the answers in {' '.join(config.data)} (prompts are read, not "
            "learnt). It is a plain PEFT folder; every command takes it as --adapter."
        ),
        "headline": headline,
        "notes": notes,
        "failures": [{"what": f"rows left out: {reason}", "n": n} for reason, n in counts["left_out"].items()],
        "prompts": [{"label": f"row {i}, as it was rendered", "text": e["prompt"]} for i, e in enumerate(about["examples"])],
        "examples": [{"label": f"row {i}: what is learnt of it", "text": e["learnt"]} for i, e in enumerate(about["examples"])],
        "rows": counts,
    }
