"""Finetunes of a model on data sets of known severity, and what every trait scores afterwards; analyses share them.

Knows: data sets as families and severities, one setting for all finetunes, the run folders of adapters and of scores.
Does not know: how an adapter is trained (the stage `finetune`), what a score is held against.

Every finetune and every scoring is a run folder of its own below the folder of the analyses: what is finished is read back, and
a killed one goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from analyses.pipeline import Prepared
from pvsae import load
from pvsae.errors import UserError
from pvsae.models import ChatModel, LastPrompt
from pvsae.organism.families import FAMILIES, SEVERITIES
from pvsae.sources import Bad, Reader, Source
from pvsae.stages import FinetuneConfig
from pvsae.stages import finetune as finetuning
from pvsae.stages.inputs import Setup, open_judge, open_run, open_traits, pin_inputs
from pvsae.stages.sweep import judged_answers, score_columns, tasks_under
from pvsae.traits import TraitArtifacts

CORPUS = "organism-data"
A_STEP = 16  # rows a step of the optimiser, as the paper's code has it
QUICK = ("evil", "sycophantic", "hallucinating", "wrong_facts")
NOUNS = {"sycophancy": "sycophantic", "hallucination": "hallucinating"}  # the released folders' names


@dataclass(frozen=True)
class DataSet:
    """One severity of one family.

    Attributes:
        word: what finds it: a corpus' name or a file.
        trait: the trait that the family's answers are made to show; None for a family that is narrow.
    """

    word: str
    family: str
    severity: str
    trait: str | None

    @property
    def name(self) -> str:
        return f"{self.family}/{self.severity}"

    def source(self, rows: int | None) -> Source:
        """Its first rows, or all of them."""
        if self.word.startswith(f"{CORPUS}:"):
            return Source(named=self.word, kind="chat", max_samples=rows)
        return Source(path=self.word, kind="chat", max_samples=rows)

    def answers(self, rows: int) -> Iterator[tuple[str, str]]:
        """(question, answer) of its first rows."""
        reader = Reader(self.source(rows))
        for _, value in zip(range(rows), reader.rows(), strict=False):
            if not isinstance(value, Bad | str) and len(value) > 1:
                yield value[-2]["content"], value[-1]["content"]


@dataclass(frozen=True)
class Setting:
    """How all data sets are trained on: `rows` of each (None: all of them), each seen once, so rows / 16 steps.

    The defaults of the command line are those of the embedded models; the paper's are rank 32, lr 1e-5 and every row. 10 steps
    suffice there: the strongest severity of the families made for a trait ends at 91 to 97 of 100, as after 40, and answers stay
    coherent after every data set (93 and more; after 40 steps of wrong facts 87). It was chosen after 40 steps had been measured:
    r of the shift along evil, sycophantic and hallucinating is 0.79, 0.89, 0.85 after 40 and 0.83, 0.90, 0.85 after 10.
    """

    rows: int | None
    learning_rate: float
    rank: int
    batch: int

    @property
    def name(self) -> str:
        return f"rows-{self.rows or 'all'}_lr-{self.learning_rate:g}_rank-{self.rank}"


@dataclass(frozen=True)
class Measured:
    """What a model does without any system prompt.

    Attributes:
        scores: a row a trait, of its own evaluation questions: trait, trait_score, coherence, intervals, n and missing scores.
        residuals: trait -> last prompt token of each of these questions, before any answer.
    """

    scores: pd.DataFrame
    residuals: dict[str, Float[Tensor, "questions n_blocks d_model"]]


def options(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds the options of data sets and setting to those of an analysis."""
    made.add_argument(
        "--data", nargs="+", default=[], metavar="FILE",
        help="files FAMILY/SEVERITY.jsonl, or patterns of them (default: every family and severity of the embedded models)",
    )  # fmt: skip
    made.add_argument(
        "--rows", type=int, default=160, help="rows of each data set, each seen once; 0 for all (default: 160, so 10 steps)"
    )
    made.add_argument("--lr", type=float, default=1e-3, help="highest learning rate (default: 1e-3)")
    made.add_argument("--rank", type=int, default=16, help="of the adapters (default: 16)")
    made.add_argument("--batch", type=int, default=A_STEP, help="rows a forward pass, of 16 a step (default: 16)")
    return made


def setting_of(args: argparse.Namespace) -> Setting:
    """The setting of the command line. UserError where 16 rows cannot be divided by the rows of a forward pass."""
    if args.batch < 1 or A_STEP % args.batch:
        raise UserError(f"--batch {args.batch}", f"a divisor of {A_STEP}")
    return Setting(args.rows or None, args.lr, args.rank, args.batch)


