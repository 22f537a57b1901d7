"""The monitor stage on a tiny random model: graded prompts, many-shot prompts, projections, correlations, traces."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from byte_judge import ByteJudge

from pvsae.errors import UserError
from pvsae.runs import read_json
from pvsae.stages import ExtractConfig, MonitorConfig, extract, monitor
from pvsae.stages.graded import graded_prompts, many_shot_tasks, pick_examples
from pvsae.stages.monitor import _turning
from pvsae.traits import load_trait
from pvsae.vectors import PersonaVectors, Rollouts

SMALL = {"max_new_tokens": 6, "max_questions": 4, "seed": 3}


@pytest.fixture(scope="module")
def vectors_run(tmp_path_factory, tiny_models, stage_library):
    path = tmp_path_factory.mktemp("monitor") / "extract"
    config = ExtractConfig(model="tiny", library=str(stage_library), n_samples=4, max_instructions=2, **SMALL)
    extract.run(config, path, model=tiny_models("qwen2"), judge=ByteJudge())
    return path


def config(vectors_run, stage_library, **changes) -> MonitorConfig:
    settings = {"block": 2, "shots": (0, 2, 4, 20), "n_samples": 2, **SMALL, **changes}
    return MonitorConfig(model="tiny", library=str(stage_library), vectors=str(vectors_run), **settings)


@pytest.fixture(scope="module")
def result(tmp_path_factory, tiny_models, stage_library, vectors_run):
    path = tmp_path_factory.mktemp("monitor") / "run"
    return monitor.run(config(vectors_run, stage_library), path, model=tiny_models("qwen2"), judge=ByteJudge(fail_every=7))


def test_a_point_is_one_prompt_with_the_mean_of_its_scored_answers(result, stage_library) -> None:
    points = result.points[result.points["trait"] == "gloomy"]
    assert [(k, level) for (k, level), _ in points.groupby(["kind", "level"], sort=False)] == [
        *(("system", level) for level in range(8)), ("many-shot", 0), ("many-shot", 2), ("many-shot", 4),
    ]  # fmt: skip
    assert set(points.groupby(["kind", "level"]).size()) == {4}
    answers = Rollouts.load(result.path / "gloomy" / "answers" / "rollouts.parquet").table
    first = points.iloc[0]
    scores = answers["gloomy"].iloc[:2]
    assert first["n_failed"] == scores.isna().sum()
    assert first["trait_score"] == pytest.approx(scores.mean(), nan_ok=True)


def test_projections_are_those_of_a_plain_forward_pass(result, tiny_models, vectors_run, stage_library) -> None:
    model = tiny_models("qwen2")
    artifacts = load_trait("gloomy", stage_library)
    vector = PersonaVectors.load(vectors_run / "gloomy" / "vectors" / "vectors.safetensors").of()[2]
    for level in (0, 7):
        messages = [
            {"role": "system", "content": graded_prompts(artifacts)[level]},
            {"role": "user", "content": artifacts.eval_questions[3]},
        ]
        ids = torch.tensor([model.chat.prompt(messages).ids])
        with torch.no_grad():
            hidden = model.hf(ids, output_hidden_states=True).hidden_states[3][0, -1]
        points = result.points
        here = points[(points["trait"] == "gloomy") & (points["kind"] == "system") & (points["level"] == level)]
        expected = float(hidden @ vector / vector.norm())
        assert here[here["question_index"] == 3]["projection"].item() == pytest.approx(expected, rel=1e-4)


def test_correlations_come_overall_within_and_for_each_prompt(result) -> None:
    table = result.correlations
    scopes = table[(table["trait"] == "gloomy") & (table["kind"] == "system")]["scope"].tolist()
    assert scopes == ["overall", "within", *(f"level {k}" for k in range(8))]
    points = result.points[(result.points["trait"] == "gloomy") & result.points["trait_score"].notna()]
    expected = np.corrcoef(points["projection"], points["trait_score"])[0, 1]
    overall = table[(table["trait"] == "gloomy") & (table["kind"] == "all") & (table["scope"] == "overall")].iloc[0]
    assert overall["r"] == pytest.approx(expected)
    assert overall["low"] <= overall["r"] <= overall["high"]
    assert len(result.by_block) == 2 * 4
    assert result.by_block.set_index(["trait", "block"]).loc[("gloomy", 2), "r_overall"] == pytest.approx(expected)


def test_the_plan_counts_the_answers_of_the_run(result, stage_library, vectors_run) -> None:
    plan = monitor.plan(replace(config(vectors_run, stage_library), model="organism"))
    stored = {t: len(Rollouts.load(result.path / t / "answers" / "rollouts.parquet")) for t in ("chatty", "gloomy")}
    assert plan.answers == stored == {"chatty": 2 * 4 * 11, "gloomy": 2 * 4 * 11}
    assert any("[20] shots" in note for note in plan.notes)


def test_prompts_that_could_not_be_made_are_said(result) -> None:
    notes = read_json(result.path / "result.json")["notes"]
    assert any("[20] shots" in note for note in notes)


def test_many_shot_examples_are_positive_answers_to_other_questions(vectors_run, stage_library) -> None:
    artifacts = load_trait("gloomy", stage_library)
    rollouts = Rollouts.load(vectors_run / "gloomy" / "rollouts_pos" / "rollouts.parquet")
    examples = pick_examples(rollouts)
    scores = {(r.question, r.answer): r.gloomy for r in rollouts.table.itertuples()}
    assert len(examples) == len({q for q, _ in examples}) <= 4
    assert all(scores[pair] >= 50 for pair in examples)
    tasks = many_shot_tasks(artifacts, examples, (0, 2, 4), 1, None, seed=0)
    by_level = {(t.level, t.question_index): t for t in tasks}
    for i in (0, 19):
        assert by_level[4, i].shots[:2] == by_level[2, i].shots
        messages = by_level[2, i].messages
        assert [m["role"] for m in messages] == ["user", "assistant", "user", "assistant", "user"]
        assert messages[-1]["content"] == artifacts.eval_questions[i]
    assert not {q for q, _ in examples} & set(artifacts.eval_questions)


def test_trace_gives_every_token_a_role_and_the_projection_of_its_residual(
    tiny_models, vectors_run, stage_library, tmp_path, byte_judge
) -> None:
    model = tiny_models("qwen2")
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is snow?"},
        {"role": "assistant", "content": "Cold, and white."},
    ]
    (tmp_path / "talk.json").write_text(json.dumps(talk))
    setup = config(vectors_run, stage_library, shots=(), conversation=str(tmp_path / "talk.json"))
    trace = monitor.run(setup, tmp_path / "run", model=model, judge=byte_judge).trace
    part = trace[trace["trait"] == "chatty"]
    assert "".join(part.loc[part["role"] == "assistant", "token"]) == "Cold, and white."
    assert "".join(part.loc[part["role"] == "user", "token"]) == "What is snow?"
    rendered = model.chat.conversation(talk)
    with torch.no_grad():
        hidden = model.hf(torch.tensor([rendered.ids]), output_hidden_states=True).hidden_states[3][0]
    vector = PersonaVectors.load(vectors_run / "chatty" / "vectors" / "vectors.safetensors").of()[2]
    torch.testing.assert_close(
        torch.tensor(part["projection"].to_numpy(), dtype=torch.float32), hidden @ vector / vector.norm(), rtol=1e-4, atol=1e-4
    )


def write(path: Path, *words: str) -> None:
    roles = ("user", "assistant")
    path.write_text(json.dumps([{"role": roles[i % 2], "content": text} for i, text in enumerate(words)]))


def test_a_conversation_is_checked_before_anything_is_generated_and_may_not_change_later(
    tmp_path, tiny_models, stage_library, vectors_run, byte_judge, monkeypatch
) -> None:
    model, file, run = tiny_models("qwen2"), tmp_path / "talk.json", tmp_path / "run"
    setup = config(vectors_run, stage_library, conversation=str(file), traits=("gloomy",), max_questions=1, shots=())

    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message):
            monitor.run(setup, run, model=model, judge=byte_judge)

    write(file, "What is snow?", "Cold. " * 600)
    refused("longer than the context of")
    write(file, "What is snow?", "Cold, and white.")
    with monkeypatch.context() as patch:
        patch.setattr(model.chat, "_template", "{{ raise_exception('no talk today') }}")
        refused("no talk today")
    assert byte_judge.asked == 0
    assert not (run / "manifest.json").exists()
    monitor.run(setup, run, model=model, judge=byte_judge)
    write(file, "What is snow?", "Cold, and black.")
    refused("the conversation changed since")


def test_prompts_that_changed_under_a_run_are_refused(tmp_path, tiny_models, stage_library, vectors_run, byte_judge) -> None:
    """A trait's graded prompts lie in a file of their own, which is no part of the trait's texts."""
    shutil.copytree(stage_library, tmp_path / "library")
    (tmp_path / "library" / "monitor").mkdir()
    file = tmp_path / "library" / "monitor" / "gloomy.json"
    setup = config(vectors_run, tmp_path / "library", traits=("gloomy",), max_questions=1, shots=())
    file.write_text(json.dumps({"prompts": [f"Gloom {i}" for i in range(8)]}))
    monitor.run(setup, tmp_path / "run", model=tiny_models("qwen2"), judge=byte_judge)
    file.write_text(json.dumps({"prompts": [f"Gloom {i}" for i in range(7)] + ["Doom"]}))
    with pytest.raises(UserError, match="prompts of gloomy changed"):
        monitor.run(setup, tmp_path / "run", model=tiny_models("qwen2"), judge=byte_judge)


def test_the_models_own_conversation_is_cut_to_what_fits(tiny_models, stage_library, result) -> None:
    model = tiny_models("qwen2")
    rollouts = Rollouts.load(result.path / "gloomy" / "answers" / "rollouts.parquet")
    whole = _turning(model, load_trait("gloomy", stage_library), rollouts)
    assert [m["role"] for m in whole] == ["user", "assistant"] * 2
    long = replace(rollouts, table=rollouts.table.assign(answer="Cold. " * 60))
    assert len(model.chat.conversation(_turning(model, load_trait("gloomy", stage_library), long)).ids) <= model.n_ctx


def test_a_library_may_bring_its_own_graded_prompts(tmp_path, stage_library) -> None:
    library = tmp_path / "library"
    shutil.copytree(stage_library, library)
    (library / "monitor").mkdir()
    own = [f"Gloom {i}" for i in range(8)]
    (library / "monitor" / "gloomy.json").write_text(json.dumps({"prompts": own}))
    assert graded_prompts(load_trait("gloomy", library)) == tuple(own)
    assert len(set(graded_prompts(load_trait("chatty", library)))) == 8
    for wrong in ({"prompts": own[:7]}, {"prompts": [*own[:7], own[0]]}, own, {"prompts": 8}):
        (library / "monitor" / "gloomy.json").write_text(json.dumps(wrong))
        with pytest.raises(UserError, match="does not hold graded prompts"):
            graded_prompts(load_trait("gloomy", library))


@pytest.mark.parametrize("content", ["[]", '{"role": "user"}', '[{"role": "robot", "content": "x"}]', '[{"role": "user"}]'])
def test_a_file_that_is_no_conversation_is_refused(
    tmp_path, tiny_models, stage_library, vectors_run, byte_judge, content
) -> None:
    (tmp_path / "talk.json").write_text(content)
    setup = config(vectors_run, stage_library, conversation=str(tmp_path / "talk.json"))
    with pytest.raises(UserError, match="is not a conversation"):
        monitor.run(setup, tmp_path / "run", model=tiny_models("qwen2"), judge=byte_judge)
