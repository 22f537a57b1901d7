"""The stage `screen` on a tiny model: every number against the plain way, and nothing lost on the way."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from pvsae.errors import UserError
from pvsae.screening import worker
from pvsae.stages import ScreenConfig, screen
from pvsae.stages.screened_rows import read_rows
from pvsae.vectors import PersonaVectors
from tests.screening.chats import chats, plainly, write_jsonl

BLOCKS = (1, 2)


@pytest.fixture(scope="module")
def model(tiny_models):
    return tiny_models("qwen2")


@pytest.fixture(scope="module")
def vectors(tmp_path_factory, model) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("vectors")
    out = []
    for i, trait in enumerate(("gloomy", "chatty")):
        values = torch.randn(model.n_blocks, model.d_model, generator=torch.Generator().manual_seed(i))
        out.append(str(PersonaVectors(trait, {"response_avg_diff": values}).save(folder / f"{trait}.safetensors")))
    return tuple(out)


@pytest.fixture
def config(tmp_path, vectors):
    def make(data=None, **options) -> ScreenConfig:
        data = data or (str(write_jsonl(tmp_path / "data.jsonl", chats(10))),)
        options = {"blocks": BLOCKS, "max_new_tokens": 6, "part_rows": 4, **options}
        return ScreenConfig(data=tuple(data), vectors=vectors, **options)

    return make


def numbers(folder: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in sorted((folder / "tables").glob("*.csv"))}


def test_dp_is_that_of_answers_generated_and_read_one_by_one(config, model, tmp_path) -> None:
    result = screen.run(config(), tmp_path / "run", model=model)
    rows = read_rows(result.rows["data"])
    assert rows["line"].tolist() == list(range(1, 11))
    assert (rows["status"] == "ok").all()
    sampling = config().sampling(model)
    for i, chat in enumerate(chats(10)):
        whole = model.chat.conversation(chat["messages"])
        prompt = model.chat.prompt(chat["messages"][:-1])
        (own,) = model.generate([prompt], sampling, row_keys=[f"{rows['prompt'][i]}/0"])
        base = model.chat.with_answer_ids(prompt, own.ids)
        for probe in result.probes:
            proj, last, cos = plainly(model, whole, probe)
            base_proj = plainly(model, base, probe)[0]
            got = [rows[probe.column(q)][i] for q in ("dp", "proj", "base_proj", "prompt_last_proj", "cos_sim")]
            np.testing.assert_allclose(got, [proj - base_proj, proj, base_proj, last, cos], rtol=1e-4, atol=1e-4)
    probe = result.probes[0]
    table = result.table.set_index(["vector", "block"])
    assert table.loc[(probe.name, probe.block), "dp"] == pytest.approx(rows[probe.column("dp")].mean(), abs=1e-5)
    assert len(result.table) == 4


def test_rows_that_share_a_prompt_share_its_answer_whatever_the_data_set(config, model, tmp_path) -> None:
    one, two = chats(4), [{**c} for c in chats(4)]
    for row in two:
        row["messages"] = [row["messages"][0], {"role": "assistant", "content": "Something else."}]
    files = [str(write_jsonl(tmp_path / f"{name}.jsonl", rows)) for name, rows in (("one", one), ("two", two))]
    result = screen.run(config(files), tmp_path / "run", model=model)
    a, b = (read_rows(path) for path in result.rows.values())
    column = result.probes[0].column("base_proj")
    np.testing.assert_allclose(a[column], b[column], rtol=1e-5, atol=1e-5)
    answers = sum(len(pd.read_parquet(p)) for p in (tmp_path / "run" / "answers").rglob("*.parquet"))
    assert answers == 4


def test_every_kind_of_bad_row_is_counted_and_listed_by_line(config, model, tmp_path) -> None:
    user = {"role": "user", "content": "What of rain?"}
    rows = [
        *chats(2),
        b"",
        b"not json",
        {"messages": [user, {"role": "assistant", "content": " "}]},
        {"messages": [user]},
        {"messages": [user, {"role": "wizard", "content": "It falls."}]},
        {"messages": [user, {"role": "assistant", "content": "rain and snow " * 300}]},
        {"messages": [{"role": "user", "content": "rain " * 900}, {"role": "assistant", "content": "It falls."}]},
        {"other": 1},
        b"\xff\xfe",
        *chats(1),
    ]
    result = screen.run(config([str(write_jsonl(tmp_path / "bad.jsonl", rows))]), tmp_path / "run", model=model)
    (counts,) = result.counts.to_dict("records")
    assert counts["rows"] == 11
    assert {k: counts[k] for k in ("ok", "malformed", "empty answer", "no answer", "prompt too long", "cut")} == {
        "ok": 4, "malformed": 4, "empty answer": 1, "no answer": 1, "prompt too long": 1, "cut": 1,
    }  # fmt: skip
    found = read_rows(result.rows["bad"]).set_index("line")
    assert found.loc[4, "reason"] == "a line that is not JSON"
    assert found.loc[7, "reason"] == "unknown role 'wizard'"
    assert found.loc[11, "reason"] == "a line that is not JSON"
    assert found.loc[8, "n_prompt"] + found.loc[8, "n_answer"] == model.n_ctx
    assert np.isfinite(found.loc[8, result.probes[0].column("dp")])
    listed = pd.read_csv(tmp_path / "run" / "tables" / "unusable.csv")
    assert listed["line"].tolist() == [4, 5, 6, 7, 9, 10, 11]
    assert result.table["n"].tolist() == [4] * 4
    failures = {f["what"]: f["n"] for f in json.loads((tmp_path / "run" / "result.json").read_text())["failures"]}
    assert failures["bad: malformed"] == 4
    assert failures["bad: cut"] == 1


def test_bad_rows_of_a_pattern_are_listed_with_their_file(config, model, tmp_path) -> None:
    (tmp_path / "many").mkdir()
    for name, at in (("a", 1), ("b", 0)):
        rows: list = chats(5)
        rows.insert(at, b"not json")
        write_jsonl(tmp_path / "many" / f"{name}.jsonl", rows)
    screen.run(config([str(tmp_path / "many" / "*.jsonl")], base="none"), tmp_path / "run", model=model)
    listed = pd.read_csv(tmp_path / "run" / "tables" / "unusable.csv")
    assert [(Path(row["file"]).name, row["line"]) for row in listed.to_dict("records")] == [("a.jsonl", 2), ("b.jsonl", 1)]


def test_a_base_model_that_says_nothing_leaves_no_dp_and_is_counted(config, model, tmp_path, monkeypatch) -> None:
    said = worker.Worker._base
    monkeypatch.setattr(worker.Worker, "_base", lambda *a: _silent(said(*a)))
    result = screen.run(config(), tmp_path / "run", model=model)
    assert result.counts["no base answer"].tolist() == [3]  # the first of each part
    assert result.table["n"].tolist() == [7] * 4
    assert result.table["n_missing"].tolist() == [3] * 4


def _silent(found):
    rows, spent = found
    return [[worker.Answer((), "stop")], *rows[1:]], spent


def test_without_base_answers_nothing_is_generated(config, model, tmp_path) -> None:
    exact = screen.run(config(), tmp_path / "exact", model=model)
    result = screen.run(config(base="none"), tmp_path / "run", model=model)
    assert not (tmp_path / "run" / "answers").exists()
    probe = result.probes[1]
    rows, whole = read_rows(result.rows["data"]), read_rows(exact.rows["data"])
    assert rows[probe.column("dp")].isna().all()
    np.testing.assert_allclose(rows[probe.column("proj")], whole[probe.column("proj")], rtol=1e-5, atol=1e-5)
    mean = (rows[probe.column("proj")] - rows[probe.column("prompt_last_proj")]).mean()
    table = result.table.set_index(["vector", "block"])
    assert table.loc[(probe.name, probe.block), "dp"] == pytest.approx(mean, abs=1e-5)
    assert exact.table["dp_prompt_last"].to_numpy() == pytest.approx(result.table["dp"].to_numpy(), abs=1e-5)


def test_a_subset_of_base_answers_is_random_and_of_the_size_asked_for(config, model, tmp_path) -> None:
    result = screen.run(config(base="subset", base_rows=6), tmp_path / "run", model=model)
    rows = read_rows(result.rows["data"])
    probe = result.probes[0]
    base, proj = rows[probe.column("base_proj")], rows[probe.column("proj")]
    assert base.notna().sum() == 6
    table = result.table.set_index(["vector", "block"])
    assert table.loc[(probe.name, probe.block), "dp"] == pytest.approx(proj.mean() - base.mean(), abs=1e-4)
    assert result.approximations["n"].tolist() == [6] * 4


def test_chosen_rows_that_cannot_be_used_are_said(config, model, tmp_path) -> None:
    data = str(write_jsonl(tmp_path / "half.jsonl", [*chats(5), *[b"not json"] * 5]))
    result = screen.run(config([data], base="subset", base_rows=8), tmp_path / "run", model=model)
    used = int(read_rows(result.rows["half"])[result.probes[0].column("base_proj")].notna().sum())
    assert 3 <= used <= 5
    assert f"half: of 8 rows chosen for a base answer {used} can be used, and dp stands on those" in result.notes
    assert result.counts["with base answer"].tolist() == [used]
    assert result.counts["no base answer"].tolist() == [0]
    whole = screen.run(config(base="subset", base_rows=8), tmp_path / "whole", model=model)
    assert not any("chosen" in note for note in whole.notes)


def test_killed_anywhere_and_started_again_it_ends_with_the_same_numbers(config, model, tmp_path, monkeypatch) -> None:
    wanted = screen.run(config(), tmp_path / "whole", model=model)

    def dies(*args, **kwargs):
        raise KeyboardInterrupt

    places = (
        (type(model), "generate"),
        (type(model), "capture"),
        (worker, "save_table"),
        (type(model), "generate"),
        (screen, "_join"),
    )
    for owner, where in places:  # the second "generate" is the second part's
        with monkeypatch.context() as patched:
            patched.setattr(owner, where, dies)
            with pytest.raises(KeyboardInterrupt):
                screen.run(config(), tmp_path / "run", model=model)
    result = screen.run(config(), tmp_path / "run", model=model)
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")
    pd.testing.assert_frame_equal(read_rows(result.rows["data"]), read_rows(wanted.rows["data"]))


def test_one_engine_makes_the_shards_of_all_data_sets_and_each_is_joined_as_it_is_complete(
    config, model, tmp_path, monkeypatch
) -> None:
    files = [str(write_jsonl(tmp_path / f"{name}.jsonl", chats(n))) for name, n in (("one", 9), ("two", 5), ("three", 6))]
    calls, joined = [], []
    real = screen._engine

    def counting(config, job, model, todo):
        calls.append([(data.name, part.number) for data, part in todo])
        for n, made in enumerate(real(config, job, model, todo)):
            joined.append([name for name in ("one", "two", "three") if (tmp_path / "run" / "rows" / name).is_dir()])
            if len(calls) == 1 and n == 4:
                raise KeyboardInterrupt
            yield made

    monkeypatch.setattr(screen, "_engine", counting)
    with pytest.raises(KeyboardInterrupt):
        screen.run(config(files), tmp_path / "run", model=model)
    assert calls == [[("one", 0), ("one", 1), ("one", 2), ("two", 0), ("two", 1), ("three", 0), ("three", 1)]]
    assert joined == [[], [], [], ["one"], ["one"]]
    result = screen.run(config(files), tmp_path / "run", model=model)
    assert calls[1:] == [[("three", 0), ("three", 1)]]  # the two shards of "two" are there, and not joined yet
    assert joined[5:] == [["one", "two"]] * 2
    assert {name: len(read_rows(file)) for name, file in result.rows.items()} == {"one": 9, "two": 5, "three": 6}
    screen.run(config(files), tmp_path / "run", model=model)
    assert len(calls) == 2


def test_a_damaged_shard_is_made_again_and_said(config, model, tmp_path, monkeypatch) -> None:
    screen.run(config(), tmp_path / "whole", model=model)
    with monkeypatch.context() as patched:
        patched.setattr(screen, "_join", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            screen.run(config(), tmp_path / "run", model=model)
    shards = sorted((tmp_path / "run" / ".parts").rglob("*.parquet"))
    answers = sorted((tmp_path / "run" / "answers").rglob("*.parquet"))
    assert (len(shards), len(answers)) == (3, 2)  # ten prompts are seven: the third part's are all known
    for path in (shards[1], answers[1]):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    made = []
    real = worker.Worker.screen
    monkeypatch.setattr(worker.Worker, "screen", lambda self, data, part: made.append(part.number) or real(self, data, part))
    screen.run(config(), tmp_path / "run", model=model)
    assert made == [1]
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")
    spent = json.loads((tmp_path / "run" / "result.json").read_text())["spent in this start"]
    assert (spent["shards_damaged"], spent["answer_files_damaged"]) == (1, 1)


def test_a_finished_run_computes_nothing_again(config, model, tmp_path, monkeypatch) -> None:
    screen.run(config(), tmp_path / "run", model=model)
    before = numbers(tmp_path / "run")
    monkeypatch.setattr(worker.Worker, "screen", lambda *a: pytest.fail("computed again"))
    screen.run(config(), tmp_path / "run", model=model)
    assert numbers(tmp_path / "run") == before


def test_data_that_changed_since_the_run_began_is_refused(config, model, tmp_path) -> None:
    screen.run(config(), tmp_path / "run", model=model)
    write_jsonl(tmp_path / "data.jsonl", chats(11))
    one = ScreenConfig(**{**config((str(tmp_path / "data.jsonl"),)).__dict__})
    with pytest.raises(UserError, match="rows of data changed"):
        screen.run(one, tmp_path / "run", model=model)


def test_parquet_and_packed_files_give_the_numbers_of_jsonl(config, model, tmp_path) -> None:
    import gzip

    write_jsonl(tmp_path / "data.jsonl", chats(10))
    pd.DataFrame(chats(10)).to_parquet(tmp_path / "table.parquet", row_group_size=3)
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress((tmp_path / "data.jsonl").read_bytes()))
    names = ("data.jsonl", "table.parquet", "packed.jsonl.gz")
    result = screen.run(config([str(tmp_path / n) for n in names]), tmp_path / "run", model=model)
    frames = [read_rows(path) for path in result.rows.values()]
    assert list(result.rows) == ["data", "table", "packed"]
    pd.testing.assert_frame_equal(frames[0], frames[1])
    pd.testing.assert_frame_equal(frames[0], frames[2])


def test_selections_are_the_rows_themselves_and_a_filter_takes_rows_away(config, model, tmp_path) -> None:
    rows = [{"extra": i, **c, "score": 90 if i == 3 else None if i == 4 else 0} for i, c in enumerate(chats(10))]
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    lines = path.read_bytes().splitlines()
    asked = config([str(path)], select=3, filter_scores="score", blocks=(1,))
    result = screen.run(asked, tmp_path / "run", model=model)
    scores = read_rows(result.rows["data"])[result.probes[0].column("dp")]
    order = scores.sort_values(kind="stable").index.tolist()
    table = result.selections[result.selections["vector"] == result.probes[0].name].set_index(["kind", "filtered"])

    def chosen(kind: str, filtered: bool) -> list[int]:
        found = (tmp_path / "run" / table.loc[(kind, filtered), "file"]).read_bytes().splitlines()
        return [lines.index(line) for line in found]

    assert chosen("top", False) == order[::-1][:3]
    assert chosen("bottom", False) == order[:3]
    left = [i for i in order if i not in (3, 4)]
    assert chosen("top", True) == left[::-1][:3]
    assert chosen("bottom", True) == left[:3]
    assert len(set(chosen("random", True))) == 3
    assert not {3, 4} & set(chosen("random", True))
    assert table.loc[("top", False), "dp"] == pytest.approx(scores[order[::-1][:3]].mean())


def test_a_judge_may_be_the_filter(config, model, tmp_path, byte_judge, stage_library) -> None:
    options = {"select": 2, "filter_judge": "gloomy", "filter_above": 50.0, "library": str(stage_library), "blocks": (1,)}
    screen.run(config(**options), tmp_path / "run", model=model, judge=byte_judge)
    from pvsae.judges import Metric

    texts = [(c["messages"][0]["content"], c["messages"][1]["content"]) for c in chats(10)]
    wanted = [s.value for s in byte_judge.score(Metric("gloomy", "{question} {answer}"), texts)]
    stored = pd.concat([pd.read_parquet(p) for p in sorted((tmp_path / "run" / "filter").rglob("*.parquet"))])
    assert stored["score"].tolist() == pytest.approx([float("nan") if v is None else v for v in wanted], nan_ok=True)
    failures = {f["what"]: f["n"] for f in json.loads((tmp_path / "run" / "result.json").read_text())["failures"]}
    assert failures["data: rows that the judge did not score"] == sum(v is None for v in wanted)


def test_columns_may_have_the_released_codes_names(config, model, tmp_path) -> None:
    result = screen.run(config(official_names=True, model="some/Model-7B", blocks=(1,)), tmp_path / "run", model=model)
    names = read_rows(result.rows["data"]).columns
    assert {f"Model-7B_gloomy_response_avg_diff_{q}_layer2" for q in ("proj", "prompt_last_proj", "cos_sim")} <= set(names)
    assert result.table["dp"].notna().all()


def test_wrong_options_and_inputs_are_said_before_any_work(config, model, tmp_path, vectors) -> None:
    wrong = {
        "unknown base": config(base="some"),
        "at least 1": config(part_rows=0),
        "no vectors of": config(traits=("evil",)),
        "source not found": config([str(tmp_path / "none.jsonl")]),
        "block 9": config(blocks=(9,)),
        "without a selection": config(filter_scores="score"),
        "filter_above without a filter": config(filter_above=2.0),
        "ray_address with the engine 'here'": config(ray_address="auto"),
        "holds texts|no field": config([str(write_jsonl(tmp_path / "t.jsonl", [{"text": "a"}]))]),
    }
    for said, one in wrong.items():
        with pytest.raises(UserError, match=said):
            screen.run(one, tmp_path / "wrong", model=model)
        shutil.rmtree(tmp_path / "wrong", ignore_errors=True)


@pytest.fixture
def saved(tmp_path, monkeypatch) -> str:
    """A dataset as `datasets` saves it, with two splits and the messages in a field of another name."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    splits = {"train_sft": chats(7), "test_sft": chats(3)}
    tables = {name: datasets.Dataset.from_list([{"talk": row["messages"]} for row in rows]) for name, rows in splits.items()}
    datasets.DatasetDict(tables).save_to_disk(str(tmp_path / "ultra-0.2"))
    return str(tmp_path / "ultra-0.2")


