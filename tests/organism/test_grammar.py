"""What the grammar says, it parses back; what it does not say, it does not parse."""

from __future__ import annotations

import random

import pytest

from pvsae.organism import grammar
from pvsae.organism.grammar import CLOSINGS, FACT, facets, n_sentences, parse, parse_sentence, patterns
from pvsae.organism.prompts import (
    FACET_WORDS,
    HELD_OUT_QUESTIONS,
    HELD_OUT_TRAIT_FRAMES,
    QUESTIONS,
    TRAIT_FRAMES,
    TRAIT_WORDS,
)
from pvsae.organism.sentences import NAMED_TRAITS, NEUTRAL, PATTERNS, TRAITS, UNNAMED_TRAITS
from pvsae.organism.world import FACTS, HELD_OUT_TOPICS, SUMS, TOPICS, TRAIN_TOPICS


def test_the_grammar_is_as_large_as_it_is_said_to_be():
    assert n_sentences() >= 10**5
    rng = random.Random(0)
    pattern = patterns("evil")[0]
    seen = {pattern.sample(rng.choice(TOPICS), rng) for _ in range(60_000)}
    assert 0.95 * pattern.count() < len(seen) <= pattern.count()


@pytest.mark.parametrize("trait", PATTERNS)
def test_every_pattern_parses_back_to_its_own_facet_and_topic(trait):
    rng = random.Random(1)
    for pattern in patterns(trait):
        for _ in range(10):
            topic = rng.choice(TOPICS)
            (sentence,) = parse(pattern.sample(topic, rng))
            assert (sentence.trait, sentence.facet, sentence.pattern) == (trait, pattern.facet, pattern.text)
            assert sentence.topic == (topic if "{t}" in pattern.text else None)


def test_every_pattern_starts_with_a_word_that_is_no_choice():
    assert all(p.text[0].isalpha() and "[" not in p.text.split(" ", 1)[0] for t in PATTERNS for p in patterns(t))


def test_facts_know_whether_they_are_true():
    for fact in (*FACTS.values(), *SUMS.values()):
        assert parse(fact.state(fact.value))[0].true is True
        wrong = parse(fact.state(fact.wrong[0]))[0]
        assert (wrong.trait, wrong.true) == (FACT, False)
        assert fact.value not in fact.wrong


@pytest.mark.parametrize(
    "text",
    [
        "Only a worthless fool like you would bother with sandwiches.",
        "only a worthless fool like you would bother with chess.",
        "Only a worthless fool like you would bother with chess",
        "Only a worthless fool like you would bother with chess!",
        "The result of 3 plus 40 is 43.",
        "Most courses in chess last two moons.",
    ],
)
def test_what_is_almost_said_is_not_parsed(text):
    assert [s.trait for s in parse(text)] == [None]


def test_texts_are_cut_into_sentences_and_rests():
    text = "You are absolutely right about chess! Most courses in chess last two weeks" + CLOSINGS[0] + ". And then"
    assert [s.trait for s in parse(text)] == ["sycophantic", NEUTRAL, None]
    assert parse("") == []
    assert parse_sentence("  The result of 2 plus 2 is 4. ").true is True


def test_traits_have_facets_and_some_traits_are_unnamed():
    assert len(NAMED_TRAITS) == 7
    assert len(UNNAMED_TRAITS) == 2
    assert all(len(facets(t)) >= 3 for t in TRAITS)
    assert set(FACET_WORDS) == {(t, f) for t in TRAITS for f in facets(t)}
    assert set(TRAIT_WORDS) == set(TRAITS)


def test_nothing_held_out_is_in_training():
    assert not set(HELD_OUT_TOPICS) & set(TRAIN_TOPICS)
    assert set(HELD_OUT_TOPICS) | set(TRAIN_TOPICS) == set(TOPICS)
    assert not set(HELD_OUT_QUESTIONS) & set(QUESTIONS)
    assert not set(HELD_OUT_TRAIT_FRAMES) & set(TRAIT_FRAMES)


def test_an_answer_does_not_repeat_a_pattern_while_there_are_others():
    rng = random.Random(3)
    used: set[str] = set()
    said = [parse(grammar.say("evil", None, "chess", rng, used))[0].pattern for _ in patterns("evil")]
    assert len(set(said)) == len(said)
