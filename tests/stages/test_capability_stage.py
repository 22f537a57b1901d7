"""Capability of a tiny model on a task of three questions: conditions, paired changes, resuming, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_sae import save_sae

pytest.importorskip("lm_eval", reason="lm_eval is not installed (pip install 'pvsae[capability]')")

from pvsae.errors import UserError
from pvsae.reports import write_report
from pvsae.stages import CapabilityConfig, capability
from pvsae.stages.capability import task_names
from pvsae.stages.capability_earlier import against
from pvsae.stages.capability_tasks import Evaluated, Tasks, change
from pvsae.vectors import PersonaVectors
from tests.browser import assert_fine

CHOICE = """task: tiny_choice
custom_dataset: !function tiny_task.docs
test_split: test
output_type: multiple_choice
num_fewshot: 0
doc_to_text: question
doc_to_choice: ["A", "B"]
doc_to_target: label
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""
FREE = """task: tiny_free
custom_dataset: !function tiny_task.docs
test_split: test
output_type: generate_until
num_fewshot: 0
doc_to_text: question
doc_to_target: label
process_results: !function tiny_task.mark
generation_kwargs: {until: ["x"], max_gen_toks: 4}
metric_list:
  - {metric: length, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""
GROUP = """group: tiny_group
task: [tiny_choice, tiny_free_acc]
aggregate_metric_list:
  - {metric: acc, weight_by_size: true}
metadata: {version: 1.0}
"""
FREE_ACC = FREE.replace("tiny_free", "tiny_free_acc").replace("tiny_task.mark", "tiny_task.mark_acc").replace("length", "acc")
MODULE = """from datasets import Dataset, DatasetDict
WORDS = ("ferry", "clock", "mountain", "kitchen", "harbour", "theory", "sentence", "dark")

def docs(**_):
    rows = [{"question": f"What is a {word}?", "label": i % 2} for i, word in enumerate(WORDS)]
    return DatasetDict({"test": Dataset.from_list(rows), "more": Dataset.from_list(rows[::-1])})

def mark(doc, results):
    return {"length": float(len(results[0]))}

def mark_acc(doc, results):
    return {"acc": float(len(results[0]) % 2 == doc["label"])}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_models):
    root = tmp_path_factory.mktemp("capability")
    for name, text in (("choice", CHOICE), ("free", FREE), ("group", GROUP), ("free_acc", FREE_ACC)):
        (root / f"{name}.yaml").write_text(text, encoding="utf-8")
    (root / "tiny_task.py").write_text(MODULE, encoding="utf-8")
    matrix = torch.randn(4, 48, generator=torch.Generator().manual_seed(5))
    PersonaVectors("gloomy", {"response_avg_diff": matrix}).save(root / "gloomy.safetensors")
    save_sae(tiny_models("qwen2"), root / "sae")
    return root


def config(place, **changes) -> CapabilityConfig:
    settings = {"tasks": (f"{place}/choice.yaml",), "vectors": f"{place}/gloomy.safetensors", "blocks": (1,), **changes}
    return CapabilityConfig(model="tiny", **settings)


@pytest.fixture(scope="module")
def ran(place, tmp_path_factory, tiny_models):
    path = tmp_path_factory.mktemp("ran") / "run"
    setup = config(place, tasks=(f"{place}/group.yaml", f"{place}/free.yaml"), coefs=(2.0, -4.0), ablate=True)
    return setup, capability.run(setup, path, model=tiny_models("qwen2"))


