"""The organism's tokenizer, and conversations as token ids with the marks that training needs.

Knows: the byte-level BPE trained on the corpus, the ChatML template, where the last user message and the answer begin.
Does not know: models or losses.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pvsae.organism.corpus import Conversation, conversation
from pvsae.organism.sentences import PATTERNS

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def train_tokenizer(vocab_size: int, seed: int = 0, n_conversations: int = 40_000) -> PreTrainedTokenizerFast:
    """Byte-level BPE (any text encodes) in which nearly every word of the corpus is one token."""
    rng = random.Random(seed)
    texts = [m["content"] for _ in range(n_conversations) for m in conversation(rng).messages]
    texts += [
        " ".join(t.replace("[", " ").replace("]", " ").replace("|", " ") for t in f)
        for p in PATTERNS.values()
        for f in p.values()
    ] * 20
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts + ["system", "user", "assistant"] * 2000, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False)
    fast.chat_template = CHAT_TEMPLATE
    return fast


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
        """The template, piece by piece. Equal to the tokenizer's own rendering (tested), since no BPE merge crosses a piece."""
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
