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
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

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
_WHICH = ("vectors", "features", "traits", "library", "statistic", "blocks", "layers", "multi_layer", "other_model")
TAKEN: dict[str, tuple[str, ...]] = {
    NONE: (),
    STEER: (*_WHICH, "coef", "unit", "positions", "schedule", "schedule_share", "activity"),
    ABLATE: (*_WHICH, "positions"),
    REGULARISE: (*_WHICH, "weight"),
    INOCULATE: ("traits", "library", "prompt"),
    DISCOURAGE: ("traits", "library", "prompt"),
}
"""Treatment -> the options that do something with it."""
_OF_VECTORS = ("traits", "library", "statistic", "layers", "multi_layer")  # of these nothing is asked where features stand in


@dataclass(frozen=True, kw_only=True)
class Treating(Setup):
    """What is done to the model while it is trained.

    Attributes:
        treatment: one of TREATMENTS; see the head of this module.
        vectors: run folder of `pvsae extract`, or a vector file, for the traits in `traits`.
        statistic: which vector of it.
        features: SAE:INDEX in place of vectors.
        blocks: where; one block for "steer". Empty takes what `layers` chose, else the model's own block; of features theirs.
        layers: run folder of `pvsae layers`; instead of `blocks`.
        multi_layer: every block: with "steer" the incremental vectors, whose effects sum to one vector.
        coef: strength of "steer", in `unit`; None is 2.
        unit: of vectors "raw", "gap" or "kl" (see strength.py; measured on the first `kl_rows` rows of the data), of features
            "raw" (activation units) or "max" (multiples of the highest activation). None is raw, of features max.
        positions: tokens that are steered or ablated: "all" (as None), "prompt" or "response".
        schedule: of "steer": "constant" (as None), "ramp", "warmup" or "decay"; see `finetuning.treatments.Schedule`.
        schedule_share: share of the steps that "warmup" or "decay" take; None is a half.
        weight: of "regularise", in nats per squared residual unit, None is 1; see `finetuning.treatments.ShiftPenalty`.
        prompt: system prompt of "inoculate" and "discourage", in place of those that the traits' instructions make.
        activity, activity_tokens: where a feature's highest activation comes from, as for `pvsae steer`.
        kl_rows: rows on which a "kl" strength is measured.
        other_model: take dictionaries of another model of the same width all the same.

    An option that is given where it would do nothing (`TAKEN`) is an error; traits and a library may always be there.
    """

    treatment: str = NONE
    vectors: str | None = None
    statistic: str = DEFAULT_STATISTIC
    features: tuple[str, ...] = ()
    blocks: tuple[int, ...] = ()
    layers: str | None = None
    multi_layer: bool = False
    coef: float | None = None
    unit: str | None = None
    positions: str | None = None
    schedule: str | None = None
    schedule_share: float | None = None
    weight: float | None = None
    prompt: str | None = None
    activity: tuple[str, ...] = ()
    activity_tokens: int = 20_000
    kl_rows: int = 16
    other_model: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.treatment not in TREATMENTS:
            raise UserError(f"unknown treatment {self.treatment!r}", "one of " + ", ".join(TREATMENTS))
        if self.positions is not None and self.positions not in POSITIONS:
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
        if self.blocks and self.layers:
            raise UserError("both blocks and layers are given", "one of them: layers chooses a block")
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
            if not math.isfinite(getattr(self, name) or 0.0):
                raise UserError(f"{name} is {getattr(self, name)}", "a finite number")
        for name in ("kl_rows", "activity_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}", "at least 1")
        _ = self.over_time
        own = [name for name in OPTIONS if name not in ("traits", "library")]  # those may be there for a table
        check_taken(self, [name for name in own if getattr(self, name) != _defaults()[name]])

    def identity(self) -> dict[str, Any]:
        """As of every stage, with what stands for options that are not given; what is allowed changes no number."""
        found = super().identity() | {"coef": self.strength, "positions": self.where, "weight": self.price}
        found |= {"schedule": self.over_time.kind, "schedule_share": self.over_time.share}
        return {name: value for name, value in found.items() if name != "other_model"}

    @property
    def unit_used(self) -> str:
        """The unit of `coef`."""
        return self.unit or ("max" if self.features else "raw")

    @property
    def strength(self) -> float:
        """`coef`, or what stands for it."""
        return 2.0 if self.coef is None else self.coef

    @property
    def where(self) -> str:
        """`positions`, or what stands for them."""
        return self.positions or "all"

    @property
    def price(self) -> float:
        """`weight`, or what stands for it."""
        return 1.0 if self.weight is None else self.weight

    @property
    def over_time(self) -> Schedule:
        """The schedule of the strength."""
        return Schedule(self.schedule or "constant", 0.5 if self.schedule_share is None else self.schedule_share)


# `vectors`, `features` and `prompt` have checks of their own.
OPTIONS = tuple(dict.fromkeys(name for some in TAKEN.values() for name in some if name not in ("vectors", "features", "prompt")))


def _defaults() -> dict[str, Any]:
    return {field.name: field.default for field in fields(Treating)}


