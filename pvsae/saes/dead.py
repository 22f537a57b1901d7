"""Dead latents: which are, which of them a step works on, and the gradients of the loss that revives them.

Knows: the dead-latent loss (Gao et al. 2024, arXiv 2406.04093), and how latents and tokens are spread over a grid of processes.
Does not know: what was kept of the live latents, optimisers, schedules.

The loss is the mean squared norm of what dead latents do not explain of the error that the live ones left. It reaches the dead
latents alone. Each token has aux_k of them; with n times as many dead, one token in n is taken, others in each step, so that the
cost stays that of aux_k latents and all tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pvsae.saes import kernels
from pvsae.saes.gradients import Gradients
from pvsae.saes.grid import Grid
from pvsae.saes.later import read_later, to_device
from pvsae.saes.parallel import Group

MOST_DEAD = 4  # dead latents that are worked on in one step, in multiples of aux_k
FEW_TOKENS = 32  # tokens of the joint batch on which the dead latents' threshold is found, at least


class Dead(NamedTuple):
    """Dead latents.

    rows: those of this process' latents that the step works on. chosen: how many they are over all shards. total: all that are
    dead, over all shards. turn: counts steps, so that others are taken in each.
    """

    rows: Int[Tensor, " n"]
    chosen: int
    total: int
    turn: int = 0


def find_later(silent_for: Int[Tensor, " d_sae"], dead_after: int, most: int, tokens: int, width: Group) -> Callable[[], Dead]:
    """Looks for latents that were silent for `dead_after` tokens; where they are more than `most`, others of them in each step.

    Args:
        silent_for: tokens since each of this process' latents was last kept; it must not change before the answer is taken.
        tokens: of a step.
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
        turn = next((silence for count, silence in status if count), 0) // tokens  # by the first of them: one more in each step
        if total <= most:
            return Dead(rows, total, total, turn)
        chosen = torch.randperm(total, generator=torch.Generator().manual_seed(turn))[:most] - before
        mine = chosen[(chosen >= 0) & (chosen < len(rows))]
        return Dead(rows[to_device(mine, rows.device)], most, total, turn)

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
    aux_k: int,
    aux_coef: float,
    grid: Grid,
) -> Float[Tensor, ""]:
    """Adds the gradients of the loss, times `aux_coef`, to this process' share of all gradients.

    Args:
        to: gradients so far; those of dead latents' W_enc, W_dec and b_enc change.
        along: <dL/dW_dec[f], W_dec[f]>; it grows by what is added.
        parameters: W_enc, W_dec and b_enc of this process' latents.
        centred: tokens minus b_dec. error: reconstruction minus token, of the live latents.
        aux_k: dead latents that reconstruct a token, on average, if there are more.

    Returns: the sum over this process' tokens of the loss before its weight, fp64, as far as one can tell from those taken.
    """
    W_enc, W_dec, b_enc = parameters
    n, tokens = len(centred), len(centred) * grid.data.size
    every = min(MOST_DEAD, math.ceil(dead.total / aux_k), tokens)
    first = (dead.turn - grid.data.rank * n) % every
    before = (grid.data.rank * n + first) // every  # tokens of processes before this one that are taken
    centred, error = centred[first::every], error[first::every]
    taken = len(range(dead.turn % every, tokens, every))
    share = tokens / taken
    encoder, decoder, bias = W_enc[dead.rows], W_dec[dead.rows], b_enc[dead.rows]
    of_encoder, of_decoder, of_bias = (torch.zeros_like(t) for t in (encoder, decoder, bias))
    low = threshold(centred, before, taken, encoder, bias, aux_k, grid) if dead.chosen > aux_k else 0.0
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
        missed *= 2 / tokens * share * aux_coef
        of_acts = (missed @ decoder.T) * (acts > 0)
        of_decoder.addmm_(acts.T, missed)
        of_encoder.addmm_(of_acts.T, part)
        of_bias += of_acts.sum(0)
    to.W_enc.index_add_(0, dead.rows, of_encoder)
    to.W_dec.index_add_(0, dead.rows, of_decoder)
    to.b_enc.index_add_(0, dead.rows, of_bias)
    along.index_add_(0, dead.rows, (of_decoder * decoder).sum(1))
    return loss * share


def threshold(
    centred: Float[Tensor, "n d_model"],
    before: int,
    taken: int,
    encoder: Float[Tensor, "n_dead d_model"],
    bias: Float[Tensor, " n_dead"],
    aux_k: int,
    grid: Grid,
) -> float | Float[Tensor, ""]:
    """A threshold that about aux_k dead latents a token pass, from a few tokens: the same ones of the joint batch however many
    processes share it.

    Args:
        centred: this process' tokens of those that are taken, of which there are `taken` in all, and `before` before its own.
    """
    step = max(1, taken // FEW_TOKENS)
    few = centred[-before % step :: step]
    acts = torch.addmm(bias, few, encoder.T).relu_().flatten()
    wanted = aux_k * math.ceil(taken / step)
    if grid.everyone.size == 1 and acts.device.type == "cpu":
        return kernels.kth_largest(acts, wanted)
    return grid.kth_largest(acts, wanted)
