"""Selection and Adam of a step on a GPU, by kernels that leave every number on the device.

Knows: the Triton kernels that the eager path has no like of, the copy of the encoder's weights that the product reads, and where
torch's Adam keeps its moments: checkpoints of both paths are the same, so that one can go on with the other's.
Does not know: gradients, losses, or what a step is (step.py).

What the host reads in a step, and why it does not hold the device up: how many pre-activations passed the bound, which decides
whether a selection that was queued already is the right one (encode.py); how many latents are dead, a number from before the
product; and the last step's statistics. Processes that share tokens or latents also read how many of the kept pairs are their
own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from pvsae.saes.gradients import Gradients
from pvsae.saes.kernels import Sparse, triton

if TYPE_CHECKING:
    from pvsae.saes.step import Learner

ROOM = 4  # of a pool, in multiples of what is kept


class Fused:
    """The parts of a learner's step that have kernels of their own."""

    def __init__(self, learner: Learner) -> None:
        self.learner = learner
        self.steps: int | None = None  # of Adam, as the host counts them; None: the optimiser's state knows
        self._copy: Tensor | None = None  # of W_enc in the product's dtype
        self._copied = -1  # the version of W_enc that it was made of

    def select(self, x: Float[Tensor, "batch d_model"], k: float, changes: float) -> tuple[Sparse, float | Tensor]:
        """As Learner.select; the smallest kept value may stay on the device.

        Args:
            changes: how many of its usual changes the threshold may fall before the guess fails.
        """
        it, grid = self.learner, self.learner.grid
        n_keep, n_all = max(1, round(k * len(x) * grid.data.size)), grid.everyone.size
        weight = self._weight()
        centred = (x - it.b_dec).to(weight.dtype)
        low = None if it.guess is None else self._on_device(it.guess) * (1 - changes * self._on_device(it.change)).clamp(min=0.8)
        if n_all == 1:
            kept, threshold = triton.encode_select(centred, weight, it.b_enc, n_keep, low, slack=1.0, room=ROOM)
        else:
            shape = len(x), it.d_sae
            found = low is not None and n_keep and triton.encode_select_joint(
                centred, weight, it.b_enc, n_keep, low, sum_=grid.everyone.sum_, places=lambda at: grid.places(at, *shape),
                here=lambda at: grid.here(at, *shape), n_places=2 ** grid.place_bits(*shape), room=ROOM * -(-n_keep // n_all),
            )  # fmt: skip
            if not found:  # in the first step, and where a bound was no good, numbers go to the host and back
                return it.select(x, k)
            kept, threshold = found
        if it.guess is not None:
            change = (threshold.double() / self._on_device(it.guess) - 1).abs()
            it.change = it.change + 0.1 * (change.nan_to_num(1.0).clamp(max=1.0) - it.change)
        it.guess = threshold.double()
        return kept, threshold

    def _on_device(self, number: float | Tensor) -> Tensor:
        return (
            number
            if isinstance(number, Tensor)
            else torch.full((), number, dtype=torch.float64, device=self.learner.W_enc.device)
        )

    def update(self, gradients: Gradients, norm: Float[Tensor, ""], lr: float) -> None:
        """Adam with the clipped gradients; what is along the decoder's rows is taken away before, and their norm made 1 after."""
        it, limit = self.learner, self.learner.config.clip
        scale = (limit / norm).clamp(max=1.0) if limit else 1.0
        states = [self._state(p) for p in it.parameters()]
        if self.steps is None:
            self.steps = int(states[0]["step"])
        self.steps += 1
        for p, gradient, state in zip(it.parameters(), gradients.tensors(), states, strict=True):
            triton.adam_(
                p, gradient, state["exp_avg"], state["exp_avg_sq"], step=self.steps, lr=lr, betas=it.config.betas,
                eps=it.config.eps, scale=scale, unit_rows=p is it.W_dec, copy=self._copy if p is it.W_enc else None,
            )  # fmt: skip
            state["step"].fill_(self.steps)
        self._copied = it.W_enc._version

    def _state(self, parameter: Tensor) -> dict[str, Any]:
        """The parameter's part of the optimiser's state, begun as torch's Adam begins it."""
        state = self.learner.optimiser.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state

    def _weight(self) -> Tensor:
        """W_enc in the product's dtype: a copy that Adam's kernel keeps up to date, made anew where others changed W_enc."""
        weight = self.learner.W_enc
        if self.learner.product_dtype in (weight.dtype, torch.int8):  # what CPUs screen in int8 is exact in fp32
            return weight
        if self._copy is None or self._copied != weight._version:
            self._copy, self._copied = weight.to(self.learner.product_dtype), weight._version
        return self._copy
