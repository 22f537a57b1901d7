"""Appending some elements of a tile to a list that all programs share.

Knows: how a tile finds room for its elements with one atomic addition, however many they are.
Does not know: what the elements are. The order of a list made this way differs from run to run; its contents do not.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def append(value, flat, keep, count_ptr, value_ptr, flat_ptr, capacity):
    """Appends value and flat [rows, columns] where `keep`; what would lie beyond the capacity is counted but not written."""
    ones = keep.to(tl.int32)
    per_row = tl.sum(ones, 1)
    total = tl.sum(per_row, 0)
    if total > 0:
        # One addition a tile: single elements would queue for the same address.
        base = tl.atomic_add(count_ptr, total.to(tl.int64), sem="relaxed")
        # The count may pass 32 bits, places do not: half the registers for a tile of them.
        base = tl.minimum(base, capacity).to(tl.int32)
        before = (tl.cumsum(per_row, 0) - per_row)[:, None] + tl.cumsum(ones, 1) - ones
        at = base + before
        write = keep & (at < capacity)
        tl.store(value_ptr + at, value, mask=write)
        tl.store(flat_ptr + at, flat, mask=write)