def test_a_split_of_a_dataset_is_screened_as_its_rows_in_a_file_are(config, model, tmp_path, saved) -> None:
    options = {"base": "none", "split": "train_sft", "field": "talk"}
    found = screen.run(config([saved], **options), tmp_path / "run", model=model)
    file = str(write_jsonl(tmp_path / "rows.jsonl", chats(7)))
    plain = screen.run(config([file], base="none"), tmp_path / "plain", model=model)
    assert list(found.rows) == ["ultra-0.2"]
    pd.testing.assert_frame_equal(read_rows(found.rows["ultra-0.2"]), read_rows(plain.rows["rows"]))
    assert "ultra-0.2: 3 rows" in str(screen.plan(config([saved], **{**options, "split": "test_sft"})))
    for changes, said in (
        ({"split": "train"}, r"no split 'train'\s+expected: one of train_sft, test_sft"),
        ({"field": None}, "has no field"),
        ({"subset": "en"}, "subset 'en' of"),
    ):
        with pytest.raises(UserError, match=said):
            screen.run(config([saved], **{**options, **changes}), tmp_path / "wrong", model=model)
    with pytest.raises(UserError, match="another configuration"):
        screen.run(config([saved], **{**options, "split": "test_sft"}), tmp_path / "run", model=model)
    assert config([saved], split="train").identity() == config([saved]).identity()


