"""The one hook API: applies interventions and captures to a running model, as a context manager.

Knows: decoder blocks as torch modules, and in which order edits and reads happen at a block's output.
Does not know: what an edit computes (interventions.py) or a capture keeps (captures.py), tokenizers, batching.

At a block's output, the interventions of every open context run first (outer contexts before inner ones, each in the order
given), then every capture, so that a capture sees what the next block sees. An edit makes a new tensor, so autograd works through
it, and takes effect only at its positions; padding keeps its bits. While something is to be done at a block, one torch hook is
registered there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from pvsae.errors import UserError
from pvsae.models.batch import Positions
from pvsae.models.captures import Capture, Read
from pvsae.models.interventions import POSITIONS, Edit, Intervention

Applies = Callable[[Tensor | None, Tensor], Tensor | None]


class StopForward(Exception):
    """Raised after the last block that anybody asked for; caught by `HookStack.stopping_after`, never seen by users."""


class HookSession:
    """One open hook context: its interventions, its captures, and what the captures have read so far."""

    def __init__(self, stack: HookStack, interventions: Sequence[Intervention], captures: Sequence[Capture]) -> None:
        self.interventions = tuple(interventions)
        self.captures = tuple(captures)
        self._stack = stack
        self.edits = [(_Prepared(i), i.positions, i.block) for i in self.interventions]
        self._parts: dict[str, dict[int, Read]] = {}
        self._results: dict[str, list[Read]] = {capture.key: [] for capture in captures}

    @contextmanager
    def at(self, positions: Positions | None) -> Iterator[None]:
        """Says what the positions of the forward passes inside are; `ChatModel.forward` does it by itself.

        The masks have to be on the model's device. None stands for a forward pass about which nothing is known.
        """
        with self._stack.at(positions):
            yield

    def take(self) -> dict[str, list[Read]]:
        """What each capture read, by key: one entry a forward pass since the last call, on the model's device."""
        taken, self._results = self._results, {key: [] for key in self._results}
        return taken

    def store(self, capture: Capture, block: int, value: Read) -> None:
        """Keeps one block's part of a capture; with the last one, the result of this forward pass is complete."""
        parts = self._parts.setdefault(capture.key, {})
        parts[block] = value
        if len(parts) == len(set(capture.blocks)):
            self._results[capture.key].append(capture.join([parts[b] for b in capture.blocks]))
            del self._parts[capture.key]


