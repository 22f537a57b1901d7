"""Matching pursuit against brute force: every residual correlated with every row, every refit by a solver of scipy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pvsae.errors import UserError
from pvsae.saes.pursuit import Atoms, nonnegative_least_squares, pursue

optimize = pytest.importorskip("scipy.optimize", reason="scipy, whose solver is the reference, is not installed")


def rows(n: int = 300, d: int = 24, seed: int = 0) -> torch.Tensor:
    """Random rows of many lengths."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g) * (0.2 + 3 * torch.rand(n, 1, generator=g))


def brute_force(matrix: torch.Tensor, v: torch.Tensor, k: int, nonnegative: bool) -> list[dict[int, float]]:
    """Support and weights after each step, from the definition, in double precision."""
    unit = (matrix.double() / matrix.double().norm(dim=1, keepdim=True)).numpy()
    target, support, out = v.double().numpy(), [], []
    residual = target
    while len(support) < k and np.linalg.norm(residual) > 1e-6 * np.linalg.norm(target):
        score = unit @ residual
        score = score if nonnegative else np.abs(score)
        score[support] = -1
        support = [*support, int(score.argmax())]
        chosen = unit[support].T
        weights = optimize.nnls(chosen, target)[0] if nonnegative else np.linalg.lstsq(chosen, target, rcond=None)[0]
        support, weights = zip(*[(s, w) for s, w in zip(support, weights, strict=True) if w != 0], strict=True)
        support = list(support)
        out.append(dict(zip(support, map(float, weights), strict=True)))
        residual = target - unit[support].T @ np.array(weights)
    return out


@pytest.mark.parametrize("nonnegative", [False, True])
@pytest.mark.parametrize("ahead", [1, 4, 32])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_step_is_that_of_the_definition(nonnegative: bool, ahead: int, seed: int) -> None:
    matrix = rows(seed=seed)
    v = 7 * torch.randn(24, generator=torch.Generator().manual_seed(100 + seed))
    found = pursue(Atoms(matrix), v, 15, nonnegative=nonnegative, ahead=ahead)
    expected = brute_force(matrix, v, 15, nonnegative)
    assert [set(step.latents) for step in found.steps] == [set(step) for step in expected]
    for step, weights in zip(found.steps, expected, strict=True):
        assert dict(zip(step.latents, step.weights, strict=True)) == pytest.approx(weights, abs=1e-5)
        unit = matrix[list(step.latents)].double()
        unit = unit / unit.norm(dim=1, keepdim=True)
        residual = v.double() - torch.tensor(step.weights, dtype=torch.float64) @ unit
        assert step.residual == pytest.approx(float(residual.norm() / v.norm()), abs=1e-6)
    if nonnegative:
        assert all(w > 0 for step in found.steps for w in step.weights)
    else:
        assert any(w < 0 for w in found.steps[-1].weights)


@pytest.mark.parametrize("nonnegative", [False, True])
def test_planted_atoms_are_found_with_their_weights(nonnegative: bool) -> None:
    matrix = rows(4000, 200, seed=5)
    weights = torch.tensor([3.0, 2.5, 2.0, 1.5, 1.0])
    planted = [7, 1234, 3999, 0, 2048]
    if not nonnegative:
        weights[1] *= -1
    unit = matrix[planted] / matrix[planted].norm(dim=1, keepdim=True)
    found = pursue(Atoms(matrix), weights @ unit, 20, nonnegative=nonnegative)
    last = found.steps[-1]
    assert len(found.steps) == 5, "what is explained wholly needs no further atom"
    assert dict(zip(last.latents, last.weights, strict=True)) == pytest.approx(
        dict(zip(planted, weights.tolist(), strict=True)), abs=1e-4
    )
    assert last.explained == pytest.approx(1)


def test_atoms_leave_when_their_weight_becomes_zero() -> None:
    """Planted so that the first atom, near the middle of the two true ones, is of no use once both are there."""
    a, b = torch.eye(3)[0], torch.eye(3)[1]
    middle = (a + b) / 2**0.5 + 0.1 * torch.eye(3)[2]
    found = pursue(Atoms(torch.stack([middle, a, b])), a + b, 3, nonnegative=True)
    assert found.steps[0].latents == (0,)
    assert set(found.steps[-1].latents) == {1, 2}
    assert found.at_most(1).latents == (0,)
    assert set(found.at_most(2).latents) == {1, 2}
    assert found.at_most(0).explained == 0


