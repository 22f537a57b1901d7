"""Stage `drift`: what a finetuning did to a model, along every known trait (paper, section on finetuning).

Knows: which models, traits and dictionary are compared, the tables that come of it, the run folder.
Does not know: what is read of the models and how (two_models.py), how a shift is computed (shifts.py), what a dictionary sees
(saes/), how answers are scored (judges/).
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from pvsae.errors import UserError
from pvsae.runs import RunDir
from pvsae.stages.costs import costs, ledger_of
from pvsae.stages.inputs import (
    Setup,
    check_blocks,
    chosen_block,
    known_traits,
    open_judge,
    open_run,
    open_traits,
    pin_inputs,
    read_vectors,
)
from pvsae.stages.plan import Plan, plan_answers
from pvsae.stages.shifts import shift_table
from pvsae.stages.statistics import mean_ci
from pvsae.stages.two_models import BASE, TUNED, TwoModels, tasks_of
from pvsae.vectors.persona import DEFAULT_STATISTIC, PersonaVectors

if TYPE_CHECKING:
    from pvsae.judges.base import Judge
    from pvsae.models import ChatModel

LAST_PROMPT, OWN_ANSWER, SAME_ANSWER = "last prompt token", "own answers", "same answers"
OWN, ALL = "own", "all"


@dataclass(frozen=True, kw_only=True)
class DriftConfig(Setup):
    """What to compare; `model` (with `adapter`, if any) is the base.

    Attributes:
        tuned: the finetuned model: a PEFT adapter's folder, a run folder of `pvsae finetune`, a model folder or a hub id.
        vectors: run folder of `pvsae extract`, or a vector file; without `traits`, every trait that is there is known.
        layers: run folder of `pvsae layers`, whose choice of block is used where `block` is None.
        block: the block of the main table; the profile has all.
        statistic: which vector of the file.
        answers: let both models answer, for the shift at answer tokens, scores and features; else only prompts are read.
        scores: have the answers judged.
        max_questions, n_samples: evaluation questions of each trait (None: all), answers to each.
        sae: a dictionary (folder or RELEASE/ID), for the features that moved most.
        sae_block: its block, where it does not say which.
        other_model: take a dictionary of another model of the same width all the same.
        top: features of each list in the table.
        batch_tokens: tokens a forward pass of the reading.
    """

    tuned: str
    vectors: str = "runs/extract"
    layers: str | None = None
    block: int | None = None
    statistic: str = DEFAULT_STATISTIC
    answers: bool = True
    scores: bool = True
    max_questions: int | None = None
    n_samples: int = 1
    sae: str | None = None
    sae_block: int | None = None
    other_model: bool = False
    top: int = 20
    batch_tokens: int = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("top", "batch_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}", "at least 1")
        if self.sae and not self.answers:
            raise UserError("a dictionary without answers", "answers to read it on", "leave --sae or --no-answers out")

    def identity(self) -> dict[str, Any]:
        """As of every stage; how many tokens a forward pass takes changes no number, nor does what is allowed."""
        return {name: value for name, value in super().identity().items() if name not in ("batch_tokens", "other_model")}


@dataclass(frozen=True)
class DriftResult:
    """What was found.

    Attributes:
        table: the shift along every trait at its block: the columns of `shifts.shift_table` after reading ("last prompt token",
            "own answers", "same answers": the base's, read by both) and prompts ("own" evaluation questions of the trait, or
            those of "all" traits); first the last prompt token on own prompts, the largest shift first.
        profile: the same at every block.
        scores: a row a trait: trait score and coherence of both models with intervals, and the change with its own, paired by
            question. None without scores.
        features: which latents moved most, on own and on the base's answers, and which push towards the tuned model's answers;
            None without a dictionary.
    """

    table: pd.DataFrame
    profile: pd.DataFrame
    scores: pd.DataFrame | None
    features: pd.DataFrame | None
    path: Path

    @property
    def shown(self) -> pd.DataFrame:
        """The main rows, with the scores where there are any, for a terminal."""
        columns = ["trait", "block", "shift", "low", "high", "gaps", "joint", "random_limit", "natural_limit", "n"]
        main = self.table[(self.table["reading"] == LAST_PROMPT) & (self.table["prompts"] == OWN)][columns]
        if self.scores is None:
            return main
        return main.merge(self.scores[["trait", "base", "tuned", "change"]].add_prefix("score_"), left_on="trait",
                          right_on="score_trait", how="left").drop(columns="score_trait")  # fmt: skip


def run(
    config: DriftConfig,
    run_dir: RunDir | str | Path,
    *,
    base: ChatModel | None = None,
    tuned: ChatModel | None = None,
    judge: Judge | None = None,
) -> DriftResult:
    """Compare two models. What each of them gives is a step of the run, so a killed one goes on.

    Args:
        base, tuned, judge: to use instead of loading those that the config names.

    Raises:
        UserError: models of other shapes or tokenizers, no vectors or texts of a trait, vectors or a dictionary that do not fit.
    """
    with open_run(run_dir, "drift", config) as folder:
        before = ledger_of(judge)
        job = _read_base(config, folder, base or _load(config, BASE), judge)
        _let_go()
        attributed = job.models.read_tuned(tuned or _load(config, TUNED))
        profile = job.profile()
        blocks = profile["trait"].map(job.blocks)
        table = _ordered(profile[profile["block"] == blocks])
        folder.table("drift", table)
        folder.table("profile", profile)
        scores = job.scores() if job.models.judge is not None else None
        features = job.features(attributed) if job.models.sae is not None else None
        for name, frame in (("scores", scores), ("features", features)):
            if frame is not None:
                folder.table(name, frame)
        folder.result(
            {**_summary(job, table, scores, features), "costs": costs(job.models.judge, before) if job.models.judge else []}
        )
        return DriftResult(table, profile, scores, features, folder.path)


def plan(config: DriftConfig) -> Plan | str:
    """What a run would generate and judge; loads no model and asks nobody. UserError where options or vectors are wrong."""
    traits = open_traits(replace(config, traits=tuple(known_traits(config.traits, config.vectors))))
    for artifacts in traits:
        read_vectors(config.vectors, artifacts.name, config.statistic)
    if not config.answers:
        n = sum(task.sample == 0 for artifacts in traits for task in tasks_of(config, artifacts))
        return f"{n} prompts are read by both models; nothing is generated or judged"
    parts = [(artifacts, [*tasks_of(config, artifacts)] * 2) for artifacts in traits]
    found = plan_answers(config, parts)
    return (
        found if config.scores else f"{sum(found.answers.values())} answers of at most {found.longest} tokens; nothing is judged"
    )


def adapter_of(tuned: str) -> Path | None:
    """The adapter's folder, where TUNED is one or a run folder that holds one; None where it is a model."""
    for place in (Path(tuned), Path(tuned) / "adapter"):
        if (place / "adapter_config.json").is_file():
            return place
    return None


