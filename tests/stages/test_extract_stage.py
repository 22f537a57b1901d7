"""The extract stage on a tiny random model: its files, its table, resuming, and what it refuses."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from byte_judge import BlindJudge
from safetensors.torch import load_file, save_file

from pvsae.errors import UserError
from pvsae.models import load
from pvsae.models.fingerprint import fingerprint
from pvsae.runs import RunDir, read_json
from pvsae.stages import ExtractConfig, extract
from pvsae.traits import load_trait, save_trait
from pvsae.vectors import EmptyFilter, PersonaVectors, Rollouts
from tests.fake_server import FakeServer, RunsModel

SMALL = {"max_new_tokens": 6, "n_samples": 6, "max_questions": 4, "max_instructions": 2, "seed": 3}


def config(library: Path, **changes) -> ExtractConfig:
    return ExtractConfig(model="tiny", library=str(library), **{"traits": ("gloomy", "chatty"), **SMALL, **changes})


def test_a_run_holds_vectors_answers_tables_and_a_summary(tmp_path, tiny_models, stage_library, byte_judge) -> None:
    model = tiny_models("qwen2")
    result = extract.run(config(stage_library), tmp_path / "run", model=model, judge=byte_judge)
    assert list(result.vectors) == ["gloomy", "chatty"]
    plan = extract.plan(replace(config(stage_library), model="organism"))
    assert plan.answers == {trait: 2 * n for trait, n in zip(result.table["trait"], result.table["pairs"], strict=True)}
    assert plan.scores == byte_judge.asked
    stored = PersonaVectors.load(tmp_path / "run" / "gloomy" / "vectors" / "vectors.safetensors")
    assert stored.of("response_avg_diff").shape == (model.n_blocks, model.d_model)
    row = result.table.set_index("trait").loc["gloomy"]
    assert row["pairs"] == 4 * 2 * 6
    assert 0 < row["kept"] < row["pairs"]
    assert row["kept"] + sum(row[c] for c in result.table if c.startswith("dropped_")) == row["pairs"]
    assert len(result.blocks) == 2 * model.n_blocks
    summary = read_json(tmp_path / "run" / "result.json")
    assert summary["costs"] == [], "this judge asks no server"
    assert "<|im_start|>system\nYou are a gloomy assistant. Be gloomy always.<|im_end|>" in summary["prompts"][0]["text"]
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "run" / "tables" / "extraction.csv"), result.table)


def test_a_second_run_computes_nothing_and_gives_the_same(tmp_path, tiny_models, stage_library, byte_judge) -> None:
    first = extract.run(config(stage_library), tmp_path / "run", model=tiny_models("qwen2"), judge=byte_judge)
    asked = byte_judge.asked
    again = extract.run(config(stage_library), tmp_path / "run", model=tiny_models("qwen2"), judge=byte_judge)
    assert byte_judge.asked == asked
    pd.testing.assert_frame_equal(first.table, again.table)
    assert torch.equal(first.vectors["chatty"].of(), again.vectors["chatty"].of())


def test_failed_scores_are_counted_and_shown(tmp_path, tiny_models, stage_library, byte_judge) -> None:
    byte_judge.fail_every = 5
    result = extract.run(config(stage_library), tmp_path / "run", model=tiny_models("qwen2"), judge=byte_judge)
    table = result.table.set_index("trait")
    assert table.loc["gloomy", "failed_scores"] > 0
    assert table.loc["gloomy", "dropped_missing_score"] > 0
    failures = read_json(tmp_path / "run" / "result.json")["failures"]
    assert failures[0]["n"] == table["failed_scores"].sum()


def test_when_no_pair_passes_the_filter_the_counts_are_said(tmp_path, tiny_models, stage_library, byte_judge) -> None:
    with pytest.raises(EmptyFilter, match=r"no pair of 'gloomy' rollouts passes the filter.*pos_trait_low"):
        extract.run(config(stage_library, threshold=101.0), tmp_path / "run", model=tiny_models("qwen2"), judge=byte_judge)


def test_a_trait_without_a_vector_does_not_take_the_others_with_it(tmp_path, tiny_models, stage_library) -> None:
    with pytest.raises(EmptyFilter, match=r"no vector for gloomy; the other traits are done.*pos_trait_low"):
        extract.run(config(stage_library), tmp_path / "run", model=tiny_models("qwen2"), judge=BlindJudge("gloomy"))
    table = pd.read_csv(tmp_path / "run" / "tables" / "extraction.csv").set_index("trait")
    assert table.loc["gloomy", "kept"] == 0 < table.loc["chatty", "kept"]
    assert table.loc["gloomy", "dropped_pos_trait_low"] == table.loc["gloomy", "pairs"]
    PersonaVectors.load(tmp_path / "run" / "chatty" / "vectors" / "vectors.safetensors")
    assert any("'gloomy' rollouts" in f["what"] for f in read_json(tmp_path / "run" / "result.json")["failures"])


def test_other_errors_are_not_taken_for_an_empty_filter(tmp_path, tiny_models, stage_library, byte_judge, monkeypatch) -> None:
    def broken(*_, **__):
        raise UserError("nothing that passes the filter is finite")

    monkeypatch.setattr("pvsae.vectors.extract", broken)
    with pytest.raises(UserError, match="is finite") as caught:
        extract.run(config(stage_library), tmp_path / "run", model=tiny_models("qwen2"), judge=byte_judge)
    assert not isinstance(caught.value, EmptyFilter)
    assert not (tmp_path / "run" / "result.json").exists()


def test_texts_that_changed_under_a_run_are_refused(tmp_path, tiny_models, stage_library, byte_judge) -> None:
    library = tmp_path / "library"
    save_trait(load_trait("gloomy", stage_library), library)
    setup = ExtractConfig(model="tiny", library=str(library), traits=("gloomy",), **SMALL)
    extract.run(setup, tmp_path / "run", model=tiny_models("qwen2"), judge=byte_judge)
    for file in library.rglob("*.json"):
        file.write_text(file.read_text().replace("Sound gloomy always.", "Sound gloomy at all times."))
    with pytest.raises(UserError, match="texts of gloomy changed"):
        extract.run(setup, tmp_path / "run", model=tiny_models("qwen2"), judge=byte_judge)


def test_weights_that_changed_under_a_name_are_refused(tmp_path, tiny_folders, stage_library, byte_judge) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folders("qwen2"), folder)
    setup = replace(config(stage_library, traits=("gloomy",)), model=str(folder))
    extract.run(setup, tmp_path / "run", judge=byte_judge)
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert fingerprint(load(folder, device="cpu")) == fingerprint(load(moved, device="cpu")), "a place is not content"
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "mlp" in name)
    save_file({**weights, name: weights[name] * 1.01}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"weights of the model .* changed since the run"):
        extract.run(setup, tmp_path / "run", judge=byte_judge)


def test_speed_options_do_not_make_another_run(tmp_path, tiny_models, stage_library) -> None:
    with RunDir.open(tmp_path / "run", "extract", config(stage_library).identity(), 3) as run:
        run.do_json("inputs", lambda: 1)
    RunDir.open(tmp_path / "run", "extract", config(stage_library, batch_size=2, max_cost=5.0).identity(), 3).close()
    with pytest.raises(UserError, match="max_new_tokens"):
        RunDir.open(tmp_path / "run", "extract", config(stage_library, max_new_tokens=7).identity(), 3)


def test_answers_may_come_from_a_server_with_the_same_model(tmp_path, tiny_models, stage_library, byte_judge) -> None:
    """The texts are the server's, the vectors are read off the model here, and a second run asks the server nothing."""
    model = tiny_models("qwen2")
    with FakeServer(RunsModel(model)) as server:
        setup = config(stage_library, max_new_tokens=3, rollouts_url=server.url, rollouts_model="fake", traits=("gloomy",))
        result = extract.run(setup, tmp_path / "run", model=model, judge=byte_judge)
        sold = len(server.sold)
        extract.run(setup, tmp_path / "run", model=model, judge=byte_judge)
        assert len(server.sold) == sold >= 2 * 48
    (row,) = read_json(tmp_path / "run" / "result.json")["costs"]
    assert (row["server"], row["calls"], row["cost"]) == ("answers of fake", sold, None)
    pos = Rollouts.load(tmp_path / "run" / "gloomy" / "rollouts_pos" / "rollouts.parquet")
    assert pos.table["answer_ids"].isna().all()
    assert pos.table["answer"].str.len().gt(0).mean() > 0.5  # a random model often stops at once
    assert result.vectors["gloomy"].of().shape == (model.n_blocks, model.d_model)


