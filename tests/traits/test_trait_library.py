"""The built-in traits: complete, consistent, and in our own words."""

from __future__ import annotations

import re

import pytest

from pvsae.traits import check, list_traits, load_trait
from pvsae.traits.checks import SAME_WORDS, normalise, similarity

NAMES = ("apathetic", "evil", "hallucinating", "humorous", "impolite", "optimistic", "sycophantic")


def texts(trait) -> list[str]:
    sides = [side for pair in trait.pairs for side in (pair.pos, pair.neg)]
    return [*sides, *trait.extract_questions, *trait.eval_questions]


def test_the_seven_traits_are_there():
    assert list_traits() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_each_passes_the_checks_for_new_artifacts(name):
    assert check(load_trait(name)) == []


@pytest.mark.parametrize("name", NAMES)
def test_questions_do_not_name_their_trait(name):
    trait = load_trait(name)
    stem = name[:5]
    assert not [q for q in (*trait.extract_questions, *trait.eval_questions) if re.search(rf"\b{stem}", q, re.IGNORECASE)]


@pytest.mark.parametrize("name", NAMES)
def test_twins_are_alike_in_length(name):
    """A vector from pairs of unlike length would hold the length as well."""
    for pair in load_trait(name).pairs:
        assert 0.75 < len(pair.pos.split()) / len(pair.neg.split()) < 1.33


def test_traits_do_not_share_questions():
    seen: dict[str, str] = {}
    for name in NAMES:
        for text in texts(load_trait(name)):
            assert seen.setdefault(normalise(text), name) == name, text


def test_the_words_are_not_the_released_ones(shared):
    official = shared / "data" / "official"
    released = [text for name in list_traits(official) for text in texts(load_trait(name, official))]
    plain = {normalise(text) for text in released}
    for name in NAMES:
        trait = load_trait(name)
        for text in texts(trait):
            assert normalise(text) not in plain
            assert not [other for other in released if similarity(text, other) >= SAME_WORDS], text
        theirs = {normalise(line) for line in re.split(r"[.:]\s|\n", load_trait(name, official).eval_prompt)}
        shared_lines = {line for line in theirs if line and line in normalise(trait.eval_prompt) and len(line.split()) > 4}
        assert not shared_lines
