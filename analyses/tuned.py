"""A finetuned model, and what every trait scores of it: what the analyses of finetunes share.

Knows: what one finetune and one measurement are made with, their run folders, what a measurement stands on.
Does not know: which data are trained on (severities.py), which treatments there are and what else is asked (treated.py).

What is finished is read back, and a killed one goes on. A measurement is read back only while the model, the adapter and whatever
else it stands on are what they were.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from analyses.pipeline import Prepared
from pvsae import load
from pvsae.errors import UserError
from pvsae.models import ChatModel, Intervention, LastPrompt
from pvsae.runs import RunDir, read_json
from pvsae.stages import FinetuneConfig
from pvsae.stages.inputs import Setup, open_judge, open_traits, pin_inputs
from pvsae.stages.sweep import judged_answers, score_columns, tasks_under
from pvsae.traits import TraitArtifacts
from pvsae.vectors import PersonaVectors

A_STEP = 16  # rows a step of the optimiser, as the paper's code has it


@dataclass(frozen=True)
class Setting:
    """How a finetune is made. The defaults of the command line are those of the embedded models; the paper's are rank 32, lr 1e-5
    and every row.

    Attributes:
        rows: of the data, each seen once if nothing else is said; None for all.
        batch: rows a forward pass.

    Raises: UserError where the rows of a step cannot be divided by those of a forward pass.
    """

    rows: int | None
    learning_rate: float
    rank: int
    batch: int

    def __post_init__(self) -> None:
        if self.batch < 1 or A_STEP % self.batch:
            raise UserError(f"--batch {self.batch}", f"a divisor of {A_STEP}")

    @property
    def name(self) -> str:
        return f"rows-{self.rows or 'all'}_lr-{self.learning_rate:g}_rank-{self.rank}"

    def config(self, prepared: Prepared, data: str, **more: Any) -> FinetuneConfig:
        """The finetune of the model on the data that a word stands for, with more options of the stage."""
        return FinetuneConfig(
            model=prepared.options["model"], library=prepared.options["library"], data=(data,), max_rows=self.rows,
            rank=self.rank, alpha=2 * self.rank, learning_rate=self.learning_rate, batch=self.batch,
            accumulation=A_STEP // self.batch, **more,
        )  # fmt: skip


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
    """Adds the options of a setting but its rows to those of an analysis."""
    made.add_argument("--lr", type=float, default=1e-3, help="highest learning rate (default: 1e-3)")
    made.add_argument("--rank", type=int, default=16, help="of the adapters (default: 16)")
    made.add_argument("--batch", type=int, default=A_STEP, help=f"rows a forward pass, of {A_STEP} a step (default: {A_STEP})")
    return made


def measure(prepared: Prepared, folder: Path, adapter: Path | None = None) -> Measured:
    """Scores and residuals of the model, or of the model with an adapter, in a run folder of its own."""
    setup = Setup(**prepared.options, adapter=None if adapter is None else str(adapter))
    n_samples, questions = (1, 10) if prepared.quick else (2, None)
    traits = open_traits(setup, prepared.model)
    asked = {"n_samples": n_samples, "questions": questions}
    with measuring(prepared, folder, "measure", setup, traits, asked=asked) as run:

        @cache
        def model() -> ChatModel:
            return with_adapter(prepared, setup)

        def scores() -> pd.DataFrame:
            judge, rows = open_judge(setup, model(), run), []
            for trait in traits:
                tasks = tasks_under(trait, "none", n_samples, questions)
                answers = judged_answers(
                    setup, run, model(), judge, trait, step=f"{trait.name}/answers", condition="tuned", tasks=tasks, edits=()
                )
                rows.append({"trait": trait.name, **score_columns(trait.name, answers, setup.seed)})
            return pd.DataFrame(rows)

        def residuals() -> dict[str, Tensor]:
            return {trait.name: last_prompts(model(), trait, questions) for trait in traits}

        return Measured(run.do_table("scores", scores), run.do("residuals", residuals, _save, _load))


@contextmanager
def measuring(
    prepared: Prepared,
    folder: Path,
    name: str,
    setup: Setup,
    traits: Sequence[TraitArtifacts],
    *,
    asked: Mapping[str, Any],
    vectors: Mapping[str, PersonaVectors] | None = None,
    others: Mapping[str, Any] | None = None,
) -> Iterator[RunDir]:
    """The run folder of a measurement of the model, or of the model with the setup's adapter.

    Args:
        name, asked: what is measured; with the setup it is the folder's config.
        traits, vectors, others: what else it stands on, as `pin_inputs` takes it.

    Raises: UserError where the numbers in the folder stand on something else than what is there now: also where all are there,
        since those of another adapter or vector would be taken for this one's.
    """
    with RunDir.open(folder, name, {**setup.identity(), **asked}, setup.seed) as run:
        own = {} if setup.adapter is None else {"adapter": _content(Path(setup.adapter))}
        pin_inputs(run, prepared.model, traits, vectors, {**own, **(others or {})})
        yield run


def with_adapter(prepared: Prepared, setup: Setup) -> ChatModel:
    """The model with the setup's adapter, loaded anew; without one, the model that is there."""
    return prepared.model if setup.adapter is None else load(setup.model, adapter=setup.adapter)


def last_prompts(
    model: ChatModel,
    trait: TraitArtifacts,
    max_questions: int | None = None,
    *,
    blocks: Sequence[int] | None = None,
    edits: Sequence[Intervention] = (),
) -> Float[Tensor, "questions n_blocks d_model"]:
    """Residual of the last prompt token of a trait's evaluation questions, each once, in fp32.

    Args:
        blocks: behind which it is read; None for all.
        edits: under which it is read.
    """
    capture = LastPrompt(tuple(range(model.n_blocks)) if blocks is None else tuple(blocks))
    rows = [model.chat.prompt(task.messages) for task in tasks_under(trait, "none", 1, max_questions)]
    found: Tensor = model.capture(rows, [capture], edits)[capture.key]
    return found


def _content(adapter: Path) -> dict[str, Any]:
    """What an adapter does: the hash of its weights and its config, whose lists PEFT writes in another order each time."""
    weights = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in adapter.glob("adapter_model.*")}
    config = read_json(adapter / "adapter_config.json")
    return {**weights, **{name: sorted(value) if isinstance(value, list) else value for name, value in config.items()}}


def _save(value: dict[str, Tensor], folder: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in value.items()}, str(folder / "residuals.safetensors"))


def _load(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(str(folder / "residuals.safetensors"))
