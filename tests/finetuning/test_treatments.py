"""Treatments: strength over the steps, the span of several directions, the penalty's arithmetic."""

from __future__ import annotations

import pytest
import torch

from pvsae.errors import UserError
from pvsae.finetuning.treatments import Schedule, ShiftPenalty, Treatment, ablations, orthonormal
from pvsae.models import Ablate, Add, AddFeature, Direction, incremental
from tests.models.rows import direction
from tests.stages.tiny_sae import open_sae, save_sae


def test_schedules() -> None:
    def over(kind: str, share: float = 0.5, steps: int = 5) -> list[float]:
        return [Schedule(kind, share).factor(step, steps) for step in range(steps)]

    assert over("constant") == [1.0] * 5
    assert over("ramp") == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert over("warmup") == [0.0, 0.5, 1.0, 1.0, 1.0]
    assert over("decay") == [1.0, 1.0, 1.0, 0.5, 0.0]
    assert over("decay", 1.0) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert over("warmup", 0.01, 3) == [0.0, 1.0, 1.0]
    assert over("ramp", steps=1) == [0.0]
    for wrong in (("linear", 0.5), ("ramp", 0.0), ("ramp", 1.5)):
        with pytest.raises(UserError):
            Schedule(*wrong)


def test_a_schedule_scales_what_is_added(tiny_models, tmp_path) -> None:
    model = tiny_models("qwen2")
    sae = open_sae(save_sae(model, tmp_path / "sae"))
    edits = (*incremental(torch.randn(4, model.d_model), 2.0), AddFeature(sae, 3, 4.0, 1))
    treatment = Treatment(edits, Schedule("ramp"))
    half = treatment.at(1, 3)
    assert [edit.coef for edit in half[:4]] == [1.0] * 4
    assert half[4].strength == 2.0
    assert [edit.direction for edit in half[:4]] == [edit.direction for edit in edits[:4]]
    assert treatment.at(2, 3) == edits
    with pytest.raises(UserError, match="Ablate"):
        Treatment((Ablate(direction(model), 1),), Schedule("decay"))


def test_the_whole_span_of_several_directions_is_ablated(tiny_models) -> None:
    model = tiny_models("qwen2")
    a, b = direction(model, 0), direction(model, 1, norm=30.0)
    skew = Direction(a.values + 0.1 * b.values, "skew")  # far from a right angle with a
    h = torch.randn(7, model.d_model)

    def left(edits: tuple[Ablate, ...]) -> float:
        out = h
        for edit in edits:
            out = edit.edit(out.device, out.dtype)(out)
        return max(float((out @ d.unit).abs().max()) for d in (a, skew))

    assert left(ablations({2: (a, skew)})) < 1e-5
    assert left((Ablate(a, 2), Ablate(skew, 2))) > 0.1  # one after the other is not enough
    basis = torch.stack([d.values for d in orthonormal((a, b, skew, a))])
    assert len(basis) == 2  # the others lie in the span of these
    assert torch.allclose(basis @ basis.T, torch.eye(2), atol=1e-6)
    both = ablations({1: (a,), 2: (a, skew)}, "response")
    assert [(edit.block, edit.positions) for edit in both] == [(1, "response"), (2, "response"), (2, "response")]
    with pytest.raises(UserError, match="zero"):
        orthonormal((a, Direction(torch.zeros(model.d_model), "nothing")))


def test_the_penalty_is_the_mean_square_over_directions_summed_over_tokens(tiny_models) -> None:
    model = tiny_models("qwen2")
    a, b, c = (direction(model, i) for i in range(3))
    penalty = ShiftPenalty(((1, (a, b)), (3, (c,))), weight=0.5)
    first, second = penalty.captures
    tuned = {first.key: [[torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0, 6.0]])]], second.key: [[torch.ones(3, 1)]]}
    base = {first.key: [[torch.zeros(2, 2), torch.zeros(1, 2)]], second.key: [[torch.full((3, 1), 3.0)]]}
    assert float(penalty.squares(tuned, base)) == pytest.approx((1 + 4 + 9 + 16 + 25 + 36 + 3 * 4) / 3)
    assert (first.block, second.block) == (1, 3)
    for wrong in (ShiftPenalty((), 1.0), ShiftPenalty(((1, ()),), 1.0), ShiftPenalty(((1, (a,)),), -1.0)):
        with pytest.raises(UserError):
            Treatment(penalty=wrong)
    assert Treatment(penalty=ShiftPenalty(((1, (a,)),), 0.0)).active_penalty is None


def test_a_treatment_can_be_written_down(tiny_models) -> None:
    v = direction(tiny_models("qwen2"))
    said = Treatment((Add(v, 2, 1.5),), Schedule("decay"), ShiftPenalty(((1, (v,)),), 0.1)).describe()
    assert said["edits"][0]["direction"]["sha256"] == v.sha256
    assert said["edits"][0]["coef"] == 1.5
    assert said["schedule"] == {"kind": "decay", "share": 0.5}
    assert said["penalty"]["directions"][0] == {"block": 1, "ref": v.ref, "sha256": v.sha256, "norm": v.norm}
