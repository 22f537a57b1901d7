"""Adam in one pass over the parameters; for decoder rows also the projection before it and the renormalisation after it.

Knows: one tensor's parameters, gradient and moments.
Does not know: which tensors there are, how the gradient was made, its norm or the schedule.

A step reads 16 bytes a parameter and writes 12, and does nothing else of note: at 2 * 131072 * 3584 parameters that is 26 GB,
9.8 ms at 80% of an H100's 3.35 TB/s (arithmetic, not measured), about as long as the rest of a step. Projecting and
renormalising in passes of their own would read and write the rows twice more. A row must fit in the registers of one program.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

BLOCK = 1024


@triton.jit
def _moved(param, grad, mean, square, lr, beta1, rest1, beta2, rest2, root_correction, eps):
    """Parameters and moments after a step; lr holds the first moment's bias correction already, and rest is 1 - beta.

    The host subtracts: 1 - 0.999 in fp32 is wrong by 5e-5 of itself.
    """
    mean = beta1 * mean + rest1 * grad
    square = beta2 * square + rest2 * grad * grad
    return param - lr * mean / (tl.sqrt(square) / root_correction + eps), mean, square


@triton.jit
def _adam_flat(
    param_ptr, grad_ptr, mean_ptr, square_ptr, copy_ptr, scale_ptr, n, lr, beta1, rest1, beta2, rest2, root_correction, eps,
    COPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32) * tl.load(scale_ptr)
    param, mean, square = _moved(
        tl.load(param_ptr + at, mask=inside, other=0.0), grad, tl.load(mean_ptr + at, mask=inside, other=0.0),
        tl.load(square_ptr + at, mask=inside, other=0.0), lr, beta1, rest1, beta2, rest2, root_correction, eps,
    )  # fmt: skip
    tl.store(param_ptr + at, param, mask=inside)
    tl.store(mean_ptr + at, mean, mask=inside)
    tl.store(square_ptr + at, square, mask=inside)
    if COPY:
        tl.store(copy_ptr + at, param.to(copy_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _adam_unit_rows(
    param_ptr, grad_ptr, mean_ptr, square_ptr, copy_ptr, scale_ptr, d, lr, beta1, rest1, beta2, rest2, root_correction, eps,
    COPY: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program a row."""
    column = tl.arange(0, COLUMNS)
    inside = column < d
    at = tl.program_id(0).to(tl.int64) * d + column
    param = tl.load(param_ptr + at, mask=inside, other=0.0)
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32) * tl.load(scale_ptr)
    # Divided by the squared norm, which is 1 but for rounding: what is left is orthogonal to the row as it is. A zero row has
    # no direction, and nothing is taken away.
    norm2 = tl.sum(param * param, 0)
    grad -= tl.sum(grad * param, 0) / tl.where(norm2 > 0, norm2, 1.0) * param
    param, mean, square = _moved(
        param, grad, tl.load(mean_ptr + at, mask=inside, other=0.0), tl.load(square_ptr + at, mask=inside, other=0.0),
        lr, beta1, rest1, beta2, rest2, root_correction, eps,
    )  # fmt: skip
    # Columns beyond the end are all zero before and after, so they add nothing to the norm.
    norm = tl.sqrt(tl.sum(param * param, 0))
    param = param / tl.where(norm > 0, norm, 1.0)
    tl.store(param_ptr + at, param, mask=inside)
    tl.store(mean_ptr + at, mean, mask=inside)
    tl.store(square_ptr + at, square, mask=inside)
    if COPY:
        tl.store(copy_ptr + at, param.to(copy_ptr.dtype.element_ty), mask=inside)


def adam_(
    param: Float[Tensor, ...],
    grad: Float[Tensor, ...],
    exp_avg: Float[Tensor, ...],
    exp_avg_sq: Float[Tensor, ...],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    scale: float | Tensor = 1.0,
    unit_rows: bool = False,
    copy: Float[Tensor, ...] | None = None,
) -> None:
    """One Adam step in place on a parameter and its moments; the gradient is left as it is.

    Args:
        param, exp_avg, exp_avg_sq: fp32, contiguous.
        grad: of the same shape, contiguous.
        step: counts from 1.
        scale: factor of the gradient, for clipping; a tensor may stay on the device.
        unit_rows: param is [n, d] with rows of norm 1. The gradient's component along each row is removed before the step, and
            the norm is made 1 again after it.
        copy: receives the new parameters in its own dtype, such as bf16 for the next product.
    """
    tensors = [param, grad, exp_avg, exp_avg_sq] + ([copy] if copy is not None else [])
    if any(t.shape != param.shape or not t.is_contiguous() for t in tensors):
        raise ValueError(f"contiguous tensors of one shape, please: {[list(t.shape) for t in tensors]}")
    if any(t.dtype != torch.float32 for t in (param, exp_avg, exp_avg_sq)):
        raise ValueError("parameters and moments must be fp32")
    if param.numel() == 0:
        return
    if not isinstance(scale, Tensor):
        scale = torch.full((1,), scale, device=param.device)
    # In double precision, on the host.
    beta1, beta2 = betas
    numbers = (lr / (1 - beta1**step), beta1, 1 - beta1, beta2, 1 - beta2, math.sqrt(1 - beta2**step), eps)
    pointers = (param, grad, exp_avg, exp_avg_sq, param if copy is None else copy, scale.reshape(1).float())
    if unit_rows:
        n, d = param.shape
        columns = triton.next_power_of_2(d)
        warps = min(16, max(1, columns // 512))  # at 512 columns a warp the four rows are 64 registers a thread
        _adam_unit_rows[(n,)](*pointers, d, *numbers, COPY=copy is not None, COLUMNS=columns, num_warps=warps)
    else:
        n = param.numel()
        _adam_flat[(triton.cdiv(n, BLOCK),)](*pointers, n, *numbers, COPY=copy is not None, BLOCK=BLOCK)
