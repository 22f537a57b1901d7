"""The products of a training step behind one set of names: eager torch, or Triton where there is a GPU.

Knows: which implementation and which dtype of the encoder's product fit a device. Does not know: how any of them works.

Both implementations have `survivors`, `decode` and `latent_grads`; `of` gives the module that has them. Triton's
also has what fused.py needs for a step that leaves every number on the device. What costs next to nothing (`keep_largest`,
`kth_largest`) is the same torch on every device.
"""

from __future__ import annotations

from types import ModuleType

import torch

from pvsae.errors import UserError
from pvsae.saes.kernels import eager, screen
from pvsae.saes.kernels.eager import BLOCK_ELEMENTS, Sparse, keep_largest, kth_largest, large

__all__ = [
    "BLOCK_ELEMENTS", "CHOICES", "PRODUCTS", "Sparse", "keep_largest", "kth_largest", "large", "of", "product_dtype",
]  # fmt: skip

CHOICES = ("auto", "eager", "triton")
PRODUCTS = ("auto", "float32", "bfloat16", "int8")


def of(device: torch.device, choice: str = "auto") -> ModuleType:
    """The module of the kernels for a device: Triton's on CUDA where Triton can run, else the eager ones.

    Raises: UserError for an unknown choice, or for "triton" where it cannot run (with the reason).
    """
    from pvsae.saes.kernels import triton

    if choice not in CHOICES:
        raise UserError(f"kernels {choice!r}", "one of " + ", ".join(CHOICES))
    if choice == "triton" and not triton.available():
        raise UserError(f"no Triton kernels here: {triton.problem()}", "a CUDA device and Triton", 'choose kernels "eager"')
    wanted = choice == "triton" or (choice == "auto" and device.type == "cuda" and triton.available())
    return triton if wanted else eager


def product_dtype(device: torch.device, choice: str = "auto") -> torch.dtype:
    """How the encoder's product is made: as chosen, or the fastest way.

    That is bf16 where there are matrix units for it, else int8 (screened in int8, exact in fp32, see screen.py) where the CPU
    multiplies that fast, else fp32. A CPU with bf16 instructions but without tiles (AMX) converts, and is slower than in fp32.

    Raises: UserError for an unknown choice, or for "int8" where there is no such product.
    """
    can_screen = device.type == "cpu" and screen.available()
    if choice not in PRODUCTS:
        raise UserError(f"product {choice!r}", "one of " + ", ".join(PRODUCTS))
    if choice == "int8" and not can_screen:
        raise UserError("product 'int8' on this device", "a CPU with int8 instructions (AVX512-VNNI)", 'choose "auto"')
    if choice != "auto":
        return getattr(torch, choice)
    if torch.cuda.is_available() if device.type == "cuda" else torch.cpu._is_amx_tile_supported():
        return torch.bfloat16
    return torch.int8 if can_screen else torch.float32
