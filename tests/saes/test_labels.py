"""Labels and their scores, asked of a server that knows the answers, guesses, misbehaves, or is not there."""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import pytest

from pvsae.errors import UserError
from pvsae.llm import ChatClient
from pvsae.saes.evidence import Example
from pvsae.saes.labels import Material, Passage, active, label_features, label_request, marked, quantiles, read_answers, split
from tests.fake_server import END, FakeServer, Faults


def passage(i: int, word: str | None) -> Passage:
    tokens = [f" w{(i * 7 + j) % 50}" for j in range(12)]
    values = [0.0] * 12
    if word is not None:
        tokens[i % 12], values[i % 12] = f" {word}", 1.0 + i % 5
    return Passage(tuple(tokens), tuple(values))


def material(latent: int = 3, word: str = "ferry", n: int = 20) -> Material:
    some = [passage(i, word) for i in range(3 * n)]
    return Material(latent, tuple(some[:n]), tuple(some[n : 2 * n]), tuple(passage(i, None) for i in range(n)))


class Knows:
    """Labels by the marked words, and answers by whether the label's word is there (and, of marks, inside them)."""

    def __init__(self, answer=None) -> None:
        self.answer = answer

    def following(self, messages, begun):
        text = messages[-1]["content"]
        whole = self.say(text)
        return {whole: 1.0} if not begun else {END: 1.0}

    def say(self, text: str) -> str:
        passages = re.findall(r"Passage \d+: (.*)", text)
        if "LABEL:" in text:
            shared = re.findall(r"<< ?(\w+)>>", passages[0])[0]
            return "They share a word.\nLABEL: the word " + shared
        word = re.search(r"stand for: the word (\w+)", text)[1]
        if self.answer is not None:
            return self.answer(len(passages))
        inside = "<<" in text
        pattern = r"<<[^<>]*\bWORD\b[^<>]*>>" if inside else r"\bWORD\b"
        found = [bool(re.search(pattern.replace("WORD", word), p)) for p in passages]
        return ", ".join("1" if f else "0" for f in found)


def client(server, tmp_path, **options) -> ChatClient:
    return ChatClient(server.url, "fake", cache=tmp_path / "cache.sqlite", backoff=0.01, **options)


def test_a_label_that_foretells_scores_one_and_counts_everything(tmp_path):
    with FakeServer(Knows()) as server, client(server, tmp_path) as asked:
        one, two = label_features([material(3, "ferry"), material(9, "clock")], asked)
    assert (one.text, two.text) == ("the word ferry", "the word clock")
    for label in (one, two):
        assert label.detection.balanced_accuracy == 1
        assert (label.detection.yes, label.detection.no, label.detection.unanswered) == (20, 20, 0)
        assert label.fuzzing.balanced_accuracy == 1
        assert (label.fuzzing.yes, label.fuzzing.no) == (20, 20), "each passage once with its own marks, once with wrong ones"
        assert (label.train, label.test, label.quiet) == (20, 20, 20)


def test_wrong_marks_look_like_right_ones():
    """Runs as long as the right ones at silent tokens, so that nothing but the label tells which are which."""
    from pvsae.saes.labels import Passage, _questions

    tokens = tuple(f" t{i:02}" for i in range(24))
    some = []
    for at in range(0, 12):
        values = [0.0] * 24
        values[at : at + 3], values[at + 6] = [5.0, 4.0, 5.0], 3.0
        some.append(Passage(tokens, tuple(values)))
    full = Passage(tokens[:6], (5.0, 5.0, 5.0, 0.0, 0.0, 5.0))
    questions = [q for q in _questions(Material(3, (), (*some, full), ()), "x", 0) if q.kind == "fuzzing"]
    right, wrong = [], []
    for question in questions:
        text = question.request.messages[0]["content"].partition("\n\n")[2]
        for passage, own in zip(re.findall(r"Passage \d+: (.*)", text), question.right, strict=True):
            runs = [re.findall(r"\d\d", run) for run in re.findall(r"<<(.*?)>>", passage)]
            (right if own else wrong).append((len(re.findall(r"\d\d", passage)), runs))
    assert len(right) == len(wrong) == 13
    for n, runs in wrong:
        expected = [1, 3] if n == 24 else [2]  # of the short one there is room for two of three, and for none of the other
        assert sorted(map(len, runs)) == expected, runs
    spots = {runs[0][0] for n, runs in wrong if n == 24}
    assert len(spots) > 3, "drawn at random"


