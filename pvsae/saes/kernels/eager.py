"""The sparse parts of a training step in plain torch: the path on CPUs, and the reference that other kernels are tested against.

Knows: encoding, exact selection of the largest activations of a batch, decoding, and the gradients of what was kept.
Does not know: losses, optimisers, schedules, or how many processes there are.

Only the encoder's product touches all B x F pairs of a token and a latent, and it is done in row blocks that stay in the cache:
no [B, F] tensor is ever in memory. Everything after it touches the kept pairs alone. Both weight matrices are [F, d], one row a
latent, because every one of these products reads whole rows.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

BLOCK_ELEMENTS = 2**23  # pre-activations computed at a time: 32 MB


class Sparse(NamedTuple):
    """Activations that were kept, sorted by token, then by latent.

    token, latent: row and column of each. value: fp32, above 0.
    """

    token: Int[Tensor, " n"]
    latent: Int[Tensor, " n"]
    value: Float[Tensor, " n"]


def survivors(
    x: Float[Tensor, "batch d_model"],
    W_enc: Float[Tensor, "d_sae d_model"],
    b_enc: Float[Tensor, " d_sae"],
    low: float,
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """Pre-activations x @ W_enc.T + b_enc above max(low, 0): flat indices (token * d_sae + latent, ascending) and fp32 values."""
    d_sae = W_enc.shape[0]
    rows = max(1, BLOCK_ELEMENTS // d_sae)
    low = max(low, 0.0)
    buffer = torch.empty(min(rows, len(x)) * d_sae, dtype=x.dtype, device=x.device)
    weight, bias = W_enc.T, b_enc.to(x.dtype)
    indices, values = [], []
    for start in range(0, len(x), rows):
        part = x[start : start + rows]
        pre = buffer[: len(part) * d_sae].view(len(part), d_sae)
        flat = torch.addmm(bias, part, weight, out=pre).view(-1)
        index = _where(flat > low)
        values.append(flat[index].float())
        indices.append(index.add_(start * d_sae))
    return torch.cat(indices), torch.cat(values)


def _where(mask: Bool[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Indices of True. On a CPU numpy finds them several times as fast as torch does."""
    return torch.from_numpy(np.flatnonzero(mask.numpy())) if mask.device.type == "cpu" else mask.nonzero()[:, 0]


def kth_largest(values: Float[Tensor, " n"], k: int) -> float:
    """The k-th largest value."""
    return float(values.kthvalue(len(values) - k + 1).values)


def keep_largest(index: Int[Tensor, " n"], value: Float[Tensor, " n"], threshold: float, n_ties: int, d_sae: int) -> Sparse:
    """The survivors above the threshold, and of those equal to it the first `n_ties`, as Sparse."""
    kept = value > threshold
    if n_ties > 0:
        ties = (value == threshold).nonzero()[:n_ties, 0]
        kept[ties] = True
    where = _where(kept)
    index = index[where]
    token = torch.div(index, d_sae, rounding_mode="floor")
    return Sparse(token, index - token * d_sae, value[where])


def decode(kept: Sparse, W_dec: Float[Tensor, "d_sae d_model"], batch: int) -> Float[Tensor, "batch d_model"]:
    """Sum of value * W_dec[latent] over each token's kept latents."""
    return torch.nn.functional.embedding_bag(
        kept.latent, W_dec, offsets(kept.token, batch)[:-1], per_sample_weights=kept.value, mode="sum"
    )


def value_grads(kept: Sparse, grad: Float[Tensor, "batch d_model"], W_dec: Float[Tensor, "d_sae d_model"]) -> Float[Tensor, " n"]:
    """<grad[token], W_dec[latent]> of every kept pair: the gradient of the loss with respect to its value."""
    shape = (len(grad), len(W_dec))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that CSR tensors are new, and that nobody checks their indices
        pattern = torch.sparse_csr_tensor(offsets(kept.token, len(grad)), kept.latent, torch.zeros_like(kept.value), shape)
    return torch.sparse.sampled_addmm(pattern, grad, W_dec.T, beta=0.0).values()


class ByLatent(NamedTuple):
    """Kept pairs sorted by latent.

    order: their places in Sparse. token: their tokens. start: where each latent begins, and the number of pairs.
    """

    order: Int[Tensor, " n"]
    token: Int[Tensor, " n"]
    start: Int[Tensor, " d_sae_plus_1"]


def by_latent(kept: Sparse, d_sae: int) -> ByLatent:
    """Sorts the pairs by latent, stably, so that sums over tokens have one order whatever the machine."""
    latent, order = kept.latent.sort(stable=True)
    return ByLatent(order, kept.token[order], offsets(latent, d_sae))


def weight_grads(
    at: ByLatent, weights: Float[Tensor, " n"], rows: Float[Tensor, "batch d_model"]
) -> Float[Tensor, "d_sae d_model"]:
    """Sum over each latent's kept tokens of weight * rows[token]; `weights` are in Sparse's order."""
    return torch.nn.functional.embedding_bag(at.token, rows, at.start[:-1], per_sample_weights=weights[at.order], mode="sum")


class LatentGrads(NamedTuple):
    """Gradients of W_enc, W_dec and b_enc, and along: the component of W_dec's gradient along each row of W_dec, still in it."""

    W_enc: Float[Tensor, "d_sae d_model"]
    W_dec: Float[Tensor, "d_sae d_model"]
    b_enc: Float[Tensor, " d_sae"]
    along: Float[Tensor, " d_sae"]


def latent_grads(
    kept: Sparse,
    of_value: Float[Tensor, " n"],
    grad: Float[Tensor, "batch d_model"],
    x: Float[Tensor, "batch d_model"],
    d_sae: int,
) -> LatentGrads:
    """Gradients of what latents have, given those of the kept values and of the reconstruction; x is the encoder's input."""
    at = by_latent(kept, d_sae)
    b_enc = torch.bincount(kept.latent, of_value, minlength=d_sae).float()
    W_enc, W_dec = weight_grads(at, of_value, x), weight_grads(at, kept.value, grad)
    # <dL/dW_dec[f], W_dec[f]> is a sum over kept pairs too: the dense gradient need not be read for it.
    along = torch.bincount(kept.latent, of_value * kept.value, minlength=d_sae).float()
    return LatentGrads(W_enc, W_dec, b_enc, along)


def offsets(sorted_ids: Int[Tensor, " n"], n: int) -> Int[Tensor, " n_plus_1"]:
    """Where each of the ids 0 .. n-1 begins in a sorted list of them, and the list's length at the end."""
    counts = torch.bincount(sorted_ids, minlength=n)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
