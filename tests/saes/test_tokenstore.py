"""Token store: made once, whole or not at all, and the same again where it is damaged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pvsae import sources
from pvsae.models.chat import ChatTemplate
from pvsae.saes import tokenstore
from pvsae.saes.tokenising import Tokeniser
from pvsae.saes.tokenstore import MOST_OPEN, TokenStore
from pvsae.sources import Reader, Source
from tests.conftest import make_tokenizer
from tests.saes.corpora import text, write_jsonl, write_texts

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tokeniser():
    return Tokeniser(ChatTemplate(make_tokenizer()))


def make_store(tokeniser, tmp_path, path, calls=None, **options):
    chunk_tokens = options.pop("chunk_tokens", 4000)

    def encode(values, rows):
        if calls is not None:
            calls.append(len(values))
        return tokeniser.encode(values, [False] * len(values))

    reader = Reader(Source(path=path, **options))
    return TokenStore(tmp_path / "store", reader, encode, chunk_tokens=chunk_tokens, progress=False)


def everything(store):
    return [store.sample(i).ids.tolist() for i in range(store.samples)]


def test_samples_come_back_as_they_were_over_all_chunks(tokeniser, tmp_path) -> None:
    path = write_texts(tmp_path / "a.jsonl", 900)
    store = make_store(tokeniser, tmp_path, path)
    store.make_all()
    assert len(store.chunks) > 2
    assert store.samples == 900
    assert everything(store) == [list(tokeniser.chat.plain(text(i)).ids) for i in range(900)]
    assert sum(c.tokens for c in store.chunks) == sum(map(len, everything(store)))


def test_more_chunks_than_a_process_may_have_open_files(tokeniser, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tokenstore, "AT_ONCE", 4)
    resource = pytest.importorskip("resource", reason="this system has no limits of open files")
    store = make_store(tokeniser, tmp_path, write_texts(tmp_path / "a.jsonl", 4 * (MOST_OPEN + 20)), chunk_tokens=1)
    store.make_all()
    assert len(store.chunks) > MOST_OPEN + 20
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_now = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 40
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + 2 * MOST_OPEN + 10, hard))
    try:
        wanted = range(0, store.samples, 3)
        found = [store.sample(i).ids.tolist() for i in (*wanted, *wanted)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found == [list(tokeniser.chat.plain(text(i)).ids) for i in (*wanted, *wanted)]


def test_rows_before_a_chunk_are_not_read_again(tokeniser, tmp_path, monkeypatch) -> None:
    """Only a process that goes on with a half-made store has to find its place."""
    read: list[int] = []
    lines = sources._jsonl
    monkeypatch.setattr(sources, "_jsonl", lambda file: (read.append(1) or row for row in lines(file)))
    path = write_texts(tmp_path / "a.jsonl", 2000)
    store = make_store(tokeniser, tmp_path, path)
    head = len(read)
    store.make_all()
    assert len(store.chunks) > 5
    assert len(read) - head == 2000
    assert everything(store) == [list(tokeniser.chat.plain(text(i)).ids) for i in range(2000)]
    for chunk in store.chunks[3:]:
        shutil.rmtree(chunk.folder)
    again = make_store(tokeniser, tmp_path, path)
    again.chunk(3)
    with monkeypatch.context() as patch:
        patch.setattr(again, "encode", lambda *_: 1 / 0)  # an interruption, of which the process knows
        with pytest.raises(ZeroDivisionError):
            again.chunk(4)
    again.make_all()
    assert everything(again) == everything(store)


def test_nothing_is_tokenised_twice(tokeniser, tmp_path) -> None:
    path = write_texts(tmp_path / "a.jsonl", 600)
    make_store(tokeniser, tmp_path, path).make_all()
    calls: list[int] = []
    store = make_store(tokeniser, tmp_path, path, calls)
    store.make_all()
    assert store.samples == 600
    assert calls == []


@pytest.mark.parametrize("name", ["ids.npy", "flags.npy", "offsets.npy", "chunk.json"])
@pytest.mark.parametrize("how", ["changed", "cut", "gone"])
def test_a_damaged_chunk_is_made_again_alone_and_the_same(tokeniser, tmp_path, name, how) -> None:
    path = write_texts(tmp_path / "a.jsonl", 900)
    store = make_store(tokeniser, tmp_path, path)
    store.make_all()
    before = everything(store)
    rows = [c.rows for c in store.chunks]
    file = store.chunks[1].folder / name
    whole = file.read_bytes()
    data = bytearray(whole)
    data[-3] ^= 0xFF
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(data if how == "changed" else whole[: len(whole) // 2])
    calls: list[int] = []
    again = make_store(tokeniser, tmp_path, path, calls)
    again.make_all()
    assert everything(again) == before
    assert sum(calls) == rows[1] - rows[0]
    assert file.read_bytes() == whole


def test_bad_rows_are_counted_over_chunks(tokeniser, tmp_path) -> None:
    lines = [("{broken" if i % 10 == 3 else {"text": ""} if i % 10 == 7 else {"text": text(i)}) for i in range(800)]
    store = make_store(tokeniser, tmp_path, write_jsonl(tmp_path / "a.jsonl", lines))
    store.make_all()
    assert len(store.chunks) > 1
    assert store.bad == {"a line that is not JSON": 80, "an empty text": 80}
    assert store.samples == 640
    assert store.chunks[-1].rows == 800


def test_max_samples_counts_good_rows(tokeniser, tmp_path) -> None:
    lines = ["{broken", *({"text": text(i)} for i in range(800))]
    store = make_store(tokeniser, tmp_path, write_jsonl(tmp_path / "a.jsonl", lines), max_samples=333)
    store.make_all()
    assert everything(store) == [list(tokeniser.chat.plain(text(i)).ids) for i in range(333)]


def test_a_number_of_rows_that_fills_the_last_reading_ends_all_the_same(tokeniser, tmp_path) -> None:
    store = make_store(tokeniser, tmp_path, write_texts(tmp_path / "a.jsonl", 512), chunk_tokens=1)
    store.make_all()
    assert store.samples == 512
    assert store.chunk(99) is None
    assert np.array_equal(store.sample(511).ids, list(tokeniser.chat.plain(text(511)).ids))


def test_one_of_two_processes_makes_a_store_and_the_other_reads_it(tmp_path) -> None:
    path = write_texts(tmp_path / "a.jsonl", 1500)
    code = f"""
