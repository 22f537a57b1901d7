"""One optimiser step of a BatchTopK dictionary: sparse but for the encoder's product.

Knows: parameters, the loss and its gradients, the dead-latent loss, Adam, unit decoder rows, the running threshold.
Does not know: where activations come from, schedules, checkpoints on disk, or how the kernels work (kernels/).

The method: BatchTopK (Bussmann, Leask & Nanda 2024, arXiv 2412.06410) keeps the k * B largest pre-activations of a batch of B
tokens. The dead-latent loss (Gao et al. 2024, arXiv 2406.04093) lets latents that have been silent for long reconstruct what the
others left over. Decoder rows have norm 1, and the gradient's component along a row is removed before the step
(Bricken et al. 2023).

Writing a for the kept activations, X for the tokens minus b_dec and G = dL/d(reconstruction) = 2/B * (reconstruction - x):
    dL/dW_dec[f] = sum_t a[t, f] G[t]          dL/da[t, f] = <G[t], W_dec[f]>
    dL/dW_enc[f] = sum_t dL/da[t, f] X[t]      dL/db_enc[f] = sum_t dL/da[t, f]
    dL/db_dec    = sum_t G[t] - dL/db_enc @ W_enc
where every sum is over kept pairs, so nothing of size B x F is needed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pvsae.saes import kernels
from pvsae.saes.kernels import Sparse
from pvsae.saes.parallel import ALONE, Group


@dataclass(frozen=True)
class StepConfig:
    """What a step does, the learning rate apart.

    Attributes:
        aux_coef: weight of the dead-latent loss, which is a share of what the live latents left unexplained (times the mean
            squared norm of the tokens, so that it means the same at any scale).
        aux_k: most dead latents that reconstruct one token; None is d_model / 2.
        dead_after: tokens of silence after which a latent is dead.
        clip: largest norm of the whole gradient; None for no limit.
        threshold_decay: decay a step of the running mean of the smallest kept activation.
        betas, eps: Adam's.
    """

    aux_coef: float = 1 / 32
    aux_k: int | None = None
    dead_after: int = 10_000_000
    clip: float | None = 1.0
    threshold_decay: float = 0.999
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


@dataclass(frozen=True)
class StepStats:
    """What a step saw.

    Attributes:
        loss: mean over tokens of the squared error, in the units of the activations given.
        fvu: share of the batch's variance that is not explained.
        aux_loss: the dead-latent loss before its weight; 0 where nothing is dead.
        l0: kept activations a token.
        n_dead: dead latents before the step.
        threshold: smallest kept activation.
        grad_norm: norm of the gradient before clipping.
    """

    loss: float
    fvu: float
    aux_loss: float
    l0: float
    n_dead: int
    threshold: float
    grad_norm: float


@dataclass
class Gradients:
    """Gradients of all parameters, in their layouts."""

    W_enc: Float[Tensor, "d_sae d_model"]
    W_dec: Float[Tensor, "d_sae d_model"]
    b_enc: Float[Tensor, " d_sae"]
    b_dec: Float[Tensor, " d_model"]

    def tensors(self) -> tuple[Tensor, ...]:
        return self.W_enc, self.W_dec, self.b_enc, self.b_dec


class Learner:
    """A dictionary in training. Weights are fp32, both matrices [d_sae, d_model]."""

    def __init__(
        self,
        d_model: int,
        d_sae: int,
        config: StepConfig,
        *,
        seed: int = 0,
        center: Float[Tensor, " d_model"] | None = None,
        device: torch.device | str = "cpu",
        product_dtype: torch.dtype | None = None,
        group: Group = ALONE,
    ) -> None:
        """Random unit rows in the decoder, the encoder their transpose.

        Args:
            d_model, d_sae: width of the residual, number of latents.
            center: where b_dec starts, e.g. the geometric median of some activations; 0 by default.
            product_dtype: dtype of the encoder's product; None is bf16 where the device has matrix units for it, else fp32.
            group: the processes that a batch is shared with.
        """
        generator = torch.Generator().manual_seed(seed)
        rows = torch.nn.functional.normalize(torch.randn(d_sae, d_model, generator=generator), dim=1)
        self.config, self.group = config, group
        self.W_dec = rows.to(device)
        self.W_enc = rows.clone().to(device)
        self.b_enc = torch.zeros(d_sae, device=device)
        self.b_dec = torch.zeros(d_model, device=device) if center is None else center.float().clone().to(device)
        self.silent_for = torch.zeros(d_sae, dtype=torch.int64, device=device)  # tokens since a latent was last kept
        self.optimiser = torch.optim.Adam(self.parameters(), lr=0.0, betas=config.betas, eps=config.eps, fused=True)
        self.guess: float | None = None  # the last step's smallest kept activation
        self.threshold_mean, self.threshold_weight = 0.0, 0.0
        self.product_dtype = kernels.product_dtype(self.W_enc.device) if product_dtype is None else product_dtype

    def parameters(self) -> list[Tensor]:
        return [self.W_enc, self.W_dec, self.b_enc, self.b_dec]

    @property
    def d_sae(self) -> int:
        return len(self.W_dec)

    @property
    def threshold(self) -> float:
        """Bias-corrected running mean of the smallest kept activation; 0 before the first step."""
        return self.threshold_mean / self.threshold_weight if self.threshold_weight else 0.0

    def step(self, x: Float[Tensor, "batch d_model"], k: float, lr: float) -> StepStats:
        """One step on a batch of tokens (this process' share of it), keeping k activations a token."""
        x = x.float()
        dead = (self.silent_for >= self.config.dead_after).nonzero()[:, 0]
        kept, threshold = self.select(x, k)
        gradients, stats = self.gradients(x, kept, dead)
        self.group.sum_(gradients.tensors())
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients.tensors()]))
        self._update(gradients, float(norm), lr)
        fired = self.group.any_(torch.zeros(self.d_sae, dtype=torch.bool, device=x.device).index_fill_(0, kept.latent, True))
        self.silent_for.add_(len(x) * self.group.size).masked_fill_(fired, 0)
        decay = self.config.threshold_decay
        self.threshold_mean = decay * self.threshold_mean + (1 - decay) * threshold
        self.threshold_weight = decay * self.threshold_weight + (1 - decay)
        loss, variance, n_kept, aux = self.group.sum_scalars((*stats, 0.0)[:4])
        tokens = len(x) * self.group.size
        return StepStats(
            loss=loss / tokens, fvu=loss / variance if variance else math.nan, aux_loss=aux / self.group.size,
            l0=n_kept / tokens, n_dead=len(dead), threshold=threshold, grad_norm=float(norm),
        )  # fmt: skip
