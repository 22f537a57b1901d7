"""Output score: does a latent, turned up, make the model say the tokens that it is expected to promote?

Knows: the score of Arad, Mueller and Belinkov, "SAEs Are Good for Steering - If You Select the Right Features" (arXiv
2505.20063), for many latents at once, and the tokens that a decoder row promotes through the final norm and the unembedding.
Does not know: traits, judges, steering itself.

A latent's expected tokens T are the K highest entries of unembed(norm(W_dec[i])). On a neutral prefix the latent is amplified at
the last token only, by FACTOR times the highest activation that any latent has there. With r the best rank (from 0) and p the
highest probability that a token of T then has as the next token, the score is (1 - r / |V|) * p. Latents that react to tokens
(high input activation) rarely have a high output score, and those that have one steer two to three times better [paper].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from pvsae.errors import UserError
from pvsae.models.batch import TokenBatch
from pvsae.models.captures import Residual
from pvsae.models.interventions import Edit
from pvsae.saes.activity import check_index
from pvsae.saes.evaluate import check_block

if TYPE_CHECKING:
    from pvsae.models import ChatModel, Rendered
    from pvsae.saes.dictionary import SAE

PREFIX = "From my experience,"  # the paper's neutral text
K = 20
FACTOR = 10.0
NORMS = ("norm", "ln_f", "final_layer_norm")  # what architectures call it


@dataclass(frozen=True, eq=False)
class _StepARow:
    """h <- h + steps[row]: each row of a batch gets its own addition, so that latents share a forward pass."""

    steps: Float[Tensor, "rows d_model"]
    block: int
    positions: str = "response"  # of a prompt without an answer that is its last token
    kind: ClassVar[str] = "step_a_row"

    @property
    def d_model(self) -> int:
        return self.steps.shape[1]

    def problem(self) -> str | None:
        return None if bool(torch.isfinite(self.steps).all()) else "decoder rows that are NaN or infinite"

    def edit(self, device: torch.device, dtype: torch.dtype) -> Edit | None:
        steps = self.steps.to(device, dtype)[:, None]
        return lambda h: h + steps


def promoted(model: ChatModel, rows: Float[Tensor, "n d_model"]) -> Float[Tensor, "n vocab"]:
    """Logits of directions alone, through the model's final norm and unembedding (the logit lens of a decoder row), in fp32."""
    found = [getattr(model.decoder, name) for name in NORMS if hasattr(model.decoder, name)]
    if not found:
        raise UserError(f"the final norm of {model.name} was not found", "a decoder with " + " or ".join(NORMS))
    with torch.no_grad(), model.stack.suspended():
        return model.hf.get_output_embeddings()(found[0](rows.to(model.device, model.dtype))).float()


@torch.no_grad()
def output_scores(
    sae: SAE,
    model: ChatModel,
    latents: Sequence[int],
    *,
    prefix: str | Rendered = PREFIX,
    block: int | None = None,
    k: int = K,
    factor: float = FACTOR,
    batch_size: int = 64,
    progress: str | None = None,
) -> pd.DataFrame:
    """Output scores of some latents, the highest first.

    Args:
        prefix: text without a chat template, as in the paper, or a rendered prompt.
        block: None takes the dictionary's own.
        k: how many promoted tokens count as expected.
        factor: amplification, in multiples of the highest activation that any latent has at the prefix' last token.
        batch_size: latents a forward pass.
        progress: label of a progress bar, or None.

    Returns: a row a latent: latent, output_score, rank and prob (of the best expected token after the amplification), before (the
        same score without it), said (the likeliest token after it) and promotes (the first five expected tokens).

    Raises: UserError for a dictionary that does not fit the model or block, an index out of range, an empty prefix, or a prefix
        at which no latent is active.
    """
    block = check_block(sae, model, block)
    latents = [check_index(sae, int(i)) for i in latents]
    if not 1 <= k <= model.hf.get_output_embeddings().weight.shape[0]:
        raise UserError(f"k is {k}", "a number of tokens, from 1 to the size of the vocabulary")
    prompt = model.chat.plain(prefix) if isinstance(prefix, str) else prefix
    if not prompt.ids or prompt.n_prompt != len(prompt.ids):
        raise UserError(f"{prompt.text!r} is no prefix to score on", "a text, or a prompt without an answer")
    read = Residual(block)
    last = model.capture([prompt], [read])[read.key][0][-1]
    highest = float(sae.encode(last.to(sae.device)).max())
    if not highest > 0:
        raise UserError(
            f"no latent of {sae.ref} is active at the end of {prompt.text!r}, so there is no scale to amplify by",
            "a prefix at whose last token something is active",
            "another prefix",
        )
    plain = model.next_token_logprobs([prompt])[0].exp()
    found = []
    with tqdm(total=len(latents), desc=progress, disable=progress is None, unit="latent") as bar:
        for start in range(0, len(latents), batch_size):
            some = latents[start : start + batch_size]
            rows = sae.W_dec[some].float()
            expected = promoted(model, rows).topk(k, dim=-1).indices.cpu()
            batch = TokenBatch.build([prompt] * len(some), pad_id=model.pad_id, side="right", device=model.device)
            with model.hooks([_StepARow(factor * highest * rows, block)]):
                logits = model.forward(batch, logits="last").logits
            assert logits is not None
            found += _rows(model, some, expected, logits.float().softmax(-1).cpu(), plain)
            bar.update(len(some))
    columns = ["latent", "output_score", "rank", "prob", "before", "said", "promotes"]
    table = pd.DataFrame(found, columns=columns)
    return table.sort_values("output_score", ascending=False, kind="stable", ignore_index=True)


def _rows(
    model: ChatModel,
    latents: Sequence[int],
    expected: Tensor,
    after: Float[Tensor, "n vocab"],
    before: Float[Tensor, " vocab"],
) -> list[tuple[int, float, int, float, float, str, str]]:
    rows = []
    for latent, tokens, probs in zip(latents, expected, after, strict=True):
        rank, prob = _best(probs, tokens)
        rank_before, prob_before = _best(before, tokens)
        rows.append(
            (
                latent,
                (1 - rank / len(probs)) * prob,
                rank,
                prob,
                (1 - rank_before / len(before)) * prob_before,
                model.chat.decode([int(probs.argmax())]),
                " | ".join(model.chat.decode([t]) for t in tokens[:5].tolist()),
            )
        )
    return rows


def _best(probs: Float[Tensor, " vocab"], tokens: Tensor) -> tuple[int, float]:
    """(rank from 0, probability) of the likeliest of some tokens: the one with the best rank has the highest probability."""
    best = float(probs[tokens].max())
    return int((probs > best).sum()), best
