"""Stages: one module each, all of the same shape: a frozen config, `run(config, run_dir) -> Result`, tables in a run folder.

Knows: the names below. Does not know: figures and pages (reports/ makes them from the run folders), the command line.

    from pvsae.stages import ExtractConfig, extract
    result = extract.run(ExtractConfig(model="organism", traits=("evil",)), "runs/extract")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pvsae.saes.config import SaeTrainConfig
    from pvsae.stages import (
        capability,
        decompose,
        drift,
        extract,
        feature_steer,
        finetune,
        gate,
        layers,
        monitor,
        sae_eval,
        sae_features,
        sae_train,
        screen,
        steer,
    )
    from pvsae.stages.capability import CapabilityConfig, CapabilityResult
    from pvsae.stages.decompose import DecomposeConfig, DecomposeResult
    from pvsae.stages.drift import DriftConfig, DriftResult
    from pvsae.stages.extract import ExtractConfig, ExtractResult
    from pvsae.stages.feature_steer import FeatureSteerConfig, FeatureSteerResult
    from pvsae.stages.finetune import FinetuneConfig, FinetuneResult
    from pvsae.stages.gate import GateConfig, GateResult
    from pvsae.stages.layers import LayersConfig, LayersResult
    from pvsae.stages.monitor import MonitorConfig, MonitorResult
    from pvsae.stages.sae_eval import SaeEvalConfig, SaeEvalResult
    from pvsae.stages.sae_features import SaeFeaturesConfig, SaeFeaturesResult
    from pvsae.stages.sae_train import SaeTrainResult
    from pvsae.stages.screen import ScreenConfig, ScreenResult
    from pvsae.stages.steer import SteerConfig, SteerResult

STAGES = (
    "extract",
    "layers",
    "steer",
    "feature_steer",
    "monitor",
    "finetune",
    "sae_train",
    "sae_eval",
    "sae_features",
    "decompose",
    "capability",
    "screen",
    "gate",
    "drift",
)
_HOMES = {f"{stage.title().replace('_', '')}{kind}": stage for stage in STAGES for kind in ("Config", "Result")}

__all__ = [
    "STAGES",
    "CapabilityConfig",
    "CapabilityResult",
    "DecomposeConfig",
    "DecomposeResult",
    "DriftConfig",
    "DriftResult",
    "ExtractConfig",
    "ExtractResult",
    "FeatureSteerConfig",
    "FeatureSteerResult",
    "FinetuneConfig",
    "FinetuneResult",
    "GateConfig",
    "GateResult",
    "LayersConfig",
    "LayersResult",
    "MonitorConfig",
    "MonitorResult",
    "SaeEvalConfig",
    "SaeEvalResult",
    "SaeFeaturesConfig",
    "SaeFeaturesResult",
    "SaeTrainConfig",
    "SaeTrainResult",
    "ScreenConfig",
    "ScreenResult",
    "SteerConfig",
    "SteerResult",
    "capability",
    "decompose",
    "drift",
    "extract",
    "feature_steer",
    "finetune",
    "gate",
    "layers",
    "monitor",
    "sae_eval",
    "sae_features",
    "sae_train",
    "screen",
    "steer",
]


def __getattr__(name: str) -> Any:
    if name in STAGES:
        return importlib.import_module(f"pvsae.stages.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"pvsae.stages.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'pvsae.stages' has no attribute {name!r}")
