"""Sparse products of a training step: each reads whole rows of a matrix for the kept pairs alone.

Knows: pairs in the order of tokens and in the order of latents, and the matrices' rows.
Does not know: what is kept and why, or what the sums are used for.

A program makes one tile of one row of the result and takes its pairs a few at a time, so that several rows are on their way
from memory at once; threads of a warp read neighbouring columns. There are no atomics: sums have one order, so the same input
gives the same bits. Everything is read in the dtype that it has and summed in fp32.

By arithmetic, for d = 3584, B = 4096, k = 64 (262144 pairs): decoding reads 3.8 GB of fp32 rows and as much again is read for
the value gradients, 1.4 ms each at 80% of an H100's 3.35 TB/s, half of it from a bf16 copy; the weight gradients write 3.8 GB
at F = 131072 and read rows that mostly are in the L2 cache, because all latents of one column tile come before the next. None
of this has been measured. A latent that nearly every token keeps makes one program read nearly every row of that column tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from pvsae.saes.kernels.eager import ByLatent, LatentGrads, Sparse
from pvsae.saes.kernels.triton.order import by_latent, by_token

COLUMNS = 512  # of a tile: 4 neighbouring fp32 a thread at 4 warps
PAIRS = 4  # rows on their way at once


@triton.jit
def _decode(latent_ptr, value_ptr, start_ptr, w_ptr, out_ptr, d, w_stride, PAIRS: tl.constexpr, COLUMNS: tl.constexpr):
    """out[t] = sum of value * w[latent] over the pairs of token t. One program a token and COLUMNS columns."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < d
    end = tl.load(start_ptr + token + 1)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for first in range(tl.load(start_ptr + token), end, PAIRS):
        pair = first + tl.arange(0, PAIRS)
        latent = tl.load(latent_ptr + pair, mask=pair < end, other=0)
        value = tl.load(value_ptr + pair, mask=pair < end, other=0.0)
        mask = (pair < end)[:, None] & inside[None, :]
        rows = tl.load(w_ptr + latent[:, None] * w_stride + column[None, :], mask=mask, other=0.0)
        total += tl.sum(value[:, None] * rows.to(tl.float32), 0)
    tl.store(out_ptr + token * d + column, total, mask=inside)


