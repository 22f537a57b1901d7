"""Which options of `pvsae capability` go together, and which would do nothing as they are given.

Knows: the options. Does not know: what they do, models, files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from pvsae.errors import UserError
from pvsae.stages.handles import FEATURE_UNITS, MODES
from pvsae.stages.strength import UNITS
from pvsae.stages.sweep import POSITIONS
from pvsae.vectors.persona import DEFAULT_STATISTIC

if TYPE_CHECKING:
    from pvsae.stages.capability import CapabilityConfig

OF_VECTORS = ("traits", "statistic", "ablate", "layers", "multi_layer", "n_random", "library", "kl_rows")
OF_FEATURES = ("mode", "activity", "activity_tokens")
OF_BOTH = ("blocks", "coefs", "unit", "positions")
OPTIONS = (*OF_VECTORS, *OF_FEATURES, *OF_BOTH, "other_model")
"""All that say what is done to the model, but the vectors and features themselves."""


def check(config: CapabilityConfig) -> None:
    """UserError for values that an option cannot have, and for options that do not go together or would do nothing."""
    if config.vectors and config.features:
        raise UserError("both vectors and features are given", "one of them", "make a run of each; strengths differ in unit")
    if config.ablate and not config.vectors:
        raise UserError("--ablate without vectors", "directions to take out", "give VECTORS, or --mode ablate for features")
    allowed = FEATURE_UNITS if config.features else UNITS
    for name, value, some in (("unit", config.unit_of, allowed), ("mode", config.mode, MODES)):
        if value not in some:
            raise UserError(f"unknown {name} {value!r}", f"one of {', '.join(some)}")
    if config.positions not in POSITIONS:
        raise UserError(f"unknown positions {config.positions!r}", f"one of {', '.join(POSITIONS)}")
    if not all(math.isfinite(c) and c != 0 for c in config.coefs) or len(set(config.coefs)) < len(config.coefs):
        raise UserError(f"coefs are {list(config.coefs)}", "finite numbers other than 0, each once (0 is always there)")
    steered = config.mode != "ablate" if config.features else bool(config.vectors) and not config.ablate
    if steered and not config.coefs:
        raise UserError("no strength is given", "at least one", "--coefs 1")
    if config.multi_layer and (config.blocks or config.layers or config.features):
        raise UserError("multi_layer with blocks, layers or features", "vectors alone: it takes every block")
    if config.blocks and config.layers:
        raise UserError("both blocks and layers are given", "one of them: layers chooses a block")
    if config.multi_layer and config.unit_of == "gap" and config.statistic != DEFAULT_STATISTIC:
        raise UserError("the unit 'gap' differs from block to block here", "--unit raw or kl with multi_layer")
    for name, least in (("shots", 0), ("limit", 1), ("n_random", 0), ("kl_rows", 1), ("activity_tokens", 1)):
        value = getattr(config, name)
        if value is not None and value < least:
            raise UserError(f"{name} is {value}", f"at least {least}")
    defaults = {field.name: field.default for field in fields(config)}
    # The library of traits may be named by a config that many stages share.
    check_taken(config, [name for name in OPTIONS if name != "library" and getattr(config, name) != defaults[name]])


def check_taken(config: CapabilityConfig, given: Sequence[str]) -> None:
    """UserError for options, of those that were given, of which nothing would come."""
    taken = {*OF_BOTH, *(OF_VECTORS if config.vectors else OF_FEATURES)} if config.vectors or config.features else set()
    if config.features and config.mode == "ablate":
        taken -= {"coefs", "unit", "activity", "activity_tokens"}
    if config.unit_of != "max":
        taken -= {"activity", "activity_tokens"}
    if config.unit_of != "kl":
        taken -= {"library", "kl_rows"}
    if config.against or config.features:
        taken.add("other_model")
    wasted = [name for name in given if name in OPTIONS and name not in taken]
    if wasted:
        what = (
            "vectors"
            if config.vectors
            else f"features, mode {config.mode},"
            if config.features
            else "neither vectors nor features"
        )
        unit = f" and the unit {config.unit_of}" if config.vectors or config.features else ""
        raise UserError(
            f"{', '.join(wasted)} with {what}{unit}, where nothing comes of it",
            f"of these options {', '.join(name for name in OPTIONS if name in taken) or 'none'}",
            "leave it out" if unit else "give --vectors RUN or --feature SAE:INDEX, or leave it out",
        )
