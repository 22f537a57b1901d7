"""The conditions of a sweep over features: what is done to the model in each, controls of equal length among them.

Knows: features with measured strengths, how random features and directions are drawn, which length each control gets.
Does not know: how answers are made or judged (sweep.py), where strengths come from (counts.py), what a facet is.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from pvsae.saes.activity import LatentActivity, check_index
from pvsae.stages.handles import Feature, parse

if TYPE_CHECKING:
    from pvsae.models import Intervention
    from pvsae.stages.feature_steer import FeatureSteerConfig
    from pvsae.vectors.persona import PersonaVectors

FEATURE, TOGETHER, RANDOM_FEATURE, RANDOM_DIRECTION, VECTOR = (
    "feature", "together", "random feature", "random direction", "vector",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Condition:
    """One way to treat the model. `edits` are what is done to it; `coef` is in the unit of the sweep, `raw` and `length` are of
    the feature that is steered with, or whose control this is."""

    name: str
    system: str
    feature: str = "-"
    of: str = "-"
    block: int | str = "-"
    coef: float = 0.0
    raw: float = 0.0
    length: float = 0.0
    density: float = math.nan
    edits: tuple[Intervention, ...] = ()

    @property
    def slug(self) -> str:
        if not self.edits:
            return self.name.replace(" ", "-")
        of = "" if self.of == "-" else f"_of-{self.of}"
        return f"{self.name}-{self.feature}{of}_coef{self.coef:+g}".replace(" ", "-").replace(":", "-")


def controls_of(
    config: FeatureSteerConfig, features: Sequence[Feature], activity: dict[str, LatentActivity]
) -> dict[str, list[Feature]]:
    """Random features that are active as often, for each feature (by its name). UserError where there are too few."""
    out: dict[str, list[Feature]] = {}
    spared = parse(config.not_random)
    for feature in features:
        found = activity[feature.sae.ref]
        known = {*(f.index for f in features if f.sae.ref == feature.sae.ref)}
        known |= {check_index(feature.sae, name.index) for name in spared if name.source == feature.source}
        n, seed = config.n_random, _seed(config, feature)
        drawn = found.equals_of(feature.index, n, seed, without=sorted(known)) if n else []
        out[feature.name] = [
            replace(feature, name=str(i), index=i, maximum=float(found.max[i]), density=float(found.density[i])) for i in drawn
        ]
    return out


def _seed(config: FeatureSteerConfig, feature: Feature) -> int:
    return zlib.crc32(f"{config.seed}/{feature.name}".encode())


def conditions(
    config: FeatureSteerConfig,
    features: Sequence[Feature],
    controls: dict[str, list[Feature]],
    vectors: PersonaVectors | None,
    trait: str,
) -> Iterator[Condition]:
    """Everything that is measured, unsteered first."""
    yield Condition("unsteered", config.under)
    if config.under != "pos":
        yield Condition("prompt pos", "pos")
    strengths = (1.0,) if config.mode == "ablate" else config.coefs
    for feature in features:
        for coef in strengths:
            yield _of_feature(config, FEATURE, feature, feature, coef, "-")
    if config.together and len(features) > 1:
        for coef in strengths:
            yield _all_at_once(config, features, coef)
    for feature in features:
        for other in controls[feature.name]:
            for coef in strengths:
                yield _of_feature(config, RANDOM_FEATURE, other, feature, coef, feature.name)
        for k in range(config.n_random):
            generator = torch.Generator().manual_seed(_seed(config, feature) + 1 + k)
            values = torch.randn(feature.sae.d_model, generator=generator)
            for coef in strengths:
                yield _of_direction(config, RANDOM_DIRECTION, str(k), values, feature, coef)
        if vectors is not None:
            values = vectors.direction(feature.block, config.statistic).values
            for coef in strengths:
                yield _of_direction(config, VECTOR, trait, values, feature, coef)


def _of_feature(config: FeatureSteerConfig, name: str, steered: Feature, like: Feature, coef: float, of: str) -> Condition:
    """A feature at the length that `like` adds at this strength; for a feature of interest that is itself."""
    raw, length = _strength(config, like, coef)
    if steered is not like and config.mode != "ablate":
        raw *= like.norm / max(steered.norm, 1e-12)
    edits = steered.edits(config.mode, raw, config.positions)
    return Condition(name, config.under, steered.name, of, steered.block, coef, raw, length, steered.density, edits)


def _of_direction(
    config: FeatureSteerConfig, name: str, which: str, values: torch.Tensor, like: Feature, coef: float
) -> Condition:
    """A direction at the length that `like` adds, in its sign; taken out of the residual where features are ablated."""
    from pvsae.models import Ablate, Add, Direction

    raw, length = _strength(config, like, coef)
    unit = Direction(values / values.norm(), f"{name} {which}")
    edit: Intervention = (
        Ablate(unit, like.block, config.positions)
        if config.mode == "ablate"
        else Add(unit, like.block, math.copysign(length, raw), config.positions)
    )
    of_vector = math.copysign(length / float(values.norm()), raw) if name == VECTOR else math.nan
    return Condition(name, config.under, which, like.name, like.block, coef, of_vector, length, math.nan, (edit,))


def _all_at_once(config: FeatureSteerConfig, features: Sequence[Feature], coef: float) -> Condition:
    edits = tuple(e for f in features for e in f.edits(config.mode, _strength(config, f, coef)[0], config.positions))
    name = "+".join(f.name for f in features) if len(features) <= 4 else f"{len(features)} features"
    blocks = {f.block for f in features}
    block: int | str = next(iter(blocks)) if len(blocks) == 1 else "several"
    return Condition(TOGETHER, config.under, name, "-", block, coef, math.nan, math.nan, math.nan, edits)


def _strength(config: FeatureSteerConfig, feature: Feature, coef: float) -> tuple[float, float]:
    """(activation units, length of what is added) of a strength."""
    if config.mode == "ablate":
        return 0.0, 0.0
    raw = feature.raw(coef, config.unit)
    return raw, abs(raw) * feature.norm
