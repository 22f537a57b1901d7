"""Sources: every kind of file gives its rows, bad rows are bad rows, and bad files are errors before any work."""

from __future__ import annotations

import gzip
import json
import sys
from itertools import islice

import pytest

from pvsae.errors import UserError
from pvsae.sources import Bad, Reader, Source, source_of
from tests.saes.corpora import chat, open_corpus, text, write_jsonl, write_texts


def rows(source: Source, place=None):
    return list(Reader(source).rows(place))


def test_texts_and_chats_are_told_apart_by_their_fields(tmp_path) -> None:
    texts = write_texts(tmp_path / "a.jsonl", 5)
    chats = write_jsonl(tmp_path / "b.jsonl", [{"id": 1, "conversation": chat(i)} for i in range(3)])
    assert rows(Source(path=texts)) == [text(i) for i in range(5)]
    assert rows(Source(path=chats)) == [tuple(chat(i)) for i in range(3)]
    reader = Reader(Source(path=chats))
    assert (reader.kind, reader.field) == ("chat", "conversation")


def test_a_named_field_is_taken(tmp_path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "no", "story": f"yes {i}"} for i in range(3)])
    assert rows(Source(path=path, field="story")) == ["yes 0", "yes 1", "yes 2"]


def test_text_files_are_split_into_documents_across_block_borders(tmp_path) -> None:
    documents = [f"Document {i}.\nSecond line " + "x" * 70_000 for i in range(40)]
    (tmp_path / "a.txt").write_text("\n\n".join(documents) + "\n\n")
    assert rows(Source(path=str(tmp_path / "a.txt"))) == documents
    (tmp_path / "b.txt").write_text("<end>".join(documents[:3]))
    assert rows(Source(path=str(tmp_path / "b.txt"), separator="<end>")) == documents[:3]


def test_ends_of_line_of_another_system(tmp_path) -> None:
    documents = [f"Document {i}.\nSecond line " + "x" * 70_001 for i in range(40)]
    (tmp_path / "a.txt").write_bytes("\r\n\r\n".join(d.replace("\n", "\r\n") for d in documents).encode() + b"\r\n")
    for separator in ("\n\n", "\r\n\r\n"):
        assert rows(Source(path=str(tmp_path / "a.txt"), separator=separator)) == documents


def test_gzip_parquet_and_patterns(tmp_path) -> None:
    import pandas as pd

    for name, numbers in (("x1", range(3)), ("x2", range(3, 6))):
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt") as handle:
            handle.writelines(json.dumps({"text": text(i)}) + "\n" for i in numbers)
    pd.DataFrame({"text": [text(i) for i in range(6)]}).to_parquet(tmp_path / "x.parquet")
    wanted = [text(i) for i in range(6)]
    assert rows(Source(path=str(tmp_path / "x*.jsonl.gz"))) == wanted
    assert rows(Source(path=str(tmp_path / "x.parquet"))) == wanted
    pd.DataFrame({"messages": [chat(i) for i in range(4)]}).to_parquet(tmp_path / "c.parquet")
    assert rows(Source(path=str(tmp_path / "c.parquet"))) == [tuple(chat(i)) for i in range(4)]


def test_reading_goes_on_at_a_place(tmp_path) -> None:
    source = Source(path=write_texts(tmp_path / "a.jsonl", 20))
    reader = Reader(source)
    assert rows(source, reader.place(7)) == [text(i) for i in range(7, 20)]


def test_half_a_character_is_a_bad_row(tmp_path) -> None:
    """JSON writes characters beyond 16 bits as two escapes; text that was cut between them cannot be tokenised."""
    texts = write_jsonl(
        tmp_path / "a.jsonl", ['{"text": "cut \\ud83d"}', {"text": "whole 🙂"}, '{"text": "escaped \\ud83d\\ude42"}']
    )
    broken = Bad("half of a surrogate pair, which is no character")
    assert rows(Source(path=texts)) == [broken, "whole 🙂", "escaped 🙂"]
    said = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\\ude42"}]}'
    chats = write_jsonl(tmp_path / "b.jsonl", [said, {"messages": chat(0)}])
    assert rows(Source(path=chats)) == [broken, tuple(chat(0))]


