"""Initial weights of a dictionary, the same ones however many processes share them.

Knows: torch's generator. Does not know: what the weights are for, or who holds the others.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

CHUNK = 2**22  # normal variates made at a time: 16 MB
GROUP = 16  # torch makes normal variates in groups of 16, and the last few of a tensor in a way of their own


def unit_rows_(out: Float[Tensor, "n d_model"], d_sae: int, seed: int, start: int = 0) -> None:
    """Writes the rows from `start` on of a matrix of d_sae random rows of norm 1, whose every number follows from the seed.

    It is the matrix that torch.randn would give in one call, made in chunks: of whole groups of variates, so that the next chunk
    goes on where one call would be. No more than a chunk is held beside the rows that are wanted.
    """
    stop, d_model = start + len(out), out.shape[1]
    generator = torch.Generator().manual_seed(seed)
    rows = max(GROUP, CHUNK // d_model // GROUP * GROUP)
    firsts = [first for first in range(0, d_sae, rows) if first == 0 or (d_sae - first) * d_model >= GROUP]
    for first, end in zip(firsts, [*firsts[1:], d_sae], strict=True):
        if first >= stop:
            break
        chunk = torch.nn.functional.normalize(torch.randn(end - first, d_model, generator=generator), dim=1)
        wanted = chunk[max(start - first, 0) : max(stop - first, 0)]
        if len(wanted):
            out[max(first - start, 0) :][: len(wanted)] = wanted
