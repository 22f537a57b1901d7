"""How much faster an exact projection difference is than the way of the released code, with the same numbers.

    python -m benchmarks.screening [--quick] [--model NAME]

500 chats and the model's own answers to their prompts (generated once, not timed) are read along 3 vectors at 3 blocks. "ours" is
what `pvsae screen` does with a part: render, batches of like length, one pass for all vectors and blocks, projections inside the
hooks, no block above the highest one that is asked for, and a shard on disk with its checksum. "released" is written by us after
the description of the released code: the chat template as a string, tokenised prompt and whole, one row a forward pass with
output_hidden_states=True, a run over the data for each vector, both answers of a row. The two take turns; medians, after one
warm-up each.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import check, record
from pvsae.models import ChatModel, Sampling, load
from pvsae.models.fingerprint import fingerprint
from pvsae.models.interventions import Direction
from pvsae.parts import parts_of, records
from pvsae.screening.answers import Answers
from pvsae.screening.reading import Probe
from pvsae.screening.rows import prepare
from pvsae.screening.worker import DataSet, Job, Worker
from pvsae.sources import Reader, Source

TARGET_SPEEDUP, TARGET_ERROR = 10.0, 1e-4
VECTORS = ("evil", "sycophantic", "hallucinating")


def write_chats(path: Path, corpus: str, rows: int) -> Source:
    """The first rows of a named corpus that end with an answer, as a JSONL file."""
    import json

    reader = Reader(Source(named=corpus, kind="chat", max_samples=rows))
    with path.open("w", encoding="utf-8") as out:
        for i, row in enumerate(reader.raw_rows()):
            if i == rows:
                break
            out.write(json.dumps(row) + "\n")
    return Source(path=str(path), kind="chat")


def make_job(model: ChatModel, source: Source, folder: Path, rows: int, blocks: Sequence[int]) -> Job:
    """Three vectors (random directions: what they mean is no matter for the time) at each block; one part of all rows."""
    probes = []
    for i, name in enumerate(VECTORS):
        values = torch.randn(model.n_blocks, model.d_model, generator=torch.Generator().manual_seed(i))
        probes += [Probe(name, f"{name}_response_avg_diff", block, Direction(values[block])) for block in blocks]
    parts = parts_of([Path(str(source.path))], rows)
    sampling = Sampling(max_new_tokens=int(model.defaults.get("max_new_tokens", 120)))
    return Job(
        model={"name": model.name}, fingerprint=fingerprint(model), probes=tuple(probes),
        data=(DataSet("chats", source, tuple(parts)),), sampling=sampling, n_samples=1, longest=model.n_ctx,
        answers=folder / "answers", shards=folder / "shards",
    )  # fmt: skip


def ours(worker: Worker) -> torch.Tensor:
    """dP [rows, vectors x blocks] by the worker of `pvsae screen`, whose base answers are all in its cache."""
    import pandas as pd

    (data,) = worker.job.data
    (part,) = data.parts
    note = worker.screen(data, part)
    assert note["tokens"]["generated"] == 0, "base answers are made before the time is taken"
    table = pd.read_parquet(worker.job.shard(data, part))
    return torch.tensor(table[[probe.column("dp") for probe in worker.job.probes]].to_numpy())


@torch.no_grad()
def released(model: ChatModel, chats: Sequence[tuple[Any, str, str]], probes: Sequence[Probe]) -> torch.Tensor:
    """dP [rows, vectors x blocks], one row a forward pass, all hidden states, one run over the data a vector and answer."""
    blocks = sorted({probe.block for probe in probes})
    vectors = {(probe.name, probe.block): probe.direction.values for probe in probes}
    found: dict[tuple[str, int], list[float]] = {key: [] for key in vectors}
    for name in VECTORS:
        sides = []
        for side in (1, 2):
            projections: dict[int, list[float]] = {block: [] for block in blocks}
            for chat in chats:
                messages, answer = chat[0], chat[side]
                prompt = model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
                inputs = model.tokenizer(prompt + answer, return_tensors="pt", add_special_tokens=False)
                prompt_len = len(model.tokenizer.encode(prompt, add_special_tokens=False))
                outputs = model.hf(**inputs, output_hidden_states=True)
                for block in blocks:
                    average = outputs.hidden_states[block + 1][:, prompt_len:, :].mean(dim=1)[0].float()
                    vector = vectors[name, block]
                    projections[block].append(float((average * vector).sum() / vector.norm()))
            sides.append(projections)
        for block in blocks:
            found[name, block] = [a - b for a, b in zip(sides[0][block], sides[1][block], strict=True)]
    return torch.tensor([found[probe.name, probe.block] for probe in probes]).T


def texts_of(worker: Worker) -> list[tuple[Any, str, str]]:
    """(messages of the prompt, the data's answer, the base model's) of every row, as texts."""
    (data,) = worker.job.data
    reader = Reader(data.source)
    values = [reader.value(record.raw) for record in records(data.parts[0])]
    rows = prepare(worker.model.chat, values, worker.job.longest)
    answers = Answers(worker.job.answers, worker.about).find([row.key for row in rows])
    out = []
    for value, row in zip(values, rows, strict=True):
        base = worker.model.chat.decode(answers[row.key].ids)
        out.append((list(value[:-1]), value[-1]["content"], base))  # type: ignore[index]
    return out


def timed(fn: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    start = time.perf_counter()
    result = fn()
    return time.perf_counter() - start, result


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="50 rows and 2 turns instead of 500 and 5")
    parser.add_argument("--model", default="organism", help="model name, folder or hub id")
    parser.add_argument("--corpus", default="organism", help="named corpus that the chats come from")
    options = parser.parse_args(argv)
    rows = 50 if options.quick else 500
    model = load(options.model, dtype="float32", device="cpu")
    blocks = sorted({round(share * (model.n_blocks - 2)) for share in (0.33, 0.67, 1.0)})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = write_chats(folder / "chats.jsonl", options.corpus, rows)
        job = make_job(model, source, folder, rows, blocks)
        worker = Worker(job, model)
        worker.screen(job.data[0], job.data[0].parts[0])  # generates the base answers
        worker = Worker(replace(job), model)
        chats = texts_of(worker)
        ways: dict[str, Callable[[], torch.Tensor]] = {
            "ours": lambda: ours(worker),
            "released": lambda: released(model, chats, job.probes),
        }
        results = {way: fn() for way, fn in ways.items()}  # warm-up, and the numbers to compare
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(2 if options.quick else 5):
            for way, fn in ways.items():
                seconds[way].append(timed(fn)[0])
    median = {way: statistics.median(values) for way, values in seconds.items()}
    both = torch.isfinite(results["ours"]) & torch.isfinite(results["released"])
    error = float((results["ours"] - results["released"]).abs()[both].max())
    checks = [
        check("screening.rows", len(chats), f"== {rows}"),
        check("screening.rows_compared", int(both.all(dim=1).sum()), f">= {0.95 * rows:g}"),
        check("screening.speedup", median["released"] / median["ours"], f">= {TARGET_SPEEDUP:g}"),
        check("screening.largest_difference", error, f"<= {TARGET_ERROR:g}"),
    ]
    scale = float(results["released"][both].abs().mean())
    details = {
        "model": model.name, "n_blocks": model.n_blocks, "d_model": model.d_model, "blocks": blocks, "vectors": len(VECTORS),
        "threads": torch.get_num_threads(), "mean_abs_dp": scale, "median_seconds": median, "seconds": seconds,
    }  # fmt: skip
    record("screening" if options.model == "organism" else f"screening_{Path(options.model).name}", checks, details)


if __name__ == "__main__":
    main()
