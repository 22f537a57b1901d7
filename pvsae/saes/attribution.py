"""Which latents push a model towards some answers and away from others: one forward and one backward pass an answer, no steering.

Knows: models, answers, a dictionary at one block, the gradient of an answer's loss at that block's residual.
Does not know: why an answer is wanted or not, or what is done with the ranking.

The effect of a latent on an answer, to first order: sum over the tokens of -(its decoder row . dLoss/dh) * its activation, Loss
being the mean negative log-likelihood of the answer's tokens. It estimates by how many nats a token the answer would get less
likely if the latent were silenced everywhere. Between unwanted and wanted answers to the same prompts it ranks latents by cause.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from pvsae.errors import UserError
from pvsae.models.batch import TokenBatch, halving_on_oom, length_sorted_batches
from pvsae.saes.encodings import false_discovery_rate, paired_t

if TYPE_CHECKING:
    import pandas as pd

    from pvsae.models import ChatModel, Rendered
    from pvsae.saes.dictionary import SAE


@dataclass(eq=False)
class _Leaf:
    """An intervention that changes no value and makes the block's output the start of the graph, to be differentiated by."""

    block: int
    d_model: int
    positions: str = "all"
    kind: ClassVar[str] = "leaf"
    seen: list[Tensor] = field(default_factory=list)

    def problem(self) -> str | None:
        return None

    def edit(self, device: torch.device, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
        def leaf(h: Tensor) -> Tensor:
            self.seen.append(h.detach().requires_grad_())
            return self.seen[-1]

        return leaf


@dataclass
class Effects:
    """First-order effects of every latent on answers.

    Attributes:
        effect: mean over a group's answers, in nats a token, [n_groups, d_sae]; positive where the latent makes them likelier.
        groups: names of the groups.
        loss: mean negative log-likelihood of an answer's tokens, mean over answers.
    """

    effect: Float[Tensor, "n_groups d_sae"]
    groups: list[str]
    loss: float


def effects(
    model: ChatModel,
    sae: SAE,
    block: int,
    rows: Sequence[Rendered],
    groups: Sequence[Any],
    *,
    batch_tokens: int = 2048,
    progress: str | None = None,
) -> Effects:
    """What every latent does for answers; row i belongs to groups[i]. Tokens that the dictionary is not made for do not count.

    Raises:
        UserError: no answer, one without tokens or longer than the context, a dictionary that does not fit the model.
    """
    sae.check_model(model)
    if not rows or len(rows) != len(groups):
        raise UserError(f"{len(rows)} answers in {len(groups)} groups", "a group for each answer, and some")
    for i, row in enumerate(rows):
        if row.answer[1] <= row.answer[0] or len(row.ids) > model.n_ctx:
            raise UserError(f"answer {i} is empty or does not fit the context", f"answers of 1 to {model.n_ctx} tokens")
    names = list(dict.fromkeys(groups))
    numbers = {group: i for i, group in enumerate(names)}
    owner = torch.tensor([numbers[g] for g in groups])
    total = torch.zeros(len(names) * sae.d_sae)
    losses = torch.zeros(len(rows))

    def run(indices: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        batch = TokenBatch.build([rows[i] for i in indices], pad_id=model.pad_id, side="right", device=model.device)
        loss, h, gradient = _gradient(model, block, batch)
        real = batch.positions.all.to(h.device)
        x, slope = h[real].to(sae.device), gradient[real].to(sae.device)
        acts = sae.encode_sparse(x)
        fine = ~sae.outliers(x)[acts.token]
        token, latent, value = acts.token[fine], acts.latent[fine], acts.value[fine].float()
        push = (
            -value
            * torch.cat(
                [
                    (sae.W_dec[some].float() * slope[at].float()).sum(1)
                    for some, at in zip(latent.split(65536), token.split(65536), strict=True)
                ]
            )
            if len(value)
            else value
        )
        of_row = torch.repeat_interleave(torch.arange(len(indices)), real.sum(1).cpu())[token.cpu()]
        where = owner[torch.tensor(indices)][of_row] * sae.d_sae + latent.cpu()
        return where, push.cpu(), loss.cpu()

    batches = length_sorted_batches([len(row.ids) for row in rows], batch_tokens=batch_tokens)
    with tqdm(total=len(rows), desc=progress, disable=progress is None, unit="answer") as bar:
        for indices, (where, push, loss) in halving_on_oom(batches, run):
            total.index_add_(0, where, push)
            losses[indices] = loss
            bar.update(len(indices))
    counts = torch.bincount(owner, minlength=len(names)).float()
    return Effects(total.view(len(names), -1) / counts[:, None], [str(n) for n in names], float(losses.mean()))


def _gradient(model: ChatModel, block: int, batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
    """(mean loss of each row's answer [batch], residual and its gradient [batch pos d_model]); no weight gets a gradient."""
    leaf = _Leaf(block, model.d_model)
    answer = batch.positions.span("answer")
    with torch.enable_grad(), model.hooks([leaf]):
        logits = model.forward(batch, logits="all").logits
        assert logits is not None
        logprobs = logits[:, :-1].float().log_softmax(-1)
        chosen = logprobs.gather(-1, batch.input_ids[:, 1:, None].to(logprobs.device))[..., 0]
        mask = answer[:, 1:].to(logprobs.device)
        loss = -torch.where(mask, chosen, 0).sum(1) / mask.sum(1)
        (gradient,) = torch.autograd.grad(loss.sum(), [leaf.seen[-1]])
    return loss.detach(), leaf.seen[-1].detach(), gradient


def attribution(unwanted: Effects, wanted: Effects) -> pd.DataFrame:
    """Latents by how much more they do for unwanted than for wanted answers to the same prompts.

    Returns: a row a latent that does anything, by |attribution|, largest first: latent, attribution (nats a token; positive: it
        pushes towards the unwanted answers), for_unwanted, for_wanted, t, p, q (paired over groups).

    Raises: UserError where the two have other groups.
    """
    import pandas as pd

    if set(unwanted.groups) != set(wanted.groups):
        raise UserError(
            f"{len(unwanted.groups)} and {len(wanted.groups)} groups of unwanted and wanted answers",
            "answers to the same prompts",
        )
    order = [wanted.groups.index(group) for group in unwanted.groups]
    alive = ((unwanted.effect != 0).any(0) | (wanted.effect != 0).any(0)).nonzero()[:, 0]
    bad, good = unwanted.effect[:, alive].double(), wanted.effect[order][:, alive].double()
    t, p = paired_t((bad - good).numpy())
    table = pd.DataFrame(
        {
            "latent": alive.numpy(),
            "attribution": (bad - good).mean(0).numpy(),
            "for_unwanted": bad.mean(0).numpy(),
            "for_wanted": good.mean(0).numpy(),
            "t": t,
            "p": p,
            "q": false_discovery_rate(p),
        }
    )
    return table.sort_values("attribution", key=abs, ascending=False, kind="stable", ignore_index=True)