@triton.jit
def _value_grads(
    latent_ptr, start_ptr, grad_ptr, w_ptr, out_ptr, d, grad_stride, w_stride, PAIRS: tl.constexpr, COLUMNS: tl.constexpr
):
    """out[pair] = <grad[token], w[latent]>. One program a token: its row of grad stays in the L1 cache."""
    token = tl.program_id(0).to(tl.int64)
    end = tl.load(start_ptr + token + 1)
    for first in range(tl.load(start_ptr + token), end, PAIRS):
        pair = first + tl.arange(0, PAIRS)
        latent = tl.load(latent_ptr + pair, mask=pair < end, other=0)
        total = tl.zeros((PAIRS, COLUMNS), dtype=tl.float32)
        for start in range(0, d, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            mask = (pair < end)[:, None] & (column < d)[None, :]
            rows = tl.load(w_ptr + latent[:, None] * w_stride + column[None, :], mask=mask, other=0.0)
            grad = tl.load(grad_ptr + token * grad_stride + column, mask=column < d, other=0.0)
            total += rows.to(tl.float32) * grad.to(tl.float32)[None, :]
        tl.store(out_ptr + pair, tl.sum(total, 1), mask=pair < end)


@triton.jit
def _gather_sum(token_ptr, weight_ptr, start, end, row_ptr, stride, column, inside, PAIRS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum of weight * rows[token] over the pairs from start to end: fp32 [COLUMNS]."""
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for first in range(start, end, PAIRS):
        pair = first + tl.arange(0, PAIRS)
        token = tl.load(token_ptr + pair, mask=pair < end, other=0)
        weight = tl.load(weight_ptr + pair, mask=pair < end, other=0.0)
        mask = (pair < end)[:, None] & inside[None, :]
        rows = tl.load(row_ptr + token[:, None] * stride + column[None, :], mask=mask, other=0.0)
        total += tl.sum(weight[:, None] * rows.to(tl.float32), 0)
    return total


@triton.jit
def _weight_grads(
    token_ptr, start_ptr, a_ptr, g_ptr, dec_ptr, c_ptr, x_ptr, enc_ptr, bias_ptr, along_ptr, d, g_stride, x_stride,
    BOTH: tl.constexpr, PAIRS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dec[f] = sum of a * g[token]; BOTH: enc[f] = sum of c * x[token], bias[f] = sum of c, along[f] = sum of a * c. One
    program a latent and columns.

    Latents are the first axis of the grid, which runs fastest: programs at work together share column tiles of g and x.
    """
    latent = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < d
    start = tl.load(start_ptr + latent)
    end = tl.load(start_ptr + latent + 1)
    dec = _gather_sum(token_ptr, a_ptr, start, end, g_ptr, g_stride, column, inside, PAIRS, COLUMNS)
    tl.store(dec_ptr + latent * d + column, dec, mask=inside)
    if BOTH:
        enc = _gather_sum(token_ptr, c_ptr, start, end, x_ptr, x_stride, column, inside, PAIRS, COLUMNS)
        tl.store(enc_ptr + latent * d + column, enc, mask=inside)
        if tl.program_id(1) == 0:
            bias = tl.zeros((COLUMNS,), dtype=tl.float32)
            along = tl.zeros((COLUMNS,), dtype=tl.float32)
            for first in range(start, end, COLUMNS):
                pair = first + tl.arange(0, COLUMNS)
                c = tl.load(c_ptr + pair, mask=pair < end, other=0.0)
                bias += c
                along += c * tl.load(a_ptr + pair, mask=pair < end, other=0.0)
            tl.store(bias_ptr + latent, tl.sum(bias, 0))
            tl.store(along_ptr + latent, tl.sum(along, 0))


def decode(kept: Sparse, W_dec: Float[Tensor, "d_sae d_model"], batch: int) -> Float[Tensor, "batch d_model"]:
    """Sum of value * W_dec[latent] over each token's kept latents, fp32; W_dec may be a bf16 copy."""
    W_dec, d = _rows(W_dec), W_dec.shape[1]
    out = torch.empty(batch, d, dtype=torch.float32, device=W_dec.device)
    columns = _columns(d)
    if batch:
        _decode[(batch, triton.cdiv(d, columns))](
            kept.latent, kept.value, by_token(kept, batch), W_dec, out, d, W_dec.stride(0), PAIRS=PAIRS, COLUMNS=columns
        )
    return out


def value_grads(
    kept: Sparse, grad: Float[Tensor, "batch d_model"], W_dec: Float[Tensor, "d_sae d_model"],
) -> Float[Tensor, " n"]:  # fmt: skip
    """<grad[token], W_dec[latent]> of every kept pair, fp32: the gradient of the loss with respect to its value."""
    grad, W_dec, d = _rows(grad), _rows(W_dec), W_dec.shape[1]
    out = torch.empty(len(kept.value), dtype=torch.float32, device=W_dec.device)
    if len(grad):
        _value_grads[(len(grad),)](
            kept.latent, by_token(kept, len(grad)), grad, W_dec, out, d, grad.stride(0), W_dec.stride(0),
            PAIRS=PAIRS, COLUMNS=_columns(d),
        )  # fmt: skip
    return out


def weight_grads(
    at: ByLatent, weights: Float[Tensor, " n"], rows: Float[Tensor, "batch d_model"]
) -> Float[Tensor, "d_sae d_model"]:
    """Sum over each latent's kept tokens of weight * rows[token], fp32; `weights` are in Sparse's order."""
    return _by_latent(at, weights, rows)[0]


def both_weight_grads(
    at: ByLatent,
    a: Float[Tensor, " n"],
    G: Float[Tensor, "batch d_model"],
    c: Float[Tensor, " n"],
    X: Float[Tensor, "batch d_model"],
) -> tuple[Float[Tensor, "d_sae d_model"], Float[Tensor, "d_sae d_model"], Float[Tensor, " d_sae"], Float[Tensor, " d_sae"]]:
    """Sums over each latent's kept tokens of a * G[token], c * X[token], c and a * c, in one launch.

    a and c are in Sparse's order. With a the kept activations, c their gradients, G the reconstruction's gradient and X the
    encoder's input these are the gradients of W_dec, W_enc and b_enc, and the component of the first along the rows of W_dec.
    """
    dec, enc, bias, along = _by_latent(at, a, G, c, X)
    return dec, enc, bias, along


def latent_grads(
    kept: Sparse,
    W_dec: Float[Tensor, "d_sae d_model"],
    error: Float[Tensor, "batch d_model"],
    x: Float[Tensor, "batch d_model"],
    scale: float,
) -> LatentGrads:
    """Gradients of what latents have, where the reconstruction's is scale * error; x is the encoder's input."""
    of_value = value_grads(kept, error, W_dec).mul_(scale)
    dec, enc, b_enc, along = both_weight_grads(by_latent(kept, len(W_dec)), kept.value * scale, error, of_value, x)
    return LatentGrads(enc, dec, b_enc, along.div_(scale))


def _by_latent(at: ByLatent, a: Tensor, G: Tensor, c: Tensor | None = None, X: Tensor | None = None) -> tuple[Tensor, ...]:
    d_sae, d, both = len(at.start) - 1, G.shape[1], c is not None and X is not None
    G = _rows(G)
    X = _rows(X) if X is not None else G
    a = a[at.order]
    c = c[at.order] if c is not None else a
    outs = [torch.empty(d_sae, d, dtype=torch.float32, device=G.device) for _ in range(1 + both)]
    bias, along = (torch.empty(d_sae, dtype=torch.float32, device=G.device) for _ in range(2))
    columns = _columns(d)
    _weight_grads[(d_sae, triton.cdiv(d, columns))](
        at.token, at.start, a, G, outs[0], c, X, outs[-1], bias, along, d, G.stride(0), X.stride(0),
        BOTH=both, PAIRS=PAIRS, COLUMNS=columns,
    )  # fmt: skip
    return *outs, bias, along


def _columns(d: int) -> int:
    """Columns of a tile: a power of 2."""
    return min(COLUMNS, max(16, triton.next_power_of_2(d)))


def _rows(matrix: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """The matrix with its rows contiguous, which they usually are."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
