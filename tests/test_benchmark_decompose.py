"""The benchmark of decompositions, at a size that fits a test: the planted atoms, and one table whatever the format."""

from __future__ import annotations

import json

import pytest

from benchmarks.decompose import LAYOUTS, WEIGHTS, _checks, _weights, measure, planted, same, tables, write

D_SAE, D_MODEL = 2048, 256


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("formats")
    return folder, write(folder, D_SAE, D_MODEL)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_ten_planted_atoms_are_found_with_their_weights(made, layout: str) -> None:
    folder, vectors = made
    for signed, vector in vectors.items():
        found = measure(folder / layout, vector, nonnegative=not signed)
        got = dict(zip(found["latents"], found["weights"], strict=True))
        assert got == pytest.approx(dict(zip(planted(D_SAE), _weights(signed).tolist(), strict=True)), abs=0.15)
        assert len(got) == len(WEIGHTS)
        checks = {c["name"].split(": ")[1]: c for c in _checks(found, layout, D_SAE, signed)}
        assert checks["planted atoms found, of 10"]["ok"]


def test_the_older_layout_is_read_through_its_scale(made, tmp_path) -> None:
    """It is another reader's work: without the file of the scale there is no table."""
    import shutil

    from pvsae.errors import UserError

    folder, vectors = made
    shutil.copytree(folder / "saelens_5", tmp_path / "old")
    config = json.loads((tmp_path / "old" / "cfg.json").read_text())
    assert "metadata" not in config
    (tmp_path / "old" / "activation_scaler.json").unlink()
    with pytest.raises(UserError, match="does not say by which factor"):
        tables(tmp_path / "old", vectors, tmp_path / "out")


def test_the_formats_give_the_same_tables(made, tmp_path) -> None:
    folder, vectors = made
    first = tables(folder / "ours", vectors, tmp_path / "ours")
    assert {name.partition("/")[2] for name in first} >= {"decomposition", "pursuit", "curve"}
    for layout in LAYOUTS[1:]:
        assert same(first, tables(folder / layout, vectors, tmp_path / layout))
    changed = {**first, "True/pursuit": first["True/pursuit"].assign(latent=0)}
    assert not same(first, changed)
