"""What is left of a trait's vector when the vectors of other traits are taken out of it.

Knows: sets of persona vectors of one model. Does not know: what is read, steered or screened along them.

Vectors of different traits share a good part: each points from a model that was told to suppress something to one that shows
something. A projection along one of them is therefore in part a projection along any of them, and data that show one trait lie
along every trait's vector. The specific part has a projection of zero on all the others. It is no part of the paper's method;
what it does for foretelling is measured in `analyses/finetuning_shift.py` and `analyses/projection_difference.py`. (Fitting all
vectors at once gives the same numbers up to a factor: the coefficient of v in a least-squares fit of x on all of them is
x . s / |s|^2 for the specific part s of v, and what `pvsae drift` calls joint.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from pvsae.errors import UserError
from pvsae.vectors.persona import PersonaVectors

_FP32 = 1e-6  # singular values below this share of the largest are rounding: vectors are kept in fp32


def specific_rows(
    rows: Float[Tensor, "n_blocks d_model"], others: Sequence[Float[Tensor, "n_blocks d_model"]]
) -> Float[Tensor, "n_blocks d_model"]:
    """rows less their orthogonal projection on the span of the others' rows, block by block; computed in fp64, given in fp32.

    Others may depend on each other linearly, to the precision of fp32. Without others the rows are what they were. A block at
    which a row is not finite (foreign files do not have all blocks) is NaN.
    """
    left = rows.detach().double().clone()
    for block in range(len(left)):
        basis = torch.stack([other[block] for other in others]).double() if others else left.new_empty(0, left.shape[1])
        basis = torch.nn.functional.normalize(basis, dim=1)
        if not (torch.isfinite(basis).all() and torch.isfinite(left[block]).all()):
            left[block] = torch.nan
        elif len(basis):
            fit = torch.linalg.lstsq(basis.T, left[block, :, None], rcond=_FP32, driver="gelsd").solution[:, 0]
            left[block] -= basis.T @ fit
    return left.float()


def specific(vectors: Mapping[str, PersonaVectors], trait: str, against: Sequence[str] | None = None) -> PersonaVectors:
    """The specific part of one trait's vectors, of every statistic that all have.

    Args:
        vectors: trait -> its vectors, all of one model.
        against: the traits that are taken out; None for all others.

    Returns:
        vectors of the same trait; `meta["specific"]` holds what was taken out and the share of the squared length that is left,
        a list of n_blocks numbers a statistic.

    Raises:
        UserError: a trait that is not there, nothing to take out, the trait itself among the others, other shapes, no statistic
            that all have.
    """
    others = [name for name in vectors if name != trait] if against is None else list(dict.fromkeys(against))
    for name in (trait, *others):
        if name not in vectors:
            raise UserError(f"no vectors of {name!r}", f"one of {', '.join(sorted(vectors))}")
    if trait in others:
        raise UserError(f"{trait!r} is among what is to be taken out of it", "other traits")
    if not others:
        wanted = "vectors of at least one other trait"
        raise UserError(f"nothing to take out of {trait!r}", wanted, "pvsae extract --traits ... in the same run")
    own = vectors[trait]
    for name in others:
        vectors[name].check_model(own)
    shared = [s for s in own.statistics if all(s in vectors[name].statistics for name in others)]
    if not shared:
        raise UserError(f"no statistic is in the vectors of {trait!r} and of all of {', '.join(others)}", "files of one kind")
    parts = {s: specific_rows(own.of(s), [vectors[name].of(s) for name in others]) for s in shared}
    left = {s: _share(part, own.of(s)) for s, part in parts.items()}
    meta = {name: value for name, value in own.meta.items() if name != "diagnostics"}  # those are of the whole vectors
    theirs = {b: f"{name!r}: {why}" for name in others for b, why in vectors[name].missing_blocks.items()}
    missing = {str(b): why for b, why in sorted((theirs | own.missing_blocks).items())}
    if missing:
        meta["missing_blocks"] = missing
    return PersonaVectors(trait, parts, {**meta, "specific": {"against": others, "share": left}})


def _share(part: Float[Tensor, "n_blocks d_model"], whole: Float[Tensor, "n_blocks d_model"]) -> list[float | None]:
    found = (part.norm(dim=1) / whole.norm(dim=1)).square()
    return [float(share) if torch.isfinite(share) else None for share in found]


def shares(parts: Sequence[PersonaVectors], statistic: str) -> pd.DataFrame:
    """A row a trait and block of specific parts: norm, share of the whole vector's squared length that is left, cosine with it
    (the root of the share). Blocks without a vector are left out."""
    rows = []
    for part in parts:
        norms = part.norms(statistic).tolist()
        for block, share in enumerate(part.meta["specific"]["share"][statistic]):
            if share is not None:
                rows.append({"trait": part.trait, "block": block, "norm": norms[block], "share": share, "cosine": share**0.5})
    return pd.DataFrame(rows, columns=["trait", "block", "norm", "share", "cosine"])
