"""Outliers: norms in fp32, one filter for all blocks, medians that follow slowly and go on from their state."""

from __future__ import annotations

import json

import pytest
import torch

from pvsae.errors import UserError
from pvsae.saes.outliers import MEMORY, RunningMedians, inliers, norms_of


def test_norms_are_taken_in_fp32() -> None:
    x = torch.full((3, 4096), 3.0, dtype=torch.bfloat16)
    assert norms_of({1: x})[1].tolist() == [192.0] * 3
    with pytest.raises(UserError, match="at block 2"):
        norms_of({1: x, 2: x * float("inf")})


def test_a_token_has_to_be_an_inlier_at_every_block() -> None:
    norms = {1: torch.tensor([1.0, 9.9, 10.1, 1.0]), 4: torch.tensor([200.0, 1.0, 1.0, 2.0])}
    medians = {1: 1.0, 4: 10.0}
    assert inliers(norms, medians, 10.0).tolist() == [False, True, False, True]
    assert inliers(norms, medians, None).all()


def test_the_first_passes_count_alike_and_later_ones_move_it_slowly() -> None:
    medians = RunningMedians({1: 2.0})
    for value in (4.0, 6.0, 8.0):
        medians.update({1: torch.full((5,), value)})
    assert medians.values[1] == pytest.approx(5.0)
    for _ in range(MEMORY):
        medians.update({1: torch.full((5,), 5.0)})
    medians.update({1: torch.full((5,), 105.0)})
    assert medians.values[1] == pytest.approx(6.0)
    medians.update({1: torch.zeros(0)})
    assert medians.values[1] == pytest.approx(6.0)


def test_a_state_is_plain_and_goes_on() -> None:
    medians = RunningMedians({1: 2.0, 3: 7.0})
    medians.update({1: torch.rand(9), 3: torch.rand(9)})
    again = RunningMedians.of_state(json.loads(json.dumps(medians.state())))
    for m in (medians, again):
        m.update({1: torch.ones(3), 3: torch.ones(3)})
    assert again.state() == medians.state()
