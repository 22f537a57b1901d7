"""Traits as text: a description, and the instructions, questions and scoring prompt that are written from it.

Names load on first use, so that importing this package costs nothing. The function that has an LLM write a trait shares its name
with its module and is imported from there: `from pvsae.traits.author import author`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pvsae.traits.checks import OFFICIAL_COUNTS, Counts, check
    from pvsae.traits.spec import (
        BUILTIN_LIBRARY,
        Pair,
        TraitArtifacts,
        TraitSpec,
        list_specs,
        list_traits,
        load_spec,
        load_trait,
        save_trait,
        system_message,
    )

_HOME = {
    "Counts": "checks",
    "OFFICIAL_COUNTS": "checks",
    "check": "checks",
    "BUILTIN_LIBRARY": "spec",
    "Pair": "spec",
    "TraitArtifacts": "spec",
    "TraitSpec": "spec",
    "list_specs": "spec",
    "list_traits": "spec",
    "load_spec": "spec",
    "load_trait": "spec",
    "save_trait": "spec",
    "system_message": "spec",
}

__all__ = [
    "BUILTIN_LIBRARY",
    "OFFICIAL_COUNTS",
    "Counts",
    "Pair",
    "TraitArtifacts",
    "TraitSpec",
    "check",
    "list_specs",
    "list_traits",
    "load_spec",
    "load_trait",
    "save_trait",
    "system_message",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
