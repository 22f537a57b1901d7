"""The worker: one part of the data in, one shard of numbers out. The same in one process and on a cluster.

Knows: how a part becomes a shard (rows, base answers, one forward pass for all probes), and which shards are there already.
Does not know: what the numbers mean for a trait, in which order parts come, or who else works.

What a shard holds depends on the job and its part alone, and on a CPU a base answer on its prompt, the sampling and the weights
alone. So it does not matter who computes which shard, how often it is started again, or what it finds in the cache: on a CPU the
bits are the same. On a GPU batches, which are others after a kill, change logits' last bits, and now and then a sampled token.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from pvsae.parts import Part, Record, records
from pvsae.screening.answers import Answer, Answers
from pvsae.screening.files import is_whole, read_note, save_table
from pvsae.screening.reading import Probe, read
from pvsae.screening.rows import OK, Prepared, prepare
from pvsae.sources import Reader, Source

if TYPE_CHECKING:
    from pvsae.models import ChatModel
    from pvsae.models.chat import Rendered
    from pvsae.models.generate import Sampling

CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 2048, 16384
GENERATED_AT_ONCE = 128  # answers between two writes of the cache: what a kill may cost


@dataclass(frozen=True)
class DataSet:
    """One set of rows: its name in tables, the source that they are read by, its parts, and the rows that get a base answer
    (None: all)."""

    name: str
    source: Source
    parts: tuple[Part, ...]
    with_base: frozenset[int] | None = None

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)


@dataclass(frozen=True)
class Job:
    """All that a worker has to know; can be sent to another process.

    Attributes:
        model: keyword arguments of `load`, with `name`.
        fingerprint: of the model; a worker that loads another one refuses to work.
        probes: what is read.
        data: the sets of rows.
        sampling, n_samples: how base answers are made, and how many to a prompt; n_samples 0 makes none.
        longest: most tokens of prompt and answer.
        answers, shards: folders.
        batch_size, batch_tokens: answers generated at once; tokens a forward pass, None by device.
    """

    model: dict[str, Any]
    fingerprint: str
    probes: tuple[Probe, ...]
    data: tuple[DataSet, ...]
    sampling: Sampling
    n_samples: int
    longest: int
    answers: Path
    shards: Path
    batch_size: int = 32
    batch_tokens: int | None = None

    def about(self, data: DataSet, part: Part) -> str:
        """Hash of everything that the shard of a part depends on, but for the rows themselves (whose file is pinned)."""
        rows = range(part.row, part.row + part.rows)
        chosen = None if data.with_base is None else [row for row in rows if row in data.with_base]
        probes = [[p.name, p.block, p.direction.sha256] for p in self.probes]
        source, place = asdict(data.source) | {"path": None}, asdict(part) | {"file": None}  # where the rows lie is no matter
        what = [self.fingerprint, probes, asdict(self.sampling), self.n_samples, self.longest, source, place, chosen]
        return hashlib.sha256(json.dumps(what, default=str).encode()).hexdigest()

    def shard(self, data: DataSet, part: Part) -> Path:
        """Where the shard of a part lies."""
        return self.shards / slug(data.name) / f"{part.number:06d}.parquet"

    def state(self, data: DataSet, part: Part) -> str:
        """ "done" for a shard that is there and whole, "damaged" for one that is not as it was written, else "missing"."""
        path = self.shard(data, part)
        note = read_note(path)
        if note is None or note.get("about") != self.about(data, part):
            return "damaged" if path.is_file() and note is None else "missing"
        return "done" if is_whole(path) else "damaged" if path.is_file() else "missing"


class Worker:
    """Makes shards with one model."""

    def __init__(self, job: Job, model: ChatModel) -> None:
        self.job, self.model = job, model
        self.answers = Answers(job.answers, self.about)
        self.readers = {data.name: Reader(data.source) for data in job.data}
        by_device = CPU_BATCH_TOKENS if model.device.type == "cpu" else GPU_BATCH_TOKENS
        self.batch_tokens = job.batch_tokens or by_device

    @property
    def about(self) -> dict[str, Any]:
        """What a base answer depends on besides its prompt."""
        return {"model": self.job.fingerprint, "sampling": asdict(self.job.sampling)}

    def screen(self, data: DataSet, part: Part) -> dict[str, Any]:
        """Makes the shard of a part, and gives its note: counts of rows, tokens and seconds."""
        reader = self.readers[data.name]
        found = list(records(part))
        values = [reader.value(record.raw) for record in found]
        rows = prepare(self.model.chat, values, self.job.longest)
        started = time.monotonic()
        base, spent = self._base(data, part, [r.row for r in found], rows)
        generated = time.monotonic()
        table, tokens = self._table(found, rows, base)
        note = {
            "about": self.job.about(data, part),
            "rows": len(table),
            "tokens": {**spent, **tokens},
            "seconds": {"generate": generated - started, "read": time.monotonic() - generated},
            "damaged answer files": self.answers.remade,
            "process": os.getpid(),
        }
        self.answers.remade = 0
        save_table(self.job.shard(data, part), table, note)
        return note

    def _base(
        self, data: DataSet, part: Part, numbers: Sequence[int], rows: Sequence[Prepared]
    ) -> tuple[list[list[Answer] | None], dict[str, int]]:
        """The base answers of each row (None where none is wanted), generated where the cache has none."""
        wanted = [
            row.status == OK and self.job.n_samples > 0 and (data.with_base is None or number in data.with_base)
            for number, row in zip(numbers, rows, strict=True)
        ]
        prompts: dict[str, tuple[Rendered, str]] = {}
        for row, asked in zip(rows, wanted, strict=True):
            if asked and row.prompt is not None:
                prompts |= {_key(row, k): (row.prompt, f"{row.key}/{k}") for k in range(self.job.n_samples)}
        found = self.answers.find(prompts)
        missing = iter([key for key in prompts if key not in found])
        spent = {"base answers": len(prompts), "generated answers": 0, "generated": 0, "prompts": 0}
        while chunk := list(islice(missing, GENERATED_AT_ONCE)):
            made = self.model.generate(
                [prompts[key][0] for key in chunk],
                self.job.sampling,
                row_keys=[prompts[key][1] for key in chunk],
                batch_size=self.job.batch_size,
            )
            new = {key: Answer(tuple(m.ids), m.finish) for key, m in zip(chunk, made, strict=True)}
            self.answers.add(f"{slug(data.name)}-{part.number:06d}", new)
            found |= new
            spent["generated answers"] += len(new)
            spent["generated"] += sum(len(a.ids) for a in new.values())
            spent["prompts"] += sum(len(prompts[key][0].ids) for key in chunk)
        samples = range(self.job.n_samples)
        return [[found[_key(row, k)] for k in samples] if asked else None for row, asked in zip(rows, wanted, strict=True)], spent

    def _table(
        self, places: Sequence[Record], rows: Sequence[Prepared], base: Sequence[list[Answer] | None]
    ) -> tuple[pd.DataFrame, dict[str, int]]:
        """A row of numbers for each row, all probes from the same forward passes over the data's and the base model's answers."""
        whole: list[Rendered] = []
        own: list[int] = []  # place in `whole` -> row, for the data's answers; then for the base model's
        theirs: list[int] = []
        for i, row in enumerate(rows):
            if row.whole is not None:
                whole.append(row.whole)
                own.append(i)
        for i, answers in enumerate(base):
            for answer in answers or ():
                prompt = rows[i].prompt
                assert prompt is not None
                rendered = self.model.chat.with_answer_ids(prompt, answer.ids)
                if rendered.answer[1] > rendered.answer[0]:
                    whole.append(rendered)
                    theirs.append(i)
        probes = self.job.probes
        values = read(self.model, whole, probes, self.batch_tokens)
        shape = (len(rows), len(probes))
        proj, last, cos = (torch.full(shape, float("nan")) for _ in range(3))
        at = torch.tensor(own, dtype=torch.long)
        for to, given in ((proj, values.proj), (last, values.last), (cos, values.cos)):
            to[at] = given[: len(own)]
        index = torch.tensor(theirs, dtype=torch.long)
        n_base = torch.zeros(len(rows)).index_add_(0, index, torch.ones(len(theirs)))
        base_proj = torch.zeros(shape).index_add_(0, index, values.proj[len(own) :]) / n_base[:, None]  # 0 / 0: none
        columns: dict[str, Any] = {  # all at once: pandas warns of frames that many columns were put into one by one
            "row": [place.row for place in places],
            "line": [place.line for place in places],
            "status": [row.status for row in rows],
            "reason": [row.reason for row in rows],
            "prompt": [row.key for row in rows],
            "n_prompt": np.array([0 if row.whole is None else row.whole.n_prompt for row in rows], dtype=np.int32),
            "n_answer": np.array([0 if r.whole is None else r.whole.answer[1] - r.whole.answer[0] for r in rows], dtype=np.int32),
            "n_cut": np.array([row.cut for row in rows], dtype=np.int32),
            "n_base": [None if answers is None else int(n_base[i]) for i, answers in enumerate(base)],
            "base_tokens": [None if answers is None else sum(len(a.ids) for a in answers) for answers in base],
        }
        for i, probe in enumerate(probes):
            parts = {"dp": proj - base_proj, "proj": proj, "base_proj": base_proj, "prompt_last_proj": last, "cos_sim": cos}
            columns |= {probe.column(quantity): part[:, i].numpy() for quantity, part in parts.items()}
        table = pd.DataFrame(columns).astype({"n_base": "Int32", "base_tokens": "Int32"})
        tokens = {"read": sum(len(w.ids) for w in whole[: len(own)]), "read of base": sum(len(w.ids) for w in whole[len(own) :])}
        return table, tokens


def _key(row: Prepared, sample: int) -> str:
    """32 hex digits that name a sample of a prompt."""
    return row.key if sample == 0 else hashlib.sha256(f"{row.key}/{sample}".encode()).hexdigest()[:32]


def slug(name: str) -> str:
    """A data set's name as the name of a folder."""
    clean = "".join(c if c.isalnum() or c in "-_." else "-" for c in name)[:60]
    return clean if clean == name else f"{clean}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
