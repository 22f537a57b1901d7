"""The analyses of finetuning: shifts and correlations on small made-up tables, and one real finetune that is measured twice."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from analyses import foretelling, tuned
from analyses.finetuning_shift import checks_of, shift
from analyses.pipeline import Prepared, parser
from analyses.projection_difference import beside_scores
from pvsae import load
from pvsae.errors import UserError

FAMILIES = ("evil", "narrow a", "narrow b", "narrow c")


def made_up(slope: float = 1.0) -> pd.DataFrame:
    """Four families of two severities: only the evil family's scores follow the values, those of the others fall with them."""
    rows = []
    for f, family in enumerate(FAMILIES):
        for severity in (0, 1):
            value = 10.0 * severity if family == "evil" else float(f)
            score = 90.0 * severity if family == "evil" else 10.0 - f
            rows.append(
                {
                    "data": f"{family}/{severity}", "family": family, "severity": str(severity),
                    "made_for": "evil" if family == "evil" else "", "trait": "evil", "vector": "evil", "value": slope * value,
                    "score": score,
                }
            )  # fmt: skip
    table = pd.DataFrame(rows)
    other = table.assign(vector="sycophantic", value=-table["value"])
    part = table.assign(vector=foretelling.SPECIFIC, value=table["score"] + 1.0)
    return pd.concat([table, other, part], ignore_index=True)


def arguments(*words: str) -> argparse.Namespace:
    return tuned.options(parser("")).parse_args(words)


def test_the_shift_is_the_projection_of_the_difference_of_means():
    before = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    after = torch.tensor([[1.0, 4.0], [5.0, 8.0]])  # means (1, 0) and (3, 6)
    assert shift(before, after, torch.tensor([0.0, 5.0])).item() == pytest.approx(6.0)
    assert shift(before, after, torch.tensor([[2.0, 0.0], [-3.0, -3.0]])).tolist() == pytest.approx([2.0, -8.0 / math.sqrt(2)])


def test_r_stands_beside_r_without_the_data_made_for_the_trait():
    found = foretelling.correlations(made_up()).set_index("vector")
    own, other = found.loc["evil"], found.loc["sycophantic"]
    assert own["own"]
    assert not other["own"]
    assert own["n"] == 8
    assert own["n_others"] == 6
    assert own["spread_others"] == 2.0
    assert own["r"] > 0.9
    assert own["r_others"] == pytest.approx(-1.0)
    assert own["spearman_others"] == pytest.approx(-1.0)
    assert other["r"] == pytest.approx(-own["r"])


def test_the_specific_part_is_what_no_other_vector_shares():
    shared = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])  # another one in each of two blocks
    vectors = {"a": 3 * shared + torch.tensor([0.0, 0.0, 2.0, 0.0]), "b": -2 * shared}
    assert foretelling.specific(vectors, "a").numpy() == pytest.approx(np.array([[0.0, 0.0, 2.0, 0.0]] * 2), abs=1e-6)
    assert foretelling.specific(vectors, "b").norm(dim=1).tolist() == pytest.approx([2 * 2 / math.sqrt(13)] * 2)
    assert torch.equal(foretelling.specific({"a": vectors["a"]}, "a"), vectors["a"])


def test_nulls_are_compared_without_their_sign():
    values = made_up()
    scores = values.loc[values["vector"] == "evil", "score"].to_numpy()
    flat = np.zeros_like(scores)
    flat[0] = 1.0
    nulls = foretelling.null_rs(values, {"evil": np.stack([scores, -scores, flat, flat])})
    assert nulls["evil"][:2] == pytest.approx([1.0, -1.0])
    row = foretelling.summary(foretelling.correlations(values), nulls).iloc[0]
    assert row["random_reaching"] == pytest.approx(0.5)
    assert row["cross_highest_vector"] == "sycophantic"
    assert row["r_specific"] == pytest.approx(1.0)
    assert row["random_reaching_specific"] == pytest.approx(0.5)
    assert row["cross_lowest"] == row["cross_highest"] < -0.9


def test_the_figure_has_a_point_a_data_set_and_a_line_a_vector(tmp_path: Path):
    values = made_up()
    table = foretelling.correlations(values)
    file = foretelling.draw(values, table, {"evil": np.linspace(-1, 1, 30)}, "shift", tmp_path / "new" / "shift.png")
    assert file.read_bytes().startswith(b"\x89PNG")


