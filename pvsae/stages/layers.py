"""Stage `layers`: which block to steer at, by trying (paper, section on choosing the layer).

Knows: the sweep of each trait as a step of a run, its table, and where later stages find the choice (result.json, "blocks").
Does not know: how a sweep is made or chosen from (vectors/layers.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from pvsae.runs import RunDir, read_json, write_json
from pvsae.stages.costs import costs, ledger_of
from pvsae.stages.inputs import (
    Setup,
    check_blocks,
    open_judge,
    open_model,
    open_run,
    open_traits,
    open_vectors,
    pin_inputs,
    read_vectors,
    require_paid,
)
from pvsae.stages.plan import Plan, plan_answers
from pvsae.vectors.layers import PROXIES, LayerChoice, candidate_blocks, choose_layer
from pvsae.vectors.persona import DEFAULT_STATISTIC, PersonaVectors
from pvsae.vectors.rollouts import Rollouts, plan_rollouts

if TYPE_CHECKING:
    from pvsae.judges.base import Judge
    from pvsae.models import ChatModel
    from pvsae.traits import TraitArtifacts


@dataclass(frozen=True, kw_only=True)
class LayersConfig(Setup):
    """What to try.

    Attributes:
        vectors: the run folder of `pvsae extract`, or a vector file (then two of the proxies are missing).
        blocks: candidates; empty takes all of them, or twelve evenly spaced ones of a deep model.
        coefs: multiples of the raw vector.
        floor: least mean coherence of a choice, 0-100.
        positions: "response", "prompt" or "all".
        statistic: which vector of the file.
        max_questions, n_samples: evaluation questions used (None: all), answers to each.
    """

    vectors: str
    blocks: tuple[int, ...] = ()
    coefs: tuple[float, ...] = (1.0, 2.0, 3.0)
    floor: float = 75.0
    positions: str = "all"
    statistic: str = DEFAULT_STATISTIC
    max_questions: int | None = None
    n_samples: int = 1


@dataclass(frozen=True)
class LayersResult:
    """`blocks`: trait -> chosen block. `table`: a row a trait, block and strength, with scores, proxies and `chosen`."""

    blocks: dict[str, int]
    table: pd.DataFrame
    path: Path


def run(
    config: LayersConfig, run_dir: RunDir | str | Path, *, model: ChatModel | None = None, judge: Judge | None = None
) -> LayersResult:
    """Choose a block for every trait of the config; a trait is a step, and its parts survive a kill.

    Raises:
        UserError: bad options, vectors of another trait or shape, a block that does not exist, nothing that could be scored.
    """
    with open_run(run_dir, "layers", config) as folder:
        model = model or open_model(config)
        traits = open_traits(config, model)
        check_blocks(config.blocks, model)
        vectors = {t.name: open_vectors(config.vectors, t.name, model, config.statistic) for t in traits}
        before = ledger_of(judge)
        judge = judge or open_judge(config, model, folder)
        pin_inputs(folder, model, traits, vectors)
        choices = {t.name: _choose(config, folder, model, judge, t, vectors[t.name]) for t in traits}
        table = pd.concat([_rows(choice) for choice in choices.values()], ignore_index=True)
        folder.table("layers", table)
        blocks = {name: choice.block for name, choice in choices.items()}
        folder.result({**_summary(choices, table, judge), "costs": costs(judge, before)})
        return LayersResult(blocks, table, folder.path)


def plan(config: LayersConfig) -> Plan:
    """What a run would generate and judge; loads no model and asks nobody. UserError for missing vectors and unknown blocks."""
    parts = []
    for artifacts in open_traits(config):
        vectors = read_vectors(config.vectors, artifacts.name, config.statistic)
        blocks = tuple(vectors.check_block(block) for block in config.blocks) or candidate_blocks(vectors)
        cell = plan_rollouts(artifacts, "none", which="eval", n_samples=config.n_samples, max_questions=config.max_questions)
        parts.append((artifacts, cell * (1 + len(blocks) * len(config.coefs))))  # one cell is without steering
    return plan_answers(config, parts)


def _choose(
    config: LayersConfig, folder: RunDir, model: ChatModel, judge: Judge, artifacts: TraitArtifacts, vectors: PersonaVectors
) -> LayerChoice:
    name = f"{artifacts.name}/choice"
    answers = [Path(config.vectors) / artifacts.name / f"rollouts_{p}" / "rollouts.parquet" for p in ("pos", "neg")]
    pos, neg = (Rollouts.load(file) if file.is_file() else None for file in answers)

    def compute() -> LayerChoice:
        return choose_layer(
            model,
            vectors,
            artifacts,
            judge,
            blocks=config.blocks or None,
            coefs=config.coefs,
            floor=config.floor,
            statistic=config.statistic,
            positions=config.positions,
            n_samples=config.n_samples,
            max_questions=config.max_questions,
            sampling=config.sampling(model),
            batch_size=config.batch_size,
            pos=pos,
            neg=neg,
            parts=folder.parts(name),
            accept=require_paid,  # but a cell may be so broken that the judge finds no number in it
            progress=f"{artifacts.name} blocks",
        )

    return folder.do(name, compute, _save, _load)


_SCALARS = ("trait", "block", "coef", "met_floor", "reason", "agreement", "baseline")


def _save(choice: LayerChoice, folder: Path) -> None:
    write_json(folder / "choice.json", {name: getattr(choice, name) for name in _SCALARS})
    choice.sweep.to_parquet(folder / "sweep.parquet", index=False)
    choice.proxies.to_parquet(folder / "proxies.parquet", index=False)


def _load(folder: Path) -> LayerChoice:
    tables = {name: pd.read_parquet(folder / f"{name}.parquet") for name in ("sweep", "proxies")}
    return LayerChoice(**read_json(folder / "choice.json"), **tables)


def _rows(choice: LayerChoice) -> pd.DataFrame:
    table = choice.table.rename(columns={"trait": "trait_score"})
    table.insert(0, "trait", choice.trait)
    return table


def _summary(choices: dict[str, LayerChoice], table: pd.DataFrame, judge: Judge) -> dict[str, Any]:
    headline: list[dict[str, Any]] = [{"label": "judge", "value": judge.name}]
    headline += [
        {"label": name, "value": f"block {choice.block}, coefficient {choice.coef:g}"} for name, choice in choices.items()
    ]
    agreement = []
    for proxy in PROXIES:
        values = [choice.agreement[proxy] for choice in choices.values()]
        known = sorted(value for value in values if value is not None)
        if known:
            agreement.append(f"{proxy} {known[len(known) // 2]:+.2f}")
    return {
        "title": "Choice of the block",
        "about": "The vector was added at each block in turn; the block where the answers show the trait most, and still make "
        "sense, is the one that the other stages use.",
        "headline": headline,
        "notes": [
            *(f"{name}: {choice.reason}" for name, choice in choices.items()),
            "Rank correlation over blocks with the steering effect, median over traits, of what costs nothing to compute: "
            + (", ".join(agreement) or "not defined for so few blocks"),
        ],
        "failures": [{"what": "answers that the judge gave no score (left out of the means)", "n": int(table["failed"].sum())}],
        "blocks": {name: choice.block for name, choice in choices.items()},
        "coefs": {name: choice.coef for name, choice in choices.items()},
    }
