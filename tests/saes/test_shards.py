"""Shards: what was written comes back, and what is not whole does not."""

from __future__ import annotations

import json

import pytest
import torch

from pvsae.errors import UserError
from pvsae.saes.shards import Shards

ABOUT = {"model": "a", "blocks": [1, 3], "dtype": "bfloat16"}


def passes(seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    return [{b: torch.randn(n, 6, generator=g).bfloat16() for b in (1, 3)} for n in (5, 0, 9)]


def equal(a, b) -> bool:
    return len(a) == len(b) and all(torch.equal(x[k], y[k]) for x, y in zip(a, b, strict=True) for k in (1, 3))


def test_what_was_written_comes_back(tmp_path) -> None:
    shards = Shards(tmp_path / "s", ABOUT)
    assert shards.load(0) is None
    shards.save(0, passes(0))
    shards.save(1, passes(1))
    again = Shards(tmp_path / "s", ABOUT)
    assert equal(again.load(0), passes(0))
    assert equal(again.load(1), passes(1))
    assert again.load(2) is None
    assert not list((tmp_path / "s").glob("*.tmp*"))


@pytest.mark.parametrize("how", ["changed", "cut", "gone", "swapped"])
def test_a_shard_that_is_not_whole_does_not_come_back(tmp_path, how) -> None:
    shards = Shards(tmp_path, ABOUT)
    shards.save(0, passes(0))
    shards.save(1, passes(1))
    file = tmp_path / "activations-000001.safetensors"
    data = bytearray(file.read_bytes())
    if how == "gone":
        file.unlink()
    elif how == "swapped":
        file.write_bytes((tmp_path / "activations-000000.safetensors").read_bytes())
    else:
        data[-5] ^= 1
        file.write_bytes(data if how == "changed" else data[:-7])
    again = Shards(tmp_path, ABOUT)
    assert again.load(1) is None
    assert equal(again.load(0), passes(0))


def test_a_damaged_manifest_makes_every_shard_missing(tmp_path) -> None:
    Shards(tmp_path, ABOUT).save(0, passes())
    (tmp_path / "manifest.json").write_text("{")
    assert Shards(tmp_path, ABOUT).load(0) is None


def test_the_shards_of_another_stream_are_refused(tmp_path) -> None:
    Shards(tmp_path, ABOUT).save(0, passes())
    with pytest.raises(UserError, match="differs in: blocks, model"):
        Shards(tmp_path, {**ABOUT, "model": "b", "blocks": [2]})


def test_the_manifest_has_checksums_of_everything(tmp_path) -> None:
    import hashlib

    Shards(tmp_path, ABOUT).save(0, passes())
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (entry,) = manifest["shards"].values()
    assert entry["sha256"] == hashlib.sha256((tmp_path / entry["file"]).read_bytes()).hexdigest()
    assert manifest["stream"] == ABOUT
