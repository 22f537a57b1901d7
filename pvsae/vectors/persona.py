"""Persona vectors: the type, its file, and the one block convention.

Knows: that row b of a vector tensor belongs to the residual after block b (`blocks.{b}.hook_resid_post`, counted from 0), how
the tensors and their story are stored (safetensors, metadata as JSON), and which blocks may be used.
Does not know: how vectors are computed (extract.py), how other tools number layers (formats.py), what a model is beyond
`n_blocks` and `d_model`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from pvsae.errors import UserError

if TYPE_CHECKING:
    from pvsae.models.interventions import Add, Direction

STATISTICS = ("prompt_avg_diff", "response_avg_diff", "prompt_last_diff")
"""Mean over prompt tokens, mean over answer tokens, last prompt token; each pos mean minus neg mean (paper, section 2.2)."""

DEFAULT_STATISTIC = "response_avg_diff"
BLOCK_CONVENTION = "row b is the residual stream after block b, counted from 0: blocks.{b}.hook_resid_post = hidden_states[b + 1]"
_FORMAT = "pvsae.persona_vectors"
_FORMAT_VERSION = 1


class ModelShape(Protocol):
    """All that vectors need to know of a model to be compared with it."""

    @property
    def n_blocks(self) -> int: ...
    @property
    def d_model(self) -> int: ...


def _validated(name: str, tensor: Tensor, missing: tuple[int, ...]) -> Tensor:
    """fp32 copy on the CPU, or UserError when the shape is wrong or a usable row is not finite."""
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise UserError(
            f"{name} has shape {list(tensor.shape)}", "a [n_blocks, d_model] tensor", "extract the vectors again (pvsae extract)"
        )
    tensor = tensor.detach().to(device="cpu", dtype=torch.float32).contiguous()
    bad = [b for b in (~torch.isfinite(tensor).all(dim=1)).nonzero().flatten().tolist() if b not in missing]
    if bad:
        raise UserError(
            f"{name} holds NaN or infinite numbers at block(s) {_short(bad)}",
            "finite numbers in every row",
            "load the model in bfloat16 or float32 (float16 overflows in some models) and extract again",
        )
    return tensor


def _short(items: list[int], limit: int = 8) -> str:
    shown = ", ".join(map(str, items[:limit]))
    return shown if len(items) <= limit else f"{shown}, ... ({len(items)} in all)"


@dataclass
class PersonaVectors:
    """The persona vectors of one trait on one model.

    Attributes:
        trait: the trait's name (its adjective, e.g. "sycophantic").
        vectors: statistic name -> Float["n_blocks d_model"], fp32 on the CPU, not normalised (its norm at a block is the distance
            between the pos and the neg mean there). Rows of `missing_blocks` are NaN.
        meta: how they came about; plain JSON values. `meta["missing_blocks"]` maps a block number (as a string) to the reason
            why the vectors have no usable row there (foreign files only).
        extra: further tensors that came with a foreign file and are no block's residual; kept, never steered with.
    """

    trait: str
    vectors: dict[str, Float[Tensor, "n_blocks d_model"]]
    meta: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.vectors:
            raise UserError(
                f"no vectors for trait {self.trait!r}", f"at least one of {', '.join(STATISTICS)}", "extract them first"
            )
        unknown = sorted(set(self.vectors) - set(STATISTICS))
        if unknown:
            raise UserError(f"unknown statistic {unknown[0]!r}", f"one of {', '.join(STATISTICS)}")
        missing = self.missing_blocks
        self.vectors = {name: _validated(f"{self.trait}/{name}", self.vectors[name], tuple(missing)) for name in self.statistics}
        shapes = {name: tuple(v.shape) for name, v in self.vectors.items()}
        if len(set(shapes.values())) > 1:
            raise UserError(
                f"the statistics of {self.trait!r} differ in shape: {shapes}", "one shape [n_blocks, d_model] for all"
            )

    @property
    def statistics(self) -> tuple[str, ...]:
        """The statistics present, in the order of STATISTICS."""
        return tuple(s for s in STATISTICS if s in self.vectors)

    @property
    def n_blocks(self) -> int:
        return next(iter(self.vectors.values())).shape[0]

    @property
    def d_model(self) -> int:
        return next(iter(self.vectors.values())).shape[1]

    @property
    def missing_blocks(self) -> dict[int, str]:
        """Block -> why the vectors hold no usable row there. Empty for vectors that this package extracted."""
        return {int(b): str(why) for b, why in self.meta.get("missing_blocks", {}).items()}

    @property
    def diagnostics(self) -> dict[str, dict[str, list[float | None]]]:
        """Per statistic: lists of n_blocks numbers (norm, half-split cosines, bootstrap intervals); {} for foreign files."""
        return self.meta.get("diagnostics", {})

    def of(self, statistic: str = DEFAULT_STATISTIC) -> Float[Tensor, "n_blocks d_model"]:
        """All rows of one statistic. UserError if these vectors do not have it."""
        if statistic not in self.vectors:
            raise UserError(
                f"the vectors of {self.trait!r} have no statistic {statistic!r}", f"one of {', '.join(self.statistics)}"
            )
        return self.vectors[statistic]

    def norms(self, statistic: str = DEFAULT_STATISTIC) -> Float[Tensor, " n_blocks"]:
        """Euclidean norm a block; NaN at missing blocks."""
        return self.of(statistic).norm(dim=1)

    def check_block(self, block: int) -> int:
        """The block, or UserError when it does not exist or holds no usable row. Negative numbers are refused, not wrapped."""
        if isinstance(block, bool) or not isinstance(block, int) or not 0 <= block < self.n_blocks:
            raise UserError(
                f"block {block!r} does not exist in the vectors of {self.trait!r}",
                f"a block index from 0 to {self.n_blocks - 1} (counted from 0; the paper's layer L is block L - 1)",
            )
        if block in self.missing_blocks:
            raise UserError(
                f"the vectors of {self.trait!r} cannot be used at block {block}: {self.missing_blocks[block]}",
                f"another block, 0 to {self.n_blocks - 1} without {_short(sorted(self.missing_blocks))}",
                "choose an earlier block, or extract the vectors with this package, which reads it before the final norm",
            )
        return block

    def direction(self, block: int, statistic: str = DEFAULT_STATISTIC) -> Direction:
        """The raw (unnormalised) vector at one block, ready for an intervention or a projection.

        Raises UserError for a block or a statistic that these vectors do not have.
        """
        from pvsae.models.interventions import Direction

        values = self.of(statistic)[self.check_block(block)]
        return Direction(values.clone(), ref=f"{self.trait}/{statistic}/block{block}")

    def incremental(self, coef: float = 1.0, positions: str = "all", statistic: str = DEFAULT_STATISTIC) -> tuple[Add, ...]:
        """The multi-layer form of steering: v_b - v_(b-1) added at every block, so that the effects sum to one vector.

        Stops before the first missing block (paper, appendix on multi-layer steering).
        """
        from pvsae.models.interventions import incremental

        end = min(self.missing_blocks, default=self.n_blocks)
        return incremental(self.of(statistic)[:end], coef, positions, ref=f"{self.trait}/{statistic}")

    def check_model(self, model: ModelShape) -> PersonaVectors:
        """Self, or UserError when the vectors cannot belong to this model (another width or depth)."""
        ours, theirs = (self.n_blocks, self.d_model), (model.n_blocks, model.d_model)
        if ours != theirs:
            source = self.meta.get("model", {}).get("name", "an unnamed model")
            raise UserError(
                f"the vectors of {self.trait!r} (from {source}) have n_blocks={ours[0]}, d_model={ours[1]}; "
                f"this model has n_blocks={theirs[0]}, d_model={theirs[1]}",
                "vectors extracted from a model of the same shape",
                "extract vectors from this model (pvsae extract --model ...)",
            )
        return self

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file (atomic): a tensor a statistic, `extra/NAME`, and the metadata as JSON."""
        from safetensors.torch import save

        from pvsae.runs import atomic_write_bytes

        tensors = {name: self.vectors[name] for name in self.statistics}
        tensors |= {f"extra/{name}": value.contiguous() for name, value in self.extra.items()}
        meta = {"trait": self.trait, "block_convention": BLOCK_CONVENTION, **self.meta}
        header = {"format": _FORMAT, "format_version": str(_FORMAT_VERSION), "pvsae": json.dumps(meta, ensure_ascii=False)}
        path = Path(path)
        atomic_write_bytes(path, save(tensors, metadata=header))
        return path

    @classmethod
    def load(cls, path: str | Path) -> PersonaVectors:
        """Read what `save` wrote. UserError when the file is missing, is no such file, or holds wrong shapes or NaN."""
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        fix = "give the .safetensors file that `pvsae extract` wrote; official .pt files are read by read_official"
        if not path.is_file():
            raise UserError(f"no vector file at {path}", "an existing .safetensors file", fix)
        try:
            with safe_open(str(path), framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (safe_open is no mapping)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read as safetensors ({error})", "a whole safetensors file", fix) from error
        if header.get("format") != _FORMAT:
            raise UserError(
                f"{path} is a safetensors file, but not one of persona vectors", f"format {_FORMAT!r} in its header", fix
            )
        if int(header.get("format_version", "0")) > _FORMAT_VERSION:
            raise UserError(f"{path} has format version {header['format_version']}", f"at most {_FORMAT_VERSION}", "update pvsae")
        meta = json.loads(header["pvsae"])
        trait = meta.pop("trait")
        extra = {name.removeprefix("extra/"): t for name, t in tensors.items() if name.startswith("extra/")}
        return cls(trait, {n: t for n, t in tensors.items() if not n.startswith("extra/")}, meta, extra)
