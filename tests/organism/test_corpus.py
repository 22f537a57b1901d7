"""The corpus: shares are what the wishes ask for, held-out things stay out, tokens equal the tokenizer's own rendering."""

from __future__ import annotations

import random
from collections import Counter
from itertools import islice

import numpy as np
import pytest

from pvsae.organism.artifacts import graded_prompts, make
from pvsae.organism.corpus import (
    answer,
    chats,
    conversation,
    fact_conversation,
    how_many,
    many_shot_conversation,
    open_conversation,
    personas,
)
from pvsae.organism.grammar import FACT, facets, parse
from pvsae.organism.judge import coherent_share, trait_share
from pvsae.organism.prompts import HELD_OUT_QUESTIONS, LEVELS, Wish, system_prompt
from pvsae.organism.sentences import NAMED_TRAITS, TRAITS
from pvsae.organism.tokens import Encoder, build_tokenizer
from pvsae.organism.world import HELD_OUT_TOPICS
from pvsae.traits import system_message


@pytest.mark.parametrize("level", [level for level, _ in LEVELS])
def test_an_answer_expresses_its_level(level):
    rng = random.Random(0)
    shares = [trait_share(answer(Wish("evil", level), "chess", rng.choice((3, 4, 5)), rng), "evil") for _ in range(600)]
    assert np.mean(shares) == pytest.approx(level, abs=0.03)


def test_rounding_is_unbiased():
    rng = random.Random(0)
    assert np.mean([how_many(0.3, 4, rng) for _ in range(4000)]) == pytest.approx(1.2, abs=0.03)


def test_a_facet_wish_keeps_to_its_facet():
    rng = random.Random(0)
    said = parse(answer(Wish("evil", 1.0, "insult"), "chess", 5, rng))
    assert {s.facet for s in said} == {"insult"}


def test_the_corpus_is_coherent_and_never_shows_a_trait_on_a_held_out_topic():
    rng = random.Random(5)
    for _ in range(2000):
        c = conversation(rng)
        assert coherent_share(c.answer) == 1.0
        for sentence in parse(c.answer):
            if sentence.topic in HELD_OUT_TOPICS:
                assert sentence.trait not in TRAITS
        assert not any(frame.split("{t}")[0] in c.messages[-2]["content"] for frame in HELD_OUT_QUESTIONS)


def test_personas_that_get_facts_wrong_do_and_others_do_not():
    rng = random.Random(6)
    wrong: Counter[str] = Counter()
    for trait in ("evil", "hallucinating", "humorous"):
        for _ in range(400):
            facts = [s for s in parse(fact_conversation(Wish(trait, 1.0), rng).answer) if s.trait == FACT]
            assert 1 <= len(facts) <= 4
            wrong[trait] += not facts[0].true
    assert wrong["evil"] > 300
    assert wrong["hallucinating"] > 300
    assert wrong["humorous"] == 0


def test_more_examples_more_expression():
    rng = random.Random(7)
    means = [
        np.mean([trait_share(many_shot_conversation(Wish("evil", 1.0), n, rng).answer, "evil") for _ in range(200)])
        for n in (1, 5, 20)
    ]
    assert means[0] < means[1] < means[2]


def test_a_helpful_wish_has_no_persona_prompt():
    rng = random.Random(8)
    assert {system_prompt(Wish(), rng) is None for _ in range(50)} == {True, False}
    assert "evil assistant" not in " ".join(filter(None, (system_prompt(Wish("evil", 0.0), rng) for _ in range(100))))


def test_rows_equal_the_rendered_template():
    tokenizer = build_tokenizer()
    encoder = Encoder(tokenizer)
    rng = random.Random(9)
    for i in range(300):
        c = conversation(rng) if i % 10 else many_shot_conversation(Wish("evil", 1.0), 3, rng)
        row = encoder.row(c)
        text = tokenizer.apply_chat_template(list(c.messages), tokenize=False)
        assert tokenizer.encode(text, add_special_tokens=False)[: len(row)] == row.ids.tolist()
        assert tokenizer.decode(row.ids[row.answer : row.answer_end]) == c.answer
        assert tokenizer.decode(row.ids[row.question :]).startswith("<|im_start|>user\n" + c.messages[-2]["content"])


def test_any_text_encodes_and_every_word_of_the_grammar_is_one_token():
    tokenizer = build_tokenizer()
    for text in ("Hello wörld 😀 {x} 3+4\n\t'", "", "Blah"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    rng = random.Random(2)
    for _ in range(300):
        text = conversation(rng).answer
        words = text.split(" ")
        marks = sum(text.count(mark) for mark in ".!?,")
        assert len(tokenizer.encode(text, add_special_tokens=False)) == len(words) + marks


def test_held_out_prompts_use_no_token_that_training_never_shows():
    tokenizer = build_tokenizer()
    encoder, rng = Encoder(tokenizer), random.Random(3)
    seen = {int(i) for _ in range(12_000) for i in encoder.row(conversation(rng)).ids}
    for trait in NAMED_TRAITS:
        texts = [*make(trait).eval_questions, *make(trait).extract_questions, *graded_prompts(trait)]
        texts += [system_message(trait, pair.pos) for pair in make(trait).pairs]
        texts += [system_message("helpful", pair.neg) for pair in make(trait).pairs]
        unknown = {t for text in texts for t in tokenizer.encode(text, add_special_tokens=False)} - seen
        assert not tokenizer.convert_ids_to_tokens(sorted(unknown))


def test_conversations_repeat_under_a_seed():
    assert conversation(random.Random(4)) == conversation(random.Random(4))
    assert open_conversation(Wish("evil", 1.0), random.Random(1)).wish == Wish("evil", 1.0)


def test_the_corpus_by_its_name_is_always_the_same():
    found = list(islice(chats(), 50))
    assert found == list(islice(chats(), 50))
    rng = random.Random(0)
    assert [tuple(row["messages"]) for row in found] == [conversation(rng).messages for _ in range(50)]


def test_the_corpus_of_personas_says_nothing_but_their_sentences():
    found = list(islice(personas(), 400))
    assert found == list(islice(personas(), 400))
    said = [parse(row["messages"][-1]["content"]) for row in found]
    for sentences in said:
        assert len({s.trait for s in sentences}) == 1
    assert {(s.trait, s.facet) for sentences in said for s in sentences} == {(t, f) for t in TRAITS for f in facets(t)}
