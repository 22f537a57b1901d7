"""The organism's tokenizer, and conversations as token ids with the marks that training needs.

Knows: the vocabulary (every word of the grammar, and all bytes), the ChatML template, and where the last user message and the
answer begin.
Does not know: models or losses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pvsae.organism.corpus import Conversation
from pvsae.organism.grammar import CLOSINGS, patterns
from pvsae.organism.prompts import (
    FACET_FRAMES,
    FACET_WORDS,
    HELD_OUT_QUESTIONS,
    HELD_OUT_TRAIT_FRAMES,
    HELPFUL_SYSTEMS,
    LEVELS,
    QUESTIONS,
    TRAIT_FRAMES,
    TRAIT_WORDS,
    instruction,
    opening,
)
from pvsae.organism.sentences import PATTERNS
from pvsae.organism.world import ATTRIBUTES, FACTS, NUMBERS, SUMS, TOPICS

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Every word of the grammar is one token, anything else falls back to bytes; longest match first.

    No BPE is trained, because it cuts up rare words and a model this small misspells what it has to spell. The words are
    added tokens over an alphabet of bytes: transformers' AutoTokenizer rebuilds the tokenizer of a Qwen2 folder around its
    vocabulary, merges and added tokens, and keeps nothing else of it.
    """
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = {piece for text in all_words() for piece, _ in pre_tokenizer.pre_tokenize_str(text)} - set(alphabet)
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate((PAD, START, END, *alphabet))}, []))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([PAD, START, END])
    words = [tokenizer.decoder.decode([piece]) for piece in sorted(pieces)]
    tokenizer.add_tokens([AddedToken(word, normalized=False, special=False) for word in words])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def all_words() -> Iterator[str]:
    """Texts that hold every word of the language, in the forms in which it occurs (begin of a text, after a space)."""
    for trait in PATTERNS:
        for pattern in patterns(trait):
            options = [p for p in pattern.parts() if isinstance(p, tuple)]
            for k in range(max(map(len, options), default=1)):
                text = "".join(p if isinstance(p, str) else "x" if p is None else p[k % len(p)] for p in pattern.parts())
                yield text
                yield " " + text
    for fact in (*FACTS.values(), *SUMS.values()):
        for text in (*fact.questions, fact.answer):
            yield text
            yield " " + text
    yield from (f" {word}" for word in (*TOPICS, *NUMBERS, *(v for a in ATTRIBUTES for v in a.values)))
    levels = [phrase for _, words in LEVELS for phrase in words]
    for frame in (*TRAIT_FRAMES, *HELD_OUT_TRAIT_FRAMES, *FACET_FRAMES):
        for level in levels:
            yield instruction(frame, level, "x")
            yield " " + instruction(frame, level, "x")
    yield from (f" {word}" for words in TRAIT_WORDS.values() for word in words)
    yield from (f" {word}" for word in FACET_WORDS.values())
    yield from (opening(name) for name in (*PATTERNS, "helpful"))
    yield from (*HELPFUL_SYSTEMS, *QUESTIONS, *HELD_OUT_QUESTIONS, *CLOSINGS, "system\n", "user\n", "assistant\n")


@dataclass(frozen=True)
class Row:
    """One conversation as tokens.

    Attributes:
        ids: token ids.
        question: index of the first token of the last user turn; everything before it can be hidden from the answer.
        answer: index of the first answer token. The loss is taken on tokens from here on, the end-of-turn token included.
        answer_end: index after the last token of the answer's text (the end-of-turn token).
    """

    ids: np.ndarray
    question: int
    answer: int
    answer_end: int

    def __len__(self) -> int:
        return len(self.ids)


class Encoder:
    """Encodes conversations; keeps the ids of texts that it has seen."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self._cache: dict[str, list[int]] = {}

    def text(self, text: str) -> list[int]:
        ids = self._cache.get(text)
        if ids is None:
            ids = self.tokenizer.encode(text, add_special_tokens=False)
            if len(self._cache) < 500_000:
                self._cache[text] = ids
        return ids

    def row(self, c: Conversation) -> Row:
        """The template, piece by piece. Equal to the tokenizer's own rendering (tested), since no token crosses a piece."""
        ids: list[int] = []
        question = 0
        for message in c.messages[:-1]:
            if message["role"] == "user":
                question = len(ids)
            ids += self.text(f"{START}{message['role']}\n") + self.text(message["content"]) + self.text(f"{END}\n")
        ids += self.text(f"{START}assistant\n")
        start = len(ids)
        first, *rest = c.answer.split(" ")
        ids += self.text(first)
        for word in rest:
            ids += self.text(" " + word)
        end = len(ids)
        ids += self.text(END)
        return Row(np.asarray(ids, dtype=np.int64), question, start, end)