def check_taken(config: Treating, given: Sequence[str]) -> None:
    """UserError for options of treatments that were given, and would do nothing."""
    useless = set(_OF_VECTORS if config.features else ("activity", "other_model"))
    useless |= {"traits", "library"} if config.prompt is not None else set()
    taken = tuple(name for name in TAKEN[config.treatment] if name not in useless)
    wasted = [name for name in given if name not in taken and any(name in some for some in TAKEN.values())]
    if wasted:
        what = config.treatment if not config.features else f"{config.treatment} of features"
        raise UserError(
            f"{', '.join(wasted)} with treatment {what!r}, where nothing comes of it",
            f"of the treatments' options {', '.join(taken) or 'none'}",
            "leave it out, or take a treatment that has it",
        )
    if "schedule_share" in given and config.schedule not in ("warmup", "decay"):
        raise UserError(
            f"schedule_share with schedule {config.over_time.kind!r}, which has no share", "a share of warmup or decay",
            "--schedule warmup, or leave it out",
        )  # fmt: skip
    if "activity" in given and config.unit_used != "max":
        raise UserError(f"activity with unit {config.unit_used!r}, which needs none", "the unit max", "leave it out")


@dataclass(frozen=True)
class Outline:
    """What is known of a model before its weights are read; stands for it where a treatment is only checked."""

    name: str
    n_blocks: int
    d_model: int
    path: Path | None
    defaults: dict[str, Any]
    device: str = "cpu"


def check(config: Treating, outline: Outline) -> None:
    """Opens all that a treatment is made of, and holds it against a model's outline. What needs the model itself is not found: a
    strength that is measured.

    Raises: UserError as `treated` and `prompts_of`.
    """
    model = cast("ChatModel", outline)
    measured = config.treatment == STEER and config.unit_used in ("kl", "max")
    treated(replace(config, unit="raw", activity=()) if measured else config, model, None, ())
    if measured and config.features and config.strength:
        _open_activity(config, model)
    prompts_of(config, model)


def _open_activity(config: Treating, model: ChatModel) -> None:
    """Opens the runs of `activity` as far as `_activation` will: of each dictionary up to the first that counted it."""
    from pvsae.stages.counts import activity_of_run
    from pvsae.stages.handles import open_features

    block = next(iter(config.blocks), None)
    for feature in open_features(config.features, model, block, other_model=config.other_model):
        any(activity_of_run(run, feature.sae, model) is not None for run in config.activity)


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


def treated(config: Treating, model: ChatModel, folder: RunDir | None, rows: Sequence[Rendered]) -> Treated:
    """The treatment that a config names. A measured strength is a step of the run.

    Args:
        folder: of the run; None where no strength is measured.
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
    schedule = config.over_time
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
        return Treatment(ablations(directions, config.where))
    return Treatment(penalty=ShiftPenalty(tuple((b, tuple(some)) for b, some in directions.items()), config.price))


def _additions(config: Treating, vectors: PersonaVectors, blocks: Sequence[int], raw: float) -> tuple[Add, ...]:
    from pvsae.models import Add

    if config.multi_layer:
        return vectors.incremental(raw, config.where, config.statistic)
    return tuple(Add(_direction(vectors, block, config.statistic), block, raw, config.where) for block in blocks)


def _raw(
    config: Treating, model: ChatModel, folder: RunDir | None, vectors: PersonaVectors, blocks: Sequence[int],
    rows: Sequence[Rendered],
) -> float:  # fmt: skip
    """The raw coefficient of the strength."""
    if config.unit_used == "raw" or config.strength == 0:
        return config.strength
    if config.unit_used == "gap":
        if config.multi_layer and config.statistic != DEFAULT_STATISTIC:
            raise UserError("the unit 'gap' differs from block to block here", "--unit raw or kl with multi_layer")
        return config.strength if config.multi_layer else config.strength * gap_in_raw(vectors, blocks[0], config.statistic)

    def measured() -> float:
        some = rows[: config.kl_rows]
        return calibrate(lambda coef: mean_kl(model, some, _additions(config, vectors, blocks, coef)), config.strength)

    assert folder is not None
    return float(folder.do_json(f"strength/{vectors.trait}", measured))


# ------------------------------------------------------------------------------------------------------------------- features
def _of_features(config: Treating, model: ChatModel, folder: RunDir | None) -> Treated:
    from pvsae.models import AddFeature, Direction
    from pvsae.saes.fingerprint import fingerprint
    from pvsae.stages.handles import open_features

    if len(config.blocks) > 1:
        raise UserError(f"blocks {list(config.blocks)} for features", "one block at most", "a dictionary is of one block")
    block = next(iter(check_blocks(config.blocks, model)), None)
    features = open_features(config.features, model, block, other_model=config.other_model)
    inputs = {f"dictionary {f.sae.ref}": fingerprint(f.sae) for f in features}
    at = ", ".join(str(b) for b in sorted({f.block for f in features}))
    if config.treatment == STEER:
        edits: list[AddFeature] = []
        for feature in features:
            raw = _activation(config, model, folder, feature)
            edits.append(AddFeature(feature.sae, feature.index, raw, feature.block, config.where))
        one = edits[0].strength if len(edits) == 1 else math.nan
        return Treated(Treatment(tuple(edits), config.over_time), one, at, inputs, {})
    directions: dict[int, list[Any]] = {}
    for f in features:
        directions.setdefault(f.block, []).append(Direction(f.sae.W_dec[f.index].detach(), f"{f.sae.ref}:{f.index}"))
    return Treated(_of_directions(config, directions), math.nan, at, inputs, {})


def _activation(config: Treating, model: ChatModel, folder: RunDir | None, feature: Feature) -> float:
    """The strength in activation units."""
    if config.unit_used == "raw" or config.strength == 0:
        return config.strength

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

    assert folder is not None
    maximum = float(folder.do_json(f"strength/{feature.index}-of-{_short(feature)}", highest))
    return replace(feature, maximum=maximum).raw(config.strength, "max")


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