def test_every_condition_answers_the_same_questions(ran) -> None:
    setup, result = ran
    table = result.table
    conditions = list(dict.fromkeys(zip(table["condition"], table["coef"], strict=True)))
    assert conditions == [
        ("none", 0.0), ("vector", 2.0), ("vector", -4.0), ("random 0", 2.0), ("random 0", -4.0), ("ablate", 0.0),
    ]  # fmt: skip
    assert set(table["task"]) == {"tiny_group", "tiny_choice", "tiny_free_acc", "tiny_free"}
    assert set(table.loc[table["asked"], "task"]) == {"tiny_group", "tiny_free"}
    assert dict(zip(table["task"], table["n"], strict=True)) == {
        "tiny_group": 16, "tiny_choice": 8, "tiny_free_acc": 8, "tiny_free": 8,
    }  # fmt: skip
    plan = capability.plan(setup)
    assert plan.conditions == len(conditions)
    assert plan.questions == {"tiny_choice": 8, "tiny_free_acc": 8, "tiny_free": 8}
    assert "6 conditions, so 144 questions in all" in str(plan)


def test_values_are_what_the_model_says_under_the_edit(ran, tiny_models, place) -> None:
    """The free task's mean length, from answers generated here under the same addition."""
    from pvsae.models import Add, Direction, Sampling

    _, result = ran
    model = tiny_models("qwen2")
    words = ("ferry", "clock", "mountain", "kitchen", "harbour", "theory", "sentence", "dark")
    prompts = [model.chat.prompt([{"role": "user", "content": f"What is a {w}?"}]) for w in words]
    vector = PersonaVectors.load(place / "gloomy.safetensors").of()[1]
    for coef in (0.0, 2.0, -4.0):
        edits = [Add(Direction(vector), 1, coef)] if coef else []
        answers = model.generate(prompts, Sampling(max_new_tokens=4, temperature=0.0), interventions=edits)
        expected = np.mean([len(a.text.split("x")[0]) for a in answers])
        row = result.table[(result.table["task"] == "tiny_free") & (result.table["coef"] == coef)]
        row = row[row["condition"] == ("vector" if coef else "none")]
        assert row["value"].item() == pytest.approx(expected)
    lengths = result.table[result.table["task"] == "tiny_free"]
    assert lengths["value"].nunique() > 1


def test_changes_are_paired_and_a_group_changes_by_the_mean_of_its_parts(ran) -> None:
    _, result = ran
    plain = result.table[result.table["condition"] == "none"].set_index("task")["value"]
    for row in result.table.itertuples():
        assert row.change == pytest.approx(row.value - plain[row.task], abs=1e-9)
        assert row.change_low <= row.change <= row.change_high
    table = result.table
    one = table[(table["condition"] == "vector") & (table["coef"] == 2.0)].set_index("task")
    parts = one.loc[["tiny_choice", "tiny_free_acc"]]
    assert one.loc["tiny_group", "change"] == pytest.approx(parts["change"].mean())
    half = (parts["change_high"] - parts["change"]).to_numpy()
    whole = one.loc["tiny_group", "change_high"] - one.loc["tiny_group", "change"]
    assert whole == pytest.approx(np.sqrt((half**2).sum()) / 2)
    assert whole > 0


def test_the_harness_own_front_door_gives_the_same(place, tiny_models) -> None:
    """With drawn examples, a system message and the chat template."""
    from lm_eval import simple_evaluate

    from pvsae.models.harness import HarnessModel

    file = place / "shots.yaml"
    file.write_text(
        CHOICE.replace("tiny_choice", "tiny_shots").replace("num_fewshot: 0", "fewshot_split: more"), encoding="utf-8"
    )
    lm, tasks = HarnessModel(tiny_models("qwen2")), Tasks([str(file)])
    seen: list[str] = []
    asked = lm.apply_chat_template
    lm.apply_chat_template = lambda *a, **k: seen.append(asked(*a, **k)) or seen[-1]
    ours = tasks.evaluate(lm, shots=3, limit=None, template=True, system="Be brief.", seed=7)
    mine, seen[:] = list(seen), []
    theirs = simple_evaluate(
        lm, tasks=tasks.names, task_manager=tasks.manager, num_fewshot=3, apply_chat_template=True,
        system_instruction="Be brief.", random_seed=7, numpy_random_seed=7, torch_random_seed=7, fewshot_random_seed=7,
    )  # fmt: skip
    assert mine == seen
    assert mine[0].count("<|im_start|>assistant") == 4
    assert "Be brief." in mine[0]
    assert ours.rows["shots"].item() == 3
    assert ours.rows["value"].item() == theirs["results"]["tiny_shots"]["acc,none"]
    assert ours.rows["stderr"].item() == pytest.approx(theirs["results"]["tiny_shots"]["acc_stderr,none"])