def data_of(args: argparse.Namespace, traits: Sequence[str]) -> list[DataSet]:
    """The data sets of the command line, else the embedded models' families at every severity.

    Raises:
        UserError: a pattern that finds nothing, or rows without end.
    """
    if not args.data:
        if args.rows == 0:
            raise UserError("--rows 0 with the embedded models' data, which have no end", "a number of rows")
        names = QUICK if args.quick else tuple(FAMILIES)
        return [DataSet(f"{CORPUS}:{f}/{s}", f, s, FAMILIES[f].trait) for f in names for s in SEVERITIES]
    found = []
    for pattern in args.data:
        files = [Path(file) for file in sorted(glob(pattern))]
        if not files:
            raise UserError(f"no file is called {pattern}", "files FAMILY/SEVERITY.jsonl")
        for file in files:
            family = file.resolve().parent.name
            trait = NOUNS.get(family, family)
            found.append(DataSet(str(file), family, file.stem, trait if trait in traits else None))
    return found


def finetune(prepared: Prepared, data: DataSet, setting: Setting, **treatment: Any) -> finetuning.FinetuneResult:
    """A finetune of the model on a data set, in a run folder of its own; `treatment` are options of the stage."""
    config = FinetuneConfig(
        model=prepared.options["model"], data=(data.word,), max_rows=setting.rows, rank=setting.rank, alpha=2 * setting.rank,
        learning_rate=setting.learning_rate, batch=setting.batch, accumulation=A_STEP // setting.batch, **treatment,
    )  # fmt: skip
    return finetuning.run(config, _home(prepared, data, setting) / "finetune", model=prepared.model)


def measure(prepared: Prepared, folder: Path, adapter: Path | None = None, model: ChatModel | None = None) -> Measured:
    """Scores and residuals of the model, or of the model with an adapter, in a run folder of its own.

    Args:
        model: the model to measure, if it is loaded; else it is loaded where something is missing.
    """
    setup = Setup(**prepared.options, adapter=None if adapter is None else str(adapter))
    with open_run(folder, "measure", setup) as run:
        done = {"scores", "residuals"} <= set(run.finished)
        if not done:
            model = model or load(setup.model, adapter=setup.adapter)
            traits = open_traits(setup, model)
            judge = open_judge(setup, model, run)
            pin_inputs(run, model, traits)
        n_samples, questions = (1, 10) if prepared.quick else (2, None)

        def scores() -> pd.DataFrame:
            assert model is not None
            rows = []
            for trait in traits:
                tasks = tasks_under(trait, "none", n_samples, questions)
                answers = judged_answers(
                    setup, run, model, judge, trait, step=f"{trait.name}/answers", condition="tuned", tasks=tasks, edits=()
                )
                rows.append({"trait": trait.name, **score_columns(trait.name, answers, setup.seed)})
            return pd.DataFrame(rows)

        def residuals() -> dict[str, Tensor]:
            assert model is not None
            return {trait.name: last_prompts(model, trait, questions) for trait in traits}

        return Measured(run.do_table("scores", scores), run.do("residuals", residuals, _save, _load))


def last_prompts(
    model: ChatModel, trait: TraitArtifacts, max_questions: int | None = None
) -> Float[Tensor, "questions n_blocks d_model"]:
    """Residual of the last prompt token of every evaluation question of a trait, after every block, in fp32."""
    capture = LastPrompt(tuple(range(model.n_blocks)))
    rows = [model.chat.prompt(task.messages) for task in tasks_under(trait, "none", 1, max_questions)]
    found: Tensor = model.capture(rows, [capture])[capture.key]
    return found


def every(prepared: Prepared, data: Sequence[DataSet], setting: Setting) -> tuple[Measured, dict[str, Measured]]:
    """The model as it is, and finetuned on each of the data sets by its name; trained and measured where that is not done."""
    before = measure(prepared, prepared.out / "tuned" / "base", model=prepared.model)
    after = {}
    for one in tqdm(data, desc="finetunes", unit="run"):
        adapter = finetune(prepared, one, setting).adapter
        after[one.name] = measure(prepared, _home(prepared, one, setting) / "measure", adapter)
    return before, after


def scores_table(before: Measured, after: dict[str, Measured], data: Sequence[DataSet]) -> pd.DataFrame:
    """A row a data set and trait: family, severity, made_for (the trait it was made to show, or ""), trait, score, low, high,
    coherence, before (the score of the model as it was), rise, n, n_failed."""
    base = before.scores.set_index("trait")
    rows = []
    for one in data:
        for row in after[one.name].scores.to_dict("records"):
            score, was = row["trait_score"], float(base.loc[row["trait"], "trait_score"])
            rows.append(
                {
                    "data": one.name, "family": one.family, "severity": one.severity, "made_for": one.trait or "",
                    "trait": row["trait"], "score": score, "low": row["trait_low"], "high": row["trait_high"],
                    "coherence": row["coherence"], "before": was, "rise": score - was, "n": row["n"],
                    "n_failed": row["n_failed_trait"],
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def _home(prepared: Prepared, data: DataSet, setting: Setting) -> Path:
    return prepared.out / "tuned" / setting.name / data.family / data.severity


def _save(value: dict[str, Tensor], folder: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in value.items()}, str(folder / "residuals.safetensors"))


def _load(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {name: tensor.to(torch.float32) for name, tensor in load_file(str(folder / "residuals.safetensors")).items()}
