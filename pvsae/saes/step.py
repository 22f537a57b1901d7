"""One optimiser step of a BatchTopK dictionary: sparse but for the encoder's product.

Knows: parameters, the loss and its gradients, Adam, unit decoder rows, the running threshold.
Does not know: where activations come from, schedules, checkpoints on disk, how the kernels work (kernels/), what a GPU does in
another way (fused.py), how the dead-latent loss works (dead.py), or how processes find the largest of all their activations
(grid.py).

The method: BatchTopK (Bussmann, Leask & Nanda 2024, arXiv 2412.06410) keeps the k * B largest pre-activations of a batch of B
tokens. The dead-latent loss (Gao et al. 2024, arXiv 2406.04093) lets latents that have been silent for long reconstruct what the
others left over. Decoder rows have norm 1, and the gradient's component along a row is removed before the step
(Bricken et al. 2023).

Writing a for the kept activations, X for the tokens minus b_dec and G = dL/d(reconstruction) = 2/B * (reconstruction - x):
    dL/dW_dec[f] = sum_t a[t, f] G[t]          dL/da[t, f] = <G[t], W_dec[f]>
    dL/dW_enc[f] = sum_t dL/da[t, f] X[t]      dL/db_enc[f] = sum_t dL/da[t, f]
    dL/db_dec    = sum_t G[t] - dL/db_enc @ W_enc
where every sum is over kept pairs, so nothing of size B x F is needed.

In a grid of processes each one has the rows of its latents, of both matrices. Reconstructions are summed over the shards of
latents, gradients over those of tokens, and what is left is local.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pvsae.saes import dead, kernels
from pvsae.saes.fused import Fused
from pvsae.saes.gradients import Gradients, squared
from pvsae.saes.grid import SINGLE, Grid
from pvsae.saes.initial import unit_rows_
from pvsae.saes.kernels import Sparse, screen
from pvsae.saes.later import read_later

GUESS_CHANGES = 3.0  # how many of its usual changes a threshold may fall before the guess fails, which costs a second product
MOST_SCREENED = 4.0  # pairs that pass the int8 screen for each one that is kept; with more of them it does not pay
SCREEN_REST = 200  # steps without the screen then


@dataclass(frozen=True)
class StepConfig:
    """What a step does, the learning rate apart.

    Attributes:
        aux_coef: weight of the dead-latent loss, the mean squared norm of what the dead latents leave of the live ones' error.
            It reaches dead latents alone, and Adam does not see how large it is; it counts where gradients are clipped.
        aux_k: dead latents that reconstruct one token, on average; None is d_model / 2.
        dead_after: tokens of silence after which a latent is dead.
        clip: largest norm of the whole gradient; None for no limit.
        threshold_decay: decay a step of the running mean of the smallest kept activation.
        betas, eps: Adam's.
        kernels: "eager", "triton", or "auto": Triton's on a GPU.
        product: how the encoder's product is made: "float32", "bfloat16", "int8" (on CPUs; what may be kept is exact all the
            same), or "auto": the device's fastest. Everything else is fp32.
    """

    aux_coef: float = 1 / 32
    aux_k: int | None = None
    dead_after: int = 10_000_000
    clip: float | None = 1.0
    threshold_decay: float = 0.999
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    kernels: str = "auto"
    product: str = "auto"


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


class Learner:
    """A dictionary in training, or one process' latents of it. Weights are fp32, both matrices [d_sae, d_model]."""

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
        grid: Grid = SINGLE,
        memory: list[Tensor] | None = None,
    ) -> None:
        """Random unit rows in the decoder, the encoder their transpose.

        Args:
            d_model, d_sae: width of the residual, number of latents.
            center: where b_dec starts, e.g. the geometric median of some activations; 0 by default.
            product_dtype: of the encoder's product, int8 for the screen; None is what the config says.
            grid: the processes that tokens and latents are shared with; this one has an equal run of the d_sae latents.
            memory: where gradients are written on a CPU, made when it is first needed; learners that take turns may share it.
        """
        self.config, self.grid = config, grid
        on_cpu, n = torch.device(device).type == "cpu", d_sae // grid.width.size
        self.W_dec, self.W_enc = (
            (kernels.large(n, d_model) if on_cpu else torch.empty(n, d_model, device=device)) for _ in range(2)
        )
        unit_rows_(self.W_dec, d_sae, seed, grid.width.rank * n)
        self.W_enc.copy_(self.W_dec)
        self.b_enc = torch.zeros(n, device=device)
        self.b_dec = torch.zeros(d_model, device=device) if center is None else center.float().clone().to(device)
        self.silent_for = torch.zeros(n, dtype=torch.int64, device=device)  # tokens since a latent was last kept
        self.optimiser = torch.optim.Adam(self.parameters(), lr=0.0, betas=config.betas, eps=config.eps, fused=True)
        # What is carried from step to step stays on the device where a step leaves it there.
        self.guess: float | Tensor | None = None  # the last step's smallest kept activation
        self.memory = [] if memory is None else memory  # new memory costs more than what is done in it
        self.change: float | Tensor = 0.02  # running mean of the guess' relative change from step to step
        self.rest = 0  # steps that the int8 screen still rests for
        self.threshold_mean: float | Tensor = 0.0
        self.threshold_weight = 0.0
        self.kernels = kernels.of(self.W_enc.device, config.kernels)
        self.fused = Fused(self) if hasattr(self.kernels, "adam_") else None
        self.product_dtype = product_dtype or kernels.product_dtype(self.W_enc.device, config.product)

    def parameters(self) -> list[Tensor]:
        """W_enc, W_dec, b_enc, b_dec."""
        return [self.W_enc, self.W_dec, self.b_enc, self.b_dec]

    @property
    def d_sae(self) -> int:
        """Latents of this process."""
        return len(self.W_dec)

    @property
    def aux_k(self) -> int:
        return self.config.aux_k or self.W_dec.shape[1] // 2

    @property
    def threshold(self) -> float:
        """Bias-corrected running mean of the smallest kept activation; 0 before the first step."""
        return float(self.threshold_mean) / self.threshold_weight if self.threshold_weight else 0.0

    def step(self, x: Float[Tensor, "batch d_model"], k: float, lr: float) -> StepStats:
        """One step on a batch of tokens (this process' share of it), keeping k activations a token."""
        return self.begin(x, k, lr)()

    def begin(self, x: Float[Tensor, "batch d_model"], k: float, lr: float) -> Callable[[], StepStats]:
        """As `step`, but on a GPU the work is only queued: what is returned gives the statistics, and waits for them."""
        x = x.float()
        grid, config = self.grid, self.config
        tokens = len(x) * grid.data.size
        find = dead.find_later(self.silent_for, config.dead_after, dead.MOST_DEAD * self.aux_k, tokens, grid.width)
        kept, threshold = self.fused.select(x, k, GUESS_CHANGES) if self.fused else self.select(x, k)
        dying = find()
        if x.device.type == "cpu" and not self.fused and not (self.memory and len(self.memory[0]) >= self.d_sae):
            self.memory[:] = [kernels.large(*self.W_enc.shape) for _ in range(2)]
        gradients, sums = self.gradients(x, kept, dying, *(rows[: self.d_sae] for rows in self.memory))
        gradients.sum_(grid)
        norm = gradients.norm(grid)
        self.fused.update(gradients, norm, lr) if self.fused else self._update(gradients, float(norm), lr)
        fired = torch.zeros(self.d_sae, dtype=torch.bool, device=x.device).index_fill_(0, kept.latent, True)
        self.silent_for.add_(tokens).masked_fill_(grid.data.any_(fired), 0)
        decay = config.threshold_decay
        smallest = threshold.double() if isinstance(threshold, Tensor) else threshold
        self.threshold_mean = decay * self.threshold_mean + (1 - decay) * smallest
        self.threshold_weight = decay * self.threshold_weight + (1 - decay)
        # The processes of a row have the same sums over their tokens, and each of them other pairs.
        joint = torch.cat([sums if grid.width.rank == 0 else torch.zeros_like(sums), sums.new_full((1,), len(kept.value))])
        grid.everyone.sum_((joint,))
        own = torch.stack([sums.new_zeros(()) + smallest, norm.double()])
        return partial(_stats, read_later(torch.cat([joint, own])), tokens, dying.total)

    def select(self, x: Float[Tensor, "batch d_model"], k: float) -> tuple[Sparse, float]:
        """The k * B largest pre-activations above 0 of the joint batch, as far as they are this process', and the smallest kept.

        Whatever threshold is guessed first, the result is the same: too few survivors, and the guess is lowered.
        """
        n_keep = max(1, round(k * len(x) * self.grid.data.size))
        dtype = torch.float32 if self.product_dtype is torch.int8 else self.product_dtype
        centred, weight = (x - self.b_dec).to(dtype), self.W_enc.to(dtype)
        guess, change = None if self.guess is None else float(self.guess), float(self.change)
        low = self._estimate(centred, weight, k) if guess is None else guess * max(0.8, 1 - GUESS_CHANGES * change)
        while True:
            index, value, n_screened = self._survivors(centred, weight, low, int(MOST_SCREENED * n_keep))
            found, screened = map(int, self.grid.everyone.sum_scalars([len(value), n_screened]))
            if screened > MOST_SCREENED * n_keep:
                self.rest = SCREEN_REST
            if found >= n_keep or low <= 0:
                break
            estimate = self._estimate(centred, weight, k)
            low = estimate if estimate < 0.9 * low else 0.5 * low if low > 1e-6 else 0.0
        if not found:
            self.guess = 0.0
            empty = torch.zeros(0, dtype=torch.int64, device=x.device)
            return Sparse(empty, empty, torch.zeros(0, device=x.device)), 0.0
        threshold, n_ties = self.grid.largest(index, value, min(n_keep, found), len(x), self.d_sae)
        if guess:
            self.change = change + 0.1 * (min(1.0, abs(threshold / guess - 1)) - change)
        self.guess = threshold
        return kernels.keep_largest(index, value, threshold, n_ties, self.d_sae), threshold

    def _survivors(self, centred: Tensor, weight: Tensor, low: float, most: int) -> tuple[Tensor, Tensor, int]:
        """Pre-activations above `low`, screened in int8 first where that is worth it, and how many passed the screen: at most
        `most`, or one more where it was given up."""
        passed = 0
        if self.product_dtype is torch.int8 and low > 0 and not self.rest:
            found = screen.survivors(centred, weight, self.b_enc, low, most)
            if found is not None:
                return found
            passed = self.grid.everyone.size * most + 1  # enough for the joint sum, so that all processes rest
        self.rest = max(0, self.rest - 1)
        return *self.kernels.survivors(centred, weight, self.b_enc, low), passed

    def _estimate(self, centred: Tensor, weight: Tensor, k: float) -> float:
        """A threshold that somewhat more than k pre-activations a token pass, from a few tokens."""
        few = centred[:: max(1, len(centred) // 32)]
        pre = torch.addmm(self.b_enc.to(few.dtype), few, weight.T).flatten().float()
        wanted = min(pre.numel(), math.ceil(1.3 * k * len(few) / self.grid.width.size))
        everyone = self.grid.everyone
        return max(0.0, everyone.sum_scalars([kernels.kth_largest(pre, wanted)])[0] / everyone.size)

    def gradients(
        self,
        x: Float[Tensor, "batch d_model"],
        kept: Sparse,
        dying: dead.Dead,
        *memory: Float[Tensor, "d_sae d_model"],
    ) -> tuple[Gradients, Float[Tensor, " 3"]]:
        """Gradients of the loss, given what was kept and what is dead, this process' share; and sums over its tokens, in fp64:
        squared error, squared distance from the mean, dead-latent loss."""
        grid, config = self.grid, self.config
        scale = 2 / (len(x) * grid.data.size)
        centred = x - self.b_dec
        error = self.kernels.decode(kept, self.W_dec, len(x))
        grid.width.sum_((error,))
        error.sub_(centred)
        total = centred.sum(0)
        spread = squared(centred)
        grid.data.sum_((total,))
        missed = squared(error)
        variance = spread - total.square().sum().double() * scale / 2 / grid.data.size
        W_enc, W_dec, b_enc, along = self.kernels.latent_grads(kept, self.W_dec, error, centred, scale, *memory)
        direct = error.sum(0).mul_(scale) if grid.width.rank == 0 else torch.zeros_like(self.b_dec)  # once a row
        out = Gradients(W_enc, W_dec, b_enc, direct - b_enc @ self.W_enc)
        aux = torch.zeros_like(missed)
        if dying.total and config.aux_coef:
            weights, coef = (self.W_enc, self.W_dec, self.b_enc), config.aux_coef
            aux = dead.add_gradients(out, along, weights, centred, error, dying, self.aux_k, coef, grid)
        if self.fused:
            out.along = along  # Adam's kernel takes it away
        else:
            out.W_dec.addcmul_(along[:, None], self.W_dec, value=-1)
        return out, torch.stack([missed, variance, aux])

    def _update(self, gradients: Gradients, norm: float, lr: float) -> None:
        """Adam with the clipped gradients; decoder rows back to norm 1."""
        for parameter, gradient in zip(self.parameters(), gradients.tensors(), strict=True):
            parameter.grad = gradient
        limit = self.config.clip
        # The fused step divides by this as it reads the gradients, which saves a pass over them.
        self.optimiser.grad_scale = torch.tensor(norm / limit if limit and norm > limit else 1.0, device=self.W_dec.device)  # type: ignore[attr-defined]
        for options in self.optimiser.param_groups:
            options["lr"] = lr
        self.optimiser.step()
        for parameter in self.parameters():
            parameter.grad = None
        self.W_dec.div_(torch.linalg.vector_norm(self.W_dec, dim=1, keepdim=True).clamp_min(1e-8))

    def state(self) -> dict[str, Any]:
        """Everything that the next steps depend on; tensors are those in use, not copies."""
        return {
            "parameters": self.parameters(), "optimiser": self.optimiser.state_dict(), "silent_for": self.silent_for,
            "guess": None if self.guess is None else float(self.guess), "change": float(self.change), "rest": self.rest,
            "threshold_mean": float(self.threshold_mean), "threshold_weight": self.threshold_weight,
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a `state`."""
        for parameter, saved in zip(self.parameters(), state["parameters"], strict=True):
            parameter.copy_(saved)
        self.optimiser.load_state_dict(state["optimiser"])
        self.silent_for.copy_(state["silent_for"])
        self.guess, self.change, self.rest = state["guess"], state["change"], state["rest"]
        self.threshold_mean, self.threshold_weight = state["threshold_mean"], state["threshold_weight"]
        if self.fused:
            self.fused.steps = None


def _stats(read: Callable[[], list[float]], tokens: int, n_dead: int) -> StepStats:
    """Statistics of a step from its sums over all tokens, its smallest kept activation and its gradient's norm."""
    error, variance, aux, n_kept, threshold, norm = read()
    return StepStats(
        loss=error / tokens, fvu=error / variance if variance else math.nan, aux_loss=aux / tokens, l0=n_kept / tokens,
        n_dead=n_dead, threshold=threshold, grad_norm=norm,
    )  # fmt: skip
