"""The gate on a tiny model: which rows break it, what a baseline lets pass, and what CI systems are told."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from pvsae.errors import UserError
from pvsae.reports.gate import as_text, github_lines, write_junit
from pvsae.runs import read_json
from pvsae.stages import GateConfig, gate, screen
from pvsae.stages.gate import quantile_of
from pvsae.stages.screened_rows import read_rows
from pvsae.vectors import PersonaVectors
from tests.screening.chats import chat, chats, write_jsonl

COLUMN = "gloomy_dp_block1"


@pytest.fixture(scope="module")
def model(tiny_models):
    return tiny_models("qwen2")


@pytest.fixture(scope="module")
def vector(tmp_path_factory, model) -> str:
    values = torch.randn(model.n_blocks, model.d_model, generator=torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("vectors") / "gloomy.safetensors"
    return str(PersonaVectors("gloomy", {"response_avg_diff": values}).save(path))


@pytest.fixture
def check(tmp_path, vector, model):
    """Runs a gate on data.jsonl; base answers are shared between runs."""

    def run(rows=None, *, out="run", **options):
        if rows is not None:
            write_jsonl(tmp_path / "data.jsonl", rows)
        options = {"data": (str(tmp_path / "data.jsonl"),), "blocks": (1,), "max_new_tokens": 6, **options}
        config = GateConfig(vectors=(vector,), answers=str(tmp_path / "answers"), **options)
        return gate.run(config, tmp_path / out, model=model)

    return run


@pytest.fixture
def scores(check, tmp_path) -> np.ndarray:
    """dP of the ten rows, which are now in data.jsonl."""
    check(chats(10), max_dp=1e9, out="scores")
    return read_rows(tmp_path / "scores" / "rows" / "data" / "rows.parquet")[COLUMN].to_numpy()


def test_rows_above_the_limit_fail_with_line_and_text(check, scores, tmp_path) -> None:
    order = np.argsort(-scores)
    between = float(scores[order[1:3]].mean())
    result = check(max_dp=between)
    assert not result.passed
    assert result.offending["line"].tolist() == [int(i) + 1 for i in order[:2]]  # the worst first
    assert result.offending["dp"].tolist() == pytest.approx(scores[order[:2]].tolist(), abs=1e-4)
    assert result.offending["excerpt"].tolist() == [chats(10)[i]["messages"][1]["content"].strip() for i in order[:2]]
    assert [(c.name, c.passed) for c in result.checks] == [
        ("every row can be scored", True),
        ("rows along gloomy, block 1", False),
    ]
    assert check(max_dp=between, allow=0.2).passed  # another limit needs no other run
    assert not check(max_dp=between, allow=0.19).passed
    assert check(max_dp=float(scores.max())).passed


def test_a_row_that_cannot_be_scored_does_not_slip_through(check) -> None:
    rows = [*chats(2), b"broken", chat("What?", " ")]
    result = check(rows, max_dp=1e9)
    assert not result.passed
    assert result.offending["line"].tolist() == [3, 4]
    assert result.offending["why"].tolist() == ["malformed: a line that is not JSON", "empty answer: an answer without text"]
    assert check(max_dp=1e9, allow_unusable=True).passed


def test_the_whole_data_set_has_a_limit_of_its_own(check, scores) -> None:
    mean = float(scores.mean())
    assert check(max_data_dp=mean + 0.01).passed
    result = check(max_data_dp=mean - 0.01)
    assert [c.passed for c in result.checks] == [True, False]
    assert "the limit ends at" in result.checks[1].message


def test_a_limit_is_a_quantile_of_normal_data(check, scores, tmp_path) -> None:
    files = {"calibrate": (str(tmp_path / "data.jsonl"),), "write_limits": str(tmp_path / "limits.json")}
    found = check(data=(), quantile=0.7, **files, out="normal")
    assert found.passed
    assert not found.checks
    limit = found.limits["gloomy, block 1"]
    assert limit.max_dp == pytest.approx(np.quantile(scores, 0.7), abs=1e-4)
    assert any("fewer than 5" in note for note in found.notes)
    later = check(limits=str(tmp_path / "limits.json"))
    assert later.limits == found.limits
    assert len(later.offending) == (scores > limit.max_dp).sum() == 3
    assert "about 3.0 would" in later.checks[1].message
    together = check(quantile=0.7, calibrate=files["calibrate"], out="together")
    assert together.limits == found.limits
    assert len(together.checks) == 2  # the normal data is not checked


def test_the_interval_of_a_quantile_holds_the_true_one() -> None:
    rng = np.random.default_rng(0)
    found = [quantile_of(rng.normal(size=1000), 0.99) for _ in range(300)]
    inside = np.mean([f["low"] <= 2.3263 <= f["high"] for f in found])
    assert 0.9 <= inside <= 0.99


def test_a_baseline_lets_what_is_known_pass_and_nothing_else(check, scores, tmp_path) -> None:
    limit = float(np.sort(scores)[-3:-1].mean())  # two rows lie above
    known = str(tmp_path / "known.json")
    assert not check(max_dp=limit, write_baseline=known).passed
    assert check(max_dp=limit, baseline=known, out="again").passed
    assert check(baseline=known, out="again").passed  # the limit is in it too
    moved = check(chats(10)[::-1], max_dp=limit, baseline=known, out="moved")
    assert moved.passed  # lines moved, rows did not change
    assert "2 more are in the baseline" in moved.checks[1].message
    result = check(max_dp=-1e9, baseline=known, out="moved")
    assert not result.passed
    assert sorted(result.offending["line"]) == sorted(10 - int(i) for i in np.argsort(scores)[:-2])  # all but the known two


def test_a_data_set_that_got_worse_than_its_baseline_fails(check, scores, tmp_path) -> None:
    known = str(tmp_path / "known.json")
    check(max_dp=1e9, write_baseline=known)
    order = np.argsort(scores)
    kinder = check([chats(10)[i] for i in order[:4]], baseline=known, out="kinder")
    assert kinder.passed
    worse = check([chats(10)[order[-1]]] * 3, baseline=known, out="worse")
    assert not worse.passed
    assert "the baseline's interval" in next(c for c in worse.checks if not c.passed).name


def test_files_of_another_measurement_are_refused(check, scores, tmp_path) -> None:
    check(calibrate=(str(tmp_path / "data.jsonl"),), write_limits=str(tmp_path / "limits.json"), out="normal")
    with pytest.raises(UserError, match="measured with another base"):
        check(limits=str(tmp_path / "limits.json"), base="none", out="other")
    limits = read_json(tmp_path / "limits.json")
    limits["about"]["vectors"] = {"gloomy, block 1": "0"}
    (tmp_path / "limits.json").write_text(json.dumps(limits))
    with pytest.raises(UserError, match="another vector gloomy, block 1"):
        check(limits=str(tmp_path / "limits.json"))
    (tmp_path / "limits.json").write_text("[]")
    with pytest.raises(UserError, match="is no limits"):
        check(limits=str(tmp_path / "limits.json"))


def _written(check, tmp_path) -> tuple[str, str]:
    """A file of limits and a baseline, of three rows in data.jsonl."""
    write_jsonl(tmp_path / "data.jsonl", chats(3))
    limits, known = str(tmp_path / "limits.json"), str(tmp_path / "known.json")
    check(calibrate=(str(tmp_path / "data.jsonl"),), write_limits=limits, write_baseline=known, out="normal")
    return limits, known


@pytest.mark.parametrize(
    "options", [{"temperature": 0.1}, {"seed": 5}, {"max_new_tokens": 3}, {"n_samples": 2}, {"max_length": 9}]
)
def test_numbers_of_other_base_answers_or_lengths_are_no_limits(check, tmp_path, monkeypatch, options) -> None:
    limits, known = _written(check, tmp_path)
    monkeypatch.setattr(screen, "run", lambda *a, **k: pytest.fail("screened before the files were read"))
    for given in ({"limits": limits}, {"baseline": known}):
        with pytest.raises(UserError, match=r"measured with another (sampling|n_samples|max_length)"):
            check(**given, **options, out="other")


def test_damaged_files_are_refused_before_anything_is_generated(check, tmp_path, monkeypatch) -> None:
    limits, known = _written(check, tmp_path)
    good = {"limits": read_json(limits), "baseline": read_json(known)}
    label = "gloomy, block 1"
    wrong = [
        ("baseline", good["limits"], "is no baseline"),
        ("limits", {**good["limits"], "limits": {label: {"quantile": 0.9}}}, "is no limits"),
        ("limits", {**good["limits"], "limits": {label: {"max_dp": None}}}, "is no limits"),
        ("limits", {**good["limits"], "limits": {}}, "no limit along gloomy, block 1"),
        ("limits", {**good["limits"], "limits": {"gloomy, block 2": {"max_dp": 1.0}}}, "no limit along gloomy, block 1"),
        ("limits", {"about": good["limits"]["about"]}, "is no limits"),
        ("baseline", {**good["baseline"], "data": {"data": {label: {"dp": "a", "high": 1.0, "rows": {}}}}}, "is no baseline"),
        ("baseline", {**good["baseline"], "data": {"data": {label: {"dp": 1.0, "high": 1.0}}}}, "is no baseline"),
    ]
    monkeypatch.setattr(screen, "run", lambda *a, **k: pytest.fail("screened before the files were read"))
    for what, content, said in wrong:
        (tmp_path / "wrong.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=said):
            check(**{what: str(tmp_path / "wrong.json")}, out="wrong")


def test_a_baseline_of_data_that_could_not_be_scored_is_no_limit(check, tmp_path) -> None:
    known = str(tmp_path / "known.json")
    check([chat("What?", " ")], max_data_dp=1e9, write_baseline=known, out="bad")
    result = check(chats(3), baseline=known, out="good")
    assert [(c.name, c.passed) for c in result.checks] == [
        ("every row can be scored", True),
        ("a limit along gloomy, block 1", False),  # else it would pass with nothing checked
    ]
    assert check(chats(3), baseline=known, max_dp=1e9, out="good").passed


def test_data_of_which_nothing_was_scored_never_passes(check) -> None:
    result = check([b"broken", chat("What?", " ")], max_dp=1e9, allow_unusable=True)
    assert not result.passed
    assert not result.checks[0].passed


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "no limit"),
        ({"max_dp": 1.0, "limits": "x.json"}, "max_dp and limits are given"),
        ({"max_dp": float("nan")}, "max_dp is nan"),
        ({"max_dp": 1.0, "data": ()}, "nothing to check"),
        ({"calibrate": ("a",), "quantile": 1.0}, "quantile is 1.0"),
        ({"max_dp": 1.0, "allow": 2.0}, "allow is 2.0"),
        ({"max_dp": 1.0, "write_limits": "limits.json"}, "write_limits without normal data"),
        ({"limits": "limits.json", "quantile": 0.5}, "quantile without normal data"),
    ],
)
def test_wrong_options_are_said_before_any_work(check, options, said) -> None:
    with pytest.raises(UserError, match=said):
        check(chats(2), **options)


def test_junit_and_annotations_name_the_rows(check, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    evil = chat("What?", "100%: a, b\x0b\nand <tags> & more")
    result = check([*chats(3), b"broken", evil], max_dp=-1e9)
    write_junit(result, tmp_path / "gate.xml", most=2)
    root = ElementTree.parse(tmp_path / "gate.xml").getroot()
    assert (root.get("tests"), root.get("failures")) == ("2", "2")
    cases = root.findall("./testsuite[@name='data']/testcase")
    assert [c.get("name") for c in cases] == ["every row can be scored", "rows along gloomy, block 1"]
    assert cases[0].find("failure").text == "data.jsonl:4: malformed: a line that is not JSON: broken"
    assert "and 2 more" in cases[1].find("failure").text
    lines = github_lines(result)
    assert all(line.startswith("::error ") and "\n" not in line for line in lines)
    (row,) = [line for line in lines if "line=5" in line]
    assert row.startswith("::error file=data.jsonl,line=5,title=pvsae gate%3A gloomy dP ")
    assert row.endswith("100%25: a, b and <tags> & more")
    text = as_text(result, most=1)
    assert "FAIL  data: rows along gloomy, block 1" in text
    assert text.endswith("gate: 2 of 2 checks failed")
    assert read_json(tmp_path / "run" / "result.json")["passed"] is False


def test_a_gate_that_holds_says_so(check, tmp_path) -> None:
    result = check(chats(3), max_dp=1e9)
    assert github_lines(result) == []
    assert as_text(result).endswith("gate: passed")
    write_junit(result, tmp_path / "gate.xml")
    assert ElementTree.parse(tmp_path / "gate.xml").getroot().get("failures") == "0"
