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
from jaxtyping import Float, Int
from torch import Tensor

from pvsae.saes import kernels
from pvsae.saes.kernels import Sparse, screen
from pvsae.saes.parallel import ALONE, Group

GUESS_CHANGES = 3.0  # how many of its usual changes a threshold may fall before the guess fails, which costs a second product
MOST_DEAD = 4  # dead latents that are worked on in one step, in multiples of aux_k
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
    """

    aux_coef: float = 1 / 32
    aux_k: int | None = None
    dead_after: int = 10_000_000
    clip: float | None = 1.0
    threshold_decay: float = 0.999
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    kernels: str = "auto"


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
            product_dtype: of the encoder's product; None is the device's fastest (kernels.product_dtype). With fp32 everything is
                fp32; with less, rows that sums are taken of are read as bf16 on a CPU; weights, sums and Adam are always fp32.
            group: the processes that a batch is shared with.
        """
        generator = torch.Generator().manual_seed(seed)
        rows = torch.nn.functional.normalize(torch.randn(d_sae, d_model, generator=generator), dim=1)
        self.config, self.group = config, group
        on_cpu = torch.device(device).type == "cpu"
        self.W_dec, self.W_enc = ((kernels.large(d_sae, d_model) if on_cpu else rows.clone().to(device)) for _ in range(2))
        for weight in (self.W_dec, self.W_enc):
            weight.copy_(rows)
        self.b_enc = torch.zeros(d_sae, device=device)
        self.b_dec = torch.zeros(d_model, device=device) if center is None else center.float().clone().to(device)
        self.silent_for = torch.zeros(d_sae, dtype=torch.int64, device=device)  # tokens since a latent was last kept
        self.optimiser = torch.optim.Adam(self.parameters(), lr=0.0, betas=config.betas, eps=config.eps, fused=True)
        self.guess: float | None = None  # the last step's smallest kept activation
        self.memory: list[Tensor] = []  # that gradients are written to; new memory costs more than what is done in it
        self.change = 0.02  # running mean of its relative change from step to step
        self.rest = 0  # steps that the int8 screen still rests for
        self.threshold_mean, self.threshold_weight = 0.0, 0.0
        self.kernels = kernels.of(self.W_enc.device, config.kernels)
        self.product_dtype = kernels.product_dtype(self.W_enc.device) if product_dtype is None else product_dtype

    def parameters(self) -> list[Tensor]:
        """W_enc, W_dec, b_enc, b_dec."""
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
        group, config = self.group, self.config
        tokens = len(x) * group.size
        dead = self._dead()
        kept, threshold = self.select(x, k)
        if not self.memory and x.device.type == "cpu":
            self.memory = [kernels.large(*self.W_enc.shape) for _ in range(2)]
        gradients, sums = self.gradients(x, kept, dead, *self.memory)
        group.sum_(gradients.tensors())
        norm = float(torch.stack(torch._foreach_norm(gradients.tensors())).norm())
        self._update(gradients, norm, lr)
        fired = torch.zeros(self.d_sae, dtype=torch.bool, device=x.device).index_fill_(0, kept.latent, True)
        self.silent_for.add_(tokens).masked_fill_(group.any_(fired), 0)
        decay = config.threshold_decay
        self.threshold_mean = decay * self.threshold_mean + (1 - decay) * threshold
        self.threshold_weight = decay * self.threshold_weight + (1 - decay)
        error, variance, aux, n_kept = group.sum_scalars((*sums, float(len(kept.value))))
        return StepStats(
            loss=error / tokens, fvu=error / variance if variance else math.nan, aux_loss=aux / tokens, l0=n_kept / tokens,
            n_dead=len(dead), threshold=threshold, grad_norm=norm,
        )  # fmt: skip

    def select(self, x: Float[Tensor, "batch d_model"], k: float) -> tuple[Sparse, float]:
        """The k * B largest pre-activations above 0 of the joint batch, as far as they are this process', and the smallest kept.

        Whatever threshold is guessed first, the result is the same: too few survivors, and the guess is lowered.
        """
        n_keep = round(k * len(x) * self.group.size)
        dtype = torch.float32 if self.product_dtype is torch.int8 else self.product_dtype
        centred, weight = (x - self.b_dec).to(dtype), self.W_enc.to(dtype)
        low = self._estimate(centred, weight, k) if self.guess is None else self.guess * max(0.8, 1 - GUESS_CHANGES * self.change)
        while True:
            index, value, n_screened = self._survivors(centred, weight, low)
            found, screened = map(int, self.group.sum_scalars([len(value), n_screened]))
            if screened > MOST_SCREENED * max(found, n_keep):
                self.rest = SCREEN_REST
            if found >= n_keep or low <= 0:
                break
            estimate = self._estimate(centred, weight, k)
            low = estimate if estimate < 0.9 * low else 0.5 * low if low > 1e-6 else 0.0
        if not found:
            self.guess = 0.0
            empty = torch.zeros(0, dtype=torch.int64, device=x.device)
            return Sparse(empty, empty, torch.zeros(0, device=x.device)), 0.0
        threshold, n_ties = self.group.largest(value, min(n_keep, found))
        if self.guess:
            self.change += 0.1 * (abs(threshold / self.guess - 1) - self.change)
        self.guess = threshold
        return kernels.keep_largest(index, value, threshold, n_ties, self.d_sae), threshold

    def _survivors(self, centred: Tensor, weight: Tensor, low: float) -> tuple[Tensor, Tensor, int]:
        """Pre-activations above `low`, screened in int8 first where that is worth it, and how many passed the screen."""
        if self.product_dtype is torch.int8 and low > 0 and not self.rest:
            return screen.survivors(centred, weight, self.b_enc, low)
        self.rest = max(0, self.rest - 1)
        return *self.kernels.survivors(centred, weight, self.b_enc, low), 0

    def _estimate(self, centred: Tensor, weight: Tensor, k: float) -> float:
        """A threshold that somewhat more than k pre-activations a token pass, from a few tokens."""
        few = centred[:: max(1, len(centred) // 32)]
        pre = torch.addmm(self.b_enc.to(few.dtype), few, weight.T).flatten().float()
        wanted = min(pre.numel(), math.ceil(1.3 * k * len(few)))
        return max(0.0, self.group.sum_scalars([kernels.kth_largest(pre, wanted)])[0] / self.group.size)

    def _dead(self) -> Int[Tensor, " n_dead"]:
        return (self.silent_for >= self.config.dead_after).nonzero()[:, 0]

    def gradients(
        self,
        x: Float[Tensor, "batch d_model"],
        kept: Sparse,
        dead: Int[Tensor, " n_dead"],
        *memory: Float[Tensor, "d_sae d_model"],
    ) -> tuple[Gradients, tuple[float, float, float]]:
        """Gradients of the loss, given what was kept, this process' share; and sums over its tokens: squared error, squared
        distance from the mean, dead-latent loss."""
        scale = 2 / (len(x) * self.group.size)
        centred = x - self.b_dec
        error = self.kernels.decode(kept, self._read(self.W_dec), len(x)).sub_(centred)
        total = centred.sum(0)
        spread = float(torch.linalg.vector_norm(centred)) ** 2
        self.group.sum_((total,))
        squared = float(torch.linalg.vector_norm(error)) ** 2
        variance = spread - float(total.square().sum()) * scale / 2 / self.group.size
        # G is scale * error; as it enters linearly, the scale may wait for the pairs, which are fewer.
        of_value = self.kernels.value_grads(kept, error, self.W_dec).mul_(scale)
        at = self.kernels.by_latent(kept, self.d_sae)
        b_enc = torch.bincount(kept.latent, of_value, minlength=self.d_sae).float()
        out = Gradients(
            W_enc=self.kernels.weight_grads(at, of_value, self._read(centred), *memory[:1]),
            W_dec=self.kernels.weight_grads(at, kept.value * scale, self._read(error), *memory[1:]),
            b_enc=b_enc,
            b_dec=error.sum(0).mul_(scale) - b_enc @ self.W_enc,
        )
        # <dL/dW_dec[f], W_dec[f]> is a sum over kept pairs too: the dense gradient need not be read for it.
        along = torch.bincount(kept.latent, of_value * kept.value, minlength=self.d_sae).float()
        aux = 0.0
        if len(dead) and self.config.aux_coef:
            aux = self._add_dead(out, along, centred, error, dead, scale)
        out.W_dec.addcmul_(along[:, None], self.W_dec, value=-1)
        return out, (squared, variance, aux)

    def _read(self, rows: Tensor) -> Tensor:
        """Rows as they are read for sums of them: those take as long as reading takes."""
        return rows.bfloat16() if rows.device.type == "cpu" and self.product_dtype is not torch.float32 else rows

    def _add_dead(self, to: Gradients, along: Tensor, x: Tensor, error: Tensor, dead: Tensor, scale: float) -> float:
        """Adds the gradients of the dead-latent loss: the mean squared norm of what dead latents do not explain of the error that
        the live ones left. It reaches the dead latents alone.

        Each token has aux_k of them; with n times as many dead, one token in n is taken, others in each step, so that the cost
        stays that of aux_k latents and all tokens.
        """
        aux_k = self.config.aux_k or self.W_dec.shape[1] // 2
        tokens = len(x) * self.group.size
        turn = int(self.silent_for[dead[0]]) // tokens  # one more in each step
        every = min(MOST_DEAD, math.ceil(len(dead) / aux_k))
        first = (turn - self.group.rank * len(x)) % every
        x, error = x[first::every], error[first::every]
        share = tokens / len(range(turn % every, tokens, every))
        if len(dead) > MOST_DEAD * aux_k:  # a few of them, others in each step
            generator = torch.Generator().manual_seed(turn)
            dead = dead[torch.randperm(len(dead), generator=generator)[: MOST_DEAD * aux_k].to(dead.device)]
        encoder, decoder, bias = self.W_enc[dead], self.W_dec[dead], self.b_enc[dead]
        of_encoder, of_decoder = torch.zeros_like(encoder), torch.zeros_like(decoder)
        of_bias, loss = torch.zeros_like(bias), 0.0
        low = self._aux_threshold(x, encoder, bias, aux_k) if len(dead) > aux_k else 0.0
        rows = max(1, kernels.BLOCK_ELEMENTS // len(dead))
        for start in range(0, len(x), rows):
            part, left = x[start : start + rows], error[start : start + rows]
            acts = torch.addmm(bias, part, encoder.T).relu_()
            acts *= acts > low
            missed = acts @ decoder + left  # what is wanted is -error
            loss += float(missed.pow(2).sum())
            missed *= scale * share * self.config.aux_coef
            of_acts = (missed @ decoder.T) * (acts > 0)
            of_decoder.addmm_(acts.T, missed)
            of_encoder.addmm_(of_acts.T, part)
            of_bias += of_acts.sum(0)
        to.W_enc.index_add_(0, dead, of_encoder)
        to.W_dec.index_add_(0, dead, of_decoder)
        to.b_enc.index_add_(0, dead, of_bias)
        along.index_add_(0, dead, (of_decoder * decoder).sum(1))
        return loss * share

    def _aux_threshold(self, centred: Tensor, encoder: Tensor, bias: Tensor, aux_k: int) -> float:
        """A threshold that about aux_k dead latents a token pass, from a few tokens."""
        few = centred[:: max(1, len(centred) // 32)]
        acts = torch.addmm(bias, few, encoder.T).relu_().flatten()
        own = kernels.kth_largest(acts, aux_k * len(few))
        return self.group.sum_scalars([own])[0] / self.group.size

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
            "guess": self.guess, "change": self.change, "rest": self.rest,
            "threshold_mean": self.threshold_mean, "threshold_weight": self.threshold_weight,
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a `state`."""
        for parameter, saved in zip(self.parameters(), state["parameters"], strict=True):
            parameter.copy_(saved)
        self.optimiser.load_state_dict(state["optimiser"])
        self.silent_for.copy_(state["silent_for"])
        self.guess, self.change, self.rest = state["guess"], state["change"], state["rest"]
        self.threshold_mean, self.threshold_weight = state["threshold_mean"], state["threshold_weight"]
