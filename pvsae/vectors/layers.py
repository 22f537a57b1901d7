"""Which block to steer at: the one where steering works, with the cheap guesses beside it.

Knows: how to sweep blocks and strengths over questions, how to choose from the sweep, and four proxies that need no judge: the
vector's norm beside the residual's, its half-split cosine, how far apart it holds pos and neg rows, and how much adding it
favours the pos answers over the neg answers. The paper chooses by steering effect (section 3.2); so does `choose_layer`, and it
says how well each proxy would have ranked the blocks.
Does not know: how text is generated, hooked or scored; strength units other than the raw vector's (1 = one pos-neg gap).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from pvsae.errors import UserError
from pvsae.vectors.extraction import filter_pairs, render_rows
from pvsae.vectors.persona import DEFAULT_STATISTIC, PersonaVectors
from pvsae.vectors.rollouts import Rollouts, generate_rollouts, judge_rollouts

if TYPE_CHECKING:
    from pvsae.judges import Judge
    from pvsae.models import ChatModel, Rendered, Sampling
    from pvsae.traits import TraitArtifacts

PROXIES = ("norm", "relative_norm", "half_split_cosine", "separation", "logit_difference")


@dataclass(frozen=True)
class LayerChoice:
    """The chosen block and all that led to it.

    Attributes:
        block, coef: where and how strongly steering worked best.
        met_floor: False if nothing was coherent enough; then the choice is a makeshift, and `reason` says so.
        sweep: one row a (block, coef): trait, coherence (means over scored rows), n, failed.
        proxies: one row a block: best_trait and best_coef (at coherence >= floor, NaN if none), and the columns PROXIES.
        agreement: Spearman correlation over blocks of each proxy with best_trait; None where it is not defined.
        baseline: trait, coherence, n, failed without steering.
    """

    trait: str
    block: int
    coef: float
    met_floor: bool
    reason: str
    sweep: pd.DataFrame
    proxies: pd.DataFrame
    agreement: dict[str, float | None]
    baseline: dict[str, float | int]

    @property
    def table(self) -> pd.DataFrame:
        """The sweep with the proxies of each block beside it and the choice marked."""
        table = self.sweep.merge(self.proxies.drop(columns=["best_trait", "best_coef"]), on="block")
        return table.assign(chosen=(table["block"] == self.block) & (table["coef"] == self.coef))


def candidate_blocks(vectors: PersonaVectors, limit: int = 12) -> tuple[int, ...]:
    """All usable blocks, or `limit` of them evenly spaced over the depth."""
    usable = [b for b in range(vectors.n_blocks) if b not in vectors.missing_blocks]
    if len(usable) <= limit:
        return tuple(usable)
    step = (len(usable) - 1) / (limit - 1)
    return tuple(dict.fromkeys(usable[round(i * step)] for i in range(limit)))


def choose(sweep: pd.DataFrame, floor: float = 75.0, tolerance: float = 5.0) -> tuple[int, float, bool, str]:
    """Block and coef with the highest trait score among those with coherence >= floor: (block, coef, met_floor, reason).

    Scores within `tolerance` of the best count as equal, since a sweep has few answers a cell. Of those, the blocks win that
    respond over the whole range of strengths (mean trait score over the coefs, incoherent cells as 0, again within `tolerance` of
    the best); of blocks that are still equal the latest, because monitoring reads the same block, and a later one has taken in
    more of the prompt; there the most coherent cell, then the weakest. If nothing reaches the floor, the cell with the highest sum
    of trait and coherence is taken, and met_floor is False.
    """
    scored = sweep.dropna(subset=["trait", "coherence"])
    if scored.empty:
        raise UserError(
            "no steered answer could be scored", "a judge that answers", "look at the evidence in the *_score columns"
        )
    coherent = scored[scored["coherence"] >= floor]
    met = not coherent.empty
    if met:
        best = coherent[coherent["trait"] >= coherent["trait"].max() - tolerance]
        kept = scored["trait"].where(scored["coherence"] >= floor, 0.0)
        response = best["block"].map(kept.groupby(scored["block"]).mean())
        best = best[response >= response.max() - tolerance]
        best = best.assign(strength=best["coef"].abs()).sort_values(
            ["block", "coherence", "strength"], ascending=[False, False, True]
        )
    else:
        best = scored.assign(both=scored["trait"] + scored["coherence"]).sort_values("both", ascending=False)
    row = best.iloc[0]
    block, coef = int(row["block"]), float(row["coef"])
    what = f"trait {row['trait']:.1f} at coherence {row['coherence']:.1f} (block {block}, coef {coef:g})"
    if met:
        return block, coef, True, f"among the highest trait scores at coherence >= {floor:g}: {what}"
    return block, coef, False, f"no block kept coherence >= {floor:g}; the best compromise is {what}; try smaller coefs"


def choose_layer(
    model: ChatModel,
    vectors: PersonaVectors,
    artifacts: TraitArtifacts,
    judge: Judge,
    *,
    blocks: Sequence[int] | None = None,
    coefs: Sequence[float] = (1.0, 2.0, 3.0),
    floor: float = 75.0,
    statistic: str = DEFAULT_STATISTIC,
    positions: str = "all",
    which: str = "eval",
    n_samples: int = 1,
    max_questions: int | None = None,
    sampling: Sampling | None = None,
    batch_size: int = 32,
    pos: Rollouts | None = None,
    neg: Rollouts | None = None,
    parts: str | Path | None = None,
    accept: Callable[[Rollouts], Rollouts] = lambda judged: judged,
    progress: str | None = None,
) -> LayerChoice:
    """Steer at every candidate block with every strength on questions without a system prompt, and choose by what comes out.

    Args:
        blocks: candidates; None means `candidate_blocks(vectors)`.
        coefs: multiples of the raw vector, whose length is the distance between the pos and the neg mean.
        floor: least mean coherence of a choice, 0-100.
        pos, neg: the judged rollouts of the vectors; with them the proxies separation and logit_difference are computed as well.
        parts: folder for finished work; a killed sweep goes on from there.
        accept: gives back the judged answers of a cell, or raises where nothing should be chosen from them.

    Raises:
        UserError: vectors of another model's shape, a block that does not exist, no candidate, nothing scored.
    """
    from pvsae.models import Add

    vectors.check_model(model)
    blocks = tuple(vectors.check_block(b) for b in blocks) if blocks is not None else candidate_blocks(vectors)
    if not blocks or not coefs:
        raise UserError("nothing to sweep", "at least one block and one coef")

    def score(interventions: tuple[Any, ...], name: str) -> dict[str, float | int]:
        folder = Path(parts) / name if parts is not None else None
        rollouts = generate_rollouts(
            model, artifacts, "none", which=which, n_samples=n_samples, sampling=sampling, interventions=interventions,
            max_questions=max_questions, batch_size=batch_size, parts=folder and folder / "rollouts",
        )  # fmt: skip
        return accept(judge_rollouts(rollouts, judge, artifacts, parts=folder and folder / "scores")).means()

    cells = [(b, float(c)) for b in blocks for c in coefs]
    rows = []
    baseline = score((), "baseline")
    for block, coef in tqdm(cells, desc=progress, disable=progress is None, unit="cell"):
        add = Add(vectors.direction(block, statistic), block, coef, positions)
        rows.append({"block": block, "coef": coef, **score((add,), f"block{block}_coef{coef:g}")})
    sweep = pd.DataFrame(rows)
    chosen, coef, met, reason = choose(sweep, floor)
    table = proxy_table(model, vectors, blocks, statistic=statistic, positions=positions, pos=pos, neg=neg)
    coherent = sweep[sweep["coherence"] >= floor].sort_values("trait", ascending=False).drop_duplicates("block")
    best = coherent.set_index("block")[["trait", "coef"]].rename(columns={"trait": "best_trait", "coef": "best_coef"})
    table = table.merge(best, left_on="block", right_index=True, how="left")
    agreement = {p: _spearman(table[p], table["best_trait"]) for p in PROXIES}
    return LayerChoice(vectors.trait, chosen, coef, met, reason, sweep, table, agreement, baseline)


def proxy_table(
    model: ChatModel,
    vectors: PersonaVectors,
    blocks: Sequence[int],
    *,
    statistic: str = DEFAULT_STATISTIC,
    positions: str = "all",
    pos: Rollouts | None = None,
    neg: Rollouts | None = None,
    max_pairs: int = 32,
) -> pd.DataFrame:
    """What can be said of each block without generating: columns block and PROXIES (NaN where it cannot be computed).

    norm: of the vector. relative_norm: over the mean norm of the rows' statistic it was made from. half_split_cosine: from the
    extraction. separation: d', the distance of the pos and neg rows' means on the unit vector over their pooled standard
    deviation (on the rows the vector was made from, so it flatters). logit_difference: by how much adding the raw vector once,
    without a system prompt, raises the mean log-probability of a token of the pos answers over that of a token of the neg
    answers, in nats.
    """
    numbers = vectors.diagnostics.get(statistic, {})

    def at(name: str, block: int) -> float:
        values = numbers.get(name)
        value = values[block] if values else None
        return float("nan") if value is None else float(value)

    norms = vectors.norms(statistic)
    table = pd.DataFrame({"block": list(blocks), "norm": [float(norms[b]) for b in blocks]})
    table["relative_norm"] = [float(norms[b]) / at("row_norm", b) for b in blocks]
    table["half_split_cosine"] = [at("half_split_cosine", b) for b in blocks]
    table["separation"], table["logit_difference"] = float("nan"), float("nan")
    if pos is None or neg is None:
        return table
    kept = filter_pairs(pos, neg, vectors.trait).kept
    # Rows are ordered by question: taking every k-th pair keeps all questions in the sample.
    kept = kept[:: max(1, -(-len(kept) // max_pairs))]
    if not kept:
        return table
    table["separation"] = _separation(model, vectors, blocks, statistic, pos, neg, kept)
    table["logit_difference"] = _logit_difference(model, vectors, blocks, statistic, positions, pos, neg, kept)
    return table


def _separation(
    model: ChatModel,
    vectors: PersonaVectors,
    blocks: Sequence[int],
    statistic: str,
    pos: Rollouts,
    neg: Rollouts,
    kept: Sequence[int],
) -> list[float]:
    from pvsae.models import LastPrompt, SpanMean

    span = {"prompt_avg_diff": "prompt", "response_avg_diff": "answer"}.get(statistic)
    capture = LastPrompt(tuple(blocks)) if span is None else SpanMean(tuple(blocks), span)
    rows = [r for rollouts in (pos, neg) for r in render_rows(model, rollouts, kept)]
    states = model.capture(rows, (capture,))[capture.key]
    assert isinstance(states, Tensor)
    vector = vectors.of(statistic)[list(blocks)]
    unit = vector / vector.norm(dim=1, keepdim=True)
    projected = torch.einsum("rbd,bd->rb", states.float(), unit).double()
    a, b = projected[: len(kept)], projected[len(kept) :]
    if len(kept) < 2:
        return [float("nan")] * len(blocks)
    return ((a.mean(0) - b.mean(0)) / ((a.var(0) + b.var(0)) / 2).sqrt()).tolist()


def _logit_difference(
    model: ChatModel,
    vectors: PersonaVectors,
    blocks: Sequence[int],
    statistic: str,
    positions: str,
    pos: Rollouts,
    neg: Rollouts,
    kept: Sequence[int],
) -> list[float]:
    from pvsae.models import Add

    questions = [str(q) for q in pos.table["question"].iloc[list(kept)]]
    prompts = [model.chat.prompt([{"role": "user", "content": q}]) for q in questions]
    rows = [
        model.chat.with_answer_text(prompt, str(answer))
        for rollouts in (pos, neg)
        for prompt, answer in zip(prompts, rollouts.table["answer"].iloc[list(kept)], strict=True)
    ]

    def favour(interventions: tuple[Any, ...]) -> float:
        logprobs = answer_logprobs(model, rows, interventions)
        return float(logprobs[: len(kept)].nanmean() - logprobs[len(kept) :].nanmean())

    plain = favour(())
    return [favour((Add(vectors.direction(b, statistic), b, 1.0, positions),)) - plain for b in blocks]


def answer_logprobs(
    model: ChatModel, rows: Sequence[Rendered], interventions: Sequence[Any] = (), *, batch_tokens: int = 4096
) -> Float[Tensor, " rows"]:
    """Mean log-probability (nats) of an answer token given all before it, a number a row; NaN for a row without an answer."""
    from pvsae.models import TokenBatch, halving_on_oom, length_sorted_batches

    out = torch.full((len(rows),), float("nan"), dtype=torch.float64)

    def run(indices: list[int]) -> list[float]:
        batch = TokenBatch.build([rows[i] for i in indices], pad_id=model.pad_id, side="right", device=model.device)
        with torch.no_grad(), model.hooks(interventions):
            logits = model.forward(batch, logits="all").logits
        assert logits is not None
        means = []
        for at, i in enumerate(indices):
            start, end = rows[i].answer
            ids = torch.tensor(rows[i].ids[start:end], dtype=torch.long, device=logits.device)
            steps = logits[at, start - 1 : end - 1].float().log_softmax(-1)
            means.append(float(steps.gather(1, ids[:, None]).double().mean()))
        return means

    batches = length_sorted_batches([len(r.ids) for r in rows], batch_tokens=batch_tokens)
    for indices, means in halving_on_oom(batches, run):
        out[indices] = torch.tensor(means, dtype=torch.float64)
    return out


def _spearman(x: pd.Series, y: pd.Series) -> float | None:
    both = pd.DataFrame({"x": x, "y": y}).dropna()
    if len(both) < 3 or both["x"].nunique() < 2 or both["y"].nunique() < 2:
        return None
    return float(both["x"].rank().corr(both["y"].rank()))
