"""Numbers that a device has yet to compute: their copy is queued now, and the host reads them when it needs them.

Knows: how to copy without waiting. Does not know: what the numbers are.

A host that reads a number the plain way waits for everything that was queued before it, and then the device waits for the host.
A number whose copy was queued before other work is there while that work still runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def read_later(numbers: Tensor) -> Callable[[], Any]:
    """Starts copying a few numbers to the host. The function returned gives them as a list (nested as the tensor is); it waits
    for the copy, but not for what was queued after it."""
    if not numbers.is_cuda:
        return numbers.tolist
    host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    host.copy_(numbers, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> Any:
        copied.synchronize()
        return host.tolist()

    return read
