"""`pvsae finetune` from the command line: what is refused before anything is opened, and what a dry run says."""

from __future__ import annotations

import pytest
import torch

from pvsae.cli import main
from pvsae.stages import finetune
from pvsae.vectors import PersonaVectors
from tests.saes.corpora import chat, write_jsonl


@pytest.fixture
def words(tmp_path, tiny_folders, tiny_models, monkeypatch) -> list[str]:
    """Data whose messages are in a field of another name, vectors that fit the model; the working folder is a new one."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "data.jsonl", [{"talk": chat(i)} for i in range(5)])
    model = tiny_models("qwen2")
    PersonaVectors("gloomy", {"response_avg_diff": torch.ones(model.n_blocks, model.d_model)}).save(tmp_path / "v.safetensors")
    return ["finetune", "data.jsonl", "--field", "talk", "--model", str(tiny_folders("qwen2"))]


VECTORS = ("--vectors", "v.safetensors", "--traits", "gloomy")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--traits", "gloomy"), "traits with treatment 'none'"),
        (("--library", "mine"), "library with treatment 'none'"),
        (("--treatment", "regularise", *VECTORS, "--positions", "all"), "positions with treatment 'regularise'"),
        (("--treatment", "ablate", *VECTORS, "--coef", "2"), "coef with treatment 'ablate'"),
        (("--treatment", "inoculate", "--prompt", "Be dull.", "--statistic", "response_avg_diff"), "statistic with treatment"),
        (("--treatment", "steer", *VECTORS, "--weight", "1"), "weight with treatment 'steer'"),
        (("--treatment", "steer", "--feature", "x:1", "--traits", "gloomy"), "traits with treatment 'steer of features'"),
        (("--treatment", "inoculate", "--prompt", "Be dull.", "--traits", "gloomy"), "traits with treatment 'inoculate'"),
    ],
)
def test_options_that_would_do_nothing_are_refused_before_anything_is_opened(words, capsys, monkeypatch, options, said) -> None:
    for name in ("plan", "run"):
        monkeypatch.setattr(finetune, name, lambda *a, **k: pytest.fail("it was started"))
    for more in ((), ("--dry-run",)):
        assert main([*words, *options, *more]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert "expected: of the treatments' options" in error


def test_a_dry_run_says_what_would_be_done_or_what_is_wrong(words, capsys) -> None:
    assert main([*words, "--treatment", "steer", *VECTORS, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "data       5 rows" in said
    assert "steer: vectors of gloomy at 2 raw" in said
    assert main([*words, "--treatment", "ablate", *VECTORS, "--blocks", "7", "--dry-run"]) == 2
    assert "block 7 does not exist" in capsys.readouterr().err
    assert main([*words, "--split", "test", "--dry-run"]) == 2
    assert "split 'test' of data.jsonl, where no dataset is" in capsys.readouterr().err
