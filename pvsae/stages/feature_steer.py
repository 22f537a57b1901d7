"""Stage `feature_steer`: what single features of a dictionary do to a trait and its facets, by strength, with every control.

Knows: the sweep over features and strengths, its tables.
Does not know: what is done in each condition (feature_conditions.py) and what that does to the model (models/), how answers are
scored (judges/), what a facet is (facets.py).

Controls, always: no steering; the eliciting system prompt; for every feature random features that are active as often, random
directions, and the whole persona vector where it is given, all of them at the length that the feature itself adds. So what
differs is where they point. (A clamp adds that length wherever the feature is silent, which is nearly everywhere, and directions
have no activation to clamp: beside clamps they are added.) An ablated feature stands beside ablated features and directions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from pvsae.errors import UserError
from pvsae.runs import RunDir
from pvsae.saes.activity import LatentActivity
from pvsae.saes.evaluate import TokenRow, token_rows
from pvsae.saes.fingerprint import fingerprint
from pvsae.saes.output_score import PREFIX
from pvsae.stages.costs import costs, ledger_of
from pvsae.stages.counts import activity_of_text, count, is_kept, kept
from pvsae.stages.facets import COHERENT, facet_table, specificity
from pvsae.stages.feature_conditions import (
    FEATURE,
    Condition,
    conditions,
    controls_of,
)
from pvsae.stages.handles import FEATURE_UNITS, MODES, Feature, open_features, parse
from pvsae.stages.inputs import Setup, open_judge, open_model, open_run, open_traits, open_vectors, pin_inputs, read_vectors
from pvsae.stages.plan import Plan, plan_answers
from pvsae.stages.sweep import POSITIONS, QUESTIONS, UNDER, failures, judged_answers, score_columns, tasks_under
from pvsae.vectors.persona import DEFAULT_STATISTIC, PersonaVectors
from pvsae.vectors.rollouts import Rollouts, Task

if TYPE_CHECKING:
    from pvsae.judges.base import Judge
    from pvsae.models import ChatModel
    from pvsae.saes.dictionary import SAE
    from pvsae.traits import TraitArtifacts

KEYS = ["trait", "condition", "feature", "of", "coef"]


@dataclass(frozen=True, kw_only=True)
class FeatureSteerConfig(Setup):
    """What to sweep.

    Attributes:
        features: SAE:INDEX, SAE a folder (SAELens, dictionary_learning) or RELEASE/ID; SAE:3,7 and SAE:10-19 name several.
        mode: "add", "clamp" or "ablate".
        coefs: strengths, in `unit`; not used by "ablate".
        unit: "max" (multiples of the feature's highest activation) or "raw" (activation units of the dictionary).
        together: steer with all features at once as well.
        activity: run folders of `pvsae sae eval`, from which highest activations and densities are taken; where none is of the
            dictionary, they are counted here, on `activity_tokens` tokens of the text that its training held out, or else on
            unsteered answers.
        prefilter: steer only with so many of the features, those of the highest output scores on `prefix`.
        vectors: run folder of `pvsae extract`, or a vector file: then the whole persona vector is a control.
        statistic: which vector of it.
        blocks: the block, one at most, where a dictionary does not say which it is of.
        other_model: take dictionaries of another model of the same width all the same.
        positions: "response", "prompt" or "all".
        under: system prompt during steering: "none", or the trait's eliciting ("pos") or suppressing ("neg") instructions.
        n_random: random features, and random directions, a feature.
        not_random: SAE:INDEX of features that are not drawn as random ones, beside those that are steered with: candidates that
            were not chosen may well do what the chosen ones do.
        coherent: least coherence of a strength that counts in the table of specificity.
        questions: "eval", or "extract": those that vectors are made from. What is chosen on the one may be measured on the other.
        max_questions, n_samples: how many of them (None: all), answers to each.
    """

    features: tuple[str, ...]
    mode: str = "add"
    coefs: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.5)
    unit: str = "max"
    together: bool = False
    activity: tuple[str, ...] = ()
    activity_tokens: int = 20_000
    prefilter: int | None = None
    prefix: str = PREFIX
    vectors: str | None = None
    statistic: str = DEFAULT_STATISTIC
    blocks: tuple[int, ...] = ()
    other_model: bool = False
    positions: str = "all"
    under: str = "none"
    n_random: int = 2
    not_random: tuple[str, ...] = ()
    coherent: float = COHERENT
    questions: str = "eval"
    max_questions: int | None = None
    n_samples: int = 1

    def identity(self) -> dict[str, Any]:
        """As of every stage; whether another model is meant changes no number, nor does an empty list."""
        left_out = {"other_model", *([] if self.not_random else ["not_random"])}
        return {name: value for name, value in super().identity().items() if name not in left_out}


@dataclass(frozen=True)
class FeatureSteerResult:
    """What a sweep found.

    Attributes:
        table: a row a trait and condition: trait, condition, feature, of (the feature whose control it is), coef, block, mode,
            unit, raw (of a feature: activation units; of the persona vector: multiples of it), length (added to the residual),
            density, positions, under, trait_score and coherence with their intervals, n, n_failed_trait, n_failed_coherence.
        facets: a row a condition and facet: trait, condition, feature, of, coef, facet, score with its interval, n. Empty where
            the judge's evidence names no facets.
        specificity: see `facets.specificity`.
        output_scores: of all features that were given, where a prefilter was asked for; else None.
        activity: dictionary -> where maxima and densities come from.
        notes: what is to be said of the dictionaries.
    """

    table: pd.DataFrame
    facets: pd.DataFrame
    specificity: pd.DataFrame
    output_scores: pd.DataFrame | None
    activity: dict[str, str]
    path: Path
    notes: list[str]

    @property
    def shown(self) -> pd.DataFrame:
        """The columns of the table that tell most, for a terminal."""
        return self.table[[*KEYS, "length", "trait_score", "trait_low", "trait_high", "coherence", "n", "n_failed_trait"]]

    def dose_response(self, trait: str) -> pd.DataFrame:
        """One trait's table with a column a facet (its score), a row a condition and strength, in the order of the sweep."""
        table = self.table[self.table["trait"] == trait].drop(columns="trait")
        facets = self.facets[self.facets["trait"] == trait]
        wide = facets.pivot_table(index=KEYS[1:], columns="facet", values="score", sort=False, dropna=False)
        return table.merge(wide.reset_index(), on=KEYS[1:], how="left", validate="one_to_one").reset_index(drop=True)


def dose_response(
    trait: str, features: Sequence[str], run_dir: RunDir | str | Path, *, model: ChatModel | None = None, **options: Any
) -> pd.DataFrame:
    """The dose-response table of some candidate features on one trait; `options` are those of FeatureSteerConfig."""
    config = FeatureSteerConfig(traits=(trait,), features=tuple(features), **options)
    result = run(config, run_dir, model=model)
    return result.dose_response(result.table["trait"].iloc[0])


def run(
    config: FeatureSteerConfig, run_dir: RunDir | str | Path, *, model: ChatModel | None = None, judge: Judge | None = None
) -> FeatureSteerResult:
    """Steer every trait of the config with every feature and its controls; a condition is a step, so a killed run goes on.

    Raises:
        UserError: bad options, a dictionary that does not fit the model or block, an index out of range, vectors of another
            trait or shape; all before anything is generated. A feature that is active nowhere on the text that strengths are
            measured on, as soon as that is known.
    """
    _check(config)
    with open_run(run_dir, "feature_steer", config) as folder:
        model = model or open_model(config)
        traits = open_traits(config, model)
        block = config.blocks[0] if config.blocks else None
        features = open_features(config.features, model, block, other_model=config.other_model)
        vectors = {t.name: _vectors(config, t.name, model, features) for t in traits} if config.vectors else {}
        before = ledger_of(judge)
        judge = judge or open_judge(config, model, folder)
        sweep = _Sweep(config, folder, model, judge)
        activity = _activity(config, folder, model, features)
        for feature in features:  # what would end the run ends it while its options may still be put right
            if feature.sae.ref in activity:
                _measured(feature, activity[feature.sae.ref], config)
        if not config.prefilter and all(f.sae.ref in activity for f in features):
            controls_of(config, features, activity)
        _pin(folder, model, traits, vectors, features)
        for feature in features:
            found = activity.get(feature.sae.ref)
            if found is None or not is_kept(folder, feature.sae):

                def compute(feature: Feature = feature, found: LatentActivity | None = found) -> LatentActivity:
                    # A dictionary without text of its own is counted on what the model says by itself.
                    return found or sweep.counted_on_answers(feature, traits[0])

                activity[feature.sae.ref] = kept(folder, feature.sae, compute)
        scores = _output_scores(config, folder, model, features) if config.prefilter else None
        if scores is not None:
            chosen = set(scores.loc[scores["kept"], "feature"])
            features = [f for f in features if f.name in chosen]
        features = [_measured(f, activity[f.sae.ref], config) for f in features]
        controls = controls_of(config, features, activity)
        for artifacts in traits:
            for condition in conditions(config, features, controls, vectors.get(artifacts.name), artifacts.name):
                sweep.row(artifacts, condition)
        table = pd.DataFrame(sweep.rows)
        facets = facet_table(table[KEYS], sweep.answers, config.seed)
        verdicts = specificity(table, facets, coherent=config.coherent)
        folder.table("feature_steering", table)
        folder.table("facets", facets)
        folder.table("specificity", verdicts)
        if scores is not None:
            folder.table("output_scores", scores)
        sources = {f.sae.ref: f"{activity[f.sae.ref].source}, {activity[f.sae.ref].tokens} tokens" for f in features}
        said = list(dict.fromkeys(f"Of the dictionary: {note}" for f in features for note in f.sae.info.notes))
        folder.result({**_summary(config, table, verdicts, sources, judge, sweep, said), "costs": costs(judge, before)})
        return FeatureSteerResult(table, facets, verdicts, scores, sources, folder.path, said)


def plan(config: FeatureSteerConfig) -> Plan:
    """What a run would generate and judge; loads no model and asks nobody. UserError where options or vectors are wrong."""
    _check(config)
    n = len(parse(config.features))
    n = min(n, config.prefilter or n)
    strengths = 1 if config.mode == "ablate" else len(config.coefs)
    each = strengths * (1 + 2 * config.n_random + (config.vectors is not None))
    steered = n * each + (strengths if config.together and n > 1 else 0)
    parts = []
    for artifacts in open_traits(config):
        if config.vectors:
            read_vectors(config.vectors, artifacts.name, config.statistic)
        conditions = [config.under, *([] if config.under == "pos" else ["pos"]), *[config.under] * steered]
        tasks = [t for system in conditions for t in _tasks(config, artifacts, system)]
        parts.append((artifacts, tasks))
    return plan_answers(config, parts)


def _tasks(config: FeatureSteerConfig, artifacts: TraitArtifacts, system: str) -> list[Task]:
    return tasks_under(artifacts, system, config.n_samples, config.max_questions, config.questions)


# --------------------------------------------------------------------------------------------------------------- what is given
def _check(config: FeatureSteerConfig) -> None:
    kinds = {"mode": MODES, "unit": FEATURE_UNITS, "under": UNDER, "positions": POSITIONS, "questions": QUESTIONS}
    for name, allowed in kinds.items():
        if getattr(config, name) not in allowed:
            raise UserError(f"{name} {getattr(config, name)!r} of features", f"one of {', '.join(allowed)}")
    if not config.coefs or not all(math.isfinite(coef) for coef in config.coefs):
        raise UserError(f"coefs are {list(config.coefs)}", "at least one strength, all of them finite")
    if len(set(config.coefs)) < len(config.coefs):
        raise UserError(f"coefs are {list(config.coefs)}", "each strength once")
    if len(config.blocks) > 1:
        raise UserError(f"blocks {list(config.blocks)} for features", "one block at most", "a dictionary is of one block")
    if config.n_random < 0 or config.activity_tokens < 1:
        raise UserError(f"n_random is {config.n_random}, activity_tokens is {config.activity_tokens}", "0 or more, 1 or more")
    if config.prefilter is not None and config.prefilter < 1:
        raise UserError(f"prefilter is {config.prefilter}", "how many features to keep, at least 1")
    if not parse(config.features):
        raise UserError("no feature is given", "--feature SAE:INDEX")
    strange = {name.source for name in parse(config.not_random)} - {name.source for name in parse(config.features)}
    if strange:
        raise UserError(f"no feature of {sorted(strange)[0]} is steered with", "--not-random of the dictionaries of --feature")


def _vectors(config: FeatureSteerConfig, trait: str, model: ChatModel, features: Sequence[Feature]) -> PersonaVectors:
    assert config.vectors is not None
    found = open_vectors(config.vectors, trait, model, config.statistic)
    for feature in features:
        if not found.direction(feature.block, config.statistic).norm > 0:
            raise UserError(f"{config.statistic} of {trait!r} is zero at block {feature.block}", "a vector that points somewhere")
    return found


def _pin(
    folder: RunDir,
    model: ChatModel,
    traits: Sequence[TraitArtifacts],
    vectors: dict[str, PersonaVectors],
    features: Sequence[Feature],
) -> None:
    pin_inputs(folder, model, traits, vectors, {f"dictionary {f.sae.ref}": fingerprint(f.sae) for f in features})


# --------------------------------------------------------------------------------------------------- what strengths mean
def _activity(
    config: FeatureSteerConfig, folder: RunDir, model: ChatModel, features: Sequence[Feature]
) -> dict[str, LatentActivity]:
    """Counts by dictionary (its ref): those that the run remembers, else of a given run, else on the dictionary's own text."""
    out: dict[str, LatentActivity] = {}
    for sae, block in {f.sae.ref: (f.sae, f.block) for f in features}.values():

        def compute(sae: SAE = sae, block: int = block) -> LatentActivity | None:
            return count(sae, model, block, config.activity, config.activity_tokens, "highest activations")

        def again(sae: SAE = sae) -> LatentActivity:
            found = compute()
            if found is None:
                raise UserError(f"the counts of {sae.ref} in {folder.path} are damaged", "a whole run folder", "delete it")
            return found

        found = kept(folder, sae, again) if is_kept(folder, sae) else compute()
        if found is not None:
            out[sae.ref] = found
    return out


def _measured(feature: Feature, found: LatentActivity, config: FeatureSteerConfig) -> Feature:
    """The feature with its highest activation and density. UserError where it has none and a strength or a control needs it."""
    needed = config.n_random > 0 or (config.unit == "max" and config.mode != "ablate")
    maximum = found.maximum(feature.index) if needed else float(found.max[feature.index])
    return replace(feature, sae=found.sae, maximum=maximum, density=float(found.density[feature.index]))


def _output_scores(config: FeatureSteerConfig, folder: RunDir, model: ChatModel, features: Sequence[Feature]) -> pd.DataFrame:
    """Output scores of all features, the highest first; `kept` marks those that pass the prefilter."""
    from pvsae.saes.output_score import output_scores

    def compute() -> pd.DataFrame:
        parts = []
        for sae in {f.sae.ref: f.sae for f in features}.values():
            some = {f.index: f for f in features if f.sae.ref == sae.ref}
            block = next(iter(some.values())).block
            part = output_scores(sae, model, list(some), prefix=config.prefix, block=block, progress="output scores")
            part.insert(0, "feature", [some[i].name for i in part["latent"]])
            parts.append(part)
        table = pd.concat(parts).sort_values("output_score", ascending=False, kind="stable", ignore_index=True)
        return table.assign(kept=[i < (config.prefilter or 0) for i in range(len(table))])

    return folder.do_table("output_scores", compute)


class _Sweep:
    """Generates, judges and remembers each condition as a step of the run, and gathers rows and answers."""

    def __init__(self, config: FeatureSteerConfig, folder: RunDir, model: ChatModel, judge: Judge) -> None:
        self.config, self.folder, self.model, self.judge = config, folder, model, judge
        self.rows: list[dict[str, Any]] = []
        self.answers: list[Rollouts] = []
        self.prompts: list[dict[str, str]] = []
        self.examples: list[dict[str, str]] = []

    def judged(self, artifacts: TraitArtifacts, condition: Condition) -> Rollouts:
        config = self.config
        tasks = _tasks(config, artifacts, condition.system)
        return judged_answers(
            config, self.folder, self.model, self.judge, artifacts, step=f"{artifacts.name}/{condition.slug}",
            condition=condition.name, tasks=tasks, edits=condition.edits,
        )  # fmt: skip

    def counted_on_answers(self, feature: Feature, artifacts: TraitArtifacts) -> LatentActivity:
        """Counts on the unsteered answers to a trait's questions, prompts included."""
        table = self.judged(artifacts, Condition("unsteered", self.config.under)).table
        ids = [(*p, *a) for p, a in zip(table["prompt_ids"], table["answer_ids"], strict=True)]
        rows: list[TokenRow] = token_rows(self.model, ids)
        found = activity_of_text(
            feature.sae, self.model, feature.block, self.config.activity_tokens, rows=rows,
            source=f"unsteered answers to the questions of {artifacts.name}",
        )  # fmt: skip
        assert found is not None
        return found

    def row(self, artifacts: TraitArtifacts, condition: Condition) -> None:
        rollouts = self.judged(artifacts, condition)
        config, trait = self.config, artifacts.name
        steered = bool(condition.edits)
        self.rows.append(
            {
                "trait": trait, "condition": condition.name, "feature": condition.feature, "of": condition.of,
                "coef": condition.coef, "block": condition.block, "mode": config.mode if steered else "-", "unit": config.unit,
                "raw": condition.raw, "length": condition.length, "density": condition.density,
                "positions": config.positions if steered else "-", "under": condition.system,
                **score_columns(trait, rollouts, config.seed),
            }
        )  # fmt: skip
        self.answers.append(rollouts)
        first = rollouts.table.iloc[0]
        self.examples.append({"label": f"{trait}, {condition.slug}: {first['question']}", "text": first["answer"]})
        if not steered:
            self.prompts.append({"label": f"{trait}, {condition.name}", "text": first["prompt"]})


def _summary(
    config: FeatureSteerConfig,
    table: pd.DataFrame,
    verdicts: pd.DataFrame,
    sources: dict[str, str],
    judge: Judge,
    sweep: _Sweep,
    said: Sequence[str],
) -> dict[str, Any]:
    unit = "multiples of the highest activation" if config.unit == "max" else "activation units"
    headline: list[dict[str, Any]] = [{"label": "judge", "value": judge.name}]
    for (trait, feature), part in table[table["condition"] == FEATURE].groupby(["trait", "feature"], sort=False):
        plain = table.loc[(table["trait"] == trait) & (table["condition"] == "unsteered"), "trait_score"].iloc[0]
        found = verdicts[(verdicts["trait"] == trait) & (verdicts["feature"] == feature) & (verdicts["condition"] == FEATURE)]
        value = f"{plain:.0f} to {part['trait_score'].max():.0f}"
        if len(found) and found["facet"].notna().iloc[0]:
            one = found.iloc[0]
            value += (
                f"; {one['facet']} {one['unsteered']:.0f} to {one['score']:.0f} at {one['coef']:g}, the other facets at most "
                f"{one['runner_up']:.0f} (coherence {one['coherence']:.0f})"
            )
        headline.append({"label": f"{trait}, feature {feature}", "value": value})
    verb = {"add": "was added to", "clamp": "was clamped in", "ablate": "was ablated from"}[config.mode]
    words = "the evaluation" if config.questions == "eval" else "extraction's"
    about = (
        f"One feature of a dictionary at a time {verb} the residual stream while the model answered {words} questions. "
        "Controls have the length that the feature adds; random features are active as often as it is."
    )
    if config.mode != "ablate":
        about += f" Strengths are in {unit}."
    notes = [f"Highest activations and densities of {ref}: {source}." for ref, source in sources.items()]
    notes += said
    if not len(verdicts):
        notes.append("The judge's evidence names no facets, so there is no table of them.")
    if config.vectors is None:
        notes.append("No persona vector was given, so there is no control with the whole vector.")
    return {
        "title": "Steering with single features",
        "about": about,
        "headline": headline,
        "notes": notes,
        "activity": sources,
        "failures": failures(table),
        "prompts": sweep.prompts,
        "examples": sweep.examples,
    }
