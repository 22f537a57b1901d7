"""How fast activations are harvested: beside a plain forward hook on the Hugging Face model that ends the pass at its block.

    python -m benchmarks.harvest [--quick]

Rows of 40 to 256 tokens go through a Qwen2 with random weights (d_model 512, 8 blocks) and through the organism. "plain" is
what one would write by hand: the same padded batches, sdpa attention, a hook on the middle block that keeps its output's wanted
tokens and raises. "harvest" is ours without a buffer, "stream" all of it: the corpus walk, the outlier filter, the shuffle
buffer and batches of 1024 tokens. The ways take turns; what counts is the median, over the turns, of the ratio of their tokens a
second.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.generation import Way, random_model, ratio, take_turns, with_sdpa
from benchmarks.record import check, record
from pvsae.errors import UserError
from pvsae.models import ChatModel, load
from pvsae.saes.corpus import Corpus, CorpusConfig, Row
from pvsae.saes.harvest import harvest, padded, passes_of, windows
from pvsae.saes.stream import ActivationStream, StreamConfig
from pvsae.sources import Source

BATCH_TOKENS = 4096
CONTEXT = 256


class _Stop(Exception):
    pass


def open_corpus(model: ChatModel, folder: Path, tokens: int) -> Corpus:
    """Texts of random letters, of at most one token each, of about so many tokens."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz .,"))
    texts = ["".join(rng.choice(letters, n)) for n in rng.integers(40, CONTEXT, tokens // 148)]
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    config = CorpusConfig(sources=(Source(path=str(path)),), context=CONTEXT, held_out=0.05, drop_first=1)
    return Corpus(model, config, folder / "tokens", progress=False)


@torch.no_grad()
def plain(model: ChatModel, passes: list[list[Row]], block: int, kept: list[torch.Tensor] | None = None) -> int:
    """Tokens read by a plain hook."""
    read: list[torch.Tensor] = []

    def hook(module: Any, args: Any, output: Any) -> None:
        read.append(output if isinstance(output, torch.Tensor) else output[0])
        raise _Stop

    handle = model.blocks[block].register_forward_hook(hook)
    tokens = 0
    try:
        for rows in passes:
            batch, index = padded(rows, model)
            with contextlib.suppress(_Stop):
                model.decoder(input_ids=batch.input_ids, use_cache=False)
            wanted = read.pop().flatten(0, 1)[index].bfloat16()
            tokens += len(wanted)
            if kept is not None:
                kept.append(wanted)
    finally:
        handle.remove()
    return tokens


def ours(model: ChatModel, passes: list[list[Row]], block: int) -> int:
    """Tokens read by our harvest."""
    return sum(len(harvest(model, rows, (block,), torch.bfloat16)[block]) for rows in passes)


class Streaming:
    """The whole stream over a corpus that repeats; each call takes about as many tokens out as the passes hold."""

    def __init__(self, model: ChatModel, corpus: Corpus, block: int, tokens: int) -> None:
        config = StreamConfig(batch_tokens=BATCH_TOKENS, buffer_tokens=max(16_384, tokens // 4), calibration_tokens=4096)
        self.stream = ActivationStream(model, corpus, (block,), config)
        self.batches, self.tokens = self.stream.batches(1024), tokens

    def __call__(self) -> int:
        """Tokens harvested, which are as many as are taken out once the buffer is full."""
        before = self.stream.counts["harvested"]
        taken = 0
        while taken < self.tokens:
            taken += len(next(iter(next(self.batches).values())))
        return self.stream.counts["harvested"] - before


def measure(model: ChatModel, folder: Path, tokens: int, rounds: int, prefix: str) -> tuple[list[Any], dict[str, Any]]:
    """Checks and details of one model."""
    block = model.n_blocks // 2
    corpus = open_corpus(model, folder, tokens)
    groups = windows(corpus.rows(), BATCH_TOKENS, 8)
    passes = [rows for i, group in enumerate(groups) for rows in passes_of(group, BATCH_TOKENS, (0, i))]
    kept: list[torch.Tensor] = []
    with_sdpa(model, partial(plain, model, passes, block, kept))()
    mine = [harvest(model, rows, (block,), torch.bfloat16)[block] for rows in passes]
    different = max(float((a.float() - b.float()).abs().max()) for a, b in zip(kept, mine, strict=True))
    corpus.config = replace(corpus.config, repeat=True)
    n = sum(len(x) for x in kept)
    ways: dict[str, Way] = {
        "plain": with_sdpa(model, partial(plain, model, passes, block)),
        "harvest": partial(ours, model, passes, block),
        "stream": Streaming(model, corpus, block, n),
    }
    times = take_turns(ways, rounds, model.device)
    details = {
        way: {"tokens_per_second": statistics.median(k / s for k, s in zip(t["tokens"], t["seconds"], strict=True)), **t}
        for way, t in times.items()
    }
    checks = [
        check(f"{prefix}.speed_over_plain_hook", ratio(times, "plain", "harvest"), ">= 0.9"),
        check(f"{prefix}.stream_speed_over_plain_hook", ratio(times, "plain", "stream"), ">= 0.9"),
        check(f"{prefix}.largest_difference", different, "<= 0"),
    ]
    return checks, {"block": block, "tokens": n, "passes": len(passes), **details}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer tokens and turns, and a smaller model")
    args = parser.parse_args()
    model = random_model(256, 4, 2048) if args.quick else random_model()
    tokens, rounds = (20_000, 3) if args.quick else (80_000, 7)
    details: dict[str, Any] = {"batch_tokens": BATCH_TOKENS, "context": CONTEXT, "rounds": rounds}
    checks: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("random", "organism"):
            try:
                some = model if name == "random" else load("organism")
            except UserError as error:
                details[name] = f"not measured: {error.what}"
                continue
            (where := Path(folder) / name).mkdir()
            more, details[name] = measure(some, where, tokens, rounds, f"harvest.{name}")
            checks += more
    record("harvest", checks, details)


if __name__ == "__main__":
    main()