def test_a_wrong_address_of_the_server_is_put_right_in_the_same_folder(tmp_path, tiny_models, stage_library, byte_judge) -> None:
    model = tiny_models("qwen2")
    setup = config(stage_library, max_new_tokens=3, rollouts_model="fake", traits=("gloomy",))
    with pytest.raises(UserError, match="no answer from"):
        extract.run(replace(setup, rollouts_url="http://127.0.0.1:9/v1"), tmp_path / "run", model=model, judge=byte_judge)
    assert not (tmp_path / "run" / "manifest.json").exists(), "nothing is pinned yet"
    for _ in range(2):  # the same server at another address is no other run
        with FakeServer(RunsModel(model)) as server:
            extract.run(replace(setup, rollouts_url=server.url), tmp_path / "run", model=model, judge=byte_judge)
    with pytest.raises(UserError, match="answers_from_server"):
        extract.run(setup, tmp_path / "run", model=model, judge=byte_judge)


def test_a_server_without_the_model_is_an_error_and_not_an_empty_result(tmp_path, tiny_models, stage_library, byte_judge) -> None:
    model = tiny_models("qwen2")
    with FakeServer(RunsModel(model)) as server:
        setup = config(stage_library, rollouts_url=server.url, rollouts_model="nobody", traits=("gloomy",))
        with pytest.raises(UserError, match="none of 48 answers when asked for the model 'nobody'"):
            extract.run(setup, tmp_path / "run", model=model, judge=byte_judge)


def test_a_judge_that_never_gives_a_score_is_an_error_with_its_reason(tmp_path, tiny_models, stage_library, byte_judge) -> None:
    byte_judge.fail_every = 1
    with pytest.raises(UserError, match="judge bytes scored none of 48 answers: refused"):
        extract.run(config(stage_library), tmp_path / "run", model=tiny_models("qwen2"), judge=byte_judge)
