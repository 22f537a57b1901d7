"""Foreign formats: layer numbers are converted once, and what is no block's residual is never given out as one."""

from __future__ import annotations

import pickle
import warnings

import numpy as np
import pytest
import torch

from pvsae.errors import UserError
from pvsae.vectors.formats import read_gguf, read_official, read_official_set, write_gguf, write_official
from pvsae.vectors.persona import STATISTICS, PersonaVectors

gguf = pytest.importorskip("gguf", reason="the gguf extra is not installed")


def make(n_blocks: int = 4, d_model: int = 8) -> PersonaVectors:
    generator = torch.Generator().manual_seed(1)
    tensors = {s: torch.randn(n_blocks, d_model, generator=generator) for s in STATISTICS}
    return PersonaVectors("evil", tensors, {"model": {"name": "tiny", "model_type": "qwen2"}})


def official_rows(n_rows: int = 5, d_model: int = 8) -> torch.Tensor:
    return torch.arange(float(n_rows))[:, None].repeat(1, d_model)


def test_official_row_l_is_block_l_minus_1(tmp_path):
    torch.save(official_rows(), tmp_path / "evil_response_avg_diff.pt")
    vectors = read_official(tmp_path / "evil_response_avg_diff.pt")
    assert (vectors.trait, vectors.statistics, vectors.n_blocks) == ("evil", ("response_avg_diff",), 4)
    for block in range(3):
        assert torch.equal(vectors.direction(block).values, torch.full((8,), block + 1.0))
    with pytest.raises(UserError, match="after the final norm"):
        vectors.direction(3)
    assert torch.equal(vectors.extra["embedding/response_avg_diff"], torch.zeros(8))
    assert torch.equal(vectors.extra["post_norm/response_avg_diff"], torch.full((8,), 4.0))


def test_official_files_survive_a_round_trip_through_our_file(tmp_path):
    rows = {s: torch.randn(5, 8) for s in STATISTICS}
    for statistic, tensor in rows.items():
        torch.save(tensor, tmp_path / f"evil_{statistic}.pt")
    stored = read_official_set(tmp_path, "evil").save(tmp_path / "evil.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # every row is known, so nothing has to be filled in
        paths = write_official(PersonaVectors.load(stored), tmp_path / "out")
    assert [p.name for p in paths] == [f"evil_{s}.pt" for s in STATISTICS]
    for path, statistic in zip(paths, STATISTICS, strict=True):
        assert torch.equal(torch.load(path, weights_only=True), rows[statistic])


def test_rows_that_our_vectors_do_not_have_are_marked_not_invented(tmp_path):
    vectors = make()
    with pytest.warns(UserWarning, match="row 0 and row 4 .* nan"):
        paths = write_official(vectors, tmp_path)
    rows = torch.load(paths[1], weights_only=True)
    assert rows.shape == (5, 8)
    assert rows.dtype == torch.float32
    assert bool(rows[0].isnan().all())
    assert bool(rows[4].isnan().all())
    assert torch.equal(rows[1:4], vectors.of("response_avg_diff")[:3])
    with pytest.warns(UserWarning, match="hold 0"):
        zero = torch.load(write_official(vectors, tmp_path, fill=0.0)[0], weights_only=True)
    assert zero[0].abs().sum() == 0


class Evil:
    def __reduce__(self):
        return (open, ("/tmp/never_opened_by_a_reader", "w"))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": torch.ones(3, 3)}, "holds a dict"),
        (torch.ones(3), "shape"),
        (torch.ones(3, 3, dtype=torch.long), "torch.int64"),
        (Evil(), "cannot be read as a tensor"),
    ],
)
def test_files_that_hold_no_vectors_are_refused(tmp_path, value, message):
    path = tmp_path / "evil_response_avg_diff.pt"
    torch.save(value, path)
    with pytest.raises(UserError, match=message):
        read_official(path)


