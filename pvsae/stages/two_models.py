"""What two models, a base and its finetune, give to the same questions: one after the other, and never both in memory.

Knows: which residuals, answers and activations are read of each, and their steps in the run folder, so that all that the base
gave is there before the tuned model is loaded.
Does not know: what they come to when they are compared (drift.py), how answers are scored (judges/).

Every question of every trait is asked without a system prompt. Read are the last prompt token, each model's own answers, and the
base's answers by both, where only the reader differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from pvsae.errors import UserError
from pvsae.runs import RunDir
from pvsae.stages.inputs import require_paid
from pvsae.stages.sweep import tasks_under
from pvsae.vectors.rollouts import Rollouts, Task, generate_tasks, judge_rollouts

if TYPE_CHECKING:
    from pvsae.judges.base import Judge
    from pvsae.models import ChatModel
    from pvsae.models.chat import Rendered
    from pvsae.saes.dictionary import SAE
    from pvsae.saes.encodings import Side
    from pvsae.stages.drift import DriftConfig
    from pvsae.traits import TraitArtifacts

BASE, TUNED = "base", "tuned"


def tasks_of(config: DriftConfig, artifacts: TraitArtifacts) -> list[Task]:
    """The evaluation questions of a trait, as often as they are answered."""
    return tasks_under(artifacts, "none", config.n_samples, config.max_questions)


@dataclass(eq=False)
class TwoModels:
    """The steps of a run that hold what each model gave.

    Attributes:
        judge: who scores the answers; None leaves them as they are.
        sae, sae_block: a dictionary that reads the answers, and where.
        shape: blocks and d_model of the base.
    """

    config: DriftConfig
    folder: RunDir
    traits: list[TraitArtifacts]
    judge: Judge | None
    sae: SAE | None
    sae_block: int
    shape: tuple[int, int]

    def check_tuned(self, tuned: ChatModel) -> None:
        """UserError for a model that is no finetune of the base, or not the one that the run began with."""
        from pvsae.models.fingerprint import fingerprint

        if (tuned.n_blocks, tuned.d_model) != self.shape:
            raise UserError(
                f"{self.config.tuned} has {tuned.n_blocks} blocks of d_model {tuned.d_model}, "
                f"the base {self.shape[0]} of {self.shape[1]}",
                "a finetune of the base",
            )
        ids = self.folder.do_json("base/ids", lambda: [])
        if [list(row.ids) for row in self._prompts(tuned)] != ids:
            raise UserError(
                f"{self.config.tuned} makes other tokens of the questions than the base does",
                "the base's tokenizer and chat template",
                "save the base's tokenizer into the tuned model's folder",
            )
        weights = self.folder.do_json("tuned/weights", lambda: fingerprint(tuned))
        if weights != fingerprint(tuned):
            raise UserError(
                f"the weights of {self.config.tuned} changed since the run in {self.folder.path} began",
                "the same model until a run is finished",
                "choose another --out, or delete that folder",
            )

    def read_tuned(self, tuned: ChatModel) -> pd.DataFrame | None:
        """Everything that the tuned model gives; its `attributed` table, where there is a dictionary."""
        self.check_tuned(tuned)
        self.read(TUNED, tuned)
        return self.attributed(tuned)

    @property
    def questions(self) -> list[Task]:
        """One task a question, trait by trait."""
        return [task for artifacts in self.traits for task in tasks_of(self.config, artifacts) if task.sample == 0]

    def _prompts(self, model: ChatModel) -> list[Rendered]:
        return [model.chat.prompt(task.messages) for task in self.questions]

    def read(self, which: str, model: ChatModel) -> None:
        """Everything that one model gives, as steps of the run."""
        from pvsae.models import LastPrompt

        prompts = self._prompts(model)
        if which == BASE:
            self.folder.do_json("base/ids", lambda: [list(row.ids) for row in prompts])
        everywhere = LastPrompt(tuple(range(model.n_blocks)))
        self.residuals(
            f"{which}/prompts",
            lambda: model.capture(prompts, [everywhere], batch_tokens=self.config.batch_tokens, progress=f"{which} prompts")[
                everywhere.key
            ],
        )
        if not self.config.answers:
            return
        for artifacts in self.traits:
            self.answers(which, artifacts, model)
        for whose in (BASE, TUNED) if which == TUNED else (BASE,):
            self._read_answers(which, whose, model)

    def residuals(self, step: str, compute: Any = None) -> Float[Tensor, "rows n_blocks d_model"]:
        from safetensors.torch import load_file, save_file

        return self.folder.do(
            step,
            compute,
            lambda value, where: save_file({"residual": value.contiguous()}, where / "residual.safetensors"),
            lambda where: load_file(where / "residual.safetensors")["residual"],
        )

    def answers(self, which: str, artifacts: TraitArtifacts, model: ChatModel | None = None) -> Rollouts:
        """A model's judged answers to a trait's questions, made if a model is given and the step is not done."""
        step = f"{which}/answers/{artifacts.name}"

        def compute() -> Rollouts:
            assert model is not None
            found = generate_tasks(
                model,
                tasks_of(self.config, artifacts),
                {"trait": artifacts.name, "condition": which},
                sampling=self.config.sampling(model),
                batch_size=self.config.batch_size,
                parts=self.folder.parts(step) / "answers",
                progress=f"{which} {artifacts.name}",
            )
            if self.judge is None:
                return found
            return require_paid(judge_rollouts(found, self.judge, artifacts, parts=self.folder.parts(step) / "scores"))

        return self.folder.do(
            step,
            compute,
            lambda value, where: value.save(where / "rollouts.parquet"),
            lambda where: Rollouts.load(where / "rollouts.parquet"),
        )

    def answered(self, model: ChatModel, whose: str) -> tuple[list[Rendered], list[int]]:
        """(the answers of a model that have tokens and fit the context, as rows to read; their numbers among all answers)."""
        from pvsae.vectors.extraction import render_rows

        rows: list[Rendered] = []
        for artifacts in self.traits:
            rollouts = self.answers(whose, artifacts)
            rows += render_rows(model, rollouts, range(len(rollouts)))
        kept = [i for i, row in enumerate(rows) if row.answer[1] > row.answer[0] and len(row.ids) <= model.n_ctx]
        return [rows[i] for i in kept], kept

    def units(self) -> list[str]:
        """The question of each answer."""
        return [f"{a.name}/{task.question_index}" for a in self.traits for task in tasks_of(self.config, a)]

    def _read_answers(self, reader: str, whose: str, model: ChatModel) -> None:
        from pvsae.models import SpanMean

        rows, kept = self.answered(model, whose)
        capture = SpanMean(tuple(range(model.n_blocks)), "answer")

        def compute() -> Tensor:
            out = torch.full((len(self.units()), model.n_blocks, model.d_model), float("nan"))
            label = f"{reader} reads {whose}"
            if rows:
                out[kept] = model.capture(rows, [capture], batch_tokens=self.config.batch_tokens, progress=label)[capture.key]
            return out

        self.residuals(f"{reader}/reads_{whose}", compute)
        if self.sae is not None and rows:
            self.side(reader, whose, model, rows, kept)

    def side(
        self,
        reader: str,
        whose: str,
        model: ChatModel | None = None,
        rows: Sequence[Rendered] = (),
        kept: Sequence[int] = (),
    ) -> Side:
        """What the dictionary sees while one model reads the answers of one; made where a model is given."""
        from pvsae.saes.encodings import Side, encode_side

        def compute() -> Side:
            assert model is not None
            assert self.sae is not None
            units = self.units()
            return encode_side(
                model, self.sae, self.sae_block, rows, [units[i] for i in kept], batch_tokens=self.config.batch_tokens,
                progress=f"features: {reader} reads {whose}",
            )  # fmt: skip

        return self.folder.do(f"{reader}/features_{whose}", compute, lambda value, where: value.save(where), Side.load)

    def attributed(self, tuned: ChatModel) -> pd.DataFrame | None:
        """Latents by what they do in the tuned model for its own answers beyond the base's."""
        if self.sae is None:
            return None
        from pvsae.saes.attribution import attribution, effects

        assert self.sae is not None
        sae, units = self.sae, self.units()

        def compute() -> pd.DataFrame:
            rows, kept = {}, {}
            for whose in (BASE, TUNED):
                rows[whose], kept[whose] = self.answered(tuned, whose)
            both = {units[i] for i in kept[BASE]} & {units[i] for i in kept[TUNED]}
            found = {}
            for whose in (TUNED, BASE):
                some = [(row, units[i]) for row, i in zip(rows[whose], kept[whose], strict=True) if units[i] in both]
                found[whose] = effects(
                    tuned, sae, self.sae_block, [row for row, _ in some], [unit for _, unit in some],
                    batch_tokens=self.config.batch_tokens, progress=f"attribution: {whose} answers",
                )  # fmt: skip
            return attribution(found[TUNED], found[BASE])

        return self.folder.do_table("tuned/attribution", compute)