class HookStack:
    """Every open hook context of one model, and the torch hooks that serve them."""

    def __init__(self, blocks: Sequence[nn.Module], decoder: nn.Module, d_model: int) -> None:
        self.blocks = list(blocks)
        self.decoder = decoder
        self.d_model = d_model
        self.positions: Positions | None = None
        self._sessions: list[HookSession] = []
        self._handles: list[Any] = []
        self._masks: dict[str, Tensor | bool] = {}
        self._raw_mask: Tensor | None = None
        self._tokens: tuple[Tensor | None, Tensor]
        self._stop_after: int | None = None

    @property
    def highest_captured(self) -> int:
        """The highest block that an open capture reads, -1 if there is none."""
        return max((b for s in self._sessions for c in s.captures for b in c.blocks), default=-1)

    @contextmanager
    def session(self, interventions: Sequence[Intervention], captures: Sequence[Capture]) -> Iterator[HookSession]:
        """Opens a context; everything wrong with it is a UserError here, before any forward pass."""
        check(interventions, captures, len(self.blocks), self.d_model)
        session = HookSession(self, interventions, captures)
        self._sessions.append(session)
        try:
            self._install()
            yield session
        finally:
            self._sessions.remove(session)
            self._install()

    @contextmanager
    def at(self, positions: Positions | None) -> Iterator[None]:
        """Sets the positions for the forward passes inside, and drops what was left of an unfinished one."""
        before = self.positions, self._masks
        self.positions, self._masks = positions, {}
        for session in self._sessions:
            session._parts.clear()
        try:
            yield
        finally:
            self.positions, self._masks = before

    @contextmanager
    def stopping_after(self, block: int) -> Iterator[None]:
        """Ends a forward pass inside after that block, quietly, in place of running the rest of the model.

        The block must have something to do (`highest_captured` has), since that is what its hook is there for.
        """
        self._stop_after = block
        try:
            with suppress(StopForward):
                yield
        finally:
            self._stop_after = None

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Takes the torch hooks away for a moment (to copy the modules)."""
        self._remove()
        try:
            yield
        finally:
            self._install()

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _install(self) -> None:
        """Registers what the open contexts need, in place of what was registered before."""
        self._remove()
        for index, block in enumerate(self.blocks):
            edits = [(edit, name) for session in self._sessions for edit, name, at in session.edits if at == index]
            reads = [(session, c) for session in self._sessions for c in session.captures if index in c.blocks]
            if edits or reads:
                self._handles.append(block.register_forward_hook(self._make_hook(index, edits, reads)))
        if self._handles:
            self._handles.append(self.decoder.register_forward_pre_hook(self._note_call, with_kwargs=True))

    def _make_hook(
        self, index: int, edits: list[tuple[_Prepared, str]], reads: list[tuple[HookSession, Capture]]
    ) -> Callable[[nn.Module, Any, Any], Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            kind = (output if isinstance(output, Tensor) else output[0]).device.type
            if torch.is_autocast_enabled(kind):  # it would take products of edits and captures in its own precision
                with torch.autocast(kind, enabled=False):
                    return act(output)
            return act(output)

        def act(output: Any) -> Any:
            h = before = output if isinstance(output, Tensor) else output[0]
            for prepared, name in edits:
                mask = self._edit_mask(name)
                if mask is False:
                    continue
                edit = prepared.edit_for(h)
                if edit is not None:
                    if prepared.applies is not None:
                        mask = self._mask_of_tokens(prepared.applies, mask)
                    h = edit(h) if mask is True else torch.where(mask, edit(h), h)
            if reads:
                positions = self.positions if self.positions is not None else self._raw_positions(h, reads)
                for session, capture in reads:
                    session.store(capture, index, capture.read(h, positions))
            if index == self._stop_after:
                raise StopForward
            if h is before:
                return None
            return h if isinstance(output, Tensor) else (h, *output[1:])

        return hook

    def _edit_mask(self, name: str) -> Tensor | bool:
        """Mask [batch pos 1] of an edit's positions, or True/False; made once a forward pass and name."""
        if self.positions is None:
            if name != "all":
                raise UserError(
                    f"an intervention at {name!r} positions, in a forward pass that does not say where its prompt ends",
                    "ChatModel.forward with a TokenBatch, or session.at(positions) around the call",
                    'use those, or positions="all"',
                )
            return True if self._raw_mask is None else self._raw_mask[..., None]
        found = self._masks.get(name)
        if found is None:
            where = self.positions.edit_mask(name)
            found = self._masks[name] = where if isinstance(where, bool) else where[..., None]
        return found

    def _mask_of_tokens(self, applies: Applies, mask: Tensor | Literal[True]) -> Tensor | Literal[True]:
        """The mask without the tokens that an intervention leaves alone by their ids and places."""
        here = applies(*self._tokens)
        return mask if here is None else here[..., None] & mask

    def _note_call(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Remembers the tokens where an intervention asks for them, and of a call that came without positions the attention mask,
        so that padding stays out of it all the same."""
        self._raw_mask = None
        if any(edit.applies is not None for session in self._sessions for edit, _, _ in session.edits):
            self._tokens = _tokens_of(args, kwargs)
        if self.positions is not None:
            return
        mask = kwargs.get("attention_mask")
        tokens = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        if tokens is None and args:
            tokens = args[0]
        for session in self._sessions:
            session._parts.clear()
        if isinstance(mask, Tensor) and mask.ndim == 2 and tokens is not None:
            self._raw_mask = mask[:, -tokens.shape[1] :].bool()

    def _raw_positions(self, h: Tensor, reads: list[tuple[HookSession, Capture]]) -> Positions:
        """What can be said of a forward pass without positions: where its real tokens are, and no more."""
        for _, capture in reads:
            span = getattr(capture, "span", "prompt")  # LastPrompt has no span, and needs to know the prompt's end
            if span not in ("all", None):
                raise UserError(
                    f"capture {capture.key!r} in a forward pass that does not say where its prompt and answer are",
                    "ChatModel.capture or ChatModel.forward with a TokenBatch, or session.at(positions) around the call",
                    'use those, or span "all"',
                )
        real: Bool[Tensor, "batch pos"]
        real = torch.ones(h.shape[:2], dtype=torch.bool, device=h.device) if self._raw_mask is None else self._raw_mask
        nowhere = torch.zeros_like(real)
        return Positions(real, nowhere, nowhere)


class _Prepared:
    """An intervention whose vectors are cast and moved once, when the first residual shows where and to what."""

    def __init__(self, intervention: Intervention) -> None:
        self.intervention = intervention
        self.dtype: torch.dtype | None = None
        self.device: torch.device | None = None
        self.edit: Edit | None = None
        self.applies: Applies | None = getattr(intervention, "applies", None)

    def edit_for(self, h: Tensor) -> Edit | None:
        if h.dtype is not self.dtype or h.device != self.device:
            # A vector made inside of inference_mode could not be used in training afterwards.
            with torch.inference_mode(False):
                self.edit = self.intervention.edit(h.device, h.dtype)
            self.dtype, self.device = h.dtype, h.device
        return self.edit


def _tokens_of(args: Any, kwargs: dict[str, Any]) -> tuple[Tensor | None, Tensor]:
    """(ids, index of each in its row) of a call of the decoder, [batch pos] each; no ids where it was given embeddings.

    A place counts real tokens, cached ones too. It is exact wherever attention is: with padding on the left a call has to bring
    position_ids or the mask over all tokens.
    """
    ids = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else (args[0] if args else None)
    given = ids if ids is not None else kwargs["inputs_embeds"]
    rows, width = given.shape[:2]
    index, mask, past = (kwargs.get(name) for name in ("position_ids", "attention_mask", "past_key_values"))
    if index is None and isinstance(mask, Tensor) and mask.ndim == 2:
        index = (mask.long().cumsum(1) - 1)[:, -width:]
    if index is None:
        start = past.get_seq_length() if past is not None else 0
        index = torch.arange(start, start + width, device=given.device)[None]
    return ids, index.expand(rows, width)


def check(interventions: Sequence[Intervention], captures: Sequence[Capture], n_blocks: int, d_model: int) -> None:
    """Raises UserError for an unknown block, another d_model, a NaN direction, unknown positions or spans, a key given twice."""
    sites: list[tuple[Intervention | Capture, tuple[int, ...]]] = [(i, (i.block,)) for i in interventions]
    sites += [(capture, capture.blocks) for capture in captures]
    for item, blocks in sites:
        name = type(item).__name__
        for block in blocks:
            if not isinstance(block, int) or isinstance(block, bool) or not 0 <= block < n_blocks:
                raise UserError(
                    f"{name} at block {block!r} of a model with {n_blocks} blocks",
                    f"a block index in 0..{n_blocks - 1}",
                    "block b is the output of decoder layer b; hidden_states[L] of Hugging Face is block L-1",
                )
        if not blocks:
            raise UserError(f"{name} names no block", f"block indices in 0..{n_blocks - 1}")
        problem = item.problem()
        if problem:
            raise UserError(f"{name}: {problem}", "finite values that fit")
        if item.d_model not in (None, d_model):
            raise UserError(
                f"{name} with d_model {item.d_model} on a model with d_model {d_model}",
                f"d_model {d_model}",
                "take a vector that was extracted from this model",
            )
    for edit in interventions:
        if edit.positions not in POSITIONS:
            raise UserError(f"{type(edit).__name__} at positions {edit.positions!r}", "one of " + ", ".join(POSITIONS))
    keys = [capture.key for capture in captures]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise UserError(f"captures with the same key: {', '.join(twice)}", "every capture once")
