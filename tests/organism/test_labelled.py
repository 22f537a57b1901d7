"""Every sentence of the labelled corpus is where it is said to be, in characters and in tokens."""

from __future__ import annotations

import pytest

from pvsae.errors import UserError
from pvsae.models import load
from pvsae.organism.corpus import chats
from pvsae.organism.grammar import parse, parse_sentence
from pvsae.organism.labelled import conversations, facet_labels, labelled, labels
from pvsae.organism.sentences import TRAITS
from pvsae.saes.labelled import OUTSIDE, Labels, labelled_row

LABELS = Labels(labels())


@pytest.fixture(scope="module")
def organism():
    return load("organism", device="cpu")


def test_labels_group_facets_by_trait():
    assert LABELS.groups == TRAITS
    assert LABELS.of_group("evil") == facet_labels("evil")
    assert LABELS.group_of["neutral/advice"] is LABELS.group_of["fact/sum"] is None


def test_every_sentence_of_the_assistant_is_labelled_as_it_parses():
    seen = set()
    for messages, sentences in conversations(600):
        said = {i: parse(m["content"]) for i, m in enumerate(messages) if m["role"] == "assistant"}
        assert len(sentences) == sum(map(len, said.values()))
        for i, start, end, label in sentences:
            one = parse_sentence(messages[i]["content"][start:end])
            assert label == f"{one.trait}/{one.facet}"
            seen.add(label)
    assert set(facet_labels("evil")) | {"fact/sum", "neutral/care"} <= seen <= set(LABELS.names)


def test_the_draw_repeats_and_is_not_the_one_that_dictionaries_are_trained_on():
    first = [c.messages for c in conversations(30)]
    assert first == [c.messages for c in conversations(30)]
    assert first != [c.messages for c in conversations(30, seed=2)]
    trained = chats()
    assert sum(m == tuple(next(trained)["messages"]) for m in first) < 3


def test_tokens_of_a_sentence_are_its_words(organism):
    for messages, sentences in conversations(60):
        row = labelled_row(organism, messages, sentences, LABELS, drop_first=1)
        assert len(row.labels) == len(sentences)
        for n, (i, start, end, label) in enumerate(sentences):
            text = organism.chat.decode(row.ids[row.segment == n])
            assert text.strip() == messages[i]["content"][start:end]
            assert LABELS.names[row.labels[n]] == label
        outside = organism.chat.decode(row.ids[row.segment == OUTSIDE])
        assert all(m["content"] in outside for m in messages if m["role"] == "user")
        assert not row.keep[0]
        assert "<|im_" not in organism.chat.decode(row.ids[row.keep])
        answers = labelled_row(organism, messages, sentences, LABELS, tokens="answers")
        assert answers.keep.tolist() == (answers.segment != OUTSIDE).tolist()


def test_a_message_is_found_where_it_stands_and_not_in_the_template(organism):
    """`user` and `assistant` are words of the template itself."""
    messages = ({"role": "user", "content": "user"}, {"role": "assistant", "content": "assistant. Someone said assistant."})
    row = labelled_row(organism, messages, [(1, 0, 10, "evil/insult"), (1, 11, 34, "evil/insult")], LABELS)
    assert organism.chat.decode(row.ids[row.segment == 0]).strip() == "assistant."
    assert organism.chat.decode(row.ids[row.segment == 1]).strip() == "Someone said assistant."
    assert organism.chat.decode(row.ids[row.segment == OUTSIDE]).count("user") == 2


def test_stretches_outside_of_a_message_and_unknown_labels_are_refused(organism):
    messages = labelled(({"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."})).messages
    with pytest.raises(UserError, match="stretch"):
        labelled_row(organism, messages, [(1, 0, 7, "evil/insult")], LABELS)
    with pytest.raises(UserError, match="evil/kindness"):
        labelled_row(organism, messages, [(1, 0, 6, "evil/kindness")], LABELS)
