"""Units of strength: what they promise, measured on tiny random models."""

from __future__ import annotations

import math

import pytest
import torch

from pvsae.errors import UserError
from pvsae.models import Add, Direction
from pvsae.stages.strength import calibrate, gap_in_raw, mean_kl
from pvsae.vectors import PersonaVectors


def rows_of(model) -> list:
    prompts = [model.chat.prompt([{"role": "user", "content": text}]) for text in ("Hello.", "What is a harbour for?")]
    return [model.chat.with_answer_text(p, a) for p, a in zip(prompts, ("It floats.", "Ships, and old clocks."), strict=True)]


def test_mean_kl_is_what_one_row_at_a_time_gives(tiny_models) -> None:
    model = tiny_models("qwen2")
    rows = rows_of(model)
    add = Add(Direction(torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))), 2, 1.5)
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row.ids])
        with torch.no_grad():
            plain = model.hf(ids).logits[0].log_softmax(-1)
            with model.hooks([add]):
                steered = model.hf(ids).logits[0].log_softmax(-1)
        for at in range(row.n_prompt - 1, len(row.ids) - 1):
            total += float((plain[at].exp() * (plain[at] - steered[at])).sum())
            count += 1
    assert mean_kl(model, rows, [add]) == pytest.approx(total / count, rel=1e-4)
    assert mean_kl(model, rows, []) == 0.0


@pytest.mark.parametrize("target", [0.05, 0.5, -0.5])
def test_calibration_reaches_the_kl_it_was_asked_for(tiny_models, target: float) -> None:
    model = tiny_models("llama")
    rows = rows_of(model)
    direction = Direction(torch.randn(model.d_model, generator=torch.Generator().manual_seed(1)))
    coef = calibrate(lambda c: mean_kl(model, rows, [Add(direction, 1, c)]), target)
    assert math.copysign(1, coef) == math.copysign(1, target)
    assert mean_kl(model, rows, [Add(direction, 1, coef)]) == pytest.approx(abs(target), rel=0.03)


def test_calibration_that_cannot_succeed_says_so() -> None:
    with pytest.raises(UserError, match="no strength moves the answers"):
        calibrate(lambda c: 0.1, 0.5)
    with pytest.raises(UserError, match="is no strength"):
        calibrate(abs, 0.0)


def test_one_gap_is_one_raw_for_the_vector_that_the_gap_is_made_of() -> None:
    generator = torch.Generator().manual_seed(2)
    response, prompt = torch.randn(3, 8, generator=generator), torch.randn(3, 8, generator=generator)
    prompt = prompt + 2 * response
    vectors = PersonaVectors("evil", {"response_avg_diff": response, "prompt_avg_diff": prompt})
    assert gap_in_raw(vectors, 1) == pytest.approx(1.0, rel=1e-5)
    step = gap_in_raw(vectors, 1, "prompt_avg_diff") * prompt[1]
    unit = prompt[1] / prompt[1].norm()
    assert float(step @ unit) == pytest.approx(float(response[1] @ unit), rel=1e-5)
    with pytest.raises(UserError, match="not above"):
        gap_in_raw(PersonaVectors("evil", {"response_avg_diff": -response, "prompt_avg_diff": prompt}), 1, "prompt_avg_diff")
    with pytest.raises(UserError, match="does not hold"):
        gap_in_raw(PersonaVectors("evil", {"prompt_avg_diff": prompt}), 1, "prompt_avg_diff")
