"""Which tokens a direction makes likelier: its own way through the final norm and the unembedding.

Knows: where a Hugging Face decoder keeps its final norm, and how to leave out biases, which are there without the direction too.
Does not know: features, texts. What the blocks in between make of a direction is not in it: at early blocks it says little.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pvsae.errors import UserError

if TYPE_CHECKING:
    from pvsae.models import ChatModel

NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f")
ROWS = 16_384  # of the unembedding that are held in fp32 at once


class Promoted(NamedTuple):
    """The tokens that directions promote and demote most.

    Attributes:
        up, down: token ids, strongest first.
        up_values, down_values: logits, less their mean over all tokens.
    """

    up: Int[Tensor, "n k"]
    up_values: Float[Tensor, "n k"]
    down: Int[Tensor, "n k"]
    down_values: Float[Tensor, "n k"]


def final_norm(model: ChatModel) -> nn.Module:
    """The norm in front of the unembedding. UserError where it is kept under none of the names known."""
    for name in NORMS:
        if isinstance(found := getattr(model.decoder, name, None), nn.Module):
            return found
    raise UserError(
        f"{model.name} ({type(model.decoder).__name__}) keeps its final norm under a name not known here",
        "a decoder with one of " + ", ".join(NORMS),
    )


@torch.no_grad()
def promoted(model: ChatModel, directions: Float[Tensor, "n d_model"], k: int = 10) -> Promoted:
    """The k tokens whose logits a direction raises and lowers most: W_U (norm(d) - norm(0)), centred over the vocabulary.

    The norm brings every direction to the same length, so that values of different features compare. Rows of the unembedding
    beyond the tokenizer's tokens are padding and are left out.

    Raises: UserError for another d_model, or a model whose final norm is not found.
    """
    if directions.shape[-1] != model.d_model:
        raise UserError(f"directions of d_model {directions.shape[-1]} for {model.name}", f"d_model {model.d_model}")
    norm = copy.deepcopy(final_norm(model)).float()
    d = directions.to(model.device, torch.float32)
    through = norm(d) - norm(torch.zeros_like(d))
    unembed = model.hf.get_output_embeddings().weight
    n = min(len(unembed), len(model.tokenizer))
    logits = torch.cat([through @ unembed[i : min(i + ROWS, n)].float().T for i in range(0, n, ROWS)], dim=-1)
    logits = logits - logits.mean(-1, keepdim=True)
    up, down = logits.topk(min(k, n)), (-logits).topk(min(k, n))
    return Promoted(up.indices.cpu(), up.values.cpu(), down.indices.cpu(), -down.values.cpu())
