"""Dead latents: which are, which of them a step works on, and the gradients of the loss that revives them.

Knows: the dead-latent loss (Gao et al. 2024, arXiv 2406.04093), and how latents and tokens are spread over a grid of processes.
Does not know: what was kept of the live latents, optimisers, schedules.

The loss is the mean squared norm of what dead latents do not explain of the error that the live ones left. It reaches the dead
latents alone, so its cost goes with their number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pvsae.saes import kernels
from pvsae.saes.gradients import Gradients
from pvsae.saes.grid import Grid
from pvsae.saes.later import read_later
from pvsae.saes.parallel import Group

MOST_DEAD = 4  # dead latents that are worked on in one step, in multiples of aux_k
FEW_TOKENS = 32  # tokens of the joint batch on which the dead latents' threshold is found, at least


class Dead(NamedTuple):
    """Dead latents.

    rows: those of this process' latents that the step works on. chosen: how many they are over all shards. total: all that are
    dead, over all shards.
    """

    rows: Int[Tensor, " n"]
    chosen: int
    total: int


def find_later(silent_for: Int[Tensor, " d_sae"], dead_after: int, most: int, width: Group) -> Callable[[], Dead]:
    """Looks for latents that were silent for `dead_after` tokens; where they are more than `most`, others of them in each step.

    Args:
        silent_for: tokens since each of this process' latents was last kept; it must not change before the answer is taken.
        width: the processes that have the other latents.

    Returns: what gives the answer. The host should take it after it has queued, or waited for, something else: until then it does
        not know how many there are.
    """
    dead = silent_for >= dead_after
    first = dead.to(torch.uint8).argmax()
    read = read_later(width.stack(torch.stack([dead.sum(), silent_for.gather(0, first[None])[0]])))

    def found() -> Dead:
        status = read()
        counts = [count for count, _ in status]
        total, before = sum(counts), sum(counts[: width.rank])
        rows = _places(dead, counts[width.rank])
        if total <= most:
            return Dead(rows, total, total)
        seed = next(silence for count, silence in status if count)  # of the first dead latent: another one in each step
        chosen = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:most] - before
        mine = chosen[(chosen >= 0) & (chosen < len(rows))]
        if rows.is_cuda:
            mine = mine.pin_memory().to(rows.device, non_blocking=True)
        return Dead(rows[mine], most, total)

    return found


def _places(mask: Bool[Tensor, " size"], n: int) -> Int[Tensor, " n"]:
    """Where a mask is True, ascending, if it is known that there are n such places: `nonzero` would wait for the device."""
    if n == 0:
        return torch.zeros(0, dtype=torch.int64, device=mask.device)
    place = torch.arange(len(mask), device=mask.device)
    return place.new_empty(n + 1).scatter_(0, (mask.cumsum(0) - 1).masked_fill_(~mask, n), place)[:n]


def add_gradients(
    to: Gradients,
    along: Float[Tensor, " d_sae"],
    parameters: tuple[Tensor, Tensor, Tensor],
    centred: Float[Tensor, "batch d_model"],
    error: Float[Tensor, "batch d_model"],
    dead: Dead,
    *,
    aux_k: int,
    aux_coef: float,
    grid: Grid,
) -> Float[Tensor, ""]:
    """Adds the gradients of the loss, times `aux_coef`.

    Args:
        to: gradients so far; those of dead latents' W_enc, W_dec and b_enc change.
        along: <dL/dW_dec[f], W_dec[f]>; it grows by what is added.
        parameters: W_enc, W_dec and b_enc of this process' latents.
        centred: tokens minus b_dec. error: reconstruction minus token, of the live latents.
        aux_k: dead latents that reconstruct a token, on average, if there are more.

    Returns: the sum over this process' tokens of the loss before its weight, fp64.
    """
    W_enc, W_dec, b_enc = parameters
    encoder, decoder, bias = W_enc[dead.rows], W_dec[dead.rows], b_enc[dead.rows]
    of_encoder, of_decoder, of_bias = (torch.zeros_like(t) for t in (encoder, decoder, bias))
    low = threshold(centred, encoder, bias, aux_k, grid) if dead.chosen > aux_k else 0.0
    scale = 2 / (len(centred) * grid.data.size)
    loss = torch.zeros((), dtype=torch.float64, device=centred.device)
    at_once = max(1, kernels.BLOCK_ELEMENTS // dead.chosen)
    for start in range(0, len(centred), at_once):
        part, left = centred[start : start + at_once], error[start : start + at_once]
        acts = torch.addmm(bias, part, encoder.T).relu_()
        acts *= acts > low
        explained = acts @ decoder
        grid.width.sum_((explained,))
        missed = explained.add_(left)  # what is wanted is -error
        loss += missed.pow(2).sum()
        missed *= scale * aux_coef
        of_acts = (missed @ decoder.T) * (acts > 0)
        of_decoder.addmm_(acts.T, missed)
        of_encoder.addmm_(of_acts.T, part)
        of_bias += of_acts.sum(0)
    to.W_enc.index_add_(0, dead.rows, of_encoder)
    to.W_dec.index_add_(0, dead.rows, of_decoder)
    to.b_enc.index_add_(0, dead.rows, of_bias)
    along.index_add_(0, dead.rows, (of_decoder * decoder).sum(1))
    return loss


def threshold(
    centred: Float[Tensor, "batch d_model"],
    encoder: Float[Tensor, "n_dead d_model"],
    bias: Float[Tensor, " n_dead"],
    aux_k: int,
    grid: Grid,
) -> Float[Tensor, ""]:
    """A threshold that about aux_k dead latents a token pass, from a few tokens: the same ones of the joint batch however many
    processes share it."""
    step = max(1, len(centred) * grid.data.size // FEW_TOKENS)
    few = centred[-grid.data.rank * len(centred) % step :: step]
    acts = torch.addmm(bias, few, encoder.T).relu_().flatten()
    if grid.everyone.size == 1:
        return acts.kthvalue(len(acts) - aux_k * len(few) + 1).values
    return grid.kth_largest(acts, aux_k * -(-len(centred) * grid.data.size // step))
