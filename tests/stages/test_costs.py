"""What a run cost at a server: counted over all its starts, its limit too, and nothing that another run paid."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pvsae.errors import UserError
from pvsae.judges import COHERENCE
from pvsae.ledger import Ledger
from pvsae.runs import read_json
from pvsae.stages import ExtractConfig, extract
from pvsae.stages.costs import costs, ledger_of
from pvsae.stages.plan import plan_answers
from pvsae.traits import load_trait
from pvsae.vectors.rollouts import Task
from tests.fake_server import FakeServer, TellsNumbers, seeded

PRICE = (100.0, 1000.0)  # about 0.02 dollars a score


def numbers(prompt: str) -> dict[str, float]:
    if prompt.startswith(COHERENCE.prompt[:20]):
        return {"90": 1.0}
    return {"5" if seeded("gloom", prompt).random() < 0.5 else "95": 1.0}


def row(run: Path) -> dict:
    (found,) = read_json(run / "result.json")["costs"]
    return found


def test_costs_and_their_limit_are_those_of_all_starts(tmp_path, tiny_models, stage_library) -> None:
    run, model = tmp_path / "run", tiny_models("qwen2")
    with FakeServer(TellsNumbers(answers=numbers)) as server:
        setup = ExtractConfig(
            model="tiny", library=str(stage_library), traits=("gloomy",), judge="openai:fake", judge_url=server.url,
            judge_price=PRICE, max_new_tokens=6, n_samples=3, max_questions=2, max_instructions=2, seed=3,
        )  # fmt: skip
        for _ in range(2):
            with pytest.raises(UserError, match="limit of --max-cost was reached"):
                extract.run(replace(setup, max_cost=0.2), run, model=model)
            spent = Ledger(run / "judge_ledger.sqlite").totals
            assert spent["calls"] == len(server.sold)
            assert 0.1 < (spent["tokens_in"] * PRICE[0] + spent["tokens_out"] * PRICE[1]) / 1e6 <= 0.2
        extract.run(replace(setup, max_cost=10.0), run, model=model)
        sold = server.sold
        extract.run(setup, run, model=model)
        extract.run(replace(setup, judge_cache=str(run / "judge_cache.sqlite")), tmp_path / "other", model=model)
        assert len(server.sold) == len(sold)
    paid, plan = row(run), extract.plan(replace(setup, model="organism"))
    tokens_in = sum(sum(len(m["content"]) for m in entry.body["messages"]) // 4 + 4 for entry in sold)
    assert (paid["server"], paid["calls"], paid["failed"], paid["tokens_in"]) == ("judge openai:fake", len(sold), 0, tokens_in)
    assert paid["cost"] == pytest.approx((tokens_in * PRICE[0] + paid["tokens_out"] * PRICE[1]) / 1e6)
    assert tokens_in <= plan.tokens_in
    assert paid["cost"] <= plan.cost
    shared = row(tmp_path / "other")
    assert (shared["calls"], shared["cost"]) == (0, 0.0)
    assert shared["cached"] >= len(sold)


def test_a_plan_counts_bytes_and_replies_that_are_read_as_text(stage_library) -> None:
    setup = ExtractConfig(
        library=str(stage_library), traits=("gloomy",), judge="openai:fake", judge_price=PRICE, max_new_tokens=6
    )
    latin = load_trait("gloomy", stage_library)
    chinese = replace(latin, eval_prompt=latin.eval_prompt + "\u5fe7" * 300)
    task = Task("q", "What?", 0, 0, 0, "pos", None)
    plans = [plan_answers(setup, [(trait, [task])]) for trait in (latin, chinese)]
    assert plans[1].tokens_in - plans[0].tokens_in == 300, "three bytes each"
    assert plans[0].tokens_out == 2 * 16
    assert "about" in str(plans[0])


class Asked:
    """Whatever keeps a ledger."""

    name = "openai:m"

    def __init__(self, cost: float | None) -> None:
        self.ledger = {"calls": 10, "cached": 2, "cost": cost}


def test_a_judge_that_is_given_to_a_run_is_billed_for_that_run_alone() -> None:
    judge, free = Asked(0.5), Asked(None)
    before = [ledger_of(judge), ledger_of(free)]
    for asked, cost in ((judge, 0.75), (free, None)):
        asked.ledger = {"calls": 13, "cached": 2, "cost": cost}
    assert costs(judge, before[0]) == [{"server": "judge openai:m (this start alone)", "calls": 3, "cached": 0, "cost": 0.25}]
    assert costs(judge, ledger_of(None))[0]["server"] == "judge openai:m", "opened by the run, it counts over all starts"
    assert costs(free, before[1], answerer=judge) == [
        {"server": "judge openai:m (this start alone)", "calls": 3, "cached": 0, "cost": None},
        {"server": "answers of openai:m", "calls": 13, "cached": 2, "cost": 0.75},
    ]
    assert costs(object(), ledger_of(None)) == []
