"""What a screening is started with: every vector under its own name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pvsae.errors import UserError
from pvsae.stages.screen_inputs import open_vector_files
from pvsae.vectors import PersonaVectors
from pvsae.vectors.persona import DEFAULT_STATISTIC

KIND = DEFAULT_STATISTIC


def save(path: Path, trait: str, value: float) -> str:
    """A vector all of whose numbers are `value`, which tells it from others."""
    return str(PersonaVectors(trait, {KIND: torch.full((2, 4), value)}).save(path))


def run_folder(path: Path, values: dict[str, float]) -> str:
    for trait, value in values.items():
        folder = path / trait / "vectors"
        folder.mkdir(parents=True)
        save(folder / "vectors.safetensors", trait, value)
    return str(path)


def opened(*paths: str, traits: tuple[str, ...] = ()) -> tuple[dict[str, float], list[str]]:
    """Name -> the number in the vector, and the stems."""
    found = open_vector_files(paths, traits, KIND)
    assert len({name for name, _, _ in found}) == len(found)
    assert len({stem for _, stem, _ in found}) == len(found)
    return {name: float(vectors.of(KIND)[0, 0]) for name, _, vectors in found}, [stem for _, stem, _ in found]


def test_one_folder_gives_traits_as_names(tmp_path) -> None:
    folder = run_folder(tmp_path / "a", {"evil": 1.0, "kind": 2.0})
    assert opened(folder) == ({"evil": 1.0, "kind": 2.0}, [f"evil_{KIND}", f"kind_{KIND}"])


@pytest.mark.parametrize("traits", [("evil", "kind"), ("evil", "kind", "vain")])
def test_vectors_of_two_folders_keep_the_name_of_theirs(tmp_path, traits) -> None:
    a = run_folder(tmp_path / "A", {t: i for i, t in enumerate(traits)})
    b = run_folder(tmp_path / "B", {t: i + 10 for i, t in enumerate(traits)})
    names, stems = opened(a, b)
    assert names == {f"A-{t}": i for i, t in enumerate(traits)} | {f"B-{t}": i + 10 for i, t in enumerate(traits)}
    assert stems == [f"{home}-{t}_{KIND}" for home in "AB" for t in traits]
    assert opened(a, b, traits=traits[:1])[0] == {"A-evil": 0.0, "B-evil": 10.0}


def test_what_only_one_folder_has_keeps_its_trait(tmp_path) -> None:
    a = run_folder(tmp_path / "v1.0" / "vectors", {"evil": 1.0, "kind": 2.0})
    b = run_folder(tmp_path / "v1.1" / "vectors", {"evil": 3.0})
    assert opened(a, b)[0] == {"v1.0-evil": 1.0, "kind": 2.0, "v1.1-evil": 3.0}


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path) -> None:
    files = []
    for i, home in enumerate("ab"):
        (tmp_path / home).mkdir()
        files.append(save(tmp_path / home / "gloomy.safetensors", "gloomy", float(i)))
    assert opened(*files)[0] == {"a-gloomy": 0.0, "b-gloomy": 1.0}


def test_a_path_given_twice_is_refused(tmp_path) -> None:
    folder = run_folder(tmp_path / "a", {"evil": 1.0})
    with pytest.raises(UserError, match="given twice"):
        open_vector_files([folder, folder], (), KIND)
