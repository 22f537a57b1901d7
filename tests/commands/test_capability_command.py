"""`pvsae capability` from the command line: options that would do nothing are refused before anything is opened."""

from __future__ import annotations

import pytest

from pvsae.cli import main
from pvsae.stages import capability


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--traits", "evil", "--coefs", "3", "--blocks", "2"), "traits, blocks, coefs with neither vectors nor features"),
        (("--coefs", "1", "2"), "coefs with neither vectors nor features"),
        (("--positions", "all"), "positions with neither vectors nor features"),
        (("--library", "mine"), "library with neither vectors nor features"),
        (("--other-model",), "other_model with neither vectors nor features"),
        (("--vectors", "v", "--blocks", "2", "--layers", "nowhere"), "both blocks and layers"),
        (("--vectors", "v", "--library", "mine"), "library with vectors and the unit raw"),
        (("--feature", "sae:1", "--n-random", "1"), "n_random with features"),
        (("--feature", "sae:1", "--unit", "raw", "--activity", "run"), "activity with features, mode add, and the unit raw"),
    ],
)
def test_options_that_would_do_nothing_are_refused(tmp_path, capsys, monkeypatch, options, said) -> None:
    """Defaults too, where they are given: who gives them thinks that they count."""
    monkeypatch.chdir(tmp_path)
    for name in ("plan", "run"):
        monkeypatch.setattr(capability, name, lambda *a, **k: pytest.fail("it was started"))
    for more in ((), ("--dry-run",)):
        assert main(["capability", *options, *more]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--vectors", "v", "--traits", "evil", "--unit", "kl", "--library", "mine", "--layers", "run", "--n-random", "0"),
        ("--vectors", "v", "--multi-layer", "--ablate", "--statistic", "prompt_avg_diff", "--positions", "all"),
        ("--feature", "sae:1", "--mode", "clamp", "--activity", "run", "--blocks", "2", "--coefs", "1", "--other-model"),
        ("--feature", "sae:1", "--mode", "ablate", "--positions", "response"),
        ("--against", "run", "--other-model"),
    ],
)
def test_options_that_do_something_are_taken(tmp_path, capsys, monkeypatch, options) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(capability, "plan", lambda config: "taken")
    assert main(["capability", *options, "--dry-run"]) == 0
    assert capsys.readouterr().out == "taken\n"
