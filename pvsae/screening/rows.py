"""Rows: from what stands in a file to what a forward pass reads, or to the reason why it cannot be read.

Knows: that the answer is the last message and the prompt all before it; what makes a row unusable; how an answer that is longer
than the context is cut.
Does not know: base answers, vectors, files.

No row is lost: one that cannot be used has a status and a reason, and one that is cut says how much of it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pvsae.errors import UserError
from pvsae.sources import Bad

if TYPE_CHECKING:
    from pvsae.models.chat import ChatTemplate, Rendered
    from pvsae.sources import Value

OK, MALFORMED, NO_ANSWER, EMPTY, PROMPT_TOO_LONG = "ok", "malformed", "no answer", "empty answer", "prompt too long"
STATUSES = (OK, MALFORMED, NO_ANSWER, EMPTY, PROMPT_TOO_LONG)


@dataclass(frozen=True)
class Prepared:
    """A row that is ready, or not.

    Attributes:
        status: one of STATUSES.
        reason: in words, where the status is not OK.
        whole: prompt and answer, cut to the context; None where the status is not OK.
        prompt: the prompt alone, as a model is given it; None where the status is not OK.
        key: hash of the prompt's ids, the same wherever the prompt stands; empty where there is no prompt.
        cut: answer tokens that did not fit.
    """

    status: str
    reason: str = ""
    whole: Rendered | None = None
    prompt: Rendered | None = None
    key: str = ""
    cut: int = 0


def prepare(chat: ChatTemplate, values: Sequence[Value | Bad], longest: int) -> list[Prepared]:
    """Every row, rendered once and cut to `longest` tokens."""
    found = [_look(value) for value in values]
    whole = iter(chat.conversations([value for value, bad in zip(values, found, strict=True) if bad is None]))  # type: ignore[misc]
    out = []
    for value, bad in zip(values, found, strict=True):
        if bad is not None:
            out.append(bad)
            continue
        rendered = next(whole)
        out.append(_ready(chat, value, rendered, longest))  # type: ignore[arg-type]
    return out


def _look(value: Value | Bad) -> Prepared | None:
    """What can be said of a row without rendering it; None where nothing is wrong so far."""
    if isinstance(value, Bad):
        return Prepared(MALFORMED, value.reason)
    if isinstance(value, str):
        return Prepared(MALFORMED, "a text without messages")
    if len(value) < 2 or value[-1]["role"] != "assistant":
        return Prepared(NO_ANSWER, "the last message is not the assistant's" if len(value) > 1 else "fewer than two messages")
    return Prepared(EMPTY, "an answer without text") if not value[-1]["content"].strip() else None


def _ready(chat: ChatTemplate, messages: Sequence[dict[str, str]], rendered: Rendered | UserError, longest: int) -> Prepared:
    if isinstance(rendered, UserError):
        return Prepared(MALFORMED, rendered.what)
    start, end = rendered.answer
    if end <= start:
        return Prepared(EMPTY, "an answer without tokens of its own (thinking alone)")
    if start >= longest:
        return Prepared(PROMPT_TOO_LONG, f"the answer begins at token {start}, and {longest} tokens fit")
    prompt = chat.prompt(messages[:-1])
    if prompt.n_prompt >= longest:
        return Prepared(PROMPT_TOO_LONG, f"a prompt of {prompt.n_prompt} tokens, and {longest} fit")
    key = hashlib.sha256(np.asarray(prompt.ids, dtype="<i4").tobytes()).hexdigest()[:32]
    cut = max(0, end - longest)
    return Prepared(OK, "", rendered.clipped(longest), prompt, key, cut)
