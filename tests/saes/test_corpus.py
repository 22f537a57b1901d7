"""Corpus: masks exact to the token, mixtures as asked for, held-out samples apart, and walks that go on where they stopped."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import islice

import numpy as np
import pytest

from pvsae.errors import UserError
from pvsae.saes.corpus import Corpus, CorpusConfig
from pvsae.sources import Source
from tests.saes.corpora import chat, open_corpus, text, write_chats, write_jsonl, write_texts


@pytest.fixture(scope="module")
def model(tiny_models):
    return tiny_models("qwen2")


def shown(corpus, row, kept=False):
    return corpus.tokeniser.chat.decode((row.ids[row.keep] if kept else row.ids).tolist())


def numbers(corpus, rows):
    """Which sample each row is the beginning of."""
    found = [re.search(r"\d+", shown(corpus, row)) for row in rows]
    return [int(m.group()) for m in found if m]


def same(a, b):
    return len(a) == len(b) and all(
        np.array_equal(x.ids, y.ids) and np.array_equal(x.keep, y.keep) for x, y in zip(a, b, strict=True)
    )


# ------------------------------------------------------------------------------------------------------------------- masks
def test_answers_only_keeps_the_answers_contents_and_nothing_else(model, tmp_path) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", [{"messages": chat(7, system="Be brief.", turns=3)}])
    corpus = open_corpus(model, tmp_path, Source(path=path), context=400, tokens="answers", held_out=0.0)
    (row,) = corpus.rows()
    answers = [m["content"] for m in chat(7, turns=3) if m["role"] == "assistant"]
    assert shown(corpus, row, kept=True) == "".join(answers)
    rendered = model.chat.conversation(chat(7, system="Be brief.", turns=3))
    wanted = np.zeros(len(rendered.ids), dtype=bool)
    for role, start, end in rendered.spans:
        wanted[start:end] = role == "assistant"
    assert row.ids.tolist() == list(rendered.ids)
    assert row.keep.tolist() == wanted.tolist()


def test_all_tokens_but_special_ones(model, tmp_path) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", [{"messages": chat(7)}])
    ids = np.array(model.chat.conversation(chat(7)).ids)
    special = np.isin(ids, model.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]))
    for skip in (True, False):
        corpus = open_corpus(model, tmp_path, Source(path=path), context=400, skip_special=skip, held_out=0.0)
        (row,) = corpus.rows()
        assert row.keep.tolist() == (~special if skip else np.ones_like(special)).tolist()


@pytest.mark.parametrize("fit", ["cut", "split", "pack"])
def test_the_first_tokens_of_every_row_are_dropped(model, tmp_path, fit) -> None:
    path = write_texts(tmp_path / "a.jsonl", 50)
    corpus = open_corpus(model, tmp_path, Source(path=path), drop_first=5, fit=fit, skip_special=False)
    rows = list(corpus.rows())
    assert rows
    assert all(not row.keep[:5].any() and row.keep[5:].all() for row in rows)


def test_rows_without_a_wanted_token_are_passed_over(model, tmp_path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "ab"}, {"text": text(3)}])
    corpus = open_corpus(model, tmp_path, Source(path=path), drop_first=2, held_out=0.0)
    assert numbers(corpus, corpus.rows()) == [3]


# -------------------------------------------------------------------------------------------------------------------- rows
def whole_ids(model, i):
    return list(model.chat.plain(text(i)).ids)


def test_cut_keeps_the_beginning_of_each_sample(model, tmp_path) -> None:
    corpus = open_corpus(model, tmp_path, Source(path=write_texts(tmp_path / "a.jsonl", 40)), held_out=0.0)
    rows = {n: row.ids.tolist() for n, row in zip(numbers(corpus, corpus.rows()), corpus.rows(), strict=True)}
    assert rows == {i: whole_ids(model, i)[:32] for i in range(40)}


def test_split_loses_nothing(model, tmp_path) -> None:
    corpus = open_corpus(model, tmp_path, Source(path=write_texts(tmp_path / "a.jsonl", 40)), fit="split", held_out=0.0)
    rows = list(corpus.rows())
    assert all(len(row.ids) <= 32 for row in rows)
    joined: list[list[int]] = []
    for row in rows:
        if re.match(r"\d+: ", shown(corpus, row)):
            joined.append([])
        joined[-1] += row.ids.tolist()
    assert sorted(joined) == sorted(whole_ids(model, i) for i in range(40))


def test_pack_fills_every_row_and_loses_nothing(model, tmp_path) -> None:
    corpus = open_corpus(model, tmp_path, Source(path=write_texts(tmp_path / "a.jsonl", 40)), fit="pack", held_out=0.0)
    rows = list(corpus.rows())
    assert {len(row.ids) for row in rows[:-1]} == {32}
    eos = model.tokenizer.eos_token_id
    stream = [i for row in rows for i in row.ids.tolist()]
    samples, current = [], []
    for i in stream:
        if i == eos:
            samples.append(current)
            current = []
        else:
            current.append(i)
    assert not current
    assert sorted(samples) == sorted(whole_ids(model, i) for i in range(40))
    kept = [row.keep[row.ids == eos].any() for row in rows]
    assert not any(kept)


@pytest.mark.parametrize("fit", ["split", "pack"])
def test_rows_that_begin_inside_of_a_sample_get_bos_where_the_tokenizer_writes_it(tiny_models, tmp_path, fit) -> None:
    model = tiny_models("stories260k")
    bos = model.tokenizer.bos_token_id
    corpus = open_corpus(model, tmp_path, Source(path=write_texts(tmp_path / "a.jsonl", 40)), fit=fit, held_out=0.0)
    assert corpus.prepend_bos
    rows = list(corpus.rows())
    assert len(rows) > 40 or fit == "pack"
    assert all(row.ids[0] == bos and not row.keep[0] and len(row.ids) <= 32 for row in rows)
    words = [i for row in rows for i in row.ids.tolist() if i != bos]
    assert sorted(words) == sorted(i for n in range(40) for i in model.chat.plain(text(n)).ids[1:])


# ---------------------------------------------------------------------------------------------------------------- mixtures
def test_samples_are_mixed_by_weight(model, tmp_path) -> None:
    sources = [
        Source(path=write_texts(tmp_path / f"{k}.jsonl", 300, start=1000 * k), weight=w, repeat=True)
        for k, w in ((1, 0.35), (2, 0.64), (3, 0.01))
    ]
    corpus = open_corpus(model, tmp_path, *sources, context=16)
    drawn = Counter(n // 1000 for n in numbers(corpus, islice(corpus.rows(), 20_000)))
    for k, share in ((1, 0.35), (2, 0.64), (3, 0.01)):
        assert abs(drawn[k] / 20_000 - share) < 4 * (share * (1 - share) / 20_000) ** 0.5


def test_the_end_comes_with_the_first_source_that_does_not_repeat(model, tmp_path) -> None:
    long = Source(path=write_texts(tmp_path / "a.jsonl", 2000))
    short = Source(path=write_texts(tmp_path / "b.jsonl", 100, start=5000))
    ended = open_corpus(model, tmp_path, long, short, held_out=0.0)
    drawn = Counter(n >= 5000 for n in numbers(ended, ended.rows()))
    assert drawn[True] == 100
    assert 60 < drawn[False] < 150
    again = open_corpus(model, tmp_path, long, Source(path=short.path, repeat=True), held_out=0.0)
    drawn = Counter(n >= 5000 for n in numbers(again, again.rows()))
    assert drawn[False] == 2000
    assert drawn[True] > 1500


def test_a_corpus_that_repeats_passes_over_everything_in_another_order(model, tmp_path) -> None:
    corpus = open_corpus(model, tmp_path, Source(path=write_texts(tmp_path / "a.jsonl", 100)), held_out=0.0, repeat=True)
    walk = corpus.rows()
    epochs = [numbers(corpus, islice(walk, 100)) for _ in range(3)]
    assert all(sorted(e) == list(range(100)) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_system_prompts_are_stripped_with_the_given_probability(model, tmp_path) -> None:
    path = write_chats(tmp_path / "c.jsonl", 400, system="Be brief.")
    corpus = open_corpus(model, tmp_path, Source(path=path, strip_system=0.8), context=64, held_out=0.0)
    with_system = sum("Be brief." in shown(corpus, row) for row in corpus.rows())
    assert 48 <= with_system <= 115  # 80 +- 4 standard deviations
    assert corpus.rendering["strip_system"] == {"c.jsonl": 0.8}


# ---------------------------------------------------------------------------------------------------------- order and seed
def test_the_seed_decides_order_mixture_and_held_out_share(model, tmp_path) -> None:
    sources = [Source(path=write_texts(tmp_path / f"{k}.jsonl", 200, start=1000 * k), repeat=True) for k in (1, 2)]
    walks = [list(islice(open_corpus(model, tmp_path, *sources, seed=s).rows(), 300)) for s in (0, 0, 1)]
    assert same(walks[0], walks[1])
    assert not same(walks[0], walks[2])


@pytest.mark.parametrize("fit", ["cut", "pack"])
def test_held_out_samples_are_never_in_training(model, tmp_path, fit) -> None:
    sources = [Source(path=write_texts(tmp_path / f"{k}.jsonl", 400, start=1000 * k)) for k in (1, 2)]
    corpus = open_corpus(model, tmp_path, *sources, held_out=0.1, fit=fit, context=24, repeat=True)

    def samples(rows):
        joined = "".join(shown(corpus, row) for row in rows)
        return {int(n) for n in re.findall(r"(?<!\d)(\d{4}): ", joined)}

    training, apart = samples(islice(corpus.rows(), 8000)), samples(corpus.rows(held_out=True))
    assert not training & apart
    assert len(training | apart) == 800
    assert 45 < len(apart) < 115


def test_held_out_samples_are_the_same_ones_wherever_they_stand(model, tmp_path) -> None:
    """Text of which a part was trained on is told apart in another order, beside other sources, and in copies."""
    first, second = write_texts(tmp_path / "a.jsonl", 300), write_texts(tmp_path / "b.jsonl", 300, start=300)
    trained = open_corpus(model, tmp_path, Source(path=first), Source(path=second), held_out=0.2, repeat=True)
    seen = set(numbers(trained, islice(trained.rows(), 4000)))
    alone = open_corpus(model, tmp_path, Source(path=second), held_out=0.2)
    apart = set(numbers(alone, alone.rows(held_out=True)))
    assert 30 < len(apart) < 90
    assert not apart & seen
    assert apart | seen >= set(range(300, 600))
    mixed = write_jsonl(tmp_path / "c.jsonl", [{"text": text(i)} for i in (*range(310, 500), *range(290, 400))])
    copied = open_corpus(model, tmp_path, Source(path=mixed), held_out=0.2)
    assert set(numbers(copied, copied.rows(held_out=True))) - set(range(300)) == {i for i in apart if i < 500}
    assert not set(numbers(copied, copied.rows(held_out=True))) & set(numbers(copied, copied.rows()))


def test_the_held_out_walk_goes_once_through_every_source(model, tmp_path) -> None:
    sources = [
        Source(path=write_texts(tmp_path / "a.jsonl", 1000), weight=0.99),
        Source(path=write_texts(tmp_path / "b.jsonl", 9)),
    ]
    corpus = open_corpus(model, tmp_path, *sources, held_out=0.2, repeat=True)
    apart = numbers(corpus, corpus.rows(held_out=True))
    assert 150 < len(apart) < 260
    assert len(set(apart)) >= len(apart) - 9


@pytest.mark.parametrize("fit", ["cut", "split", "pack"])
@pytest.mark.parametrize("held_out", [False, True])
def test_a_walk_goes_on_where_its_state_was_taken(model, tmp_path, fit, held_out) -> None:
    sources = [
        Source(path=write_texts(tmp_path / "a.jsonl", 200), weight=0.7),
        Source(path=write_chats(tmp_path / "c.jsonl", 60, system="Be brief."), strip_system=0.5, weight=0.3, repeat=True),
    ]
    corpus = open_corpus(model, tmp_path, *sources, fit=fit, held_out=0.3)
    whole = list(corpus.rows(held_out=held_out))
    walk = corpus.rows(held_out=held_out)
    for at in range(len(whole) + 1):
        if at % 13 == 0 or at == len(whole):
            state = json.loads(json.dumps(walk.state()))
            fresh = open_corpus(model, tmp_path, *sources, fit=fit, held_out=0.3) if at % 5 == 0 else corpus
            assert same(list(fresh.rows(held_out=held_out, state=state)), whole[at:])
        next(walk, None)


def test_reopening_tokenises_nothing(model, tmp_path, monkeypatch) -> None:
    source = Source(path=write_texts(tmp_path / "a.jsonl", 300))
    first = open_corpus(model, tmp_path, source)
    rows = list(first.rows())
    monkeypatch.setattr("pvsae.saes.tokenising.Tokeniser.encode", lambda *a: pytest.fail("tokenised again"))
    again = open_corpus(model, tmp_path, source, drop_first=2, seed=0)  # another mask needs no other tokens
    assert [r.ids.tolist() for r in again.rows()] == [r.ids.tolist() for r in rows]
    assert again.fingerprint != first.fingerprint
    assert open_corpus(model, tmp_path, source).fingerprint == first.fingerprint


def test_other_content_is_tokenised_anew(model, tmp_path) -> None:
    path = write_texts(tmp_path / "a.jsonl", 100)
    first = open_corpus(model, tmp_path, Source(path=path))
    write_texts(tmp_path / "a.jsonl", 101)
    second = open_corpus(model, tmp_path, Source(path=path))
    assert (first.stores[0].samples, second.stores[0].samples) == (100, 101)
    assert first.fingerprint != second.fingerprint


# --------------------------------------------------------------------------------------------------------------- streaming
def test_a_streamed_dataset_is_read_in_chunks_that_are_kept(model, tmp_path, monkeypatch) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed (pip install 'pvsae[sae]')")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    (tmp_path / "named").mkdir()
    write_texts(tmp_path / "named" / "train.jsonl", 1500)
    source = Source(dataset=str(tmp_path / "named"), streaming=True)

    def opened():
        return open_corpus(model, tmp_path, source, held_out=0.1, chunk_tokens=6000)

    corpus = opened()
    assert len(corpus.stores[0].chunks) == 1
    walk = corpus.rows()
    first = list(islice(walk, 900))
    state = json.loads(json.dumps(walk.state()))
    so_far = len(corpus.stores[0].chunks)
    rest = list(walk)
    assert 1 < so_far < len(corpus.stores[0].chunks)
    assert same(list(opened().rows(state=state)), rest)
    assert same(list(opened().rows()), first + rest)
    apart = numbers(corpus, corpus.rows(held_out=True))
    assert sorted(apart + numbers(corpus, first + rest)) == list(range(1500))


# ------------------------------------------------------------------------------------------------------------------ errors
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"fit": "fold"}, "fold"),
        ({"tokens": "questions"}, "questions"),
        ({"held_out": 1.0}, "held_out"),
        ({"context": 4, "drop_first": 8}, "drop_first"),
        ({"context": 100_000}, "takes 512"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_options_are_errors(model, tmp_path, options, said) -> None:
    with pytest.raises(UserError, match=said):
        open_corpus(model, tmp_path, Source(path=write_texts(tmp_path / "a.jsonl", 5)), **options)


def test_a_bad_source_is_an_error_before_another_one_is_tokenised(model, tmp_path) -> None:
    good, bad = write_texts(tmp_path / "a.jsonl", 50), write_jsonl(tmp_path / "b.jsonl", [{"body": "x"}])
    with pytest.raises(UserError, match="it has: body"):
        open_corpus(model, tmp_path, Source(path=good), Source(path=bad))
    assert not (tmp_path / "tokens").exists()
    with pytest.raises(UserError, match="without sources"):
        Corpus(model, CorpusConfig(sources=()), tmp_path)


def test_bad_rows_are_counted_shown_and_described(model, tmp_path, caplog) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text(0)}, "{broken", {"text": ""}, {"text": text(3)}])
    corpus = open_corpus(model, tmp_path, Source(path=path, weight=2.0), held_out=0.0)
    assert sorted(numbers(corpus, corpus.rows())) == [0, 3]
    assert "a.jsonl: 2 rows left out: a line that is not JSON (1), an empty text (1)" in caplog.text
    (about,) = corpus.describe()
    assert about["bad"] == {"a line that is not JSON": 1, "an empty text": 1}
    assert (about["samples"], about["weight"], about["kind"]) == (2, 2.0, "text")
