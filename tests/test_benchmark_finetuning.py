"""The benchmark of finetuning: both loops train the same, and a step's time is that of the step."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks import finetuning
from benchmarks.finetuning import CASES, Case, bare, measure, ours, timed
from pvsae.models import Add, Direction
from tests.finetuning.small import rows_of


@pytest.fixture
def model(tiny_models):
    return tiny_models("qwen2")


@pytest.fixture(autouse=True)
def small_steps(monkeypatch) -> None:
    monkeypatch.setattr(finetuning, "A_STEP", 4)


@pytest.mark.parametrize("case", [Case("plain", 4), Case("steered", 2, 3.0)], ids=lambda case: case.name)
def test_both_loops_have_the_same_losses(model, case) -> None:
    values = torch.randn(model.d_model, generator=torch.Generator().manual_seed(1))
    add = Add(Direction(values), 1, case.coef or 1.0)
    rows = rows_of(model, 8)
    first, second = ours(model, rows, case, 7, add), bare(model, rows, case, 7, add)
    assert first == pytest.approx(second, abs=1e-5)
    assert first[-1] != pytest.approx(first[0], abs=1e-2), "they have learnt"
    other = Case("plain" if case.coef else "steered", case.batch, 0.0 if case.coef else 3.0)
    assert bare(model, rows, other, 7, add) != pytest.approx(second, abs=1e-3), "what the case says is done"


def test_a_step_is_timed_from_its_first_forward_pass_to_that_of_the_next(model) -> None:
    ids = torch.tensor([[1, 2, 3]])

    def slow() -> list[float]:
        time.sleep(0.3)  # is beside the steps
        for _ in range(3):
            for _ in range(2):
                model.hf(input_ids=ids)
            time.sleep(0.05)
        return [0.0] * 3

    found = timed(model, 2, slow)
    assert len(found.clock) == len(found.processor) == 2
    assert all(ms >= 50 for ms in found.clock)
    assert all(processor < clock for processor, clock in zip(found.processor, found.clock, strict=True)), "it slept"
    assert found.beside >= 290
    with pytest.raises(AssertionError, match="one forward pass"):
        timed(model, 1, slow)
    assert not model.hf._forward_pre_hooks


def test_the_measurement_gives_a_ratio_of_medians(model) -> None:
    found = measure(model, rows_of(model, 8), Case("steered", 2, 1.0), 3, 1)
    for name in ("clock", "processor"):
        both = found[name]["ms_a_step"]
        assert found[name]["ratio"] == pytest.approx(both["ours"] / both["bare"])
    assert found["most_apart"] <= 1e-5
    assert {case.batch for case in CASES} == {2, 16}