def test_a_pass_makes_many_columns_and_a_second_vector_finds_them() -> None:
    matrix, v = rows(2000, 64), torch.randn(64, generator=torch.Generator().manual_seed(1))
    atoms = Atoms(matrix)
    one = pursue(atoms, v, 20, nonnegative=False, ahead=1)
    many = pursue(Atoms(matrix), v, 20, nonnegative=False, ahead=64)
    assert many.passes < one.passes <= 22
    assert [s.latents for s in one.steps] == [s.latents for s in many.steps]
    again = pursue(atoms, v, 20, nonnegative=False)
    assert again.passes == 1, "the correlations of v itself; every column was there"
    assert again.steps[-1].latents == one.steps[-1].latents


def test_a_small_memory_of_columns_changes_nothing() -> None:
    matrix, v = rows(500, 40), torch.randn(40, generator=torch.Generator().manual_seed(1))
    whole = pursue(Atoms(matrix), v, 12, nonnegative=True)
    small = Atoms(matrix, columns=5)
    assert [s.latents for s in pursue(small, v, 12, nonnegative=True, ahead=3).steps] == [s.latents for s in whole.steps]


@pytest.mark.parametrize("layout", ["transposed", "bfloat16", "chunks"])
def test_other_layouts_give_the_same(layout: str, monkeypatch) -> None:
    matrix, v = rows(700, 32), torch.randn(32, generator=torch.Generator().manual_seed(3))
    matrix = matrix.bfloat16().float()
    expected = pursue(Atoms(matrix), v, 8, nonnegative=True)
    if layout == "transposed":
        matrix = matrix.T.contiguous().T
    elif layout == "bfloat16":
        matrix = matrix.bfloat16()
    else:
        monkeypatch.setattr("pvsae.saes.pursuit.CHUNK_BYTES", 4 * 32 * 17)
    assert pursue(Atoms(matrix), v, 8, nonnegative=True).steps == expected.steps


def test_dead_rows_twins_and_short_dictionaries() -> None:
    matrix = rows(6, 10)
    matrix[2] = 0
    matrix = torch.cat([matrix, matrix[:1] * 2])  # a twin of row 0
    v = torch.randn(10, generator=torch.Generator().manual_seed(0))
    for nonnegative in (False, True):
        found = pursue(Atoms(matrix), v, 50, nonnegative=nonnegative)
        last = found.steps[-1]
        assert 2 not in last.latents
        assert not {0, 6} <= set(last.latents)
        assert len(set(last.latents)) == len(last.latents)
    assert len(pursue(Atoms(matrix), v, 50, nonnegative=False).steps[-1].latents) == 5


def test_nonnegative_least_squares_is_scipys() -> None:
    g = torch.Generator().manual_seed(0)
    for _ in range(30):
        matrix = torch.randn(12, 8, generator=g, dtype=torch.float64) + 0.5
        b = torch.randn(12, generator=g, dtype=torch.float64)
        ours = nonnegative_least_squares(matrix.T @ matrix, matrix.T @ b)
        assert ours.tolist() == pytest.approx(optimize.nnls(matrix.numpy(), b.numpy())[0].tolist(), abs=1e-9)


def test_what_cannot_be_coded_is_said() -> None:
    atoms = Atoms(rows())
    with pytest.raises(UserError, match=r"\[23\]"):
        pursue(atoms, torch.ones(23), 3, nonnegative=True)
    with pytest.raises(UserError, match="points somewhere"):
        pursue(atoms, torch.zeros(24), 3, nonnegative=True)
    with pytest.raises(UserError, match="k is 0"):
        pursue(atoms, torch.ones(24), 0, nonnegative=True)
    with pytest.raises(UserError, match="all rows"):
        Atoms(torch.zeros(4, 3))
    broken = rows()
    broken[17, 3] = float("nan")
    with pytest.raises(UserError, match="row 17"):
        Atoms(broken)
