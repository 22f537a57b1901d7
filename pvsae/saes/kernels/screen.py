"""The encoder's product on CPUs with int8 instructions: screened in int8, then exact in fp32 where it may count.

Knows: how tokens and weights become int8, how far the product is off then, and oneDNN's product of u8 and s8.
Does not know: how large the threshold is, or what is done with what passes it.

One pre-activation in two hundred is kept, so the others need to be known only well enough to drop them. oneDNN multiplies in
int8 several times as fast as in fp32, and its epilogue adds a bias, takes the ReLU and writes one byte a pair: with the threshold
in the bias, a byte is not 0 where the pair may pass. Those pairs alone are computed in fp32.

Rounding x to steps of s and a latent's weights w to steps of r puts an error on their product whose standard deviation is
sqrt((s^2 |w|^2 + r^2 |x|^2) / 12). A pair passes the screen up to SIGMAS of them below the threshold, so that a pair that is left
out by mistake is one in 10^9 of those that lie at the threshold itself.

To keep both roundings small, dimensions are balanced before: x is divided and W multiplied by sqrt(rms of x / rms of W) of each
dimension (Xiao et al. 2022, arXiv 2211.10438), and tokens that are far larger than most go through fp32.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from pvsae.saes.kernels import eager

SIGMAS = 6.0
ROWS = 512  # tokens a product: their bytes stay in the cache until they have been searched
WEIGHT_ROWS = 256  # latents that are rounded at a time, for the same reason
WILD = 2.0  # a token is computed in fp32 whose largest element is so many times the median token's


class Found(NamedTuple):
    """Pre-activations above a threshold.

    flat: token * d_sae + latent, ascending. value: fp32. n_screened: pairs that passed the screen and were computed for it.
    """

    flat: Int[Tensor, " n"]
    value: Float[Tensor, " n"]
    n_screened: int


@cache
def available() -> bool:
    """Whether this CPU multiplies int8 fast (AVX512-VNNI) and this torch has oneDNN's product."""
    return torch.cpu._is_vnni_supported() and all(hasattr(torch.ops.onednn, n) for n in ("qlinear_prepack", "qlinear_pointwise"))


def survivors(
    x: Float[Tensor, "batch d_model"], W_enc: Float[Tensor, "d_sae d_model"], b_enc: Float[Tensor, " d_sae"], low: float
) -> Found:
    """Pre-activations x @ W_enc.T + b_enc above `low`, which must be above 0."""
    d_sae = len(W_enc)
    balance = _balance(x, W_enc)
    scaled = x / balance
    size = torch.maximum(scaled.amax(1), scaled.amin(1).neg_())
    limit = min(float(size.max()), WILD * float(size.median()))
    tame = size <= limit
    wild = (~tame).nonzero()[:, 0]
    step = max(limit, 1e-20) / 127
    longest = float(torch.linalg.vector_norm(scaled[tame] if len(wild) else scaled, dim=1).max()) if len(wild) < len(x) else 0.0
    tokens = scaled.mul_(1 / step).round_().add_(128).clamp_(0, 255).to(torch.uint8)

    weights, steps, norms = _rounded(W_enc, balance)
    off = ((step * norms).square_() + (steps * longest).square_()).mul_(1 / 12).sqrt_()
    unit = low * 1e-3  # of the bytes written, which count nothing: they saturate at once
    bias = (b_enc - low + unit / 2).addcmul_(off, torch.tensor(SIGMAS))
    packed = torch.ops.onednn.qlinear_prepack(weights, [min(ROWS, len(x)), x.shape[1]])
    zeros = torch.zeros(d_sae, dtype=torch.int32)
    parts = []
    for start in range(0, len(x), ROWS):
        passed = torch.ops.onednn.qlinear_pointwise(
            tokens[start : start + ROWS], step, 128, packed, steps, zeros, bias, unit, 0, torch.uint8, "relu", [], ""
        )
        for token in wild[(wild >= start) & (wild < start + ROWS)].tolist():
            passed[token - start] = torch.addmv(b_enc, W_enc, x[token]) > low
        parts.append(_nonzero(passed) + start * d_sae)
    index = torch.cat(parts)
    token = torch.div(index, d_sae, rounding_mode="floor")
    latent = index - token * d_sae
    pairs = eager.Sparse(token, latent, torch.zeros(len(index)))
    value = eager.value_grads(pairs, x, W_enc) + b_enc[latent]
    passes = eager.where(value > low)
    return Found(index[passes], value[passes], len(index))


def _balance(x: Float[Tensor, "batch d_model"], W: Float[Tensor, "d_sae d_model"]) -> Float[Tensor, " d_model"]:
    """What x is divided by and W multiplied by, a number a dimension, from some rows of both."""
    rms = [some[:: max(1, len(some) // 256)].square().mean(0).sqrt() for some in (x, W)]
    of_x, of_w = (r.clamp_min(1e-3 * float(r.mean()) + 1e-20) for r in rms)
    return (of_x / of_w).sqrt_()


def _rounded(
    W: Float[Tensor, "d_sae d_model"], balance: Float[Tensor, " d_model"]
) -> tuple[Int[Tensor, "d_sae d_model"], Float[Tensor, " d_sae"], Float[Tensor, " d_sae"]]:
    """Balanced weights in int8, the step that each row is rounded to, and the rows' norms before rounding."""
    out = torch.empty(W.shape, dtype=torch.int8)
    steps, norms = torch.empty(len(W)), torch.empty(len(W))
    buffer = torch.empty(min(WEIGHT_ROWS, len(W)), W.shape[1])
    for start in range(0, len(W), WEIGHT_ROWS):
        part = W[start : start + WEIGHT_ROWS]
        rows, here = buffer[: len(part)], slice(start, start + len(part))
        torch.mul(part, balance, out=rows)
        torch.linalg.vector_norm(rows, dim=1, out=norms[here])
        torch.maximum(rows.amax(1), rows.amin(1).neg_(), out=steps[here]).clamp_min_(1e-20).mul_(1 / 127)
        rows.div_(steps[here, None]).round_()
        out[here].copy_(rows)
    return out, steps, norms


def _nonzero(flags: UInt8[Tensor, "rows d_sae"]) -> Int[Tensor, " n"]:
    """Flat indices of the bytes that are not 0, eight at a time: few are."""
    flat = flags.view(-1).numpy()
    whole = len(flat) // 8 * 8
    words = flat[:whole].view(np.uint64)
    some = np.flatnonzero(words != 0)
    inside = np.flatnonzero(words[some].view(np.uint8) != 0)
    found = some[inside // 8] * 8 + inside % 8
    if whole < len(flat):
        found = np.concatenate([found, whole + np.flatnonzero(flat[whole:])])
    return torch.from_numpy(found)
