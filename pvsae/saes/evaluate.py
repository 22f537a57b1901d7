"""What a dictionary is worth on text: variance explained, L0, densities, and the model's loss with it spliced in.

Knows: rows of tokens with a mask of those that count, forward passes with the dictionary in the residual stream.
Does not know: where rows come from (corpus.py), files, figures, the sums (measures.py).

Residuals are read batch by batch and reduced at once. "Kept" tokens are those that the dictionary was made for: marked by the
row, not among the first `drop_first` of it, and no outlier. Outliers are few and long, so that they alone can make a dictionary
look good: every measure of variance stands there with and without them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from pvsae.errors import UserError
from pvsae.models.batch import Positions, TokenBatch, halving_on_oom, length_sorted_batches
from pvsae.models.captures import Residual
from pvsae.models.chat import Rendered
from pvsae.models.interventions import Intervention, Reconstruct
from pvsae.saes.dictionary import SAE, SparseActs
from pvsae.saes.measures import Activity, Variance

if TYPE_CHECKING:
    from pvsae.models import ChatModel

Activations = Tensor | Mapping[int, Tensor] | Iterable[Tensor | Mapping[int, Tensor]]
MEDIAN_TOKENS = 50_000  # residuals on which the median of an uncalibrated outlier filter is taken
VARIANTS = ("original", "spliced", "zero", "mean")


class MarkedTokens(Protocol):
    """What `evaluate` asks of a row; `pvsae.saes.corpus.Row` and `TokenRow` are such."""

    @property
    def ids(self) -> Any: ...
    @property
    def keep(self) -> Any: ...


class TokenRow(NamedTuple):
    """A row of text: token ids, and which of them count."""

    ids: Sequence[int]
    keep: Sequence[bool]


def special_ids(tokenizer: Any) -> tuple[int, ...]:
    """All tokens that a tokenizer calls special: BOS, EOS and padding, and those of its chat template."""
    return tuple(sorted({*tokenizer.all_special_ids, *(int(i) for i, t in tokenizer.added_tokens_decoder.items() if t.special)}))


def token_rows(model: ChatModel, rows: Iterable[Sequence[int]], *, skip_special: bool = True) -> list[TokenRow]:
    """Rows of ids as they are, every token marked but the special ones."""
    special = set(special_ids(model.tokenizer))
    return [TokenRow(list(ids), [not skip_special or int(i) not in special for i in ids]) for ids in rows]


@dataclass(frozen=True)
class Evaluation:
    """Measures of one dictionary on one set of tokens.

    Attributes:
        quality: a row a set of tokens ("kept", "with outliers" and, of text, "all tokens"): tokens, fvu, explained_variance, mse,
            cosine, norm_ratio.
        loss: a row each of original, spliced (the reconstruction at kept tokens), zero (the residual 0 everywhere) and mean (the
            mean residual at kept tokens): ce (nats a token), kl (to the original), recovered (of spliced, against that ablation:
            1 is the original's loss, 0 the ablation's). None where no text was given.
        l0: active latents, tokens.
        l0_summary: mean, std, p05, median, p95, max.
        features: a row a latent: density, mean_active, max.
        density: histogram of log10 density.
        dead: latents that were active at none of the kept tokens.
        dense: latents that were active at more than `dense_above` of them.
        sae: what was evaluated, its outlier filter calibrated.
        notes: what has to be said beside the numbers.
    """

    quality: pd.DataFrame
    loss: pd.DataFrame | None
    l0: pd.DataFrame
    l0_summary: dict[str, float]
    features: pd.DataFrame
    density: pd.DataFrame
    dead: int
    dense: int
    dense_above: float
    sae: SAE
    notes: tuple[str, ...] = ()

    def of(self, measure: str, tokens: str = "kept") -> float:
        """A measure of `quality`, e.g. of("fvu", "with outliers")."""
        return float(self.quality.set_index("set")[measure][tokens])

    def loss_of(self, measure: str, variant: str = "spliced") -> float:
        """A measure of `loss`, e.g. loss_of("recovered", "zero"). NaN where no text was given."""
        return math.nan if self.loss is None else float(self.loss.set_index("variant")[measure][variant])

    def summary(self) -> dict[str, Any]:
        """The main numbers as plain values."""
        quality = {f"{m} {row['set']}": row[m] for _, row in self.quality.iterrows() for m in ("tokens", "fvu")}
        loss = (
            {f"{m} {row['variant']}": row[m] for _, row in self.loss.iterrows() for m in ("ce", "kl")}
            if self.loss is not None
            else {}
        )
        recovered = {f"ce recovered against {v}": self.loss_of("recovered", v) for v in ("zero", "mean")} if loss else {}
        l0 = {f"l0 {name}": value for name, value in self.l0_summary.items()}
        return {**quality, **l0, **loss, **recovered, "dead": self.dead, "dense": self.dense, "d_sae": self.sae.d_sae}


def evaluate(
    sae: SAE,
    model: ChatModel | None = None,
    rows: Iterable[MarkedTokens] | None = None,
    *,
    activations: Activations | None = None,
    block: int | None = None,
    loss: bool = True,
    loss_tokens: int | None = None,
    batch_tokens: int = 8192,
    loss_batch_tokens: int = 2048,
    dense_above: float = 0.1,
    progress: str | None = None,
) -> Evaluation:
    """Measures a dictionary, on text or on residuals.

    Args:
        model, rows: text, as rows of tokens with a mask; a row's first `sae.info.drop_first` tokens are left out besides.
        activations: or raw residuals of tokens that the dictionary is for, [n, d_model], as one tensor or in batches, or by block
            as a stream gives them (`stream.held_out(n)`, or as many of `stream.batches(n)` as are wanted). Then there is no loss.
        block: None takes the dictionary's own.
        loss: whether to run the whole model for losses (four forward passes a row).
        loss_tokens: rows up to so many tokens are enough for the losses; None takes all.
        batch_tokens, loss_batch_tokens: tokens a forward pass; logits of two passes are held at once for the divergence.
        dense_above: density above which a latent counts as dense.
        progress: label of progress bars, or None.

    Raises: UserError for a dictionary that does not fit the model, an unknown block, a site that is not a block's output, rows
        that are too long, or no token that counts.
    """
    if (rows is None) == (activations is None) or (rows is not None and model is None):
        raise UserError("evaluate was given neither or both of text and residuals", "model and rows, or activations")
    if activations is not None:
        return _of_activations(sae, _by_batch(sae, activations, block, batch_tokens), dense_above)
    assert model is not None
    assert rows is not None
    block = check_block(sae, model, block)
    kept_rows = _rows(rows, model, sae.info.drop_first)
    notes: list[str] = []
    sae = _calibrated(sae, model, kept_rows, block, batch_tokens, notes)
    sets = {"kept": Variance(), "with outliers": Variance(), "all tokens": Variance()}
    activity = Activity(sae.d_sae)
    label = f"{progress}: residuals" if progress else None
    for x, keep in _residuals(model, kept_rows, block, batch_tokens, label):
        acts = sae.encode_sparse(x)
        out = sae.decode_sparse(acts, len(x)).to(x.device)
        kept = keep & ~sae.outliers(x)
        for name, mask in (("kept", kept), ("with outliers", keep), ("all tokens", torch.ones_like(keep))):
            sets[name].add(x[mask], out[mask])
        activity.add(_only(acts, kept.to(acts.token.device)), int(kept.sum()))
    table = None
    if loss and sets["kept"].n:
        some = _first_rows(kept_rows, loss_tokens)
        label = f"{progress}: losses" if progress else None
        table = _losses(sae, model, some, block, sets["kept"].mean, loss_batch_tokens, label)
    return _evaluation(sae, sets, activity, table, dense_above, notes)


def _by_batch(sae: SAE, activations: Activations, block: int | None, size: int) -> Iterator[Float[Tensor, "n d_model"]]:
    whole = [activations] if isinstance(activations, Tensor | Mapping) else activations
    block = sae.info.block if block is None else block
    for part in whole:
        if isinstance(part, Mapping):
            if block is None or block not in part:
                raise UserError(
                    f"residuals of blocks {sorted(part)} for a dictionary of block {block}", "that block's", "give block="
                )
            part = part[block]
        yield from part.split(size)


def _of_activations(sae: SAE, activations: Iterable[Tensor], dense_above: float) -> Evaluation:
    notes: list[str] = []
    if sae.info.outliers is not None and sae.info.outliers.median_norm is None:
        notes.append("the outlier filter has no median norm, so no token was taken for an outlier")
    sets, activity = {"kept": Variance(), "with outliers": Variance()}, Activity(sae.d_sae)
    for x in activations:
        acts = sae.encode_sparse(x)
        out = sae.decode_sparse(acts, len(x)).to(x.device)
        kept = ~sae.outliers(x)
        sets["kept"].add(x[kept], out[kept])
        sets["with outliers"].add(x, out)
        activity.add(_only(acts, kept.to(acts.token.device)), int(kept.sum()))
    return _evaluation(sae, sets, activity, None, dense_above, notes)


def _evaluation(
    sae: SAE, sets: dict[str, Variance], activity: Activity, loss: pd.DataFrame | None, dense_above: float, notes: Sequence[str]
) -> Evaluation:
    if not sets["kept"].n:
        raise UserError("not one token was left to measure", "text whose tokens are neither special, nor first, nor outliers")
    quality = pd.DataFrame([{"set": name, **variance.row()} for name, variance in sets.items()])
    dead, dense = int((activity.fired == 0).sum()), int((activity.density > dense_above).sum())
    return Evaluation(
        quality, loss, activity.l0_table(), activity.l0_summary(), activity.features(), activity.density_table(),
        dead, dense, dense_above, sae, tuple(notes),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------- residuals
def check_block(sae: SAE, model: ChatModel, block: int | None = None) -> int:
    """The block at which to evaluate (None: the dictionary's own). UserError where dictionary, block and model do not fit."""
    sae.check_model(model)
    if block is not None and sae.info.block not in (None, block):
        raise UserError(
            f"{sae.ref} is a dictionary of block {sae.info.block}, and block {block} is asked for",
            f"block {sae.info.block}",
            f"leave --block out, or take a dictionary of block {block}",
        )
    block = sae.info.block if block is None else block
    if sae.info.site != "resid_post":
        raise UserError(f"{sae.ref} reads {sae.info.site}", "a dictionary of a block's output (resid_post)")
    if block is None:
        raise UserError(
            f"{sae.ref} does not say which block it belongs to", f"a block from 0 to {model.n_blocks - 1}", "give block="
        )
    if not 0 <= block < model.n_blocks:
        raise UserError(f"block {block} does not exist in {model.name}", f"a block from 0 to {model.n_blocks - 1}")
    return block


class _Row(NamedTuple):
    ids: tuple[int, ...]
    keep: Bool[Tensor, " pos"]


def _rows(rows: Iterable[MarkedTokens], model: ChatModel, drop_first: int) -> list[_Row]:
    out = []
    for i, row in enumerate(rows):
        ids, keep = tuple(int(t) for t in row.ids), torch.as_tensor(row.keep).bool().clone()
        if len(ids) > model.n_ctx or len(ids) != len(keep):
            raise UserError(
                f"row {i} has {len(ids)} tokens and a mask of {len(keep)}", f"at most {model.n_ctx} tokens, and a mask as long"
            )
        keep[:drop_first] = False
        if bool(keep.any()):
            out.append(_Row(ids, keep))
    if not out:
        raise UserError("no row has a token that counts", "rows of text", f"rows longer than {drop_first} tokens")
    return out


def _first_rows(rows: Sequence[_Row], tokens: int | None) -> list[_Row]:
    out, n = [], 0
    for row in rows:
        if tokens is not None and n >= tokens:
            break
        out.append(row)
        n += len(row.ids)
    return out


def _batch(model: ChatModel, rows: Sequence[_Row]) -> tuple[TokenBatch, Bool[Tensor, "batch pos"]]:
    """A batch padded on the right, and the mask of the tokens that count."""
    rendered = [Rendered(row.ids, len(row.ids), (len(row.ids), len(row.ids)), (), "") for row in rows]
    batch = TokenBatch.build(rendered, pad_id=model.pad_id, side="right", device=model.device)
    keep = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        keep[i, : len(row.keep)] = row.keep
    return batch, keep.to(model.device)


def _residuals(
    model: ChatModel, rows: Sequence[_Row], block: int, batch_tokens: int, progress: str | None
) -> Iterator[tuple[Float[Tensor, "n d_model"], Bool[Tensor, " n"]]]:
    """Residuals of all real tokens, batch by batch, and which of them count."""
    read = Residual(block)

    def run(indices: list[int]) -> tuple[Tensor, Tensor]:
        some = [rows[i] for i in indices]
        with torch.no_grad(), model.hooks([], [read]) as session:
            model.forward(_batch(model, some)[0], logits=None)
            x = torch.cat(list(session.take()[read.key][0]))
        if not bool(torch.isfinite(x).all()):
            raise UserError(f"NaN or infinite residuals at block {block}", "finite ones", "load the model in float32 or bfloat16")
        return x, torch.cat([row.keep for row in some]).to(x.device)

    batches = length_sorted_batches([len(row.ids) for row in rows], batch_tokens=batch_tokens)
    yield from (result for _, result in _bar(halving_on_oom(batches, run), len(rows), progress))


def _bar(batches: Iterable[tuple[list[int], Any]], n_rows: int, label: str | None) -> Iterator[tuple[list[int], Any]]:
    with tqdm(total=n_rows, desc=label, disable=label is None, unit="row") as bar:
        for indices, result in batches:
            yield indices, result
            bar.update(len(indices))


def _calibrated(sae: SAE, model: ChatModel, rows: Sequence[_Row], block: int, batch_tokens: int, notes: list[str]) -> SAE:
    """The dictionary with a median norm in its outlier filter, measured here where it was not published."""
    if sae.info.outliers is None or sae.info.outliers.median_norm is not None:
        return sae
    found = _residuals(model, _first_rows(rows, MEDIAN_TOKENS), block, batch_tokens, None)
    norms = torch.cat([x[keep].norm(dim=-1).cpu() for x, keep in found])
    median = float(norms.median())
    notes.append(f"the outlier filter's median norm, {median:.4g}, was measured on {len(norms)} tokens of this text")
    return sae.calibrated(median)


def _only(acts: SparseActs, kept: Bool[Tensor, " n"]) -> SparseActs:
    """The activations of some tokens, which are counted anew."""
    mask = kept[acts.token]
    place = kept.long().cumsum(0) - 1
    return SparseActs(place[acts.token[mask]], acts.latent[mask], acts.value[mask])


# ---------------------------------------------------------------------------------------------------------------------- losses
@dataclass(eq=False)
class _Constant:
    """A "dictionary" that reconstructs every residual as the same one: ablation with the means of a splice."""

    W_dec: Float[Tensor, "1 d_model"]
    left_alone: Callable[[Tensor], Tensor] | None = None
    ref: str = "constant"

    def encode(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... 1"]:
        return x.new_ones(*x.shape[:-1], 1)

    def outliers(self, x: Float[Tensor, "*batch d_model"]) -> Bool[Tensor, "*batch"]:
        return x.new_zeros(x.shape[:-1], dtype=torch.bool) if self.left_alone is None else self.left_alone(x)

    def __call__(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        return self.W_dec[0].to(x.device, x.dtype).expand_as(x)


def _losses(
    sae: SAE,
    model: ChatModel,
    rows: Sequence[_Row],
    block: int,
    mean: Float[Tensor, " d_model"],
    batch_tokens: int,
    label: str | None,
) -> pd.DataFrame:
    """Cross-entropy of the next token and KL divergence to the original, over the kept positions of all rows."""
    zero = _Constant(torch.zeros(1, sae.d_model))
    edits: dict[str, list[Intervention]] = {
        "original": [],
        "spliced": [Reconstruct(sae, block)],
        "zero": [Reconstruct(zero, block)],
        "mean": [Reconstruct(_Constant(mean[None], sae.outliers), block)],
    }

    def run(indices: list[int]) -> dict[str, tuple[float, float, int, int]]:
        batch, keep = _batch(model, [rows[i] for i in indices])
        # Edits "at all positions" of such a batch are edits at the tokens that count.
        nowhere = torch.zeros_like(keep)
        marked = replace(batch, positions=Positions(keep, nowhere, nowhere))
        sums, original = {}, None
        for name, edit in edits.items():
            with torch.no_grad(), model.hooks(edit):
                logits = model.forward(batch if name == "zero" else marked).logits
            assert logits is not None
            original = logits if original is None else original
            sums[name] = _sums(logits, original, batch.input_ids, keep, batch.attention_mask.bool())
        return sums

    totals = {name: [0.0, 0.0, 0, 0] for name in edits}
    batches = length_sorted_batches([len(row.ids) for row in rows], batch_tokens=batch_tokens)
    for _, sums in _bar(halving_on_oom(batches, run), len(rows), label):
        for name, parts in sums.items():
            totals[name] = [a + b for a, b in zip(totals[name], parts, strict=True)]
    ce = {name: total[0] / total[2] if total[2] else math.nan for name, total in totals.items()}
    recovered = {
        name: (ce[name] - ce["spliced"]) / (ce[name] - ce["original"]) if ce[name] != ce["original"] else math.nan
        for name in ("zero", "mean")
    }
    return pd.DataFrame(
        [
            {
                "variant": v,
                "ce": ce[v],
                "kl": totals[v][1] / totals[v][3],
                "recovered": recovered.get(v, math.nan),
                "tokens": totals[v][3],
            }
            for v in VARIANTS
        ]
    )


def _sums(
    logits: Float[Tensor, "batch pos vocab"],
    original: Float[Tensor, "batch pos vocab"],
    ids: Int[Tensor, "batch pos"],
    keep: Bool[Tensor, "batch pos"],
    real: Bool[Tensor, "batch pos"],
) -> tuple[float, float, int, int]:
    """(sum of cross-entropies, sum of divergences, positions of the first, positions of the second), row by row in fp32."""
    ce = kl = 0.0
    n_ce = n_kl = 0
    for row in range(len(ids)):
        at = keep[row].nonzero()[:, 0]
        logprobs, truth = logits[row, at].float().log_softmax(-1), original[row, at].float().log_softmax(-1)
        kl += float((truth.exp() * (truth - logprobs)).sum(-1).double().sum())
        followed = at + 1 < int(real[row].sum())
        ce -= float(logprobs[followed].gather(-1, ids[row, at[followed] + 1][:, None]).double().sum())
        n_ce, n_kl = n_ce + int(followed.sum()), n_kl + len(at)
    if not math.isfinite(ce):
        raise UserError("NaN or infinite logits", "finite ones", "load the model in float32 or bfloat16")
    return ce, kl, n_ce, n_kl
