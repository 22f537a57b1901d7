"""The encoder's product and selection for processes that share tokens and latents: a pool each, one selection among all pools.

Knows: when a bound was too high or too low for anyone.
Does not know: which process has what; the caller's functions add up over processes and number what is theirs.

The digits of radix selection are counted over all processes, 16 KB a pass, so no values are sent. The host reads three numbers
after it: whether all is well, and how many this process keeps, the size of everything that follows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pvsae.saes.kernels.eager import Sparse
from pvsae.saes.kernels.triton.encode import LEAST_ROOM, Bound, Encoder
from pvsae.saes.kernels.triton.order import from_flat
from pvsae.saes.kernels.triton.select import Pool, largest
from pvsae.saes.later import read_later


def encode_select_joint(
    x: Float[Tensor, "batch d_model"],
    W_enc: Float[Tensor, "d_sae d_model"],
    b_enc: Float[Tensor, " d_sae"],
    n_keep: int,
    low: Float[Tensor, ""],
    *,
    sum_: Callable[[Sequence[Tensor]], None],
    places: Callable[[Int[Tensor, " n"]], Int[Tensor, " n"]],
    here: Callable[[Int[Tensor, " n"]], Int[Tensor, " n"]],
    n_places: int,
    room: int,
) -> tuple[Sparse, Float[Tensor, ""]] | None:
    """What this process has of the n_keep largest of relu(x @ W_enc.T + b_enc) over all processes, and the smallest of all.

    Args:
        x, W_enc, b_enc: this process' tokens and latents, as encode.encode_select takes them.
        n_keep: at least 1.
        low: everything above it is collected; the same one in all processes, on the device.
        sum_: adds tensors up over processes, in place.
        places: token * d_sae + latent of this process -> its number among all processes, which breaks ties; here: the inverse.
        n_places: what places gives is below this.
        room: of this process' pool.

    Returns: None, in all processes, where `low` was too high, or too low for the room of one of them.
    """
    encoder = Encoder(x, W_enc, b_enc)
    capacity = min(max(room, LEAST_ROOM), encoder.n_flat)
    pool = encoder.collect(Bound(low.reshape(1).float()), capacity)
    joint = torch.cat([pool.filled, (pool.filled > capacity).long()])
    sum_((joint,))
    # What is in places that are not filled is never looked at.
    found = largest(Pool(pool.value, places(pool.flat), pool.filled), n_keep, n_places, sum_)
    filled, overflows, mine = read_later(torch.cat([joint, found.filled]))()
    if filled < n_keep or overflows:
        return None
    return from_flat(here(found.flat[:mine]), found.value[:mine], len(W_enc)), found.threshold
