"""`pvsae screen` and `pvsae gate` from the command line: options, exit codes, what is printed."""

from __future__ import annotations

import json

import pytest
import torch

from pvsae.cli import main
from pvsae.vectors import PersonaVectors
from tests.screening.chats import chats, write_jsonl


@pytest.fixture
def words(tmp_path, tiny_folders, tiny_models, monkeypatch):
    """The arguments that both commands share; the working folder is a new one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    model = tiny_models("qwen2")
    values = torch.randn(model.n_blocks, model.d_model, generator=torch.Generator().manual_seed(0))
    PersonaVectors("gloomy", {"response_avg_diff": values}).save(tmp_path / "gloomy.safetensors")
    write_jsonl(tmp_path / "data.jsonl", chats(6))
    common = ["data.jsonl", "--model", str(tiny_folders("qwen2")), "--vectors", "gloomy.safetensors"]
    return [*common, "--base", "none", "--dtype", "float32"]


def test_screen_writes_tables_a_figure_and_a_page(words, tmp_path, capsys) -> None:
    assert main(["screen", *words, "--layer", "2", "3", "--select", "2", "--out", "run"]) == 0
    printed = capsys.readouterr().out
    assert "gloomy" in printed
    assert "report: run/report.html" in printed
    assert len(list((tmp_path / "run" / "selections").rglob("top.jsonl"))) == 2
    assert {p.parent.name for p in (tmp_path / "run" / "selections").rglob("top.jsonl")} == {"gloomy_block1", "gloomy_block2"}
    assert (tmp_path / "run" / "figures" / "screening.png").stat().st_size > 1000
    assert "projection difference" in (tmp_path / "run" / "report.html").read_text().lower()


def test_screen_says_what_it_would_do(words, capsys) -> None:
    assert main(["screen", *words, "--dry-run"]) == 0
    assert "6 rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "said"), [("--workers", "--engine ray"), ("--base-rows", "base answers"), ("--n-samples", "base answers")]
)
def test_an_option_that_does_nothing_is_refused(words, capsys, option, said) -> None:
    for command in (["screen"], ["gate", "--trait", "gloomy", "--max-dp", "1"]):
        assert main([command[0], *words, *command[1:], option, "3", "--dry-run"]) == 2
        assert f"{option} does nothing here: it is for {said}" in capsys.readouterr().err


def test_gate_ends_with_1_for_bad_data_and_with_2_for_wrong_input(words, tmp_path, capsys) -> None:
    gate = ["gate", *words, "--trait", "gloomy", "--blocks", "1", "--out", "gate"]
    assert main([*gate, "--max-dp", "1e9"]) == 0
    assert capsys.readouterr().out.splitlines()[-2] == "gate: passed"
    assert main([*gate, "--max-dp", "-1000000", "--junit", "gate.xml", "--github"]) == 1
    printed = capsys.readouterr().out
    assert "::error file=data.jsonl,line=1," in printed
    assert "gate: 1 of 2 checks failed" in printed
    assert (tmp_path / "gate.xml").read_text().count("<failure") == 1
    assert main([*gate, "--max-dp", "1", "--show", "-1"]) == 2
    assert "--show is -1" in capsys.readouterr().err
    assert main(gate) == 2
    assert "no limit" in capsys.readouterr().err
    assert main([*gate, "--max-dp", "1", "--layer", "2"]) == 2
    assert "one of them" in capsys.readouterr().err


def test_gate_finds_its_limit_and_speaks_to_github_by_itself(words, tmp_path, capsys, monkeypatch) -> None:
    options = [*words[1:], "--trait", "gloomy", "--blocks", "1"]
    found = ["--calibrate", "data.jsonl", "--quantile", "0.5", "--write-limits", "limits.json"]
    assert main(["gate", *options, *found, "--out", "normal"]) == 0
    assert "0.5 of 6 normal rows" in capsys.readouterr().out
    assert json.loads((tmp_path / "limits.json").read_text())["limits"]["gloomy, block 1"]["quantile"] == 0.5
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    assert main(["gate", "data.jsonl", *options, "--limits", "limits.json", "--out", "gate"]) == 1
    assert capsys.readouterr().out.count("::error file=") == 3


def test_the_gate_needs_no_folder_for_what_one_job_does_after_the_other(words, tmp_path, capsys) -> None:
    options = [*words[1:], "--trait", "gloomy", "--blocks", "1"]
    write_jsonl(tmp_path / "normal.jsonl", chats(5))
    assert main(["gate", "--calibrate", "normal.jsonl", "--quantile", "0.99", *options, "--write-limits", "limits.json"]) == 0
    check = ["gate", "data.jsonl", *options, "--limits", "limits.json", "--allow", "1"]
    assert main(check) == 0
    write_jsonl(tmp_path / "data.jsonl", chats(4))  # the next commit's data in the same workspace
    assert main(check) == 0
    assert main(check) == 0
    names = sorted(p.name.rpartition("-")[0] for p in (tmp_path / "runs").iterdir())
    assert names == ["gate-calibrate", "gate-data", "gate-data"]  # the same data once more is the same run
    assert "all 4 rows were scored" in capsys.readouterr().out


def test_a_finished_screening_may_be_selected_from(words, tmp_path) -> None:
    screen = ["screen", *words, "--blocks", "1", "--out", "run"]
    assert main([*screen, "--select", "3"]) == 0
    found = tmp_path / "run" / "selections"
    assert {len(p.read_text().splitlines()) for p in found.rglob("*.jsonl")} == {3}
    assert main([*screen, "--select", "2"]) == 0
    assert {len(p.read_text().splitlines()) for p in found.rglob("*.jsonl")} == {2}
    assert main(screen) == 0
    assert not found.exists()
    assert not (tmp_path / "run" / "tables" / "selections.csv").exists()


def test_a_gate_that_breaks_does_not_look_like_bad_data(words, capsys, monkeypatch) -> None:
    from pvsae.stages import gate

    monkeypatch.setattr(gate, "run", lambda *a: {}["data"])
    assert main(["gate", *words, "--trait", "gloomy", "--blocks", "1", "--max-dp", "1"]) == 3
    assert "KeyError: 'data'" in capsys.readouterr().err


def test_both_take_a_split_of_a_dataset(words, tmp_path, capsys, monkeypatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    tables = {name: datasets.Dataset.from_list(chats(n)) for name, n in (("train_sft", 6), ("test_sft", 4))}
    datasets.DatasetDict(tables).save_to_disk(str(tmp_path / "ultra"))
    words = ["ultra", *words[1:], "--blocks", "1"]
    assert main(["screen", *words, "--split", "test_sft", "--dry-run"]) == 0
    assert "ultra: 4 rows" in capsys.readouterr().out
    assert main(["gate", *words, "--split", "train_sft", "--max-dp", "1e9"]) == 0
    assert "all 6 rows were scored" in " ".join(capsys.readouterr().out.split())
    assert main(["gate", *words, "--split", "test_sft", "--max-dp", "1e9"]) == 0, "another split is another run"
    assert main(["gate", *words, "--max-dp", "1e9"]) == 2
    assert "one of train_sft, test_sft" in capsys.readouterr().err
    assert main(["screen", *words, "--base", "subset", "--subset", "3"]) == 2
    assert "--base-rows 3" in capsys.readouterr().err
