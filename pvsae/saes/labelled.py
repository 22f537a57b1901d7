"""Labelled text as rows of tokens: which tokens belong to which labelled stretch.

Knows: chat templates, offsets, and that a token belongs to the stretch in which its last character lies.
Does not know: what the labels mean, dictionaries, where labelled text comes from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from pvsae.errors import UserError
from pvsae.models.offsets import Cover, Covering
from pvsae.saes.evaluate import special_ids

if TYPE_CHECKING:
    from pvsae.models import ChatModel, Rendered

OUTSIDE = -1  # the segment of tokens that no label was given


@dataclass(frozen=True)
class Labels:
    """The labels that a stretch of text can carry, and the group of each; None is the group of those that express nothing.

    Attributes:
        group_of: label -> group.
    """

    group_of: Mapping[str, str | None]

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(self.group_of)

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """The groups, in the order in which they first occur."""
        return tuple(dict.fromkeys(g for g in self.group_of.values() if g is not None))

    def index(self, name: str) -> int:
        """Number of a label. UserError for one that is not known."""
        if name not in self.group_of:
            raise UserError(f"the label {name!r}", f"one of {len(self.names)}: {', '.join(self.names[:5])}, ...")
        return self.names.index(name)

    def of_group(self, group: str) -> tuple[str, ...]:
        """The labels of a group. UserError for one that is not known."""
        if group not in self.groups:
            raise UserError(f"no label belongs to {group!r}", f"one of {', '.join(self.groups)}")
        return tuple(name for name, g in self.group_of.items() if g == group)


class LabelledRow(NamedTuple):
    """A row of tokens with its labelled segments (sentences).

    Attributes:
        ids: [pos] token ids, no padding.
        keep: [pos] tokens that count.
        segment: [pos] index into `labels`, or OUTSIDE.
        labels: number of each segment's label.
    """

    ids: Int32[np.ndarray, " pos"]
    keep: Bool[np.ndarray, " pos"]
    segment: Int32[np.ndarray, " pos"]
    labels: tuple[int, ...]


def labelled_row(
    model: ChatModel,
    messages: Sequence[Mapping[str, str]],
    stretches: Iterable[tuple[int, int, int, str]],
    labels: Labels,
    *,
    drop_first: int = 0,
    tokens: str = "all",
) -> LabelledRow:
    """A chat as the model's template renders it, with its stretches carried over to tokens.

    Args:
        stretches: (message, start, end, label): characters [start, end) of that message's content.
        drop_first: the first so many tokens do not count (those that training left out); special tokens never do.
        tokens: "all", or "answers": of the chat the contents of the assistant's messages alone, as CorpusConfig means it.

    Raises: UserError for an unknown label, a stretch outside of its message, a template that does not keep the messages as they
        are, or a chat that is longer than the model's context.
    """
    rendered = model.chat.conversation(messages)
    if len(rendered.ids) > model.n_ctx:
        raise UserError(f"a chat of {len(rendered.ids)} tokens", f"at most {model.n_ctx}, the context of {model.name}")
    added = {int(i): str(token) for i, token in model.tokenizer.added_tokens_decoder.items()}
    ids, cover = Covering(model.tokenizer, added)(rendered.text)
    starts = _starts(rendered, cover, messages)
    segment = np.full(len(ids), OUTSIDE, dtype=np.int32)
    last_chars = cover[:, 1] - 1
    found: list[int] = []
    for message, start, end, label in stretches:
        if not 0 <= start < end <= len(messages[message]["content"]):
            raise UserError(f"a stretch from {start} to {end} in a message of {len(messages[message]['content'])} characters")
        at = starts[message]
        segment[(last_chars >= at + start) & (last_chars < at + end)] = len(found)
        found.append(labels.index(label))
    special = set(special_ids(model.tokenizer))
    keep = np.array([i not in special for i in ids])
    keep[:drop_first] = False
    if tokens == "answers":
        said = np.zeros(len(ids), dtype=bool)
        for role, start, end in rendered.spans:
            said[start:end] |= role == "assistant"
        keep &= said
    return LabelledRow(np.asarray(ids, dtype=np.int32), keep, segment, tuple(found))


def _starts(rendered: Rendered, cover: Cover, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Where each message's content begins in the rendered text: in, or right behind, the first token of its span."""
    starts = []
    for message, (_, first, last) in zip(messages, rendered.spans, strict=True):
        content = message["content"]
        at = rendered.text.find(content, cover[first][0]) if last > first else 0
        if at < 0 or (last > first and at >= cover[first][1]):
            raise UserError(f"the chat template changed a message: {content[:80]!r}", "a template that keeps texts as they are")
        starts.append(at)
    return starts