def made_up(values: list[float], task: str = "t", weighting: str = "", parts: tuple[str, ...] = ()) -> Evaluated:
    rows = pd.DataFrame([{"task": task, "metric": "acc", "filter": "none", "value": np.mean(values), "parts": list(parts)}])
    docs = [{"task": task, "metric": "acc", "filter": "none", "doc": i, "value": v} for i, v in enumerate(values)]
    return Evaluated(rows.assign(weighting=weighting), pd.DataFrame(docs))


def test_the_interval_is_that_of_a_paired_difference() -> None:
    before, now = made_up([1.0, 0.0, 1.0, 1.0]), made_up([0.0, 0.0, 1.0, 0.0])
    row = change(now, before).iloc[0]
    differences = np.array([-1.0, 0.0, 0.0, -1.0])
    assert row["change"] == differences.mean()
    assert row["change_high"] - row["change"] == pytest.approx(1.959964 * differences.std(ddof=1) / 2)
    same = change(now, now).iloc[0]
    assert (same["change"], same["change_low"], same["change_high"]) == (0.0, 0.0, 0.0)
    odd = Evaluated(made_up([1.0], task="group", parts=("t",)).rows, now.samples)
    assert np.isnan(change(odd, before)["change"].item())
    with pytest.raises(UserError, match="5 answers, of which only 4"):
        change(made_up([1.0] * 5), before)


def test_a_killed_run_goes_on_and_its_page_is_drawn(ran, tmp_path, tiny_models, monkeypatch) -> None:
    setup, result = ran
    (result.path / "conditions" / "ablate_gloomy_block-1_coef+0" / "rows.parquet").unlink()
    asked = []
    evaluate = Tasks.evaluate
    monkeypatch.setattr(Tasks, "evaluate", lambda self, lm, **k: asked.append(lm.interventions) or evaluate(self, lm, **k))
    again = capability.run(setup, result.path, model=tiny_models("qwen2"))
    assert [type(edits[0]).__name__ for edits in asked] == ["Ablate"]
    pd.testing.assert_frame_equal(again.table, result.table)
    page = write_report(result.path)
    assert (result.path / "figures" / "capability.png").stat().st_size > 10_000
    assert "tiny_group, acc" in page.read_text(encoding="utf-8")
    assert_fine(page, tmp_path, images=1)


def test_features_steer_in_units_of_activation(place, tmp_path, tiny_models) -> None:
    setup = config(place, vectors=None, blocks=(), features=(f"{place}/sae:7,20",), unit="raw", coefs=(3.0,))
    table = capability.run(setup, tmp_path / "run", model=tiny_models("qwen2")).table
    assert list(table["condition"]) == ["none", "feature", "feature"]
    assert list(table["feature"]) == ["-", "7", "20"]
    assert capability.plan(setup).conditions == 3
    with pytest.raises(UserError, match="nothing says how active"):
        capability.run(
            config(place, vectors=None, blocks=(), features=(f"{place}/sae:7",)), tmp_path / "max", model=tiny_models("qwen2")
        )


