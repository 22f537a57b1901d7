"""The key-value cache of generation: grows without copying itself at every step, and lets rows and padding go.

Knows: transformers' DynamicCache and its layers.
Does not know: tokens, sampling, hooks.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

ROOM = 128  # least number of positions that a buffer grows by


class RoomyLayer(DynamicLayer):
    """A DynamicLayer that writes new keys and values into a buffer with room to spare. The plain one concatenates, which
    copies everything cached so far at every step. Not for training: it writes in place."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends [batch heads pos d_head] keys and values; returns all of them, as views into the buffers."""
        old, new = self.get_seq_length(), self.get_seq_length() + key_states.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._buffers is None or self._buffers[0].shape[-2] < new:
            room = new + max(ROOM, new // 4)
            assert self.keys is not None  # lazy_initialization made them
            assert self.values is not None
            self._buffers = (_grown(self.keys, key_states, old, room), _grown(self.values, value_states, old, room))
        keys, values = self._buffers
        keys[..., old:new, :] = key_states
        values[..., old:new, :] = value_states
        self.keys, self.values = keys[..., :new, :], values[..., :new, :]
        return self.keys, self.values

    def keep(self, rows: Int[Tensor, " kept"], first: int) -> None:
        """Keeps these rows, from column `first` on."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[rows, :, first:], self.values[rows, :, first:]
        self._buffers = None


def new_cache(config: Any) -> DynamicCache:
    """An empty cache of the kind that the model's layers want: RoomyLayer for full attention, transformers' own for the rest."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def keep_rows(cache: DynamicCache, rows: Int[Tensor, " kept"], padding: int) -> int:
    """Keeps these rows of a cache in place, and cuts off `padding` columns on the left if all its layers can do that.

    Returns: the number of columns cut.
    """
    cut = padding if all(isinstance(layer, RoomyLayer) for layer in cache.layers) else 0
    layer: Any
    for layer in cache.layers:
        if isinstance(layer, RoomyLayer):
            layer.keep(rows, cut)
        else:
            layer.batch_select_indices(rows)
    return cut


def _grown(old: Tensor, like: Tensor, length: int, room: int) -> Tensor:
    """A buffer [batch heads room d_head] that starts with what was cached."""
    buffer = torch.empty((*like.shape[:-2], room, like.shape[-1]), dtype=like.dtype, device=like.device)
    if length:
        buffer[..., :length, :] = old
    return buffer
