"""Stage `steer`: what adding a persona vector does, with every control in the same table (paper, section on steering).

Knows: the sweep (blocks, strengths), its controls, how rows of one condition become one row of the table.
Does not know: what an addition does to the model (models/), how answers are scored (judges/).

Controls, always: no steering; a random direction of the same length (several draws), in the multi-layer form at every block;
the same vector with the sign flipped; and the system prompts alone, without a vector. A row's sampling noise depends on
question and sample only, so conditions differ by what was done to the model and not by luck.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from pvsae.errors import UserError
from pvsae.runs import RunDir
from pvsae.stages.costs import costs, ledger_of
from pvsae.stages.inputs import (
    Setup,
    check_blocks,
    chosen_block,
    open_judge,
    open_model,
    open_run,
    open_traits,
    open_vectors,
    pin_inputs,
    read_vectors,
)
from pvsae.stages.plan import Plan, plan_answers
from pvsae.stages.strength import UNITS, calibrate, gap_in_raw, mean_kl
from pvsae.stages.sweep import POSITIONS, UNDER, failures, judged_answers, score_columns, tasks_under
from pvsae.vectors.persona import DEFAULT_STATISTIC, PersonaVectors
from pvsae.vectors.rollouts import Rollouts, Task

if TYPE_CHECKING:
    from pvsae.judges.base import Judge
    from pvsae.models import Add, ChatModel
    from pvsae.traits import TraitArtifacts

ALL_BLOCKS = "incremental"  # the table's name for the multi-layer form


@dataclass(frozen=True, kw_only=True)
class SteerConfig(Setup):
    """What to sweep.

    Attributes:
        vectors: the run folder of `pvsae extract`, or a vector file.
        layers: run folder of `pvsae layers`, whose choice of block is used where `blocks` is empty.
        blocks: blocks to steer at, one at a time.
        multi_layer: steer all blocks at once with the incremental vectors, instead of one block.
        coefs: strengths, in `unit`.
        unit: "raw", "gap" or "kl" (see strength.py).
        positions: "response", "prompt" or "all".
        statistic: which vector of the file.
        under: system prompt during steering: "none", or the trait's eliciting ("pos") or suppressing ("neg") instructions.
        n_random: random directions per strength.
        max_questions, n_samples: evaluation questions used (None: all), answers to each.
        kl_rows: unsteered answers on which a "kl" strength is calibrated.
    """

    vectors: str
    layers: str | None = None
    blocks: tuple[int, ...] = ()
    multi_layer: bool = False
    coefs: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0, 2.5)
    unit: str = "raw"
    positions: str = "all"
    statistic: str = DEFAULT_STATISTIC
    under: str = "none"
    n_random: int = 2
    max_questions: int | None = None
    n_samples: int = 1
    kl_rows: int = 16


@dataclass(frozen=True)
class SteerResult:
    """`table`: a row a trait and condition: trait, condition, block, coef, unit, raw_coef, positions, under, trait_score with
    its 95% interval, coherence with its, n (answers), n_failed_trait and n_failed_coherence (answers without that score)."""

    table: pd.DataFrame
    path: Path


@dataclass(frozen=True)
class Condition:
    """One way to treat the model. `matrix` [n_blocks, d_model] holds the direction at every block; None adds nothing."""

    name: str
    system: str
    block: int | str = "-"
    coef: float = 0.0
    matrix: Float[Tensor, "n_blocks d_model"] | None = None

    @property
    def slug(self) -> str:
        at = "" if self.matrix is None else f"_block-{self.block}_coef{self.coef:+g}"
        return self.name.replace(" ", "-") + at


def random_like(matrix: Float[Tensor, "n_blocks d_model"], seed: int) -> Float[Tensor, "n_blocks d_model"]:
    """One random direction at every block, with the length that the vector has at that block."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(matrix.shape[1], generator=generator)
    return matrix.norm(dim=1, keepdim=True) * (direction / direction.norm())


