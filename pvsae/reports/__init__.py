"""Figures and the HTML report, made from run folders alone: no model, no judge, no recomputing."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pvsae.reports.features import write_feature_page
    from pvsae.reports.figures import draw
    from pvsae.reports.html import write_report

_HOMES = {"draw": "figures", "write_feature_page": "features", "write_report": "html"}
__all__ = ["draw", "write_feature_page", "write_report"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"pvsae.reports.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'pvsae.reports' has no attribute {name!r}")
