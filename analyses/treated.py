"""A model finetuned under a treatment, and what becomes of it: trait, coherence, capability, fit, and how far it moved.

Knows: what is asked of a model that was treated, in training or afterwards.
Does not know: how a finetune is made and what a measurement stands on (tuned.py), which treatments there are, which is best.

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

from analyses import tuned
from analyses.pipeline import Prepared
from analyses.tuned import A_STEP, Setting
from pvsae.errors import UserError
from pvsae.finetuning.rows import Row
from pvsae.models import Add, ChatModel, Intervention
from pvsae.runs import RunDir
from pvsae.stages import FinetuneConfig, FinetuneResult, finetune
from pvsae.stages.capability import CapabilityConfig, task_names
from pvsae.stages.capability_tasks import Tasks
from pvsae.stages.finetune import Data, read_data
from pvsae.stages.inputs import Setup, open_judge, open_traits, open_vectors
from pvsae.stages.shifts import shifts
from pvsae.stages.statistics import mean_ci
from pvsae.stages.sweep import judged_answers, score_columns, tasks_under
from pvsae.traits import TraitArtifacts
from pvsae.vectors import PersonaVectors
from pvsae.vectors.persona import DEFAULT_STATISTIC

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
        prepared: the model before, the folder of vectors, the block of the vector that is added, taken out, projected on.
        data: names a source of rows; the setting's rows of it are trained on, `n_held_out` behind them are not.
        tasks: of lm-evaluation-harness; none takes those that the model's folder names.
        out: folder of all run folders of this trait.
    """

    prepared: Prepared
    trait: str
    data: str
    setting: Setting
    n_held_out: int
    tasks: tuple[str, ...]
    out: Path

    @property
    def model(self) -> ChatModel:
        """The model before."""
        return self.prepared.model

    @property
    def block(self) -> int:
        """Of the vector."""
        return self.prepared.blocks[self.trait]

    @cached_property
    def vector(self) -> PersonaVectors:
        """The trait's vectors."""
        return open_vectors(self.prepared.vectors, self.trait, self.model, DEFAULT_STATISTIC)

    @cached_property
    def able(self) -> Tasks:
        """The capability tasks."""
        return Tasks(task_names(CapabilityConfig(model=self.prepared.options["model"], tasks=self.tasks), self.model))

    def config(self, way: Way, amount: Amount) -> FinetuneConfig:
        """The finetune of a way. Every way sees the same rows in the same order."""
        setting = replace(self.setting, learning_rate=amount.learning_rate)
        options = {"max_steps": amount.steps, "traits": (self.trait,), **dict(way.treatment)}
        return setting.config(self.prepared, self.data, **options)

    @cached_property
    def held_out(self) -> Data:
        """Rows of the data behind those that are trained on. UserError where the data end before them."""
        trained_on = self.setting.rows
        if trained_on is None:
            raise UserError("all rows are trained on", "a number of them, so that some are left for the fit", "--rows N")
        longer = replace(self.setting, rows=trained_on + self.n_held_out)
        found = read_data(longer.config(self.prepared, self.data), self.model)
        rows = [row for row in found.rows if row.number >= trained_on]
        if not rows:
            raise UserError(f"{self.data} has no rows behind the first {trained_on}", "some, to measure the fit on", "--rows N")
        return replace(found, rows=rows)


def finetuned(bench: Bench, way: Way, amount: Amount) -> FinetuneResult:
    """The finetune, made or read back. A way that acts afterwards shares that of its treatment alone."""
    own = way if not way.afterwards else Way(PLAIN)
    folder = bench.out / f"{own.slug}_{amount.slug}" / "finetune"
    return finetune.run(bench.config(own, amount), folder, model=bench.model, progress=False)


def measured(bench: Bench, way: Way, amount: Amount, asked: Asked, name: str = "measured") -> dict[str, Any]:
    """Everything about one way: the columns of the table, and `by_question`, mean coherence of each evaluation question.

    Args:
        name: of the run folder of what is asked, beside that of the finetune, which all that ask something share.

    Raises: UserError as `finetuned`, and where what is there was measured on another model, adapter, vector, text or rows.
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
    of_trait = {**bench.prepared.options, "traits": (bench.trait,)}
    setup = Setup(**of_trait, adapter=None if adapter is None else str(adapter))
    (artifacts,) = open_traits(setup, bench.model)
    rows = {"data": bench.data, "rows": bench.setting.rows, "held_out": bench.n_held_out, "tasks": bench.tasks}
    folder = bench.out / (BASE if adapter is None else f"{way.slug}_{amount.slug}") / name
    with tuned.measuring(
        bench.prepared, folder, "measured", setup, [artifacts],
        asked={"asked": asked, "afterwards": way.afterwards, "block": bench.block, **rows},
        vectors={bench.trait: bench.vector},
        others={"rows held out": bench.held_out.sha256, **(bench.able.content if asked.able else {})},
    ) as run:  # fmt: skip
        found |= run.do_json("row", lambda: _measure(bench, way, asked, setup, artifacts, run))
    return {name: math.nan if value is None else value for name, value in found.items()}


def _measure(bench: Bench, way: Way, asked: Asked, setup: Setup, artifacts: TraitArtifacts, run: RunDir) -> dict[str, Any]:
    """The columns that need the trained model."""
    model = tuned.with_adapter(bench.prepared, setup)
    direction = bench.vector.direction(bench.block)
    edits: tuple[Intervention, ...] = (Add(direction, bench.block, way.afterwards),) if way.afterwards else ()
    judge = open_judge(setup, model, run)
    found: dict[str, Any] = {}
    for kind, n in (("eval", asked.samples), ("extract", asked.choice)):
        if not n:
            continue
        tasks = tasks_under(artifacts, "none", n, asked.questions, kind)
        answers = judged_answers(setup, run, model, judge, artifacts, step=kind, condition=way.slug, tasks=tasks, edits=edits)
        columns = score_columns(bench.trait, answers, setup.seed)
        if kind == "extract":
            found |= {"choice_trait": columns["trait_score"], "choice_coherence": columns["coherence"]}
        else:
            by_question = answers.table.groupby("question_index")["coherence"].mean()
            found |= {**columns, "by_question": by_question.tolist()}
    if asked.able:
        found["capability"] = capability(bench, model, edits, asked.limit, way.slug)
    found["held_out_loss"] = answer_loss(model, bench.held_out.rows, edits)
    before = tuned.last_prompts(bench.model, artifacts, asked.questions, blocks=(bench.block,))
    after = tuned.last_prompts(model, artifacts, asked.questions, blocks=(bench.block,), edits=edits)
    shift = mean_ci(shifts((after - before)[:, 0], direction.values[None])[:, 0].numpy(), seed=setup.seed)
    return {**found, "shift": shift.value, "shift_low": shift.low, "shift_high": shift.high}


def capability(bench: Bench, model: ChatModel, edits: Sequence[Intervention], limit: int | None, label: str) -> float:
    """Percent of questions answered rightly; the mean of several tasks."""
    from pvsae.models.harness import HarnessModel

    tasks = bench.able
    lm = HarnessModel(model, edits, batch_size=bench.prepared.options["batch_size"], progress=f"{label}, capability")
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
