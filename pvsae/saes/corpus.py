"""Corpus: rows of token ids from one or several sources, mixed, cut or packed, each token marked as used or not.

Knows: how samples of several sources are drawn in turn, shuffled, kept apart for held-out use, and made into rows; how a walk
over them is stopped and gone on with, to the token.
Does not know: files and templates (sources.py, tokenising.py), storage (tokenstore.py), forward passes.

Everything random is a function of the seed and of a count (of draws, of epochs, of a sample's index), so that a position is a
handful of integers and nothing is tokenised or skipped over to go on at one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int32, UInt64

from pvsae.errors import UserError
from pvsae.runs import jsonable
from pvsae.saes.tokenising import ASSISTANT, ROLE_BITS, SPECIAL, TEXT, Tokeniser, Tokens
from pvsae.saes.tokenstore import TokenStore
from pvsae.sources import Reader, Source

if TYPE_CHECKING:
    from pvsae.models import ChatModel

log = logging.getLogger(__name__)

FITS = ("cut", "split", "pack")
DRAWS = 4096  # draws of sources that are made together
HELD_OUT, STRIP, SHUFFLE, MIX = range(1, 5)  # what a random number is for


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """What tokens a dictionary is trained on.

    Attributes:
        sources: where samples come from.
        context: most tokens a row.
        fit: "cut" keeps the first `context` tokens of a sample; "split" makes as many rows of a sample as it needs; "pack"
            fills rows with one sample behind another (attention reaches over their borders; texts are ended by an EOS token
            where the tokenizer writes no BOS). A row that begins inside of a sample gets BOS where the tokenizer writes one.
        tokens: "all", or "answers": of a chat the contents of the assistant's messages alone. Plain texts count whole.
        skip_special: leave special tokens out.
        drop_first: leave the first so many tokens of each row out: attention sinks (the paper's dictionaries: 8 on Qwen, 1 on
            Llama).
        held_out: share of the samples that training never sees. Which ones depends on their contents and the seed alone.
        repeat: never end; each source starts over, in another order, when it runs out.
        seed: of order, mixture, held-out share and system prompts.
    """

    sources: tuple[Source, ...]
    context: int = 1024
    fit: str = "cut"
    tokens: str = "all"
    skip_special: bool = True
    drop_first: int = 0
    held_out: float = 0.01
    repeat: bool = False
    seed: int = 0

    def check(self) -> None:
        """Raises UserError for values that cannot be right."""
        if not self.sources:
            raise UserError("a corpus without sources", "at least one source")
        for source in self.sources:
            source.check()
        if self.fit not in FITS:
            raise UserError(f"fit {self.fit!r}", "one of " + ", ".join(FITS))
        if self.tokens not in ("all", "answers"):
            raise UserError(f"tokens {self.tokens!r}", '"all" or "answers"')
        if not 0 <= self.held_out < 1:
            raise UserError(
                f"held_out {self.held_out}", "a share from 0 to less than 1", "0.01 keeps one sample in a hundred apart"
            )
        if self.seed < 0:
            raise UserError(f"seed {self.seed}", "a whole number from 0 on")
        if self.drop_first < 0 or self.context <= self.drop_first + 1:
            raise UserError(f"context {self.context} with drop_first {self.drop_first}", "a context that leaves tokens over")


class Row(NamedTuple):
    """A row of tokens for a forward pass.

    Attributes:
        ids: [pos] token ids, no padding.
        keep: [pos] the tokens whose activations are wanted.
        parts: where each sample begins in it: (position, source, the sample's index in the source).
    """

    ids: Int32[np.ndarray, " pos"]
    keep: Bool[np.ndarray, " pos"]
    parts: tuple[tuple[int, int, int], ...] = ()


class Corpus:
    """Sources, tokenised for a model and kept on disk; `rows` walks over them."""

    def __init__(
        self,
        model: ChatModel,
        config: CorpusConfig,
        folder: str | Path | None = None,
        *,
        chunk_tokens: int | None = None,
        progress: bool = True,
    ) -> None:
        """Opens the sources and tokenises the local ones, unless `folder` holds their tokens already.

        Args:
            model: its tokenizer and chat template are used, and its name for errors.
            folder: where tokens are kept, by hash of content, tokenizer and options; shared by any number of runs. None stands
                for $PVSAE_CACHE/tokens, or ~/.cache/pvsae/tokens.
            chunk_tokens: tokens a chunk on disk; of a streamed source also how much is shuffled together, and read before the
                first row can be had. None stands for 16 million, and 2 million of a streamed source.
            progress: whether to show bars.

        Raises: UserError for bad options, and for a source that cannot be opened or of which nothing can be used.
        """
        config.check()
        if config.context > model.n_ctx:
            raise UserError(f"context {config.context}, but {model.name} takes {model.n_ctx} tokens", f"at most {model.n_ctx}")
        self.config, self.tokeniser = config, Tokeniser(model.chat)
        readers = [Reader(source) for source in config.sources]  # all are checked before the first one is tokenised
        folder = Path(folder) if folder else Path(os.environ.get("PVSAE_CACHE") or Path.home() / ".cache" / "pvsae") / "tokens"
        self.stores = [self._store(i, reader, folder, chunk_tokens, progress) for i, reader in enumerate(readers)]
        for store in self.stores:
            if store.reader.source.streaming:
                store.chunk(0)
            else:
                store.make_all()
            if store.bad:
                n, why = store.bad.total(), ", ".join(f"{reason} ({n})" for reason, n in store.bad.most_common(5))
                log.warning("%s: %d rows left out: %s", store.reader.source.name, n, why)
            if not store.samples:
                why = ", ".join(f"{reason} ({n})" for reason, n in store.bad.most_common(3))
                raise UserError(f"source {store.reader.source.name} has no sample that can be used: {why}", "one at least")

    def _store(self, index: int, reader: Reader, folder: Path, chunk_tokens: int | None, progress: bool) -> TokenStore:
        source, seed = reader.source, self.config.seed
        chunk_tokens = chunk_tokens or (1 << 21 if source.streaming else 1 << 24)
        limit = self.config.context if self.config.fit == "cut" else None
        strip = source.strip_system if reader.kind == "chat" else 0.0
        key = [
            2, reader.content, self.tokeniser.fingerprint, reader.kind, reader.field, limit, chunk_tokens, source.max_samples,
            dict(source.roles), source.separator if reader.kind == "text" else None, strip, (seed, index) if strip else None,
        ]  # fmt: skip
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]

        def encode(values: list[Any], rows: list[int]) -> list[Any]:
            return self.tokeniser.encode(values, (_chance(rows, seed, STRIP, index) < strip).tolist(), limit)

        return TokenStore(folder / name, reader, encode, chunk_tokens=chunk_tokens, progress=progress)

    @property
    def fingerprint(self) -> str:
        """Hash of everything that the rows depend on."""
        key = [self.config, [store.folder.name for store in self.stores]]
        return hashlib.sha256(json.dumps(jsonable(key), sort_keys=True).encode()).hexdigest()[:20]

    @property
    def prepend_bos(self) -> bool:
        """Whether texts begin with a BOS token."""
        return self.tokeniser.bos_id is not None

    @property
    def rendering(self) -> dict[str, Any]:
        """How samples became rows, as plain values that are kept with a dictionary."""
        chat = self.tokeniser.chat
        return {
            "chat": chat.mode,
            "date": str(chat.date),
            "notes": list(chat.notes),
            "strip_system": {s.name: s.strip_system for s in self.config.sources if s.strip_system},
            "fit": self.config.fit,
            "tokens": self.config.tokens,
            "skip_special": self.config.skip_special,
        }

    def describe(self) -> list[dict[str, Any]]:
        """For each source: name, weight, samples and tokens on disk so far, and the rows left out, by reason."""
        return [
            {
                "source": store.reader.source.name,
                "kind": store.reader.kind,
                "weight": store.reader.source.weight,
                "samples": store.samples,
                "tokens": sum(c.tokens for c in store.chunks),
                "bad": dict(store.bad),
            }
            for store in self.stores
        ]

    def rows(self, *, held_out: bool = False, state: Mapping[str, Any] | None = None) -> Rows:
        """A walk over the training rows, or the held-out ones, from the start or from where a walk's `state` stood.

        The held-out walk passes over each source once, in file order (a source that runs out is left out from there on). A
        training walk ends with the first source that runs out, unless that repeats: the mixture stays what was asked for.
        """
        return Rows(self, held_out, state)

    # ------------------------------------------------------------------------------------------- what Rows asks of a corpus
    def sample(self, source: int, index: int) -> Tokens:
        """The tokens of a sample; in packed rows with the EOS token that ends a text."""
        store = self.stores[source]
        tokens = store.sample(index)
        eos = self.tokeniser.tokenizer.eos_token_id
        if self.config.fit != "pack" or store.reader.kind != "text" or self.prepend_bos or eos is None:
            return tokens
        return Tokens(np.append(tokens.ids, np.int32(eos)), np.append(tokens.flags, np.uint8(TEXT | SPECIAL)))

    def order(self, source: int, epoch: int, group: int, held_out: bool) -> Int[np.ndarray, " samples"] | None:
        """Indices of a source's samples in an epoch's order, without (or only) the held-out ones; None behind the last group.

        A group is what is shuffled together: the whole of a local source, one chunk of a streamed one.
        """
        store = self.stores[source]
        if store.reader.source.streaming:
            chunk = store.chunk(group)
            if chunk is None:
                return None
            first, keys = chunk.first, chunk.keys()
        elif group:
            return None
        else:
            first, keys = 0, store.keys()
        indices = np.arange(first, first + len(keys))
        apart = self.held_out(keys)
        if held_out:
            return indices[apart]
        kept = indices[~apart]
        return kept[np.random.default_rng((self.config.seed, SHUFFLE, source, epoch, group)).permutation(len(kept))]

    def held_out(self, keys: UInt64[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        """Which samples training never sees, by the hashes of their contents.

        So it is the same ones whatever sources they are read from, in whatever order, and no copy of one is trained on.
        """
        return _chance(keys, self.config.seed, HELD_OUT) < self.config.held_out

    def keep(self, tokens: Tokens) -> Bool[np.ndarray, " pos"]:
        """Which tokens of a row are wanted."""
        keep = np.ones(len(tokens.ids), dtype=bool)
        if self.config.skip_special:
            keep &= (tokens.flags & SPECIAL) == 0
        if self.config.tokens == "answers":
            keep &= np.isin(tokens.flags & ROLE_BITS, (ASSISTANT, TEXT))
        keep[: self.config.drop_first] = False
        return keep


class Rows:
    """A walk over a corpus: an iterator of rows, whose `state` is a few integers. Rows without a wanted token are left out."""

    def __init__(self, corpus: Corpus, held_out: bool, state: Mapping[str, Any] | None) -> None:
        self.corpus, self.config, self.held_out = corpus, corpus.config, held_out
        self._order = lru_cache(maxsize=2 * len(corpus.stores))(corpus.order)
        state = state or {}
        self._draws: int = state.get("draws", 0)
        # A source's epoch, group in it, and how many samples of the group were taken.
        self._cursors: list[list[int]] = [list(c) for c in state.get("cursors", [[0, 0, 0] for _ in corpus.stores])]
        # A sample of which a part is still to come: source, index, first token.
        self._rest: tuple[int, int, int] | None = tuple(state["rest"]) if state.get("rest") else None
        self._ended: bool = state.get("ended", False)

    def state(self) -> dict[str, Any]:
        """Where the walk stands; the next row of a walk from there is the next row of this one."""
        rest = list(self._rest) if self._rest else None
        return {"draws": self._draws, "cursors": [list(c) for c in self._cursors], "rest": rest, "ended": self._ended}

    def __iter__(self) -> Iterator[Row]:
        return self

    def __next__(self) -> Row:
        while (filled := self._fill()) is not None:
            tokens, begins = filled
            keep = self.corpus.keep(tokens)
            if keep.any():
                return Row(tokens.ids, keep, begins)
        raise StopIteration

    def _fill(self) -> tuple[Tokens, tuple[tuple[int, int, int], ...]] | None:
        """The tokens of the next row, and where its samples begin; None at the end."""
        parts: list[Tokens] = []
        begins: list[tuple[int, int, int]] = []
        room = self.config.context
        while room > 0:
            rest = self._rest or self._draw()
            if rest is None:
                break
            source, index, start = rest
            sample = self.corpus.sample(source, index)
            if start and not parts and (bos := self.corpus.tokeniser.bos_id) is not None:
                parts.append(Tokens(np.array([bos], np.int32), np.array([SPECIAL], np.uint8)))
                room -= 1
            part = Tokens(sample.ids[start : start + room], sample.flags[start : start + room])
            begins.append((self.config.context - room, source, index))
            parts.append(part)
            room -= len(part.ids)
            end = start + len(part.ids)
            self._rest = (source, index, end) if end < len(sample.ids) and self.config.fit != "cut" else None
            if self.config.fit != "pack":
                break
        if not parts:
            return None
        return Tokens(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True))), tuple(begins)

    def _draw(self) -> tuple[int, int, int] | None:
        """The next sample of the next source; None at the end."""
        while not self._ended:
            source = self._source(self._draws)
            index = self._take(source)
            if index is None and not self.held_out:
                self._ended = True
                break
            self._draws += 1
            if index is not None:
                return source, index, 0
            if all(self._at_end(s) for s in range(len(self._cursors))):
                self._ended = True
        return None

    def _source(self, draw: int) -> int:
        if len(self.corpus.stores) == 1:
            return 0
        weights = tuple(s.weight for s in self.config.sources)
        return int(_mix(weights, self.config.seed, self.held_out, draw // DRAWS)[draw % DRAWS])

    def _take(self, source: int) -> int | None:
        """Index of the source's next sample, moving its cursor; None if it has run out."""
        cursor = self._cursors[source]
        while True:
            epoch, group, taken = cursor
            order = self._order(source, epoch, group, self.held_out)
            if order is None:
                repeats = self.config.repeat or self.config.sources[source].repeat
                if self.held_out or not repeats or not self._any(source):
                    return None
                cursor[:] = [epoch + 1, 0, 0]
            elif taken < len(order):
                cursor[2] += 1
                return int(order[taken])
            else:
                cursor[:] = [epoch, group + 1, 0]

    def _at_end(self, source: int) -> bool:
        epoch, group, _ = self._cursors[source]
        return self._order(source, epoch, group, self.held_out) is None

    def _any(self, source: int) -> bool:
        """Whether a source has training samples at all, so that starting over leads somewhere."""
        return not bool(self.corpus.held_out(self.corpus.stores[source].keys()).all())


# ------------------------------------------------------------------------------------------------------------------- chance
def _chance(indices: Any, *key: int) -> np.ndarray:
    """A number in [0, 1) for each index, the same for the same index and key: a hash, so that nothing has to be remembered."""
    x: UInt64[np.ndarray, " n"] = np.asarray(indices, dtype=np.uint64)
    for part in key:
        x = scrambled(x ^ scrambled(np.full(1, part & 0xFFFFFFFFFFFFFFFF, dtype=np.uint64)))
    return (x >> np.uint64(11)).astype(np.float64) / 2.0**53


def scrambled(x: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """Steele, Lea and Flood's SplitMix64 (2014): every bit of the result depends on every bit of x. Overflow is meant."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@lru_cache(maxsize=8)
def _mix(weights: tuple[float, ...], seed: int, held_out: bool, block: int) -> Int[np.ndarray, " draws"]:
    """The sources of `DRAWS` draws in a row."""
    shares = np.cumsum(weights) / np.sum(weights)
    drawn = np.random.default_rng((seed, MIX, int(held_out), block)).random(DRAWS)
    return np.minimum(np.searchsorted(shares, drawn, side="right"), len(weights) - 1)
