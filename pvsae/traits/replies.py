"""JSON out of a language model's reply, which is seldom JSON alone.

Knows: the usual mess. Prose before and after, code fences, thinking blocks, curly quotes, trailing or missing commas, comments,
raw line breaks and unescaped quotes inside strings, single quotes, a reply that was cut off.
Does not know: what the JSON should say, beyond the key that is looked for.

Strict JSON is tried first and taken as it is. Only where that fails the tolerant reader below goes over the same text; it repairs
form, never content: of a list that was cut off, the complete items are returned and the broken one is left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

_CLOSING = {'"': '"', "“": '”"', "”": '”"', "„": '“”"', "«": "»", "'": "'", "‘": "’'"}
_THINKING = re.compile(r"<think(?:ing)?>.*?</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/|#[^\n]*", re.DOTALL)
_PLAIN = re.compile(r"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?|true|false|null|True|False|None")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}
_CUT = object()  # stands for a value that the end of the text cut off
_MAX_DEPTH = 20


def find_value(reply: str, key: str) -> Any:
    """The longest value of `key` in any JSON object of a reply, or the longest list if no object has that key.

    Args:
        reply: whatever the model wrote.
        key: the key that was asked for; its spelling in the reply may differ in case.

    Raises:
        ValueError: nothing of the kind is there.
    """
    text = _THINKING.sub("", reply)
    named: list[Any] = []
    bare: list[Any] = []
    end = 0  # parts of a value that was read already are not looked at again
    for match in re.finditer(r"[{\[]", text):
        if match.start() < end:
            continue
        try:
            value, end = _read(text, match.start())
        except ValueError:
            continue
        for part in _parts(value):
            if isinstance(part, dict):
                named += [inside for name, inside in part.items() if name.casefold() == key.casefold()]
            elif any(isinstance(item, (str, dict)) for item in part):
                bare.append(part)
    if not named and not bare:
        raise ValueError(f"no JSON with the key {key!r} in the reply")
    return _clean(max(named or bare, key=lambda value: len(str(value))))  # the form that was asked for, if repeated, is shorter


def _parts(value: Any) -> Iterator[Any]:
    """The value and every object and list inside it, from the outside in."""
    if isinstance(value, (dict, list)):
        yield value
        for inside in value.values() if isinstance(value, dict) else value:
            yield from _parts(inside)


def _read(text: str, start: int) -> tuple[Any, int]:
    try:
        return json.JSONDecoder(strict=False).raw_decode(text, start)
    except (json.JSONDecodeError, RecursionError):
        reader = _Tolerant(text, start)
        value = reader.value(0)
        if value is _CUT:
            raise ValueError("cut off") from None
        return value, reader.at


def _clean(value: Any) -> Any:
    """Replace halves of surrogate pairs, which no file can hold."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_clean(item) for item in value]
    if isinstance(value, dict):
        return {_clean(k): _clean(v) for k, v in value.items()}
    return value


class _Tolerant:
    """Recursive descent over almost-JSON. Raises ValueError where the text is nothing like it (e.g. a `{slot}` in prose)."""

    def __init__(self, text: str, at: int) -> None:
        self.text, self.at = text, at

    def value(self, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise ValueError("nested too deeply")
        self.skip()
        mark = self.peek()
        if not mark:
            return _CUT
        if mark == "{":
            return self.mapping(depth)
        if mark == "[":
            return self.sequence(depth)
        if mark in _CLOSING:
            return self.string()
        if plain := _PLAIN.match(self.text, self.at):
            self.at = plain.end()
            return json.loads({"True": "true", "False": "false", "None": "null"}.get(plain.group(), plain.group()))
        raise ValueError(f"{mark!r} begins no value")

    def sequence(self, depth: int) -> Any:
        self.at += 1
        items: list[Any] = []
        while True:
            self.skip(",")
            if self.peek() in ("]", ""):
                self.at += 1
                return items
            item = self.value(depth + 1)
            if item is _CUT:
                return items
            items.append(item)

    def mapping(self, depth: int) -> Any:
        self.at += 1
        pairs: dict[str, Any] = {}
        while True:
            self.skip(",;")
            mark = self.peek()
            if mark == "}":
                self.at += 1
                return pairs
            if mark == "":
                return pairs or _CUT
            if mark not in _CLOSING:
                raise ValueError(f"{mark!r} begins no key")
            key = self.string(key=True)
            self.skip()
            if key is _CUT or self.peek() == "":
                return pairs or _CUT
            if self.peek() != ":":
                raise ValueError(f"no colon after the key {key!r}")
            self.at += 1
            item = self.value(depth + 1)
            if item is _CUT:
                # Half a {"pos", "neg"} is no pair: an object inside another is dropped whole, the outermost one is kept.
                return pairs if depth == 0 and pairs else _CUT
            pairs[key] = item

    def string(self, *, key: bool = False) -> Any:
        closing = _CLOSING[self.text[self.at]]
        self.at += 1
        out: list[str] = []
        while self.at < len(self.text):
            mark = self.text[self.at]
            if mark == "\\" and self.at + 1 < len(self.text):
                out.append(self.escape())
            elif mark in closing and self.closes(key):
                self.at += 1
                return "".join(out)
            else:
                out.append(mark)
                self.at += 1
        return _CUT

    def escape(self) -> str:
        follower = self.text[self.at + 1]
        if follower == "u" and (digits := re.compile(r"[0-9a-fA-F]{4}").match(self.text, self.at + 2)):
            self.at += 6
            return chr(int(digits.group(), 16))
        self.at += 2
        return _ESCAPES.get(follower, follower)

    def closes(self, key: bool) -> bool:
        """Whether the quote here ends its string: JSON's structure goes on behind it. A quote inside a sentence fails this."""
        rest = self.text[self.at + 1 : self.at + 400]
        after = rest.lstrip()
        if key:
            return after.startswith(":")
        if not after or after[0] in "}]" or after.startswith(("```", "//", "/*")):
            return True
        if after[0] == ",":
            behind = after[1:].lstrip()
            return not behind or behind[0] in "}]{[/" or behind[0] in _CLOSING
        return "\n" in rest[: len(rest) - len(after)] and after[0] in _CLOSING  # the comma between two lines was forgotten

    def skip(self, also: str = "") -> None:
        while self.at < len(self.text):
            if self.text[self.at].isspace() or self.text[self.at] in also:
                self.at += 1
            elif comment := _COMMENT.match(self.text, self.at):
                self.at = comment.end()
            else:
                return

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]