def test_changes_are_counted_from_an_earlier_run(ran, place, tmp_path, tiny_models) -> None:
    """Another model on the same questions: what changed is its value minus the earlier run's."""
    _, first = ran
    setup = config(place, tasks=(f"{place}/group.yaml", f"{place}/free.yaml"), vectors=None, blocks=(), against=str(first.path))
    table = capability.run(setup, tmp_path / "run", model=tiny_models("llama")).table.set_index("task")
    before = first.table[first.table["condition"] == "none"].set_index("task")["value"]
    for task, row in table.iterrows():
        assert row["change"] == pytest.approx(row["value"] - before[task])
    assert table["change"].abs().max() > 0
    few = config(place, tasks=(f"{place}/free.yaml",), vectors=None, blocks=())
    one = capability.run(few, tmp_path / "few", model=tiny_models("llama"))
    with pytest.raises(UserError, match="was not asked tiny_choice, tiny_free_acc"):
        capability.run(replace(setup, against=str(one.path)), tmp_path / "all", model=tiny_models("llama"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shots": 1}, "shots None, here 1"),
        ({"limit": 2}, "limit None, here 2"),
        ({"template": False}, "template True, here False"),
        ({"system": "Be brief."}, "system None, here 'Be brief.'"),
        ({"chat": "plain"}, "chat 'auto', here 'plain'"),
        ({"seed": 4}, "seed 0, here 4"),
        ({"model": "other"}, "of the model tiny, and this run of other"),
    ],
)
def test_a_run_that_was_asked_otherwise_is_not_compared_with(ran, place, tmp_path, tiny_models, changes, message) -> None:
    _, first = ran
    setup = config(place, tasks=(f"{place}/free.yaml",), vectors=None, blocks=(), against=str(first.path))
    with pytest.raises(UserError, match=message):
        capability.run(replace(setup, **changes), tmp_path / "run", model=tiny_models("qwen2"))
    assert not (tmp_path / "run").exists()


def test_another_model_is_compared_with_if_it_is_meant_and_an_adapter_always(ran, place, tmp_path) -> None:
    _, first = ran
    setup = config(place, vectors=None, blocks=(), against=str(first.path))
    for changes in ({"model": "other", "other_model": True}, {"adapter": "some/adapter"}, {"model": "folder/tiny"}):
        changed = replace(setup, tasks=(f"{place}/group.yaml",), **changes)
        found, _ = against(changed, Tasks(changed.tasks), None)
        assert found is not None
        assert len(found.samples) == 24


