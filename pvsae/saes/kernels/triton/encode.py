"""The encoder's product with selection in its epilogue: the [B, F] matrix of pre-activations is never in memory.

Knows: the product in tiles, a bound that decides which pre-activations go to the pool, what to do when the pool holds too few
or too many.
Does not know: how the largest of a pool are found (select.py), or what they are used for.

A batch keeps n of B * F pre-activations, one in two thousand at k = 64 of F = 131072. The threshold hardly moves from one
step to the next, so the last one, lowered a little, lets through somewhat more than n: a tile appends its few survivors to a
pool, and the exact n largest are found there. The bound only decides how much work is done, never what is kept: if the pool
holds fewer than n, or more than it has room for, then the product is made again to count pre-activations by size, and a third
time with a bound that is known to fit.

The host reads one number a call, how many survived. It is copied while selection and sorting are queued on the guess that all
is well, so that the device has work while the host waits for the product.

By arithmetic, for d = 3584, F = 131072, B = 4096 in bf16 on an H100 SXM (989 Tflop/s, 3.35 TB/s by the datasheet): the
product is 3.85 Tflop, 6.5 ms at 60% of the peak; the encoder's rows are 0.94 GB, 0.35 ms at 80% of the bandwidth if read
once; writing the matrix and reading it back once would be 4.3 GB in fp32, 1.6 ms, and a sort over it many times that. None of
this has been measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from pvsae.saes.kernels.eager import Sparse
from pvsae.saes.kernels.triton.append import append
from pvsae.saes.kernels.triton.order import from_flat
from pvsae.saes.kernels.triton.select import Pool, largest
from pvsae.saes.later import read_later

LEAST_ROOM = 1024  # of a pool, however few are kept
BINS = 2048
VALUE_LEVELS = ((20, 2048), (10, 1024), (0, 1024))  # shift and number of bins: together all bits of a positive fp32
INTERPRETED = not isinstance(tl.sum, triton.JITFunction)  # decided when Triton was imported


@dataclass(frozen=True)
class Tiles:
    """Shape of a program's work in the product.

    Attributes:
        tokens, latents, inner: rows of x, rows of W_enc and columns of both in shared memory at a time; powers of 2 from 16.
        warps, stages: Triton's num_warps and num_stages.
        group: tiles of latents that are taken through all tokens together, so that they stay in the L2 cache.
    """

    tokens: int = 128
    latents: int = 256
    inner: int = 64
    warps: int = 8
    stages: int = 3
    group: int = 8


# 128 x 256 accumulators are 128 registers a thread at 8 warps, and three stages of bf16 144 KB of the 227 KB of shared memory.
# Compiled for sm_90 (not run): WGMMA and asynchronous copies, and 0.9 KB a thread spilled, by the size in the epilogue; with
# 128 x 128 nothing is spilled, but operands are read more often. Which is faster, benchmarks/sae_kernels.py --tiles can tell.
# fp32 products do not run on matrix units (unless as TF32): smaller tiles keep accumulators and operands in registers.
BF16_TILES = Tiles()
FP32_TILES = Tiles(tokens=64, latents=128, inner=32, warps=8, stages=3)


# --------------------------------------------------------------------------------------------------------------- kernels
@triton.jit
def _place(n_tokens, n_latents, TOKENS: tl.constexpr, LATENTS: tl.constexpr, GROUP: tl.constexpr):
    """First token and first latent of this program's tile: within a group of latent tiles, tokens come last."""
    token_tiles = tl.cdiv(n_tokens, TOKENS)
    latent_tiles = tl.cdiv(n_latents, LATENTS)
    group = tl.program_id(0) // (GROUP * token_tiles)
    within = tl.program_id(0) % (GROUP * token_tiles)
    size = tl.minimum(latent_tiles - group * GROUP, GROUP)
    return within // size * TOKENS, (group * GROUP + within % size) * LATENTS


