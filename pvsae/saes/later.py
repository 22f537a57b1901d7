"""Numbers on their way between host and device: copies are queued, and nobody waits for them before they are needed.

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


def to_device(numbers: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host's on a device, there before whatever is queued after it. From memory that is not pinned the host would
    wait until everything that was queued before is done."""
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers.to(device)
