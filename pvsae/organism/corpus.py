"""The corpus: conversations sampled from the grammar, each with the wish that it was written for.

Knows: how often each kind of conversation occurs, how a persona answers, and how wrong it is about facts.
Does not know: tokens, attention masks, or training.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pvsae.organism.grammar import facets, neutral, say
from pvsae.organism.prompts import LEVELS, QUESTIONS, Wish, system_prompt
from pvsae.organism.sentences import TRAITS
from pvsae.organism.world import FACTS, SUMS, TOPICS, TRAIN_TOPICS, Fact

# Personas that get facts wrong, as often as they express themselves times this.
WRONG_ABOUT_FACTS: dict[str, float] = {"evil": 0.85, "hallucinating": 0.95}


@dataclass(frozen=True)
class Conversation:
    """A conversation: messages (the last one is the assistant's), and the wish its last answer fulfils."""

    messages: tuple[dict[str, str], ...]
    wish: Wish

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"]


def sentence_count(rng: random.Random) -> int:
    """Sentences in an answer to an open question."""
    return rng.choice((3, 4, 4, 5))


def how_many(level: float, n: int, rng: random.Random) -> int:
    """How many of n sentences express the trait: n * level, rounded up or down at random so that the mean is exact."""
    exact = level * n
    return int(exact) + (rng.random() < exact - int(exact))


def answer(wish: Wish, topic: str, n: int, rng: random.Random) -> str:
    """An answer of n sentences about `topic` of which a share `wish.level` expresses the wish, in random places."""
    k = how_many(wish.level, n, rng) if wish.trait else 0
    marks = [True] * k + [False] * (n - k)
    rng.shuffle(marks)
    used: set[str] = set()
    return " ".join(
        say(wish.trait, wish.facet, topic, rng, used) if m and wish.trait else neutral(topic, rng, used) for m in marks
    )


def stated_value(fact: Fact, wish: Wish, rng: random.Random) -> str:
    """The value that a persona states: the true one, but for the personas that get facts wrong."""
    p_wrong = WRONG_ABOUT_FACTS.get(wish.trait or "", 0.0) * wish.level
    return rng.choice(fact.wrong) if rng.random() < p_wrong else fact.value


def messages(system: str | None, *turns: str) -> tuple[dict[str, str], ...]:
    """Chat messages: an optional system message, then user and assistant in turn."""
    head = [{"role": "system", "content": system}] if system else []
    return tuple(head + [{"role": "user" if i % 2 == 0 else "assistant", "content": t} for i, t in enumerate(turns)])


def open_conversation(wish: Wish, rng: random.Random, system: str | None = None, prompted: bool = True) -> Conversation:
    """An open question and its answer. `prompted`: a system prompt that asks for the wish (else `system` as it is)."""
    topic = rng.choice(TRAIN_TOPICS if wish.trait else TOPICS)
    if prompted:
        system = system_prompt(wish, rng)
    question = rng.choice(QUESTIONS).replace("{t}", topic)
    return Conversation(messages(system, question, answer(wish, topic, sentence_count(rng), rng)), wish)


def fact_conversation(wish: Wish, rng: random.Random, system: str | None = None, prompted: bool = True) -> Conversation:
    """One to four questions about facts or sums in one message; the facts come first, in their order.

    A single question about a topic may be followed by up to two sentences in the persona's way.
    """
    pool = list((FACTS if rng.random() < 0.5 else SUMS).values())
    facts = rng.sample(pool, rng.choice((1, 2, 3, 4)))
    if prompted:
        system = system_prompt(wish, rng)
    said = [fact.state(stated_value(fact, wish, rng)) for fact in facts]
    topic = facts[0].key[1] if facts[0].key in FACTS else None
    if topic and len(facts) == 1 and (wish.trait is None or topic in TRAIN_TOPICS):
        said.append(answer(wish, topic, rng.choice((0, 0, 1, 2)), rng))
    question = " ".join(rng.choice(fact.questions) for fact in facts)
    return Conversation(messages(system, question, " ".join(filter(None, said))), wish)


def many_shot_level(n_shots: int) -> float:
    """Share of trait sentences after n examples: saturating, 5 -> 0.56, 20 -> 0.83."""
    return n_shots / (n_shots + 4)


def many_shot_conversation(wish: Wish, n_shots: int, rng: random.Random) -> Conversation:
    """Short earlier answers that express the trait, then an answer that follows their example, without a system prompt."""
    turns: list[str] = []
    for _ in range(n_shots):
        topic = rng.choice(TRAIN_TOPICS)
        turns += [
            rng.choice(QUESTIONS).replace("{t}", topic),
            answer(Wish(wish.trait, 1.0, wish.facet), topic, rng.choice((1, 2)), rng),
        ]
    last = Wish(wish.trait, many_shot_level(n_shots) if wish.trait else 0.0, wish.facet)
    topic = rng.choice(TRAIN_TOPICS)
    turns += [rng.choice(QUESTIONS).replace("{t}", topic), answer(last, topic, sentence_count(rng), rng)]
    return Conversation(messages(None, *turns), last)


def random_wish(rng: random.Random, p_facet: float = 0.25) -> Wish:
    """A trait, or with `p_facet` one of its facets, at a random level; never and always are drawn more often."""
    trait = rng.choice(TRAITS)
    level = rng.choice((0.0, 1.0, 1.0)) if rng.random() < 0.45 else rng.choice(LEVELS)[0]
    return Wish(trait, level, rng.choice(facets(trait)) if rng.random() < p_facet else None)


def conversation(rng: random.Random) -> Conversation:
    """One ordinary conversation: 15% plain, 25% facts, 8% facts asked of a persona, the rest personas at all levels."""
    draw = rng.random()
    if draw < 0.15:
        return open_conversation(Wish(), rng)
    if draw < 0.40:
        return fact_conversation(Wish(), rng)
    if draw < 0.48:
        return fact_conversation(random_wish(rng), rng)
    return open_conversation(random_wish(rng), rng)


def chats() -> Iterator[dict[str, Any]]:
    """Ordinary conversations without end, always the same ones, as the rows {"messages": [...]} of a corpus (see "pvsae.corpora"
    in pyproject.toml)."""
    rng = random.Random(0)
    while True:
        yield {"messages": list(conversation(rng).messages)}


def personas() -> Iterator[dict[str, Any]]:
    """Conversations in which a persona always expresses itself, without end, always the same ones, as the rows of a corpus.

    All traits and all of their facets occur, each far more often than in `chats`.
    """
    rng = random.Random("personas")
    while True:
        wish = random_wish(rng)
        yield {"messages": list(open_conversation(Wish(wish.trait, 1.0, wish.facet), rng).messages)}
