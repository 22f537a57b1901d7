"""The vector type and its file: what is saved is what is loaded, and nothing unusable is given out."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from pvsae.errors import UserError
from pvsae.vectors.persona import STATISTICS, PersonaVectors


def make(n_blocks: int = 4, d_model: int = 6, **meta: object) -> PersonaVectors:
    generator = torch.Generator().manual_seed(0)
    tensors = {s: torch.randn(n_blocks, d_model, generator=generator) for s in STATISTICS}
    return PersonaVectors("evil", tensors, {"model": {"name": "tiny"}, **meta})


def test_save_and_load_keep_bits_and_metadata(tmp_path):
    vectors = make(counts={"kept": 3}, note="naïve – ünïcode")
    vectors.extra["embedding/response_avg_diff"] = torch.arange(6.0)
    loaded = PersonaVectors.load(vectors.save(tmp_path / "deep" / "evil.safetensors"))
    assert loaded.trait == "evil"
    assert loaded.statistics == STATISTICS
    for statistic in STATISTICS:
        assert torch.equal(loaded.of(statistic), vectors.of(statistic))
    assert torch.equal(loaded.extra["embedding/response_avg_diff"], torch.arange(6.0))
    assert loaded.meta["counts"] == {"kept": 3}
    assert loaded.meta["note"] == "naïve – ünïcode"
    assert "hook_resid_post" in loaded.meta["block_convention"]
    again = PersonaVectors.load(loaded.save(tmp_path / "again.safetensors"))
    assert again.meta == loaded.meta
    assert all(torch.equal(again.of(statistic), vectors.of(statistic)) for statistic in STATISTICS)


def test_direction_is_the_raw_row():
    vectors = make()
    direction = vectors.direction(2)
    assert torch.equal(direction.values, vectors.vectors["response_avg_diff"][2])
    assert direction.ref == "evil/response_avg_diff/block2"
    assert torch.equal(vectors.direction(0, "prompt_last_diff").values, vectors.of("prompt_last_diff")[0])


@pytest.mark.parametrize("block", [-1, 4, 99, True, 1.0, "2"])
def test_a_block_that_does_not_exist_is_refused(block):
    with pytest.raises(UserError, match="from 0 to 3"):
        make().direction(block)


def test_unknown_statistic_is_refused():
    with pytest.raises(UserError, match="no statistic 'mean'"):
        make().direction(1, "mean")
    with pytest.raises(UserError, match="unknown statistic"):
        PersonaVectors("evil", {"mean": torch.ones(2, 3)})


def test_nan_is_refused_except_at_missing_blocks():
    rows = torch.ones(3, 4)
    rows[2] = float("nan")
    with pytest.raises(UserError, match=r"NaN .* block\(s\) 2"):
        PersonaVectors("evil", {"response_avg_diff": rows})
    vectors = PersonaVectors("evil", {"response_avg_diff": rows}, {"missing_blocks": {"2": "after the final norm"}})
    with pytest.raises(UserError, match="cannot be used at block 2: after the final norm"):
        vectors.direction(2)
    assert vectors.direction(1).norm == pytest.approx(2.0)


def test_incremental_effects_sum_to_one_vector_and_skip_missing_blocks():
    vectors = make()
    adds = vectors.incremental(2.0, "response")
    assert [a.block for a in adds] == [0, 1, 2, 3]
    total = torch.stack([a.coef * a.direction.values for a in adds]).sum(0)
    torch.testing.assert_close(total, 2.0 * vectors.of()[3])
    rows = torch.cat([vectors.of()[:3], torch.full((1, 6), float("nan"))])
    cut = PersonaVectors("evil", {"response_avg_diff": rows}, {"missing_blocks": {"3": "why"}})
    assert [a.block for a in cut.incremental()] == [0, 1, 2]


def test_shapes_are_checked():
    with pytest.raises(UserError, match="differ in shape"):
        PersonaVectors("evil", {"response_avg_diff": torch.ones(3, 4), "prompt_avg_diff": torch.ones(3, 5)})
    with pytest.raises(UserError, match="n_blocks, d_model"):
        PersonaVectors("evil", {"response_avg_diff": torch.ones(4)})
    with pytest.raises(UserError, match="no vectors"):
        PersonaVectors("evil", {})


def test_a_model_of_another_shape_is_refused():
    vectors = make()
    assert vectors.check_model(SimpleNamespace(n_blocks=4, d_model=6)) is vectors
    for shape in ({"n_blocks": 4, "d_model": 8}, {"n_blocks": 5, "d_model": 6}):
        with pytest.raises(UserError, match=r"from tiny.*n_blocks=4, d_model=6"):
            vectors.check_model(SimpleNamespace(**shape))


def test_wrong_files_end_in_one_clear_error(tmp_path):
    with pytest.raises(UserError, match="no vector file"):
        PersonaVectors.load(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("not a tensor file")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        PersonaVectors.load(tmp_path / "text.safetensors")
    save_file({"w": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="not one of persona vectors"):
        PersonaVectors.load(tmp_path / "other.safetensors")
    whole = make().save(tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        PersonaVectors.load(tmp_path / "half.safetensors")
    header = {"format": "pvsae.persona_vectors", "format_version": "1", "pvsae": json.dumps({"trait": "evil"})}
    save_file({"response_avg_diff": torch.full((2, 3), float("inf"))}, tmp_path / "inf.safetensors", metadata=header)
    with pytest.raises(UserError, match="NaN or infinite"):
        PersonaVectors.load(tmp_path / "inf.safetensors")
    save_file({"response_avg_diff": torch.ones(2, 3)}, tmp_path / "new.safetensors", metadata={**header, "format_version": "9"})
    with pytest.raises(UserError, match="update pvsae"):
        PersonaVectors.load(tmp_path / "new.safetensors")
