"""Stage `capability`: what a model still can while it is steered, or with an adapter: tasks of lm-evaluation-harness.

Knows: the conditions (none, a vector or features at several strengths, a direction taken out, a random direction of equal
length), the run folder, the table.
Does not know: tasks and their marks (capability_tasks.py, the harness), how a model answers them (models/harness.py), which
options go together (capability_options.py), what an earlier run was asked (capability_earlier.py).

Every condition answers the same questions with the same examples, so that what changed is compared question by question.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from pvsae.errors import UserError
from pvsae.runs import RunDir
from pvsae.saes.fingerprint import fingerprint
from pvsae.stages.capability_earlier import NONE, against, remember
from pvsae.stages.capability_options import check
from pvsae.stages.capability_tasks import Evaluated, Tasks, change, own_shots
from pvsae.stages.counts import count, is_kept, kept
from pvsae.stages.handles import FEATURE_UNITS, Feature, open_features, parse
from pvsae.stages.inputs import (
    Setup,
    check_blocks,
    chosen_block,
    folder_of,
    known_traits,
    open_model,
    open_run,
    open_traits,
    open_vectors,
    pin_inputs,
    read_vectors,
)
from pvsae.stages.steer import ALL_BLOCKS, additions, random_like, turned_at_random
from pvsae.stages.strength import UNITS, calibrate, gap_in_raw, mean_kl
from pvsae.stages.sweep import tasks_under
from pvsae.vectors.persona import DEFAULT_STATISTIC, PersonaVectors

if TYPE_CHECKING:
    from pvsae.models import ChatModel, Intervention
    from pvsae.models.chat import Rendered
    from pvsae.saes.activity import LatentActivity
    from pvsae.saes.dictionary import SAE

DEFAULT_TASK = "mmlu"
HEAD = ["condition", "trait", "feature", "block", "coef", "unit", "raw", "positions"]


@dataclass(frozen=True, kw_only=True)
class CapabilityConfig(Setup):
    """What to ask, and under what.

    Attributes:
        tasks: names of lm-evaluation-harness, or its YAML files; empty takes the task that the model's folder names, else MMLU.
        shots: examples in a prompt; None takes each task's own number. A task whose file says 0 has none whatever is said here.
        limit: questions a task; None for all.
        template: whether prompts go through the model's chat template (never where the model has none).
        system: a system message for every question.
        vectors: run folder of `pvsae extract`, or a vector file: then each trait's vector is added at each strength. Without
            `traits`, all that are there.
        ablate: take the direction of the vectors out of the residual as well.
        against: run folder of an earlier `pvsae capability` that was asked the same questions in the same way (of the model
            without the adapter, say): changes are counted from its untouched model instead of this one's.
        other_model: let `against` and the dictionaries be of another model all the same.
        features: SAE:INDEX, as in `pvsae steer`; instead of `vectors`.
        mode: "add", "clamp" or "ablate", of features.
        activity, activity_tokens: where highest activations of features come from, as in `pvsae steer`.
        layers: run folder of `pvsae layers`, whose choice of block is used; instead of `blocks`.
        blocks: blocks to steer at, one at a time.
        multi_layer: steer all blocks at once with the incremental vectors (and take out each block's own direction).
        coefs: strengths, in `unit`.
        unit: of vectors "raw", "gap" or "kl", of features "max" or "raw"; None takes the first.
        positions: "response", "prompt" or "all".
        statistic: which vector of the file.
        n_random: random directions of the vector's length at each strength (of features: none).
        kl_rows: unsteered answers on which a "kl" strength is calibrated.

    An option that is given where it would do nothing is an error; a library may always be there.
    """

    tasks: tuple[str, ...] = ()
    shots: int | None = None
    limit: int | None = None
    template: bool = True
    system: str | None = None
    vectors: str | None = None
    ablate: bool = False
    against: str | None = None
    other_model: bool = False
    features: tuple[str, ...] = ()
    mode: str = "add"
    activity: tuple[str, ...] = ()
    activity_tokens: int = 20_000
    layers: str | None = None
    blocks: tuple[int, ...] = ()
    multi_layer: bool = False
    coefs: tuple[float, ...] = (1.0, 2.0)
    unit: str | None = None
    positions: str = "all"
    statistic: str = DEFAULT_STATISTIC
    n_random: int = 1
    kl_rows: int = 16

    def identity(self) -> dict[str, Any]:
        """As of every stage; what is allowed changes no number."""
        return {name: value for name, value in super().identity().items() if name != "other_model"}

    @property
    def unit_of(self) -> str:
        """The unit of the strengths."""
        return self.unit or (FEATURE_UNITS if self.features else UNITS)[0]


@dataclass(frozen=True)
class CapabilityResult:
    """`table`: a row a condition, task and metric: condition ("none", "vector", "random k", "ablate", "feature"), trait, feature,
    block, coef, unit, raw (coefficient of the vector, or activation units), positions, task, metric, filter, value, stderr, n
    (questions), shots, higher_is_better, change with its 95% interval (value minus that of "none", or of `against`, on the same
    questions), and
    asked (False of the parts of a group that was asked for). `notes`: what a reader should know."""

    table: pd.DataFrame
    path: Path
    notes: tuple[str, ...] = ()

    @property
    def shown(self) -> pd.DataFrame:
        """The columns that tell most, for a terminal."""
        columns = [*HEAD[:5], "task", "metric", "value", "stderr", "change", "change_low", "change_high", "n"]
        return self.table[[c for c in columns if c not in HEAD or set(self.table[c].astype(str)) != {"-"}]]


@dataclass(frozen=True, eq=False)
class _Condition:
    """One way to treat the model: the columns of HEAD but the positions, and what is done."""

    name: str
    trait: str = "-"
    feature: str = "-"
    block: int | str = "-"
    coef: float = 0.0
    raw: float = 0.0
    edits: tuple[Intervention, ...] = ()

    @property
    def slug(self) -> str:
        parts = [self.name.replace(" ", "-")]
        parts += [self.trait] if self.trait != "-" else []
        parts += [self.feature.replace(":", "-")] if self.feature != "-" else []
        return "_".join([*parts, f"block-{self.block}", f"coef{self.coef:+g}"] if self.edits else parts)


def run(config: CapabilityConfig, run_dir: RunDir | str | Path, *, model: ChatModel | None = None) -> CapabilityResult:
    """Run the tasks under every condition; a condition is a step, so a killed run goes on behind the last finished one.

    Raises:
        UserError: the harness is missing, no such task, bad options, vectors or features that do not fit the model, an earlier
            run that was asked otherwise; all before anything is asked. A task whose data cannot be fetched, when it is reached.
    """
    check(config)
    tasks = Tasks(task_names(config, model))
    earlier, asked = against(config, tasks, model)
    with open_run(run_dir, "capability", config) as folder:
        model = model or open_model(config)
        vectors = _vectors(config, model)
        features = _features(config, model)
        counts = _counts(config, folder, model, features)
        dictionaries = {f"dictionary {f.sae.ref}": fingerprint(f.sae) for f in features}
        before = {} if earlier is None else {f"values in {config.against}": earlier.samples.to_csv(index=False)}
        pin_inputs(folder, model, (), vectors, {**dictionaries, **tasks.content, **before})
        remember(folder, asked)
        features = [_measured(folder, feature, counts) for feature in features]
        conditions = _conditions(config, folder, model, vectors, features)
        found = {c.slug: _evaluated(config, folder, model, tasks, c) for c in conditions}
        plain = found[NONE] if earlier is None else earlier
        parts = []
        for condition in conditions:
            rows = change(found[condition.slug], plain).drop(columns=["parts", "weighting"])
            rows["asked"] = rows["task"].isin(tasks.names)
            for i, (name, value) in enumerate(_head(config, condition).items()):
                rows.insert(i, name, value)
            parts.append(rows)
        table = pd.concat(parts, ignore_index=True)
        folder.table("capability", table)
        notes = own_shots(table, config.shots)
        folder.result(_summary(config, model, table, notes))
        return CapabilityResult(table, folder.path, tuple(notes))


@dataclass(frozen=True)
class CapabilityPlan:
    """What a run would ask.

    Attributes:
        questions: of each task.
        conditions: how many times.
    """

    questions: dict[str, int]
    conditions: int

    def __str__(self) -> str:
        lines = [f"{task}: {n} questions" for task, n in self.questions.items()]
        total = sum(self.questions.values())
        return "\n".join([*lines, f"{self.conditions} conditions, so {self.conditions * total} questions in all"])


def plan(config: CapabilityConfig) -> CapabilityPlan:
    """What a run would ask; loads no model, but reads the tasks' data. UserError where tasks, options or vectors are wrong."""
    check(config)
    tasks = Tasks(task_names(config, None))
    if config.against is not None:
        against(config, tasks, None)
    n = len(parse(config.features)) * (1 if config.mode == "ablate" else len(config.coefs)) if config.features else 0
    for vectors in _read(config).values():
        for block in config.blocks:
            vectors.check_block(block)
        n += (1 if config.multi_layer else len(set(config.blocks)) or 1) * (
            len(config.coefs) * (1 + config.n_random) + config.ablate
        )
    return CapabilityPlan(tasks.count(config.limit), 1 + n)


def task_names(config: CapabilityConfig, model: ChatModel | None) -> tuple[str, ...]:
    """The tasks to run: those of the config, else those that the model's folder names (paths from that folder), else MMLU."""
    if config.tasks:
        return config.tasks
    folder, defaults = folder_of(config, model)
    own = defaults.get("capability") or ()
    names = (own,) if isinstance(own, str) else tuple(own)
    return tuple(str(folder / name) if folder and name.endswith((".yaml", ".yml")) else name for name in names) or (DEFAULT_TASK,)


# --------------------------------------------------------------------------------------------------------------- what is given
def _features(config: CapabilityConfig, model: ChatModel) -> list[Feature]:
    block = config.blocks[0] if config.blocks else None
    return open_features(config.features, model, block, other_model=config.other_model) if config.features else []


def _read(config: CapabilityConfig) -> dict[str, PersonaVectors]:
    """Vectors by trait: of the traits of the config, else of all that are there. UserError as `read_vectors`."""
    if not config.vectors:
        return {}
    names = known_traits(config.traits, config.vectors)
    return {name: read_vectors(config.vectors, name, config.statistic) for name in names}


def _vectors(config: CapabilityConfig, model: ChatModel) -> dict[str, PersonaVectors]:
    """The same, each of which fits the model and points somewhere at every block that it is used at."""
    assert config.vectors or not config.ablate
    out = {}
    for name in _read(config):
        found = open_vectors(str(config.vectors), name, model, config.statistic)
        for block in _blocks(config, name, model):
            edits = additions(_matrix(config, found), block, 1.0, config.positions, name)
            if not any(edit.direction.norm for edit in edits):
                raise UserError(
                    f"{config.statistic} of {name!r} is zero or missing at block {block}", "a vector that points somewhere"
                )
            if config.unit_of == "gap" and isinstance(block, int):
                gap_in_raw(found, block, config.statistic)
        out[name] = found
    return out


def _blocks(config: CapabilityConfig, trait: str, model: ChatModel) -> tuple[int | str, ...]:
    if config.multi_layer:
        return (ALL_BLOCKS,)
    return check_blocks(config.blocks, model) or (chosen_block(trait, model, config.layers),)


def _matrix(config: CapabilityConfig, vectors: PersonaVectors) -> Any:
    """The vector of every block [n_blocks, d_model]; for the multi-layer form only up to the first block that has none."""
    matrix = vectors.of(config.statistic)
    return matrix[: min(vectors.missing_blocks)] if config.multi_layer and vectors.missing_blocks else matrix


def _counts(config: CapabilityConfig, folder: RunDir, model: ChatModel, features: Sequence[Feature]) -> dict[str, LatentActivity]:
    """Counts by dictionary (its ref), where strengths are multiples of highest activations: what the run remembers, or anew."""
    if config.unit_of != "max" or config.mode == "ablate":
        return {}
    out: dict[str, LatentActivity] = {}
    for sae, block in {f.sae.ref: (f.sae, f.block) for f in features}.values():

        def compute(sae: SAE = sae, block: int = block) -> LatentActivity:
            found = count(sae, model, block, config.activity, config.activity_tokens, "highest activations")
            if found is None:
                raise UserError(
                    f"nothing says how active {sae.ref} gets",
                    "counts of a `pvsae sae eval` run, or a dictionary that knows its text",
                    "--activity RUN, or --unit raw",
                )
            return found

        out[sae.ref] = kept(folder, sae, compute) if is_kept(folder, sae) else compute()
    return out


def _measured(folder: RunDir, feature: Feature, counts: dict[str, LatentActivity]) -> Feature:
    """The feature with its highest activation, which from now on the run remembers. UserError where it is never active."""
    if feature.sae.ref not in counts:
        return feature
    found = kept(folder, feature.sae, lambda: counts[feature.sae.ref])
    return replace(feature, sae=found.sae, maximum=found.maximum(feature.index), density=float(found.density[feature.index]))


# ----------------------------------------------------------------------------------------------------------------- conditions
def _conditions(
    config: CapabilityConfig,
    folder: RunDir,
    model: ChatModel,
    vectors: dict[str, PersonaVectors],
    features: Sequence[Feature],
) -> list[_Condition]:
    """Everything that is measured, the untouched model first."""
    out = [_Condition(NONE)]
    for trait, found in vectors.items():
        for block in _blocks(config, trait, model):
            out += _of_vector(config, folder, model, trait, found, block)
    for feature in features:
        for coef in (0.0,) if config.mode == "ablate" else config.coefs:
            raw = feature.raw(coef, config.unit_of)
            edits = feature.edits(config.mode, raw, config.positions)
            name = "feature" if config.mode == "add" else f"feature {config.mode}"
            out.append(_Condition(name, "-", feature.name, feature.block, coef, raw, edits))
    return out


def _of_vector(
    config: CapabilityConfig, folder: RunDir, model: ChatModel, trait: str, vectors: PersonaVectors, block: int | str
) -> list[_Condition]:
    from pvsae.models import Ablate, Direction

    matrix = _matrix(config, vectors)
    raws = [_raw(config, folder, model, trait, vectors, block, coef) for coef in config.coefs]
    draw = turned_at_random if config.multi_layer else random_like
    directions = {"vector": matrix}
    for k in range(config.n_random):
        directions[f"random {k}"] = draw(matrix, seed=zlib.crc32(f"{config.seed}/{trait}/{k}".encode()))
    out = [
        _Condition(name, trait, "-", block, coef, raw, additions(some, block, raw, config.positions, f"{name} of {trait}"))
        for name, some in directions.items()
        for coef, raw in zip(config.coefs, raws, strict=True)
    ]
    if config.ablate:
        where = range(len(matrix)) if block == ALL_BLOCKS else (int(block),)
        edits = tuple(Ablate(Direction(matrix[b], f"{trait}/block{b}"), b, config.positions) for b in where if matrix[b].norm())
        out.append(_Condition("ablate", trait, "-", block, 0.0, 0.0, edits))
    return out


def _raw(
    config: CapabilityConfig,
    folder: RunDir,
    model: ChatModel,
    trait: str,
    vectors: PersonaVectors,
    block: int | str,
    coef: float,
) -> float:
    """The raw coefficient that a strength comes to."""
    if config.unit_of == "raw" or (config.unit_of == "gap" and block == ALL_BLOCKS):
        return coef
    if config.unit_of == "gap":
        return coef * gap_in_raw(vectors, int(block), config.statistic)
    matrix = _matrix(config, vectors)

    def compute() -> float:
        rows = _unsteered(config, model, trait)
        return calibrate(lambda c: mean_kl(model, rows, additions(matrix, block, c, config.positions, "kl")), coef)

    return float(folder.do_json(f"calibration/{trait}_block-{block}_{coef:+g}", compute))


def _unsteered(config: CapabilityConfig, model: ChatModel, trait: str) -> list[Rendered]:
    """The model's own answers to the first evaluation questions of a trait, as `pvsae steer` calibrates on."""
    from pvsae.vectors.extraction import render_rows
    from pvsae.vectors.rollouts import generate_tasks

    (artifacts,) = open_traits(replace(config, traits=(trait,)), model)
    tasks = tasks_under(artifacts, NONE, 1, config.kl_rows)
    rollouts = generate_tasks(
        model, tasks, {"trait": trait, "condition": "unsteered"}, sampling=config.sampling(model), batch_size=config.batch_size
    )
    return render_rows(model, rollouts, [i for i, text in enumerate(rollouts.table["answer"]) if text])


def _evaluated(config: CapabilityConfig, folder: RunDir, model: ChatModel, tasks: Tasks, condition: _Condition) -> Evaluated:
    from pvsae.models.harness import HarnessModel

    def compute() -> Evaluated:
        lm = HarnessModel(model, condition.edits, batch_size=config.batch_size, seed=config.seed, progress=condition.slug)
        return tasks.evaluate(
            lm,
            shots=config.shots,
            limit=config.limit,
            template=config.template and model.chat.mode != "plain",
            system=config.system,
            seed=config.seed,
        )

    return folder.do(f"conditions/{condition.slug}", compute, lambda value, where: value.save(where), Evaluated.load)


# -------------------------------------------------------------------------------------------------------------------- results
def _head(config: CapabilityConfig, condition: _Condition) -> dict[str, Any]:
    values = (condition.name, condition.trait, condition.feature, str(condition.block), condition.coef)
    edited = bool(condition.edits)
    last = (config.unit_of if condition.coef else "-", condition.raw, config.positions if edited else "-")
    return dict(zip(HEAD, (*values, *last), strict=True))


def _summary(config: CapabilityConfig, model: ChatModel, table: pd.DataFrame, notes: Sequence[str]) -> dict[str, Any]:
    asked = table[table["asked"]]
    headline = []
    for (task, metric), part in asked.groupby(["task", "metric"], sort=False):
        plain = part[part["condition"] == NONE].iloc[0]
        others = part[part["condition"].isin(["vector", "ablate"]) | part["condition"].str.startswith("feature")]
        value = f"{plain['value']:.3g}"
        if others["change"].notna().any():
            worst = others.loc[(others["change"] * (1 if plain["higher_is_better"] else -1)).idxmin()]
            what = worst["trait"] if worst["feature"] == "-" else f"feature {worst['feature']}"
            value += f"; {worst['value']:.3g} at worst ({worst['condition']} {what}, strength {worst['coef']:g})"
        headline.append({"label": f"{task}, {metric}", "value": value})
    of = "" if config.against is None else f" in {config.against}"
    how = "the model's chat template" if config.template and model.chat.mode != "plain" else "bare text"
    return {
        "title": "Capability",
        "about": f"Tasks of lm-evaluation-harness, asked through {how}; every condition has the same questions and examples.",
        "headline": headline,
        "notes": [
            f"change: value minus that of the untouched model{of} on the same questions, with a 95% interval over questions.",
            *notes,
        ],
    }
