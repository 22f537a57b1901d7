"""A model finetuned under a treatment, and what becomes of it: trait, coherence, capability, fit, and how far it moved.

Knows: how one finetune is made and measured, in run folders of their own. What is finished is read back, a killed one goes on.
Does not know: which treatments there are, which is best.

The four numbers that treatments are judged by (paper, section on preventative steering), and two beside them:
- trait score and coherence of answers to the trait's questions, without any system prompt: to the evaluation questions, and to
  those that the vectors were made from, so that a setting can be chosen on other answers than those that are reported;
- capability: tasks of lm-evaluation-harness; of the embedded models their closed-world test;
- fit: loss on rows of the data that were not trained on, without the treatment, and the training loss, under it;
- shift: how far the last prompt token's residual moved along the vector.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from pvsae import load
from pvsae.errors import UserError
from pvsae.finetuning.rows import Row
from pvsae.models import Add, ChatModel, LastPrompt
from pvsae.models.interventions import Intervention
from pvsae.runs import RunDir
from pvsae.stages import FinetuneConfig, finetune
from pvsae.stages.capability import CapabilityConfig, task_names
from pvsae.stages.capability_tasks import Tasks
from pvsae.stages.inputs import Setup, open_judge, open_traits, open_vectors, pin_inputs
from pvsae.stages.statistics import mean_ci
from pvsae.stages.sweep import judged_answers, score_columns, tasks_under
from pvsae.vectors import PersonaVectors
from pvsae.vectors.persona import DEFAULT_STATISTIC

A_STEP = 16  # rows a step of the optimiser, as the paper's code has it
BASE, PLAIN = "base", "plain"


@dataclass(frozen=True)
class Way:
    """One way to treat a model, in training or afterwards.

    Attributes:
        method: name of the method.
        strength: coefficient or weight; NaN of a method that has none.
        treatment: options of the stage `finetune`.
        afterwards: raw coefficient of the vector that is added when the trained model answers.
    """

    method: str
    strength: float = math.nan
    treatment: tuple[tuple[str, Any], ...] = ()
    afterwards: float = 0.0

    @property
    def slug(self) -> str:
        """For file names."""
        name = self.method.replace(",", "").replace(" ", "-")
        return name if math.isnan(self.strength) else f"{name}_{self.strength:g}"


@dataclass(frozen=True)
class Amount:
    """How long and how fast is trained."""

    steps: int
    learning_rate: float

    @property
    def slug(self) -> str:
        """For file names."""
        return f"steps-{self.steps}_lr-{self.learning_rate:g}"


@dataclass(frozen=True)
class Asked:
    """What is asked of a trained model.

    Attributes:
        samples: answers to each evaluation question.
        choice: answers to each of the questions that the vectors were made from; 0 for none.
        questions: how many of either kind; None for all.
        able: whether capability is tested.
        limit: questions of a task; None for all.
    """

    samples: int
    choice: int
    questions: int | None
    able: bool
    limit: int | None


@dataclass(frozen=True)
class Bench:
    """Everything that the finetunes of one trait share.

    Attributes:
        model: the model before.
        options: of every stage: model, judge, library, batch size.
        data: names a source of rows; the first `rows` of it are trained on, `n_held_out` behind them are not.
        vectors: folder of `pvsae extract`.
        block: of the vector that is added, taken out, projected on.
        rank, batch: of the adapters, and rows a forward pass.
        tasks: of lm-evaluation-harness; none takes those that the model's folder names.
        out: folder of all run folders of this trait.
    """

    model: ChatModel
    options: dict[str, Any]
    trait: str
    data: str
    vectors: Path
    block: int
    rows: int
    n_held_out: int
    rank: int
    batch: int
    tasks: tuple[str, ...]
    out: Path

    @cached_property
    def vector(self) -> PersonaVectors:
        """The trait's vectors."""
        return open_vectors(self.vectors, self.trait, self.model, DEFAULT_STATISTIC)

    @cached_property
    def able(self) -> Tasks:
        """The capability tasks."""
        return Tasks(task_names(CapabilityConfig(model=self.options["model"], tasks=self.tasks), self.model))

    def config(self, way: Way, amount: Amount) -> FinetuneConfig:
        """The finetune of a way. Every way sees the same rows in the same order."""
        return FinetuneConfig(
            model=self.options["model"], library=self.options["library"], data=(self.data,), max_rows=self.rows, rank=self.rank,
            alpha=2 * self.rank, learning_rate=amount.learning_rate, max_steps=amount.steps, batch=self.batch,
            accumulation=A_STEP // self.batch, traits=(self.trait,), **dict(way.treatment),
        )  # fmt: skip

    @cached_property
    def held_out(self) -> list[Row]:
        """Rows of the data behind those that are trained on. UserError where the data end before them."""
        config = replace(self.config(Way(PLAIN), Amount(1, 1.0)), max_rows=self.rows + self.n_held_out)
        rows = finetune.read_data(config, self.model).rows
        found = [row for row in rows if row.number >= self.rows]
        if not found:
            raise UserError(f"{self.data} has no rows behind the first {self.rows}", "some, to measure the fit on", "--rows N")
        return found