def test_saying_yes_to_everything_is_guessing(tmp_path):
    with FakeServer(Knows(lambda n: ",".join("1" * n))) as server, client(server, tmp_path) as asked:
        (label,) = label_features([material()], asked)
    assert label.detection.balanced_accuracy == label.fuzzing.balanced_accuracy == 0.5
    assert (label.detection.hits, label.detection.rejections) == (20, 0)


def test_replies_that_cannot_be_read_are_counted_and_in_no_score(tmp_path):
    with FakeServer(Knows(lambda n: "I cannot tell.")) as server, client(server, tmp_path) as asked:
        (label,) = label_features([material()], asked)
    assert label.detection.unanswered == 40
    assert label.detection.yes == label.detection.no == 0
    assert np.isnan(label.detection.balanced_accuracy)


def test_no_passage_of_the_scores_is_in_the_question_for_the_label(tmp_path):
    m = material()
    shown = label_request(m).messages[0]["content"]
    assert all(marked(p, active(p)) in shown for p in m.train)
    with FakeServer(Knows()) as server, client(server, tmp_path) as asked:
        label_features([m], asked)
        asked_for_labels = [e.body["messages"][0]["content"] for e in server.log if "LABEL:" in e.body["messages"][0]["content"]]
    assert len(asked_for_labels) == 1
    assert not any("".join(p.tokens) in asked_for_labels[0] for p in (*m.test, *m.quiet))


def test_a_second_start_asks_for_nothing(tmp_path):
    faults = Faults(broken=0.3, too_many=0.2, retry_after=0.02)
    with FakeServer(Knows(), faults=faults) as server:
        with client(server, tmp_path) as asked:
            first = label_features([material()], asked)
        sold = len(server.sold)
        with client(server, tmp_path) as asked:
            assert label_features([material()], asked) == first
        assert len(server.sold) == sold
    with client(server, tmp_path) as asked:  # the server is gone, and nothing has to be asked
        assert label_features([material()], asked) == first


def test_a_server_that_is_not_there_and_features_that_never_fire(tmp_path):
    with FakeServer(Knows()) as server:
        pass
    with client(server, tmp_path, max_retries=0) as asked, pytest.raises(UserError, match="no answer"):
        label_features([material()], asked)
    with client(server, tmp_path) as asked:
        (label,) = label_features([Material(5, (), (), ())], asked)
    assert (label.text, label.problem, label.detection) == (None, "it was never active", None)


def test_a_refused_label_is_said(tmp_path):
    with FakeServer(Knows(), faults=Faults(refuse=lambda p: "LABEL:" in p)) as server, client(server, tmp_path) as asked:
        (label,) = label_features([material()], asked)
    assert label.text is None
    assert "400" in label.problem


def test_answers_are_read_from_the_last_line_that_fits():
    assert read_answers("1, 0, 1", 3) == [True, False, True]
    assert read_answers("[0,0]\n", 2) == [False, False]
    assert read_answers("Passage 1 is 10 words.\nAnswer: 1,0,0,1,1", 5) == [True, False, False, True, True]
    assert read_answers("1, 0", 3) is None
    assert read_answers("", 1) is None


def test_marks_stand_around_runs():
    p = Passage((" a", " b", " c", " d"), (0.0, 3.0, 1.0, 0.5))
    assert marked(p, active(p)) == " a<< b c>> d"
    assert marked(p, [False, False, False, True]) == " a b c<< d>>"


def examples(n: int) -> list[Example]:
    g = np.random.default_rng(0)
    return [Example(float(v), i, 0, 0, 1, np.ones(1), i) for i, v in enumerate(g.random(n))]


def test_the_split_is_even_over_quantiles_and_disjoint():
    sample = examples(100)
    train, test = split(sample, n_quantiles=10, train=40, test=50, seed=0, latent=1)
    assert (len(train), len(test)) == (40, 50)
    assert not {e.document for e in train} & {e.document for e in test}
    groups = quantiles(sample, 10)
    assert [len(g) for g in groups] == [10] * 10
    assert all(a[-1].value >= b[0].value for a, b in pairwise(groups))
    for group in groups:
        inside = {e.document for e in group}
        assert (len(inside & {e.document for e in train}), len(inside & {e.document for e in test})) == (4, 5)
    again = split(sample[::-1], n_quantiles=10, train=40, test=50, seed=0, latent=1)
    assert [e.document for e in again[0]] == [e.document for e in train], "the order of the sample does not matter"


@pytest.mark.parametrize("n", [0, 1, 7, 30])
def test_few_examples_are_shared(n):
    train, test = split(examples(n), n_quantiles=10, train=40, test=50, seed=0, latent=1)
    assert len(train) + len(test) == n
    assert abs(len(train) - 4 / 9 * n) < 4
