"""The sparse parts of a training step as Triton kernels for CUDA GPUs, behind the names of the eager path.

Knows: whether Triton can run here, and which module holds which function.
Does not know: when to use them (kernels/__init__.py decides), or the eager path.

    encode_select, survivors   encode.py    the encoder's product with selection in its epilogue; [B, F] is never written
    encode_select_joint        joint.py     the same for processes that share tokens and latents
    decode, value_grads        products.py  sums over a token's kept latents
    weight_grads, both_weight_grads, latent_grads   sums over a latent's kept tokens: no atomics, the same bits every time
    by_latent                  order.py     the order of the latter
    adam_                      adam.py      Adam, projection and renormalisation in one pass over a row

What is tested is their arithmetic, in Triton's interpreter on CPUs, against dense products. Tile sizes and launch settings
were chosen by arithmetic for an H100 and are not measured here; benchmarks/sae_kernels.py measures them where there is a GPU.

Importing this module does not import Triton; taking one of the functions from it does.
"""

from __future__ import annotations

import importlib
import inspect
import os
from functools import cache
from typing import Any

_HOMES = {
    "encode_select": "encode",
    "encode_select_joint": "joint",
    "survivors": "encode",
    "Tiles": "encode",
    "decode": "products",
    "value_grads": "products",
    "weight_grads": "products",
    "both_weight_grads": "products",
    "latent_grads": "products",
    "adam_": "adam",
    "by_latent": "order",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def problem() -> str | None:
    """Why these kernels cannot run here, or None.

    They run on a CUDA device, or in Triton's interpreter, which TRITON_INTERPRET=1 switches on if it is set before anything
    imports Triton.
    """
    try:
        import torch
        import triton
        import triton.language as tl
        from triton.runtime.jit import JITFunction
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    if "mask" not in inspect.signature(tl.histogram).parameters:
        return f"Triton {triton.__version__} is too old: its histograms have no masks"
    if os.environ.get("TRITON_INTERPRET") == "1":
        # Triton's own functions are made when it is imported; kernels that are interpreted can use interpreted ones only.
        return "TRITON_INTERPRET=1 was set after Triton had been imported" if isinstance(tl.sum, JITFunction) else None
    return None if torch.cuda.is_available() else "there is no CUDA device, and TRITON_INTERPRET=1 is not set"


def available() -> bool:
    """Whether the kernels can run here: Triton can be imported, and there is a CUDA device or the interpreter is on."""
    return problem() is None
