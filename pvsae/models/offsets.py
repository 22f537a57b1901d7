"""Which characters of a string each of its tokens covers, and the tokens that overlap a stretch of characters.

Knows: the offsets of fast tokenizers and their habits (whitespace trimmed off, empty offsets, several tokens that share one
character), and the byte alphabet of byte-level BPE, whose tokens spell the text exactly.
Does not know: chat templates, or what the stretches mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

Cover = Int[np.ndarray, "tokens 2"]  # first character of each token, and the one behind its last


class Covering:
    """A tokenizer that says which characters each token covers.

    Byte-level tokens spell their text, so that their own lengths are all that is needed: no offsets are asked of the tokenizer,
    which takes it half as long again. Where the bytes do not add up to the text (another kind of tokens, a text that was
    normalised), the offsets decide.
    """

    def __init__(self, tokenizer: Any, added: Mapping[int, str]) -> None:
        """Takes a fast Hugging Face tokenizer, and id -> text of its added tokens."""
        self.tokenizer = tokenizer
        self._spelt: dict[int, bytes | None] = {i: text.encode() for i, text in added.items()}

    def __call__(self, text: str) -> tuple[tuple[int, ...], Cover]:
        """Ids of a text, special tokens written out in it and none added, and the characters [start, end) of each."""
        return self.all([text])[0]

    def all(self, texts: Sequence[str]) -> list[tuple[tuple[int, ...], Cover]]:
        """The same of each text, in one call of the tokenizer, which may use all cores for it."""
        if not texts:
            return []
        encoded = self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        return [(tuple(ids), self._cover(text, ids)) for text, ids in zip(texts, encoded, strict=True)]

    def _cover(self, text: str, ids: Sequence[int]) -> Cover:
        spelt = self._byte_cover(text, ids)
        if spelt is not None:
            return spelt
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = encoded["offset_mapping"]
        cover = np.array(offsets, dtype=np.int64).reshape(-1, 2)
        # Some tokenizers trim whitespace off their offsets, or report empty ones.
        return cover if _tight(cover, len(text)) else np.array(_fill_gaps(offsets, len(text)), dtype=np.int64).reshape(-1, 2)

    def _byte_cover(self, text: str, ids: Sequence[int]) -> Cover | None:
        """Cover from the bytes that byte-level tokens stand for; None if they do not add up to the text's bytes."""
        spelt = self._spelt
        for i in set(ids).difference(spelt):
            spelt[i] = _bytes_of(self.tokenizer.convert_ids_to_tokens(i))
        pieces = [spelt[i] for i in ids]
        raw = text.encode()
        if not all(pieces) or b"".join(pieces) != raw:  # type: ignore[arg-type]
            return None
        end = np.fromiter(map(len, pieces), np.int64, len(pieces)).cumsum()  # type: ignore[arg-type]
        start = np.concatenate([np.zeros(1, np.int64), end[:-1]])[: len(end)]
        if len(raw) != len(text):  # a byte belongs to the last character that begins at it or before it
            character = ((np.frombuffer(raw, np.uint8) & 0xC0) != 0x80).cumsum() - 1
            start, end = character[start], character[end - 1] + 1
        return np.stack([start, end], axis=1)


def first_beyond(cover: Cover, boundary: int) -> int:
    """Index of the first token that reaches beyond a character position."""
    return _first(cover[:, 1] > boundary)


def overlapping(cover: Cover, start: int, end: int) -> tuple[int, int]:
    """Span of the tokens that overlap the characters [start, end)."""
    first = first_beyond(cover, start)
    return first, first + (_first(cover[first:, 0] >= end) if start < end else 0)


def token_spans(cover: Cover, spans: Iterable[tuple[str, int, int]], limit: int) -> tuple[tuple[str, int, int], ...]:
    """Character spans as token spans, none of them reaching beyond token `limit`."""
    found = ((role, overlapping(cover, start, end)) for role, start, end in spans)
    return tuple((role, min(first, limit), min(last, limit)) for role, (first, last) in found)


def _first(mask: Bool[np.ndarray, " n"]) -> int:
    """Index of the first True; the length if there is none."""
    at = int(mask.argmax()) if len(mask) else 0
    return at if len(mask) and mask[at] else len(mask)


def _tight(cover: Cover, length: int) -> bool:
    """True if the offsets cover the text without gaps, no token empty. Tokens that share one character repeat its offsets."""
    if not len(cover):
        return length == 0
    start, end = cover[:, 0], cover[:, 1]
    same = (start[1:] == start[:-1]) & (end[1:] == end[:-1])
    whole = bool((start < end).all()) and start[0] == 0 and end[-1] == length
    return whole and bool(((start[1:] == end[:-1]) | same).all())


def _fill_gaps(offsets: Sequence[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    """Give characters that no token claims (whitespace, as a rule) to the token behind them; the rest to the last token."""
    cover, at = [], 0
    for start, end in offsets:
        cover.append((min(start, at), max(end, min(start, at))) if start >= at and end > start else (start, end))
        at = max(at, end)
    if cover and at < length:
        cover[-1] = (cover[-1][0], length)
    return cover


def _bytes_of(token: str | None) -> bytes | None:
    """What a byte-level token spells; None for a token of another kind."""
    return bytes(_BYTE_OF[c] for c in token) if token and all(c in _BYTE_OF for c in token) else None


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE: printable Latin-1 stands for itself, the other bytes follow from 256 on."""
    shown = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}


_BYTE_OF = _byte_alphabet()
