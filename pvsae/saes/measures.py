"""Sums over a stream of residuals from which a dictionary's measures follow; nothing of the stream is kept.

Knows: variance, L0, densities, and how much two decoders agree.
Does not know: models, text, where residuals come from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from pvsae.errors import UserError
from pvsae.saes.dictionary import SAE, SparseActs

DECADES = (-7, 0)  # of the density histogram; what is rarer stands in its first bin
BINS_A_DECADE = 5


class Variance:
    """How well residuals are reconstructed, over one set of tokens."""

    def __init__(self) -> None:
        self.n = 0
        self._shift: Tensor | None = None
        self._sum: Tensor | None = None  # of x - shift, [d_model] fp64
        self._square = self._error = self._cosine = self._lengths = 0.0

    def add(self, x: Float[Tensor, "n d_model"], out: Float[Tensor, "n d_model"]) -> None:
        """Counts some residuals and their reconstructions."""
        if not len(x):
            return
        x, out = x.float(), out.float()
        if self._shift is None or self._sum is None:
            # The variance is a small difference of large sums where the mean is far from 0, unless it is taken near the mean.
            self._shift = x.mean(0)
            self._sum = torch.zeros_like(self._shift, dtype=torch.float64, device="cpu")
        centred, length = x - self._shift, torch.linalg.vector_norm(x, dim=-1)
        made = torch.linalg.vector_norm(out, dim=-1)
        self.n += len(x)
        self._sum += centred.sum(0).cpu().double()
        self._square += float(centred.square().sum(-1).double().sum())
        self._error += float((x - out).square().sum(-1).double().sum())
        self._cosine += float(((x * out).sum(-1) / (length * made).clamp(min=1e-30)).double().sum())
        self._lengths += float((made / length.clamp(min=1e-30)).double().sum())

    @property
    def mean(self) -> Float[Tensor, " d_model"]:
        """Mean residual. UserError before any was counted."""
        if self._shift is None or self._sum is None:
            raise UserError("no token was left to measure", "rows with tokens that the dictionary was made for")
        return self._shift.cpu() + (self._sum / self.n).float()

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained: sum |x - x_hat|^2 / sum |x - mean|^2, over all tokens and dimensions; NaN without."""
        if self._sum is None:
            return math.nan
        variance = self._square - float(self._sum.square().sum()) / self.n
        return self._error / variance if variance > 0 else math.nan

    def row(self) -> dict[str, float]:
        """Measures by name: tokens, fvu, explained_variance (1 - fvu), mse (a token), cosine, norm_ratio (|x_hat| / |x|)."""
        n = self.n or math.nan
        return {
            "tokens": self.n,
            "fvu": self.fvu,
            "explained_variance": 1 - self.fvu,
            "mse": self._error / n,
            "cosine": self._cosine / n,
            "norm_ratio": self._lengths / n,
        }