from pathlib import Path
from pvsae.models.chat import ChatTemplate
from pvsae.saes.tokenising import Tokeniser
from tests.conftest import make_tokenizer
from tests.saes.test_tokenstore import everything, make_store
calls = []
store = make_store(Tokeniser(ChatTemplate(make_tokenizer())), Path({str(tmp_path)!r}), {path!r}, calls)
store.make_all()
print(sum(calls), len(store.chunks), hash(str(everything(store))))
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "PYTHONHASHSEED": "0"}
    both = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    said = [process.communicate()[0].split() for process in both]
    assert sorted(int(words[0]) for words in said) == [0, 1500]
    assert said[0][1:] == said[1][1:]
    assert int(said[0][1]) > 3


def test_a_killed_pass_goes_on_at_its_last_chunk(tokeniser, tmp_path) -> None:
    path = write_texts(tmp_path / "a.jsonl", 900)
    code = f"""
import os
from pathlib import Path
from pvsae.models.chat import ChatTemplate
from pvsae.saes.tokenising import Tokeniser
from tests.conftest import make_tokenizer
from tests.saes.test_tokenstore import make_store
calls = []
tokeniser = Tokeniser(ChatTemplate(make_tokenizer()))
store = make_store(tokeniser, Path({str(tmp_path)!r}), {path!r}, calls)
encode = store.encode
store.encode = lambda *a: os.kill(os.getpid(), 9) if len(calls) == 2 else encode(*a)
store.make_all()
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    killed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env)
    assert killed.returncode == -9
    done = [json.loads(f.read_text())["rows"] for f in sorted((tmp_path / "store").glob("chunk-*/chunk.json"))]
    assert done
    calls: list[int] = []
    store = make_store(tokeniser, tmp_path, path, calls)
    store.make_all()
    assert sum(calls) == 900 - done[-1]
    assert everything(store) == [list(tokeniser.chat.plain(text(i)).ids) for i in range(900)]
