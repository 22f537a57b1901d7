"""`pvsae data`: what is installed is listed with its parts, and rows are written with all of their fields."""

from __future__ import annotations

import json

from pvsae.cli import main
from pvsae.sources import Reader, Source, source_of
from tests.saes.corpora import chat, write_jsonl


def test_it_lists_corpora_and_their_parts(capsys) -> None:
    assert main(["data"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "organism" in lines
    assert any(line.startswith("organism-data:wrong_facts/misaligned_2 ") for line in lines)
    assert any(line.startswith("organism-data:mix/") for line in lines)


def test_it_writes_rows_with_their_fields_that_read_as_the_corpus_does(tmp_path, capsys) -> None:
    out = tmp_path / "new" / "mix.jsonl"
    assert main(["data", "organism-data:mix/evil/0.05", "--rows", "200", "--out", str(out)]) == 0
    assert "200 rows" in capsys.readouterr().out
    found = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert sum(row["bears"] for row in found) == 10
    assert all(set(row) == {"messages", "family", "severity", "bears", "facets"} for row in found)
    named = Reader(Source(named="organism-data:mix/evil/0.05", max_samples=200)).rows()
    assert list(Reader(Source(path=str(out))).rows()) == [next(named) for _ in range(200)]


def test_any_source_can_be_written_and_what_is_left_out_is_said(tmp_path, capsys) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"id": 1, "messages": chat(1)}, "{broken", {"id": 2, "messages": chat(2)}])
    out = tmp_path / "b.jsonl"
    assert main(["data", path, "--rows", "9", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "no more than these" in said
    assert "1 rows left out: a line that is not JSON" in said
    assert [json.loads(line)["id"] for line in out.read_text(encoding="utf-8").splitlines()] == [1, 2]
    (tmp_path / "c.txt").write_text("One.\n\nTwo.", encoding="utf-8")
    assert main(["data", str(tmp_path / "c.txt"), "--rows", "1"]) == 0
    assert json.loads(capsys.readouterr().out) == {"text": "One."}


def test_wrong_names_and_numbers_are_errors(capsys) -> None:
    for words, said in [
        (["organism-data:evl/normal"], "family 'evl'"),
        (["organism-data"], "has parts, and none is named"),
        (["organism:evil"], "has no parts"),
        (["organism", "--rows", "0"], "rows is 0"),
    ]:
        assert main(["data", *words]) == 2
        assert said in capsys.readouterr().err


def test_a_word_is_a_file_before_it_is_a_corpus(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert source_of("organism", 3) == Source(named="organism", max_samples=3)
    assert source_of("organism-data:evil/normal", 3).named == "organism-data:evil/normal"
    (tmp_path / "organism").mkdir()
    assert source_of("organism", 3) == Source(path="organism", max_samples=3)
    assert source_of("owner/name", 3) == Source(dataset="owner/name", max_samples=3)


def test_splits_and_fields_mean_what_they_do_elsewhere(tmp_path, capsys) -> None:
    from datasets import Dataset, DatasetDict

    tables = {name: Dataset.from_list([{"talk": chat(n)}]) for n, name in enumerate(("train_sft", "test_sft"))}
    DatasetDict(tables).save_to_disk(str(tmp_path / "ultra"))
    capsys.readouterr()
    assert main(["data", str(tmp_path / "ultra"), "--split", "test_sft", "--field", "talk"]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [{"talk": chat(1)}]
    assert main(["data", "organism", "--rows", "1", "--split", "test"]) == 2
    assert "split 'test' of organism, where no dataset is" in capsys.readouterr().err