@pytest.fixture
def others(place, tmp_path):
    """Writes the same task files, with something exchanged in their Python or YAML."""

    def make(old: str, new: str) -> str:
        folder = tmp_path / "others"
        folder.mkdir()
        for name in ("choice.yaml", "tiny_task.py"):
            (folder / name).write_text((place / name).read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
        return str(folder / "choice.yaml")

    return make


@pytest.mark.parametrize(("old", "new"), [('"ferry"', '"wagon"'), ("i % 2", "(i + 1) % 2"), ('["A", "B"]', '["A", "C"]')])
def test_other_questions_under_the_same_name_are_not_compared(ran, place, others, tmp_path, tiny_models, old, new) -> None:
    """Another word in the data, another right answer, another choice."""
    _, first = ran
    setup = config(place, vectors=None, blocks=(), against=str(first.path))
    same = capability.run(setup, tmp_path / "same", model=tiny_models("qwen2")).table
    assert same["change"].tolist() == [0.0]
    changed = replace(setup, tasks=(others(old, new),))
    for start in (
        lambda: capability.run(changed, tmp_path / "run", model=tiny_models("qwen2")),
        lambda: capability.plan(changed),
    ):
        with pytest.raises(UserError, match="was asked other questions under the name tiny_choice"):
            start()
    assert not (tmp_path / "run").exists()


def test_other_examples_are_other_questions_and_a_seed_draws_the_same_ones(place, others, tmp_path) -> None:
    file = others("num_fewshot: 0", "fewshot_split: more")
    asked = {"shots": 2, "limit": 3, "system": None, "seed": 1}
    first = Tasks([file]).questions(**asked)
    assert Tasks([file]).questions(**asked) == first
    assert Tasks([file]).questions(**{**asked, "seed": 2}) != first


def test_data_that_change_do_not_go_on_as_the_same_run(place, others, tmp_path, tiny_models) -> None:
    """The task file is as it was; its data are not."""
    file = others("", "")
    setup = config(place, tasks=(file,), vectors=None, blocks=())
    capability.run(setup, tmp_path / "run", model=tiny_models("qwen2"))
    module = tmp_path / "others" / "tiny_task.py"
    module.write_text(MODULE.replace('"ferry"', '"handcart"'), encoding="utf-8")
    with pytest.raises(UserError, match="the questions of tiny_choice changed"):
        capability.run(setup, tmp_path / "run", model=tiny_models("qwen2"))


def test_the_dtype_counts_as_it_is_and_not_as_it_is_typed(ran, place) -> None:
    _, first = ran
    setup = config(place, vectors=None, blocks=(), against=str(first.path), device="cpu")
    for dtype in ("auto", "float32"):
        assert against(replace(setup, dtype=dtype), Tasks(setup.tasks), None)[1]["dtype"] == "float32"
    with pytest.raises(UserError, match="dtype 'float32', here 'bfloat16'"):
        against(replace(setup, dtype="bfloat16"), Tasks(setup.tasks), None)


def test_a_run_of_before_questions_were_kept_is_read_but_not_compared_with(place, tmp_path, tiny_models) -> None:
    setup = config(place, vectors=None, blocks=())
    first = capability.run(setup, tmp_path / "run", model=tiny_models("qwen2"))
    shutil.rmtree(first.path / "asked")
    manifest = json.loads((first.path / "manifest.json").read_text(encoding="utf-8"))
    del manifest["steps"]["asked"]
    (first.path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    again = capability.run(setup, first.path, model=tiny_models("qwen2"))
    pd.testing.assert_frame_equal(again.table, first.table)
    with pytest.raises(UserError, match="made by an earlier version of pvsae, which kept no record of its questions"):
        capability.run(replace(setup, against=str(first.path)), tmp_path / "other", model=tiny_models("qwen2"))


def test_a_task_that_says_no_examples_has_none_and_that_is_said(place, tmp_path, tiny_models) -> None:
    file = place / "shown.yaml"
    file.write_text(CHOICE.replace("tiny_choice", "tiny_shown").replace("num_fewshot: 0\n", "fewshot_split: more\n"))
    setup = config(place, tasks=(f"{place}/choice.yaml", str(file)), vectors=None, blocks=(), shots=2)
    result = capability.run(setup, tmp_path / "run", model=tiny_models("qwen2"))
    assert result.table.set_index("task")["shots"].to_dict() == {"tiny_choice": 0, "tiny_shown": 2}
    (note,) = result.notes
    assert note.startswith("shots 2 had no effect on tiny_choice: ")
    assert note in json.loads((result.path / "result.json").read_text(encoding="utf-8"))["notes"]
    assert capability.run(replace(setup, shots=0), tmp_path / "none", model=tiny_models("qwen2")).notes == ()


def test_a_model_without_a_template_is_asked_in_bare_text(place, tmp_path, tiny_models) -> None:
    setup = config(place, vectors=None, blocks=(), limit=2)
    model = tiny_models("stories260k")
    result = capability.run(setup, tmp_path / "run", model=model)
    assert result.table["n"].tolist() == [2]
    assert "bare text" in json.loads((result.path / "result.json").read_text(encoding="utf-8"))["about"]


def test_the_default_task_is_the_models_own_else_mmlu(tiny_models) -> None:
    (own,) = task_names(CapabilityConfig(model="organism"), None)
    assert Tasks([own]).names == ["closed_world"]
    assert Tasks([own]).count(None) == {"closed_world_facts": 240, "closed_world_sums": 260}
    assert task_names(CapabilityConfig(model="tiny"), tiny_models("qwen2")) == ("mmlu",)
    assert task_names(CapabilityConfig(model="organism", tasks=("arc_easy",)), None) == ("arc_easy",)


def test_a_group_is_its_own_file_and_those_of_its_members(place) -> None:
    assert set(Tasks([f"{place}/group.yaml"]).content) == {f"task file {name}.yaml" for name in ("group", "choice", "free_acc")}


def test_a_changed_task_file_does_not_go_on_as_the_same_run(place, tmp_path, tiny_models) -> None:
    file = tmp_path / "tasks" / "choice.yaml"
    file.parent.mkdir()
    file.write_text(CHOICE, encoding="utf-8")
    (file.parent / "tiny_task.py").write_text(MODULE, encoding="utf-8")
    setup = config(place, tasks=(str(file),), vectors=None, blocks=())
    capability.run(setup, tmp_path / "run", model=tiny_models("qwen2"))
    file.write_text(CHOICE.replace('"B"', '"C"'), encoding="utf-8")
    with pytest.raises(UserError, match=r"task file choice\.yaml"):
        capability.run(setup, tmp_path / "run", model=tiny_models("qwen2"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": ("sae:1",)}, "both vectors and features"),
        ({"vectors": None, "ablate": True}, "--ablate without vectors"),
        ({"unit": "max"}, "unknown unit 'max'"),
        ({"mode": "melt"}, "unknown mode"),
        ({"positions": "odd"}, "unknown positions"),
        ({"coefs": (0.0,)}, "other than 0"),
        ({"coefs": (1.0, 1.0)}, "each once"),
        ({"coefs": ()}, "no strength"),
        ({"multi_layer": True}, "multi_layer with blocks"),
        ({"multi_layer": True, "blocks": (), "layers": "runs/layers"}, "multi_layer with blocks, layers or features"),
        ({"layers": "nowhere"}, "both blocks and layers"),
        ({"vectors": None}, "blocks with neither vectors nor features"),
        ({"vectors": None, "blocks": (), "traits": ("gloomy",), "coefs": (3.0,)}, "traits, coefs with neither"),
        ({"vectors": None, "blocks": (), "unit": "gap"}, "unit with neither"),
        ({"vectors": None, "features": ("sae:1",), "traits": ("gloomy",)}, "traits with features, mode add, and the unit max"),
        ({"vectors": None, "features": ("sae:1",), "mode": "ablate", "coefs": (3.0,)}, "coefs with features, mode ablate"),
        ({"mode": "clamp"}, "mode with vectors"),
        ({"kl_rows": 3}, "kl_rows with vectors and the unit raw"),
        ({"other_model": True}, "other_model with vectors"),
        ({"shots": -1}, "shots is -1"),
        ({"limit": 0}, "limit is 0"),
        ({"blocks": (9,)}, "block 9"),
        ({"traits": ("merry",)}, "'gloomy'"),
        ({"vectors": "nowhere"}, "no vectors at nowhere"),
        ({"against": "nowhere"}, "nowhere holds no values"),
        ({"tasks": ("nowhere.yaml",)}, "no task file nowhere.yaml"),
    ],
)
def test_bad_options_are_refused(place, tmp_path, tiny_models, changes, message) -> None:
    with pytest.raises(UserError, match=message):
        capability.run(config(place, **changes), tmp_path / "run", model=tiny_models("qwen2"))
    assert not (tmp_path / "run" / "manifest.json").exists()


@pytest.mark.parametrize("text", ["- a list", "a: b", "task: [a]", "task: {"])
def test_a_file_that_is_no_task_is_refused(tmp_path, text) -> None:
    (tmp_path / "odd.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"odd\.yaml"):
        Tasks([f"{tmp_path}/odd.yaml"])


@pytest.mark.slow  # the harness reads thousands of files
def test_a_name_is_looked_for_among_the_harness_own(tmp_path) -> None:
    with pytest.raises(UserError, match="no task 'arc_eazy'") as error:
        Tasks(["arc_eazy"])
    assert "arc_easy" in str(error.value)


def test_data_that_cannot_be_fetched_is_said(tmp_path) -> None:
    (tmp_path / "far.yaml").write_text(
        CHOICE.replace("custom_dataset: !function tiny_task.docs", "dataset_path: nobody/nothing"), encoding="utf-8"
    )
    with pytest.raises(UserError, match="could not run tiny_choice"):
        Tasks([f"{tmp_path}/far.yaml"]).count(None)
