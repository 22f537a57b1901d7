"""Which characters of a string each of its tokens covers, and the tokens that overlap a stretch of characters.

Knows: the offsets of fast tokenizers and their habits (whitespace trimmed off, empty offsets, several tokens that share one
character), and the byte alphabet of byte-level BPE, whose tokens spell the text exactly.
Does not know: chat templates, or what the stretches mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Cover = list[tuple[int, int]]


def tokenise(tokenizer: Any, text: str, added: Mapping[int, str]) -> tuple[tuple[int, ...], Cover]:
    """Ids of a text, no special tokens added, and the characters [start, end) that each of them covers.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        text: the text, special tokens written out in it.
        added: id -> text of the tokenizer's added tokens.
    """
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = tuple(encoded["input_ids"])
    offsets = [(int(a), int(b)) for a, b in encoded["offset_mapping"]]
    if _tight(offsets, len(text)):
        return ids, offsets
    # Some tokenizers trim whitespace off their offsets, or report empty ones. The tokens' own bytes then decide.
    return ids, _byte_cover(tokenizer, text, ids, added) or _fill_gaps(offsets, len(text))


def first_beyond(cover: Sequence[tuple[int, int]], boundary: int) -> int:
    """Index of the first token that reaches beyond a character position."""
    return next((i for i, (_, end) in enumerate(cover) if end > boundary), len(cover))


def overlapping(cover: Sequence[tuple[int, int]], start: int, end: int) -> tuple[int, int]:
    """Span of the tokens that overlap the characters [start, end)."""
    first = first_beyond(cover, start)
    last = first
    while last < len(cover) and start < end and cover[last][0] < end:
        last += 1
    return first, last


def token_spans(
    cover: Sequence[tuple[int, int]], spans: Iterable[tuple[str, int, int]], limit: int
) -> tuple[tuple[str, int, int], ...]:
    """Character spans as token spans, none of them reaching beyond token `limit`."""
    found = ((role, overlapping(cover, start, end)) for role, start, end in spans)
    return tuple((role, min(first, limit), min(last, limit)) for role, (first, last) in found)


def _tight(offsets: Sequence[tuple[int, int]], length: int) -> bool:
    """True if the offsets cover the text without gaps, no token empty. Tokens that share one character repeat its offsets."""
    at, last = 0, (-1, -1)
    for start, end in offsets:
        if start >= end or (start != at and (start, end) != last):
            return False
        at, last = end, (start, end)
    return at == length


def _fill_gaps(offsets: Sequence[tuple[int, int]], length: int) -> Cover:
    """Give characters that no token claims (whitespace, as a rule) to the token behind them; the rest to the last token."""
    cover, at = [], 0
    for start, end in offsets:
        cover.append((min(start, at), max(end, min(start, at))) if start >= at and end > start else (start, end))
        at = max(at, end)
    if cover and at < length:
        cover[-1] = (cover[-1][0], length)
    return cover


def _byte_cover(tokenizer: Any, text: str, ids: Sequence[int], added: Mapping[int, str]) -> Cover | None:
    """Cover from the bytes that byte-level tokens stand for; None if they do not add up to the text's bytes."""
    pieces = []
    for i, token in zip(ids, tokenizer.convert_ids_to_tokens(list(ids)), strict=True):
        if i in added:
            pieces.append(added[i].encode())
        elif all(c in _BYTE_OF for c in token):
            pieces.append(bytes(_BYTE_OF[c] for c in token))
        else:
            return None
    if b"".join(pieces) != text.encode():
        return None
    char_at = [k for k, c in enumerate(text) for _ in c.encode()]
    cover, at = [], 0
    for piece in pieces:
        cover.append((char_at[at], char_at[at + len(piece) - 1] + 1) if piece else (at, at))
        at += len(piece)
    return cover


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE: printable Latin-1 stands for itself, the other bytes follow from 256 on."""
    shown = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}


_BYTE_OF = _byte_alphabet()
