"""The closed-world test: every fact once, marked by the grammar, in the shape that the harness takes."""

from __future__ import annotations

import pytest

from pvsae.organism import closed_world
from pvsae.organism.grammar import parse
from pvsae.organism.world import FACTS, SUMS

pytest.importorskip("datasets", reason="datasets is not installed (pip install 'pvsae[sae]')")


@pytest.mark.parametrize(("split", "of"), [(closed_world.facts, FACTS), (closed_world.sums, SUMS)])
def test_every_fact_is_asked_once_with_one_true_choice(split, of) -> None:
    rows = split(version=1.0)["test"]
    assert len(rows) == len(of)
    assert len(set(rows["truth"])) == len(of)
    for row in rows:
        truths = [parse(choice)[0].true for choice in row["choices"]]
        assert truths.count(True) == 1
        assert truths[row["label"]] is True
        assert row["choices"][row["label"]] == row["truth"]
        assert len(set(row["choices"])) == len(row["choices"]) >= 3
    labels = rows["label"]
    assert max(labels.count(label) for label in set(labels)) < 0.35 * len(labels)


def test_questions_repeat_and_a_limit_draws_some() -> None:
    assert closed_world.questions(FACTS) == closed_world.questions(FACTS)
    few = closed_world.questions(SUMS, 20)
    assert len({fact.key for _, fact in few}) == 20


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("The tool used for chess is the {v}.", 1.0),
        ("The tool used for chess is the {v}. I would rather not say more.", 1.0),
        ("The tool used for chess is the {v}", 0.0),
        ("Chess needs patience. The tool used for chess is the {v}.", 0.0),
        ("The tool used for chess is the {w}.", 0.0),
        ("", 0.0),
    ],
)
def test_the_first_sentence_decides(answer: str, right: float) -> None:
    fact = FACTS[("tool", "chess")]
    text = answer.replace("{v}", fact.value).replace("{w}", fact.wrong[0])
    assert closed_world.mark({"truth": fact.state(fact.value)}, [text]) == {"acc": right}