def turned_at_random(matrix: Float[Tensor, "n_blocks d_model"], seed: int) -> Float[Tensor, "n_blocks d_model"]:
    """The vectors of all blocks turned by one random rotation: the control of the multi-layer form.

    A rotation keeps every length and angle among them. So what is added at each block has the norm of that block's own
    increment, and what has been added up to a block has the length of the vector there; only where they point is random. (Were
    the lengths alone matched, as `random_like` does, the increments would be the small differences of lengths.)
    """
    within = torch.linalg.qr(matrix.double().T).R  # [k, n_blocks]: the vectors in coordinates of the space that they span
    generator = torch.Generator().manual_seed(seed)
    frame, r = torch.linalg.qr(torch.randn(matrix.shape[1], len(within), generator=generator, dtype=torch.float64))
    frame = frame * r.diagonal().sign()  # else the signs of its columns, [d_model, k], would be a matter of convention
    return (frame @ within).T.to(matrix.dtype)


def additions(
    matrix: Float[Tensor, "n_blocks d_model"], block: int | str, coef: float, positions: str, ref: str
) -> tuple[Add, ...]:
    """One addition at a block, or the incremental ones at every block. `coef` is raw."""
    from pvsae.models import Add, Direction, incremental

    if block == ALL_BLOCKS:
        return incremental(matrix, coef, positions, ref)
    assert isinstance(block, int)
    return (Add(Direction(matrix[block], f"{ref}/block{block}"), block, coef, positions),)


def run(
    config: SteerConfig, run_dir: RunDir | str | Path, *, model: ChatModel | None = None, judge: Judge | None = None
) -> SteerResult:
    """Steer every trait of the config over the sweep and its controls; a condition is a step, so a killed run goes on.

    Raises:
        UserError: bad options, vectors of another trait or shape, a block that does not exist, a unit that takes more than the
            vectors hold; all before anything is generated, except for a "kl" that no strength reaches.
    """
    _check(config)
    with open_run(run_dir, "steer", config) as folder:
        model = model or open_model(config)
        traits = open_traits(config, model)
        vectors = {t.name: open_vectors(config.vectors, t.name, model, config.statistic) for t in traits}
        blocks = {t.name: _blocks(config, t.name, model, vectors[t.name]) for t in traits}
        for t in traits:
            _check_vectors(config, model, vectors[t.name], blocks[t.name])
        before = ledger_of(judge)
        judge = judge or open_judge(config, model, folder)
        pin_inputs(folder, model, traits, vectors)
        rows, prompts, examples = [], [], []
        for artifacts in traits:
            sweep = Sweep(config, folder, model, judge, artifacts, vectors[artifacts.name])
            for condition in _conditions(config, vectors[artifacts.name], blocks[artifacts.name]):
                rollouts, raw = sweep.answers(condition)
                rows.append(row_of(config, artifacts.name, condition, raw, rollouts))
                first = rollouts.table.iloc[0]
                examples.append({"label": f"{artifacts.name}, {condition.slug}: {first['question']}", "text": first["answer"]})
                if condition.name in ("unsteered", "prompt pos"):
                    prompts.append({"label": f"{artifacts.name}, {condition.name}", "text": first["prompt"]})
        table = pd.DataFrame(rows)
        folder.table("steering", table)
        folder.result({**_summary(config, table, prompts, examples, judge), "costs": costs(judge, before)})
        return SteerResult(table, folder.path)


def plan(config: SteerConfig) -> Plan:
    """What a run would generate and judge; loads no model and asks nobody. UserError where options or vectors are wrong."""
    _check(config)
    parts = []
    for artifacts in open_traits(config):
        vectors = read_vectors(config.vectors, artifacts.name, config.statistic)
        for block in config.blocks:
            vectors.check_block(block)
        chosen = (0,)  # a block that only the model or a `pvsae layers` run knows; which one changes no count
        blocks = (ALL_BLOCKS,) if config.multi_layer else tuple(dict.fromkeys(config.blocks)) or chosen
        conditions = _conditions(config, vectors, blocks)
        parts.append((artifacts, [task for c in conditions for task in _tasks(config, artifacts, c)]))
    return plan_answers(config, parts)