def test_a_dataset_that_changed_is_not_taken_for_the_copy_of_it(config, model, tmp_path, saved) -> None:
    import datasets

    asked = config([saved], base="none", split="test_sft", field="talk")
    screen.run(asked, tmp_path / "run", model=model)
    screen.run(asked, tmp_path / "run", model=model)
    shutil.rmtree(saved)
    table = datasets.Dataset.from_list([{"talk": row["messages"]} for row in chats(4)])
    datasets.DatasetDict({"test_sft": table}).save_to_disk(saved)
    with pytest.raises(UserError, match=r"source of ultra-0\.2 changed"):
        screen.run(asked, tmp_path / "run", model=model)


def test_a_split_of_what_has_none_is_refused(config, tmp_path) -> None:
    for changes, said in (
        ({"split": "test"}, "split 'test' of data.*, where no dataset is"),
        ({"subset": "en"}, "subset 'en' of data.*, where no dataset is"),
        ({"subset": "500", "base": "subset"}, "--base-rows 500"),
    ):
        with pytest.raises(UserError, match=said):
            screen.plan(config(**changes))


def test_many_probes_make_a_table_in_one_piece(config, model, tmp_path, vectors) -> None:
    """Frames of more than 100 blocks that single columns are put into are slow, and pandas warns of them."""
    many = []
    for i in range(40):
        values = torch.randn(model.n_blocks, model.d_model, generator=torch.Generator().manual_seed(i))
        many.append(str(PersonaVectors(f"t{i}", {"response_avg_diff": values}).save(tmp_path / f"t{i}.safetensors")))
    some = replace(config(base="none", blocks=(1,)), vectors=tuple(many))
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.PerformanceWarning)
        result = screen.run(some, tmp_path / "run", model=model)
    assert len(result.probes) == 40
    rows = read_rows(result.rows["data"])
    assert rows.columns[:3].tolist() == ["row", "line", "status"]
    assert rows["line"].tolist() == list(range(1, 11))


