"""Where the contents of messages stand in a rendered chat: by markers in their places.

Knows: pieces of messages, words that occur nowhere else, what stands between two strings' ends, the layout that is left of a
render when every content is a marker.
Does not know: templates and how they are rendered (chat.py), tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Message = Mapping[str, str]
Layout = tuple[str, ...]  # what a template writes before, between and behind the contents, one more than there are contents


@dataclass(frozen=True)
class Piece:
    """A stretch of content with one role inside one message that the template sees: before + body + after."""

    message: int
    role: str
    before: str
    body: str
    after: str


def messages_of(pieces: Sequence[Piece], marked: int = -1, marker: str = "") -> list[dict[str, str]]:
    """Messages put together from pieces, with the body of piece `marked` replaced by the marker."""
    messages: dict[int, dict[str, str]] = {}
    for i, piece in enumerate(pieces):
        so_far = messages.get(piece.message, {"content": ""})["content"]
        content = piece.before + (marker if i == marked else piece.body) + piece.after
        # A merged message has the role of its last piece, the user's.
        messages[piece.message] = {"role": piece.role, "content": so_far + content}
    return list(messages.values())


def marker_for(template: str, messages: Sequence[Message], kind: str = "M") -> str:
    """A word that occurs neither in the template nor in any message."""
    number = 0
    while any(f"{kind}qz{number}x" in text for text in (template, *(m["content"] for m in messages))):
        number += 1
    return f"{kind}qz{number}x"


def between(text: str, marked: Sequence[str], body: str) -> tuple[int, int] | None:
    """Character span of a content: what is left of `text` between the two sides of its marker."""
    if len(marked) != 2:
        return None
    left, right = marked
    end = len(text) - len(right)
    if text.startswith(left) and text.endswith(right) and len(left) <= end and text[len(left) : end] in body:
        return len(left), end
    if not body.strip():
        # An empty content that the template leaves out together with its header has an empty span where it would stand.
        at = common_prefix(left, text)
        return at, at
    return None


def common_prefix(a: str, b: str) -> int:
    """Characters that two strings have in common at their beginnings."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(i for i in range(n) if a[i] != b[i])


# ------------------------------------------------------------------------------------------------------------------ layouts
def all_marked(pieces: Sequence[Piece], marker: str) -> tuple[list[dict[str, str]], list[str]]:
    """The messages with a marker of its own in place of every body, and the markers."""
    markers = [f"{marker}{i}z" for i in range(len(pieces))]
    bare = [Piece(p.message, p.role, p.before, m, p.after) for p, m in zip(pieces, markers, strict=True)]
    return messages_of(bare), markers


def layout_of(text: str, markers: Sequence[str]) -> Layout | None:
    """What stands around the markers in a render of `all_marked` messages; None if one is not there once, or out of order."""
    layout = []
    for marker in markers:
        if text.count(marker) != 1:
            return None
        head, found, text = text.partition(marker)
        if not found:
            return None
        layout.append(head)
    return (*layout, text)


def spans_in(text: str, layout: Layout, bodies: Sequence[str]) -> list[tuple[int, int]] | None:
    """Character spans of the bodies, if `text` is the layout with all of them in it, as they are or all of them stripped.

    None otherwise. Where the lengths add up, each span can be in one place alone, and every character is compared.
    """
    around = sum(map(len, layout))
    for contents in (bodies, [body.strip() for body in bodies]):
        if around + sum(map(len, contents)) != len(text):
            continue
        spans, at = [], 0
        for before, content in zip(layout, contents, strict=False):
            start = at + len(before)
            at = start + len(content)
            if text[start - len(before) : start] != before or text[start:at] != content:
                break
            spans.append((start, at))
        else:
            if text[at:] == layout[-1]:
                return spans
    return None
