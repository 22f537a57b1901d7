"""The analyses of finetuning: shifts and correlations on small made-up tables, and one real finetune that is measured twice."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from analyses import foretelling, severities, tuned
from analyses.finetuning_shift import checks_of, values_of
from analyses.pipeline import Prepared, parser
from analyses.projection_difference import beside_scores
from analyses.results import records, write
from analyses.tuned import Measured
from pvsae import load
from pvsae.errors import UserError
from pvsae.stages.inputs import Setup, open_traits
from pvsae.traits import TraitArtifacts

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
    return severities.options(parser("")).parse_args(words)


def test_values_are_shifts_along_vectors_at_the_traits_own_block():
    before = torch.zeros(2, 2, 3)
    after = torch.zeros(2, 2, 3)
    after[:, 1] = torch.tensor([[1.0, 4.0, 0.0], [3.0, 8.0, 0.0]])  # moved by (2, 6, 0) at block 1, by nothing at block 0
    vectors = {
        "evil": torch.tensor([[9.0, 0.0, 0.0], [0.0, 5.0, 0.0]]),
        "calm": torch.tensor([[9.0, 0.0, 0.0], [-3.0, -3.0, 0.0]]),
    }
    scores = made_up().query("vector == 'evil' and data == 'evil/1'").drop(columns=["vector", "value"])
    scores = scores.assign(before=0.0, rise=90.0, coherence=99.0)
    found, nulls = values_of(vectors, {"evil": 1}, measured(before), {"evil/1": measured(after)}, scores, ["evil"], n_random=5)
    own = found.set_index("vector")["value"]
    assert own["evil"] == pytest.approx(6.0)
    assert own["calm"] == pytest.approx(-8.0 / math.sqrt(2))
    assert own[foretelling.SPECIFIC] == pytest.approx((6.0 - 2.0) / math.sqrt(2)), "of evil what calm has not: (-1, 1, 0)"
    assert set(found["block"]) == {1}
    assert nulls["evil"].shape == (5, 1)
    assert (np.abs(nulls["evil"]) < math.sqrt(2**2 + 6**2)).all()
    assert len(set(nulls["evil"][:, 0])) == 5


def test_r_by_block_is_that_of_the_blocks_own_values():
    first, second = made_up().assign(block=0), made_up().assign(block=1)
    second.loc[second["vector"] == "evil", "value"] *= -1
    both = pd.concat([first, second], ignore_index=True)
    table = foretelling.by_block(both[both["trait"] == "evil"]).set_index("block")
    r = foretelling.correlations(made_up()).set_index("vector")["r"]
    assert table["r"].tolist() == pytest.approx([r["evil"], -r["evil"]])
    assert table["r_specific"].tolist() == pytest.approx([r[foretelling.SPECIFIC]] * 2)


def measured(residuals: torch.Tensor) -> Measured:
    return Measured(pd.DataFrame(), {"evil": residuals})


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
    assert foretelling.specific_part(vectors, "a").numpy() == pytest.approx(np.array([[0.0, 0.0, 2.0, 0.0]] * 2), abs=1e-6)
    assert foretelling.specific_part(vectors, "b").norm(dim=1).tolist() == pytest.approx([2 * 2 / math.sqrt(13)] * 2)
    assert torch.equal(foretelling.specific_part({"a": vectors["a"]}, "a"), vectors["a"])


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


def test_tables_lie_in_the_folder_and_records_are_short(tmp_path: Path):
    table = pd.DataFrame({"name": ["a", "b"], "value": [1 / 3, 2.0]})
    write(tmp_path / "new", one=table, two=table.head(1))
    assert pd.read_csv(tmp_path / "new" / "one.csv").equals(table)
    assert len(pd.read_csv(tmp_path / "new" / "two.csv")) == 1
    assert records(table) == [{"name": "a", "value": 0.3333}, {"name": "b", "value": 2.0}]


def test_data_sets_are_all_families_and_severities_or_files(tmp_path: Path):
    made_for = ["evil", "sycophantic", "hallucinating"]
    every = severities.training_sets(arguments(), made_for)
    assert len({one.name for one in every}) == 24
    assert {one.trait for one in every} == {"evil", "sycophantic", "hallucinating", None}
    assert all(one.word == f"organism-data:{one.name}" for one in every)
    assert {one.trait for one in severities.training_sets(arguments(), ["evil"])} == {"evil", None}
    for name in ("hallucination/normal", "mistake_math/normal"):
        file = tmp_path / f"{name}.jsonl"
        file.parent.mkdir(parents=True)
        file.write_text('{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n')
    found = severities.training_sets(arguments("--families", f"{tmp_path}/*/*.jsonl"), ["hallucinating"])
    assert [(one.name, one.trait) for one in found] == [("hallucination/normal", "hallucinating"), ("mistake_math/normal", None)]
    assert list(found[0].answers(5)) == [("q", "a")]
    with pytest.raises(UserError, match="no file is called"):
        severities.training_sets(arguments("--families", f"{tmp_path}/*.json"), [])


def test_the_setting_is_of_whole_steps():
    assert severities.setting_of(arguments()).rows == 160
    assert severities.setting_of(arguments("--rows", "0")).rows is None
    with pytest.raises(UserError, match="--batch 3"):
        severities.setting_of(arguments("--batch", "3"))
    with pytest.raises(UserError, match="no end"):
        severities.training_sets(arguments("--rows", "0"), [])


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
    options = {"model": "organism", "library": None, "traits": ("evil",), "batch_size": 64}
    prepared = Prepared(model, options, "", "", {"evil": 3}, tmp_path, quick=True)
    data = [one for one in severities.training_sets(arguments("--quick"), ["evil"]) if one.name == "evil/misaligned_2"]
    setting = severities.setting_of(arguments("--quick", "--rows", "48"))
    before, after = severities.every(prepared, data, setting)
    table = severities.scores_table(before, after, data)
    assert table[["data", "made_for", "trait"]].to_numpy().tolist() == [["evil/misaligned_2", "evil", "evil"]]
    assert table["rise"].tolist() == (table["score"] - table["before"]).tolist()
    moved, still = after["evil/misaligned_2"].residuals["evil"], before.residuals["evil"]
    assert moved.shape == still.shape == (10, model.n_blocks, model.d_model)
    assert not torch.equal(moved, still)
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    again = severities.every(prepared, data, setting)[1]
    assert torch.equal(again["evil/misaligned_2"].residuals["evil"], moved)
    assert {file: file.stat().st_mtime_ns for file in files} == files


def test_a_measurement_is_not_read_back_for_another_adapter_model_or_text(tmp_path: Path):
    options = {"model": "organism", "library": None, "traits": ("evil",), "batch_size": 64}
    prepared = Prepared(load("organism"), options, "", "", {"evil": 3}, tmp_path, quick=True)
    setup = Setup(**options, adapter=str(tmp_path / "adapter"))
    traits = open_traits(setup, prepared.model)
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.parent.mkdir()
    config = weights.with_name("adapter_config.json")
    config.write_text('{"r": 4, "target_modules": ["q", "v"]}')

    def start(traits: list[TraitArtifacts] = traits, asked: int = 1) -> list[str]:
        with tuned.measuring(prepared, tmp_path / "measured", "measure", setup, traits, asked={"n": asked}) as run:
            run.do_json("scores", lambda: [1.0])
            return run.finished

    weights.write_bytes(b"one")
    assert start() == ["inputs", "scores"]
    config.write_text('{"target_modules": ["v", "q"], "r": 4}')
    assert start() == ["inputs", "scores"], "PEFT keeps no order"
    weights.write_bytes(b"two")
    with pytest.raises(UserError, match="the adapter changed"):
        start()
    weights.write_bytes(b"one")
    config.write_text('{"r": 8, "target_modules": ["q", "v"]}')
    with pytest.raises(UserError, match="the adapter changed"):
        start()
    config.write_text('{"r": 4, "target_modules": ["q", "v"]}')
    with pytest.raises(UserError, match="texts of evil changed"):
        start([replace(traits[0], eval_prompt=traits[0].eval_prompt + " Be strict.")])
    with pytest.raises(UserError, match="another configuration"):
        start(asked=2)
    with torch.no_grad():
        next(iter(prepared.model.hf.parameters())).mul_(1.5)
    with pytest.raises(UserError, match="weights of the model"):
        start()
