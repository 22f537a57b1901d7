"""Facets: what part of a trait an answer shows, where the judge's evidence says so, and who raises which.

Knows: tags TRAIT/FACET with counts in the evidence of a score, shares of them, and the rule by which a feature is said to raise
a facet of its own.
Does not know: which judge wrote the tags, how answers came about. A judge without such tags leaves everything here empty.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from pvsae.judges import Score
from pvsae.stages.statistics import mean_ci
from pvsae.vectors.rollouts import Rollouts

TIMES = 5.0  # of what it does without steering
COHERENT = 70.0
LEAST = 2.0  # facet scores below it count as this much: nothing has no multiples, and one sentence is chance


def facet_scores(rollouts: Rollouts) -> pd.DataFrame:
    """A row an answer, a column each facet of the trait that occurs: the share of the answer's tags that are of it, 0-100.

    Tags of a rule judge count the sentences of an answer, so the columns of a row sum to its trait score. A mark in brackets
    behind a tag (such as "(false)") says more about the sentence and is left out. NaN in rows without evidence.
    """
    rows = [_shares(Score.from_json(text), rollouts.trait) for text in rollouts.table[f"{rollouts.trait}_score"]]
    names = sorted({name for row in rows if row for name in row})
    return pd.DataFrame([{name: float("nan") if row is None else row.get(name, 0.0) for name in names} for row in rows])


def _shares(score: Score, trait: str) -> dict[str, float] | None:
    if score.value is None or score.mode != "rules":
        return None
    total = sum(count for _, count in score.top)
    shares: dict[str, float] = {}
    for tag, count in score.top:
        of, _, facet = tag.partition(" (")[0].partition("/")
        if of == trait and facet:
            shares[facet] = shares.get(facet, 0.0) + 100.0 * count / total
    return shares


def facet_table(keys: pd.DataFrame, answers: list[Rollouts], seed: int) -> pd.DataFrame:
    """A row a condition and facet: the columns of `keys`, then facet, score with its 95% interval over questions, and n.

    Args:
        keys: a row a condition, `trait` among its columns.
        answers: the judged answers of each row. A facet that occurs in none of a trait's rows is not known here.
    """
    scores = [facet_scores(rollouts) for rollouts in answers]
    known: dict[str, set[str]] = {}
    for trait, frame in zip(keys["trait"], scores, strict=True):
        known.setdefault(trait, set()).update(frame.columns)
    out = []
    for (_, key), frame, rollouts in zip(keys.iterrows(), scores, answers, strict=True):
        questions = rollouts.table["question_index"].tolist()
        for facet in sorted(known[key["trait"]]):
            # An answer whose tags name other facets has none of this one; a row without evidence stays NaN.
            values = frame[facet] if facet in frame else _zeros(rollouts)
            found = mean_ci(values, questions, seed=seed)
            out.append({**key, "facet": facet, "score": found.value, "low": found.low, "high": found.high, "n": found.n})
    columns = [*keys.columns, "facet", "score", "low", "high", "n"]
    return pd.DataFrame(out, columns=columns)


def _zeros(rollouts: Rollouts) -> list[float]:
    return [0.0 if _shares(Score.from_json(t), rollouts.trait) is not None else float("nan") for t in _evidence(rollouts)]


def _evidence(rollouts: Rollouts) -> list[str]:
    return rollouts.table[f"{rollouts.trait}_score"].tolist()


def specificity(
    table: pd.DataFrame,
    facets: pd.DataFrame,
    *,
    own: Mapping[str, str] | None = None,
    times: float = TIMES,
    coherent: float = COHERENT,
) -> pd.DataFrame:
    """Which steered conditions raise one facet of a trait, each at its best strength: a row a (trait, condition, feature, of).

    A condition is specific where, at one strength, its facet's score is at least `times` what it is without steering (scores
    below LEAST count as LEAST there), higher than that of every other facet of the trait, and coherence is at least `coherent`.

    Args:
        table, facets: as `feature_steer.run` gives them.
        own: feature -> its facet, where that is known from elsewhere (from the sentences that it is active in); otherwise the
            facet that it raises most is taken, which favours whoever has more strengths to choose from: features and controls
            alike.

    Returns: columns trait, condition, feature, of, facet, coef (the strength chosen: among coherent ones that with the largest
        lead of its facet over the others), score, unsteered, times, runner_up (the other facets' highest score), coherence,
        trait_score, specific. Without a coherent strength, coef and what follows is NaN and specific is false.
    """
    rows = []
    keys = ["trait", "condition", "feature", "of"]
    scores = facets.pivot_table(index=[*keys, "coef"], columns="facet", values="score", sort=False)
    for (trait, condition, feature, of), part in table.groupby(keys, sort=False):
        if condition == "unsteered" or condition.startswith("prompt") or trait not in set(facets["trait"]):
            continue
        base = scores.xs(trait, level="trait").xs("unsteered", level="condition").iloc[0].dropna()
        best: dict[str, object] | None = None
        for row in part[part["coherence"] >= coherent].to_dict("records"):
            here = scores.loc[(trait, condition, feature, of, row["coef"])].reindex(base.index)
            facet = (own or {}).get(str(feature)) or str((here - base).idxmax())
            others = float(here.drop(facet, errors="ignore").max()) if set(here.index) - {facet} else 0.0
            score, before = float(here.get(facet, 0.0)), float(base.get(facet, 0.0))  # a facet that nobody showed scores 0
            ratio = score / max(before, LEAST)
            found = {
                "facet": facet, "coef": row["coef"], "score": score, "unsteered": before, "times": ratio, "runner_up": others,
                "coherence": row["coherence"], "trait_score": row["trait_score"],
                "specific": bool(ratio >= times and score > others),
            }  # fmt: skip
            if best is None or (found["specific"], score - others) > (best["specific"], best["score"] - best["runner_up"]):  # type: ignore[operator]
                best = found
        rows.append({"trait": trait, "condition": condition, "feature": feature, "of": of, **(best or {"specific": False})})
    columns = [*keys, "facet", "coef", "score", "unsteered", "times", "runner_up", "coherence", "trait_score", "specific"]
    return pd.DataFrame(rows, columns=columns)
