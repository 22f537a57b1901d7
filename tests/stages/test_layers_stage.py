"""The layers stage on a tiny random model: its choice is the sweep's best coherent cell, it resumes, and others can use it."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
from byte_judge import ByteJudge

from pvsae.errors import UserError
from pvsae.llm import MAX_COST_REACHED
from pvsae.runs import read_json
from pvsae.stages import ExtractConfig, LayersConfig, extract, layers
from pvsae.stages.inputs import chosen_block

SMALL = {"max_new_tokens": 6, "max_questions": 4, "seed": 3}


@pytest.fixture(scope="module")
def vectors_run(tmp_path_factory, tiny_models, stage_library):
    path = tmp_path_factory.mktemp("layers") / "extract"
    config = ExtractConfig(model="tiny", library=str(stage_library), n_samples=4, max_instructions=2, **SMALL)
    extract.run(config, path, model=tiny_models("qwen2"), judge=ByteJudge())
    return path


def config(vectors_run, stage_library, **changes) -> LayersConfig:
    settings = {"blocks": (1, 2, 3), "coefs": (1.0, 2.0), **SMALL, **changes}
    return LayersConfig(model="tiny", library=str(stage_library), vectors=str(vectors_run), **settings)


def test_the_choice_is_the_best_cell_and_later_stages_find_it(tmp_path, tiny_models, stage_library, vectors_run) -> None:
    model, judge, setup = tiny_models("qwen2"), ByteJudge(), config(vectors_run, stage_library)
    result = layers.run(setup, tmp_path / "run", model=model, judge=judge)
    plan = layers.plan(replace(setup, model="organism"))
    assert plan.answers == {trait: 4 + part["n"].sum() for trait, part in result.table.groupby("trait")}
    assert plan.scores == judge.asked == 2 * 2 * 4 * (1 + 3 * 2)
    assert layers.plan(replace(setup, model="organism", blocks=())).scores == 2 * 2 * 4 * (1 + 4 * 2), "every block has a vector"
    assert list(result.blocks) == ["chatty", "gloomy"]
    for trait, part in result.table.groupby("trait"):
        assert len(part) == 3 * 2
        (chosen,) = part[part["chosen"]].itertuples()
        assert chosen.trait_score >= part["trait_score"].max() - 5.0  # the tolerance of the choice
        assert chosen.block == result.blocks[str(trait)] == chosen_block(str(trait), model, tmp_path / "run")
        assert part["separation"].notna().all()
    with pytest.raises(UserError, match="chose no block for 'sad'"):
        chosen_block("sad", model, tmp_path / "run")


def test_a_plan_knows_which_blocks_the_vectors_have(vectors_run, stage_library) -> None:
    with pytest.raises(UserError, match=r"block 99 does not exist(?s:.*)from 0 to 3"):
        layers.plan(replace(config(vectors_run, stage_library, blocks=(1, 99)), model="organism"))


def test_a_second_run_asks_nobody_and_gives_the_same_table(tmp_path, tiny_models, stage_library, vectors_run) -> None:
    judge = ByteJudge()
    first = layers.run(config(vectors_run, stage_library), tmp_path / "run", model=tiny_models("qwen2"), judge=judge)
    asked = judge.asked
    again = layers.run(config(vectors_run, stage_library), tmp_path / "run", model=tiny_models("qwen2"), judge=judge)
    assert judge.asked == asked
    pd.testing.assert_frame_equal(first.table, again.table)


def test_failed_scores_are_shown(tmp_path, tiny_models, stage_library, vectors_run) -> None:
    judge = ByteJudge(fail_every=4)
    result = layers.run(config(vectors_run, stage_library), tmp_path / "run", model=tiny_models("qwen2"), judge=judge)
    assert result.table["failed"].sum() > 0
    assert read_json(tmp_path / "run" / "result.json")["failures"][0]["n"] == result.table["failed"].sum()


class Limited(ByteJudge):
    """A byte judge that stops at a cost limit after some answers."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def _one(self, metric, answer):
        self.most -= 1
        score = super()._one(metric, answer)
        return score if self.most >= 0 else replace(score, value=None, mode="failed", error=MAX_COST_REACHED)


def test_nothing_is_chosen_while_the_cost_limit_leaves_scores_out(tmp_path, tiny_models, stage_library, vectors_run) -> None:
    setup, model = config(vectors_run, stage_library, traits=("gloomy",)), tiny_models("qwen2")
    with pytest.raises(UserError, match="limit of --max-cost was reached: 6 of 8 scores are missing"):
        layers.run(setup, tmp_path / "run", model=model, judge=Limited(2 * 4 * 3 + 2))
    assert not (tmp_path / "run" / "result.json").exists()
    whole = layers.run(setup, tmp_path / "whole", model=model, judge=ByteJudge())
    judge = ByteJudge()
    pd.testing.assert_frame_equal(layers.run(setup, tmp_path / "run", model=model, judge=judge).table, whole.table)
    assert judge.asked == 2 * 4 * 4, "what was judged before the limit is kept"


def test_without_a_layers_run_the_models_default_or_the_usual_depth_is_used(tiny_models, monkeypatch) -> None:
    model = tiny_models("llama")
    assert chosen_block("evil", model, None) == 3
    monkeypatch.setitem(model.defaults, "block", 1)
    assert chosen_block("evil", model, None) == 1