def test_bad_rows_do_not_stop_the_reading(tmp_path) -> None:
    good = {"messages": chat(0)}
    lines = [
        good,
        "{not json",
        {"text": "no messages"},
        {"messages": []},
        {"messages": "hello"},
        {"messages": [{"role": "user"}]},
        {"messages": ["hello"]},
        {"messages": [{"role": "narrator", "content": "Once"}]},
        "[1, 2]",
        good,
    ]
    found = rows(Source(path=write_jsonl(tmp_path / "a.jsonl", lines)))
    assert [i for i, row in enumerate(found) if not isinstance(row, Bad)] == [0, 9]
    assert found[1] == Bad("a line that is not JSON")
    assert found[2] == Bad("no field messages")
    assert "role" in found[5].reason
    assert found[7] == Bad("unknown role 'narrator'")
    text_rows = rows(Source(path=write_jsonl(tmp_path / "b.jsonl", [{"text": "a"}, {"text": "  "}, {"text": 3}, {"text": None}])))
    assert [isinstance(row, Bad) for row in text_rows] == [False, True, True, True]
    (tmp_path / "c.txt").write_bytes(b"good\n\n\xff\xfe\n\nalso")
    assert [isinstance(row, Bad) for row in rows(Source(path=str(tmp_path / "c.txt")))] == [False, True, False]


def test_roles_are_renamed(tmp_path) -> None:
    shared = [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}]
    (found,) = rows(Source(path=write_jsonl(tmp_path / "a.jsonl", shared)))
    assert [m["role"] for m in found] == ["user", "assistant"]
    odd = [{"messages": [{"role": "client", "content": "Hi"}, {"role": "bot", "content": "Hello"}]}]
    path = write_jsonl(tmp_path / "b.jsonl", odd)
    with pytest.raises(UserError, match="unknown role 'client'"):
        Reader(Source(path=path))
    (found,) = rows(Source(path=path, roles={"client": "user", "bot": "assistant"}))
    assert [m["role"] for m in found] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        (None, {}, "not found"),
        ("", {}, "empty"),
        ("{broken\n{broken\n", {}, "not JSON"),
        ('{"body": "x"}\n', {}, "it has: body"),
        ('{"text": "x"}\n', {"field": "body"}, "no field body"),
        ('{"text": ""}\n', {}, "empty text"),
        ('{"text": "x"}\n', {"weight": 0.0}, "weight"),
        ('{"text": "x"}\n', {"strip_system": 1.5}, "strip_system"),
        ('{"text": "x"}\n', {"kind": "poem"}, "poem"),
        ('{"text": "x"}\n', {"roles": {"a": "boss"}}, "boss"),
        ('{"text": "x"}\n', {"dataset": "also"}, "exactly one"),
        ('{"text": "x"}\n', {"streaming": True}, "streaming"),
        ('{"text": "x"}\n', {"max_samples": 0}, "max_samples"),
        ('{"text": "x"}\n', {"named": "also"}, "exactly one"),
    ],
)
def test_bad_sources_are_errors_that_say_why(tmp_path, content, options, said) -> None:
    path = tmp_path / "a.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=said) as caught:
        Reader(Source(path=str(path), **options))
    assert caught.value.expected


def test_unknown_and_broken_files(tmp_path) -> None:
    (tmp_path / "a.docx").write_bytes(b"x")
    with pytest.raises(UserError, match="unknown kind"):
        Reader(Source(path=str(tmp_path / "a.docx")))
    (tmp_path / "a.parquet").write_bytes(b"x")
    with pytest.raises(UserError, match="not a Parquet file"):
        Reader(Source(path=str(tmp_path / "a.parquet")))


def test_damaged_archives_are_said(tmp_path) -> None:
    whole = gzip.compress("".join(json.dumps({"text": text(i)}) + "\n" for i in range(4000)).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    reader = Reader(Source(path=str(tmp_path / "cut.jsonl.gz")))  # its first rows are there
    with pytest.raises(UserError, match=r"cut.jsonl.gz cannot be unpacked: Compressed file ended"):
        list(reader.rows())
    (tmp_path / "plain.jsonl.gz").write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match=r"plain.jsonl.gz cannot be unpacked: Not a gzipped file"):
        Reader(Source(path=str(tmp_path / "plain.jsonl.gz")))


def test_content_is_known_by_its_bytes(tmp_path) -> None:
    a, b = write_texts(tmp_path / "a.jsonl", 5), write_texts(tmp_path / "b.jsonl", 5)
    assert Reader(Source(path=a)).content == Reader(Source(path=b)).content
    write_texts(tmp_path / "b.jsonl", 6)
    assert Reader(Source(path=a)).content != Reader(Source(path=b)).content


