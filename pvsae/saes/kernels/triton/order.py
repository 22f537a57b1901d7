"""The kept activations of a batch in the order of tokens and of latents, without the host waiting for the device.

Knows: the two orders in which sparse products read them, and where each token's or latent's part begins.
Does not know: which activations are kept, or what is multiplied. It needs no Triton.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pvsae.saes.kernels.eager import ByLatent, Sparse


def offsets(sorted_ids: Int[Tensor, " n"], n: int) -> Int[Tensor, " n_plus_1"]:
    """Where each of the ids 0 .. n-1 begins in a sorted list of them, and the list's length at the end.

    A binary search for every id: `bincount` would make the host wait for the largest one.
    """
    return torch.searchsorted(sorted_ids, torch.arange(n + 1, device=sorted_ids.device, dtype=sorted_ids.dtype))


def by_token(kept: Sparse, batch: int) -> Int[Tensor, " batch_plus_1"]:
    """CSR: where each token's pairs begin in `kept`, which is sorted that way already."""
    return offsets(kept.token, batch)


def by_latent(kept: Sparse, d_sae: int) -> ByLatent:
    """CSC: the pairs sorted by latent, stably, so that sums over tokens have one order whatever the machine."""
    latent, order = kept.latent.sort(stable=True)
    return ByLatent(order, kept.token[order], offsets(latent, d_sae))


def from_flat(flat: Int[Tensor, " n"], value: Float[Tensor, " n"], d_sae: int) -> Sparse:
    """Sparse from flat indices token * d_sae + latent in any order."""
    flat, order = flat.sort()
    token = torch.div(flat, d_sae, rounding_mode="floor")
    return Sparse(token, flat - token * d_sae, value[order])
