"""Persona vectors: text about a trait becomes a direction in a language model, and the direction monitors and steers it.

Everything public is here, imported when it is first used, so that `import pvsae` costs nothing::

    from pvsae import Add, extract, generate_rollouts, judge_rollouts, load, load_judge, load_trait
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pvsae.errors import UserError
    from pvsae.judges import Judge, Metric, Score, load_judge
    from pvsae.models import (
        Ablate,
        Add,
        Cap,
        ChatModel,
        Direction,
        LastPrompt,
        Projection,
        Residual,
        Sampling,
        SpanMean,
        incremental,
        load,
    )
    from pvsae.reports import draw, write_report
    from pvsae.runs import RunDir
    from pvsae.traits import TraitArtifacts, TraitSpec, list_traits, load_trait, save_trait
    from pvsae.vectors import PersonaVectors, Rollouts, filter_pairs, generate_rollouts, judge_rollouts, read_official, write_gguf
    from pvsae.vectors.extraction import extract

__version__ = "0.1.0"

_HOMES = {
    "errors": ("UserError",),
    "judges": ("Judge", "Metric", "Score", "load_judge"),
    "models": (
        "Ablate", "Add", "Cap", "ChatModel", "Direction", "LastPrompt", "Projection", "Residual", "Sampling", "SpanMean",
        "incremental", "load",
    ),
    "reports": ("draw", "write_report"),
    "runs": ("RunDir",),
    "traits": ("TraitArtifacts", "TraitSpec", "list_traits", "load_trait", "save_trait"),
    "vectors": (
        "PersonaVectors", "Rollouts", "filter_pairs", "generate_rollouts", "judge_rollouts", "read_official", "write_gguf",
    ),
    "vectors.extraction": ("extract",),
}  # fmt: skip
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Ablate",
    "Add",
    "Cap",
    "ChatModel",
    "Direction",
    "Judge",
    "LastPrompt",
    "Metric",
    "PersonaVectors",
    "Projection",
    "Residual",
    "Rollouts",
    "RunDir",
    "Sampling",
    "Score",
    "SpanMean",
    "TraitArtifacts",
    "TraitSpec",
    "UserError",
    "__version__",
    "draw",
    "extract",
    "filter_pairs",
    "generate_rollouts",
    "incremental",
    "judge_rollouts",
    "list_traits",
    "load",
    "load_judge",
    "load_trait",
    "read_official",
    "save_trait",
    "write_gguf",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pvsae' has no attribute {name!r}")
    return getattr(importlib.import_module(f"pvsae.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
