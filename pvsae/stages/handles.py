"""Handles: single features and persona vectors as things to turn, with a strength in named units.

Knows: how SAE:INDEX becomes a feature of an open dictionary that fits the model, and what interventions a strength becomes.
Does not know: sweeps, judges, chats.

Units of a feature's strength: "max" (multiples of its highest activation on some text, see saes/activity.py) and "raw"
(activation units of the dictionary). Modes: "add" raises the activation by the strength; "clamp" sets it to the strength;
"ablate" sets it to 0.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pvsae.errors import UserError
from pvsae.saes.activity import check_index
from pvsae.saes.dictionary import SAE

if TYPE_CHECKING:
    from pvsae.models import ChatModel, Intervention

MODES = ("add", "clamp", "ablate")
FEATURE_UNITS = ("max", "raw")


@dataclass(frozen=True, eq=False)
class Feature:
    """One latent of a dictionary at its block.

    Attributes:
        name: what tables call it: its index, with the dictionary's name before it where there are several.
        source: what its dictionary was opened by.
        sae, index, block: where it is.
        maximum: its highest activation, in activation units; NaN where it was not measured.
        density: share of tokens at which it is active; NaN where it was not measured.
    """

    name: str
    sae: SAE
    index: int
    block: int
    maximum: float = math.nan
    density: float = math.nan
    source: str = ""

    @property
    def norm(self) -> float:
        """Length of its decoder row: what one unit of activation adds to the residual."""
        return float(self.sae.W_dec[self.index].float().norm())

    def raw(self, strength: float, unit: str) -> float:
        """A strength in activation units."""
        return strength * self.maximum if unit == "max" else strength

    def edits(self, mode: str, raw: float, positions: str) -> tuple[Intervention, ...]:
        """What is done to the model at a strength in activation units."""
        from pvsae.models import AddFeature, Clamp

        if mode == "add":
            return (AddFeature(self.sae, self.index, raw, self.block, positions),)
        return (Clamp(self.sae, self.index, 0.0 if mode == "ablate" else raw, self.block, positions),)


@dataclass(frozen=True)
class FeatureName:
    """SAE:INDEX taken apart."""

    source: str
    index: int


def parse(words: Sequence[str]) -> list[FeatureName]:
    """SAE:INDEX words; SAE:3,7 and SAE:10-19 stand for several. UserError for anything else, and for a feature given twice."""
    found: list[FeatureName] = []
    for word in words:
        source, _, indices = word.rpartition(":")
        try:
            if not source:
                raise ValueError
            for part in indices.split(","):
                first, _, last = part.partition("-")
                some = range(int(first), int(last or first) + 1)
                if not some:
                    raise ValueError
                found += [FeatureName(source, i) for i in some]
        except ValueError:
            raise UserError(
                f"feature {word!r}",
                "SAE:INDEX, SAE a folder or RELEASE/ID, INDEX a number, several (3,7) or a range (10-19)",
                "--feature runs/sae/block-3_width-1024_k-8:17",
            ) from None
    twice = next((name for name, n in Counter(found).items() if n > 1), None)
    if twice is not None:
        raise UserError(f"feature {twice.source}:{twice.index} is given twice", "each feature once")
    return found


def open_features(
    words: Sequence[str], model: ChatModel, block: int | None = None, *, other_model: bool = False
) -> list[Feature]:
    """The features that SAE:INDEX words name, not measured yet; each dictionary is opened once.

    Args:
        block: where to steer, for dictionaries that do not say which block they are of; None takes their own.
        other_model: take dictionaries of another model of the same width all the same; their notes then say so.

    Raises:
        UserError: a word that is none, no such dictionary, one of another model, d_model or site or of a block that the model
            lacks or that is not `block`, an index out of range.
    """
    from pvsae.saes.evaluate import check_block
    from pvsae.saes.folders import load

    names = parse(words)
    sources = list(dict.fromkeys(name.source for name in names))
    opened: dict[str, tuple[SAE, int]] = {}
    for source in sources:
        sae = load(source, device=model.device).in_memory()
        if block is not None and sae.info.block not in (None, block):
            raise UserError(
                f"{source} is a dictionary of block {sae.info.block}, and block {block} is asked for",
                f"block {sae.info.block}",
                "leave --blocks out, or take a dictionary of that block",
            )
        where = check_block(sae, model, block)
        opened[source] = (sae.check_trained_on(model.name, other_model), where)
    short = {source: Path(source).name for source in sources}
    if len(set(short.values())) < len(sources):
        short = {source: f"sae{i}" for i, source in enumerate(sources)}
    out = []
    for name in names:
        sae, where = opened[name.source]
        label = str(name.index) if len(sources) == 1 else f"{short[name.source]}:{name.index}"
        out.append(Feature(label, sae, check_index(sae, name.index), where, source=name.source))
    return out
