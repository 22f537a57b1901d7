"""Persona vectors in other tools' files. The only place that knows other layer numbers.

Knows, of the released code's `.pt` files: one raw float32 tensor [n_layers + 1, d_model] a statistic; row L is
`hidden_states[L]`, so row 0 is the embedding, row L >= 1 the output of block L - 1, and the last row stands after the final norm,
so it is not the residual of the last block and is never given out as one. Of llama.cpp's control vectors: GGUF, architecture
"controlvector", one-dimensional float32 tensors `direction.N`, N >= 1, each added to the output of block N counted from 0
(block 0 cannot be steered there). The files of repeng and of EasySteer have the same layout.
Does not know: how vectors are made or used.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from pvsae.errors import UserError
from pvsae.vectors.persona import DEFAULT_STATISTIC, STATISTICS, PersonaVectors

POST_NORM = "the official file's last row is taken after the final norm, so it is not this block's residual"
_ARCH = "controlvector"
_DIRECTION = re.compile(r"^direction\.(\d+)$")


# --------------------------------------------------------------------------------------------- the released code's .pt files
def read_official(path: str | Path, trait: str | None = None, statistic: str | None = None) -> PersonaVectors:
    """Read one official file as vectors over blocks: row L becomes block L - 1.

    The last block has no usable row (see the module's head): it is NaN, listed in `missing_blocks`, and refused by `direction`.
    Row 0 and the last row are kept as they are in `extra` ("embedding/STATISTIC", "post_norm/STATISTIC").

    Args:
        trait, statistic: None takes them from the file's name, TRAIT_STATISTIC.pt.

    Raises:
        UserError: no such file, a file that holds more than a tensor (it is never unpickled), a wrong shape, or NaN.
    """
    path = Path(path)
    named_trait, named_statistic = _parse_name(path.stem)
    trait, statistic = trait or named_trait, statistic or named_statistic
    if trait is None or statistic is None:
        raise UserError(
            f"{path.name} does not say which trait and statistic it holds",
            f"a name such as evil_{DEFAULT_STATISTIC}.pt", "pass trait= and statistic=",
        )  # fmt: skip
    rows = _read_tensor(path)
    n_blocks = rows.shape[0] - 1
    body = torch.cat([rows[1:-1], torch.full((1, rows.shape[1]), float("nan"))])
    meta = {
        "source": {"format": "official .pt", "file": path.name, "rows": rows.shape[0], "conversion": "row L -> block L - 1"},
        "missing_blocks": {str(n_blocks - 1): POST_NORM},
    }
    extra = {f"embedding/{statistic}": rows[0].clone(), f"post_norm/{statistic}": rows[-1].clone()}
    return PersonaVectors(trait, {statistic: body}, meta, extra)


def read_official_set(folder: str | Path, trait: str) -> PersonaVectors:
    """All statistics of a trait that a folder has, as one PersonaVectors. UserError if it has none."""
    paths = {s: Path(folder) / f"{trait}_{s}.pt" for s in STATISTICS}
    read = [read_official(path, trait, s) for s, path in paths.items() if path.is_file()]
    if not read:
        raise UserError(f"no official vector file of {trait!r} in {folder}", " or ".join(p.name for p in paths.values()))
    vectors = {s: v for one in read for s, v in one.vectors.items()}
    extra = {name: value for one in read for name, value in one.extra.items()}
    meta = {**read[0].meta, "source": {**read[0].meta["source"], "file": [one.meta["source"]["file"] for one in read]}}
    return PersonaVectors(trait, vectors, meta, extra)


def write_official(vectors: PersonaVectors, folder: str | Path, *, fill: float = float("nan")) -> list[Path]:
    """Write TRAIT_STATISTIC.pt files: block b becomes row b + 1, for all blocks but the last.

    Row 0 (embedding) and the last row (after the final norm) are no block's residual. They are written where they are known
    (`extra`: extract with official_ends=True, or vectors that were read from official files); otherwise they are filled with
    `fill` and a warning says so. NaN, the default, makes a tool that steers with such a row fail loudly; 0 makes it do nothing.
    """
    from pvsae.runs import atomic_path

    paths, unknown = [], []
    for statistic in vectors.statistics:
        body = vectors.of(statistic)
        blank = torch.full((vectors.d_model,), fill)
        ends = [vectors.extra.get(f"{which}/{statistic}") for which in ("embedding", "post_norm")]
        if any(end is None for end in ends):
            unknown.append(statistic)
        first, last = (blank if end is None else end.float() for end in ends)
        rows = torch.cat([first[None], body[:-1], last[None]]).contiguous()
        paths.append(Path(folder) / f"{vectors.trait}_{statistic}.pt")
        with atomic_path(paths[-1]) as tmp:
            torch.save(rows, tmp)
    if unknown:
        warnings.warn(
            f"row 0 and row {vectors.n_blocks} of the official files hold {fill} for {', '.join(unknown)}: the embedding "
            "and the state after the final norm are no block's residual (extract with official_ends=True to have them)",
            stacklevel=2,
        )
    return paths


def _parse_name(stem: str) -> tuple[str | None, str | None]:
    for statistic in STATISTICS:
        if stem.endswith(f"_{statistic}"):
            return stem.removesuffix(f"_{statistic}"), statistic
    return None, None


def _read_tensor(path: Path) -> Float[Tensor, "n_rows d_model"]:
    expected = "one raw float tensor [n_layers + 1, d_model], saved by torch.save"
    if not path.is_file():
        raise UserError(f"no vector file at {path}", "an existing .pt file")
    try:
        rows = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path} cannot be read as a tensor ({reason:.200})", expected, "files that need unpickling of code are never loaded"
        ) from error
    if not isinstance(rows, Tensor):
        raise UserError(f"{path} holds a {type(rows).__name__}", expected)
    if rows.ndim != 2 or rows.shape[0] < 3 or not rows.is_floating_point():
        raise UserError(f"{path} holds a tensor of shape {list(rows.shape)}, {rows.dtype}", expected)
    return rows.float()


# ------------------------------------------------------------------------------------------------ llama.cpp's control vectors
def write_gguf(
    vectors: PersonaVectors,
    path: str | Path,
    blocks: Sequence[int] | Literal["incremental"],
    *,
    statistic: str = DEFAULT_STATISTIC,
    coef: float = 1.0,
) -> Path:
    """Write a llama.cpp control vector (`--control-vector FILE`), read by repeng and EasySteer too.

    Args:
        blocks: the blocks to steer, mostly one, raw vectors times `coef`. llama.cpp adds every direction of the file, so several
            raw vectors add up to several vectors. "incremental" writes v_b - v_(b-1) for every block (v_1 whole at block 1), so
            that after each block the sum is one vector.
        coef: written into the values; llama.cpp's own scale multiplies it (`--control-vector-scaled`).

    Raises:
        UserError: block 0 (llama.cpp has no direction there), a missing block, no block, or the gguf package is not installed.
    """
    gguf = _gguf()
    rows = vectors.of(statistic)
    if blocks == "incremental":
        end = min(vectors.missing_blocks, default=vectors.n_blocks)
        directions = {b: rows[b] - (rows[b - 1] if b > 1 else 0) for b in range(1, end)}
    else:
        directions = {vectors.check_block(int(b)): rows[int(b)] for b in blocks}
    if 0 in directions or not directions:
        raise UserError(
            "llama.cpp cannot steer block 0" if directions else "no block to write",
            f"blocks from 1 to {vectors.n_blocks - 1}", "choose a later block",
        )  # fmt: skip
    from pvsae.runs import atomic_path

    path = Path(path)
    model = vectors.meta.get("model", {})
    with atomic_path(path) as tmp:
        writer = gguf.GGUFWriter(str(tmp), _ARCH)
        writer.add_string(f"{_ARCH}.model_hint", str(model.get("model_type") or model.get("name") or "unknown"))
        writer.add_uint32(f"{_ARCH}.layer_count", len(directions))
        writer.add_string(
            f"{_ARCH}.method", f"persona vector, {statistic}, {'incremental' if blocks == 'incremental' else 'raw'}"
        )
        writer.add_string(f"{_ARCH}.trait", vectors.trait)
        for block, values in sorted(directions.items()):
            writer.add_tensor(f"direction.{block}", (coef * values).float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path


def read_gguf(path: str | Path) -> dict[int, Float[Tensor, " d_model"]]:
    """Block -> direction of a llama.cpp control vector file, fp32.

    Raises:
        UserError: no GGUF file, another architecture, or tensors that llama.cpp itself would refuse (direction.0, other names,
            other types than float32, more than one dimension, different lengths, NaN).
    """
    import numpy as np

    gguf = _gguf()
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no control vector file at {path}", "an existing .gguf file")
    try:
        reader = gguf.GGUFReader(str(path))
        field = reader.get_field("general.architecture")
        architecture = bytes(field.parts[field.data[0]]).decode() if field else None
    except (ValueError, IndexError, OSError, KeyError) as error:
        raise UserError(f"{path} cannot be read as GGUF ({error})", "a whole .gguf file") from error
    if architecture != _ARCH:
        raise UserError(
            f"{path} is a GGUF file of architecture {architecture!r}", f"{_ARCH!r}", "give a control vector, not a model"
        )
    directions: dict[int, Tensor] = {}
    for tensor in reader.tensors:
        match = _DIRECTION.match(tensor.name)
        problem = _gguf_problem(tensor, match, directions, gguf)
        if problem or match is None:
            raise UserError(f"{path}: tensor {tensor.name!r} {problem}", "float32 tensors direction.N of one length, N >= 1")
        directions[int(match[1])] = torch.from_numpy(np.array(tensor.data, dtype=np.float32))
    if not directions:
        raise UserError(f"{path} holds no direction", "tensors direction.N, N >= 1")
    return dict(sorted(directions.items()))


def _gguf_problem(tensor: Any, match: re.Match[str] | None, seen: dict[int, Tensor], gguf: Any) -> str | None:
    if match is None:
        return "is no direction"
    if int(match[1]) == 0:
        return "is of block 0, which llama.cpp cannot steer"
    if tensor.tensor_type != gguf.GGMLQuantizationType.F32:
        return f"has type {tensor.tensor_type.name}"
    if len(tensor.shape) != 1:
        return f"has shape {[int(n) for n in tensor.shape]}"
    if any(len(d) != tensor.shape[0] for d in seen.values()):
        return f"has length {int(tensor.shape[0])}, unlike the others"
    return None if bool(torch.isfinite(torch.tensor(tensor.data)).all()) else "holds NaN or infinite numbers"


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise UserError("the gguf package is not installed", "", "pip install 'pvsae[gguf]'") from error
    return gguf