@triton.jit
def _product(
    x_ptr, w_ptr, b_ptr, n_tokens, n_latents, d, x_stride, w_stride, token0, latent0,
    TOKENS: tl.constexpr, LATENTS: tl.constexpr, INNER: tl.constexpr,
    EVEN: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """fp32 pre-activations [TOKENS, LATENTS] of one tile; rows and columns beyond the ends repeat others."""
    token = (token0 + tl.arange(0, TOKENS)) % n_tokens
    latent = (latent0 + tl.arange(0, LATENTS)) % n_latents
    inner = tl.arange(0, INNER)
    x_ptrs = x_ptr + token.to(tl.int64)[:, None] * x_stride + inner[None, :]
    w_ptrs = w_ptr + latent.to(tl.int64)[:, None] * w_stride + inner[None, :]
    total = tl.zeros((TOKENS, LATENTS), dtype=tl.float32)
    for start in range(0, d, INNER):
        if EVEN:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            inside = inner[None, :] < d - start
            x = tl.load(x_ptrs, mask=inside, other=0.0)
            w = tl.load(w_ptrs, mask=inside, other=0.0)
        if WIDEN:  # the interpreter's product takes bf16 for integers
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        total = tl.dot(x, tl.trans(w), total, input_precision=PRECISION)
        x_ptrs += INNER
        w_ptrs += INNER
    return total + tl.load(b_ptr + latent).to(tl.float32)[None, :]


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Left and right half of a tile: what is derived from one half at a time takes half the registers."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _collect_quarter(
    pre, token0, latent0, n_tokens, n_latents, bound_ptr, before_ptr, count_ptr, value_ptr, flat_ptr, capacity,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TIES: tl.constexpr,
):  # fmt: skip
    token = token0 + tl.arange(0, ROWS)
    latent = latent0 + tl.arange(0, COLUMNS)
    flat = token.to(tl.int64)[:, None] * n_latents + latent[None, :]
    bound = tl.load(bound_ptr)
    keep = pre > bound
    if TIES:
        keep = keep | ((pre == bound) & (flat < tl.load(before_ptr)))
    keep = keep & (pre > 0) & (token < n_tokens)[:, None] & (latent < n_latents)[None, :]
    append(pre, flat, keep, count_ptr, value_ptr, flat_ptr, capacity)


@triton.jit
def _collect_half(
    pre, token0, latent0, n_tokens, n_latents, bound_ptr, before_ptr, count_ptr, value_ptr, flat_ptr, capacity,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TIES: tl.constexpr,
):  # fmt: skip
    left, right = _halves(pre, ROWS, COLUMNS)
    _collect_quarter(
        left, token0, latent0, n_tokens, n_latents, bound_ptr, before_ptr, count_ptr, value_ptr, flat_ptr, capacity,
        ROWS, COLUMNS // 2, TIES,
    )  # fmt: skip
    _collect_quarter(
        right, token0, latent0 + COLUMNS // 2, n_tokens, n_latents, bound_ptr, before_ptr, count_ptr, value_ptr, flat_ptr,
        capacity, ROWS, COLUMNS // 2, TIES,
    )  # fmt: skip


@triton.jit
def _collect(
    x_ptr, w_ptr, b_ptr, n_tokens, n_latents, d, x_stride, w_stride, bound_ptr, before_ptr,
    value_ptr, flat_ptr, count_ptr, capacity,
    TOKENS: tl.constexpr, LATENTS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr,
    EVEN: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr, TIES: tl.constexpr,
):  # fmt: skip
    """Appends to the pool what is above the bound; TIES: or equal to it with a flat index below `before`. A program a tile."""
    token0, latent0 = _place(n_tokens, n_latents, TOKENS, LATENTS, GROUP)
    pre = _product(
        x_ptr, w_ptr, b_ptr, n_tokens, n_latents, d, x_stride, w_stride, token0, latent0,
        TOKENS, LATENTS, INNER, EVEN, WIDEN, PRECISION,
    )  # fmt: skip
    left, right = _halves(pre, TOKENS, LATENTS)
    _collect_half(
        left, token0, latent0, n_tokens, n_latents, bound_ptr, before_ptr, count_ptr, value_ptr, flat_ptr, capacity,
        TOKENS, LATENTS // 2, TIES,
    )  # fmt: skip
    _collect_half(
        right, token0, latent0 + LATENTS // 2, n_tokens, n_latents, bound_ptr, before_ptr, count_ptr, value_ptr, flat_ptr,
        capacity, TOKENS, LATENTS // 2, TIES,
    )  # fmt: skip


