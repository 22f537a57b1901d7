"""The plain way to compute persona vectors, kept as the measure of the fast way.

Knows: Hugging Face's `output_hidden_states`, one row a forward pass, on the model as it is, without this package's hooks.
Does not know: batches or padding. It is slow on purpose; tests and benchmarks compare extract.py with it, and writers of official
files get from it the two rows that are no block's residual.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from pvsae.vectors.persona import STATISTICS

if TYPE_CHECKING:
    from pvsae.models import ChatModel
    from pvsae.models.chat import Rendered


@dataclass(frozen=True)
class ReferenceMeans:
    """Means over rows, a statistic each, in double precision.

    Attributes:
        hidden: the official layout, [n_blocks + 1, d_model]: row 0 the embedding, row L the output of block L - 1, but the
            last row after the final norm (that is what Hugging Face returns).
        last_block: [d_model], the last block's residual before the final norm.
    """

    hidden: dict[str, Float[Tensor, "n_rows d_model"]]
    last_block: dict[str, Float[Tensor, " d_model"]]

    def blocks(self, statistic: str) -> Float[Tensor, "n_blocks d_model"]:
        """In this package's layout: row b is the residual after block b."""
        return torch.cat([self.hidden[statistic][1:-1], self.last_block[statistic][None]])


def reference_hidden_state_means(model: ChatModel, rows: Sequence[Rendered], progress: str | None = None) -> ReferenceMeans:
    """Mean over rows of: the mean over prompt tokens, the mean over answer tokens, the last prompt token."""
    from tqdm import tqdm

    hidden: dict[str, Any] = dict.fromkeys(STATISTICS, 0.0)
    last: dict[str, Any] = dict.fromkeys(STATISTICS, 0.0)
    seen: list[Tensor] = []
    handle = model.blocks[-1].register_forward_hook(lambda _m, _i, out: seen.append(out[0] if isinstance(out, tuple) else out))
    try:
        for row in tqdm(rows, desc=progress, disable=progress is None):
            seen.clear()
            ids = torch.tensor([row.ids], device=model.device)
            with torch.no_grad():
                states = model.hf(input_ids=ids, output_hidden_states=True).hidden_states
            stack = torch.stack([s[0].float() for s in (*states, seen[0])])  # [n_blocks + 2, tokens, d_model]
            start, end = row.answer
            means = (stack[:, : row.n_prompt].mean(1), stack[:, start:end].mean(1), stack[:, row.last_prompt])
            for statistic, mean in zip(STATISTICS, means, strict=True):
                hidden[statistic] = hidden[statistic] + mean[:-1].double().cpu() / len(rows)
                last[statistic] = last[statistic] + mean[-1].double().cpu() / len(rows)
    finally:
        handle.remove()
    return ReferenceMeans(hidden, last)


def reference_vectors(
    model: ChatModel, pos: Sequence[Rendered], neg: Sequence[Rendered], progress: str | None = None
) -> ReferenceMeans:
    """Mean over pos rows minus mean over neg rows, both layouts."""
    a = reference_hidden_state_means(model, pos, progress)
    b = reference_hidden_state_means(model, neg, progress)
    hidden = {s: a.hidden[s] - b.hidden[s] for s in STATISTICS}
    return ReferenceMeans(hidden, {s: a.last_block[s] - b.last_block[s] for s in STATISTICS})
