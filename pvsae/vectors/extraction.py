"""Persona vectors from two judged tables of rollouts (paper, section 2.2).

Knows: which pairs of rows count, and how to sum the three statistics over all blocks, one forward pass a row, without keeping a
row: sums in double precision a polarity, and a few bucket sums for the intervals of stability.py.
Does not know: how the rows were generated or scored, how they are batched (sharing.py), what a block looks like inside, or which
block is the best (layers.py).
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pvsae.errors import UserError
from pvsae.vectors import stability
from pvsae.vectors.persona import BLOCK_CONVENTION, STATISTICS, PersonaVectors
from pvsae.vectors.rollouts import Rollouts, _missing, tokenizer_id
from pvsae.vectors.sharing import statistics_batches

if TYPE_CHECKING:
    from pvsae.models import ChatModel
    from pvsae.models.chat import Rendered

REASONS = ("missing_score", "pos_trait_low", "neg_trait_high", "pos_incoherent", "neg_incoherent", "empty_answer")
_PACKAGES = ("pvsae", "torch", "transformers")


class EmptyFilter(UserError):
    """No pair of a trait's rollouts counts, so that there is no vector. Other traits may well have one."""


@dataclass(frozen=True)
class PairFilter:
    """The pairs that count. `kept` are row numbers (row i of pos with row i of neg); `dropped` counts each lost pair once, under
    the first of REASONS that applies."""

    kept: tuple[int, ...]
    n_pairs: int
    dropped: dict[str, int]


def filter_pairs(
    pos: Rollouts, neg: Rollouts, trait: str | None = None, *, threshold: float = 50.0, coherence_floor: float = 50.0
) -> PairFilter:
    """Pairs whose pos answer shows the trait, whose neg answer does not, and of which both make sense.

    Kept: pos[trait] >= threshold, neg[trait] < 100 - threshold, both coherences >= coherence_floor (scores 0-100; with the
    default threshold of 50 both trait bounds are 50, as in the paper's code). A missing score drops the pair, and so does an
    empty answer, whose mean does not exist.

    Raises:
        UserError: the tables have no scores, differ in length, or row i asks different questions.
    """
    trait = trait or pos.trait
    for name, rollouts in (("pos", pos), ("neg", neg)):
        absent = [c for c in (trait, "coherence") if c not in rollouts.table]
        if absent:
            raise UserError(
                f"the {name} rollouts have no column {absent[0]!r}", f"scores {trait!r} and 'coherence'", "judge them first"
            )
    if len(pos) != len(neg):
        raise UserError(
            f"{len(pos)} pos rows and {len(neg)} neg rows",
            "as many of each: row i pairs with row i",
            "generate both the same way",
        )
    asked = [(p, n) for p, n in zip(pos.table["question"], neg.table["question"], strict=True) if p != n]
    if asked:
        raise UserError(
            f"{len(asked)} pairs ask different questions, first {asked[0][0]!r} and {asked[0][1]!r}",
            "the same question in row i of both tables", "generate both with the same questions, and do not sort them",
        )  # fmt: skip
    columns = [r.table[c].astype(float).to_numpy() for r in (pos, neg) for c in (trait, "coherence")]
    empty = [p == "" or n == "" for p, n in zip(pos.table["answer"], neg.table["answer"], strict=True)]
    kept, dropped = [], dict.fromkeys(REASONS, 0)
    for i, (pos_trait, pos_coherence, neg_trait, neg_coherence) in enumerate(zip(*columns, strict=True)):
        scores = (pos_trait, pos_coherence, neg_trait, neg_coherence)
        verdicts = (
            any(s != s for s in scores), pos_trait < threshold, neg_trait >= 100 - threshold,
            pos_coherence < coherence_floor, neg_coherence < coherence_floor, empty[i],
        )  # fmt: skip
        reason = next((r for r, hit in zip(REASONS, verdicts, strict=True) if hit), None)
        if reason is None:
            kept.append(i)
        else:
            dropped[reason] += 1
    return PairFilter(tuple(kept), len(pos), dropped)


def render_rows(model: ChatModel, rollouts: Rollouts, rows: Sequence[int]) -> list[Rendered]:
    """Token ids and spans of stored rows, for one forward pass over prompt and answer without further special tokens.

    Rows with ids that this model's tokenizer made are taken as they are. Rows of a server or of another tokenizer are rendered
    again from their messages; rows of an official CSV, which has no messages, from the templated text.
    """
    from pvsae.models.chat import Rendered

    same_ids = rollouts.meta.get("tokenizer") is not None and rollouts.meta["tokenizer"] == tokenizer_id(model.tokenizer)
    official = rollouts.meta.get("source") == "official csv"
    table = rollouts.table.iloc[list(rows)]
    columns = [table[c].tolist() for c in ("prompt_ids", "answer_ids", "prompt", "answer")]
    rendered = []
    for i, prompt_ids, answer_ids, text, answer in zip(rows, *columns, strict=True):
        if same_ids and not _missing(prompt_ids) and not _missing(answer_ids):
            n = len(prompt_ids)
            prompt = Rendered(ids=tuple(prompt_ids), n_prompt=n, answer=(n, n), spans=(), text=text)
            rendered.append(model.chat.with_answer_ids(prompt, answer_ids))
        elif official:  # the text already holds the template's special tokens, a beginning-of-text token too
            ids = tuple(model.tokenizer(text, add_special_tokens=False)["input_ids"])
            prompt = Rendered(ids=ids, n_prompt=len(ids), answer=(len(ids), len(ids)), spans=(), text=text)
            rendered.append(model.chat.with_answer_text(prompt, answer))
        else:
            rendered.append(model.chat.with_answer_text(rollouts.messages(i), answer))
    return rendered