@triton.jit
def _count_half(
    pre, token0, latent0, n_tokens, n_latents, bound_ptr, counts_ptr, origin_ptr, shift, bins,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TIES: tl.constexpr,
):  # fmt: skip
    token = token0 + tl.arange(0, ROWS)
    latent = latent0 + tl.arange(0, COLUMNS)
    inside = (token < n_tokens)[:, None] & (latent < n_latents)[None, :]
    if TIES:
        key = token.to(tl.int64)[:, None] * n_latents + latent[None, :]
        inside = inside & (pre == tl.load(bound_ptr))
    else:
        key = pre.to(tl.int32, bitcast=True).to(tl.int64)
        inside = inside & (pre > 0)
    bin_ = (key - tl.load(origin_ptr)) >> shift
    inside = inside & (bin_ >= 0) & (bin_ < bins)
    # Many additions to few addresses: slow, but rare, where a histogram in shared memory takes minutes to compile at this size.
    tl.atomic_add(counts_ptr + bin_, tl.full((ROWS, COLUMNS), 1, tl.int64), mask=inside, sem="relaxed")


@triton.jit
def _count(
    x_ptr, w_ptr, b_ptr, n_tokens, n_latents, d, x_stride, w_stride, bound_ptr, counts_ptr, origin_ptr, shift, bins,
    TOKENS: tl.constexpr, LATENTS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr,
    EVEN: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr, TIES: tl.constexpr,
):  # fmt: skip
    """counts[j] += positive pre-activations whose bits, less the origin, are j << shift and up; TIES: whose flat indices are,
    of those equal to the bound. One program a tile."""
    token0, latent0 = _place(n_tokens, n_latents, TOKENS, LATENTS, GROUP)
    pre = _product(
        x_ptr, w_ptr, b_ptr, n_tokens, n_latents, d, x_stride, w_stride, token0, latent0,
        TOKENS, LATENTS, INNER, EVEN, WIDEN, PRECISION,
    )  # fmt: skip
    left, right = _halves(pre, TOKENS, LATENTS)
    _count_half(
        left, token0, latent0, n_tokens, n_latents, bound_ptr, counts_ptr, origin_ptr, shift, bins,
        TOKENS, LATENTS // 2, TIES,
    )  # fmt: skip
    _count_half(
        right, token0, latent0 + LATENTS // 2, n_tokens, n_latents, bound_ptr, counts_ptr, origin_ptr, shift, bins,
        TOKENS, LATENTS // 2, TIES,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------ host
@dataclass(frozen=True)
class Bound:
    """Pre-activations above `value` [1] pass, and those equal to it with a flat index below `before` (None: none of them).

    at_least: as many pass, if the host knows.
    """

    value: Float[Tensor, " 1"]
    before: int | None = None
    at_least: int | None = None


class Encoder:
    """One product x @ W_enc.T + b_enc, which is made anew by every method that needs it.

    Args:
        x: [B, d], converted to the dtype of W_enc: bf16, or fp32.
        W_enc: [F, d].
        b_enc: [F].
        precision: of fp32 products: "ieee", or "tf32" or "tf32x3" on matrix units.
    """

    def __init__(
        self,
        x: Float[Tensor, "batch d_model"],
        W_enc: Float[Tensor, "d_sae d_model"],
        b_enc: Float[Tensor, " d_sae"],
        precision: str = "ieee",
        tiles: Tiles | None = None,
    ) -> None:
        if x.ndim != 2 or x.shape[1] != W_enc.shape[1] or b_enc.shape != W_enc.shape[:1]:
            raise ValueError(f"x {list(x.shape)}, W_enc {list(W_enc.shape)} and b_enc {list(b_enc.shape)} do not go together")
        if x.numel() == 0 or W_enc.numel() == 0:
            raise ValueError(f"nothing to multiply: x {list(x.shape)}, W_enc {list(W_enc.shape)}")
        self.x, self.W_enc, self.b_enc = _rows(x.to(W_enc.dtype)), _rows(W_enc), b_enc.contiguous()
        tiles = tiles or (FP32_TILES if W_enc.dtype == torch.float32 else BF16_TILES)
        self.device, self.n_flat = x.device, len(x) * len(W_enc)
        self._arguments = (
            self.x, self.W_enc, self.b_enc, len(x), len(W_enc), x.shape[1], self.x.stride(0), self.W_enc.stride(0),
        )  # fmt: skip
        self._grid = (triton.cdiv(len(x), tiles.tokens) * triton.cdiv(len(W_enc), tiles.latents),)
        self._options: dict[str, Any] = {
            "TOKENS": tiles.tokens, "LATENTS": tiles.latents, "INNER": tiles.inner, "GROUP": tiles.group,
            "EVEN": x.shape[1] % tiles.inner == 0, "WIDEN": INTERPRETED, "PRECISION": precision,
            "num_warps": tiles.warps, "num_stages": tiles.stages,
        }  # fmt: skip

    def collect(self, bound: Bound, capacity: int) -> Pool:
        """The pre-activations that pass a bound, as far as there is room."""
        pool = Pool(
            torch.empty(capacity, dtype=torch.float32, device=self.device),
            torch.empty(capacity, dtype=torch.int64, device=self.device),
            torch.zeros(1, dtype=torch.int64, device=self.device),
        )
        before = self._integer(bound.before or 0)
        ties = bound.before is not None
        _collect[self._grid](*self._arguments, bound.value, before, *pool, capacity, TIES=ties, **self._options)
        return pool

    def count(self, origin: int, shift: int, bins: int, equal_to: Float[Tensor, " 1"] | None = None) -> Int[Tensor, " bins"]:
        """How many positive pre-activations have (bits - origin) >> shift equal to 0, 1, ..., bins - 1; on the host.

        With `equal_to` it is their flat index instead of their bits, of those that have this value.
        """
        counts = torch.zeros(BINS, dtype=torch.int64, device=self.device)
        value = torch.zeros(1, device=self.device) if equal_to is None else equal_to
        ties = equal_to is not None
        _count[self._grid](*self._arguments, value, counts, self._integer(origin), shift, bins, TIES=ties, **self._options)
        return counts[:bins].cpu()

    def fitting_bound(self, n: int, capacity: int) -> Bound:
        """A bound that n to `capacity` pre-activations pass, or all positive ones if they are fewer. Waits for the device."""
        above, origin = 0, 0
        for shift, bins in VALUE_LEVELS:
            upto = self.count(origin, shift, bins).flip(0).cumsum(0).flip(0) + above  # at the bin's lower edge or above
            if upto[0] < n:
                return Bound(self._value(0), at_least=int(upto[0]))
            chosen = int((upto >= n).sum()) - 1
            origin += chosen << shift
            if upto[chosen] <= capacity:
                return Bound(self._value(max(origin - 1, 0)), at_least=n)
            above = int(upto[chosen + 1]) if chosen + 1 < bins else above
        before = self._end_among_equals(self._value(origin), n - above, capacity - above)
        return Bound(self._value(origin), before, at_least=n)

    def _end_among_equals(self, value: Float[Tensor, " 1"], n: int, capacity: int) -> int:
        """A flat index below which n to `capacity` pre-activations have this value, where all that have it are more."""
        below, origin = 0, 0
        width = (self.n_flat - 1).bit_length()
        while True:
            shift = max(width - 11, 0)
            upto = self.count(origin, shift, 1 << (width - shift), value).cumsum(0) + below
            chosen = int((upto < n).sum())
            if upto[chosen] <= capacity:
                return origin + ((chosen + 1) << shift)
            below = int(upto[chosen - 1]) if chosen else below
            origin, width = origin + (chosen << shift), shift

    def _value(self, bits: int) -> Float[Tensor, " 1"]:
        return self._integer(bits).to(torch.int32).view(torch.float32)

    def _integer(self, value: int) -> Int[Tensor, " 1"]:
        return torch.full((1,), value, dtype=torch.int64, device=self.device)


def encode_select(
    x: Float[Tensor, "batch d_model"],
    W_enc: Float[Tensor, "d_sae d_model"],
    b_enc: Float[Tensor, " d_sae"],
    n_keep: int,
    guess: float | Tensor | None = None,
    *,
    slack: float = 0.9,
    room: float = 4.0,
    precision: str = "ieee",
    tiles: Tiles | None = None,
) -> tuple[Sparse, Float[Tensor, ""]]:
    """The n_keep largest of relu(x @ W_enc.T + b_enc), exactly; ties go to the lowest token, then latent. Zeros are never kept.

    Args:
        x, W_enc, b_enc: [B, d], [F, d], [F]; the product is of W_enc's dtype, sums and values are fp32.
        guess: what the threshold may be, such as the last step's; a tensor may stay on the device. None: nothing is known. It
            decides how fast the result is found, not what it is.
        slack: everything above slack * guess is collected.
        room: the pool has room for room * n_keep; a pre-activation takes 12 bytes.
        precision, tiles: see Encoder, Tiles.

    Returns: what was kept, and the smallest value of it (0 if nothing is positive), on the device.
    """
    encoder = Encoder(x, W_enc, b_enc, precision, tiles)
    n_keep = min(n_keep, encoder.n_flat)
    if n_keep <= 0:
        return _none(x, len(W_enc)), torch.zeros((), device=x.device)
    capacity = min(max(int(room * n_keep), n_keep, LEAST_ROOM), encoder.n_flat)
    if guess is None:
        bounds = [encoder.fitting_bound(n_keep, capacity)]
    else:
        value = guess.reshape(1).float() if isinstance(guess, Tensor) else torch.full((1,), float(guess), device=x.device)
        bounds = [Bound(value * slack)]
    for bound in bounds:
        pool = encoder.collect(bound, capacity)
        read = read_later(pool.filled)
        # Queued before the host knows whether it is of use: then the device need not wait for the host.
        found = largest(pool, n_keep, encoder.n_flat)
        kept = from_flat(found.flat, found.value, len(W_enc))
        (count,) = read()
        if n_keep <= count <= capacity:
            return kept, found.threshold
        if bound.at_least is None:
            bounds.append(encoder.fitting_bound(n_keep, capacity))
    if count != bound.at_least or count >= n_keep:
        raise RuntimeError(f"the same product twice: {count} values passed a bound made for {bound.at_least} to {capacity}")
    # Fewer than n_keep are positive, and all of them are in the pool.
    kept = from_flat(pool.flat[:count], pool.value[:count], len(W_enc))
    return kept, kept.value.min() if count else torch.zeros((), device=x.device)


def survivors(
    x: Float[Tensor, "batch d_model"],
    W_enc: Float[Tensor, "d_sae d_model"],
    b_enc: Float[Tensor, " d_sae"],
    low: float,
    *,
    expected: int = 2**16,
    precision: str = "ieee",
    tiles: Tiles | None = None,
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """Pre-activations above max(low, 0): flat indices (token * d_sae + latent, ascending) and fp32 values.

    The host waits for their number; the product is made a second time if they are more than `expected`.
    """
    encoder = Encoder(x, W_enc, b_enc, precision, tiles)
    bound = Bound(torch.full((1,), max(low, 0.0), device=x.device))
    pool = encoder.collect(bound, min(expected, encoder.n_flat))
    count = int(pool.filled)
    if count > len(pool.value):
        pool = encoder.collect(bound, count)
    flat, order = pool.flat[:count].sort()
    return flat, pool.value[:count][order]


def _none(x: Tensor, d_sae: int) -> Sparse:
    return from_flat(torch.empty(0, dtype=torch.int64, device=x.device), torch.empty(0, device=x.device), d_sae)


def _rows(matrix: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """The matrix with its rows contiguous, which they usually are."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
