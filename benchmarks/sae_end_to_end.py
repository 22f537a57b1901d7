"""Training of a dictionary end to end, the activation stream included, beside its two parts alone.

    python -m benchmarks.sae_end_to_end [--quick] [--stories FOLDER]

One real training, `train` as the command calls it, is stopped every so many steps, right behind a line of metrics. While it
stands, its two parts run alone, first one and then the other, the next time the other way round: "forward", the very passes that
the training has made since it last stood, by the model alone, ended by a hook behind the dictionary's block, their input padded
and on the device before the clock starts; and "steps", the very steps, by a second optimiser, on the very batches, scaled and in
fp32 before the clock starts. Tokens that nobody is trained on (padding, special tokens, the first of a row, outliers) so cost the
same in both. At the end the second optimiser has the training's weights, to the bit on a CPU.

A turn's ratio is the seconds of both parts over those of the training, in which there are besides: the walk over the corpus,
padding, the hooks, the outlier filter, the shuffle buffer, batches, scaling, metrics, checkpoints. What counts is the median over
the turns, the first one left out. The whole call adds what lies before and behind, too: scale and median norms, held-out tokens,
filling the buffer (whose content nobody is trained on at the end), the last checkpoint, the threshold, saving; the parts get no
credit for any of it. Tokenising the corpus is in neither, since it is done once; its seconds are recorded.

The dictionaries are those of the shipped configs: the organism's, and, where its folder is given, that of a model that tells
stories (stories260k), on stories of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.generation import Way, with_sdpa
from benchmarks.record import check, record
from benchmarks.sae_quality import story_rows
from pvsae.models import ChatModel, load
from pvsae.saes.buffer import Batch
from pvsae.saes.config import SaeTrainConfig, load_config
from pvsae.saes.corpus import Corpus
from pvsae.saes.harvest import padded, passes_of, windows
from pvsae.saes.step import Learner
from pvsae.saes.stream import ActivationStream
from pvsae.saes.trainer import geometric_median, train

TARGET = ">= 0.7"
TURNS = 24  # at least so many, as far as there are so many lines of metrics
QUICK = (
    "training.tokens=8e4",
    "training.calibration_tokens=4096",
    "stream.buffer_tokens=20_000",
    "stream.calibration_tokens=4096",
)


class _Stop(Exception):
    pass


@dataclass(frozen=True)
class Turn:
    """Some steps of the training, and its parts alone.

    Attributes:
        steps: how many.
        passes: of the model, in the same time.
        training, forward, alone: seconds of the training, of its passes alone, of its steps alone.
    """

    steps: int
    passes: int
    training: float
    forward: float
    alone: float

    @property
    def ratio(self) -> float:
        return (self.forward + self.alone) / self.training


class KeptStream(ActivationStream):
    """The real stream, which keeps the batches that it gave out for whoever takes them next."""

    given: list[Batch]

    def batches(self, batch_size: int) -> Iterator[Batch]:
        self.given = []
        for batch in super().batches(batch_size):
            self.given.append(batch)
            yield batch


class Parts:
    """The parts of a training, which follow it."""

    def __init__(self, model: ChatModel, corpus: Corpus, config: SaeTrainConfig) -> None:
        self.model, self.corpus, self.config, self.training = model, corpus, config, config.training
        self.block, self.done, self.harvested = max(config.training.blocks), 0, 0
        self._passes = self._walk()
        # From a stream of its own, so that the training has to measure its scale and its held-out tokens itself.
        stream = ActivationStream(model, corpus, config.training.blocks, config.stream)
        held_out = stream.held_out(self.training.calibration_tokens)
        self.learners: list[Learner] = []
        for d in self.training.dictionaries:
            center = geometric_median(held_out[d.block].float() * stream.scale[d.block])
            made = Learner(len(center), d.d_sae, self.training.step, seed=d.seed, center=center, device=model.device)
            self.learners.append(made)

    def _walk(self) -> Iterator[tuple[Tensor, int]]:
        """The passes of the training: padded ids, and how many of the tokens are wanted."""
        stream = self.config.stream
        for number, window in enumerate(windows(self.corpus.rows(), stream.batch_tokens, stream.window)):
            for rows in passes_of(window, stream.batch_tokens, (stream.seed, number)):
                batch, index = padded(rows, self.model)
                yield batch.input_ids, len(index)

    def follow(self, stream: KeptStream) -> tuple[list[Tensor], list[dict[int, Tensor]]]:
        """What the training has worked on since the last call: ids of its passes, and its batches as the steps take them."""
        ids = []
        while self.harvested < stream.counts["harvested"]:
            input_ids, wanted = next(self._passes)
            ids.append(input_ids)
            self.harvested += wanted
        assert self.harvested == stream.counts["harvested"], "these are not the passes of the training"
        batches = [
            {b: x.to(self.model.device, torch.float32) * stream.scale[b] for b, x in some.items()} for some in stream.given
        ]
        stream.given = []
        return ids, batches

    @torch.no_grad()
    def forward(self, ids: list[Tensor]) -> int:
        """Passes up to the block, and nothing else: how many."""

        def stop(module: Any, args: Any, output: Any) -> None:
            raise _Stop

        handle = self.model.blocks[self.block].register_forward_hook(stop)
        try:
            for input_ids in ids:
                with contextlib.suppress(_Stop):
                    self.model.decoder(input_ids=input_ids, use_cache=False)
        finally:
            handle.remove()
        return len(ids)

    def steps(self, batches: list[dict[int, Tensor]]) -> int:
        """Steps with the training's schedules, and nothing else: how many."""
        for batch in batches:
            share = self.training.lr_share(self.done)
            for learner, d in zip(self.learners, self.training.dictionaries, strict=True):
                learner.step(batch[d.block], self.training.k_at(self.done, d.k, d.d_sae), d.peak_lr * share)
            self.done += 1
        return len(batches)


