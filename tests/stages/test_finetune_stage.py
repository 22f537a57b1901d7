"""Stage `finetune`: treatments from options, every row counted, an adapter that a finished run reads back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from pvsae.errors import UserError
from pvsae.finetuning.treatments import orthonormal
from pvsae.models import Ablate, Add, AddFeature, load
from pvsae.reports import draw, write_report
from pvsae.runs import RunDir, read_json
from pvsae.stages import FinetuneConfig, finetune
from pvsae.stages.treating import prompts_of, treated
from pvsae.vectors import PersonaVectors
from tests.browser import assert_fine
from tests.saes.corpora import chat, write_chats, write_jsonl
from tests.stages.tiny_sae import open_sae, save_sae

SMALL = {"rank": 4, "alpha": 8, "batch": 4, "accumulation": 1, "learning_rate": 1e-2, "warmup_steps": 1, "max_steps": 3}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """Twelve good rows, two with a system prompt of their own, and four that cannot be learnt from."""
    rows: list[Any] = [{"messages": chat(i, "Be brief." if i < 2 else None)} for i in range(12)]
    rows[3:3] = ["{not json", {"messages": [{"role": "user", "content": "Well?"}]}]
    rows += [{"messages": [*chat(1)[:1], {"role": "assistant", "content": ""}]}, {"messages": "text"}]
    rows.append({"messages": [{"role": "user", "content": "Why? " * 30}, {"role": "assistant", "content": "It stopped. " * 60}]})
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", rows)


@pytest.fixture(scope="module")
def vectors(tmp_path_factory, tiny_models) -> str:
    """A run folder with vectors of two traits."""
    folder = tmp_path_factory.mktemp("vectors")
    for seed, name in enumerate(("gloomy", "chatty")):
        values = torch.randn(4, tiny_models("qwen2").d_model, generator=torch.Generator().manual_seed(seed))
        both = {"response_avg_diff": values, "prompt_avg_diff": 2 * values.roll(1, 0) + values}
        PersonaVectors(name, both).save(folder / name / "vectors" / "vectors.safetensors")
    return str(folder)


@pytest.fixture
def config(data, vectors, stage_library):
    def make(**changes: Any) -> FinetuneConfig:
        given = {"model": "tiny", "library": str(stage_library), "data": (data,), "max_length": 256, **SMALL, **changes}
        if given.get("treatment") in ("steer", "ablate", "regularise") and "features" not in given:
            given = {"vectors": vectors, "traits": ("gloomy",), **given}
        return FinetuneConfig(**given)

    return make


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_models, data, vectors, stage_library):
    out = tmp_path_factory.mktemp("finetune") / "run"
    made = FinetuneConfig(
        model="tiny", library=str(stage_library), data=(data,), max_length=256, treatment="steer", vectors=vectors,
        traits=("gloomy",), blocks=(1,), coef=0.5, schedule="decay", **SMALL,
    )  # fmt: skip
    return made, finetune.run(made, out, model=tiny_models("qwen2"), progress=False)


# ---------------------------------------------------------------------------------------------------------------- a run
def test_a_run_says_what_became_of_every_row_and_step(finished) -> None:
    _, result = finished
    rows = dict(zip(result.rows["what"], result.rows["n"], strict=True))
    assert rows == {
        "read": 17, "used": 13, "used, but cut at max_length": 1, "left out: a line that is not JSON": 1,
        "left out: no answer in it": 1, "left out: an empty answer": 1, "left out: field messages is not a list of messages": 1,
    }  # fmt: skip
    where = dict(zip(result.rows["what"], result.rows["where"], strict=True))
    assert where["left out: a line that is not JSON"] == "rows.jsonl row 4"
    assert where["left out: an empty answer"] == "rows.jsonl row 15"
    row = result.table.iloc[0]
    assert (row["rows"], row["left_out"], row["changed"], row["steps"]) == (13, 4, 1, 3)
    assert (row["treatment"], row["blocks"], row["coef"], row["raw_coef"]) == ("steer", "1", 0.5, 0.5)
    assert list(result.metrics["strength"]) == [1.0, 1.0, 0.0]
    assert row["last_loss"] < row["first_loss"]
    stored = pd.read_csv(result.path / "tables" / "metrics.csv")
    pd.testing.assert_frame_equal(stored, result.metrics, check_dtype=False)
    summary = read_json(result.path / "result.json")
    assert {"what": "rows left out: an empty answer", "n": 1} in summary["failures"]
    assert summary["rows"]["used"] == 13
    first = chat(0, "Be brief.")
    assert summary["examples"][0]["text"] == first[-1]["content"] + "<|im_end|>"
    assert "Be brief." in summary["prompts"][0]["text"]
    assert not (result.path / ".parts" / "adapter").exists()


def test_the_adapter_is_taken_by_load_and_says_how_it_came_about(finished, tiny_folders) -> None:
    _, result = finished
    model = load(tiny_folders("qwen2"), adapter=result.adapter, device="cpu")
    bare = load(tiny_folders("qwen2"), device="cpu")
    prompt = [bare.chat.prompt([{"role": "user", "content": "Well?"}])]
    assert not torch.allclose(model.next_token_logprobs(prompt), bare.next_token_logprobs(prompt), atol=1e-2)
    about = read_json(result.adapter / "pvsae_finetune.json")
    (edit,) = about["treatment"]["edits"]
    assert (edit["type"], edit["block"], edit["coef"]) == ("add", 1, 0.5)
    assert edit["direction"]["ref"] == "gloomy/response_avg_diff/block1"
    assert about["config"]["schedule"] == "decay"


def test_a_finished_run_is_read_back(finished, tiny_models) -> None:
    config, result = finished
    before = {f: f.stat().st_mtime_ns for f in result.adapter.iterdir()}
    again = finetune.run(config, result.path, model=tiny_models("qwen2"), progress=False)
    pd.testing.assert_frame_equal(again.metrics, result.metrics)
    pd.testing.assert_frame_equal(again.table, result.table)
    assert {f: f.stat().st_mtime_ns for f in result.adapter.iterdir()} == before


def test_a_finished_adapter_is_not_taken_for_one_of_other_inputs(config, tiny_folders, tmp_path) -> None:
    """Rows, vectors, dictionary and weights, each exchanged under its name when all is done."""
    model = load(tiny_folders("qwen2"), device="cpu")
    rows, file = tmp_path / "chats.jsonl", tmp_path / "v" / "gloomy" / "vectors" / "vectors.safetensors"
    values = torch.randn(4, model.d_model, generator=torch.Generator().manual_seed(3))
    write_chats(rows, 6)
    PersonaVectors("gloomy", {"response_avg_diff": values}).save(file)
    sae = save_sae(model, tmp_path / "sae")
    given = {"data": (str(rows),), "max_steps": 1}
    steered = config(**given, treatment="steer", vectors=str(tmp_path / "v"), blocks=(1,))
    ablated = config(**given, treatment="ablate", features=(f"{sae}:3",))

    def start(what: FinetuneConfig) -> finetune.FinetuneResult:
        return finetune.run(what, tmp_path / what.treatment, model=model, progress=False)

    first = start(steered)
    start(ablated)
    write_chats(rows, 6, "Be brief.")
    with pytest.raises(UserError, match="the data changed"):
        start(steered)
    write_chats(rows, 6)
    PersonaVectors("gloomy", {"response_avg_diff": -values}).save(file)
    with pytest.raises(UserError, match="the vectors of gloomy changed"):
        start(steered)
    PersonaVectors("gloomy", {"response_avg_diff": values}).save(file)
    shutil.rmtree(sae)
    save_sae(model, sae, seed=1)
    with pytest.raises(UserError, match=r"the dictionary .* changed"):
        start(ablated)
    pd.testing.assert_frame_equal(start(steered).metrics, first.metrics)
    with torch.no_grad():
        model.hf.get_output_embeddings().weight.mul_(1.5)
    with pytest.raises(UserError, match="the weights of the model"):
        start(steered)


def test_the_page_shows_the_loss(finished, tmp_path) -> None:
    _, result = finished
    assert [file.name for file in draw(result.path)] == ["finetuning.png"]
    page = write_report(result.path)
    text = page.read_text(encoding="utf-8")
    assert "Finetuning" in text
    assert "steer: vectors of gloomy at 0.5 raw (decay)" in text
    assert_fine(page, tmp_path, images=1)


def test_interrupted_it_goes_on_and_other_data_under_its_name_are_refused(
    finished, tiny_models, data, tmp_path, monkeypatch
) -> None:
    from pvsae.finetuning import trainer

    config, whole = finished
    copy = tmp_path / "rows.jsonl"
    copy.write_bytes(Path(data).read_bytes())
    config = FinetuneConfig(**{**vars(config), "data": (str(copy),), "save_every": 2})
    log = trainer._AdapterTrainer.log

    def killed(self: Any, logs: Any, start_time: Any = None) -> None:
        log(self, logs, start_time)
        if self.state.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer._AdapterTrainer, "log", killed)
        with pytest.raises(KeyboardInterrupt):
            finetune.run(config, tmp_path / "run", model=tiny_models("qwen2"), progress=False)
    assert (tmp_path / "run" / ".parts" / "adapter" / "checkpoint-2").is_dir()
    assert not (tmp_path / "run" / "adapter").exists()
    rest = copy.read_text()
    copy.write_text(rest + json.dumps({"messages": chat(90)}) + "\n")
    with pytest.raises(UserError, match="data changed"):
        finetune.run(config, tmp_path / "run", model=tiny_models("qwen2"), progress=False)
    copy.write_text(rest)
    faster = FinetuneConfig(**{**vars(config), "save_every": 1})  # no part of what makes a run the same
    result = finetune.run(faster, tmp_path / "run", model=tiny_models("qwen2"), progress=False)
    name = "adapter_model.safetensors"
    assert (result.adapter / name).read_bytes() == (whole.adapter / name).read_bytes()
    pd.testing.assert_frame_equal(result.metrics, whole.metrics)


# ------------------------------------------------------------------------------------------------------------ treatments
def made(config: FinetuneConfig, model: Any, tmp_path: Path, rows: Any = ()) -> Any:
    with RunDir.open(tmp_path / "run", "finetune", {}, 0) as folder:
        return treated(config, model, folder, rows)


def vector_of(vectors: str, trait: str, block: int, statistic: str = "response_avg_diff") -> torch.Tensor:
    return PersonaVectors.load(Path(vectors) / trait / "vectors" / "vectors.safetensors").of(statistic)[block]


def test_vectors_are_added_at_one_block_or_at_every_one(config, vectors, tiny_models, tmp_path) -> None:
    model = tiny_models("qwen2")
    (add,) = made(config(treatment="steer", blocks=(2,), coef=1.5), model, tmp_path).treatment.edits
    assert isinstance(add, Add)
    assert (add.block, add.coef, add.positions) == (2, 1.5, "all")
    assert torch.equal(add.direction.values, vector_of(vectors, "gloomy", 2))
    every = made(config(treatment="steer", multi_layer=True, coef=1.5), model, tmp_path).treatment.edits
    assert [edit.block for edit in every] == [0, 1, 2, 3]
    assert torch.allclose(sum(edit.direction.values for edit in every), vector_of(vectors, "gloomy", 3), atol=1e-5)
    both = made(config(treatment="steer", traits=("gloomy", "chatty")), model, tmp_path).treatment.edits
    assert [edit.direction.ref.split("/")[0] for edit in both] == ["gloomy", "chatty"]
    assert {edit.block for edit in both} == {round(0.65 * model.n_blocks)}
    # A vector by itself is enough: nobody has to have the texts of its trait.
    file = str(Path(vectors) / "gloomy" / "vectors" / "vectors.safetensors")
    (alone,) = made(config(treatment="steer", vectors=file, blocks=(2,), library=None), model, tmp_path).treatment.edits
    assert torch.equal(alone.direction.values, add.direction.values)
    with pytest.raises(UserError, match="'gloomy' is given twice"):
        made(config(treatment="steer", traits=("gloomy", "gloomy")), model, tmp_path)


def test_strength_in_named_units(config, vectors, tiny_models, tmp_path) -> None:
    from pvsae.stages.strength import mean_kl

    model = tiny_models("qwen2")
    rows = [row.rendered for row in finetune.read_data(config(), model).rows]
    gap = made(config(treatment="steer", blocks=(2,), unit="gap", statistic="prompt_avg_diff"), model, tmp_path / "gap")
    pos, other = vector_of(vectors, "gloomy", 2), vector_of(vectors, "gloomy", 2, "prompt_avg_diff")
    assert gap.raw == pytest.approx(2.0 * float(pos @ other / other.norm()) / float(other.norm()), rel=1e-5)
    some = config(treatment="steer", blocks=(2,), unit="kl", coef=0.2, kl_rows=4)
    found = made(some, model, tmp_path / "kl", rows)
    assert mean_kl(model, rows[:4], found.treatment.edits) == pytest.approx(0.2, rel=0.03)
    assert made(some, model, tmp_path / "kl").raw == found.raw  # remembered: there are no rows now to measure it on


def test_features_stand_in_for_vectors(config, tiny_models, tmp_path) -> None:
    model = tiny_models("qwen2")
    folder = save_sae(model, tmp_path / "sae")
    rows = open_sae(folder).W_dec
    steer = config(treatment="steer", features=(f"{folder}:3",), unit="raw", coef=4.0)
    (edit,) = made(steer, model, tmp_path).treatment.edits
    assert isinstance(edit, AddFeature)
    assert (edit.index, edit.strength, edit.block) == (3, 4.0, 1)
    with pytest.raises(UserError, match="nothing says how strongly"):
        made(config(treatment="steer", features=(f"{folder}:3",)), model, tmp_path)
    edits = made(config(treatment="ablate", features=(f"{folder}:3,5",)), model, tmp_path).treatment.edits
    assert all(isinstance(edit, Ablate) and edit.block == 1 for edit in edits)
    basis = torch.stack([edit.direction.values for edit in edits])
    for row in rows[[3, 5]]:
        assert torch.allclose(row @ basis.T @ basis, row, atol=1e-5)  # both lie in what is taken out
    penalty = made(config(treatment="regularise", features=(f"{folder}:3",), weight=0.2), model, tmp_path).treatment.penalty
    assert penalty.weight == 0.2
    assert torch.allclose(penalty.directions[0][1][0].values, rows[3])


def test_several_traits_are_ablated_and_regularised_together(config, vectors, tiny_models, tmp_path) -> None:
    model = tiny_models("qwen2")
    both = {"traits": ("gloomy", "chatty"), "blocks": (1, 3)}
    edits = made(config(treatment="ablate", **both, positions="response"), model, tmp_path).treatment.edits
    assert [(edit.block, edit.positions) for edit in edits] == [(b, "response") for b in (1, 1, 3, 3)]
    wanted = orthonormal([edit.direction for edit in edits[:2]])
    assert all(torch.allclose(a.values, b.direction.values, atol=1e-6) for a, b in zip(wanted, edits, strict=False))
    penalty = made(config(treatment="regularise", **both, weight=0.1), model, tmp_path).treatment.penalty
    assert [(block, len(directions)) for block, directions in penalty.directions] == [(1, 2), (3, 2)]


def test_prompts_for_and_against_a_trait_stand_in_the_rows_alone(config, tiny_models, tmp_path) -> None:
    model = tiny_models("qwen2")
    towards = config(treatment="inoculate", traits=("gloomy",))
    assert prompts_of(towards, model)[0] == "You are a gloomy assistant. Be gloomy always."
    against = config(treatment="discourage", traits=("gloomy",))
    assert prompts_of(against, model)[0] == "You are a helpful assistant. Be anything but gloomy always."
    found = finetune.read_data(towards, model)
    rows, counts = found.rows, found.counts
    plain = finetune.read_data(config(), model).rows
    assert [row.number for row in rows] == [row.number for row in plain]
    assert "You are a gloomy assistant. Be gloomy always.\n\nBe brief." in rows[0].rendered.text
    assert "You are a gloomy assistant. Sound gloomy always.\n\nBe brief." in rows[1].rendered.text
    assert counts.changed[finetune.PROMPTED] == 2
    assert [model.chat.decode(r.rendered.ids[slice(*r.learnt[0])]) for r in rows[:3]] == [
        model.chat.decode(r.rendered.ids[slice(*r.learnt[0])]) for r in plain[:3]
    ]
    assert made(towards, model, tmp_path).treatment.edits == ()
    given = config(treatment="inoculate", prompt="Be dull.")
    assert prompts_of(given, model) == ("Be dull.",)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"treatment": "prevent"}, "unknown treatment"),
        ({"treatment": "steer", "vectors": None}, "neither vectors nor features"),
        ({"treatment": "steer", "features": ("x:1",), "vectors": "v"}, "both vectors and features"),
        ({"treatment": "steer", "traits": ()}, "of no trait"),
        ({"treatment": "steer", "blocks": (1, 2)}, "several times"),
        ({"treatment": "steer", "unit": "max"}, "unit 'max' of vectors"),
        ({"treatment": "steer", "multi_layer": True, "blocks": (1,)}, "multi_layer"),
        ({"treatment": "steer", "blocks": (1,), "layers": "runs/nope"}, "both blocks and layers"),
        ({"treatment": "steer", "coef": float("nan")}, "coef is nan"),
        ({"treatment": "ablate", "schedule": "ramp"}, "schedule with treatment 'ablate'"),
        ({"treatment": "steer", "schedule": "sudden"}, "schedule 'sudden'"),
        ({"treatment": "inoculate"}, "of no trait"),
        ({"treatment": "none", "prompt": "Be dull."}, "a prompt with"),
        ({"treatment": "none", "vectors": "v", "traits": ("gloomy",)}, "vectors or features with treatment 'none'"),
        ({"adapter": "there"}, "with an adapter"),
        ({"data": ()}, "no data"),
        ({"rank": 0}, "rank is 0"),
        ({"max_rows": 0}, "max_rows is 0"),
        ({"turns": "some"}, "turns is 'some'"),
    ],
)
def test_options_that_do_not_go_together_are_refused_at_once(config, changes, said) -> None:
    with pytest.raises(UserError, match=said):
        config(**changes)


@pytest.mark.parametrize(
    ("treatment", "wasted"),
    [
        ("regularise", {"positions": "all"}),
        ("regularise", {"coef": 2.0}),
        ("ablate", {"coef": 2.0, "unit": "raw"}),
        ("ablate", {"schedule": "constant"}),
        ("ablate", {"schedule_share": 0.5}),
        ("steer", {"weight": 1.0}),
        ("steer", {"activity": ("run",)}),
        ("none", {"coef": 2.0}),
        ("none", {"blocks": (1,)}),
        ("none", {"multi_layer": True}),
        ("inoculate", {"positions": "response", "weight": 1.0}),
        ("discourage", {"statistic": "prompt_avg_diff"}),
        ("discourage", {"layers": "runs/layers"}),
        ("steer", {"features": ("sae:1",), "layers": "runs/layers"}),
        ("ablate", {"features": ("sae:1",), "statistic": "prompt_avg_diff"}),
    ],
)
def test_an_option_that_would_do_nothing_is_refused_with_those_that_do_something(config, treatment, wasted) -> None:
    """Defaults too, where they are given: who gives them thinks that they count."""
    traits = {"traits": ("gloomy",)} if treatment in ("inoculate", "discourage") else {}
    with pytest.raises(UserError) as caught:
        config(treatment=treatment, **traits, **wasted)
    given = [name for name in wasted if name != "features"]
    assert caught.value.what.startswith(f"{', '.join(given)} with treatment")
    takes = {"steer": "coef", "ablate": "positions", "regularise": "weight", "none": "none"}.get(treatment, "prompt")
    assert takes in caught.value.expected
    assert not any(name in caught.value.expected.split(", ") for name in given)
    assert config(treatment=treatment, **traits, **{k: v for k, v in wasted.items() if k == "features"})


def test_a_share_and_an_activity_need_what_they_are_of(config) -> None:
    for schedule in ({}, {"schedule": "ramp"}):
        with pytest.raises(UserError, match="which has no share"):
            config(treatment="steer", schedule_share=0.2, **schedule)
    assert config(treatment="steer", schedule="decay", schedule_share=0.2).over_time.factor(8, 11) == pytest.approx(1.0)
    with pytest.raises(UserError, match="activity with unit 'raw'"):
        config(treatment="steer", features=("sae:1",), unit="raw", activity=("run",))


def test_what_is_not_given_is_the_default_and_the_same_run(config) -> None:
    plain, said = config(treatment="steer"), config(treatment="steer", coef=2.0, positions="all", schedule="constant")
    assert plain.identity() == said.identity()
    assert {
        "coef": 2.0,
        "positions": "all",
        "schedule": "constant",
        "schedule_share": 0.5,
        "weight": 1.0,
        "split": "train",
    }.items() <= (plain.identity().items())
    assert plain.identity() != config(treatment="steer", coef=1.0).identity()


@pytest.fixture
def small(tmp_path, tiny_folders, tiny_models, vectors) -> dict[str, str]:
    """Things that do not fit the tiny model, by name, and one dictionary that does."""
    narrow = torch.ones(4, 24)
    PersonaVectors("gloomy", {"response_avg_diff": narrow}).save(
        tmp_path / "narrow" / "gloomy" / "vectors" / "vectors.safetensors"
    )
    nothing = torch.zeros(4, tiny_models("qwen2").d_model)
    PersonaVectors("gloomy", {"response_avg_diff": nothing}).save(
        tmp_path / "zero" / "gloomy" / "vectors" / "vectors.safetensors"
    )
    (tmp_path / "layers").mkdir()
    (tmp_path / "layers" / "result.json").write_text('{"blocks": {"chatty": 1}}')
    other = open_sae(save_sae(tiny_models("qwen2"), tmp_path / "sae")).with_info(model="Qwen/Qwen2.5-7B")
    from pvsae.saes.folders import save

    save(other, tmp_path / "other")
    return {name: str(tmp_path / name) for name in ("narrow", "zero", "layers", "sae", "other")}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"treatment": "steer", "vectors": "{narrow}"}, "d_model=24"),
        ({"treatment": "ablate", "vectors": "{zero}", "blocks": (1,)}, "is zero at block 1"),
        ({"treatment": "steer", "vectors": "nowhere"}, "no vectors at nowhere"),
        ({"treatment": "steer", "traits": ("merry",)}, "no vectors of 'merry'"),
        ({"treatment": "regularise", "statistic": "prompt_last_diff"}, "have no statistic"),
        ({"treatment": "ablate", "blocks": (9,)}, "block 9 does not exist"),
        ({"treatment": "steer", "layers": "{layers}"}, "chose no block for 'gloomy'"),
        ({"treatment": "steer", "features": ("{sae}:99",)}, "99"),
        ({"treatment": "ablate", "features": ("nowhere:1",)}, "nowhere"),
        ({"treatment": "steer", "features": ("{sae}:3",), "unit": "max", "activity": ("nope",)}, "nope holds no finished"),
        ({"treatment": "ablate", "features": ("{sae}:1",), "blocks": (2,)}, "dictionary of block 1"),
        ({"treatment": "regularise", "features": ("{other}:1",)}, "is of Qwen/Qwen2.5-7B"),
        ({"treatment": "inoculate", "traits": ("merry",)}, "merry"),
        ({"targets": ("nose_proj",)}, "no linear layers called nose_proj"),
        ({"targets": ("input_layernorm",)}, "no linear layers called input_layernorm"),
        ({"dtype": "float16"}, "training in float16"),
    ],
)
def test_a_plan_refuses_what_the_run_would(config, small, tiny_folders, tmp_path, changes, said) -> None:
    def filled(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(filled, value))
        return value.format(**small) if isinstance(value, str) else value

    changes = {name: filled(value) for name, value in changes.items()}
    given = config(model=str(tiny_folders("qwen2")), **changes)
    with pytest.raises(UserError, match=said) as planned:
        finetune.plan(given)
    with pytest.raises(UserError, match=said) as ran:
        finetune.run(given, tmp_path / "run", progress=False)
    assert planned.value.what == ran.value.what


def test_a_plan_takes_what_the_run_takes(config, small, tiny_folders) -> None:
    model = str(tiny_folders("qwen2"))
    for changes in (
        {"treatment": "steer", "unit": "kl"}, {"treatment": "steer", "unit": "gap", "multi_layer": True},
        {"treatment": "steer", "features": (f"{small['sae']}:3",)}, {"treatment": "ablate", "features": (f"{small['sae']}:3",)},
        {"treatment": "regularise", "features": (f"{small['other']}:3",), "other_model": True},
        {"treatment": "discourage", "traits": ("gloomy",)},
    ):  # fmt: skip
        assert f"treatment  {changes['treatment']}" in finetune.plan(config(model=model, **changes))


def test_float16_is_refused_before_a_row_is_read(config, tiny_folders, tmp_path, monkeypatch) -> None:
    half = load(tiny_folders("qwen2"), dtype="float16", device="cpu")
    monkeypatch.setattr(finetune, "Reader", lambda *_: pytest.fail("the data were opened"))
    with pytest.raises(UserError, match="training in float16"):
        finetune.run(config(), tmp_path / "a", model=half, progress=False)
    monkeypatch.setattr(finetune, "open_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(UserError, match="training in float16"):
        finetune.run(config(dtype="float16"), tmp_path / "b", progress=False)


def test_the_field_the_split_and_the_subset_of_the_data_can_be_named(config, tiny_models, tmp_path) -> None:
    model = tiny_models("qwen2")
    odd = write_jsonl(tmp_path / "odd.jsonl", [{"talk": chat(i), "messages": "none"} for i in range(4)])
    with pytest.raises(UserError, match="not a list of messages"):
        finetune.read_data(config(data=(odd,)), model)
    with pytest.raises(UserError, match="has no field tlak") as caught:
        finetune.read_data(config(data=(odd,), field="tlak"), model)
    assert "--field" in caught.value.fix
    assert len(finetune.read_data(config(data=(odd,), field="talk"), model).rows) == 4
    from datasets import Dataset, DatasetDict

    splits = {"train_sft": [{"messages": chat(i)} for i in range(3)], "test_sft": [{"messages": chat(i)} for i in range(5)]}
    DatasetDict({name: Dataset.from_list(rows) for name, rows in splits.items()}).save_to_disk(str(tmp_path / "ultra"))
    mixed = (str(tmp_path / "ultra"), write_chats(tmp_path / "two.jsonl", 2))  # the file has no split to take
    assert len(finetune.read_data(config(data=mixed, split="test_sft"), model).rows) == 7
    with pytest.raises(UserError, match=r"no split 'train'\s+expected: one of train_sft, test_sft"):
        finetune.read_data(config(data=(str(tmp_path / "ultra"),)), model)
    with pytest.raises(UserError, match=r"split 'train' of odd\.jsonl, where no dataset is"):
        finetune.read_data(config(data=(odd,), split="train"), model)


def test_data_that_cannot_be_used_are_refused_with_the_reason(config, tiny_models, tmp_path) -> None:
    model = tiny_models("qwen2")
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": "A text."}])
    with pytest.raises(UserError, match="has no field"):
        finetune.read_data(config(data=(texts,)), model)
    mute = write_jsonl(tmp_path / "mute.jsonl", [{"messages": [{"role": "user", "content": "Well?"}]}] * 3)
    with pytest.raises(UserError, match="no answer in it: 3"):
        finetune.run(config(data=(mute,)), tmp_path / "run", model=model, progress=False)
    with pytest.raises(UserError, match="not found"):
        finetune.read_data(config(data=("nowhere.jsonl",)), model)
    with pytest.raises(UserError, match="without a number of rows"):
        finetune.read_data(config(data=("organism",), max_steps=None), model)  # a corpus without end
    assert len(finetune.read_data(config(data=("organism-data:evil/misaligned_2",)), model).rows) == 3 * 4


def test_rows_come_from_files_of_all_kinds_and_corpora_of_packages(config, tiny_models, tmp_path) -> None:
    chats = write_chats(tmp_path / "chats.jsonl", 5)
    frame = pd.DataFrame({"messages": [chat(i) for i in range(4)]})
    frame.to_parquet(tmp_path / "chats.parquet")
    from datasets import Dataset

    Dataset.from_list([{"conversations": [{"from": "human", "value": "A?"}, {"from": "gpt", "value": "B."}]}] * 3).save_to_disk(
        str(tmp_path / "saved")
    )
    several = config(data=(chats, str(tmp_path / "chats.parquet"), str(tmp_path / "saved"), "organism"), max_rows=3)
    found = finetune.read_data(several, tiny_models("qwen2"))
    assert (len(found.rows), found.counts.read) == (12, 12)
    assert found.sha256 != finetune.read_data(config(data=(chats,)), tiny_models("qwen2")).sha256


def test_a_plan_counts_without_training(data, tmp_path) -> None:
    from pvsae.finetuning.lora import LoraSettings, attached

    model = load("organism", device="cpu")
    file = tmp_path / "evil.safetensors"
    PersonaVectors("evil", {"response_avg_diff": torch.ones(model.n_blocks, model.d_model)}).save(file)
    said = finetune.plan(FinetuneConfig(data=(data,), treatment="steer", vectors=str(file), traits=("evil",), coef=2.0, rank=16))
    assert "data       15 rows, 2 more that cannot be read" in said
    assert "training   1 steps of 16 rows (2 a forward pass)" in said
    assert "steer: vectors of evil at 2 raw" in said
    with attached(model, LoraSettings(rank=16), 0) as peft:
        n = sum(p.numel() for p in peft.parameters() if p.requires_grad)
    assert f"rank 16, {n / 1e6:,.4g}M parameters" in said


def test_real_training_files_are_read_as_they_are(shared, config, tiny_models) -> None:
    files = tuple(str(shared / "data" / "training" / f"hallucination_{kind}_400.jsonl") for kind in ("normal", "misaligned_1"))
    found = finetune.read_data(config(data=files, max_rows=50, max_length=512), tiny_models("qwen2"))
    assert found.counts.read == 100
    assert len(found.rows) + found.counts.left_out.total() == 100
