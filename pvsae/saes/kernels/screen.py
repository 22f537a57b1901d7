"""The encoder's product on CPUs with int8 instructions: screened in int8, then exact in fp32 where it may count.

Knows: how tokens and weights become int8, how far the product is off then, and oneDNN's product of u8 and s8.
Does not know: how large the threshold is, or what is done with what passes it.

One pre-activation in two hundred is kept, so the others need to be known only well enough to drop them. oneDNN multiplies in
int8 several times as fast as in fp32, and its epilogue adds a bias, takes the ReLU and writes one byte a pair: with the threshold
in the bias, a byte is not 0 where the pair may pass. Those pairs alone are computed in fp32.

Both are rounded down after a random part of a step, the same for all rows, was added to each dimension. So errors have mean 0
and are independent, whatever the numbers are: rounded to the nearest, small elements would all become 0 beside a large one. With
steps of s for x and r for a latent's weights w, the product is off by a sum of independent errors whose standard deviation is at
most sqrt(s^2 |w|^2 + r^2 |x|^2) / 2. A pair passes the screen up to SIGMAS of that below the threshold; of those at the threshold
itself at most exp(-SIGMAS^2 / 2), four in a million, are left out (Hoeffding 1963), and of those above it fewer.

To keep both roundings small, dimensions are balanced before: x is divided and W multiplied by sqrt(rms of x / rms of W) of each
dimension (Xiao et al. 2022, arXiv 2211.10438), and tokens that are far larger than most go through fp32.

oneDNN packs its second operand, slowly, so that is the tokens, which are fewer than the latents. A latent's row then is one of
the first operand, and its bias, less the threshold, is BIAS more columns of it beside a constant in every token.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from pvsae.saes.kernels import eager

SIGMAS = 5.0
ROWS = 1024  # latents a product: what is made of them is searched while it is still in the cache
BIAS = 32  # columns that the bias is spread over
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
    x: Float[Tensor, "batch d_model"],
    W_enc: Float[Tensor, "d_sae d_model"],
    b_enc: Float[Tensor, " d_sae"],
    low: float,
    most: int | None = None,
) -> Found | None:
    """Pre-activations x @ W_enc.T + b_enc above `low`, which must be above 0; None if more than `most` pass the screen, or if a
    quarter of the tokens would go through fp32 besides: then the plain product is the cheaper one."""
    batch, d_sae = len(x), len(W_enc)
    balance = _balance(x, W_enc)
    tokens, step, length, wild = _tokens(x, balance)
    if most is not None and len(wild) > batch // 4:
        return None
    packed = torch.ops.onednn.qlinear_prepack(tokens, [min(ROWS, d_sae), tokens.shape[1]])
    ones, zeros = torch.ones(batch), torch.zeros(batch, dtype=torch.int32)
    rows = torch.empty(min(ROWS, d_sae), tokens.shape[1] - BIAS)
    latents = torch.empty(len(rows), tokens.shape[1], dtype=torch.int8)
    parts: list[Tensor] = []
    n_passed = 0
    for start in range(0, d_sae, ROWS):
        some = slice(start, min(start + ROWS, d_sae))
        n = some.stop - start
        _latents(W_enc[some], b_enc[some] - low, balance, step, length, rows[:n], latents[:n])
        # A sum of 1 is enough to make a byte of 255: only whether it is above 0 matters.
        passed = torch.ops.onednn.qlinear_pointwise(
            latents[:n].view(torch.uint8), 1.0, 128, packed, ones, zeros, None, 1 / 256, 0, torch.uint8, "relu", [], ""
        )
        if len(wild):
            passed[:, wild] = (torch.addmm(b_enc[some], x[wild], W_enc[some].T) > low).T.to(torch.uint8)
        parts.append(_nonzero(passed) + start * batch)
        n_passed += len(parts[-1])
        if most is not None and n_passed > most:
            return None
    pair = torch.cat(parts)
    latent = torch.div(pair, batch, rounding_mode="floor")
    value = eager.dots(latent, pair - latent * batch, W_enc, x) + b_enc[latent]
    passes = eager.where(value > low)
    latent = latent[passes]
    token = pair[passes] - latent * batch
    order = eager.sorted_places(token, batch)
    return Found((token * d_sae + latent)[order], value[passes][order], len(pair))


@cache
def _parts(d: int, seed: int) -> Float[Tensor, " d"]:
    """The part of a step that is added to each dimension before it is rounded down."""
    return torch.rand(d, generator=torch.Generator().manual_seed(seed))


def _tokens(
    x: Float[Tensor, "batch d_model"], balance: Float[Tensor, " d_model"]
) -> tuple[Int[Tensor, "batch d_model_and_bias"], float, float, Int[Tensor, " n_wild"]]:
    """Tokens in int8 and the constants beside them, the step they are rounded to, the longest one's length in steps, and which
    are too large for that."""
    scaled = x / balance
    size = torch.maximum(scaled.amax(1), scaled.amin(1).neg_())
    limit = min(float(size.max()), WILD * float(size.median()))
    tame = size <= limit
    wild = (~tame).nonzero()[:, 0]
    step = max(limit, 1e-20) / 127
    torch.add(_parts(x.shape[1], 0), scaled, alpha=1 / step, out=scaled).floor_()
    length = float((torch.linalg.vector_norm(scaled, dim=1) * tame).nan_to_num(0.0).max())
    out = torch.full((len(x), x.shape[1] + BIAS), 127, dtype=torch.int8)
    out[:, : x.shape[1]] = scaled.clamp_(-127, 127)
    return out, step, length, wild


def _latents(
    W: Float[Tensor, "n d_model"], bias: Float[Tensor, " n"], balance: Float[Tensor, " d_model"], step: float, length: float,
    rows: Float[Tensor, "n d_model"], out: Int[Tensor, "n d_model_and_bias"],
) -> None:  # fmt: skip
    """Some latents in int8 (plus 128, read as unsigned), and behind them, spread over columns, their bias and the margin for all
    roundings.

    Everything in a row is in its own steps times the tokens', so that a row's sums mean what they say but for a factor.
    """
    d = W.shape[1]
    torch.mul(W, balance, out=rows)
    size = torch.maximum(rows.amax(1), rows.amin(1).neg_()).div_(127)
    # A bias that is too large for the columns makes the row's steps larger; one that is too small may be as it is cut off.
    size = torch.maximum(size, bias / (0.9 * BIAS * 127 * 127 * step)).clamp_min_(1e-20)
    margin = torch.linalg.vector_norm(rows, dim=1).div_(size).square_().add_(length**2).sqrt_().mul_(SIGMAS / 2)
    units = (bias / (size * step)).add_(margin).div_(127).ceil_().clamp_(-127 * BIAS, 127 * BIAS)
    out[:, :d] = torch.addcmul(_parts(d, 1), rows, size.reciprocal_()[:, None], out=rows).floor_()
    each = torch.div(units, BIAS, rounding_mode="floor")
    more = (units - BIAS * each)[:, None] > torch.arange(BIAS)
    out[:, d:] = each[:, None] + more
    out.view(torch.uint8).bitwise_xor_(128)


def _balance(x: Float[Tensor, "batch d_model"], W: Float[Tensor, "d_sae d_model"]) -> Float[Tensor, " d_model"]:
    """What x is divided by and W multiplied by, a number a dimension, from some rows of both."""
    rms = [some[:: max(1, len(some) // 256)].square().mean(0).sqrt() for some in (x, W)]
    of_x, of_w = (r.clamp_min(1e-3 * float(r.mean()) + 1e-20) for r in rms)
    return (of_x / of_w).sqrt_()


def _nonzero(flags: UInt8[Tensor, "rows batch"]) -> Int[Tensor, " n"]:
    """Flat indices of the bytes that are not 0, eight at a time: few are."""
    flat = flags.view(-1)
    whole = len(flat) // 8 * 8
    words = flat[:whole].view(torch.int64)
    some = np.flatnonzero((words != 0).numpy())
    inside = np.flatnonzero(words.numpy()[some].view(np.uint8) != 0)
    found = some[inside >> 3] * 8 + (inside & 7)
    if whole < len(flat):
        found = np.concatenate([found, whole + np.flatnonzero(flat[whole:].numpy())])
    return torch.from_numpy(found)
