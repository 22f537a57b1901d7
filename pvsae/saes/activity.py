"""How often and how strongly each latent of a dictionary is active: what its strengths are measured in, and who its equals are.

Knows: a short pass over text that counts all latents at once, and how to draw latents that are active as often as a given one.
Does not know: whose numbers they become (stages), files of a run, what a latent means.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from pvsae.errors import UserError

if TYPE_CHECKING:
    from pvsae.models import ChatModel
    from pvsae.saes.corpus import Row
    from pvsae.saes.dictionary import SAE
    from pvsae.saes.evaluate import MarkedTokens

NEIGHBOURS = 8  # latents of nearest density a draw is made from, for each that is drawn


@dataclass(frozen=True, eq=False)
class LatentActivity:
    """How active the latents of a dictionary are on some text.

    Attributes:
        density: share of tokens at which each latent is active.
        max: highest activation of each, in activation units of the dictionary; 0 where it was never active.
        tokens: on how many tokens they were counted.
        source: which text or run, in words; to be stored with every number that stands on them.
        sae: the dictionary that was counted, its outlier filter calibrated on the text where it had no median of its own.
    """

    density: Float[Tensor, " d_sae"]
    max: Float[Tensor, " d_sae"]
    tokens: int
    source: str
    sae: SAE

    def maximum(self, index: int) -> float:
        """Highest activation of a latent. UserError for one that does not exist, or that was never active on the text."""
        check_index(self.sae, index)
        if not float(self.max[index]) > 0:
            raise UserError(
                f"latent {index} of {self.sae.ref} was active at none of {self.tokens} tokens ({self.source}), so it has no "
                "maximum to measure strengths in",
                "a latent that is active somewhere",
                "another latent, more text (--activity-tokens), or strengths in activation units (--unit raw)",
            )
        return float(self.max[index])

    def equals_of(self, index: int, n: int, seed: int, *, without: Sequence[int] = ()) -> list[int]:
        """`n` latents drawn at random from those whose density is nearest to that of `index`, on a logarithmic scale.

        Args:
            without: latents that are not drawn, `index` itself never is: those that are steered with.

        Raises: UserError where the latent is never active, or there are fewer than `n` others that are.
        """
        self.maximum(index)
        alive = (self.density > 0) & (self.max > 0)
        alive[[index, *without]] = False
        others = alive.nonzero()[:, 0]
        if len(others) < n:
            raise UserError(
                f"{self.sae.ref} has {len(others)} other latents that were active on {self.tokens} tokens",
                f"at least {n} to draw as controls",
                "count on more text, or take fewer controls",
            )
        distance = (self.density[others].log() - self.density[index].log()).abs()
        near = others[distance.argsort(stable=True)[: NEIGHBOURS * n]]
        generator = torch.Generator().manual_seed(seed)
        return near[torch.randperm(len(near), generator=generator)[:n]].tolist()


def check_index(sae: SAE, index: int) -> int:
    """The index. UserError where the dictionary has no such latent; negative numbers are not wrapped."""
    if not 0 <= index < sae.d_sae:
        raise UserError(
            f"latent {index} of {sae.ref}, which has {sae.d_sae}", f"an index from 0 to {sae.d_sae - 1}", "check SAE:INDEX"
        )
    return index


def measure(
    sae: SAE,
    model: ChatModel,
    rows: Iterable[MarkedTokens],
    source: str,
    *,
    block: int | None = None,
    batch_tokens: int = 8192,
    progress: str | None = None,
) -> LatentActivity:
    """Counts all latents on rows of text, in one pass up to the dictionary's block.

    Raises: UserError as `evaluate`: a dictionary that does not fit the model or the block, or no token that counts.
    """
    from pvsae.saes.evaluate import evaluate

    found = evaluate(sae, model, rows, block=block, loss=False, batch_tokens=batch_tokens, progress=progress)
    density = torch.as_tensor(found.features["density"].to_numpy(copy=True), dtype=torch.float32)
    highest = torch.as_tensor(found.features["max"].to_numpy(copy=True), dtype=torch.float32)
    return LatentActivity(density, highest, int(found.of("tokens")), source, found.sae)


def own_text(sae: SAE, model: ChatModel, tokens: int) -> list[Row]:
    """Rows of the text that the dictionary's training held out, up to so many tokens that count; [] where it does not say
    which text that was, or held none out."""
    from dataclasses import replace

    from pvsae import settings
    from pvsae.saes.corpus import Corpus, CorpusConfig

    if "corpus" not in sae.info.training:
        return []
    config = settings.build(CorpusConfig, sae.info.training["corpus"], "its corpus")
    config = replace(config, context=min(config.context, model.n_ctx))
    rows: list[Row] = []
    n = 0
    for row in Corpus(model, config).rows(held_out=True) if config.held_out > 0 else ():
        rows.append(row)
        n += int(row.keep.sum())
        if n >= tokens:
            break
    return rows
