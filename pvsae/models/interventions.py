"""Interventions: pure functions of the residual stream at one block's output, as frozen dataclasses that go into a config.

Knows: the arithmetic of each edit and how it is written down.
Does not know: modules, hooks, batches; `hooks.py` decides at which positions an edit's result replaces the residual.

Every intervention has `block` (index of the decoder block whose output, `blocks.{block}.hook_resid_post`, is edited), `positions`
("prompt", "response" or "all"; paper section on steering), `d_model`, `problem()` (why it cannot be applied, or None) and
`edit(device, dtype)`: a function of h [..., d_model] that returns a new tensor, or None where it would change nothing. One that
depends on the tokens too has `applies(ids, index)`, which says at which of them it acts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pvsae.errors import UserError

Edit = Callable[[Tensor], Tensor]
POSITIONS = ("prompt", "response", "all")
SIDES = ("above", "below")


@dataclass(frozen=True, eq=False)
class Direction:
    """A vector in the residual stream. Equal and hashed by content, whatever it is called.

    Attributes:
        values: [d_model], kept as fp32 on the CPU; not normalised.
        ref: where it comes from, in words or as a path; written to configs.
    """

    values: Float[Tensor, d_model]
    ref: str = ""

    def __post_init__(self) -> None:
        values = torch.as_tensor(self.values)
        if values.ndim != 1:
            raise UserError(f"a direction of shape {list(values.shape)}", "one dimension, [d_model]")
        object.__setattr__(self, "values", values.detach().to("cpu", torch.float32, copy=True).contiguous())

    @cached_property
    def sha256(self) -> str:
        """Hash of the fp32 values: the identity of a direction."""
        return hashlib.sha256(self.values.numpy().tobytes()).hexdigest()

    @cached_property
    def norm(self) -> float:
        """Euclidean length, in residual units."""
        return float(self.values.norm())

    @cached_property
    def unit(self) -> Float[Tensor, d_model]:
        """The direction at length 1."""
        return self.values / self.values.norm()

    @property
    def d_model(self) -> int:
        return self.values.shape[0]

    def problem(self, needs_length: bool = False) -> str | None:
        """Why this vector cannot be used, or None."""
        if not bool(torch.isfinite(self.values).all()):
            return f"direction {self.ref or self.sha256[:12]} has values that are NaN or infinite"
        if needs_length and self.norm == 0:
            return f"direction {self.ref or self.sha256[:12]} is zero, so it points nowhere"
        return None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Direction) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)


@runtime_checkable
class Dictionary(Protocol):
    """A sparse dictionary (SAE or transcoder) as far as interventions and captures need it."""

    W_dec: Float[Tensor, "d_sae d_model"]
    ref: str

    def encode(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_sae"]:
        """Feature activations of residuals."""
        ...


@runtime_checkable
class Reconstructor(Dictionary, Protocol):
    """A dictionary that also gives residuals back."""

    def __call__(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """Reconstruction of residuals."""
        ...


class Intervention(Protocol):
    """What hooks.py asks of an intervention; see the head of this module."""

    @property
    def block(self) -> int: ...
    @property
    def positions(self) -> str: ...
    @property
    def d_model(self) -> int: ...
    def problem(self) -> str | None: ...
    def edit(self, device: torch.device, dtype: torch.dtype) -> Edit | None: ...


@dataclass(frozen=True)
class Add:
    """h <- h + coef * v, with the raw vector (paper, section on steering at inference and during training)."""

    direction: Direction
    block: int
    coef: float = 1.0
    positions: str = "all"
    kind: ClassVar[str] = "add"

    @property
    def d_model(self) -> int:
        return self.direction.d_model

    def problem(self) -> str | None:
        return self.direction.problem() or _not_finite("coef", self.coef)

    def edit(self, device: torch.device, dtype: torch.dtype) -> Edit | None:
        if self.coef == 0:
            return None
        step = (self.coef * self.direction.values).to(device, dtype)
        return lambda h: h + step


@dataclass(frozen=True)
class Ablate:
    """h <- h - (h.u) u with u the unit direction (CAFT, concept ablation). The product is taken in fp32."""

    direction: Direction
    block: int
    positions: str = "all"
    kind: ClassVar[str] = "ablate"

    @property
    def d_model(self) -> int:
        return self.direction.d_model

    def problem(self) -> str | None:
        return self.direction.problem(needs_length=True)

    def edit(self, device: torch.device, dtype: torch.dtype) -> Edit | None:
        unit = self.direction.unit.to(device)
        return lambda h: h - ((h.float() @ unit)[..., None] * unit).to(h.dtype)


@dataclass(frozen=True)
class Cap:
    """Removes only the part of h.u beyond a threshold: what is above it (side "above") or below it (side "below").

    `threshold` is in units of the projection on the unit direction u. Where h.u is within the threshold, h keeps its value.
    """

    direction: Direction
    block: int
    threshold: float
    side: str = "above"
    positions: str = "all"
    kind: ClassVar[str] = "cap"

    @property
    def d_model(self) -> int:
        return self.direction.d_model

    def problem(self) -> str | None:
        if self.side not in SIDES:
            return f"side {self.side!r} of a Cap is neither 'above' nor 'below'"
        return self.direction.problem(needs_length=True) or _not_finite("threshold", self.threshold)

    def edit(self, device: torch.device, dtype: torch.dtype) -> Edit | None:
        unit = self.direction.unit.to(device)
        sign = 1.0 if self.side == "above" else -1.0

        def cap(h: Tensor) -> Tensor:
            beyond = torch.relu(sign * (h.float() @ unit - self.threshold))
            return h - (sign * beyond[..., None] * unit).to(h.dtype)

        return cap


@dataclass(frozen=True)
class AddFeature:
    """h <- h + strength * W_dec[index]: as if the feature's activation rose by `strength` (activation units of the dictionary).

    Rows of W_dec are taken as the dictionary has them; with unit rows, as usual, `strength` is also a length in the residual.
    """

    dictionary: Dictionary
    index: int
    strength: float
    block: int
    positions: str = "all"
    kind: ClassVar[str] = "add_feature"

    @property
    def d_model(self) -> int:
        return self.dictionary.W_dec.shape[1]

    def problem(self) -> str | None:
        return _feature_problem(self.dictionary, self.index) or _not_finite("strength", self.strength)

    def edit(self, device: torch.device, dtype: torch.dtype) -> Edit | None:
        if self.strength == 0:
            return None
        step = (self.strength * self.dictionary.W_dec[self.index].detach().float()).to(device, dtype)
        return lambda h: h + step


@dataclass(frozen=True)
class Clamp:
    """h <- h + (value - f_index(h)) * W_dec[index]: sets a feature's activation, whatever it is, to `value`.

    Tokens that the dictionary takes for outliers, where its activations mean nothing, keep their residual.
    """

    dictionary: Dictionary
    index: int
    value: float
    block: int
    positions: str = "all"
    kind: ClassVar[str] = "clamp"

    @property
    def d_model(self) -> int:
        return self.dictionary.W_dec.shape[1]

    def problem(self) -> str | None:
        return _feature_problem(self.dictionary, self.index) or _not_finite("value", self.value)

    def edit(self, device: torch.device, dtype: torch.dtype) -> Edit | None:
        row = self.dictionary.W_dec[self.index].detach().float().to(device)

        def clamp(h: Tensor) -> Tensor:
            now = feature_acts(self.dictionary, h, (self.index,)).to(h.device)
            return _except_outliers(self.dictionary, h, h + ((self.value - now) * row).to(h.dtype))

        return clamp


@dataclass(frozen=True)
class Reconstruct:
    """h <- the dictionary's reconstruction of h (a dictionary spliced into the model, as its CE loss is measured).

    Outliers, special tokens and the first tokens of a context keep their residual: the dictionary was not made for them.

    Attributes:
        skip_first: tokens at the start of each row that are left alone; padding does not count.
        skip_ids: token ids that are left alone (the tokenizer's special tokens).
    """

    dictionary: Reconstructor
    block: int
    skip_first: int = 0
    skip_ids: tuple[int, ...] = ()
    positions: str = "all"
    kind: ClassVar[str] = "reconstruct"

    def __post_init__(self) -> None:
        object.__setattr__(self, "skip_ids", tuple(self.skip_ids))

    @property
    def d_model(self) -> int:
        return self.dictionary.W_dec.shape[1]

    def problem(self) -> str | None:
        if not callable(self.dictionary):
            return f"dictionary {self.dictionary.ref} gives no reconstruction"
        return f"skip_first is {self.skip_first}" if self.skip_first < 0 else None

    def applies(self, ids: Int[Tensor, "batch pos"] | None, index: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"] | None:
        """Tokens that are replaced, by their ids and by their places in their rows; None for all.

        Raises: UserError where ids are skipped and the model was given embeddings (ids None).
        """
        if self.skip_ids and ids is None:
            raise UserError(
                "Reconstruct with skip_ids, in a forward pass that was given embeddings", "a call with input_ids", "skip_ids=()"
            )
        late = index >= self.skip_first
        if ids is None or not self.skip_ids:
            return late if self.skip_first else None
        return late & ~torch.isin(ids, torch.tensor(self.skip_ids, dtype=ids.dtype, device=ids.device))

    def edit(self, device: torch.device, dtype: torch.dtype) -> Edit | None:
        return lambda h: _except_outliers(self.dictionary, h, self.dictionary(h).to(h.device, h.dtype))


def feature_acts(
    dictionary: Dictionary, x: Float[Tensor, "... d_model"], indices: Sequence[int]
) -> Float[Tensor, "... n_features"]:
    """Activations of some features in fp32, at no more cost than theirs where the dictionary has `encode_latents`."""
    some = getattr(dictionary, "encode_latents", None)
    return (some(x, indices) if some is not None else dictionary.encode(x)[..., list(indices)]).float()


def outliers_of(dictionary: Dictionary, x: Float[Tensor, "*batch d_model"]) -> Bool[Tensor, "*batch"] | None:
    """Tokens that the dictionary was not made for, on x's device; None where it has no opinion."""
    told = getattr(dictionary, "outliers", None)
    return None if told is None else told(x).to(x.device)


def _except_outliers(dictionary: Dictionary, h: Tensor, edited: Tensor) -> Tensor:
    left = outliers_of(dictionary, h)
    return edited if left is None else torch.where(left[..., None], h, edited)


def incremental(
    vectors: Float[Tensor, "n_blocks d_model"], coef: float = 1.0, positions: str = "all", ref: str = ""
) -> tuple[Add, ...]:
    """One Add a block with v_l - v_(l-1) (and v_0 at block 0), so that after every block l the edits so far sum to coef * v_l.

    Source: the paper's multi-layer steering; adding all v_l instead would count the shared part once a block.
    """
    if vectors.ndim != 2:
        raise UserError(f"vectors of shape {list(vectors.shape)}", "[n_blocks, d_model], one vector a block")
    steps = torch.diff(vectors.detach().float().cpu(), dim=0, prepend=torch.zeros(1, vectors.shape[1]))
    return tuple(Add(Direction(step, f"{ref}[{i}] incremental".strip()), i, coef, positions) for i, step in enumerate(steps))


def to_config(intervention: Intervention) -> dict[str, Any]:
    """An intervention as a plain dict for a config file or a manifest; a direction is named by ref, sha256 and norm."""
    kind = getattr(intervention, "kind", None)
    if kind not in KINDS:
        raise TypeError(f"{type(intervention).__name__} is not an intervention that can be written to a config")
    out: dict[str, Any] = {"type": kind}
    for name in (field.name for field in fields(KINDS[kind])):
        value = getattr(intervention, name)
        if isinstance(value, Direction):
            out["direction"] = {"ref": value.ref, "sha256": value.sha256, "norm": value.norm, "d_model": value.d_model}
        elif name == "dictionary":
            out["dictionary"] = {"ref": value.ref}
        else:
            out[name] = value
    return out


def from_config(
    config: Mapping[str, Any],
    resolve: Callable[[str], Direction],
    resolve_dictionary: Callable[[str], Dictionary] | None = None,
) -> Intervention:
    """Reads back what `to_config` wrote.

    Args:
        config: the dict.
        resolve: gives the direction for a ref.
        resolve_dictionary: gives the dictionary for a ref; needed for AddFeature, Clamp and Reconstruct alone.

    Raises: UserError for an unknown type, missing or unknown fields, or a direction whose content is not the one written down.
    """
    given = dict(config)
    kind = given.pop("type", None)
    if kind not in KINDS:
        raise UserError(f"intervention type {kind!r}", "one of " + ", ".join(KINDS))
    try:
        if "direction" in given:
            noted = given["direction"]
            direction = resolve(noted["ref"])
            if direction.sha256 != noted.get("sha256", direction.sha256):
                raise UserError(
                    f"direction {noted['ref']!r} has sha256 {direction.sha256[:12]}, the config says {noted['sha256'][:12]}",
                    "the vector that the config was made with",
                    "point the ref at that file, or write the config anew",
                )
            given["direction"] = direction
        if "dictionary" in given:
            if resolve_dictionary is None:
                raise UserError(f"an intervention of type {kind!r} needs a dictionary", "resolve_dictionary")
            given["dictionary"] = resolve_dictionary(given["dictionary"]["ref"])
        return KINDS[kind](**given)
    except (TypeError, KeyError) as error:
        raise UserError(f"config of an intervention of type {kind!r}: {error}", "the fields that to_config writes") from error


def _not_finite(name: str, value: float) -> str | None:
    return None if abs(value) < float("inf") else f"{name} is {value}"


def _feature_problem(dictionary: Dictionary, index: int) -> str | None:
    d_sae = dictionary.W_dec.shape[0]
    if not 0 <= index < d_sae:
        return f"feature {index} of a dictionary with {d_sae} features (0..{d_sae - 1})"
    if not bool(torch.isfinite(dictionary.W_dec[index]).all()):
        return f"feature {index} has decoder values that are NaN or infinite"
    return None


KINDS: dict[str, Any] = {cls.kind: cls for cls in (Add, Ablate, Cap, AddFeature, Clamp, Reconstruct)}
