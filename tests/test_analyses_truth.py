"""What the analyses of features do with rankings and cosines, on small made-up truths."""

from __future__ import annotations

import json
import math
import sys

import pandas as pd
import pytest
import torch

from analyses import feature_truth, vector_geometry
from analyses.feature_truth import WAYS, Judge, config_for
from analyses.vector_geometry import cosines, off_diagonal
from benchmarks import record
from pvsae.models import load as load_model
from pvsae.saes.dictionary import SparseActs
from pvsae.saes.labelled import Labels
from pvsae.saes.truth import Truth
from pvsae.stages import ExtractConfig, extract
from tests.browser import assert_fine, page_of
from tests.test_analyses_features import hand_made

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


def test_every_question_counts_the_same_in_a_difference_of_encodings() -> None:
    weights = feature_truth._weights([7, 7, 7, 9])
    of_pairs = torch.tensor([[1.0], [2.0], [3.0], [10.0]])
    assert float((of_pairs * weights[:, None]).mean()) == pytest.approx((2.0 + 10.0) / 2)


@pytest.mark.slow
def test_both_analyses_on_the_embedded_model(tmp_path, monkeypatch, capsys) -> None:
    """Vectors of two traits from few answers, a dictionary made by hand: every way has its nulls, every space its cosines."""
    model = load_model("organism")
    sae = hand_made(model, tmp_path)[1]
    options = {"n_samples": 1, "max_instructions": 2, "max_questions": 6}
    extract.run(ExtractConfig(traits=("evil", "sycophantic"), **options), tmp_path / "extract", model=model)
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    shared = ["--quick", "--traits", "evil", "sycophantic", "--vectors", f"{tmp_path}/extract", "--out", f"{tmp_path}/out"]
    monkeypatch.setattr(sys, "argv", ["feature_truth", *shared, "--dictionaries", sae])
    feature_truth.main()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["checks"]
    table = pd.read_csv(tmp_path / "out" / "feature_truth" / "table.csv")
    assert table.groupby("trait")["way"].apply(list).to_dict() == {"evil": list(WAYS), "sycophantic": list(WAYS)}
    nulls = table[["null pure of 5", "null facets", "nulls with 4 of 5", "nulls with every facet"]]
    assert nulls.notna().all(axis=None), "each of the three ways beside the same answers with swapped labels"
    own = table[table["trait"] == "evil"]
    assert (own["pure of 5"] > own["null pure of 5"]).all(), "a latent a facet, found from the vector and not from chance"
    monkeypatch.setattr(sys, "argv", ["vector_geometry", *shared, "--dictionary", sae])
    vector_geometry.main()
    checks = json.loads(capsys.readouterr().out.splitlines()[-1])["checks"]
    assert len(checks) == 3
    assert all(c["ok"] for c in checks)
    for space in vector_geometry.SPACES:
        found = pd.read_csv(tmp_path / "out" / "vector_geometry" / f"{space.replace(' ', '_')}.csv", index_col=0)
        assert found.loc["evil", "evil"] == pytest.approx(1.0)
        assert found.loc["evil", "sycophantic"] == pytest.approx(found.loc["sycophantic", "evil"])
    figures = [tmp_path / "out" / name for name in ("feature_truth/purity.png", "vector_geometry/cosines.png")]
    assert_fine(page_of(*figures, folder=tmp_path / "shown"), tmp_path / "browser", images=2)