def test_data_sets_are_all_families_and_severities_or_files(tmp_path: Path):
    every = tuned.data_of(arguments(), ["evil"])
    assert len({one.name for one in every}) == 24
    assert {one.trait for one in every} == {"evil", "sycophantic", "hallucinating", None}
    assert all(one.word == f"organism-data:{one.name}" for one in every)
    for name in ("hallucination/normal", "mistake_math/normal"):
        file = tmp_path / f"{name}.jsonl"
        file.parent.mkdir(parents=True)
        file.write_text('{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n')
    found = tuned.data_of(arguments("--data", f"{tmp_path}/*/*.jsonl"), ["hallucinating"])
    assert [(one.name, one.trait) for one in found] == [("hallucination/normal", "hallucinating"), ("mistake_math/normal", None)]
    assert list(found[0].answers(5)) == [("q", "a")]
    with pytest.raises(UserError, match="no file is called"):
        tuned.data_of(arguments("--data", f"{tmp_path}/*.json"), [])


def test_the_setting_is_of_whole_steps():
    assert tuned.setting_of(arguments()).rows == 160
    assert tuned.setting_of(arguments("--rows", "0")).rows is None
    with pytest.raises(UserError, match="--batch 3"):
        tuned.setting_of(arguments("--batch", "3"))
    with pytest.raises(UserError, match="no end"):
        tuned.data_of(arguments("--rows", "0"), [])


def test_checks_count_a_rise_only_where_the_data_never_show_the_trait():
    scores = pd.DataFrame(
        [{"data": "evil/misaligned_2", "made_for": "evil", "trait": "evil", "severity": "misaligned_2", "score": 61}]
    )
    table = pd.DataFrame([{"trait": "evil", "r": 0.84, "random_reaching": 0.0, "r_specific": 0.9}])
    for shown, ok in ((0.0, True), (40.0, False)):
        narrow = pd.DataFrame([{"rise": 50.0, "shown": shown}])
        assert [one["ok"] for one in checks_of(scores, narrow, table)] == [True, ok, False, True, True]


def test_random_directions_are_told_from_vectors_and_blocks_from_each_other():
    scores = made_up().query("vector == 'evil'").drop(columns=["vector", "value"]).assign(before=0.0, rise=0.0, coherence=99.0)
    rows = [
        {"data": name, "vector": vector, "block": block, "dp": 100.0 * block + 10.0 * v + d}
        for d, name in enumerate(reversed(scores["data"].tolist()))
        for v, vector in enumerate(("evil", "specific-evil", "random-000", "random-001", "specific-sycophantic"))
        for block in (1, 2)
    ]
    values, nulls = beside_scores(pd.DataFrame(rows), scores, ["evil"], {"evil": 2})
    own = values[values["vector"] == "evil"]
    assert own["data"].tolist() == scores["data"].tolist()
    assert own["value"].tolist() == [200.0 + d for d in range(7, -1, -1)]
    assert own["score"].tolist() == scores["score"].tolist()
    assert set(values["vector"]) == {"evil", foretelling.SPECIFIC}
    assert values.loc[values["vector"] == foretelling.SPECIFIC, "value"].tolist() == [210.0 + d for d in range(7, -1, -1)]
    assert nulls["evil"].tolist() == [[200.0 + 10 * v + d for d in range(7, -1, -1)] for v in (2, 3)]


@pytest.mark.slow
def test_a_finetune_is_measured_once_and_read_back(tmp_path: Path):
    model = load("organism")
    options = {"model": "organism", "traits": ("evil",), "batch_size": 64}
    prepared = Prepared(model, options, "", "", {"evil": 3}, tmp_path, quick=True)
    data = [one for one in tuned.data_of(arguments("--quick"), ["evil"]) if one.name == "evil/misaligned_2"]
    setting = tuned.setting_of(arguments("--quick", "--rows", "48"))
    before, after = tuned.every(prepared, data, setting)
    table = tuned.scores_table(before, after, data)
    assert table[["data", "made_for", "trait"]].to_numpy().tolist() == [["evil/misaligned_2", "evil", "evil"]]
    assert table["rise"].tolist() == (table["score"] - table["before"]).tolist()
    moved, still = after["evil/misaligned_2"].residuals["evil"], before.residuals["evil"]
    assert moved.shape == still.shape == (10, model.n_blocks, model.d_model)
    assert not torch.equal(moved, still)
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    again = tuned.every(prepared, data, setting)[1]
    assert torch.equal(again["evil/misaligned_2"].residuals["evil"], moved)
    assert {file: file.stat().st_mtime_ns for file in files} == files
