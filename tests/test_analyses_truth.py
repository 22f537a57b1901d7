"""What the analyses of features do with rankings and cosines, on small made-up truths."""

from __future__ import annotations

import math

import pytest
import torch

from analyses.feature_truth import Judge, config_for
from analyses.vector_geometry import cosines, off_diagonal
from pvsae.saes.dictionary import SparseActs
from pvsae.saes.labelled import Labels
from pvsae.saes.truth import Truth

LABELS = Labels({"a/x": "a", "a/y": "a", "b/x": "b"})


def truth_of(labels_of_latents: list[list[int]]) -> Truth:
    """Latent i is active at one token each of segments with these labels."""
    truth = Truth(LABELS, len(labels_of_latents), top=5)
    label = torch.tensor([n for some in labels_of_latents for n in some])
    latent = torch.tensor([i for i, some in enumerate(labels_of_latents) for _ in some])
    at = torch.arange(len(label))
    truth.add(SparseActs(at, latent, torch.ones(len(label))), at, label)
    return truth


def test_a_ranking_is_judged_by_pure_latents_and_facets():
    judge = Judge(truth_of([[0] * 5, [0, 1] * 3, [2] * 5, [0, 0, 0, 0, 2], [1, 1, 1, 2, 2], [2] * 6, [0] * 4]), LABELS, "a")
    found = judge.of([0, 1, 3, 2, 4])
    assert found.pure == 3  # 0, 1 and 3; 4 is three fifths a, 2 is b
    assert found.facets == {"a/x": 0, "a/y": None}
    assert judge.of([3, 0]).facets["a/x"] == 3
    assert judge.of([2, 5]).n_facets == judge.of([2, 5]).pure == 0
    assert judge.of([6, 0]).pure == 1  # 6 was active too seldom for anybody to know what it means
    assert judge.of([6, 0]).facets["a/x"] == 0
    assert found.precision[5] == pytest.approx(0.6)
    assert found.precision[10] == pytest.approx(0.3)


def test_cosines_are_those_of_the_vectors():
    table = cosines({"a": torch.tensor([2.0, 0.0]), "b": torch.tensor([1.0, 1.0]), "c": torch.zeros(2)})
    assert table.loc["a", "b"] == pytest.approx(math.sqrt(0.5))
    assert table.loc["b", "b"] == pytest.approx(1.0)
    assert math.isnan(table.loc["a", "c"])
    assert off_diagonal(table)[0] == pytest.approx(math.sqrt(0.5))


def test_the_config_for_facets_is_taken_where_a_model_has_one() -> None:
    assert config_for("organism") == "organism-facets"
    assert config_for("organism-llama") == "organism-llama"
