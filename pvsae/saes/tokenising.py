"""From samples to token ids with a flag a token: whose words it is, and whether it is a special token.

Knows: the model's tokenizer and chat template, the spans that `ChatTemplate` finds in a chat, how to take a system prompt off.
Does not know: files, rows, masks or mixtures.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8

from pvsae.errors import UserError
from pvsae.models.chat import ChatTemplate, Rendered
from pvsae.sources import Bad, Value

# The flag of a token: its role, plus SPECIAL. What a template writes around the messages has the role TEMPLATE.
TEMPLATE, SYSTEM, USER, ASSISTANT, TEXT = range(5)
ROLE_BITS, SPECIAL = 7, 8
CODES = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}


class Tokens(NamedTuple):
    """One tokenised sample.

    Attributes:
        ids: token ids, with the BOS token in front where the tokenizer wants one.
        flags: the role of each token, plus SPECIAL where it is a special token.
    """

    ids: Int32[np.ndarray, " pos"]
    flags: UInt8[np.ndarray, " pos"]


class Tokeniser:
    """A model's tokenizer and chat template, as samples are turned into tokens by them."""

    def __init__(self, chat: ChatTemplate) -> None:
        self.chat, self.tokenizer = chat, chat.tokenizer
        bos = self.tokenizer.bos_token_id
        self.bos_id: int | None = bos if bos is not None and bos in self.tokenizer("x")["input_ids"][:1] else None
        added = self.tokenizer.added_tokens_decoder
        special = {int(i) for i, token in added.items() if token.special} | set(self.tokenizer.all_special_ids)
        self._special = np.zeros(max(len(self.tokenizer), *special, 0) + 1, dtype=np.uint8)
        self._special[list(special)] = SPECIAL

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that ids and flags depend on."""
        backend = self.tokenizer.backend_tokenizer.to_str()
        template = getattr(self.tokenizer, "chat_template", None)
        how = [backend, template, self.chat.mode, self.chat.system_mode, str(self.chat.date), self.bos_id]
        return hashlib.sha256(json.dumps(how).encode()).hexdigest()

    def encode(self, values: Sequence[Value], strip: Sequence[bool], limit: int | None = None) -> list[Tokens | Bad]:
        """Tokens of samples, or why there are none.

        Args:
            values: texts, or chats.
            strip: for each of them, whether a chat's system prompt is taken off.
            limit: most tokens a sample; the rest is cut off.
        """
        texts = [i for i, v in enumerate(values) if isinstance(v, str)]
        chats = [i for i, v in enumerate(values) if not isinstance(v, str)]
        found: list[Tokens | Bad] = [Bad("a text")] * len(values)
        bare = {i: tuple(m for m in values[i] if m["role"] != "system") for i in chats if strip[i]}  # type: ignore[index]
        with _all_cores():
            rendered = self.chat.conversations([bare.get(i) or values[i] for i in chats])  # type: ignore[misc]
            encoded = [values[i] for i in texts]
            encoded = (
                self.tokenizer(encoded, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
                if texts
                else []
            )
        for i, chat in zip(chats, rendered, strict=True):
            found[i] = self._chat(chat, strip[i], limit)
        for i, ids in zip(texts, encoded, strict=True):
            found[i] = self._text(ids if self.bos_id is None else [self.bos_id, *ids], limit)
        return found

    def _text(self, ids: Sequence[int], limit: int | None) -> Tokens | Bad:
        if not ids:
            return Bad("a text without tokens")
        kept = np.asarray(ids[:limit], dtype=np.int32)
        return Tokens(kept, self._special[kept] | np.uint8(TEXT))

    def _chat(self, chat: Rendered | UserError, strip: bool, limit: int | None) -> Tokens | Bad:
        if isinstance(chat, UserError):
            return Bad(f"the chat template refused it: {chat.what.splitlines()[0][:120]}")
        ids = np.asarray(chat.ids, dtype=np.int32)
        roles = np.zeros(len(ids), dtype=np.uint8)
        for role, start, end in chat.spans:
            roles[start:end] = CODES[role]
        tokens = Tokens(ids, roles | self._special[ids])
        if strip:
            first = next((start for role, start, end in chat.spans if role == "user" and end > start), 0)
            tokens = self._without_block(tokens, first)
        return Tokens(tokens.ids[:limit], tokens.flags[:limit]) if len(ids) else Bad("a chat without tokens")

    # ------------------------------------------------------------------------------------------------ the system prompt
    def _without_block(self, tokens: Tokens, first: int) -> Tokens:
        """Drops what stands between BOS and the header of the first user message: the template's own system prompt.

        Args:
            tokens: a chat without system messages.
            first: index of the first token of its first user message.
        """
        begin = int(len(tokens.ids) > 0 and int(tokens.ids[0]) == self.tokenizer.bos_token_id)
        if self._user_header is None:
            return tokens
        header, opening = self._user_header
        starts = np.flatnonzero(tokens.ids[begin:first] == opening)
        if not len(starts):
            return tokens
        at = begin + int(starts[-1])
        if not self.chat.decode(tokens.ids[at:first].tolist()).startswith(header.rstrip()):
            return tokens
        keep = np.r_[0:begin, at : len(tokens.ids)]
        return Tokens(tokens.ids[keep], tokens.flags[keep])

    @cached_property
    def _user_header(self) -> tuple[str, int] | None:
        """What the template writes in front of a user message, and the id it begins with; None if that cannot be told.

        Between an answer and the next question stand the end of a turn and the header of a user message; between a question
        and its answer the same end of turn and another header. What the two share, less what is already the beginning of a
        header (a conversation begins with one), is the end of turn. A header that begins with an added token can be cut off
        there, since tokenizers never merge over such a token.
        """
        turns = ("Aqz1", "Bqz2", "Cqz3", "Dqz4")
        messages = [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(turns)]
        try:
            text = self.chat.conversation(messages).text
        except UserError:
            return None
        if self.chat.mode == "plain" or not all(text.count(t) == 1 for t in turns):
            return None
        a, b, c = (text.index(t) for t in turns[:3])
        to_user, to_assistant = text[b + len(turns[1]) : c], text[a + len(turns[0]) : b]
        same = 0
        while same < min(len(to_user), len(to_assistant)) and to_user[same] == to_assistant[same]:
            same += 1
        bos = self.tokenizer.bos_token or ""
        head = text.removeprefix(bos) if self.bos_id is not None else text
        begun = next(n for n in range(same, -1, -1) if head.startswith(to_user[same - n : same]))
        header = to_user[same - begun :]
        ids: Any = self.tokenizer(header, add_special_tokens=False)["input_ids"]
        return (header, int(ids[0])) if ids and int(ids[0]) in self.tokenizer.added_tokens_decoder else None


@contextlib.contextmanager
def _all_cores() -> Iterator[None]:
    """Lets the tokenizers library use all cores (RAYON_NUM_THREADS limits them). The command line turns that off, for the sake
    of processes that fork; here it is most of the time, and nothing forks."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