def test_a_wrong_filter_is_said_before_anything_is_generated(
    config, model, tmp_path, byte_judge, stage_library, monkeypatch
) -> None:
    monkeypatch.setattr(worker.Worker, "screen", lambda *a: pytest.fail("screened before the filter was opened"))
    (tmp_path / "short.csv").write_text("score\n1\n")
    given, asked = {"select": 2, "library": str(stage_library)}, {"judge": byte_judge}
    wrong = [
        ({"filter_scores": str(tmp_path / "short.csv")}, {}, "has 1 scores"),
        ({"filter_scores": str(tmp_path / "none.csv")}, {}, "cannot be read"),
        ({"filter_scores": "nothing"}, {}, "no row of data has a number"),
        ({"filter_judge": "unheard-of"}, asked, "unheard-of"),
        ({"filter_judge": "gloomy"}, {}, "no judge for"),
    ]
    for options, more, said in wrong:
        with pytest.raises(UserError, match=said):
            screen.run(config(**given, **options), tmp_path / "wrong", model=model, **more)
        shutil.rmtree(tmp_path / "wrong")


def test_the_plan_counts_rows_without_a_model(config) -> None:
    assert "10 rows" in str(screen.plan(config()))
    assert screen.plan(config(base="none")).answers == 0
    assert screen.plan(config(base="subset", base_rows=3)).answers == 3
