"""Steering strength in named units, each turned into the raw coefficient of h <- h + coef * v.

Knows: three units and how to measure what they need.
Does not know: sweeps, controls, judges.

Units (vector norms grow with depth, so one raw coefficient means different things at different blocks):
- "raw": multiples of the vector as extracted.
- "gap": multiples of the distance, along the direction, between the mean positive and the mean negative answer at that block.
  For the `response_avg_diff` vector that distance is the vector's own length, so 1 gap = 1 raw; for other statistics it is not.
- "kl": the coefficient at which the next-token distribution on the model's own unsteered answers has moved by that many nats
  (mean KL of unsteered from steered over the answer's tokens). The sign of the number is the sign of the coefficient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pvsae.errors import UserError
from pvsae.models.batch import TokenBatch, length_sorted_batches
from pvsae.vectors.persona import DEFAULT_STATISTIC, PersonaVectors

if TYPE_CHECKING:
    from pvsae.models import ChatModel
    from pvsae.models.chat import Rendered
    from pvsae.models.interventions import Intervention

UNITS = ("raw", "gap", "kl")
_SMALLEST, _LARGEST = 2.0**-10, 2.0**14  # raw coefficients between which a KL target is looked for


def gap_in_raw(vectors: PersonaVectors, block: int, statistic: str = DEFAULT_STATISTIC) -> float:
    """How many raw coefficients of the `statistic` vector one gap is, at a block.

    The gap is the projection on the unit direction of (mean pos answer - mean neg answer), which is what `response_avg_diff`
    holds; divided by the vector's length it is a coefficient.

    Raises:
        UserError: the vectors lack `response_avg_diff` (foreign files), hold of it only what other traits do not share
            (vectors/specificity.py) while another statistic is asked for, or the gap is not positive.
    """
    if "specific" in vectors.meta and statistic != DEFAULT_STATISTIC:
        raise UserError(
            f"the unit 'gap' along {statistic} of {vectors.trait!r} needs all of {DEFAULT_STATISTIC!r}, and its file holds the "
            "part that other traits' vectors do not share",
            f"--statistic {DEFAULT_STATISTIC}, or another unit",
            "--unit raw",
        )
    if DEFAULT_STATISTIC not in vectors.statistics:
        raise UserError(
            f"the unit 'gap' needs {DEFAULT_STATISTIC!r} of {vectors.trait!r}, which its file does not hold",
            "vectors extracted with pvsae, or another unit",
            "--unit raw",
        )
    direction = vectors.direction(block, statistic)
    gap = float(vectors.direction(block, DEFAULT_STATISTIC).values @ direction.unit)
    if not gap > 0:
        raise UserError(
            f"along {statistic} of {vectors.trait!r} at block {block}, positive answers are not above negative ones",
            "a direction that separates the answers it was made from",
            "another block or statistic, or --unit raw",
        )
    return gap / direction.norm


def answer_logits_mask(batch: TokenBatch) -> Bool[Tensor, "batch pos"]:
    """Positions whose next token is part of an answer: the last prompt token and every answer token but the last."""
    mask = torch.zeros_like(batch.positions.answer)
    mask[:, :-1] = batch.positions.answer[:, 1:]
    return mask


@torch.no_grad()
def mean_kl(
    model: ChatModel, rows: Sequence[Rendered], interventions: Sequence[Intervention], *, batch_tokens: int = 4096
) -> float:
    """Mean KL(unsteered || steered) of the next-token distributions, in nats, over the answer positions of all rows.

    Both distributions are computed batch by batch and never kept, so memory is one batch of logits.
    """
    total, count = 0.0, 0
    for indices in length_sorted_batches([len(row.ids) for row in rows], batch_tokens=batch_tokens):
        batch = TokenBatch.build([rows[i] for i in indices], pad_id=model.pad_id, side="right", device=model.device)
        mask = answer_logits_mask(batch)
        plain = _answer_logprobs(model, batch, mask)
        with model.hooks(interventions):
            steered = _answer_logprobs(model, batch, mask)
        total += float((plain.exp() * (plain - steered)).sum(-1).double().sum())
        count += int(mask.sum())
    if count == 0:
        raise UserError("no answer tokens to measure a KL on", "at least one answer that is not empty", "--unit raw")
    return total / count


def _answer_logprobs(
    model: ChatModel, batch: TokenBatch, mask: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "answer_tokens vocab"]:
    logits = model.forward(batch, logits="all").logits
    assert logits is not None
    return logits[mask.to(logits.device)].float().log_softmax(-1)


def calibrate(kl_of: Callable[[float], float], target: float, *, tolerance: float = 0.02) -> float:
    """The raw coefficient at which `kl_of(coef)` equals |target| within `tolerance` (relative), with the sign of target.

    Bisection between powers of two on the coefficient's logarithm: KL grows with the coefficient near 0, and the first
    crossing is the one that is found.

    Raises:
        UserError: the target is zero or not finite, or is never reached.
    """
    wanted = abs(target)
    if not (wanted > 0 and math.isfinite(wanted)):
        raise UserError(f"a KL of {target} is no strength", "a number other than 0, e.g. 0.5 (nats)")
    sign = math.copysign(1.0, target)
    low, high = _SMALLEST, _SMALLEST
    while (reached := kl_of(sign * high)) < wanted:
        low, high = high, high * 2
        if high > _LARGEST:
            raise UserError(
                f"no strength moves the answers by {wanted:g} nats (at coefficient {low:g} it is {reached:.3g})",
                "a smaller KL, or a block at which the direction matters",
            )
    for _ in range(40):
        middle = math.sqrt(low * high)
        here = kl_of(sign * middle)
        if abs(here - wanted) <= tolerance * wanted:
            return sign * middle
        low, high = (middle, high) if here < wanted else (low, middle)
    return sign * math.sqrt(low * high)