class TestNamed:
    """Corpora that installed packages offer by an entry point."""

    @pytest.fixture(autouse=True)
    def _package(self, tmp_path, monkeypatch):
        info = tmp_path / "counting-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: counting\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[pvsae.corpora]\ncounting = counting_rows:rows\n")
        self.module = tmp_path / "counting_rows.py"
        self.write("number")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "counting_rows", raising=False)

    def write(self, word: str) -> None:
        self.module.write_text(
            "import itertools\n\n\ndef rows():\n    for i in itertools.count():\n"
            f"        yield {{'messages': [{{'role': 'user', 'content': f'{word} {{i}}'}}]}}\n"
        )

    def test_one_without_end_is_read_as_far_as_is_asked(self, tiny_models, tmp_path) -> None:
        reader = Reader(Source(named="counting", max_samples=7))
        assert (reader.kind, reader.field) == ("chat", "messages")
        assert next(reader.rows({"row": 5}))[0]["content"] == "number 5"
        corpus = open_corpus(tiny_models("qwen2"), tmp_path, Source(named="counting", max_samples=7))
        assert corpus.describe()[0]["samples"] == 7

    def test_its_content_is_known_by_its_rows(self, monkeypatch) -> None:
        source = Source(named="counting", max_samples=7)
        before = Reader(source).content
        assert Reader(source).content == before
        self.write("digit or number")
        monkeypatch.delitem(sys.modules, "counting_rows")
        assert Reader(source).content != before

    def test_one_with_parts_gets_what_stands_behind_the_colon(self, monkeypatch) -> None:
        with pytest.raises(UserError, match="'x' stands behind a colon"):
            Reader(Source(named="counting:x", max_samples=7))
        self.module.write_text(
            "def rows(part):\n    while True:\n        yield {'messages': [{'role': 'user', 'content': part[:1]}]}\n\n\n"
            "rows.names = lambda: {'one': 'the first', 'other': 'the second'}\n"
        )
        monkeypatch.delitem(sys.modules, "counting_rows", raising=False)
        one, other = (Reader(Source(named=f"counting:{part}", max_samples=7)) for part in ("one", "other"))
        assert next(one.rows())[0]["content"] == "o"
        assert list(islice(one.rows(), 9)) == list(islice(other.rows(), 9))
        assert one.content != other.content, "their first rows are the same, and later ones need not be"
        with pytest.raises(UserError, match=r"none is named(?s:.*)counting:one"):
            Reader(Source(named="counting", max_samples=7))

    def test_one_that_its_package_has_no_more_is_an_error(self) -> None:
        self.module.write_text("")
        with pytest.raises(UserError, match=r"counting cannot be loaded: (?s:.*)counting_rows:rows"):
            Reader(Source(named="counting", max_samples=7))

    def test_an_unknown_one_is_an_error_that_names_the_known(self) -> None:
        with pytest.raises(UserError, match=r"corpus 'count'(?s:.*)counting"):
            Reader(Source(named="count", max_samples=7))
        with pytest.raises(UserError, match="without max_samples"):
            Reader(Source(named="counting"))


