"""The largest n of a list of positive numbers, exactly, by radix selection; the host waits for nothing.

Knows: values and the flat indices that break ties, and how many of the list's places are filled (on the device).
Does not know: where they come from.

An element's key is (largest value first, lowest flat index first), written as two integers that are small for elements to be
kept. No two keys are the same, so there is one n-th smallest key, and everything up to it is kept. Its digits are found from
the top: a pass counts the digits of the elements that agree with what is known so far, and one program reads off the next
digit. A pass reads the list once, 12 bytes an element; a billion flat indices make 3 passes over values and 3 over indices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from pvsae.saes.kernels.triton.append import append

DIGIT_BITS = 11
VALUE_BITS = 31  # a positive fp32, as an integer
BLOCK = 2048


class Pool(NamedTuple):
    """Elements in any order. value [capacity] fp32 above 0, flat [capacity] int64, filled [1] int64.

    The first `filled` places hold elements; if it is above the capacity, it says how many elements there would have been.
    """

    value: Float[Tensor, " capacity"]
    flat: Int[Tensor, " capacity"]
    filled: Int[Tensor, " 1"]


class Largest(NamedTuple):
    """What was selected, in any order, and its smallest value, on the device. Meaningless if the pool held fewer than n.

    filled [1]: how many places hold something: all of them, or what is kept of this pool where there are others.
    """

    value: Float[Tensor, " n"]
    flat: Int[Tensor, " n"]
    threshold: Float[Tensor, ""]
    filled: Int[Tensor, " 1"]


@triton.jit
def _keys(value):
    """fp32 above 0 -> int64 that is smaller for larger values."""
    return 0x7FFFFFFF - value.to(tl.int32, bitcast=True).to(tl.int64)


@triton.jit
def _count_digits(
    value_ptr, flat_ptr, count_ptr, known_ptr, digits_ptr, capacity, shift,
    SECOND: tl.constexpr, BITS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """digits[j] += elements that agree with the known digits and have j as the next one. One program a SIZE elements."""
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    filled = at < tl.minimum(tl.load(count_ptr), capacity)
    key = _keys(tl.load(value_ptr + at, mask=filled, other=1.0))
    if SECOND:
        agrees = filled & (key == tl.load(known_ptr))
        key = tl.load(flat_ptr + at, mask=agrees, other=0)
        agrees = agrees & ((key >> shift >> BITS) == (tl.load(known_ptr + 1) >> shift >> BITS))
    else:
        agrees = filled & ((key >> shift >> BITS) == (tl.load(known_ptr) >> shift >> BITS))
    digit = ((key >> shift) & ((1 << BITS) - 1)).to(tl.int32)
    counts = tl.histogram(digit, 1 << BITS, agrees)
    tl.atomic_add(digits_ptr + tl.arange(0, 1 << BITS), counts, mask=counts > 0, sem="relaxed")


@triton.jit
def _next_digit(digits_ptr, known_ptr, shift, SECOND: tl.constexpr, BITS: tl.constexpr):
    """Moves on to the digit in which the wanted element lies. known: first key, second key, rank still to find (from 1)."""
    digit = tl.arange(0, 1 << BITS)
    counts = tl.load(digits_ptr + digit).to(tl.int64)
    rank = tl.load(known_ptr + 2)
    upto = tl.cumsum(counts, 0)
    here = (upto >= rank) & (upto - counts < rank)
    found = tl.sum(tl.where(here, digit, 0).to(tl.int64), 0)
    passed = tl.sum(tl.where(here, upto - counts, 0), 0)
    word = known_ptr + 1 if SECOND else known_ptr
    tl.store(word, tl.load(word) | (found << shift))
    tl.store(known_ptr + 2, rank - passed)


@triton.jit
def _compact(
    value_ptr, flat_ptr, count_ptr, known_ptr, kept_ptr, kept_value_ptr, kept_flat_ptr, capacity, n,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Appends the elements up to the known key, in any order. One program a ROWS x COLUMNS elements."""
    at = tl.program_id(0).to(tl.int64) * ROWS * COLUMNS
    at = at + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    filled = at < tl.minimum(tl.load(count_ptr), capacity)
    value = tl.load(value_ptr + at, mask=filled, other=1.0)
    flat = tl.load(flat_ptr + at, mask=filled, other=0)
    key, last = _keys(value), tl.load(known_ptr)
    keep = filled & ((key < last) | ((key == last) & (flat <= tl.load(known_ptr + 1))))
    append(value, flat, keep, kept_ptr, kept_value_ptr, kept_flat_ptr, n)


def _shifts(bits: int) -> list[int]:
    """Where each digit of a number of that many bits begins, from the top."""
    return list(range((max(bits, 1) - 1) // DIGIT_BITS * DIGIT_BITS, -1, -DIGIT_BITS))


def largest(pool: Pool, n: int, n_flat: int, sum_: Callable[[Sequence[Tensor]], None] | None = None) -> Largest:
    """The n largest of the pool, ties going to the lowest flat index; the pool must hold at least n.

    Args:
        n: at least 1.
        n_flat: flat indices are below this.
        sum_: adds tensors up over processes, in place. With it, the n largest of all their pools are found, and each process gets
            those that are its own; no flat index may be in two pools.
    """
    device, capacity = pool.value.device, len(pool.value)
    passes = [(False, s) for s in _shifts(VALUE_BITS)] + [(True, s) for s in _shifts((n_flat - 1).bit_length())]
    known = torch.zeros(3, dtype=torch.int64, device=device)
    known[2:].fill_(n)
    digits = torch.zeros(len(passes), 2**DIGIT_BITS, dtype=torch.int32, device=device)
    grid = (triton.cdiv(capacity, BLOCK),)
    for counts, (second, shift) in zip(digits, passes, strict=True):
        _count_digits[grid](*pool, known, counts, capacity, shift, SECOND=second, BITS=DIGIT_BITS, SIZE=BLOCK)
        if sum_ is not None:
            sum_((counts,))
        _next_digit[(1,)](counts, known, shift, SECOND=second, BITS=DIGIT_BITS)
    room = n if sum_ is None else min(n, capacity)
    value = torch.empty(room, dtype=torch.float32, device=device)
    flat = torch.empty(room, dtype=torch.int64, device=device)
    kept = torch.zeros(1, dtype=torch.int64, device=device)
    _compact[grid](*pool, known, kept, value, flat, capacity, room, ROWS=16, COLUMNS=BLOCK // 16)
    threshold = (2**VALUE_BITS - 1 - known[0]).to(torch.int32).view(torch.float32)
    return Largest(value, flat, threshold, kept)
