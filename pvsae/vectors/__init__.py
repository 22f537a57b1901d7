"""From judged rollouts to persona vectors: rollouts, extraction, the vector file, foreign formats, layer choice.

Knows: the names below and where they live; nothing is imported before it is asked for.
Does not know: how a stage uses a vector.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pvsae.vectors.extraction import EmptyFilter, extract, filter_pairs
    from pvsae.vectors.formats import read_gguf, read_official, read_official_set, write_gguf, write_official
    from pvsae.vectors.layers import LayerChoice, choose_layer
    from pvsae.vectors.persona import STATISTICS, PersonaVectors
    from pvsae.vectors.reference import reference_hidden_state_means
    from pvsae.vectors.rollouts import Rollouts, generate_rollouts, judge_rollouts
    from pvsae.vectors.specificity import specific

_HOME = {
    "EmptyFilter": "extraction",
    "STATISTICS": "persona",
    "PersonaVectors": "persona",
    "Rollouts": "rollouts",
    "generate_rollouts": "rollouts",
    "judge_rollouts": "rollouts",
    "extract": "extraction",
    "filter_pairs": "extraction",
    "reference_hidden_state_means": "reference",
    "read_official": "formats",
    "read_official_set": "formats",
    "write_official": "formats",
    "read_gguf": "formats",
    "write_gguf": "formats",
    "LayerChoice": "layers",
    "choose_layer": "layers",
    "specific": "specificity",
}

__all__ = [
    "STATISTICS",
    "EmptyFilter",
    "LayerChoice",
    "PersonaVectors",
    "Rollouts",
    "choose_layer",
    "extract",
    "filter_pairs",
    "generate_rollouts",
    "judge_rollouts",
    "read_gguf",
    "read_official",
    "read_official_set",
    "reference_hidden_state_means",
    "specific",
    "write_gguf",
    "write_official",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
