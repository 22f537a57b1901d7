"""What a dictionary sees in two sets of answers: mean activations over answer tokens, firing rates, a paired test a latent.

Knows: models, answers in pairs, a dictionary, what is at one block. Does not know: why an answer is on one side or the other.

One forward pass a row; activations are summed where they arise, so that memory is that of a few numbers a latent and group and
not a row's. The groups, questions mostly, are the units of the test: answers to one question are not independent of each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from pvsae.errors import UserError
from pvsae.runs import read_json, write_json

if TYPE_CHECKING:
    import pandas as pd

    from pvsae.models import ChatModel, Rendered
    from pvsae.saes.dictionary import SAE

MEASURED = 8192  # tokens on which the variance explained is measured
COMPARED = 1024  # of them, tokens on which it is measured under other scales as well
# Scales to try: times 1, and times the one that makes activations as long as sqrt(d_model). The true one is then never further
# from one of them than a factor of 1.5, unless it lies beyond their ends.
STEPS, NEAR_UNIT = (1 / 32, 1 / 16, 0.125, 0.25, 0.5, 0.7, 1.0, 1.4, 2.0, 4.0, 8.0, 16.0, 32.0), (0.5, 0.7, 1.0, 1.4, 2.0)
MIN_GROUPS = 5  # a paired test of fewer says nothing after a correction for many latents


@dataclass
class Encodings:
    """Sums over both sides; side 0 is that of the trait, side 1 its opposite.

    Attributes:
        activation: mean over a group's rows of the row's mean activation over answer tokens, [2, n_groups, d_sae].
        firing: share of all answer tokens of a side at which a latent is active, [2, d_sae].
        highest: highest activation of each latent at any answer token, [d_sae].
        row_means: mean residual of every row's answer, [2, n_rows, d_model], in the order of the rows.
        tokens: answer tokens a side.
        outliers: of those, tokens that the dictionary is not made for; nothing is active there.
        median_norm: median length of a residual at an answer token, outliers left out.
        fvu: share of the residuals' variance that the dictionary does not explain, at MEASURED answer tokens at most (of rows
            spread evenly), outliers left out.
        scaled: the same at COMPARED of those tokens, were activations multiplied by a factor first: factor -> share. Factor 1 is
            among them, and the one that makes them as long as sqrt(d_model), to which some trainings scale.
    """

    activation: Float[Tensor, "2 n_groups d_sae"]
    firing: Float[Tensor, "2 d_sae"]
    highest: Float[Tensor, " d_sae"]
    row_means: Float[Tensor, "2 n_rows d_model"]
    tokens: tuple[int, int]
    outliers: int
    median_norm: float
    fvu: float
    scaled: dict[float, float]

    @property
    def difference(self) -> Float[Tensor, " d_sae"]:
        """Mean activation of side 0 minus that of side 1; every group counts the same."""
        return (self.activation[0] - self.activation[1]).mean(0)

    def table(self) -> pd.DataFrame:
        """A row a latent, those left out that were never active: latent, difference, mean_pos, mean_neg, firing_pos, firing_neg,
        highest, t, p, q (the false discovery rate at which it would be called, over all latents that were active)."""
        import pandas as pd

        alive = (self.highest > 0).nonzero()[:, 0]
        pos, neg = self.activation[:, :, alive].double()
        t, p = paired_t((pos - neg).numpy())
        return pd.DataFrame(
            {
                "latent": alive.numpy(),
                "difference": (pos - neg).mean(0).numpy(),
                "mean_pos": pos.mean(0).numpy(),
                "mean_neg": neg.mean(0).numpy(),
                "firing_pos": self.firing[0, alive].numpy(),
                "firing_neg": self.firing[1, alive].numpy(),
                "highest": self.highest[alive].numpy(),
                "t": t,
                "p": p,
                "q": false_discovery_rate(p),
            }
        )


def encode_pairs(
    model: ChatModel,
    sae: SAE,
    block: int,
    sides: tuple[Sequence[Rendered], Sequence[Rendered]],
    groups: Sequence[Any],
    *,
    batch_tokens: int = 4096,
    progress: str | None = None,
) -> Encodings:
    """Encodes the answers of both sides; row i of one pairs with row i of the other, and both belong to groups[i].

    Raises: UserError for sides that do not pair, no pair, a dictionary that does not fit the model.
    """
    from pvsae.models import Residual

    sae.check_model(model)
    n = len(groups)
    if not n or len(sides[0]) != n or len(sides[1]) != n:
        raise UserError(f"{len(sides[0])} and {len(sides[1])} answers in {n} pairs", "as many answers on both sides, and some")
    numbers = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    group = torch.tensor([numbers[g] for g in groups])
    counts = torch.bincount(group, minlength=len(numbers)).double()
    rows = [*sides[0], *sides[1]]
    sums = _Sums(sae, len(numbers), n, _measured([row.answer[1] - row.answer[0] for row in rows]))
    capture = Residual(block, "answer")
    for indices, found in model.capture_batches(rows, [capture], batch_tokens=batch_tokens, progress=progress):
        values = found[capture.key]
        assert isinstance(values, list)
        sums.add(torch.tensor(indices), group, values)
    return sums.finish(counts)


def encode_side(
    model: ChatModel,
    sae: SAE,
    block: int,
    rows: Sequence[Rendered],
    groups: Sequence[Any],
    *,
    batch_tokens: int = 4096,
    progress: str | None = None,
) -> Side:
    """Encodes answers of one side alone, where the other side is another model's; row i belongs to groups[i].

    Raises: UserError for no answer, one without tokens, a dictionary that does not fit the model.
    """
    from pvsae.models import Residual

    sae.check_model(model)
    if not rows or len(rows) != len(groups):
        raise UserError(f"{len(rows)} answers in {len(groups)} groups", "a group for each answer, and some")
    names = list(dict.fromkeys(groups))
    numbers = {group: i for i, group in enumerate(names)}
    group = torch.tensor([numbers[g] for g in groups])
    sums = _Sums(sae, len(names), len(rows), _measured([row.answer[1] - row.answer[0] for row in rows]))
    capture = Residual(block, "answer")
    for indices, found in model.capture_batches(rows, [capture], batch_tokens=batch_tokens, progress=progress):
        values = found[capture.key]
        assert isinstance(values, list)
        sums.add(torch.tensor(indices), group, values)
    done = sums.finish(torch.bincount(group, minlength=len(names)).double())
    return Side(
        done.activation[0].clone(), done.firing[0].clone(), done.highest, [str(n) for n in names], done.tokens[0], done.fvu
    )


@dataclass
class Side:
    """What a dictionary sees in the answers of one model.

    Attributes:
        activation: mean over a group's rows of the row's mean activation over answer tokens, [n_groups, d_sae].
        firing: share of answer tokens at which a latent is active, [d_sae].
        highest: highest activation of each latent, [d_sae].
        groups: names of the groups.
        tokens: answer tokens.
        fvu: share of the residuals' variance that the dictionary does not explain.
    """

    activation: Float[Tensor, "n_groups d_sae"]
    firing: Float[Tensor, " d_sae"]
    highest: Float[Tensor, " d_sae"]
    groups: list[str]
    tokens: int
    fvu: float

    def save(self, folder: Path) -> None:
        tensors = {"activation": self.activation, "firing": self.firing, "highest": self.highest}
        save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "side.safetensors")
        write_json(folder / "side.json", {"groups": self.groups, "tokens": self.tokens, "fvu": self.fvu})

    @staticmethod
    def load(folder: Path) -> Side:
        tensors, about = load_file(folder / "side.safetensors"), read_json(folder / "side.json")
        return Side(tensors["activation"], tensors["firing"], tensors["highest"], about["groups"], about["tokens"], about["fvu"])


def latent_diff(after: Side, before: Side) -> pd.DataFrame:
    """Which latents a finetuning moved: mean activation over answer tokens, `after` minus `before`, over the same groups.

    The two-model latent diff of model diffing. A benign finetune beside it says what any finetuning moves.

    Returns: a row a latent that is active on either side, by |difference|, largest first: latent, difference, mean_after,
        mean_before, firing_after, firing_before, highest, t, p, q (paired over groups; false discovery rate over those latents).

    Raises: UserError where the sides have other groups.
    """
    import pandas as pd

    if set(after.groups) != set(before.groups):
        raise UserError(
            f"{len(after.groups)} and {len(before.groups)} groups of answers on both sides", "answers to the same prompts"
        )
    order = [before.groups.index(group) for group in after.groups]
    highest = torch.maximum(after.highest, before.highest)
    alive = (highest > 0).nonzero()[:, 0]
    now, then = after.activation[:, alive].double(), before.activation[order][:, alive].double()
    t, p = paired_t((now - then).numpy())
    table = pd.DataFrame(
        {
            "latent": alive.numpy(),
            "difference": (now - then).mean(0).numpy(),
            "mean_after": now.mean(0).numpy(),
            "mean_before": then.mean(0).numpy(),
            "firing_after": after.firing[alive].numpy(),
            "firing_before": before.firing[alive].numpy(),
            "highest": highest[alive].numpy(),
            "t": t,
            "p": p,
            "q": false_discovery_rate(p),
        }
    )
    return table.sort_values("difference", key=abs, ascending=False, kind="stable", ignore_index=True)


class _Sums:
    """What is kept of the tokens seen so far. `measured` has the rows whose residuals are kept, and how many of each."""

    def __init__(self, sae: SAE, n_groups: int, n: int, measured: dict[int, int]) -> None:
        self.sae, self.n, self.n_groups, self.measured = sae, n, n_groups, measured
        self.activation = torch.zeros(2 * n_groups * sae.d_sae)
        self.fired = torch.zeros(2 * sae.d_sae)
        self.highest = torch.zeros(sae.d_sae)
        self.row_means = torch.zeros(2 * n, sae.d_model)
        self.tokens, self.outliers = [0, 0], 0
        self.norms: list[Tensor] = []
        self.kept: dict[int, Tensor] = {}

    def add(self, rows: Int[Tensor, " batch"], group: Int[Tensor, " n"], values: Sequence[Tensor]) -> None:
        lengths = torch.tensor([len(v) for v in values])
        if not bool((lengths > 0).all()):
            raise UserError("an answer without tokens", "answers of at least one token", "leave such rows out")
        x = torch.cat(list(values))
        owner = torch.repeat_interleave(torch.arange(len(rows)), lengths)
        self.row_means[rows] = torch.zeros(len(rows), x.shape[1]).index_add_(0, owner, x) / lengths[:, None]
        side = (rows >= self.n).long()
        for s in (0, 1):
            self.tokens[s] += int(lengths[side == s].sum())
        place = x.to(self.sae.device)
        left = self.sae.outliers(place).cpu()
        acts = self.sae.encode_sparse(place)
        token, latent, value = acts.token.cpu(), acts.latent.cpu(), acts.value.float().cpu()
        fine = ~left[token]
        token, latent, value = token[fine], latent[fine], value[fine]
        of_row = owner[token]
        where = (side[of_row] * self.n_groups + group[rows[of_row] % self.n]) * self.sae.d_sae + latent
        self.activation.index_add_(0, where, value / lengths[of_row])
        self.fired.index_add_(0, side[of_row] * self.sae.d_sae + latent, torch.ones_like(value))
        self.highest.scatter_reduce_(0, latent, value, "amax")
        self.outliers += int(left.sum())
        self.norms.append(torch.linalg.vector_norm(x[~left], dim=1))
        for row, part, out in zip(rows.tolist(), values, left.split(lengths.tolist()), strict=True):
            if row in self.measured:
                some = slice(self.measured[row])
                self.kept[row] = part[some][~out[some]].float()

    def finish(self, counts: Float[Tensor, " n_groups"]) -> Encodings:
        activation = self.activation.view(2, self.n_groups, self.sae.d_sae)
        norms = torch.cat(self.norms) if self.norms else torch.tensor([math.nan])
        x = torch.cat([self.kept[row] for row in sorted(self.kept)] or [norms.new_zeros(0, self.sae.d_model)])
        few = x[torch.linspace(0, max(0, len(x) - 1), min(len(x), COMPARED)).long()]
        unit = math.sqrt(self.sae.d_model) / max(float(norms.mean()), 1e-30)
        factors = sorted({*STEPS, *(step * unit for step in NEAR_UNIT)}) if len(x) else []
        tokens = torch.tensor(self.tokens, dtype=torch.float32)
        return Encodings(
            activation.div_(counts[None, :, None].float()),
            self.fired.view(2, -1) / tokens[:, None],
            self.highest,
            self.row_means.view(2, self.n, -1),
            (self.tokens[0], self.tokens[1]),
            self.outliers,
            float(norms.median()),
            _unexplained(self.sae, x),
            {factor: _unexplained(self.sae, few, factor) for factor in factors},
        )


def _measured(lengths: Sequence[int]) -> dict[int, int]:
    """Rows, and how many of their first tokens are measured: whole rows in an order that jumps about, up to MEASURED tokens.

    Rows are chosen, and not whatever comes first, so that batches of any size give the same number.
    """
    found, left = {}, MEASURED
    for row in np.random.default_rng(0).permutation(len(lengths)).tolist():
        if left <= 0:
            break
        found[row] = min(lengths[row], left)
        left -= found[row]
    return found


def _unexplained(sae: SAE, x: Float[Tensor, "n d_model"], factor: float = 1.0) -> float:
    """Share of the variance of x that the dictionary leaves, were it one of factor * x; NaN where x does not vary."""
    errors = 0.0
    for part in x.split(COMPARED):
        place = part.to(sae.device)
        errors += float((sae(place * factor) / factor - place).double().square().sum())
    variance = float((x.double() - x.double().mean(0)).square().sum()) if len(x) else 0.0
    return errors / variance if variance > 0 else math.nan


def units_of(questions: Sequence[Any]) -> tuple[list[Any], str]:
    """(a unit of the paired test for each pair, what the units are): its question, or where there are too few, the pair."""
    if len(set(questions)) >= MIN_GROUPS:
        return list(questions), "question"
    return list(range(len(questions))), "pair"


def paired_t(differences: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(t, two-sided p) of each column of differences [n_units, n_latents] against a mean of 0.

    A column without any spread has t 0 and p 1 where it is all zeros, and is NaN where there are fewer than two units.
    """
    n = len(differences)
    if n < 2:
        nothing = np.full(differences.shape[1], np.nan)
        return nothing, nothing.copy()
    mean = differences.mean(0)
    error = differences.std(0, ddof=1) / math.sqrt(n)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(mean == 0, 0.0, mean / error)
    return t, _two_sided(t, n - 1)


