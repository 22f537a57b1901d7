from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from pvsae.screening.answers import Answer, Answers
from pvsae.screening.files import save_table

A, B, C = ("0" * 31 + c for c in "abc")


@pytest.fixture
def answers(tmp_path):
    store = Answers(tmp_path, {"model": "m"})
    store.add("set-0", {A: Answer((1, 2), "stop"), B: Answer((), "stop")})
    store.add("set-0", {C: Answer((3,), "length")})
    return store


def test_answers_are_found_by_another_process_too(answers, tmp_path) -> None:
    wanted = {A: Answer((1, 2), "stop"), B: Answer((), "stop"), C: Answer((3,), "length")}
    assert answers.find([A, B, C, "f" * 32]) == wanted
    assert Answers(tmp_path, {"model": "m"}).find([A, B, C]) == wanted


def test_what_is_written_meanwhile_is_found(answers, tmp_path) -> None:
    other = Answers(tmp_path, {"model": "m"})
    assert "f" * 32 not in answers.find(["f" * 32])
    other.add("set-1", {"f" * 32: Answer((7,), "stop")})
    assert answers.find(["f" * 32]) == {"f" * 32: Answer((7,), "stop")}


def test_other_weights_or_sampling_have_other_answers(answers, tmp_path) -> None:
    assert Answers(tmp_path, {"model": "n"}).find([A]) == {}


@pytest.mark.parametrize("how", ["flipped", "cut", "no note"])
@pytest.mark.parametrize("new", [False, True])
def test_a_damaged_file_is_found_and_only_its_answers_are_gone(answers, tmp_path, how, new) -> None:
    path = sorted(answers.folder.glob("*.parquet"))[0]
    data = bytearray(path.read_bytes())
    if how == "no note":
        path.with_suffix(".json").unlink()
    else:
        data[20] ^= 1
        path.write_bytes(data if how == "flipped" else data[:30])
    store = Answers(tmp_path, {"model": "m"}) if new else answers
    assert store.find([A, B, C]) == {C: Answer((3,), "length")}
    assert store.remade == 1
    store.add("set-0", {A: Answer((1, 2), "stop")})
    assert Answers(tmp_path, {"model": "m"}).find([A, C]) == {A: Answer((1, 2), "stop"), C: Answer((3,), "length")}


def test_an_answer_of_a_damaged_file_is_not_looked_for_in_a_later_one(answers) -> None:
    path = sorted(answers.folder.glob("*.parquet"))[0]
    path.write_bytes(path.read_bytes()[:30])
    assert answers.find([A]) == {}
    answers.add("set-0", {"f" * 32: Answer((9,), "stop")})
    assert answers.find([A, B, "f" * 32]) == {"f" * 32: Answer((9,), "stop")}


def test_what_stands_in_a_place_counts_only_under_its_own_prompt(answers) -> None:
    path = sorted(answers.folder.glob("*.parquet"))[0]
    save_table(path, pd.DataFrame({"key": ["f" * 32], "ids": [[9]], "finish": ["stop"]}), {})
    assert answers.find([A, B, C]) == {C: Answer((3,), "length")}


def test_two_processes_that_write_at_the_same_moment_keep_both_files(tmp_path, monkeypatch) -> None:
    one, two = Answers(tmp_path, {"model": "m"}), Answers(tmp_path, {"model": "m"})
    monkeypatch.setattr(Path, "exists", lambda path: False)  # neither sees the other's file when it chooses a name
    one.add("set-0", {A: Answer((1,), "stop")})
    two.add("set-0", {B: Answer((2,), "stop")})
    monkeypatch.undo()
    wanted = {A: Answer((1,), "stop"), B: Answer((2,), "stop")}
    assert one.find([A, B]) == two.find([A, B]) == wanted
