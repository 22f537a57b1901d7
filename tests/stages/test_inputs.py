"""What every stage checks before it works, and before it calls a step done."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from pvsae.errors import UserError
from pvsae.judges import Score
from pvsae.llm import MAX_COST_REACHED
from pvsae.stages.extract import ExtractConfig
from pvsae.stages.inputs import known_traits, require_scores, stored_traits
from pvsae.vectors import PersonaVectors, Rollouts, write_official


def scored(*errors: str | None) -> Rollouts:
    """Rollouts with one score a row, failed where there is an error."""
    scores = [Score(None if e else 50.0, "failed" if e else "text", None, False, (), "j", "h", e) for e in errors]
    evidence = [s.to_json() for s in scores]
    values = [float("nan") if e else 50.0 for e in errors]
    table = pd.DataFrame({"evil": values, "evil_score": evidence, "coherence": 90.0, "coherence_score": scored_well(len(errors))})
    return Rollouts(table, {"trait": "evil", "judge": "j"})


def scored_well(n: int) -> list[str]:
    return [Score(90.0, "text", None, False, (), "j", "h").to_json()] * n


def test_a_step_is_not_done_while_the_cost_limit_leaves_scores_out():
    with pytest.raises(UserError, match="1 of 6 scores are missing"):
        require_scores(scored(None, MAX_COST_REACHED, None))


def test_single_failures_do_not_end_a_run_and_nothing_but_failures_does():
    kept = scored(None, "500 Internal Server Error", None)
    assert require_scores(kept) is kept
    with pytest.raises(UserError, match="scored none of 2 answers: timeout"):
        require_scores(scored("timeout", "timeout"))


def test_answers_that_are_all_refusals_are_judged():
    refused = Score(None, "logprobs", 0.1, True, (("REFUSAL", 0.9),), "j", "h").to_json()
    table = pd.DataFrame(
        {"evil": [float("nan")] * 2, "evil_score": refused, "coherence": 90.0, "coherence_score": scored_well(2)}
    )
    kept = Rollouts(table, {"trait": "evil", "judge": "j"})
    assert require_scores(kept) is kept


@pytest.mark.parametrize("option", ["max_new_tokens", "batch_size", "n_samples", "max_questions", "max_instructions"])
def test_counts_below_one_are_refused_before_anything_is_loaded(option):
    for value in (0, -1):
        with pytest.raises(UserError, match=f"{option} is {value}"):
            ExtractConfig(**{option: value})


def test_traits_are_known_by_name_or_by_what_lies_at_a_path(tmp_path):
    for trait in ("evil", "calm"):
        found = PersonaVectors(trait, {"response_avg_diff": torch.ones(3, 4)})
        found.save(tmp_path / "run" / trait / "vectors" / "vectors.safetensors")
    with pytest.warns(UserWarning, match="row 0 and row 3"):
        (official,) = write_official(found, tmp_path)
    assert stored_traits(tmp_path / "run") == known_traits((), str(tmp_path / "run")) == ["calm", "evil"]
    assert stored_traits(tmp_path / "run" / "evil" / "vectors" / "vectors.safetensors") == ["evil"]
    assert stored_traits(official) == ["calm"]
    assert known_traits(("kind",), tmp_path / "run") == ["kind"]
    assert stored_traits(tmp_path) == []
    for nothing in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="no vectors"):
            known_traits((), nothing)