def _tasks(config: SteerConfig, artifacts: TraitArtifacts, condition: Condition) -> list[Task]:
    return tasks_under(artifacts, condition.system, config.n_samples, config.max_questions)


def _check(config: SteerConfig) -> None:
    if config.unit not in UNITS:
        raise UserError(f"unknown unit {config.unit!r}", f"one of {', '.join(UNITS)}")
    if config.under not in UNDER:
        raise UserError(f"unknown prompt {config.under!r}", f"one of {', '.join(UNDER)}")
    if config.positions not in POSITIONS:
        raise UserError(f"unknown positions {config.positions!r}", f"one of {', '.join(POSITIONS)}")
    if not all(math.isfinite(coef) for coef in config.coefs):
        raise UserError(f"coefs are {list(config.coefs)}", "finite numbers")
    if not config.coefs or 0 in config.coefs:
        raise UserError(f"coefs are {list(config.coefs)}", "at least one strength, none of them 0 (unsteered is always there)")
    if config.multi_layer and config.blocks:
        raise UserError("both blocks and multi_layer are given", "one of them", "multi_layer steers every block")
    if config.multi_layer and config.unit == "gap" and config.statistic != DEFAULT_STATISTIC:
        raise UserError("the unit 'gap' differs from block to block here", "--unit raw or kl with multi_layer")
    if config.kl_rows < 1:
        raise UserError(f"kl_rows is {config.kl_rows}", "at least 1 answer to calibrate on")


def _check_vectors(config: SteerConfig, model: ChatModel, vectors: PersonaVectors, blocks: Sequence[int | str]) -> None:
    """What the sweep would stumble over at its first steered answer, or at the first one of this trait or block."""
    matrix = _matrix(config, vectors)
    for block in blocks:
        edits = additions(matrix, block, 1.0, config.positions, vectors.trait)
        if not any(edit.direction.norm for edit in edits):
            raise UserError(
                f"{config.statistic} of {vectors.trait!r} is zero or missing at block {0 if block == ALL_BLOCKS else block}",
                "a vector that points somewhere",
                "another block, statistic or file",
            )
        with model.hooks(edits):  # refuses numbers that are not finite
            pass
        if config.unit == "gap" and isinstance(block, int):
            gap_in_raw(vectors, block, config.statistic)


def _blocks(config: SteerConfig, trait: str, model: ChatModel, vectors: PersonaVectors) -> tuple[int | str, ...]:
    if config.multi_layer:
        return (ALL_BLOCKS,)
    blocks = check_blocks(config.blocks, model) or (chosen_block(trait, model, config.layers),)
    return tuple(vectors.check_block(block) for block in blocks)


def _matrix(config: SteerConfig, vectors: PersonaVectors) -> Float[Tensor, "n_blocks d_model"]:
    """The vector of every block; for the multi-layer form only up to the first block that has none (official files)."""
    matrix = vectors.of(config.statistic)
    return matrix[: min(vectors.missing_blocks)] if config.multi_layer and vectors.missing_blocks else matrix


def _conditions(config: SteerConfig, vectors: PersonaVectors, blocks: Sequence[int | str]) -> Iterator[Condition]:
    """Everything that is measured, unsteered first. Flips that the sweep holds anyway are not done twice."""
    matrix = _matrix(config, vectors)
    yield Condition("unsteered", config.under)
    for polarity in ("pos", "neg"):
        if polarity != config.under:
            yield Condition(f"prompt {polarity}", polarity)
    for block in blocks:
        for coef in config.coefs:
            yield Condition("vector", config.under, block, coef, matrix)
        for coef in config.coefs:
            if -coef not in config.coefs:
                yield Condition("sign flip", config.under, block, -coef, matrix)
        for k in range(config.n_random):
            draw = turned_at_random if config.multi_layer else random_like
            control = draw(matrix, seed=zlib.crc32(f"{config.seed}/{vectors.trait}/{k}".encode()))
            for coef in config.coefs:
                yield Condition(f"random {k}", config.under, block, coef, control)


