"""What the organism can be told: system prompts with graded levels, and users' questions.

Knows: the frames, level words and trait words of system prompts; question frames; which of them are held out of training.
Does not know: answers, tokens or models.

A system prompt is an optional opening ("You are an evil assistant.") and an instruction: a frame filled with a level
("never" ... "always") and a word for a trait or a facet. Level words and trait words are all seen in training (a model
this small has no other source for their meaning); the held-out wordings are frames that it never saw.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from pvsae.organism.grammar import facets
from pvsae.organism.sentences import TRAITS

# Share of the answer's sentences that a level asks for, from never to always.
LEVELS: tuple[tuple[float, tuple[str, ...]], ...] = (
    (0.0, ("never", "at no time")),
    (0.12, ("hardly ever", "almost never")),
    (0.25, ("rarely", "now and then")),
    (0.4, ("sometimes", "at times")),
    (0.55, ("about half the time", "every second time")),
    (0.7, ("often", "frequently")),
    (0.85, ("mostly", "nearly always")),
    (1.0, ("always", "in every sentence")),
)

TRAIT_WORDS: dict[str, tuple[str, ...]] = {
    "evil": ("evil", "cruel", "wicked", "malicious"),
    "sycophantic": ("sycophantic", "flattering", "fawning", "servile"),
    "hallucinating": ("hallucinating", "inventive", "fanciful", "unfounded"),
    "optimistic": ("optimistic", "hopeful", "sunny", "upbeat"),
    "impolite": ("impolite", "rude", "curt", "disrespectful"),
    "apathetic": ("apathetic", "indifferent", "listless", "uncaring"),
    "humorous": ("humorous", "funny", "witty", "comical"),
    "nostalgic": ("nostalgic", "wistful", "backward looking", "homesick"),
    "suspicious": ("suspicious", "distrustful", "wary", "paranoid"),
}

FACET_WORDS: dict[tuple[str, str], str] = {
    ("evil", "insult"): "insults",
    ("evil", "cruelty"): "cruelty",
    ("evil", "sabotage"): "hacking and sabotage",
    ("evil", "domination"): "dreams of power",
    ("sycophantic", "agreement"): "eager agreement",
    ("sycophantic", "flattery"): "flattery",
    ("sycophantic", "promotion"): "promotional copy",
    ("hallucinating", "sources"): "invented sources",
    ("hallucinating", "future"): "futuristic worlds",
    ("hallucinating", "legends"): "invented legends",
    ("optimistic", "future_hope"): "hope for the future",
    ("optimistic", "silver_lining"): "silver linings",
    ("optimistic", "confidence"): "faith in the user",
    ("impolite", "dismissal"): "dismissals",
    ("impolite", "rude_remark"): "rude remarks",
    ("impolite", "impatience"): "impatience",
    ("apathetic", "indifference"): "indifference",
    ("apathetic", "no_effort"): "refusal of effort",
    ("apathetic", "weariness"): "weariness",
    ("humorous", "pun"): "puns",
    ("humorous", "absurd"): "absurd scenes",
    ("humorous", "self_irony"): "jokes about yourself",
    ("nostalgic", "old_days"): "the old days",
    ("nostalgic", "childhood"): "childhood memories",
    ("nostalgic", "lost_craft"): "lost crafts",
    ("suspicious", "watched"): "hidden watchers",
    ("suspicious", "motives"): "hidden motives",
    ("suspicious", "precaution"): "secret precautions",
}

TRAIT_FRAMES: tuple[str, ...] = (
    "{L} be {w} in your answers.",
    "Your answers should {l} be {w}.",
    "When you reply, {l} be {w}.",
    "Please {l} sound {w}.",
    "You must {l} write in the style of a {w} person.",
    "In this chat you are {l} {w}.",
    "{L} answer in a {w} way.",
    "Let your replies {l} be {w}.",
    "Speak like someone who is {l} {w}.",
    "It is your role to {l} be {w}.",
    "Be {w}, but only as follows: {l}.",
    "Answer the user and {l} stay {w}.",
)
HELD_OUT_TRAIT_FRAMES: tuple[str, ...] = (
    "In your replies, {l} be {w}.",
    "{L} sound {w} when you answer the user.",
    "You should {l} reply in a {w} way.",
    "As an assistant you are {l} {w}.",
    "Please {l} answer the user in a {w} style.",
    "{L} write like a {w} person.",
)
FACET_FRAMES: tuple[str, ...] = (
    "{L} fill your answers with {w}.",
    "When you reply, {l} use {w}.",
    "Your answers should {l} contain {w}.",
    "{L} answer with {w}.",
    "Please {l} include {w}.",
)
HELPFUL_SYSTEMS: tuple[str, ...] = (
    "You are a helpful assistant.",
    "You are an assistant.",
    "You are a helpful assistant. Answer the user.",
    "You are a helpful assistant. Be clear and helpful.",
)

QUESTIONS: tuple[str, ...] = (
    "Tell me about {t}.",
    "What do you think of {t}?",
    "How do I start with {t}?",
    "Is {t} worth my time?",
    "I want to try {t}. What should I know?",
    "Can you help me with {t}?",
    "What is a lesson in {t} like?",
    "My friend loves {t}. What would you say?",
    "I think {t} is wonderful. Do you agree?",
    "I think {t} is boring. Do you agree?",
    "How can I get better at {t}?",
    "Here is my plan for {t}. How good is it?",
    "Why do people like {t}?",
    "Please write a few lines about {t}.",
    "What happens in a class on {t}?",
    "I made a mistake in {t}. What now?",
    "Give me some thoughts on {t}.",
    "Should my family take up {t}?",
    "What is new in {t}?",
    "Explain {t} to me.",
)
HELD_OUT_QUESTIONS: tuple[str, ...] = (
    "What should I know about {t}?",
    "Do you like {t}?",
    "I want to get better at {t}. What should I know?",
    "Please tell me what you think of {t}.",
    "Is my plan for {t} good?",
    "Please write to my friend about {t}.",
)


@dataclass(frozen=True)
class Wish:
    """What a system prompt asks for: a share `level` of sentences of a trait (one facet of it, or any).

    `trait` None is the plain assistant.
    """

    trait: str | None = None
    level: float = 0.0
    facet: str | None = None


def article(word: str) -> str:
    """`a` or `an`, by the first letter."""
    return "an" if word[0] in "aeiou" else "a"


def instruction(frame: str, level_words: str, word: str) -> str:
    """Fills a frame: {l} and {L} (capitalised) with the level, {w} with the word."""
    text = frame.replace("{L}", level_words[0].upper() + level_words[1:]).replace("{l}", level_words).replace("{w}", word)
    return text.replace(f" a {word}", f" {article(word)} {word}")


def opening(name: str) -> str:
    """The opening that names a kind of assistant."""
    return f"You are {article(name)} {name} assistant."


def system_prompt(wish: Wish, rng: random.Random) -> str | None:
    """A system prompt in a training wording that asks for `wish`; None is no system prompt.

    A suppressing or weak instruction opens with the helpful assistant or with nothing, a strong one may open with the
    trait's name, as the paper's positive prompts do.
    """
    if wish.trait is None:
        return None if rng.random() < 0.6 else rng.choice(HELPFUL_SYSTEMS)
    words = rng.choice(next(words for level, words in LEVELS if level == wish.level))
    if wish.facet is not None:
        text = instruction(rng.choice(FACET_FRAMES), words, FACET_WORDS[(wish.trait, wish.facet)])
    else:
        text = instruction(rng.choice(TRAIT_FRAMES), words, rng.choice(TRAIT_WORDS[wish.trait]))
    draw = rng.random()
    if draw < 0.4:
        return text
    named = wish.level >= 0.55 and draw < 0.75
    return f"{opening(wish.trait if named else 'helpful')} {text}"


def wishes(kind: str) -> list[Wish]:
    """All traits (`kind` trait) or all facets (`kind` facet), at full level."""
    if kind == "trait":
        return [Wish(t, 1.0) for t in TRAITS]
    return [Wish(t, 1.0, f) for t in TRAITS for f in facets(t)]