def extract(
    model: ChatModel,
    pos: Rollouts,
    neg: Rollouts,
    trait: str | None = None,
    *,
    threshold: float = 50.0,
    coherence_floor: float = 50.0,
    n_buckets: int = 20,
    seed: int = 0,
    batch_tokens: int | None = None,
    share_prompts: bool = True,
    official_ends: bool = False,
    progress: str | None = None,
) -> PersonaVectors:
    """The trait's vectors at every block: mean over kept pos rows minus mean over kept neg rows, in three statistics.

    Args:
        pos, neg: judged rollouts; row i of one pairs with row i of the other (see filter_pairs).
        n_buckets: resampling units for the stability numbers (see stability.py).
        batch_tokens: tokens, padding included, in one forward pass; None chooses by device.
        share_prompts: compute a prompt that several rows share once (see sharing.py); the numbers are the same up to rounding.
        official_ends: also run the slow plain reference (one row at a time) to get the two rows of an official file that are no
            block's residual: the embedding and the last block after the final norm. Kept in `extra`, for write_official.

    Returns:
        PersonaVectors with, in meta["diagnostics"][statistic], lists over blocks of: norm; norm_low, norm_high and cosine_low
        (bootstrap over random buckets of pairs); half_split_cosine; the last two also with the suffix _questions, where buckets
        hold whole questions, so that the halves share none; row_norm (mean norm of a row's statistic; for the last prompt token
        that is the residual's norm, for means over spans it is less); pos_projection and neg_projection (means on the unit
        vector; their distance, the "gap", is the norm).

    Raises:
        EmptyFilter: no pair passes the filter (with the counts).
        UserError: activations are NaN or infinite.
    """
    trait = trait or pos.trait
    pairs = filter_pairs(pos, neg, trait, threshold=threshold, coherence_floor=coherence_floor)
    rows = render_rows(model, pos, pairs.kept) + render_rows(model, neg, pairs.kept)
    answered = [all(r.answer[1] > r.answer[0] for r in both) for both in zip(rows, rows[len(pairs.kept) :], strict=False)]
    if not all(answered):  # text that tokenises to nothing, or thinking that never ended
        kept = tuple(i for i, ok in zip(pairs.kept, answered, strict=True) if ok)
        dropped = {**pairs.dropped, "empty_answer": pairs.dropped["empty_answer"] + len(pairs.kept) - len(kept)}
        rows = [r for r, ok in zip(rows, answered + answered, strict=True) if ok]
        pairs = PairFilter(kept, pairs.n_pairs, dropped)
    if not pairs.kept:
        raise EmptyFilter(
            f"no pair of {trait!r} rollouts passes the filter: {_counts(pairs)}",
            f"pairs with pos trait >= {threshold:g}, neg trait < {100 - threshold:g} and both coherences >= {coherence_floor:g}",
            _advice(pairs),
        )
    n = len(pairs.kept)
    questions = [int(q) for q in pos.table["question_index"].iloc[list(pairs.kept)]]
    bucket_sets = {"": stability.random_buckets(n, n_buckets, seed), "_questions": stability.group_buckets(questions, n_buckets)}
    sums = _Sums(model.n_blocks, model.d_model, n, bucket_sets)
    sums.run(model, rows, batch_tokens=batch_tokens, share_prompts=share_prompts, progress=progress)
    vectors, diagnostics = sums.finish(seed)
    meta = {
        "model": {
            "name": str(model.name), "n_blocks": model.n_blocks, "d_model": model.d_model,
            "dtype": str(model.dtype).removeprefix("torch."),
            "model_type": getattr(getattr(model.hf, "config", None), "model_type", None),
        },
        "block_convention": BLOCK_CONVENTION,
        "recipe": {
            "threshold": threshold, "coherence_floor": coherence_floor, "n_buckets": n_buckets, "seed": seed,
            "statistics": "fp32 means over tokens, double-precision sums over rows, pos mean minus neg mean, not normalised",
            "pos": pos.meta, "neg": neg.meta,
        },
        "counts": {"pairs": pairs.n_pairs, "kept": n, "dropped": pairs.dropped, "questions": len(set(questions))},
        "template_notes": pos.meta.get("template_notes"),
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in _PACKAGES}},
        "diagnostics": diagnostics,
    }  # fmt: skip
    result = PersonaVectors(trait, vectors, meta)
    if official_ends:
        from pvsae.vectors.reference import reference_vectors

        reference = reference_vectors(model, rows[:n], rows[n:], progress=progress)
        for statistic in STATISTICS:
            result.extra[f"embedding/{statistic}"] = reference.hidden[statistic][0].float()
            result.extra[f"post_norm/{statistic}"] = reference.hidden[statistic][-1].float()
    return result


