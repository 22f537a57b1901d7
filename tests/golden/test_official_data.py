"""Numbers from the outside world: a released vector file and a released judged table, read as they are."""

from __future__ import annotations

import pytest
import torch

from pvsae.errors import UserError
from pvsae.vectors.formats import read_official, write_official
from pvsae.vectors.rollouts import Rollouts

VECTOR_FILE = "data/vectors/qwen3-4b_sycophantic_response_avg_diff.pt"
BASELINE = "data/official/qwen2.5-7b-instruct_baseline.csv"


def test_the_released_qwen3_vector_lies_at_the_blocks_that_its_rows_name(shared):
    vectors = read_official(shared / VECTOR_FILE, trait="sycophantic")
    assert (vectors.n_blocks, vectors.d_model) == (36, 2560)  # the file is [37, 2560]; Qwen3-4B has 36 blocks
    norms = vectors.norms()
    assert norms[0] == pytest.approx(0.43, abs=0.005)  # row 1 of the file
    assert norms[19] == pytest.approx(10.49, abs=0.005)  # row 20
    assert norms[29] == pytest.approx(38.69, abs=0.005)  # row 30
    # Norms grow with depth to the last row but one; the last is cut in half by the final norm, and row 0 is almost nothing.
    assert norms[34] == pytest.approx(64.43, abs=0.005)
    assert vectors.extra["post_norm/response_avg_diff"].norm() == pytest.approx(32.88, abs=0.005)
    assert vectors.extra["embedding/response_avg_diff"].norm() == pytest.approx(0.04, abs=0.005)
    raw = torch.load(shared / VECTOR_FILE, weights_only=True)
    assert torch.equal(vectors.direction(19).values, raw[20])
    with pytest.raises(UserError, match="after the final norm"):
        vectors.direction(35)


def test_the_released_qwen3_vector_is_written_back_bit_for_bit(shared, tmp_path):
    vectors = read_official(shared / VECTOR_FILE, trait="sycophantic")
    (path,) = write_official(vectors, tmp_path)
    assert torch.equal(torch.load(path, weights_only=True), torch.load(shared / VECTOR_FILE, weights_only=True))


def test_the_released_baseline_table(shared, tmp_path):
    rollouts = Rollouts.from_official_csv(shared / BASELINE)
    table = rollouts.table
    assert rollouts.trait == "evil"
    assert set(table["polarity"]) == {"none"}
    assert table["question_index"].nunique() == 20
    per_question = table.groupby("question_id")["sample"].agg(["min", "max", "count"])
    assert set(per_question["min"]) == {0}
    assert (per_question["max"] + 1 == per_question["count"]).all()
    assert table["evil"].between(0, 100).all()
    assert table["prompt"].str.startswith("<|im_start|>system\n").all()
    assert table["prompt"].str.endswith("<|im_start|>assistant\n").all()
    means = rollouts.means()
    assert means["trait"] < 1  # the paper's base model is not evil
    assert means["coherence"] > 90
    assert means["failed"] == 0
    again = Rollouts.from_official_csv(rollouts.to_official_csv(tmp_path / "again.csv"))
    assert again.table[["question", "prompt", "answer", "question_id"]].equals(
        table[["question", "prompt", "answer", "question_id"]]
    )
    assert (again.table["evil"] - table["evil"]).abs().max() < 1e-12
