"""Activation stream: from a corpus and a model to shuffled batches of residuals.

Knows: the order of the work (rows, forward pass, outlier filter, shuffle buffer, batch), how it is stopped and gone on with bit
for bit, and what is measured before it starts (scale, median norms).
Does not know: what the batches are for. They have the residuals' own scale; a trainer multiplies them by `scale`.

A pass is admitted to the buffer as soon as there is room for it, which depends on counts alone. So the same batches come
whether the next pass is computed ahead on a GPU, read from shards, or computed when it is needed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from pvsae.errors import UserError
from pvsae.models import ChatModel
from pvsae.models.fingerprint import fingerprint
from pvsae.models.hooks import check
from pvsae.models.loading import resolve_device
from pvsae.saes.buffer import Batch, ShuffleBuffer
from pvsae.saes.corpus import Corpus, Row, Rows
from pvsae.saes.harvest import TokenResiduals, harvest, passes_of, windows
from pvsae.saes.info import OutlierFilter, SAEInfo
from pvsae.saes.outliers import RunningMedians, inliers, norms_of
from pvsae.saes.parallel import ALONE, Group
from pvsae.saes.shards import Shards
from pvsae.settings import plain

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """How activations are made and mixed.

    Attributes:
        batch_tokens: most tokens of a forward pass, padding counted.
        window: forward passes whose rows are sorted by length together, so that little is padded.
        buffer_tokens: tokens in the shuffle buffer.
        dtype: "bfloat16" or "float32": of the buffer, the batches and the shards.
        buffer_device: where the buffer lives; None stands for the model's device.
        outlier_multiple: tokens whose norm is above so many times the running median are left out (the paper's dictionaries:
            10); None leaves none out. A token that is an outlier at one block is left out for all blocks of the pass, since
            their batches hold the same tokens.
        calibration_tokens: tokens on which scale and first median are measured, held-out ones if there are any. If there are
            fewer, those are used, and `info` has a note that says so.
        shards: folder in which activations are kept, so that other runs on the same model, corpus, blocks and batch_tokens read
            them in place of running the model; None keeps none.
        overlap: on a GPU, compute the next pass while the last batch is being used. It does nothing beside `shards`, whose passes
            are run, or read, when they are needed.
        seed: of the buffer and the order of passes.
    """

    batch_tokens: int = 8192
    window: int = 8
    buffer_tokens: int = 250_000
    dtype: str = "bfloat16"
    buffer_device: str | None = None
    outlier_multiple: float | None = 10.0
    calibration_tokens: int = 32_768
    shards: str | None = None
    overlap: bool = True
    seed: int = 0

    def check(self) -> None:
        """Raises UserError for values that cannot be right."""
        if self.dtype not in DTYPES:
            raise UserError(f"dtype {self.dtype!r} of the activation stream", "one of " + ", ".join(DTYPES))
        for name in ("batch_tokens", "window", "buffer_tokens", "calibration_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}", "at least 1")
        if self.seed < 0:
            raise UserError(f"seed {self.seed}", "a whole number from 0 on")
        if self.outlier_multiple is not None and not 1 < self.outlier_multiple < math.inf:
            raise UserError(f"outlier_multiple {self.outlier_multiple}", "a number above 1, or null to keep outliers")


@dataclass(frozen=True)
class Calibration:
    """What is measured before the stream starts.

    Attributes:
        median: block -> median norm of all tokens.
        scale: block -> the factor s with which the mean of |s x|^2 over tokens without outliers is d_model.
        tokens: on how many tokens.
    """

    median: dict[int, float]
    scale: dict[int, float]
    tokens: int


class _Pass(NamedTuple):
    """The activations of one forward pass, and where the walk over the corpus stands behind it."""

    activations: Batch
    after: dict[str, Any]
    ready: Any = None  # CUDA event


class ActivationStream:
    """Shuffled batches of the residuals of one or several blocks, from one forward pass that stops at the highest of them.

    Attributes:
        blocks: the blocks, ascending.
        buffer: the shuffle buffer.
        counts: tokens that were harvested, left out as outliers, and given out.
    """

    def __init__(
        self,
        model: ChatModel,
        corpus: Corpus,
        blocks: Sequence[int],
        config: StreamConfig | None = None,
        *,
        group: Group = ALONE,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        """Checks everything and allocates the buffer; no forward pass is run.

        Args:
            model, corpus: what is run on what.
            blocks: whose outputs to read.
            config: how.
            group: processes that stream together. Each runs its share of the forward passes and sends the others what it read,
                so that all of them get the batches that one process would have made. (With `shards` each runs what is missing,
                and the first one writes.)
            about: plain values that are to be kept with a dictionary's record of its training, such as the model's options.

        Raises: UserError for bad options, an unknown block, a device that is not there, too little memory, or shards of another
            stream.
        """
        self.config = config or StreamConfig()
        self.config.check()
        self.model, self.corpus, self.blocks, self.group = model, corpus, tuple(sorted(set(blocks))), group
        self.dtype, self.about = DTYPES[self.config.dtype], dict(about or {})
        check((), [TokenResiduals(self.blocks, torch.empty(0), self.dtype)], model.n_blocks, model.d_model)
        # A row that is longer than a pass should be stands alone in one.
        self._most = max(self.config.batch_tokens, corpus.config.context)
        if self.config.buffer_tokens < 2 * self._most:
            raise UserError(
                f"buffer_tokens {self.config.buffer_tokens} with passes of up to {self._most} tokens",
                f"at least {2 * self._most}, better twenty times a pass: batches are mixed from what is in the buffer",
                "raise buffer_tokens, or lower batch_tokens or the corpus's context",
            )
        self.shards = Shards(self.config.shards, self._about()) if self.config.shards else None
        device = resolve_device(self.config.buffer_device or model.device)
        self.buffer = ShuffleBuffer(
            self.blocks, self.config.buffer_tokens, model.d_model, dtype=self.dtype, device=device, seed=self.config.seed
        )
        self.counts = {"harvested": 0, "outliers": 0, "drawn": 0}
        self._position: dict[str, Any] = {"rows": corpus.rows().state(), "window": 0, "passes": 0}
        self._medians: RunningMedians | None = None
        self._ended = False
        self._source: Iterator[_Pass] | None = None
        self._ahead: _Pass | None = None
        overlaps = self.config.overlap and model.device.type == "cuda" and self.shards is None
        self._side = torch.cuda.Stream(model.device) if overlaps else None
        if self._side is not None:
            self._side.wait_stream(torch.cuda.current_stream(model.device))  # the weights may still be on their way

    # ---------------------------------------------------------------------------------------------------------- batches
    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Batches of exactly `batch_size` tokens, block -> [batch_size d_model], until the corpus ends.

        What is left at the end and does not fill a batch is not given out. Batches may be asked for by several calls in turn;
        all go on where the stream stands.

        Raises: UserError for a batch that the buffer cannot hold beside a pass, and for activations that are not finite.
        """
        if not 1 <= batch_size <= self.config.buffer_tokens - self._most:
            raise UserError(
                f"batches of {batch_size} tokens from a buffer of {self.config.buffer_tokens} with passes of {self._most}",
                f"1 to {self.config.buffer_tokens - self._most}",
                "raise buffer_tokens",
            )
        while True:
            while not self._ended and self.buffer.free >= self._most:
                self._admit()
            if len(self.buffer) < batch_size:
                return
            batch = self.buffer.take(batch_size)
            self.counts["drawn"] += batch_size
            yield {b: x.to(self.model.device) for b, x in batch.items()}

    def _admit(self) -> None:
        """Puts the next pass, less its outliers, into the buffer."""
        made = self._ahead or self._next()
        self._ahead = None
        if made is None:
            self._ended = True
            return
        if made.ready is not None:
            main = torch.cuda.current_stream(self.model.device)
            main.wait_event(made.ready)
            for x in made.activations.values():
                x.record_stream(main)
        keep = self._without_outliers(made.activations)
        self.buffer.add(made.activations, None if bool(keep.all()) else keep.nonzero()[:, 0])
        self._position = made.after
        self.counts["harvested"] += len(keep)
        self.counts["outliers"] += int((~keep).sum())
        if self._side is not None:
            self._ahead = self._next()

    def _next(self) -> _Pass | None:
        """The next pass; on a GPU it is only started, on a stream of its own."""
        if self._source is None:
            self._source = self._passes()
        if self._side is None:
            return next(self._source, None)
        with torch.cuda.stream(self._side):
            made = next(self._source, None)
            return made and made._replace(ready=self._side.record_event())

    def _passes(self) -> Iterator[_Pass]:
        """Passes from where the stream stands."""
        skip, number = self._position["passes"], self._position["window"]
        walk = self.corpus.rows(state=self._position["rows"])
        while True:
            before = walk.state()
            window = next(windows(walk, self.config.batch_tokens, self.config.window), None)
            if window is None:
                return
            rows = passes_of(window, self.config.batch_tokens, (self.config.seed, number))
            for i, activations in enumerate(self._computed(number, rows, skip), skip):
                yield _Pass(activations, {"rows": before, "window": number, "passes": i + 1})
            number, skip = number + 1, 0

    def _computed(self, number: int, rows: list[list[Row]], skip: int) -> Iterator[Batch]:
        """Activations of a window's passes from `skip` on: from its shard, or from the model (and then kept as a shard)."""
        if self.shards is None:
            yield from self._shared(rows[skip:])
            return
        held = self.shards.load(number)
        if held is None or len(held) != len(rows):
            held = [{b: x.cpu() for b, x in self._harvest(some).items()} for some in rows]
            if self.group.rank == 0:
                self.shards.save(number, held)
        yield from held[skip:]

    def _shared(self, passes: list[list[Row]]) -> Iterator[Batch]:
        """Activations of passes, which the processes of the group run in turn."""
        rank, size = self.group.rank, self.group.size
        for at in range(0, len(passes), size):
            some = passes[at : at + size]
            mine = self._harvest(some[rank]) if rank < len(some) else {}
            for owner, rows in enumerate(some):
                activations = mine
                if owner != rank:
                    shape = sum(int(row.keep.sum()) for row in rows), self.model.d_model
                    activations = {b: torch.empty(shape, dtype=self.dtype, device=self.model.device) for b in self.blocks}
                self.group.send([activations[b] for b in self.blocks], owner)
                yield activations

    def _harvest(self, rows: list[Row]) -> Batch:
        return harvest(self.model, rows, self.blocks, self.dtype)

    # --------------------------------------------------------------------------------------------------------- outliers
    def _without_outliers(self, activations: Batch) -> Bool[Tensor, " tokens"]:
        """Which tokens are no outliers, after the running medians have taken the pass in."""
        if self._medians is None:
            self._medians = RunningMedians(self.calibration.median)
        norms = norms_of(activations)
        self._medians.update(norms)
        return inliers(norms, self._medians.values, self.config.outlier_multiple)

    @property
    def outliers(self) -> dict[int, OutlierFilter]:
        """The filter of each block as it stands, to be kept with a dictionary; empty if none is used."""
        if self.config.outlier_multiple is None:
            return {}
        medians = self._medians.values if self._medians else self.calibration.median
        return {b: OutlierFilter(self.config.outlier_multiple, medians[b]) for b in self.blocks}

    def info(self, block: int) -> SAEInfo:
        """What a dictionary of this stream should keep of it; a trainer adds its own part."""
        config, measured, wanted = self.corpus.config, self.calibration.tokens, self.config.calibration_tokens
        note = f"its scale and the first median of norms were measured on {measured:,} tokens, of {wanted:,} wanted"
        return SAEInfo(
            model=self.model.name,
            block=block,
            outliers=self.outliers.get(block),
            chat=self.corpus.rendering,
            drop_first=config.drop_first,
            prepend_bos=self.corpus.prepend_bos,
            context_size=config.context,
            dataset=", ".join(source.name for source in config.sources),
            training={**self.about, "corpus": plain(config)},
            notes=(note,) if measured < wanted else (),
        )

    # ------------------------------------------------------------------------------------------------------ calibration
    @property
    def scale(self) -> dict[int, float]:
        """Block -> the factor s with which the mean of |s x|^2 is d_model (measured at first use, see `calibration`)."""
        return self.calibration.scale

    @cached_property
    def calibration(self) -> Calibration:
        """Scale and median norms of the first `calibration_tokens` held-out tokens (of training ones if there are none)."""
        norms: dict[int, list[Tensor]] = {b: [] for b in self.blocks}
        for held_out in (True, False):
            tokens = 0
            for activations in self._walk(self.corpus.rows(held_out=held_out)):
                for b, n in norms_of(activations).items():
                    norms[b].append(n)
                tokens += len(norms[self.blocks[0]][-1])
                if tokens >= self.config.calibration_tokens:
                    break
            if tokens:
                break
        else:
            raise UserError("the corpus has no tokens that are wanted", "some", "look at tokens, skip_special and drop_first")
        every = {b: torch.cat(n) for b, n in norms.items()}
        median = {b: float(n.median()) for b, n in every.items()}
        keep = inliers(every, median, self.config.outlier_multiple)
        square = {b: float(n[keep].double().square().mean()) for b, n in every.items()}
        return Calibration(median, {b: math.sqrt(self.model.d_model / square[b]) for b in self.blocks}, tokens)

    def held_out(self, n_tokens: int, *, outliers: bool = False) -> Batch:
        """The first n tokens that training never sees: block -> [n d_model], at every call the same ones in the same order.

        Args:
            n_tokens: how many; fewer come if the corpus has no more.
            outliers: whether to leave outliers in (told by the medians of `calibration`).

        Raises: UserError if the corpus keeps nothing apart.
        """
        parts: dict[int, list[Tensor]] = {b: [] for b in self.blocks}
        n = 0
        for activations in self._walk(self.corpus.rows(held_out=True)):
            if not outliers:
                keep = inliers(norms_of(activations), self.calibration.median, self.config.outlier_multiple)
                activations = {b: x[keep] for b, x in activations.items()}
            for b, x in activations.items():
                parts[b].append(x[: n_tokens - n])
            n += len(parts[b][-1])
            if n >= n_tokens:
                break
        if not n:
            raise UserError(
                f"no held-out tokens (the corpus's held_out is {self.corpus.config.held_out})",
                "a share of the samples that is kept apart",
                "raise held_out, or give more samples",
            )
        return {b: torch.cat(x) for b, x in parts.items()}

    def _walk(self, rows: Rows) -> Iterator[Batch]:
        """Passes over some rows in their order, each of them a window of its own."""
        for window in windows(rows, self.config.batch_tokens, 1):
            for some in passes_of(window, self.config.batch_tokens, (self.config.seed,)):
                yield self._harvest(some)

    # ------------------------------------------------------------------------------------------------------------ state
    def state(self) -> dict[str, Any]:
        """Everything that the next batches depend on: plain values, and the buffer's content as CPU tensors.

        On the CPU the next batch of a stream that is restored from it is the same bit for bit; on a GPU too, as far as the
        model's forward pass repeats itself.
        """
        return {
            "about": self._about() | self._mixing(),
            "position": copy.deepcopy(self._position),
            "ended": self._ended,
            "medians": self._medians and self._medians.state(),
            "calibration": {name: getattr(self.calibration, name) for name in ("median", "scale", "tokens")},
            "counts": dict(self.counts),
            "buffer": self.buffer.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state` was taken.

        Raises: UserError if it is the state of another stream (model, corpus, blocks or options differ).
        """
        mine = self._about() | self._mixing()
        other = sorted(key for key in mine if state["about"].get(key) != mine[key])
        if other:
            raise UserError(
                f"the saved state belongs to another activation stream; it differs in: {', '.join(other)}",
                "the same model, corpus, blocks and stream options",
                "go on with the options of the first run, or start anew",
            )
        self.buffer.restore(state["buffer"])
        self._position, self._ended = copy.deepcopy(dict(state["position"])), bool(state["ended"])
        self._medians = RunningMedians.of_state(state["medians"]) if state["medians"] else None
        saved = state["calibration"]
        median, scale = ({int(b): float(x) for b, x in saved[name].items()} for name in ("median", "scale"))
        self.calibration = Calibration(median, scale, int(saved["tokens"]))
        self.counts = dict(state["counts"])
        self._source, self._ahead = None, None

    def _about(self) -> dict[str, Any]:
        """What a pass's activations depend on."""
        return {
            "model": fingerprint(self.model),
            "corpus": self.corpus.fingerprint,
            "blocks": list(self.blocks),
            "dtype": self.config.dtype,
            "batch_tokens": self.config.batch_tokens,
            "window": self.config.window,
            "seed": self.config.seed,
        }

    def _mixing(self) -> dict[str, Any]:
        """What else the batches depend on."""
        names = ("outlier_multiple", "buffer_tokens", "calibration_tokens")
        return {name: getattr(self.config, name) for name in names}
