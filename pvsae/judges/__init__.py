"""Judges: how strongly does an answer show a trait, 0-100, and on what evidence.

`load_judge("openai:MODEL" | "local:MODEL" | a registered name)` gives a `Judge`; every `Score` keeps its evidence.
Imports nothing heavy by itself: torch comes with the local judge, the `openai` package with the first client.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pvsae.judges.base import COHERENCE, Judge, Metric, Score, fill_slots, load_judge
    from pvsae.judges.local_judge import LocalJudge
    from pvsae.judges.openai_judge import OpenAIJudge

_HOME = {
    **dict.fromkeys(("COHERENCE", "Judge", "Metric", "Score", "fill_slots", "load_judge"), "base"),
    "LocalJudge": "local_judge",
    "OpenAIJudge": "openai_judge",
}
__all__ = ["COHERENCE", "Judge", "LocalJudge", "Metric", "OpenAIJudge", "Score", "fill_slots", "load_judge"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