def _two_sided(t: NDArray[np.float64], degrees: int) -> NDArray[np.float64]:
    """Chance of |t| or more under Student's distribution: its finite series for whole degrees of freedom (Abramowitz and Stegun
    26.7.3 and 26.7.4). Correct to about 1e-15, so that smaller chances come out as 0 or as rounding; they are given as 1e-15."""
    angle = np.arctan(np.abs(t) / math.sqrt(degrees))
    cosine, sine = np.cos(angle), np.sin(angle)
    if degrees % 2:
        term, total = cosine.copy(), np.zeros_like(angle)
        for k in range(1, degrees, 2):
            total += term
            term = term * cosine**2 * (k + 1) / (k + 2)
        inside = 2 / math.pi * (angle + sine * total)
    else:
        term, total = np.ones_like(angle), np.zeros_like(angle)
        for k in range(0, degrees, 2):
            total += term
            term = term * cosine**2 * (k + 1) / (k + 2)
        inside = sine * total
    return np.clip(1 - inside, 1e-15, 1.0)


def false_discovery_rate(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """For each p the lowest rate at which Benjamini and Hochberg's procedure (1995) calls it; NaN where p is."""
    q = np.full(len(p), np.nan)
    known = np.flatnonzero(np.isfinite(p))
    order = known[np.argsort(p[known], kind="stable")]
    raw = p[order] * len(order) / np.arange(1, len(order) + 1)
    q[order] = np.minimum.accumulate(raw[::-1])[::-1].clip(max=1.0)
    return q
