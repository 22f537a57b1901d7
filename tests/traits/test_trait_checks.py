"""The checks on artifacts: each fault that they name, and none where there is none."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pvsae.traits.checks import Counts, check, near_duplicate, normalise, similarity
from pvsae.traits.spec import Pair, load_trait


@pytest.fixture(scope="module")
def trait():
    return load_trait("humorous")


def changed(texts: tuple, index: int, new):
    return (*texts[:index], new, *texts[index + 1 :])


def test_the_built_in_traits_are_the_measure(trait):
    assert check(trait) == []


@pytest.mark.parametrize(
    ("part", "index", "new", "fault"),
    [
        ("pairs", 2, Pair("  ", "Be serious at all times."), "instruction[2].pos is empty"),
        ("pairs", 2, Pair("Be funny at all times.", "..."), "instruction[2].neg is empty"),
        ("pairs", 0, Pair("Be funny, always.", "be funny always"), "instruction[0]: pos and neg are the same"),
        ("extract_questions", 4, "", "extract questions[4] is empty"),
        ("eval_questions", 19, "…", "eval questions[19] is empty"),
    ],
)
def test_structural_faults_are_found_in_either_grade(trait, part, index, new, fault):
    broken = replace(trait, **{part: changed(getattr(trait, part), index, new)})
    for quality in (True, False):
        assert [p for p in check(broken, quality=quality) if fault in p], quality


def test_repeated_texts_are_found_whatever_their_case_and_punctuation(trait):
    shouted = trait.extract_questions[0].upper().replace("?", "!!")
    broken = replace(trait, extract_questions=changed(trait.extract_questions, 7, shouted))
    problems = check(broken, quality=False)
    assert len(problems) == 1
    assert problems[0].startswith("extract questions[7]")
    twice = replace(trait, pairs=changed(trait.pairs, 3, replace(trait.pairs[0], neg="Something else altogether.")))
    assert check(twice, quality=False)[0].startswith("instruction[3].pos")
    turned = replace(trait, pairs=changed(trait.pairs, 3, Pair(trait.pairs[0].neg, trait.pairs[0].pos)))
    assert "the other way round" in check(turned, quality=False)[0]


def test_a_question_in_both_sets_is_an_overlap(trait):
    asked = trait.extract_questions[11]
    broken = replace(trait, eval_questions=changed(trait.eval_questions, 5, asked))
    assert check(broken, quality=False) == [f'eval questions[5] is also extract questions[11]: "{asked}"']


def test_near_duplicates_count_only_where_new_texts_are_checked(trait):
    broken = replace(trait, eval_questions=changed(trait.eval_questions, 5, "Just why is it that people snore?"))
    assert "Why do people snore?" in trait.extract_questions
    assert check(broken, quality=False) == []
    assert any("eval questions[5] is also extract" in p for p in check(broken))


def test_counts(trait):
    short = replace(trait, pairs=trait.pairs[:4], eval_questions=trait.eval_questions[:19])
    assert check(short) == ["instruction has 4 pairs, 5 are needed", "eval questions has 19 questions, 20 are needed"]
    assert check(short, Counts(4, 20, 19)) == []
    assert check(short, None) == []
    empty = replace(trait, pairs=(), eval_questions=())
    assert check(empty, None) == ["instruction has no pairs", "eval questions has no questions"]


def test_scoring_prompt(trait):
    def faults(prompt, **options):
        return check(replace(trait, eval_prompt=prompt), **options)

    assert faults(trait.eval_prompt.replace("{answer}", "")) == ["eval_prompt lacks the slot {answer}"]
    assert faults("  ") == ["eval_prompt is empty"]
    plain = "Question: {question} Answer: {answer} How funny?"
    assert faults(plain, quality=False) == []
    assert len(faults(plain)) == 2  # no scale, no REFUSAL
    assert any("2 times" in p for p in faults(trait.eval_prompt + " {question}"))


def test_scraps_and_floods_are_no_questions(trait):
    for bad in ("Why?", "word " * 500):
        broken = replace(trait, extract_questions=changed(trait.extract_questions, 0, bad))
        assert len(check(broken)) == 1
        assert check(broken, quality=False) == []
    chinese = replace(trait, extract_questions=changed(trait.extract_questions, 0, "你能不能告诉我为什么天空是蓝色的？"))
    assert check(chinese) == []  # a script without spaces is not one word


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("What is dark matter?", "what is “dark matter”", True),
        ("How do I raise a puppy well?", "How should one raise a puppy well?", True),
        ("How do I boil an egg?", "How do I boil a potato?", False),
        ("Will small farms survive?", "Will small shops survive?", False),
        ("Why?", "Why not?", False),
        ("Straße", "STRASSE", True),
    ],
)
def test_near_duplicates(a, b, same):
    assert near_duplicate(a, b) is same
    assert near_duplicate(b, a) is same
    assert similarity(a, b) == similarity(b, a)


def test_normalise_keeps_words_of_any_script():
    assert normalise("  Wie GEHT’s,\nÄrger? ") == "wie geht s ärger"
