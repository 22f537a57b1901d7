"""From rows to batches: padding, masks of positions, length sorting, and going on after running out of memory.

Knows: token ids, which positions of a padded batch are prompt, answer, or a message's content.
Does not know: models, hooks, templates, or what is done with a batch.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from pvsae.errors import UserError

if TYPE_CHECKING:
    from pvsae.models.chat import Rendered

T = TypeVar("T")

EVERYWHERE: frozenset[str] = frozenset({"response", "all"})  # what a decode step's positions are, whatever the row


@dataclass(frozen=True)
class Positions:
    """Which positions of a padded batch are what. Padding is none of them.

    Attributes:
        prompt: [batch pos] every prompt token, the generation prompt included.
        answer: [batch pos] every token after the prompt, as generation would have made it (thinking and end of turn included).
        last_prompt: [batch pos] the last prompt token, from which the first answer token is predicted.
        spans: [batch pos] masks of the content of a row's last message of a role, and "answer": the answer's content, without
            thinking and end of turn.
        full: names among "prompt", "response", "all" that hold at every position, so that no mask is needed there.
        empty: the same names where they hold nowhere.
    """

    prompt: Bool[Tensor, "batch pos"]
    answer: Bool[Tensor, "batch pos"]
    last_prompt: Bool[Tensor, "batch pos"]
    spans: dict[str, Bool[Tensor, "batch pos"]] = field(default_factory=dict)
    full: frozenset[str] = frozenset()
    empty: frozenset[str] = frozenset()

    @cached_property
    def response(self) -> Bool[Tensor, "batch pos"]:
        """The last prompt token and every token after it (paper section on steering while answering)."""
        return self.answer | self.last_prompt

    @cached_property
    def all(self) -> Bool[Tensor, "batch pos"]:
        """Every real token."""
        return self.prompt | self.answer

    def edit_mask(self, name: str) -> Bool[Tensor, "batch pos"] | bool:
        """Where an intervention at positions `name` applies: True everywhere, False nowhere, else a mask."""
        if name in self.full:
            return True
        if name in self.empty:
            return False
        return self.prompt if name == "prompt" else self.response if name == "response" else self.all

    def span(self, name: str) -> Bool[Tensor, "batch pos"]:
        """Mask of the tokens that a capture over span `name` reads; a role that no row has is an all-false mask."""
        if name == "prompt":
            return self.prompt
        if name == "all":
            return self.all
        if name in self.spans:
            return self.spans[name]
        return torch.zeros_like(self.prompt)

    def to(self, device: torch.device | str) -> Positions:
        """The same masks on another device."""
        spans = {name: mask.to(device) for name, mask in self.spans.items()}
        return replace(
            self,
            prompt=self.prompt.to(device),
            answer=self.answer.to(device),
            last_prompt=self.last_prompt.to(device),
            spans=spans,
        )

    @staticmethod
    def decode(batch: int, device: torch.device | str = "cpu") -> Positions:
        """Positions of one decode step: one generated token a row, no prompt, no padding. Can be reused for every step."""
        yes = torch.ones(batch, 1, dtype=torch.bool, device=device)
        no = torch.zeros_like(yes)
        return Positions(no, yes, no, {"answer": yes}, full=EVERYWHERE, empty=frozenset({"prompt"}))


@dataclass(frozen=True)
class TokenBatch:
    """A padded batch, ready for a forward pass.

    Attributes:
        input_ids: [batch pos] token ids of this forward (of the new tokens alone when there is a cache).
        attention_mask: [batch total] 1 at real tokens; total = cached positions + pos.
        position_ids: [batch pos] index of a token in its own row, padding not counted.
        positions: what each position is.
        left_padded: True when padding may stand before a real token, so that attention has to be told about it. Padding on
            the right is behind every real token, and causal attention never looks there.
        packed: True when a line of the batch may hold several rows, which must not see each other.
    """

    input_ids: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch total"]
    position_ids: Int[Tensor, "batch pos"]
    positions: Positions
    left_padded: bool
    packed: bool = False

    @staticmethod
    def build(
        rows: Sequence[Rendered], *, pad_id: int = 0, side: str = "right", device: torch.device | str = "cpu"
    ) -> TokenBatch:
        """Pads rows to the longest one.

        Args:
            rows: rendered chats; only their ids and spans are read.
            pad_id: the id to fill with; any valid id will do, padding is neither attended nor edited nor captured.
            side: "right" for reading a batch once, "left" for generating from it.
        """
        if side not in ("left", "right"):
            raise ValueError(f"side is {side!r}, not 'left' or 'right'")
        width = max(len(row.ids) for row in rows)
        n = len(rows)
        ids = torch.full((n, width), pad_id, dtype=torch.long)
        real = torch.zeros(n, width, dtype=torch.bool)
        prompt, answer, last = torch.zeros_like(real), torch.zeros_like(real), torch.zeros_like(real)
        spans: dict[str, Tensor] = {"answer": torch.zeros_like(real)}
        for i, row in enumerate(rows):
            length = len(row.ids)
            at = width - length if side == "left" else 0
            ids[i, at : at + length] = torch.tensor(row.ids, dtype=torch.long)
            real[i, at : at + length] = True
            prompt[i, at : at + row.n_prompt] = True
            answer[i, at + row.n_prompt : at + length] = True
            last[i, at + max(row.n_prompt - 1, 0)] = row.n_prompt > 0
            start, end = row.answer
            spans["answer"][i, at + start : at + end] = True
            for role in {role for role, _, _ in row.spans}:
                start, end = row.span(role)
                spans.setdefault(role, torch.zeros_like(real))[i, at + start : at + end] = True
        padded = not bool(real.all())
        position_ids = (real.long().cumsum(1) - 1).clamp(min=0)
        full = frozenset() if padded else frozenset({"all", "prompt"} if not bool(answer.any()) else {"all"})
        positions = Positions(prompt, answer, last, spans, full)
        batch = TokenBatch(ids, real.long(), position_ids, positions, left_padded=padded and side == "left")
        return batch.to(device)

    @staticmethod
    def pack(rows: Sequence[Rendered], *, pad_id: int = 0, width: int | None = None) -> tuple[TokenBatch, list[tuple[int, int]]]:
        """Lays rows one behind the other into as few lines of `width` tokens (the longest row's) as a first fit by length finds.

        Places within a row are counted from its own start, and every position is what it is in its own row. Spans of roles are
        left out: what reads a line at a time would mix rows.

        Returns: the batch, and of each row its line and the place of its first token there.
        """
        width = width or max(len(row.ids) for row in rows)
        used: list[int] = []
        places = [(0, 0)] * len(rows)
        for i in sorted(range(len(rows)), key=lambda i: -len(rows[i].ids)):
            line = next((n for n, taken in enumerate(used) if taken + len(rows[i].ids) <= width), len(used))
            used += [0] if line == len(used) else []
            places[i] = (line, used[line])
            used[line] += len(rows[i].ids)
        ids = torch.full((len(used), width), pad_id, dtype=torch.long)
        index = torch.zeros_like(ids)
        prompt, answer, last = (torch.zeros(len(used), width, dtype=torch.bool) for _ in range(3))
        for row, (line, at) in zip(rows, places, strict=True):
            end, behind = at + len(row.ids), at + row.n_prompt
            ids[line, at:end] = torch.tensor(row.ids, dtype=torch.long)
            index[line, at:end] = torch.arange(len(row.ids))
            prompt[line, at:behind] = True
            answer[line, behind:end] = True
            last[line, max(behind - 1, at)] = row.n_prompt > 0
        real = prompt | answer
        full = frozenset({"all"}) if bool(real.all()) else frozenset()
        positions = Positions(prompt, answer, last, full=full)
        return TokenBatch(ids, real.long(), index, positions, left_padded=False, packed=True), places

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same batch on another device."""
        if torch.device(device) == self.input_ids.device:
            return self
        return TokenBatch(
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.position_ids.to(device),
            self.positions.to(device),
            self.left_padded,
            self.packed,
        )


def length_sorted_batches(
    lengths: Sequence[int], *, batch_tokens: int | None = None, batch_size: int | None = None
) -> list[list[int]]:
    """Groups rows of like length, longest first, so that little is padded and memory runs out at the start or never.

    Args:
        lengths: tokens a row.
        batch_tokens: most tokens a batch, padding included; a row longer than that stands alone.
        batch_size: most rows a batch. At least one of the two limits has to be given.

    Returns: row indices, every row once.
    """
    if batch_tokens is None and batch_size is None:
        raise ValueError("give batch_tokens, batch_size, or both")
    for name, limit in (("batch_tokens", batch_tokens), ("batch_size", batch_size)):
        if limit is not None and limit < 1:
            raise UserError(f"{name} is {limit}", "at least 1")
    batches: list[list[int]] = []
    current: list[int] = []
    width = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        too_many = batch_size is not None and len(current) >= batch_size
        too_wide = batch_tokens is not None and (len(current) + 1) * width > batch_tokens
        if current and (too_many or too_wide):
            batches.append(current)
            current = []
        if not current:
            width = max(lengths[i], 1)
        current.append(i)
    if current:
        batches.append(current)
    return batches


def is_oom(error: BaseException) -> bool:
    """Whether an exception says that memory ran out (the CPU allocator raises a plain RuntimeError)."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in said or "not enough memory" in said)


def halving_on_oom(batches: Iterable[Sequence[int]], run: Callable[[list[int]], T]) -> Iterator[tuple[list[int], T]]:
    """Runs every batch; one that runs out of memory is halved and tried again, and the batches after it are cut as small.

    Args:
        batches: row indices a batch.
        run: does the work of one batch; it is called again with half the rows, so it must keep nothing of a failed call.

    Yields: (row indices, what `run` gave for them), every row once, in the order of the batches.
    Raises: UserError if a single row does not fit.
    """
    pieces = 1  # a share of a batch, not a number of rows: later batches hold more and shorter rows in the same memory
    for batch in batches:
        todo: deque[list[int]] = deque(split(list(batch), pieces))
        while todo:
            rows = todo.popleft()
            try:
                result = run(rows)
            except (RuntimeError, MemoryError) as error:
                if not is_oom(error):
                    raise
                if len(rows) == 1:
                    raise UserError(
                        f"out of memory with a single row (row {rows[0]})",
                        "one row to fit into memory",
                        "shorten the texts or max_new_tokens, use a smaller dtype, or a larger device",
                    ) from error
            else:
                yield rows, result
                continue
            # Outside of the handler, so that the traceback no longer holds the tensors of the failed call.
            if torch.cuda.is_available():
                gc.collect()
                torch.cuda.empty_cache()
            left = [*rows, *(row for piece in todo for row in piece)]
            half = -(-len(rows) // 2)
            todo = deque(left[i : i + half] for i in range(0, len(left), half))
            pieces = max(pieces, -(-len(batch) // half))


def split(rows: list[int], pieces: int) -> list[list[int]]:
    """Cuts a list into at most `pieces` runs of nearly equal length, none empty."""
    pieces = min(pieces, len(rows))
    if pieces <= 1:
        return [rows] if rows else []
    edges = [round(i * len(rows) / pieces) for i in range(pieces + 1)]
    return [rows[a:b] for a, b in pairwise(edges)]
