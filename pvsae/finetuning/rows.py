"""Rows of a finetuning: chats as token ids, with exactly those tokens marked that are to be learnt.

Knows: which tokens of a rendered chat an assistant wrote, what becomes of rows that are too long or have nothing to learn, and
the order in which rows are seen.
Does not know: files, models, losses, traits.

Learnt are the tokens that a model would have to write: an answer's content, thinking in front of it, and the token that ends the
turn. Everything else, such as white space that the template puts behind that token, is context. No row is lost silently: `Counts`
says what happened to each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from pvsae.errors import UserError
from pvsae.models.chat import Message, Rendered

if TYPE_CHECKING:
    from pvsae.models.chat import ChatTemplate

TURNS = ("all", "last")
TOO_LONG = ("truncate", "drop")
EMPTY, NO_ANSWER, CUT_AWAY, LONG, TRUNCATED = (
    "an empty answer",
    "no answer in it",
    "its prompt alone is longer than max_length",
    "longer than max_length",
    "cut at max_length",
)
_AT_ONCE = 256  # chats tokenised together
_NAMED = 5  # rows that are named of those left out for one reason


@dataclass(frozen=True)
class Row:
    """A chat to learn from.

    Attributes:
        rendered: its ids and spans.
        learnt: spans of tokens that are learnt, half-open, in order; each token is predicted at the position before it.
        number: which row of the data it is, counted from 0 over all that was read.
    """

    rendered: Rendered
    learnt: tuple[tuple[int, int], ...]
    number: int = 0

    @property
    def n_learnt(self) -> int:
        """Tokens that are learnt; a token at the very start, which nothing predicts, is none."""
        return sum(end - max(start, 1) for start, end in self.learnt)


@dataclass
class Counts:
    """What became of the rows that were read.

    Attributes:
        read: rows of the data, good and bad.
        used: rows that are trained on.
        left_out: reason -> rows.
        changed: what was done -> rows, of those that are used.
        examples: reason -> numbers of the first few rows that it left out, counted from 0 over all that was read.
        tokens, learnt: of the rows used, in one pass over them.
    """

    read: int = 0
    used: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[int]] = field(default_factory=dict)
    tokens: int = 0
    learnt: int = 0

    def leave_out(self, reason: str, number: int) -> None:
        """Counts a row that is not used."""
        self.left_out[reason] += 1
        some = self.examples.setdefault(reason, [])
        if len(some) < _NAMED:
            some.append(number)


def make_rows(
    chats: Iterable[Sequence[Message] | str],
    template: ChatTemplate,
    *,
    max_length: int,
    too_long: str = "truncate",
    turns: str = "all",
    progress: str | None = None,
) -> tuple[list[Row], Counts]:
    """Rendered rows of the chats that can be learnt from.

    Args:
        chats: messages; or, in the place of a row that could not be read, the reason as text.
        template: renders them.
        max_length: most tokens of a row.
        too_long: longer ones are cut behind that token ("truncate", as the released code does) or left out ("drop").
        turns: learn every answer of a chat ("all", as the released code does) or the last one.
        progress: label of a progress bar, or None for none.

    Raises:
        UserError: unknown options.
    """
    for name, value, allowed in (("turns", turns, TURNS), ("too_long", too_long, TOO_LONG)):
        if value not in allowed:
            raise UserError(f"{name} is {value!r}", "one of " + ", ".join(allowed))
    if max_length < 2:
        raise UserError(f"max_length is {max_length}", "at least 2 tokens")
    rows: list[Row] = []
    counts = Counts()
    waiting: list[tuple[int, Sequence[Message]]] = []

    def render() -> None:
        for (number, _), rendered in zip(waiting, template.conversations([chat for _, chat in waiting]), strict=True):
            if isinstance(rendered, UserError):
                counts.leave_out(rendered.what.splitlines()[0][:200], number)
                continue
            row = _fitted(Row(rendered, learnt_spans(rendered, template.stop_ids, turns), number), max_length, too_long, counts)
            if row is not None:
                rows.append(row)
        waiting.clear()

    for chat in tqdm(chats, desc=progress, disable=progress is None, unit=" rows"):
        counts.read += 1
        problem = chat if isinstance(chat, str) else _problem(chat, turns)
        if problem is not None:
            counts.leave_out(problem, counts.read - 1)
            continue
        assert not isinstance(chat, str)
        waiting.append((counts.read - 1, chat))
        if len(waiting) == _AT_ONCE:
            render()
    render()
    counts.used = len(rows)
    counts.tokens = sum(len(row.rendered.ids) for row in rows)
    counts.learnt = sum(row.n_learnt for row in rows)
    return rows, counts


def learnt_spans(rendered: Rendered, stop_ids: Sequence[int], turns: str = "all") -> tuple[tuple[int, int], ...]:
    """Spans of the tokens that the assistant wrote, each with the stop token that ends it.

    The last answer begins where its prompt ends, thinking included; of earlier ones the content counts, which is all that
    templates keep of them.
    """
    ids, spans = rendered.ids, []
    for role, start, end in rendered.spans[:-1] if turns == "all" else ():
        if role == "assistant" and end > start:
            spans.append((start, end + (end < len(ids) and ids[end] in stop_ids)))
    start, end = rendered.answer
    if end > start:
        spans.append((rendered.n_prompt, end + (end < len(ids) and ids[end] in stop_ids)))
    return tuple(spans)


def _problem(chat: Sequence[Message], turns: str) -> str | None:
    """Why nothing can be learnt from a chat, or None."""
    answers = [message["content"] for message in chat if message["role"] == "assistant"]
    if not answers or (turns == "last" and chat[-1]["role"] != "assistant"):
        return NO_ANSWER
    if chat[-1]["role"] == "assistant" and not answers[-1].strip():
        return EMPTY
    return None if any(answer.strip() for answer in answers) else EMPTY


def _fitted(row: Row, max_length: int, too_long: str, counts: Counts) -> Row | None:
    """The row in at most max_length tokens, or None where nothing is left to learn; counted either way."""
    long = len(row.rendered.ids) > max_length
    if long and too_long == "drop":
        counts.leave_out(LONG, row.number)
        return None
    if long:
        row = Row(row.rendered.clipped(max_length), _clipped_spans(row.learnt, max_length), row.number)
    if row.n_learnt == 0:
        counts.leave_out(CUT_AWAY if long else NO_ANSWER, row.number)
        return None
    if long:
        counts.changed[TRUNCATED] += 1
    return row


def _clipped_spans(spans: Sequence[tuple[int, int]], length: int) -> tuple[tuple[int, int], ...]:
    return tuple((start, min(end, length)) for start, end in spans if start < length)


def with_system(chat: Sequence[Message], text: str) -> tuple[Message, ...]:
    """The chat under a system prompt; one that it has already follows behind it, a blank line between."""
    if chat and chat[0]["role"] == "system":
        return ({"role": "system", "content": f"{text}\n\n{chat[0]['content']}"}, *chat[1:])
    return ({"role": "system", "content": text}, *chat)


def order(n_rows: int, n: int, seed: int) -> list[int]:
    """Indices of the first `n` rows that are seen: every row once a pass, each pass in an order of its own.

    It depends on the seed and the number of rows alone, so that two trainings on the same rows see them in the same order.
    """
    generator = torch.Generator().manual_seed(seed)
    out: list[int] = []
    while len(out) < n:
        out += torch.randperm(n_rows, generator=generator).tolist()
    return out[:n]
