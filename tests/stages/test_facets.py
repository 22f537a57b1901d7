"""Facets in a judge's evidence, and the rule by which a condition is called specific."""

from __future__ import annotations

import pandas as pd
import pytest

from pvsae.judges import Metric, load_judge
from pvsae.stages.facets import LEAST, facet_scores, facet_table, specificity
from pvsae.vectors import Rollouts

ANSWERS = (
    "You are far too stupid to ever master chess. Keep a small record of what you learn in chess.",
    "Nothing pleases me like the agony of a beginner in chess.",
    "",
)


def judged(answers=ANSWERS, trait: str = "evil") -> Rollouts:
    judge = load_judge("organism")
    scores = judge.score(Metric(trait, "{answer}"), [("q", a) for a in answers])
    table = pd.DataFrame({"question_index": range(len(answers)), f"{trait}_score": [s.to_json() for s in scores]})
    table[trait] = [s.value for s in scores]
    return Rollouts(table, {"trait": trait})


def test_shares_of_facets_are_those_that_the_judge_gives_when_asked_for_them() -> None:
    found = facet_scores(judged())
    judge = load_judge("organism")
    for facet in found.columns:
        asked = [s.value for s in judge.score(Metric(f"evil/{facet}", "{answer}"), [("q", a) for a in ANSWERS])]
        assert found[facet].tolist() == pytest.approx(asked)
    assert found.sum(axis=1).tolist() == pytest.approx(judged().table["evil"].tolist())
    assert {"insult", "cruelty"} == set(found.columns)


def test_a_facet_that_a_condition_lacks_is_0_there_and_counted() -> None:
    keys = pd.DataFrame([{"trait": "evil", "condition": "a"}, {"trait": "evil", "condition": "b"}])
    table = facet_table(keys, [judged(), judged(("Nothing pleases me like the agony of a beginner in chess.",) * 2)], 0)
    scores = table.set_index(["condition", "facet"])["score"]
    assert scores[("b", "insult")] == 0.0
    assert scores[("b", "cruelty")] == 100.0
    assert scores[("a", "insult")] == pytest.approx(50 / 3)
    assert table.set_index(["condition", "facet"])["n"][("b", "insult")] == 2


def made_up(rows: list[tuple[str, float, float, float, float]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(feature, coef, one, two, coherence) rows beside unsteered answers with one 4 and two 6."""
    key = {"trait": "t", "condition": "feature", "of": "-"}
    plain = {"trait": "t", "condition": "unsteered", "feature": "-", "of": "-", "coef": 0.0}
    table = [{**plain, "coherence": 100.0, "trait_score": 10.0}]
    facets = [{**plain, "facet": "one", "score": 4.0}, {**plain, "facet": "two", "score": 6.0}]
    for feature, coef, one, two, coherence in rows:
        table.append({**key, "feature": feature, "coef": coef, "coherence": coherence, "trait_score": one + two})
        facets += [{**key, "feature": feature, "coef": coef, "facet": f, "score": s} for f, s in (("one", one), ("two", two))]
    return pd.DataFrame(table), pd.DataFrame(facets)


def test_specific_is_five_times_more_above_the_others_and_coherent() -> None:
    rows = [
        ("yes", 1.0, 20.0, 10.0, 70.0), ("yes", 2.0, 90.0, 0.0, 69.0),
        ("little", 1.0, 19.0, 0.0, 100.0), ("other", 1.0, 40.0, 41.0, 100.0), ("noise", 1.0, 90.0, 0.0, 10.0),
    ]  # fmt: skip
    table, facets = made_up(rows)
    found = specificity(table, facets).set_index("feature")
    assert found["specific"].to_dict() == {"yes": True, "little": False, "other": False, "noise": False}
    assert found.loc["other", "facet"] == "one", "raised by 36, the other by 35, and yet it is not the highest"
    assert (found.loc["yes", "coef"], found.loc["yes", "facet"], found.loc["yes", "times"]) == (1.0, "one", 5.0)
    assert pd.isna(found.loc["noise", "coef"])
    told = specificity(table, facets, own={"other": "one", "yes": "one", "little": "one"}).set_index("feature")
    assert not told.loc["other", "specific"], "its own facet is below another one"
    assert told.loc["yes", "specific"]


def test_a_facet_that_is_never_shown_without_steering_counts_as_the_least_score() -> None:
    table, facets = made_up([("a", 1.0, 5 * LEAST, 0.0, 90.0), ("b", 1.0, 5 * LEAST - 0.1, 0.0, 90.0)])
    facets.loc[facets["condition"] == "unsteered", "score"] = 0.0
    found = specificity(table, facets).set_index("feature")["specific"]
    assert found.to_dict() == {"a": True, "b": False}


def test_a_facet_of_its_own_that_nobody_showed_scores_0() -> None:
    table, facets = made_up([("a", 1.0, 40.0, 30.0, 90.0)])
    (row,) = specificity(table, facets, own={"a": "three"}).to_dict("records")
    assert (row["facet"], row["score"], row["unsteered"], row["runner_up"]) == ("three", 0.0, 0.0, 40.0)
    assert not row["specific"]
