"""The sparse parts of a training step in plain torch: the path on CPUs, and the reference that other kernels are tested against.

Knows: encoding, exact selection of the largest activations of a batch, decoding, and the gradients of what was kept.
Does not know: losses, optimisers, schedules, or how many processes there are.

Only the encoder's product touches all B x F pairs of a token and a latent, and it is done in row blocks that stay in the cache:
no [B, F] tensor is ever in memory. Everything after it touches the kept pairs alone. Both weight matrices are [F, d], one row a
latent, because every one of these products reads whole rows.
"""

from __future__ import annotations

import math
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
        index = where(flat > low)
        values.append(flat[index].float())
        indices.append(index.add_(start * d_sae))
    return torch.cat(indices), torch.cat(values)


def where(mask: Bool[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Indices of True, ascending. On a CPU numpy finds them several times as fast as torch does."""
    return torch.from_numpy(np.flatnonzero(mask.numpy())) if mask.device.type == "cpu" else mask.nonzero()[:, 0]


def kth_largest(values: Float[Tensor, " n"], k: int) -> float:
    """The k-th largest value. On a CPU numpy finds it several times as fast as torch does."""
    if values.device.type == "cpu":
        return float(np.partition(values.detach().numpy(), len(values) - k)[len(values) - k])
    return float(values.kthvalue(len(values) - k + 1).values)


def sorted_places(ids: Int[Tensor, " n"], n_ids: int) -> Int[Tensor, " n"]:
    """Places of the ids in ascending order, equal ones as they come. Short integers are sorted several times as fast."""
    return ids.to(torch.int16 if n_ids <= 2**15 else torch.int32).sort(stable=True).indices


def keep_largest(index: Int[Tensor, " n"], value: Float[Tensor, " n"], threshold: float, n_ties: int, d_sae: int) -> Sparse:
    """The survivors above the threshold, and of those equal to it the first `n_ties`, as Sparse."""
    kept = value > threshold
    if n_ties > 0:
        ties = (value == threshold).nonzero()[:n_ties, 0]
        kept[ties] = True
    places = where(kept)
    index = index[places]
    token = torch.div(index, d_sae, rounding_mode="floor")
    return Sparse(token, index - token * d_sae, value[places])


def decode(kept: Sparse, W_dec: Float[Tensor, "d_sae d_model"], batch: int) -> Float[Tensor, "batch d_model"]:
    """Sum of value * W_dec[latent] over each token's kept latents."""
    start = offsets(kept.token, batch)[:-1]
    return torch.nn.functional.embedding_bag(kept.latent, W_dec, start, per_sample_weights=kept.value, mode="sum")


def _pattern(
    start: Int[Tensor, " n_rows_plus_1"], column: Int[Tensor, " n"], value: Float[Tensor, " n"], n_columns: int
) -> Tensor:
    """A sparse CSR matrix; its indices are not checked."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that such tensors are new
        return torch.sparse_csr_tensor(start, column, value, (len(start) - 1, n_columns), check_invariants=False)


def dots(
    row: Int[Tensor, " n"], column: Int[Tensor, " n"], a: Float[Tensor, "n_a d_model"], b: Float[Tensor, "n_b d_model"]
) -> Float[Tensor, " n"]:
    """<a[row], b[column]> of pairs that are sorted by row."""
    pattern = _pattern(offsets(row, len(a)), column, a.new_zeros(len(row)), len(b))
    return torch.sparse.sampled_addmm(pattern, a, b.T, beta=0.0).values()


class ByLatent(NamedTuple):
    """Kept pairs sorted by latent.

    order: their places in Sparse. token: their tokens. start: where each latent begins, and the number of pairs.
    """

    order: Int[Tensor, " n"]
    token: Int[Tensor, " n"]
    start: Int[Tensor, " d_sae_plus_1"]


def by_latent(kept: Sparse, d_sae: int) -> ByLatent:
    """Sorts the pairs by latent, stably, so that sums over tokens have one order whatever the machine."""
    order = sorted_places(kept.latent, d_sae)
    return ByLatent(order, kept.token[order], offsets(kept.latent, d_sae))


def weight_grads(
    at: ByLatent,
    weights: Float[Tensor, " n"],
    rows: Float[Tensor, "batch d_model"],
    out: Float[Tensor, "d_sae d_model"] | None = None,
) -> Float[Tensor, "d_sae d_model"]:
    """Sum over each latent's kept tokens of weight * rows[token], into `out` if given; `weights` are in the order of `at`."""
    out = torch.empty(len(at.start) - 1, rows.shape[1], device=rows.device) if out is None else out
    if rows.device.type == "cpu":  # the same bits as embedding_bag's, in less time, and it writes to memory that is there
        return torch.addmm(out, _pattern(at.start, at.token, weights, len(rows)), rows, beta=0, out=out)
    return out.copy_(torch.nn.functional.embedding_bag(at.token, rows, at.start[:-1], per_sample_weights=weights, mode="sum"))


class LatentGrads(NamedTuple):
    """Gradients of W_enc, W_dec and b_enc, and along: the component of W_dec's gradient along each row of W_dec, still in it."""

    W_enc: Float[Tensor, "d_sae d_model"]
    W_dec: Float[Tensor, "d_sae d_model"]
    b_enc: Float[Tensor, " d_sae"]
    along: Float[Tensor, " d_sae"]


def latent_grads(
    kept: Sparse,
    W_dec: Float[Tensor, "d_sae d_model"],
    error: Float[Tensor, "batch d_model"],
    x: Float[Tensor, "batch d_model"],
    scale: float,
    *memory: Float[Tensor, "d_sae d_model"],
) -> LatentGrads:
    """Gradients of what latents have, where the reconstruction's is scale * error.

    Args:
        x: the encoder's input.
        memory: that the two matrices are written to, if given.
    """
    d_sae = len(W_dec)
    at = by_latent(kept, d_sae)
    # In the order of latents, where the larger of the two matrices is read once. The scale waits for the pairs: they are fewer.
    latent, value = kept.latent[at.order], kept.value[at.order]
    of_value = dots(latent, at.token, W_dec, error).mul_(scale)
    W_enc = weight_grads(at, of_value, x, *memory[:1])
    W_dec_grad = weight_grads(at, value * scale, error, *memory[1:])
    b_enc = torch.bincount(latent, of_value, minlength=d_sae).float()
    # <dL/dW_dec[f], W_dec[f]> is a sum over kept pairs too: the dense gradient need not be read for it.
    along = torch.bincount(latent, of_value * value, minlength=d_sae).float()
    return LatentGrads(W_enc, W_dec_grad, b_enc, along)


def large(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uninitialised memory on the CPU for a matrix whose rows are read in no order: in huge pages where the system has them.

    numpy asks Linux for them, torch does not; with pages of 4 KB every row costs a walk through the page table or two.
    """
    size = torch.empty(0, dtype=dtype).element_size() * math.prod(shape)
    return torch.from_numpy(np.empty(size, dtype=np.uint8)).view(dtype).view(*shape)


def offsets(ids: Int[Tensor, " n"], n: int) -> Int[Tensor, " n_plus_1"]:
    """Where each of the ids 0 .. n-1 begins in the sorted list of them, and the list's length at the end."""
    counts = torch.bincount(ids, minlength=n)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
