"""The text of single tokens, as they stand in the middle of a sentence.

Knows: that decoding one token alone may lose its space, and that a character may be spread over several tokens.
Does not know: chats, features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BROKEN = "\ufffd"  # what a part of a character decodes to


class Pieces:
    """Texts of a tokenizer's tokens; each is decoded once."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._known: dict[int, str] = {}
        # A token decodes with its space only behind another one.
        self._before = [int(i) for i in tokenizer("a", add_special_tokens=False)["input_ids"]]
        self._length = len(self._decode(self._before))

    def of(self, token: int) -> str:
        """The text of one token."""
        if token not in self._known:
            self._known[token] = self._decode([*self._before, token])[self._length :]
        return self._known[token]

    def name(self, token: int) -> str:
        """The text of one token, or the tokenizer's own spelling of a part of a character."""
        text = self.of(token)
        return str(self.tokenizer.convert_ids_to_tokens(token)) if BROKEN in text or not text else text

    def texts(self, ids: Sequence[int]) -> list[str]:
        """The text of each token of a sequence. A character of several tokens stands at the first of them."""
        out = [self.of(int(i)) for i in ids]
        at = 0
        while at < len(out):
            end = at
            while end < len(out) and BROKEN in out[end]:
                end += 1
            if end > at:
                whole = self._decode([*self._before, *(int(i) for i in ids[at:end])])[self._length :]
                out[at:end] = [whole, *[""] * (end - at - 1)]
            at = end + 1
        return out

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
