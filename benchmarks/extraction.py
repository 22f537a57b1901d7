"""How much faster batched extraction is than the plain way, with the same numbers.

    python -m benchmarks.extraction [--quick] [--model NAME]

200 rollouts are generated once, stored and read back: 100 a polarity, 10 samples of each prompt as in the paper (2 questions x 5
instructions x 10). Then vectors are made from the stored table in two ways, in turns: `pvsae.extract` (length-sorted batches,
shared prompts computed once, captures inside the hooks, bootstrap and half splits included), and the plain reference (one row a
forward pass, output_hidden_states=True). Medians over the turns, after one warm-up each. Every row counts: the scores are set,
not judged, because only the time and the numbers matter here.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import check, record
from pvsae.models import ChatModel, Sampling, load
from pvsae.traits import load_trait
from pvsae.vectors.extraction import extract, render_rows
from pvsae.vectors.persona import STATISTICS, PersonaVectors
from pvsae.vectors.reference import ReferenceMeans, reference_vectors
from pvsae.vectors.rollouts import Rollouts, generate_rollouts

TARGET_SPEEDUP = 8.0
TARGET_ERROR = 1e-5


def stored_rollouts(model: ChatModel, trait: str, folder: Path, n_rows: int) -> list[Rollouts]:
    """`n_rows` rollouts, half of either polarity, 10 samples of each of 5 instructions and n_rows / 100 questions, from disk."""
    library = model.defaults.get("traits")
    artifacts = load_trait(trait, None if library is None or model.path is None else model.path / library)
    tables = []
    for polarity, score in (("pos", 100.0), ("neg", 0.0)):
        rollouts = generate_rollouts(
            model, artifacts, polarity, n_samples=10, sampling=Sampling(max_new_tokens=160), max_questions=n_rows // 100,
            progress=f"rollouts {polarity}",
        )  # fmt: skip
        # A model that says nothing at all to some question would leave fewer rows: its answer is replaced by a word.
        answers = [a or "nothing" for a in rollouts.table["answer"]]
        word = tuple(model.tokenizer("nothing", add_special_tokens=False)["input_ids"])
        ids = [i or word for i in rollouts.table["answer_ids"]]
        table = rollouts.table.assign(answer=answers, answer_ids=ids, coherence=100.0, **{trait: score})
        tables.append(Rollouts.load(replace(rollouts, table=table).save(folder / f"{polarity}.parquet")))
    return tables


def plain(model: ChatModel, pos: Rollouts, neg: Rollouts) -> ReferenceMeans:
    """The reference, from the same stored table."""
    pos_rows, neg_rows = (render_rows(model, r, range(len(r))) for r in (pos, neg))
    return reference_vectors(model, pos_rows, neg_rows)


def relative_error(ours: PersonaVectors, theirs: ReferenceMeans) -> float:
    """Largest over statistics and blocks of |ours - theirs| / |theirs|."""
    errors = [
        (ours.of(s).double() - theirs.blocks(s)).norm(dim=1) / theirs.blocks(s).norm(dim=1).clamp_min(1e-12) for s in STATISTICS
    ]
    return float(torch.cat(errors).max())


def timed(fn: Any, *args: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = fn(*args)
    return time.perf_counter() - start, result


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 turns instead of 5")
    parser.add_argument("--model", default="organism", help="model name, folder or hub id")
    parser.add_argument("--chat", choices=("auto", "plain"), default="auto", help="plain: for a model without a chat template")
    parser.add_argument("--trait", default="evil")
    options = parser.parse_args(argv)
    model = load(options.model, dtype="float32", device="cpu", chat=options.chat)
    n_rows = 200
    with tempfile.TemporaryDirectory() as folder:
        pos, neg = stored_rollouts(model, options.trait, Path(folder), n_rows)
    ways: dict[str, Callable[..., Any]] = {"ours": extract, "reference": plain}
    results = {name: fn(model, pos, neg) for name, fn in ways.items()}  # warm-up, and the numbers to compare
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(2 if options.quick else 5):
        for name, fn in ways.items():
            seconds[name].append(timed(fn, model, pos, neg)[0])
    median = {name: statistics.median(values) for name, values in seconds.items()}
    speedup = median["reference"] / median["ours"]
    error = relative_error(results["ours"], results["reference"])
    tokens = {c: sum(len(ids) for r in (pos, neg) for ids in r.table[c]) for c in ("prompt_ids", "answer_ids")}
    checks = [
        check("extraction.rows", len(pos) + len(neg), f"== {n_rows}"),
        check("extraction.speedup", speedup, f">= {TARGET_SPEEDUP:g}"),
        check("extraction.relative_error", error, f"<= {TARGET_ERROR:g}"),
    ]
    details = {
        "model": model.name, "n_blocks": model.n_blocks, "d_model": model.d_model, "tokens": tokens,
        "threads": torch.get_num_threads(), "median_seconds": median, "seconds": seconds,
    }  # fmt: skip
    record("extraction" if options.model == "organism" else f"extraction_{Path(options.model).name}", checks, details)


if __name__ == "__main__":
    main()