def test_damaged_missing_and_nameless_files(tmp_path):
    with pytest.raises(UserError, match="no vector file"):
        read_official(tmp_path / "evil_response_avg_diff.pt")
    path = tmp_path / "evil_prompt_avg_diff.pt"
    path.write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(UserError, match="cannot be read as a tensor"):
        read_official(path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read as a tensor"):
        read_official(path)
    torch.save(official_rows(), tmp_path / "mine.pt")
    with pytest.raises(UserError, match="does not say which trait"):
        read_official(tmp_path / "mine.pt")
    assert read_official(tmp_path / "mine.pt", "evil", "prompt_avg_diff").trait == "evil"
    with pytest.raises(UserError, match="no official vector file"):
        read_official_set(tmp_path / "empty", "evil")


def test_gguf_holds_what_llama_cpp_reads(tmp_path):
    vectors = make()
    path = write_gguf(vectors, tmp_path / "evil.gguf", [2], coef=3.0)
    reader = gguf.GGUFReader(str(path))

    def text(key: str) -> str:
        field = reader.get_field(key)
        return bytes(field.parts[field.data[0]]).decode()

    assert text("general.architecture") == "controlvector"
    assert text("controlvector.model_hint") == "qwen2"
    layer_count = reader.get_field("controlvector.layer_count")
    assert int(layer_count.parts[layer_count.data[0]][0]) == 1
    (tensor,) = reader.tensors
    assert tensor.name == "direction.2"  # llama.cpp's layer N is block N, both counted from 0
    assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
    assert list(tensor.shape) == [8]
    np.testing.assert_array_equal(tensor.data, 3.0 * vectors.of()[2].numpy())
    back = read_gguf(path)
    assert list(back) == [2]
    assert torch.equal(back[2], 3.0 * vectors.of()[2])


def test_gguf_incremental_sums_to_one_vector_after_every_block(tmp_path):
    vectors = make()
    back = read_gguf(write_gguf(vectors, tmp_path / "all.gguf", "incremental"))
    assert list(back) == [1, 2, 3]
    for block in back:
        total = torch.stack([d for b, d in back.items() if b <= block]).sum(0)
        torch.testing.assert_close(total, vectors.of()[block])


@pytest.mark.parametrize(("blocks", "message"), [([0], "block 0"), ([], "no block"), ([4], "from 0 to 3")])
def test_gguf_refuses_blocks_that_llama_cpp_cannot_steer(tmp_path, blocks, message):
    with pytest.raises(UserError, match=message):
        write_gguf(make(), tmp_path / "x.gguf", blocks)
    assert not (tmp_path / "x.gguf").exists()


def _write(path, tensors, architecture="controlvector"):
    writer = gguf.GGUFWriter(str(path), architecture)
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"direction.0": np.ones(4, np.float32)}, "block 0"),
        ({"direction.1": np.ones(4, np.float16)}, "type F16"),
        ({"direction.1": np.ones((2, 4), np.float32)}, "shape"),
        ({"direction.1": np.ones(4, np.float32), "direction.2": np.ones(5, np.float32)}, "length 5"),
        ({"output.weight": np.ones(4, np.float32)}, "is no direction"),
        ({"direction.1": np.full(4, np.nan, np.float32)}, "NaN"),
    ],
)
def test_gguf_that_llama_cpp_would_refuse_is_refused(tmp_path, tensors, message):
    with pytest.raises(UserError, match=message):
        read_gguf(_write(tmp_path / "bad.gguf", tensors))


def test_gguf_of_a_model_and_other_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="architecture 'qwen2'"):
        read_gguf(_write(tmp_path / "model.gguf", {"direction.1": np.ones(4, np.float32)}, "qwen2"))
    (tmp_path / "text.gguf").write_text("no gguf at all, only some text that is long enough")
    with pytest.raises(UserError, match="cannot be read as GGUF"):
        read_gguf(tmp_path / "text.gguf")
    with pytest.raises(UserError, match="no control vector file"):
        read_gguf(tmp_path / "none.gguf")
