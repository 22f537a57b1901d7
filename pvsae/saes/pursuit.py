"""Sparse coding of one vector on a decoder's rows: orthogonal matching pursuit, signed and non-negative.

Knows: rows of a decoder, however large and wherever they lie; vectors.
Does not know: encoders, models, what a vector means.

The atoms are the rows brought to unit length. Each step takes the atom that the residual correlates with most (with the sign that
the mode allows), then fits the weights of all atoms taken so far anew: by least squares, or by non-negative least squares, where
atoms whose weight becomes 0 leave again (Bruckstein, Elad, Zibulevsky 2008).

What is slow is to read the decoder, so a step mostly does not: the residual is v minus a sum of atoms, and its correlations are
those of v minus the same sum of the atoms' Gram columns. One pass over the rows makes the columns of many atoms at once, those
that stand highest at that moment, and the exact correlations of the residual beside them; further passes come only when an
atom is taken that was not among them. What is taken is the same as with a pass a step, up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pvsae.errors import UserError

CHUNK_BYTES = 64 * 2**20  # of one fp32 copy of some rows
AHEAD = 32  # Gram columns made in one pass: reading the rows then costs about as much as multiplying them
ENOUGH = 1e-6  # residual over |v| below which nothing but rounding is left
NEW = 1e-5  # an atom whose distance to the span of those taken is less than this adds nothing


@dataclass(frozen=True)
class Solution:
    """Some atoms and their weights.

    Attributes:
        latents: in the order in which they were taken.
        weights: of the unit atoms, in the units of v; the length that each atom contributes.
        explained: share of |v|^2 that their sum explains, 1 - |v - sum|^2 / |v|^2.
    """

    latents: tuple[int, ...]
    weights: tuple[float, ...]
    explained: float

    @property
    def residual(self) -> float:
        """|v - sum| / |v|."""
        return max(0.0, 1.0 - self.explained) ** 0.5


@dataclass(frozen=True)
class Pursuit:
    """All steps of one pursuit, `steps[i]` after i + 1 refits, and how many passes over the rows they took."""

    nonnegative: bool
    steps: tuple[Solution, ...]
    passes: int

    def at_most(self, k: int) -> Solution:
        """The solution with at most k atoms that explains most; with none, nothing."""
        return max((s for s in self.steps if len(s.latents) <= k), key=lambda s: s.explained, default=Solution((), (), 0.0))


class Atoms:
    """Rows of a decoder [d_sae d_model] as unit atoms, read in chunks; remembers their lengths and the Gram columns made so far.

    Rows of length 0 are no atoms. A pursuit of another vector, or in the other mode, finds the columns of the earlier ones.
    """

    def __init__(self, rows: Float[Tensor, "d_sae d_model"], *, columns: int = 256) -> None:
        """Reads all rows once, for their lengths.

        Args:
            rows: in any floating dtype, memory-mapped or not, contiguous or a transposed view.
            columns: Gram columns that are remembered, 4 bytes times d_sae each.

        Raises: UserError for rows that are not finite, or none that has a length.
        """
        self.rows, self.passes, self._most = rows, 0, columns
        self._columns: dict[int, Float[Tensor, " d_sae"]] = {}
        self.norms = torch.empty(len(rows), device=rows.device)
        for some in self._chunks():
            found = self._read(some)
            # A transposed view (of dictionary_learning's files) is summed the way it lies: a fifth of the time.
            self.norms[some] = torch.linalg.vector_norm(found, dim=1) if found.is_contiguous() else found.T.square().sum(0).sqrt()
        if not bool(torch.isfinite(self.norms).all()):
            bad = int((~torch.isfinite(self.norms)).nonzero()[0])
            raise UserError(f"decoder row {bad} has values that are NaN or infinite", "finite rows", "the file is damaged")
        if not bool((self.norms > 0).any()):
            raise UserError("all rows of the decoder are zero", "a trained dictionary")
        self._scale = torch.where(self.norms > 0, 1 / self.norms, 0.0)

    def unit(self, latents: Sequence[int]) -> Float[Tensor, "n d_model"]:
        """Unit atoms in fp64 on the CPU."""
        index = torch.tensor(list(latents), dtype=torch.long, device=self.rows.device)
        found = self.rows[index].double().cpu()
        return found / torch.linalg.vector_norm(found, dim=1, keepdim=True).clamp(min=1e-300)

    def correlations(self, x: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_sae"]:
        """Inner products of vectors with every unit atom, fp32, in one pass over the rows."""
        self.passes += 1
        x = x.to(self.rows.device, torch.float32)
        out = torch.empty(len(x), len(self.rows), device=self.rows.device)
        for some in self._chunks():
            torch.matmul(x, self._read(some).T, out=out[:, some])
        return out.mul_(self._scale)

    def column(self, latent: int) -> Float[Tensor, " d_sae"] | None:
        """Inner products of one atom with all, if they are known."""
        return self._columns.get(latent)

    def learn(self, residual: Float[Tensor, " d_model"], ahead: Sequence[int]) -> Float[Tensor, " d_sae"]:
        """Makes the columns of the atoms `ahead`; gives the correlations of a residual, which the same pass found."""
        new = [latent for latent in dict.fromkeys(ahead) if latent not in self._columns]
        old = [latent for latent in self._columns if latent not in set(ahead)]
        for latent in old[: max(0, len(self._columns) + len(new) - self._most)]:  # the oldest go first
            del self._columns[latent]
        found = self.correlations(torch.cat([residual.float().cpu()[None], self.unit(new).float()]))
        self._columns |= dict(zip(new, found[1:], strict=True))
        return found[0].clone()

    def _read(self, some: slice) -> Float[Tensor, "n d_model"]:
        return self.rows[some].float()

    def _chunks(self) -> Iterator[slice]:
        size = max(1, CHUNK_BYTES // (4 * self.rows.shape[1]))
        for start in range(0, len(self.rows), size):
            yield slice(start, min(start + size, len(self.rows)))


def pursue(atoms: Atoms, v: Float[Tensor, " d_model"], k: int, *, nonnegative: bool, ahead: int = AHEAD) -> Pursuit:
    """Orthogonal matching pursuit of v with at most k atoms.

    Ends earlier when the residual is nothing but rounding, or when no atom is left that it correlates with (with positive sign,
    in the non-negative mode).

    Raises: UserError for a vector of another length, of length 0 or not finite, or k below 1.
    """
    v = v.detach().double().cpu()
    length = float(v.norm())
    if v.shape != atoms.rows.shape[1:]:
        raise UserError(f"a vector of shape {list(v.shape)}", f"[{atoms.rows.shape[1]}], as the dictionary's rows are")
    if not 0 < length < float("inf"):
        raise UserError(f"a vector of length {length}", "a vector that points somewhere")
    if k < 1:
        raise UserError(f"k is {k}", "at least 1 atom")
    v = v / length
    before = atoms.passes
    exact = atoms.correlations(v[None])[0]  # of v minus the atoms of `base`
    base: dict[int, float] = {}
    support: dict[int, float] = {}
    dead = atoms.norms == 0
    refused = dead.clone()
    steps: list[Solution] = []
    residual = v
    while len(support) < k and float(residual.norm()) > ENOUGH:
        now = _updated(atoms, exact, base, support)
        if now is None:  # a column was forgotten
            base, exact = dict(support), atoms.learn(residual, list(support))
            now = exact.clone()
        score = (now if nonnegative else now.abs()).masked_fill(refused, -1.0)
        score[list(support)] = -1.0
        latent = int(score.argmax())
        if float(score[latent]) <= ENOUGH * 0.01:
            break
        if atoms.column(latent) is None:
            # The atoms that stand highest are those that will mostly be taken next, for little more than the price of this one.
            exact = atoms.learn(residual, [latent, *score.topk(min(ahead, len(score))).indices.tolist(), *support])
            base = dict(support)
            continue  # with exact correlations it may be another one
        fitted = _refit(atoms, v, [*support, latent], nonnegative)
        if fitted is None or latent not in fitted:
            refused[latent] = True  # it lies in the span of those taken, or correlates by rounding alone
            continue
        dropped, support = set(support) - set(fitted), fitted
        residual = v - torch.tensor(list(support.values()), dtype=torch.float64) @ atoms.unit(list(support))
        steps.append(Solution(tuple(support), tuple(w * length for w in support.values()), 1.0 - float(residual @ residual)))
        if dropped:
            refused = dead.clone()
    return Pursuit(nonnegative, tuple(steps), atoms.passes - before)


def _updated(
    atoms: Atoms, exact: Float[Tensor, " d_sae"], base: dict[int, float], support: dict[int, float]
) -> Float[Tensor, " d_sae"] | None:
    """Correlations of the residual of `support`, from those of the residual of `base`; None where a Gram column is missing."""
    now = exact.clone()
    for latent in dict.fromkeys((*base, *support)):
        change = support.get(latent, 0.0) - base.get(latent, 0.0)
        if change == 0.0:
            continue
        column = atoms.column(latent)
        if column is None:
            return None
        now.sub_(column, alpha=change)
    return now


def _refit(atoms: Atoms, v: Float[Tensor, " d_model"], latents: Sequence[int], nonnegative: bool) -> dict[int, float] | None:
    """Weights of the atoms that fit v best, those that are not 0; None where the last atom is a sum of the others."""
    matrix = atoms.unit(latents)
    gram, b = matrix @ matrix.T, matrix @ v
    if len(latents) > 1:
        others = matrix[:-1].T
        rest = matrix[-1] - others @ torch.linalg.lstsq(others, matrix[-1][:, None]).solution[:, 0]
        if float(rest.norm()) < NEW:
            return None
    weights = nonnegative_least_squares(gram, b) if nonnegative else torch.linalg.lstsq(matrix.T, v[:, None]).solution[:, 0]
    return {latent: float(w) for latent, w in zip(latents, weights, strict=True) if w != 0}


def nonnegative_least_squares(gram: Float[Tensor, "k k"], b: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
    """The x >= 0 that minimises x.gram.x / 2 - b.x, by Lawson and Hanson's active set (1974); gram is positive definite.

    Exact zeros stand for atoms that are out.
    """
    k = len(b)
    x = torch.zeros_like(b)
    free = torch.zeros(k, dtype=torch.bool)
    tolerance = 1e-12 * float(b.abs().max().clamp(min=1e-30))
    for _ in range(10 * k + 10):
        slope = (b - gram @ x).masked_fill(free, -1.0)
        best = int(slope.argmax())
        if float(slope[best]) <= tolerance:
            break
        free[best] = True
        while True:
            index: Int[Tensor, " n"] = free.nonzero()[:, 0]
            if len(index) == 0:
                break
            trial = torch.zeros_like(x)
            trial[index] = torch.linalg.solve(gram[index][:, index], b[index])
            low = free & (trial <= 0)
            if not bool(low.any()):
                x = trial
                break
            step = (x[low] / (x[low] - trial[low]).clamp(min=1e-300)).min()
            x = x + step * (trial - x)
            free &= x > tolerance
            x = x.masked_fill(~free, 0.0)
    return x