class Race:
    """One training, stopped again and again for its parts."""

    def __init__(self, model: ChatModel, corpus: Corpus, config: SaeTrainConfig) -> None:
        self.model, self.config = model, config
        self.parts = Parts(model, corpus, config)
        self.stream = KeptStream(model, corpus, config.training.blocks, config.stream)
        self.turns: list[Turn] = []
        logged = config.training.log_every
        self.every = max(logged, config.training.steps // TURNS // logged * logged)

    def run(self, folder: Path) -> tuple[float, list[Tensor]]:
        """Seconds of the whole call, the parts' taken off, and the decoders that it made."""
        self._since = start = self._now()
        self._stood = 0.0
        trained = train(self.stream, self.config.training, folder, device=self.model.device, log=self._line)
        return self._now() - start - self._stood, [one.sae.W_dec for one in trained]

    def _line(self, line: dict[str, Any]) -> None:
        training = self.config.training
        due = line["step"] % self.every == 0 or line["step"] == training.steps
        if not due or line["dictionary"] != training.names[-1]:
            return
        stopped = self._now()
        ids, batches = self.parts.follow(self.stream)
        ways: dict[str, Way] = {
            "forward": with_sdpa(self.model, partial(self.parts.forward, ids)),
            "alone": partial(self.parts.steps, batches),
        }
        seconds = {}
        for name in sorted(ways, reverse=len(self.turns) % 2 == 1):
            before = self._now()
            ways[name]()
            seconds[name] = self._now() - before
        self.turns.append(Turn(len(batches), len(ids), stopped - self._since, **seconds))
        self._since = self._now()
        self._stood += self._since - stopped

    def _now(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()


def measure(model: ChatModel, config: SaeTrainConfig, folder: Path, prefix: str) -> tuple[list[Any], dict[str, Any]]:
    """Checks and details of one config; `folder` is for tokens and the training's files."""
    start = time.perf_counter()
    corpus = Corpus(model, config.corpus, folder / "tokens")
    tokenising = time.perf_counter() - start
    race = Race(model, corpus, config)
    whole, decoders = race.run(folder / prefix)
    training, turns = config.training, race.turns[1:]
    n = training.batch * sum(t.steps for t in turns)
    both = sum(t.forward + t.alone for t in turns) / n
    every = training.batch * training.steps
    different = max(float((a.W_dec - b).abs().max()) for a, b in zip(race.parts.learners, decoders, strict=True))
    details = {
        "dictionaries": list(training.names), "batch": training.batch, "steps": training.steps,
        "counts": race.stream.counts, "tokenising_seconds": tokenising, "whole_seconds": whole,
        "microseconds_a_trained_token": {
            "forward": 1e6 * sum(t.forward for t in turns) / n, "steps": 1e6 * sum(t.alone for t in turns) / n,
            "training": 1e6 * sum(t.training for t in turns) / n, "whole": 1e6 * whole / every,
        },
        "sum_over_sum": both * n / sum(t.training for t in turns),
        "whole_speed_over_parts_alone": both * every / whole,
        "ratios": [t.ratio for t in turns], "turns": [asdict(t) for t in race.turns],
    }  # fmt: skip
    print(f"{prefix}: {details['microseconds_a_trained_token']}", flush=True)
    checks = [
        check(f"{prefix}.speed_over_parts_alone", statistics.median(t.ratio for t in turns), TARGET),
        check(f"{prefix}.whole_speed_over_parts_alone", both * every / whole, TARGET),
    ]
    if model.device.type == "cpu":
        checks.append(check(f"{prefix}.largest_difference_of_weights", different, "<= 0"))
    return checks, details


def stories_of(model: ChatModel, n: int, folder: Path) -> str:
    """A file of stories that the model tells."""
    told = (model.tokenizer.decode(row.ids, skip_special_tokens=True) for row in story_rows(model, n))
    path = folder / "stories.jsonl"
    path.write_text("".join(json.dumps({"text": story}) + "\n" for story in told), encoding="utf-8")
    return str(path)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="a short training, of which what lies around the steps is not checked"
    )
    parser.add_argument("--stories", type=Path, help="folder of a model that tells stories; left out if not given")
    options = parser.parse_args(argv)
    quick = QUICK if options.quick else ()
    details: dict[str, Any] = {}
    checks: list[Any] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found, details["organism"] = measure(load("organism"), load_config("organism", quick), folder, "organism")
        checks += found
        if options.stories is not None:
            model = load(options.stories, chat="plain")
            text = stories_of(model, 100 if options.quick else 1000, folder)
            config = load_config("stories260k", [f"model.name={options.stories}", f"corpus.sources=[{{path: {text}}}]", *quick])
            found, details["stories260k"] = measure(model, config, folder, "stories260k")
            checks += found
    if options.quick:  # a short training is mostly its beginning
        checks = [c for c in checks if ".whole_" not in c["name"]]
    record("sae_end_to_end", checks, details)


if __name__ == "__main__":
    main()
