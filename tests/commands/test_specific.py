"""`pvsae specific`: a folder that every command reads as one of vectors."""

from __future__ import annotations

import pytest
import torch

from pvsae.cli import main
from pvsae.stages.inputs import read_vectors, stored_traits
from pvsae.vectors import PersonaVectors, specific


def folder(path, traits=("evil", "curt", "silly")):
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(3, 16, generator=generator)
    made = {t: PersonaVectors(t, {"response_avg_diff": common + torch.randn(3, 16, generator=generator)}) for t in traits}
    for trait, vectors in made.items():
        vectors.save(path / trait / "vectors" / "vectors.safetensors")
    return made


def test_what_it_writes_is_read_as_vectors(tmp_path, capsys) -> None:
    made = folder(tmp_path / "in")
    assert main(["specific", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 0
    assert stored_traits(tmp_path / "out") == ["curt", "evil", "silly"]
    assert torch.equal(read_vectors(tmp_path / "out", "evil", "response_avg_diff").of(), specific(made, "evil").of())
    shown = capsys.readouterr().out
    assert "share" in shown
    assert "note:" not in shown


def test_one_trait_against_another_from_files_and_a_note_where_nothing_is_left(tmp_path, capsys) -> None:
    made = folder(tmp_path / "in", ("evil",))
    near = made["evil"].of() + 0.01 * torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    PersonaVectors("curt", {"response_avg_diff": near}).save(tmp_path / "curt.safetensors")
    words = ["specific", str(tmp_path / "in"), str(tmp_path / "curt.safetensors"), "--out", str(tmp_path / "out")]
    assert main([*words, "--against", "curt"]) == 0
    assert stored_traits(tmp_path / "out") == ["evil"]
    assert "less than 5% of 'evil' is left at block 0, 1, 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nowhere"], "no vectors"),
        (["{in}", "{in}"], "two vectors of 'curt'"),
        (["{in}", "--traits", "kind"], "no vectors of 'kind'"),
        (["{in}", "--against", "kind"], "no vectors of 'kind'"),
        (["{in}", "--traits", "evil", "--against", "evil"], "'evil' is among what is to be taken out of it"),
        (["{in}", "--statistic", "sum"], "no statistic 'sum'"),
    ],
)
def test_wrong_input_is_said_in_one_line(tmp_path, capsys, words, says) -> None:
    folder(tmp_path / "in")
    words = [word.replace("{in}", str(tmp_path / "in")) for word in words]
    assert main(["specific", *words, "--out", str(tmp_path / "out")]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_vectors_that_are_there_are_never_overwritten_or_mixed_with(tmp_path, capsys) -> None:
    folder(tmp_path / "in")
    before = (tmp_path / "in" / "evil" / "vectors" / "vectors.safetensors").read_bytes()
    assert main(["specific", str(tmp_path / "in"), "--out", str(tmp_path / "in")]) == 2
    assert "holds vectors already" in capsys.readouterr().err
    assert (tmp_path / "in" / "evil" / "vectors" / "vectors.safetensors").read_bytes() == before
    words = ["specific", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--traits", "evil", "evil"]
    assert main(words) == 0
    assert capsys.readouterr().out.count("evil") == 3, "a row a block, and no trait twice"
    assert main(["specific", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--traits", "curt"]) == 2
    assert stored_traits(tmp_path / "out") == ["evil"]
    (tmp_path / "file").write_text("mine")
    assert main(["specific", str(tmp_path / "in"), "--out", str(tmp_path / "file")]) == 2
    assert "is a file" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"