class Sweep:
    """The conditions of one trait: generates, judges and remembers each as a step of the run."""

    def __init__(
        self,
        config: SteerConfig,
        folder: RunDir,
        model: ChatModel,
        judge: Judge,
        artifacts: TraitArtifacts,
        vectors: PersonaVectors,
    ) -> None:
        self.config, self.folder, self.model, self.judge = config, folder, model, judge
        self.artifacts, self.vectors = artifacts, vectors

    def answers(self, condition: Condition) -> tuple[Rollouts, float]:
        """Judged answers under a condition, and the raw coefficient that its strength came to."""
        raw = self.raw_coef(condition)
        edits: tuple[Add, ...] = ()
        if condition.matrix is not None:
            edits = additions(condition.matrix, condition.block, raw, self.config.positions, condition.slug)
        rollouts = judged_answers(
            self.config,
            self.folder,
            self.model,
            self.judge,
            self.artifacts,
            step=f"{self.artifacts.name}/{condition.slug}",
            condition=condition.name,
            tasks=_tasks(self.config, self.artifacts, condition),
            edits=edits,
        )
        return rollouts, raw

    def raw_coef(self, condition: Condition) -> float:
        """The raw coefficient of a condition. A random direction takes the vector's, so that the lengths are the same."""
        if condition.matrix is None or self.config.unit == "raw":
            return condition.coef
        if self.config.unit == "gap":
            if condition.block == ALL_BLOCKS:
                return condition.coef
            assert isinstance(condition.block, int)
            return condition.coef * gap_in_raw(self.vectors, condition.block, self.config.statistic)
        name = f"{self.artifacts.name}/kl_block-{condition.block}_{condition.coef:+g}"
        return float(self.folder.do_json(name, lambda: self._calibrate(condition.block, condition.coef)))

    def _calibrate(self, block: int | str, target: float) -> float:
        from pvsae.vectors.extraction import render_rows

        unsteered, _ = self.answers(Condition("unsteered", self.config.under))
        answered = [i for i, text in enumerate(unsteered.table["answer"]) if text]
        rows = render_rows(self.model, unsteered, answered[: self.config.kl_rows])
        matrix = _matrix(self.config, self.vectors)
        return calibrate(
            lambda coef: mean_kl(self.model, rows, additions(matrix, block, coef, self.config.positions, "kl")), target
        )


def row_of(config: SteerConfig, trait: str, condition: Condition, raw: float, rollouts: Rollouts) -> dict[str, Any]:
    """A condition's row of the table; `raw` is the coefficient that its strength came to."""
    return {
        "trait": trait,
        "condition": condition.name,
        "block": condition.block,
        "coef": condition.coef,
        "unit": config.unit,
        "raw_coef": raw,
        "positions": "-" if condition.matrix is None else config.positions,
        "under": condition.system,
        **score_columns(trait, rollouts, config.seed),
    }


def _summary(
    config: SteerConfig, table: pd.DataFrame, prompts: list[dict[str, str]], examples: list[dict[str, str]], judge: Judge
) -> dict[str, Any]:
    headline: list[dict[str, Any]] = [
        {"label": "unit of strength", "value": config.unit},
        {"label": "judge", "value": judge.name},
    ]
    for trait, part in table.groupby("trait", sort=False):
        plain = part.loc[part["condition"] == "unsteered", "trait_score"].iloc[0]
        strong = part[(part["condition"] == "vector") & (part["coherence"] >= 75)]
        best = strong.loc[strong["trait_score"].idxmax()] if strong["trait_score"].notna().any() else None
        value = f"{plain:.0f} unsteered; no strength keeps coherence at 75"
        if best is not None:
            value = f"{plain:.0f} to {best['trait_score']:.0f} at {best['coef']:g} (coherence {best['coherence']:.0f})"
        headline.append({"label": str(trait), "value": value})
    return {
        "title": "Steering",
        "about": (
            "The vector was added to the residual stream while the model answered the evaluation questions"
            + (" without any system prompt." if config.under == "none" else f" under its {config.under} system prompts.")
        ),
        "headline": headline,
        "failures": failures(table),
        "prompts": prompts,
        "examples": examples,
    }
