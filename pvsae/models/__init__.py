"""Models: load one, render chats, generate, capture and intervene. Everything public here is imported when it is first used.

`load` is the function (its module is `loading`); `generate` is a module, since models generate by `ChatModel.generate`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pvsae.models.batch import Positions, TokenBatch, halving_on_oom, length_sorted_batches
    from pvsae.models.captures import Capture, FeatureActs, LastPrompt, Projection, Residual, SpanMean
    from pvsae.models.chat import ChatTemplate, Rendered
    from pvsae.models.chatmodel import ChatModel, Output
    from pvsae.models.generate import Generation, Sampling
    from pvsae.models.hooks import HookSession
    from pvsae.models.interventions import (
        Ablate,
        Add,
        AddFeature,
        Cap,
        Clamp,
        Dictionary,
        Direction,
        Intervention,
        Reconstruct,
        from_config,
        incremental,
        to_config,
    )
    from pvsae.models.loading import ModelShape, known_models, load, model_shape
    from pvsae.models.remote import RemoteModel

_WHERE = {
    "batch": ("Positions", "TokenBatch", "halving_on_oom", "length_sorted_batches"),
    "captures": ("Capture", "FeatureActs", "LastPrompt", "Projection", "Residual", "SpanMean"),
    "chat": ("ChatTemplate", "Rendered"),
    "chatmodel": ("ChatModel", "Output"),
    "generate": ("Generation", "Sampling"),
    "hooks": ("HookSession",),
    "interventions": (
        "Ablate",
        "Add",
        "AddFeature",
        "Cap",
        "Clamp",
        "Dictionary",
        "Direction",
        "Intervention",
        "Reconstruct",
        "from_config",
        "incremental",
        "to_config",
    ),
    "loading": ("ModelShape", "known_models", "load", "model_shape"),
    "remote": ("RemoteModel",),
}
_MODULE = {name: module for module, names in _WHERE.items() for name in names}

__all__ = [
    "Ablate",
    "Add",
    "AddFeature",
    "Cap",
    "Capture",
    "ChatModel",
    "ChatTemplate",
    "Clamp",
    "Dictionary",
    "Direction",
    "FeatureActs",
    "Generation",
    "HookSession",
    "Intervention",
    "LastPrompt",
    "ModelShape",
    "Output",
    "Positions",
    "Projection",
    "Reconstruct",
    "RemoteModel",
    "Rendered",
    "Residual",
    "Sampling",
    "SpanMean",
    "TokenBatch",
    "from_config",
    "halving_on_oom",
    "incremental",
    "known_models",
    "length_sorted_batches",
    "load",
    "model_shape",
    "to_config",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE[name]}"), name)


def __dir__() -> list[str]:
    return __all__
