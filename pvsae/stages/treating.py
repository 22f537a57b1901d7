"""From options to a treatment: which directions, at which blocks, how strong; and the prompts of the prompting baselines.

Knows: vectors, features and traits by name, named units of strength, what an option does not go with.
Does not know: how anything is trained (finetuning/), run folders' tables.

Treatments:
- "none".
- "steer": the vectors (or features) are added while the model is trained: preventative steering.
- "ablate": nothing along them passes their block: CAFT. Several span a space, all of which is taken out.
- "regularise": moving along them costs loss.
- "inoculate": the training rows stand under a system prompt that asks for the trait; "discourage": under one that asks for the
  opposite. The instructions of the trait's own pairs are used in turn, or one text that is given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pvsae.errors import UserError
from pvsae.finetuning.treatments import Schedule, ShiftPenalty, Treatment, ablations
from pvsae.stages.inputs import Setup, check_blocks, chosen_block, open_traits, open_vectors, trait_names
from pvsae.stages.strength import UNITS, calibrate, gap_in_raw, mean_kl
from pvsae.stages.sweep import POSITIONS
from pvsae.vectors.persona import DEFAULT_STATISTIC, PersonaVectors

if TYPE_CHECKING:
    from pvsae.models import Add, AddFeature, ChatModel, Direction
    from pvsae.models.chat import Rendered
    from pvsae.runs import RunDir
    from pvsae.stages.handles import Feature

NONE, STEER, ABLATE, REGULARISE, INOCULATE, DISCOURAGE = TREATMENTS = (
    "none", "steer", "ablate", "regularise", "inoculate", "discourage",
)  # fmt: skip
OF_DIRECTIONS, OF_PROMPTS = (STEER, ABLATE, REGULARISE), (INOCULATE, DISCOURAGE)


@dataclass(frozen=True, kw_only=True)
class Treating(Setup):
    """What is done to the model while it is trained.

    Attributes:
        treatment: one of TREATMENTS; see the head of this module.
        vectors: run folder of `pvsae extract`, or a vector file, for the traits in `traits`.
        statistic: which vector of it.
        features: SAE:INDEX in place of vectors.
        blocks: where; one block for "steer". Empty takes what `layers` chose, else the model's own block; of features theirs.
        layers: run folder of `pvsae layers`.
        multi_layer: every block: with "steer" the incremental vectors, whose effects sum to one vector.
        coef: strength of "steer", in `unit`.
        unit: of vectors "raw", "gap" or "kl" (see strength.py; measured on the first `kl_rows` rows of the data), of features
            "raw" (activation units) or "max" (multiples of the highest activation). None is raw, of features max.
        positions: tokens that are steered or ablated: "all", "prompt" or "response".
        schedule, schedule_share: "constant", "ramp", "warmup" or "decay"; see `finetuning.treatments.Schedule`.
        weight: of "regularise", in nats per squared residual unit; see `finetuning.treatments.ShiftPenalty`.
        prompt: system prompt of "inoculate" and "discourage", in place of those that the traits' instructions make.
        activity, activity_tokens: where a feature's highest activation comes from, as for `pvsae steer`.
        kl_rows: rows on which a "kl" strength is measured.
    """

    treatment: str = NONE
    vectors: str | None = None
    statistic: str = DEFAULT_STATISTIC
    features: tuple[str, ...] = ()
    blocks: tuple[int, ...] = ()
    layers: str | None = None
    multi_layer: bool = False
    coef: float = 2.0
    unit: str | None = None
    positions: str = "all"
    schedule: str = "constant"
    schedule_share: float = 0.5
    weight: float = 1.0
    prompt: str | None = None
    activity: tuple[str, ...] = ()
    activity_tokens: int = 20_000
    kl_rows: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.treatment not in TREATMENTS:
            raise UserError(f"unknown treatment {self.treatment!r}", "one of " + ", ".join(TREATMENTS))
        if self.positions not in POSITIONS:
            raise UserError(f"unknown positions {self.positions!r}", f"one of {', '.join(POSITIONS)}")
        given = bool(self.vectors) + bool(self.features)
        if self.treatment in OF_DIRECTIONS and given != 1:
            raise UserError(
                f"treatment {self.treatment!r} with {'both vectors and features' if given else 'neither vectors nor features'}",
                "one of the two",
                "--vectors RUN --traits TRAIT, or --feature SAE:INDEX",
            )
        if self.treatment not in OF_DIRECTIONS and given:
            raise UserError(f"vectors or features with treatment {self.treatment!r}", f"treatment {', '.join(OF_DIRECTIONS)}")
        if (self.vectors or (self.treatment in OF_PROMPTS and not self.prompt)) and not self.traits:
            raise UserError(f"treatment {self.treatment!r} of no trait", "at least one", "--traits TRAIT")
        if self.prompt is not None and (self.treatment not in OF_PROMPTS or not self.prompt.strip()):
            raise UserError(f"a prompt with treatment {self.treatment!r}", "a text, for inoculate or discourage")
        if self.multi_layer and (self.blocks or self.layers or self.features):
            raise UserError("multi_layer with blocks, layers or features", "vectors alone: it takes every block")
        if self.treatment == STEER and len(self.blocks) > 1:
            raise UserError(
                f"steering at blocks {list(self.blocks)} would count what their vectors share several times",
                "one block",
                "--multi-layer steers at every block with what each adds",
            )
        units = ("max", "raw") if self.features else UNITS
        if self.unit is not None and self.unit not in units:
            raise UserError(f"unit {self.unit!r} of {'features' if self.features else 'vectors'}", f"one of {', '.join(units)}")
        for name in ("coef", "weight"):
            if not math.isfinite(getattr(self, name)):
                raise UserError(f"{name} is {getattr(self, name)}", "a finite number")
        for name in ("kl_rows", "activity_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}", "at least 1")
        schedule = Schedule(self.schedule, self.schedule_share)
        if schedule.kind != "constant" and self.treatment != STEER:
            raise UserError(f"schedule {schedule.kind!r} with treatment {self.treatment!r}", "a schedule with treatment 'steer'")

    @property
    def unit_used(self) -> str:
        """The unit of `coef`."""
        return self.unit or ("max" if self.features else "raw")


@dataclass(frozen=True)
class Treated:
    """A treatment with what it was made of.

    Attributes:
        treatment: for the trainer.
        raw: raw coefficient that the strength came to (activation units of a feature); NaN where there is no strength.
        where: the blocks, for people.
        inputs: what has to be the same when the run goes on: name -> hash.
        vectors: trait -> its vectors.
    """

    treatment: Treatment
    raw: float
    where: str
    inputs: dict[str, str]
    vectors: dict[str, PersonaVectors]


def treated(config: Treating, model: ChatModel, folder: RunDir, rows: Sequence[Rendered]) -> Treated:
    """The treatment that a config names. A measured strength is a step of the run.

    Args:
        rows: rendered training rows, on which a "kl" strength is measured.

    Raises:
        UserError: vectors of another trait or shape, a block that does not exist, no such feature, a direction that is zero, a
            strength that cannot be reached.
    """
    if config.treatment not in OF_DIRECTIONS:
        return Treated(Treatment(), math.nan, "-", {}, {})
    if config.features:
        return _of_features(config, model, folder)
    vectors = {name: open_vectors(config.vectors or "", name, model, config.statistic) for name in trait_names(config, model)}
    where = {trait: _blocks(config, trait, model, found) for trait, found in vectors.items()}
    at = "every block" if config.multi_layer else ", ".join(str(b) for b in sorted({b for some in where.values() for b in some}))
    if config.treatment != STEER:
        directions: dict[int, list[Direction]] = {}
        for trait, found in vectors.items():
            for block in where[trait]:
                directions.setdefault(block, []).append(_direction(found, block, config.statistic))
        return Treated(_of_directions(config, directions), math.nan, at, {}, vectors)
    edits: list[Add] = []
    raws = []
    for trait, found in vectors.items():
        raw = _raw(config, model, folder, found, where[trait], rows)
        edits += _additions(config, found, where[trait], raw)
        raws.append(raw)
    schedule = Schedule(config.schedule, config.schedule_share)
    return Treated(Treatment(tuple(edits), schedule), raws[0] if len(raws) == 1 else math.nan, at, {}, vectors)


def _blocks(config: Treating, trait: str, model: ChatModel, vectors: PersonaVectors) -> tuple[int, ...]:
    if config.multi_layer:
        return tuple(range(min(vectors.missing_blocks, default=vectors.n_blocks)))
    blocks = check_blocks(config.blocks, model) or (chosen_block(trait, model, config.layers),)
    return tuple(vectors.check_block(block) for block in blocks)


def _direction(vectors: PersonaVectors, block: int, statistic: str) -> Direction:
    found = vectors.direction(block, statistic)
    if not found.norm:
        raise UserError(f"{statistic} of {vectors.trait!r} is zero at block {block}", "a vector that points somewhere")
    return found


def _of_directions(config: Treating, directions: dict[int, list[Direction]]) -> Treatment:
    if config.treatment == ABLATE:
        return Treatment(ablations(directions, config.positions))
    return Treatment(penalty=ShiftPenalty(tuple((b, tuple(some)) for b, some in directions.items()), config.weight))


def _additions(config: Treating, vectors: PersonaVectors, blocks: Sequence[int], raw: float) -> tuple[Add, ...]:
    from pvsae.models import Add

    if config.multi_layer:
        return vectors.incremental(raw, config.positions, config.statistic)
    return tuple(Add(_direction(vectors, block, config.statistic), block, raw, config.positions) for block in blocks)


def _raw(
    config: Treating, model: ChatModel, folder: RunDir, vectors: PersonaVectors, blocks: Sequence[int], rows: Sequence[Rendered]
) -> float:
    """The raw coefficient of the strength."""
    if config.unit_used == "raw" or config.coef == 0:
        return config.coef
    if config.unit_used == "gap":
        if config.multi_layer and config.statistic != DEFAULT_STATISTIC:
            raise UserError("the unit 'gap' differs from block to block here", "--unit raw or kl with multi_layer")
        return config.coef if config.multi_layer else config.coef * gap_in_raw(vectors, blocks[0], config.statistic)

    def measured() -> float:
        some = rows[: config.kl_rows]
        return calibrate(lambda coef: mean_kl(model, some, _additions(config, vectors, blocks, coef)), config.coef)

    return float(folder.do_json(f"strength/{vectors.trait}", measured))


# ------------------------------------------------------------------------------------------------------------------- features
def _of_features(config: Treating, model: ChatModel, folder: RunDir) -> Treated:
    from pvsae.models import AddFeature, Direction
    from pvsae.saes.fingerprint import fingerprint
    from pvsae.stages.handles import open_features

    if len(config.blocks) > 1:
        raise UserError(f"blocks {list(config.blocks)} for features", "one block at most", "a dictionary is of one block")
    features = open_features(config.features, model, next(iter(check_blocks(config.blocks, model)), None))
    inputs = {f"dictionary {f.sae.ref}": fingerprint(f.sae) for f in features}
    at = ", ".join(str(b) for b in sorted({f.block for f in features}))
    if config.treatment == STEER:
        edits: list[AddFeature] = []
        for feature in features:
            raw = _activation(config, model, folder, feature)
            edits.append(AddFeature(feature.sae, feature.index, raw, feature.block, config.positions))
        one = edits[0].strength if len(edits) == 1 else math.nan
        return Treated(Treatment(tuple(edits), Schedule(config.schedule, config.schedule_share)), one, at, inputs, {})
    directions: dict[int, list[Any]] = {}
    for f in features:
        directions.setdefault(f.block, []).append(Direction(f.sae.W_dec[f.index].detach(), f"{f.sae.ref}:{f.index}"))
    return Treated(_of_directions(config, directions), math.nan, at, inputs, {})


def _activation(config: Treating, model: ChatModel, folder: RunDir, feature: Feature) -> float:
    """The strength in activation units."""
    if config.unit_used == "raw" or config.coef == 0:
        return config.coef

    def highest() -> float:
        from pvsae.stages.counts import count

        found = count(feature.sae, model, feature.block, config.activity, config.activity_tokens, "highest activations")
        if found is None:
            raise UserError(
                f"nothing says how strongly feature {feature.name} fires: its dictionary does not name its text",
                "counts of `pvsae sae eval`, or a strength in activation units",
                "--activity RUN, or --unit raw",
            )
        return found.maximum(feature.index)

    maximum = float(folder.do_json(f"strength/{feature.index}-of-{_short(feature)}", highest))
    return replace(feature, maximum=maximum).raw(config.coef, "max")


def _short(feature: Feature) -> str:
    from pvsae.saes.fingerprint import fingerprint

    return fingerprint(feature.sae)[:12]


# -------------------------------------------------------------------------------------------------------------------- prompts
def prompts_of(config: Treating, model: ChatModel) -> tuple[str, ...]:
    """System prompts of the prompting baselines, to be used in turn; none for other treatments."""
    from pvsae.traits import system_message

    if config.treatment not in OF_PROMPTS:
        return ()
    if config.prompt is not None:
        return (config.prompt,)
    towards = config.treatment == INOCULATE
    return tuple(
        system_message(trait.name, pair.pos) if towards else system_message("helpful", pair.neg)
        for trait in open_traits(config, model)
        for pair in trait.pairs
    )
