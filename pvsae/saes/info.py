"""What is known of a dictionary beside its arrays: its model and site, how it was trained, which tokens it is not for.

Knows: plain values, and what an outlier token is.
Does not know: the arrays (dictionary.py), files (folders.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pvsae.errors import UserError


@dataclass(frozen=True)
class OutlierFilter:
    """A token whose residual is longer than `multiple` * `median_norm` is an outlier (mostly an attention sink).

    Attributes:
        multiple: how many times the median.
        median_norm: median length of a residual in raw units; None where a dictionary was trained with a filter whose median was
            not published: then nothing is an outlier until `SAE.calibrated` has put a median in.
    """

    multiple: float
    median_norm: float | None

    def __post_init__(self) -> None:
        for name, value in (("multiple", self.multiple), ("median_norm", self.median_norm)):
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name} of an outlier filter is {value}", "a positive number")

    @property
    def limit(self) -> float:
        """The longest residual that is no outlier; infinite without a median."""
        return math.inf if self.median_norm is None else self.multiple * self.median_norm

    def outliers(self, x: Float[Tensor, "*batch d_model"]) -> Bool[Tensor, "*batch"]:
        """Which residuals are outliers."""
        if self.median_norm is None:
            return torch.zeros(x.shape[:-1], dtype=torch.bool, device=x.device)
        return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32) > self.limit


def same_model(first: str, second: str) -> bool:
    """Whether two names mean one model: the last part counts, since a folder and a hub id may hold the same; adapters do not."""
    one, two = (_last_part(name) for name in (first, second))
    return one == two


def _last_part(name: str) -> str:
    parts = name.partition("+")[0].rstrip("/").lower().split("/")
    cached = [part for part in parts if part.startswith("models--")]  # the hub's cache: models--OWNER--NAME/snapshots/HASH
    return cached[-1].rpartition("--")[2] if cached else parts[-1]


@dataclass(frozen=True)
class SAEInfo:
    """What is known of a dictionary beside its arrays; saved with it.

    Attributes:
        model: name of the model, as its hub or folder calls it.
        block: decoder block, counted from 0, whose output the dictionary reads.
        site: where at that block.
        k: mean number of active latents a token that it was trained for.
        outliers: which tokens were left out by their length, and are to be left out wherever it is used.
        dtype: of the weights in the file.
        chat: how text was rendered (template, system prompt, which roles), as plain values.
        drop_first: tokens at the start of a context that were left out of training.
        prepend_bos: whether contexts began with a BOS token; None where nobody knows.
        context_size: tokens a context in training.
        dataset: what it was trained on.
        neuronpedia: id of its pages at neuronpedia.org.
        training: recipe, tokens, versions, as plain values.
        notes: what a loader corrected or had to guess, for people to read.
    """

    model: str | None = None
    block: int | None = None
    site: str = "resid_post"
    k: float | None = None
    outliers: OutlierFilter | None = None
    dtype: str = "float32"
    chat: dict[str, Any] = field(default_factory=dict)
    drop_first: int = 0
    prepend_bos: bool | None = None
    context_size: int | None = None
    dataset: str | None = None
    neuronpedia: str | None = None
    training: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def hook_name(self) -> str | None:
        """The site in TransformerLens' words, or None without a block."""
        return None if self.block is None else f"blocks.{self.block}.hook_{self.site}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        out = {f.name: getattr(self, f.name) for f in fields(self)}
        if self.outliers is not None:
            out["outliers"] = {"multiple": self.outliers.multiple, "median_norm": self.outliers.median_norm}
        return {**out, "notes": list(self.notes)}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> SAEInfo:
        """Reads back `to_dict`; fields of a later version are left out. UserError where a field has the wrong form."""
        known = {f.name for f in fields(SAEInfo)}
        given = {key: value for key, value in values.items() if key in known}
        try:
            if given.get("outliers") is not None:
                given["outliers"] = OutlierFilter(**given["outliers"])
            return SAEInfo(**{**given, "notes": tuple(given.get("notes") or ())})
        except TypeError as error:
            raise UserError(f"the description of a dictionary cannot be read: {error}", "what SAEInfo.to_dict wrote") from None
