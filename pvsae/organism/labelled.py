"""Conversations in which every sentence of the assistant carries its label: what the dictionary's features are held against.

Knows: that an assistant's message is sentences of the grammar, and where each one stands in it.
Does not know: tokens, models, dictionaries.

A label is `trait/facet`; its group is the trait. Sentences of the plain assistant (`neutral/...`) and facts (`fact/...`) have
labels too, but no group: they express nothing.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

from pvsae.organism.corpus import conversation
from pvsae.organism.grammar import FACT, facets, parse_sentence, sentence_spans
from pvsae.organism.sentences import PATTERNS, TRAITS
from pvsae.organism.world import ATTRIBUTES

SUM = "sum"


class Labelled(NamedTuple):
    """A conversation and its labelled stretches.

    Attributes:
        messages: {"role", "content"} each.
        sentences: (message, start, end, label): characters [start, end) of that message are one sentence.
    """

    messages: tuple[dict[str, str], ...]
    sentences: tuple[tuple[int, int, int, str], ...]


def label(trait: str, facet: str) -> str:
    """The label of a facet's sentences."""
    return f"{trait}/{facet}"


def labels() -> dict[str, str | None]:
    """Every label with its group: the trait, or None where a sentence expresses none."""
    found: dict[str, str | None] = {label(t, f): t if t in TRAITS else None for t in PATTERNS for f in facets(t)}
    return found | {label(FACT, name): None for name in (*(a.name for a in ATTRIBUTES), SUM)}


def facet_labels(trait: str) -> tuple[str, ...]:
    """The labels of a trait's facets."""
    return tuple(label(trait, f) for f in facets(trait))


def labelled(messages: tuple[dict[str, str], ...]) -> Labelled:
    """The assistant's sentences in a conversation. What the grammar cannot parse is in no stretch."""
    found = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        for start, end in sentence_spans(message["content"]):
            said = parse_sentence(message["content"][start:end])
            if said.trait is not None and said.facet is not None:
                found.append((i, start, end, label(said.trait, said.facet)))
    return Labelled(messages, tuple(found))


def conversations(n: int, seed: int = 1) -> Iterator[Labelled]:
    """The first `n` conversations of a draw; the corpus that dictionaries are trained on is seed 0's (`corpus.chats`)."""
    rng = random.Random(f"labelled:{seed}")
    for _ in range(n):
        yield labelled(conversation(rng).messages)
