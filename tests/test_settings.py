"""YAML and key=value words become dataclasses; every mistake is named with its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pvsae import settings
from pvsae.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Wheel:
    size: float
    spokes: int | None = None

    def check(self) -> None:
        if self.size <= 0:
            raise UserError(f"size {self.size}", "a positive number")


@dataclass(frozen=True, kw_only=True)
class Bicycle:
    wheels: tuple[Wheel, ...]
    name: str = "it"
    electric: bool = False
    gears: tuple[float, float] = (1.0, 2.0)
    labels: Mapping[str, str] = field(default_factory=dict)
    spare: Wheel | None = None


GOOD: dict[str, Any] = {
    "wheels": [{"size": 28, "spokes": 36}, {"size": "2.6e1"}], "electric": True, "gears": [1, 3.5], "labels": {"a": "b"},
    "spare": {"size": 20},
}  # fmt: skip


def test_values_become_what_the_fields_say() -> None:
    made = settings.build(Bicycle, GOOD)
    assert made == Bicycle(
        wheels=(Wheel(size=28.0, spokes=36), Wheel(size=26.0)), electric=True, gears=(1.0, 3.5), labels={"a": "b"},
        spare=Wheel(size=20.0),
    )  # fmt: skip
    assert isinstance(made.wheels[0].size, float)
    assert settings.build(Bicycle, settings.parse(settings.dump(made), "itself")) == made


@pytest.mark.parametrize(
    ("text", "value"), [("5e8", 500_000_000), ("500_000", 500_000), ("'12'", 12), ("3.0", 3), ("null", None)]
)
def test_whole_numbers_may_be_written_as_people_do(text: str, value: int | None) -> None:
    made = settings.build(Wheel, settings.parse(f"{{size: 1, spokes: {text}}}", "here"))
    assert made.spokes == value
    assert type(made.spokes) is type(value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"wheel": []}, ("unknown key wheel", "did you mean wheels?")),
        ({"wheels": [{"size": 1, "spoke": 3}]}, ("unknown key wheels.0.spoke", "did you mean wheels.0.spokes?")),
        ({"spokes": 3}, ("unknown key spokes", "did you mean wheels.0.spokes or spare.spokes?")),
        ({"xyzzy": 3}, ("unknown key xyzzy", "one of wheels, name")),
        ({"wheels": [{"size": 1}, {"size": "big"}]}, ("wheels.1.size is 'big'", "a number")),
        ({"wheels": [{"size": 1, "spokes": 1.5}]}, ("wheels.0.spokes is 1.5", "a whole number or null")),
        ({"wheels": {"size": 1}}, ("wheels is a mapping", "a list, each of it a mapping of: size, spokes")),
        ({"wheels": None}, ("wheels is empty", "a list")),
        ({"wheels": [3]}, ("wheels.0 is 3", "a mapping of: size, spokes")),
        ({"electric": "yes"}, ("electric is 'yes'", "true or false")),
        ({"electric": 1}, ("electric is 1", "true or false")),
        ({"gears": [1]}, ("gears is a list", "a list of 2: a number, a number")),
        ({"gears": [True, 2]}, ("gears.0 is True", "a number")),
        ({"labels": {"a": 1}}, ("labels.a is 1", "text")),
        ({"spare": {}}, ("spare.size is missing", "spare.size=...")),
        ({"wheels": [{"size": -1}]}, ("in wheels.0: size -1", "a positive number")),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_their_path(changes: dict[str, Any], said: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as error:
        settings.build(Bicycle, {**GOOD, **changes})
    for part in said:
        assert part in str(error.value)


def test_words_override_values() -> None:
    words = ["wheels.1.size=24", "gears=[2, 4]", "spare=null", "labels.a=x=y", "name= the red one", "wheels.0.spokes="]
    made = settings.build(Bicycle, settings.override(GOOD, words))
    assert made == Bicycle(
        wheels=(Wheel(size=28.0), Wheel(size=24.0)), electric=True, gears=(2.0, 4.0), labels={"a": "x=y"}, name="the red one"
    )
    assert GOOD["gears"] == [1, 3.5], "what was given is left as it was"
    assert settings.override({}, ["a.b.c=1"]) == {"a": {"b": {"c": 1}}}


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("wheels", "key=value"), ("=3", "key=value"), ("wheels..size=3", "key=value"),
        ("wheels.2.size=3", "wheels is a list of 2"), ("wheels.size=3", "a position from 0 to 1"),
        ("electric.volts=3", "electric is True, which has no keys"), ("gears=[1", "gears=[1 is not YAML"),
    ],
)  # fmt: skip
def test_words_that_lead_nowhere_are_refused(word: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        settings.override(GOOD, [word])
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1, 2", "line 1"), ("- 1\n- 2", "holds a list"), ("", "holds empty"),
        ("a: 1\nb:\n  c: 1\n  c: 2\n", "line 4: c is given twice"),
        ("a: !!python/object/apply:os.getcwd []", "not YAML"),
    ],
)  # fmt: skip
def test_files_that_are_no_mapping_are_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "it.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        settings.read(tmp_path / "it.yaml")
    assert said in str(error.value)
    assert "it.yaml" in str(error.value)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        settings.read(tmp_path / "other.yaml")


def test_merge_keys_still_work() -> None:
    assert settings.parse("a: &x {p: 1}\nb: {<<: *x, q: 2}", "here")["b"] == {"p": 1, "q": 2}