class Activity:
    """Which latents are active how often, and how many at once."""

    def __init__(self, d_sae: int) -> None:
        self.n, self.d_sae = 0, d_sae
        self.fired: Int[Tensor, " d_sae"] = torch.zeros(d_sae, dtype=torch.long)
        self._sums = torch.zeros(d_sae, dtype=torch.float64)
        self._highest = torch.zeros(d_sae)
        self._l0 = torch.zeros(0, dtype=torch.long)  # [l0] tokens with that many active latents

    def add(self, acts: SparseActs, n_tokens: int) -> None:
        """Counts the activations of some tokens."""
        latent, value = acts.latent.cpu(), acts.value.detach().float().cpu()
        self.n += n_tokens
        self.fired += torch.bincount(latent, minlength=self.d_sae)
        self._sums += torch.bincount(latent, weights=value.double(), minlength=self.d_sae)
        self._highest.scatter_reduce_(0, latent, value, "amax")
        l0 = torch.bincount(torch.bincount(acts.token.cpu(), minlength=n_tokens))
        longer = torch.zeros(max(len(l0), len(self._l0)), dtype=torch.long)
        longer[: len(self._l0)] += self._l0
        longer[: len(l0)] += l0 if n_tokens else 0
        self._l0 = longer

    @property
    def density(self) -> Float[Tensor, " d_sae"]:
        """Share of tokens at which each latent is active."""
        return self.fired / max(self.n, 1)

    def features(self) -> pd.DataFrame:
        """A row a latent: density, mean activation where active (NaN where never), highest activation."""
        fired = self.fired.numpy()
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = self._sums.numpy() / fired
        return pd.DataFrame(
            {"latent": range(self.d_sae), "density": self.density.numpy(), "mean_active": mean, "max": self._highest.numpy()}
        )

    def l0_table(self) -> pd.DataFrame:
        """A row an L0 that occurs: active latents, tokens."""
        where = self._l0.nonzero()[:, 0]
        return pd.DataFrame({"l0": where.numpy(), "tokens": self._l0[where].numpy()})

    def l0_summary(self) -> dict[str, float]:
        """Mean, standard deviation and quantiles of the number of active latents a token."""
        if not self.n:
            return dict.fromkeys(("mean", "std", "p05", "median", "p95", "max"), math.nan)
        counts, l0 = self._l0.double(), torch.arange(len(self._l0), dtype=torch.float64)
        mean = float((counts * l0).sum() / self.n)
        spread = math.sqrt(max(0.0, float((counts * (l0 - mean) ** 2).sum() / self.n)))
        below = counts.cumsum(0) / self.n
        at = {name: float((below < q - 1e-12).sum()) for name, q in (("p05", 0.05), ("median", 0.5), ("p95", 0.95))}
        return {"mean": mean, "std": spread, **at, "max": float(len(self._l0) - 1)}

    def density_table(self) -> pd.DataFrame:
        """Histogram of log10 density: a row a bin with low, high (log10) and latents; never active ones stand in none."""
        low, high = DECADES
        edges = np.linspace(low, high, (high - low) * BINS_A_DECADE + 1)
        alive = self.density[self.fired > 0].double().numpy()
        counts, _ = np.histogram(np.clip(np.log10(alive), low, high), edges)
        return pd.DataFrame({"low": edges[:-1], "high": edges[1:], "latents": counts})


@dataclass(frozen=True)
class Agreement:
    """How much of one dictionary another one has: for each latent, the highest cosine with any decoder row of the other.

    Attributes:
        best: [n] of each latent of the first (in the order of `latents`).
        latents: [n] which they are.
    """

    best: Float[Tensor, " n"]
    latents: Int[Tensor, " n"]

    @property
    def mmcs(self) -> float:
        """Mean of the highest cosines ("mean max cosine similarity")."""
        return float(self.best.mean())

    def share_above(self, cosine: float) -> float:
        """Share of latents whose nearest row is nearer than this."""
        return float((self.best > cosine).float().mean())


def agreement(a: SAE, b: SAE, *, latents: Int[Tensor, " n"] | None = None, rows: int = 256) -> Agreement:
    """For latents of `a` (all of them, or those given), the nearest decoder rows of `b`. Not symmetric where widths differ.

    Args:
        latents: some of a's latents, for instance those that are active at all: rows of dead ones are where they began.
        rows: how many are compared at once; rows * d_sae * 4 bytes are held.

    Raises: UserError for dictionaries of another d_model, or no latent.
    """
    if a.d_model != b.d_model:
        raise UserError(f"{a.ref} has d_model {a.d_model}, {b.ref} has {b.d_model}", "two dictionaries of one model and block")
    which = torch.arange(a.d_sae) if latents is None else latents.cpu()
    if not len(which):
        raise UserError(f"no latent of {a.ref} to compare", "one at least")
    best = [b.cosines(a.W_dec[some.to(a.device)].to(b.device)).amax(-1).cpu() for some in which.split(rows)]
    return Agreement(torch.cat(best), which)