def finetuned(bench: Bench, way: Way, amount: Amount) -> finetune.FinetuneResult:
    """The finetune, made or read back. A way that acts afterwards shares that of its treatment alone."""
    own = way if not way.afterwards else Way(PLAIN)
    folder = bench.out / f"{own.slug}_{amount.slug}" / "finetune"
    return finetune.run(bench.config(own, amount), folder, model=bench.model, progress=False)


def measured(bench: Bench, way: Way, amount: Amount, asked: Asked, name: str = "measured") -> dict[str, Any]:
    """Everything about one way: the columns of the table, and `by_question`, mean coherence of each evaluation question.

    Args:
        name: of the run folder of what is asked, beside that of the finetune, which all that ask something share.
    """
    found: dict[str, Any] = {
        "trait": bench.trait, "method": way.method, "strength": way.strength, "steps": amount.steps,
        "learning_rate": amount.learning_rate,
    }  # fmt: skip
    adapter = None
    if way.method == BASE:
        found |= {"steps": 0, "learning_rate": math.nan, "train_loss": math.nan}
    else:
        result = finetuned(bench, way, amount)
        adapter, found["train_loss"] = result.adapter, float(result.table["last_loss"].iloc[0])
    setup = Setup(**bench.options, traits=(bench.trait,), adapter=None if adapter is None else str(adapter))
    identity = {**setup.identity(), "asked": asked, "afterwards": way.afterwards, "block": bench.block}
    folder = bench.out / (BASE if adapter is None else f"{way.slug}_{amount.slug}") / name
    rows = {"data": bench.data, "rows": bench.rows, "held_out": bench.n_held_out, "tasks": bench.tasks}
    with RunDir.open(folder, "measured", {**identity, **rows}, setup.seed) as run:
        found |= run.do_json("row", lambda: _measure(bench, way, asked, setup, run))
    return {name: math.nan if value is None else value for name, value in found.items()}


def _measure(bench: Bench, way: Way, asked: Asked, setup: Setup, run: RunDir) -> dict[str, Any]:
    """The columns that need the trained model."""
    tuned = bench.model if setup.adapter is None else load(setup.model, adapter=setup.adapter)
    direction = bench.vector.direction(bench.block)
    edits: tuple[Intervention, ...] = (Add(direction, bench.block, way.afterwards),) if way.afterwards else ()
    (artifacts,) = open_traits(setup, tuned)
    judge = open_judge(setup, tuned, run)
    pin_inputs(run, tuned, [artifacts], {bench.trait: bench.vector})
    found: dict[str, Any] = {}
    for kind, n in (("eval", asked.samples), ("extract", asked.choice)):
        if not n:
            continue
        tasks = tasks_under(artifacts, "none", n, asked.questions, kind)
        answers = judged_answers(setup, run, tuned, judge, artifacts, step=kind, condition=way.slug, tasks=tasks, edits=edits)
        columns = score_columns(bench.trait, answers, setup.seed)
        if kind == "extract":
            found |= {"choice_trait": columns["trait_score"], "choice_coherence": columns["coherence"]}
        else:
            by_question = answers.table.groupby("question_index")["coherence"].mean()
            found |= {**columns, "by_question": by_question.tolist()}
    if asked.able:
        found["capability"] = capability(bench, tuned, edits, asked.limit, way.slug)
    found["held_out_loss"] = answer_loss(tuned, bench.held_out, edits)
    moved = shifts(bench, tuned, edits, [task.messages for task in tasks_under(artifacts, "none", 1, asked.questions)])
    shift = mean_ci(moved, seed=setup.seed)
    return {**found, "shift": shift.value, "shift_low": shift.low, "shift_high": shift.high}


def capability(bench: Bench, model: ChatModel, edits: Sequence[Intervention], limit: int | None, label: str) -> float:
    """Percent of questions answered rightly; the mean of several tasks."""
    from pvsae.models.harness import HarnessModel

    tasks = bench.able
    lm = HarnessModel(model, edits, batch_size=bench.options["batch_size"], progress=f"{label}, capability")
    template = model.chat.mode != "plain"
    rows = tasks.evaluate(lm, shots=None, limit=limit, template=template, system=None, seed=0).rows
    one = rows[rows["task"].isin(tasks.names)].drop_duplicates("task")  # of several metrics the first
    return 100.0 * float(one["value"].mean())


@torch.no_grad()
def answer_loss(model: ChatModel, rows: Sequence[Row], edits: Sequence[Intervention]) -> float:
    """Mean loss a learnt token, in nats."""
    from pvsae.finetuning import trainer

    total, learnt = 0.0, 0
    for start in range(0, len(rows), A_STEP):
        some = rows[start : start + A_STEP]
        batch, labels = trainer.collate(some, model.pad_id)
        with model.hooks(edits):
            total += float(trainer.answer_loss(model, batch.to(model.device), labels))
        learnt += sum(row.n_learnt for row in some)
    return total / learnt


def shifts(
    bench: Bench, model: ChatModel, edits: Sequence[Intervention], chats: Sequence[Sequence[dict[str, str]]]
) -> list[float]:
    """Projection on the unit vector of (last prompt token's residual now, edits included, minus before), a value a chat."""
    rows = [model.chat.prompt(chat) for chat in chats]
    capture = LastPrompt((bench.block,))
    before = bench.model.capture(rows, [capture])[capture.key]
    after = model.capture(rows, [capture], edits)[capture.key]
    values: list[float] = ((after - before)[:, 0] @ bench.vector.direction(bench.block).unit).tolist()
    return values