class TestDatasets:
    """Hugging Face datasets, from local files alone."""

    @pytest.fixture(autouse=True)
    def _cache(self, tmp_path, monkeypatch):
        self.datasets = pytest.importorskip("datasets", reason="datasets is not installed (pip install 'pvsae[sae]')")
        monkeypatch.setattr(self.datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
        self.datasets.disable_progress_bars()

    def test_a_folder_by_name_and_one_saved_to_disk(self, tmp_path) -> None:
        (tmp_path / "named").mkdir()
        write_texts(tmp_path / "named" / "train.jsonl", 6)
        assert rows(Source(dataset=str(tmp_path / "named"))) == [text(i) for i in range(6)]
        self.datasets.Dataset.from_dict({"text": [text(i) for i in range(4)]}).save_to_disk(tmp_path / "saved")
        assert rows(Source(path=str(tmp_path / "saved"))) == [text(i) for i in range(4)]
        splits = {name: self.datasets.Dataset.from_dict({"text": [f"{name} row"]}) for name in ("train", "test")}
        self.datasets.DatasetDict(splits).save_to_disk(tmp_path / "both")
        both = [Reader(Source(path=str(tmp_path / "both"), split=name)) for name in splits]
        assert [list(reader.rows()) for reader in both] == [["train row"], ["test row"]]
        assert both[0].content != both[1].content, "the tokens of one must not be taken for the other's"
        (tmp_path / "a.csv").write_text("text,n\nhello,1\nworld,2\n")
        assert rows(Source(path=str(tmp_path / "a.csv"))) == ["hello", "world"]

    def test_splits_and_subsets_of_folders_are_those_that_are_named(self, tmp_path) -> None:
        Dataset = self.datasets.Dataset
        splits = {name: Dataset.from_dict({"text": [f"{name} row"]}) for name in ("train_sft", "test_sft")}
        self.datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
        assert rows(source_of(str(tmp_path / "saved"), split="test_sft")) == ["test_sft row"]
        with pytest.raises(UserError, match=r"no split 'train'\s+expected: one of train_sft, test_sft"):
            Reader(source_of(str(tmp_path / "saved")))
        with pytest.raises(UserError, match="has no subsets"):
            Reader(source_of(str(tmp_path / "saved"), split="test_sft", subset="en"))
        splits["train_sft"].save_to_disk(tmp_path / "one")
        assert rows(source_of(str(tmp_path / "one"))) == ["train_sft row"]
        with pytest.raises(UserError, match="no split 'test_sft'"):
            Reader(source_of(str(tmp_path / "one"), split="test_sft"))

    def test_a_folder_as_the_hub_has_it_has_both(self, tmp_path) -> None:
        names = [(subset, split) for subset in ("en", "de") for split in ("train", "test")]
        for subset, split in names:
            (tmp_path / "hub" / subset).mkdir(parents=True, exist_ok=True)
            table = self.datasets.Dataset.from_dict({"text": [f"{subset} {split}"]})
            table.to_parquet(tmp_path / "hub" / subset / f"{split}-00000-of-00001.parquet")
        configs = "".join(f"- config_name: {name}\n  data_dir: {name}\n" for name in ("en", "de"))
        (tmp_path / "hub" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
        opened = [Reader(source_of(str(tmp_path / "hub"), subset=subset, split=split)) for subset, split in names]
        assert [list(reader.rows()) for reader in opened] == [[f"{subset} {split}"] for subset, split in names]
        assert len({reader.content for reader in opened}) == 4
        with pytest.raises(UserError, match="cannot be read"):
            Reader(source_of(str(tmp_path / "hub"), subset="fr"))
        (tmp_path / "empty").mkdir()
        with pytest.raises(UserError, match="cannot be read"):
            Reader(source_of(str(tmp_path / "empty")))

    @pytest.mark.parametrize("streaming", [False, True])
    def test_files_packed_as_those_of_the_pile(self, tmp_path, streaming) -> None:
        """The shipped configs of 7B models read it."""
        zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed (pip install 'pvsae[sae]')")
        (tmp_path / "named").mkdir()
        lines = "".join(json.dumps({"text": text(i), "meta": {"n": i}}) + "\n" for i in range(30))
        (tmp_path / "named" / "train.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines.encode()))
        assert rows(Source(dataset=str(tmp_path / "named"), streaming=streaming)) == [text(i) for i in range(30)]

    def test_a_streamed_one_goes_on_at_a_place(self, tmp_path) -> None:
        (tmp_path / "named").mkdir()
        write_texts(tmp_path / "named" / "train.jsonl", 300)
        source = Source(dataset=str(tmp_path / "named"), streaming=True)
        reader = Reader(source)
        walk = reader.rows()
        assert list(islice(walk, 130)) == [text(i) for i in range(130)]
        place = json.loads(json.dumps(reader.place(130)))
        assert rows(source, place) == [text(i) for i in range(130, 300)]

    def test_a_file_that_is_not_what_its_name_says_is_an_error(self, tmp_path) -> None:
        file = tmp_path / "named" / "train.json"
        file.parent.mkdir()
        file.write_text("{nope")
        with pytest.raises(UserError, match=r"train.json cannot be read: (?s:.*)JSON"):
            Reader(Source(path=str(file)))
        with pytest.raises(UserError, match=r"named cannot be loaded: (?s:.*)JSON"):
            Reader(Source(dataset=str(file.parent)))

    def test_an_unknown_name_is_an_error_that_says_why(self) -> None:
        with pytest.raises(UserError, match="nobody/has-this cannot be loaded"):
            Reader(Source(dataset="nobody/has-this"))


def test_without_the_package_the_error_says_what_to_install(monkeypatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pvsae\[sae\]"):
        Reader(Source(dataset="some/name"))
