"""The products of a training step behind one set of names, chosen by device: eager torch, or Triton where there is a GPU.

Knows: which implementation fits a device. Does not know: how any of them works.
"""

from __future__ import annotations

import torch

from pvsae.saes.kernels.eager import (
    BLOCK_ELEMENTS,
    ByLatent,
    Sparse,
    by_latent,
    decode,
    keep_largest,
    kth_largest,
    survivors,
    value_grads,
    weight_grads,
)

__all__ = [
    "BLOCK_ELEMENTS",
    "ByLatent",
    "Sparse",
    "by_latent",
    "decode",
    "keep_largest",
    "kth_largest",
    "product_dtype",
    "survivors",
    "value_grads",
    "weight_grads",
]


def product_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which the encoder's product is the fastest: bf16 where there are matrix units for it, else fp32.

    A CPU with bf16 instructions but without tiles (AMX) converts, and is slower than in fp32.
    """
    fast = torch.cuda.is_available() if device.type == "cuda" else torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32