def _load(config: DriftConfig, which: str) -> ChatModel:
    """One of the two models."""
    from pvsae.models import load

    name, adapter = config.model, config.adapter
    if which == TUNED:
        folder = adapter_of(config.tuned)
        if folder is not None and config.adapter:
            raise UserError("an adapter upon an adapter", "a base without one, or a tuned model", "merge the base's adapter")
        name, adapter = (config.model, str(folder)) if folder is not None else (config.tuned, None)
    return load(name, adapter=adapter, dtype=config.dtype, device=config.device, chat=config.chat)


def _read_base(config: DriftConfig, folder: RunDir, model: ChatModel, judge: Judge | None) -> _Job:
    job = _Job.prepare(config, folder, model, judge)
    pin_inputs(folder, model, job.models.traits, job.vectors, job.digests)
    job.models.read(BASE, model)
    return job


def _let_go() -> None:
    """Gives the memory of a model back that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass(eq=False)
class _Job:
    """A comparison: what both models give, and what it is held against.

    Attributes:
        blocks: trait -> the block of the main table.
    """

    config: DriftConfig
    models: TwoModels
    vectors: dict[str, PersonaVectors]
    blocks: dict[str, int]

    @classmethod
    def prepare(cls, config: DriftConfig, folder: RunDir, base: ChatModel, judge: Judge | None) -> _Job:
        """Everything that can be wrong but the tuned model shows here, while the options may still be put right."""
        traits = open_traits(replace(config, traits=tuple(known_traits(config.traits, config.vectors))), base)
        vectors = {t.name: read_vectors(config.vectors, t.name, config.statistic).check_model(base) for t in traits}
        given = check_blocks([] if config.block is None else [config.block], base)
        blocks = {t.name: vectors[t.name].check_block(*(given or [chosen_block(t.name, base, config.layers)])) for t in traits}
        for name, block in blocks.items():
            if not float(vectors[name].of(config.statistic)[block].norm()):
                raise UserError(f"{config.statistic} of {name!r} is zero at block {block}", "a vector that points somewhere")
        wanted = config.answers and config.scores
        sae, sae_block = None, -1
        if config.sae:
            from pvsae.saes.evaluate import check_block
            from pvsae.saes.folders import load

            sae = load(config.sae, device=base.device).in_memory()
            sae_block = check_block(sae, base, config.sae_block)
            sae = sae.check_trained_on(base.name, config.other_model)
        shape = (base.n_blocks, base.d_model)
        judge = (judge or open_judge(config, base, folder)) if wanted else None
        return cls(config, TwoModels(config, folder, traits, judge, sae, sae_block, shape), vectors, blocks)

    @property
    def digests(self) -> dict[str, Any]:
        from pvsae.saes.fingerprint import fingerprint

        return {} if self.models.sae is None else {f"dictionary {self.models.sae.ref}": fingerprint(self.models.sae)}

    def profile(self) -> pd.DataFrame:
        """The shift along every trait at every block, by reading and prompts."""
        prompts = self.models.residuals("base/prompts")
        questions = [
            (a.name, task.question_index) for a in self.models.traits for task in tasks_of(self.config, a) if task.sample == 0
        ]
        answers = [(a.name, task.question_index) for a in self.models.traits for task in tasks_of(self.config, a)]
        # Of each reading: the move, what the base had there (its spread is a null of its own), and the questions.
        readings = {LAST_PROMPT: (self.models.residuals("tuned/prompts") - prompts, prompts, questions)}
        if self.config.answers:
            plain = self.models.residuals("base/reads_base")
            readings[OWN_ANSWER] = (self.models.residuals("tuned/reads_tuned") - plain, plain, answers)
            readings[SAME_ANSWER] = (self.models.residuals("tuned/reads_base") - plain, plain, answers)
        matrices = {name: found.of(self.config.statistic) for name, found in self.vectors.items()}
        parts = []
        for reading, (moved, base, units) in readings.items():
            whole = shift_table(moved, base, matrices, units, seed=self.config.seed)
            parts.append(whole.assign(reading=reading, prompts=ALL))
            for trait in matrices:
                mine = [i for i, (owner, _) in enumerate(units) if owner == trait]
                some = shift_table(moved[mine], base, matrices, [units[i] for i in mine], seed=self.config.seed)
                if len(some):
                    parts.append(some[some["trait"] == trait].assign(reading=reading, prompts=OWN))
        table = pd.concat(parts, ignore_index=True)
        return table[
            ["trait", "block", "reading", "prompts", *(c for c in table if c not in ("trait", "block", "reading", "prompts"))]
        ]

    def scores(self) -> pd.DataFrame:
        """Trait score and coherence before and after."""
        rows = []
        for artifacts in self.models.traits:
            name = artifacts.name
            before, after = (self.models.answers(which, artifacts).table for which in (BASE, TUNED))
            units, seed = before["question_index"].tolist(), self.config.seed
            row: dict[str, Any] = {"trait": name}
            for which, table in ((BASE, before), (TUNED, after)):
                found = mean_ci(table[name], units, seed=seed)
                row |= {which: found.value, f"{which}_low": found.low, f"{which}_high": found.high}
            change = mean_ci(after[name].to_numpy() - before[name].to_numpy(), units, seed=seed)
            row |= {"change": change.value, "change_low": change.low, "change_high": change.high}
            row |= {
                f"coherence_{which}": mean_ci(t["coherence"], n_boot=0).value for which, t in ((BASE, before), (TUNED, after))
            }
            row |= {"n": len(before), "n_failed_trait": int(before[name].isna().sum() + after[name].isna().sum())}
            rows.append({**row, "n_failed_coherence": int(before["coherence"].isna().sum() + after["coherence"].isna().sum())})
        return pd.DataFrame(rows)

    def features(self, attributed: pd.DataFrame | None) -> pd.DataFrame:
        """The first latents of each list, with what every list says of them and the trait whose vector is nearest."""
        from pvsae.saes.encodings import latent_diff

        assert self.models.sae is not None
        assert attributed is not None
        plain = self.models.side(BASE, BASE)
        lists = {
            "own": _common(latent_diff, self.models.side(TUNED, TUNED), plain),
            "same": latent_diff(self.models.side(TUNED, BASE), plain),
        }
        value = {"own": "difference", "same": "difference", "attribution": "attribution"}
        tables = {**lists, "attribution": attributed}
        chosen = list(dict.fromkeys(int(i) for table in tables.values() for i in table["latent"].head(self.config.top)))
        out = pd.DataFrame({"latent": chosen})
        for name, table in tables.items():
            ranked = table.assign(rank=np.arange(1, len(table) + 1)).set_index("latent")
            for column in (value[name], "q", "rank"):
                label = name if column == value[name] else f"{name}_{column}"
                out[label] = [ranked[column].get(i, np.nan) for i in chosen]
        matrix = torch.stack([self.vectors[t.name].of(self.config.statistic)[self.models.sae_block] for t in self.models.traits])
        cosines = self.models.sae.cosines(matrix)[:, chosen].cpu()
        nearest = cosines.abs().argmax(0)
        out["nearest_trait"] = [self.models.traits[int(i)].name for i in nearest]
        out["cosine"] = cosines[nearest, torch.arange(len(chosen))].numpy()
        for name, table in lists.items():
            means = table.set_index("latent")
            out[f"{name}_firing_before"], out[f"{name}_firing_after"] = (
                [means[f"firing_{side}"].get(i, 0.0) for i in chosen] for side in ("before", "after")
            )
        return out


def _common(diff: Any, after: Any, before: Any) -> pd.DataFrame:
    """The diff over the questions that both models answered with at least one token."""
    both = [g for g in after.groups if g in set(before.groups)]
    sides = [
        replace(side, activation=side.activation[[side.groups.index(g) for g in both]], groups=both) for side in (after, before)
    ]
    return diff(*sides)


def _ordered(table: pd.DataFrame) -> pd.DataFrame:
    """The last prompt token on own prompts first, the largest shift first; the others likewise."""
    order = {(r, p): i for i, (r, p) in enumerate((r, p) for p in (OWN, ALL) for r in (LAST_PROMPT, OWN_ANSWER, SAME_ANSWER))}
    keys = pd.DataFrame({"set": [order[key] for key in zip(table["reading"], table["prompts"], strict=True)]})
    keys["shift"] = -table["shift"].to_numpy()
    return table.iloc[keys.sort_values(["set", "shift"], kind="stable").index].reset_index(drop=True)


def _summary(job: _Job, table: pd.DataFrame, scores: pd.DataFrame | None, features: pd.DataFrame | None) -> dict[str, Any]:
    main = table[(table["reading"] == LAST_PROMPT) & (table["prompts"] == OWN)]
    headline: list[dict[str, Any]] = []
    for row in main.itertuples():
        value = f"{row.shift:+.2f} [{row.low:+.2f}, {row.high:+.2f}], {row.gaps:+.0%} of its vector"
        if scores is not None:
            one = scores[scores["trait"] == row.trait].iloc[0]
            value += f"; score {one['base']:.0f} to {one['tuned']:.0f}"
        headline.append({"label": str(row.trait), "value": value})
    whole = table[(table["reading"] == LAST_PROMPT) & (table["prompts"] == ALL)]
    notes = [
        f"All {len(job.models.traits)} traits together explain at most {whole['explained'].max():.0%} of the mean move's square.",
        "random_limit and natural_limit are what 95% of random directions stay below: isotropic ones, and ones that vary as the "
        "base's own residuals do at the same tokens. joint is the shift that is left to a trait when all are fitted together.",
    ]
    if features is not None:
        notes.append(
            "Features: own and same are mean activation over answer tokens, tuned minus base, on each model's own answers and on "
            "the base's; attribution is, to first order, by how many nats a token a latent pushes the tuned model towards its "
            "own answers more than towards the base's. Any finetuning moves some: compare with a benign one."
        )
    examples = []
    if job.config.answers:
        for artifacts in job.models.traits:
            for which in (BASE, TUNED):
                first = job.models.answers(which, artifacts).table.iloc[0]
                examples.append({"label": f"{which}: {first['question']}", "text": first["answer"]})
    lost = 0 if scores is None else int(scores["n_failed_trait"].sum())
    total = int(main["n"].sum())
    return {
        "title": "Drift",
        "about": (
            f"How {job.config.tuned} differs from {job.config.model}: the move of the residual at the last prompt token along "
            f"every known trait's vector, over {total} evaluation questions without a system prompt."
        ),
        "headline": headline,
        "notes": notes,
        "failures": [{"what": "answers without a trait score (left out of the mean)", "n": lost}],
        "examples": examples,
    }
