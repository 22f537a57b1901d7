"""Config of a dictionary's training: one YAML file says which model, which text, which dictionaries, and how they are trained.

Knows: the parts of such a file, grids of dictionaries, where the shipped files lie.
Does not know: how YAML becomes dataclasses and how mistakes are said (settings.py), what is done with a config (the stages).

    model:    {name: organism}
    corpus:   {sources: [{named: organism, max_samples: 8000}], context: 128}        see corpus.CorpusConfig, sources.Source
    stream:   {buffer_tokens: 50_000}                                                see stream.StreamConfig
    training: {dictionaries: {block: 3, d_sae: [512, 1024], k: 8}, tokens: 1e6}      see trainer.TrainConfig

`dictionaries` is one entry or a list of them. A value of an entry may be a list: every combination is trained, all of them from
the same forward passes. Each has a folder of its own, called after its block, width, k and seed, and after its learning
rate where nothing else tells it from another.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pvsae import settings
from pvsae.errors import UserError
from pvsae.saes.corpus import CorpusConfig
from pvsae.saes.shipped import find
from pvsae.saes.stream import StreamConfig
from pvsae.saes.trainer import DictionaryConfig, TrainConfig

# What may change between the start of a training and its end: where and how the work is done, and not which work. On the same
# device none of it moves a number; another one multiplies and sums in its own ways. (A checkpoint refuses other width_shards.)
_FREE = {
    "about": None, "model": ("device",), "stream": ("overlap", "buffer_device", "shards"),
    "training": ("log_every", "checkpoint_every", "width_shards"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model's residuals.

    Attributes:
        name: a named model, a local folder or a hub id.
        adapter, dtype, device, attn, chat: as `pvsae.models.load` takes them.
    """

    name: str
    adapter: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    attn: str = "auto"
    chat: str = "auto"


@dataclass(frozen=True, kw_only=True)
class SaeTrainConfig:
    """A whole training.

    Attributes:
        about: a line on what it is for, shown by `pvsae sae list`.
        model, corpus, stream, training: see the classes.
    """

    model: ModelConfig
    corpus: CorpusConfig
    training: TrainConfig
    stream: StreamConfig = field(default_factory=StreamConfig)
    about: str = ""

    def check(self) -> None:
        """Raises UserError for parts that do not fit each other."""
        room = self.stream.buffer_tokens - max(self.stream.batch_tokens, self.corpus.context)
        if self.training.batch > room:
            raise UserError(
                f"training.batch {self.training.batch} with stream.buffer_tokens {self.stream.buffer_tokens}",
                f"a batch of at most {max(room, 0)} tokens beside a pass",
                "raise stream.buffer_tokens",
            )
        if not self.corpus.held_out:
            raise UserError(
                "corpus.held_out is 0", "a share above 0: thresholds are set on tokens that were not trained on", "0.01 will do"
            )

    def identity(self) -> dict[str, Any]:
        """The options that say what is trained; a run folder is resumed only under the same ones (but on any device)."""
        out: dict[str, Any] = {}
        for name, value in settings.plain(self).items():
            free = _FREE.get(name, ())
            if free is not None:
                out[name] = {key: item for key, item in value.items() if key not in free}
        return out


def load_config(name: str | Path, assignments: Sequence[str] = ()) -> SaeTrainConfig:
    """The config in a YAML file, or in a shipped one by its name, with `key=value` words applied.

    Raises:
        UserError: no such file, unknown keys (with the nearest known one), wrong types and values, each with the path of the key.
    """
    file = find(name)
    try:
        return config_of(settings.override(settings.read(file), assignments))
    except UserError as error:
        raise UserError(f"{file.name}: {error.what}", error.expected, error.fix) from None


def config_of(values: Mapping[str, Any]) -> SaeTrainConfig:
    """The config in plain values. UserError as `load_config`."""
    training = values.get("training")
    if isinstance(training, Mapping) and "dictionaries" in training:
        values = {**values, "training": {**training, "dictionaries": _combinations(training["dictionaries"])}}
    return settings.build(SaeTrainConfig, values)


def _combinations(entries: Any) -> tuple[DictionaryConfig, ...]:
    """Every dictionary of the entries, in order, the last key's values running fastest."""
    path = "training.dictionaries"
    if isinstance(entries, Mapping):
        return _combinations_of(entries, path)
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        keys = ", ".join(f.name for f in dataclasses.fields(DictionaryConfig))
        raise UserError(f"{path} is {entries!r}", f"an entry or a list of entries, each a mapping of: {keys}")
    return tuple(d for i, entry in enumerate(entries) for d in _combinations_of(entry, f"{path}.{i}"))


def _combinations_of(entry: Mapping[str, Any], path: str) -> tuple[DictionaryConfig, ...]:
    settings.check_keys(DictionaryConfig, entry, path)
    values = [value if isinstance(value, list) else [value] for value in entry.values()]
    return tuple(
        settings.build(DictionaryConfig, dict(zip(entry, some, strict=True)), path) for some in itertools.product(*values)
    )