class _Sums:
    """Running sums over rows: pos rows are 0 .. n-1, neg rows n .. 2n-1, row i and row n+i being one pair."""

    def __init__(self, n_blocks: int, d_model: int, n: int, buckets: dict[str, Int[Tensor, " n"]]) -> None:
        self.n, self.n_blocks, self.buckets = n, n_blocks, buckets
        self.rows_seen = 0

        def zeros(*shape: int) -> dict[str, Tensor]:
            return {s: torch.zeros(*shape, dtype=torch.float64) for s in STATISTICS}

        self.total = zeros(2, n_blocks, d_model)  # [pos, neg]
        self.row_norm = zeros(n_blocks)
        self.signed = {name: zeros(int(b.max()) + 1, n_blocks, d_model) for name, b in buckets.items()}  # pos minus neg

    def run(self, model: ChatModel, rows: Sequence[Rendered], **options: Any) -> None:
        for indices, values in statistics_batches(model, rows, **options):
            index = torch.as_tensor(indices, dtype=torch.long)
            for statistic, x in values.items():
                self._add(statistic, index, x)
            self.rows_seen += len(index)

    def _add(self, statistic: str, rows: Int[Tensor, " batch"], x: Float[Tensor, "batch n_blocks d_model"]) -> None:
        x = x.double()
        negative = (rows >= self.n).long()
        self.total[statistic].index_add_(0, negative, x)
        self.row_norm[statistic] += x.norm(dim=2).sum(dim=0)
        x *= (1 - 2 * negative)[:, None, None]
        for name, bucket in self.buckets.items():
            self.signed[name][statistic].index_add_(0, bucket[rows % self.n], x)

    def finish(self, seed: int) -> tuple[dict[str, Tensor], dict[str, dict[str, list[float | None]]]]:
        if self.rows_seen != 2 * self.n:
            raise RuntimeError(f"{self.rows_seen} rows came back of {2 * self.n}")
        vectors, diagnostics = {}, {}
        for statistic in STATISTICS:
            pos, neg = self.total[statistic] / self.n
            vector = pos - neg
            norm = vector.norm(dim=1)
            unit = vector / norm.clamp_min(torch.finfo(torch.float64).tiny)[:, None]
            numbers = {"norm": norm, "row_norm": self.row_norm[statistic] / (2 * self.n)}
            numbers |= {"pos_projection": (pos * unit).sum(dim=1), "neg_projection": (neg * unit).sum(dim=1)}
            for suffix, bucket in self.buckets.items():
                signed = self.signed[suffix][statistic]
                gram = torch.einsum("ibd,jbd->bij", signed, signed)
                resampled = stability.bootstrap(gram, torch.bincount(bucket, minlength=len(signed)), seed)
                numbers[f"half_split_cosine{suffix}"] = stability.half_split_cosine(gram, seed)
                numbers |= {f"{name}{suffix}": value for name, value in resampled.items()}
            vectors[statistic] = vector.float()
            diagnostics[statistic] = {name: _listed(value) for name, value in numbers.items()}
        return vectors, diagnostics


def _listed(values: Tensor) -> list[float | None]:
    """JSON has no NaN: None says "too few pairs to tell"."""
    return [None if v != v else round(v, 8) for v in values.tolist()]


def _counts(pairs: PairFilter) -> str:
    lost = ", ".join(f"{count} {reason}" for reason, count in pairs.dropped.items() if count)
    return f"{pairs.n_pairs} pairs, {len(pairs.kept)} kept, dropped: {lost or 'none'}"


def _advice(pairs: PairFilter) -> str:
    if pairs.n_pairs == 0:
        return "generate rollouts first"
    reason = max(pairs.dropped, key=lambda r: pairs.dropped[r])
    return {
        "missing_score": "the judge gave no score: look at the *_score columns for its reason, and judge again",
        "pos_trait_low": "the model does not show the trait under pos instructions: write stronger ones, or lower the threshold",
        "neg_trait_high": "the model shows the trait even under neg instructions: write stronger ones, or lower the threshold",
        "pos_incoherent": "the pos answers make no sense: lower the temperature, or allow more tokens",
        "neg_incoherent": "the neg answers make no sense: lower the temperature, or allow more tokens",
        "empty_answer": "the answers are empty: look at the prompts in the rollout table, and allow more tokens",
    }[reason]


@cache
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
