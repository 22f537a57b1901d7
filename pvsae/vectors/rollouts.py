"""Rollouts: the answers a trait's vectors are made from, and the table they are kept in.

Knows: the order and the names of the rows (question outer, instruction inner, samples contiguous), the system message of each,
how to generate and judge them in chunks that survive a kill, and the table's two files (Parquet; the official CSV).
Does not know: how text is generated or scored (the model's and the judge's business), nor what becomes of the answers.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from pvsae.errors import UserError
from pvsae.vectors.tables import read_parquet, write_parquet

if TYPE_CHECKING:
    from pvsae.judges.base import Judge
    from pvsae.models.generate import Sampling
    from pvsae.traits.spec import TraitArtifacts

POLARITIES = ("pos", "neg", "none")
COLUMNS = (
    "question_id", "question", "question_index", "instruction_index", "sample", "polarity", "system", "prompt", "answer",
    "prompt_ids", "answer_ids", "finish",
)  # fmt: skip
OFFICIAL_COLUMNS = ("question", "prompt", "answer", "question_id")
NO_ANSWER = "no answer was generated"
_QUESTION_ID = re.compile(r"^(?P<trait>.+?)_(?P<question>\d+)(?:_(?P<polarity>pos|neg)_(?P<instruction>\d+))?$")


@dataclass(frozen=True)
class Task:
    """One row to generate. `system` None: no system message is sent (the template may still insert its own default)."""

    question_id: str
    question: str
    question_index: int
    instruction_index: int
    sample: int
    polarity: str
    system: str | None

    @property
    def messages(self) -> list[dict[str, str]]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": self.question}]

    @property
    def row_key(self) -> str:
        """What seeds the row's sampling: not its batch, its chunk or an intervention, so steered and plain runs share noise."""
        return f"{self.question_id}#{self.sample}"


def plan_rollouts(
    artifacts: TraitArtifacts,
    polarity: str,
    *,
    which: str = "extract",
    n_samples: int = 10,
    max_questions: int | None = None,
    max_instructions: int | None = None,
    assistant_name: str | None = None,
) -> list[Task]:
    """The rows of one polarity in the order of the paper's code: question outer, instruction inner, samples contiguous.

    Args:
        polarity: "pos" or "neg" (with the trait's instructions), or "none" (the question alone, no system message).
        which: "extract" or "eval", the question set.
        assistant_name: who the assistant is said to be; None means the trait's adjective for pos and "helpful" for neg.
    """
    from pvsae.traits import system_message

    if polarity not in POLARITIES:
        raise UserError(f"unknown polarity {polarity!r}", f"one of {', '.join(POLARITIES)}")
    if which not in ("extract", "eval"):
        raise UserError(f"unknown question set {which!r}", "extract or eval")
    if n_samples < 1:
        raise UserError(f"n_samples is {n_samples}", "at least 1 sample a question and instruction")
    questions = list(artifacts.extract_questions if which == "extract" else artifacts.eval_questions)[:max_questions]
    if not questions:
        raise UserError(
            f"trait {artifacts.name!r} has no {which} questions", "20 questions in its file", "write them, or use the other set"
        )
    name = assistant_name or (artifacts.name if polarity == "pos" else "helpful")
    if polarity == "none":
        systems: list[str | None] = [None]
    else:
        systems = [system_message(name, getattr(pair, polarity)) for pair in list(artifacts.pairs)[:max_instructions]]
    tasks = []
    for i, question in enumerate(questions):
        for k, system in enumerate(systems):
            question_id = f"{artifacts.name}_{i}" + ("" if polarity == "none" else f"_{polarity}_{k}")
            instruction = -1 if polarity == "none" else k
            tasks += [Task(question_id, question, i, instruction, s, polarity, system) for s in range(n_samples)]
    return tasks


@dataclass
class Rollouts:
    """Generated answers, one row each, judged or not yet.

    Attributes:
        table: columns COLUMNS, and after judging TRAIT, coherence (0-100, NaN where the judge gave none), TRAIT_score and
            coherence_score (the judge's evidence, JSON). prompt_ids and answer_ids are tuples of token ids (answer_ids: all that
            was generated, without the stop token; thinking, if any, included) or None where a server generated the row.
            finish is "stop", "length", or "failed" for a row that a server did not answer.
        meta: how the rows came about; plain JSON values.
    """

    table: pd.DataFrame
    meta: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.table)

    @property
    def trait(self) -> str:
        return str(self.meta["trait"])

    def messages(self, row: int) -> list[dict[str, str]]:
        """The chat that led to the row's answer, as it was sent."""
        system, question = self.table["system"].iloc[row], self.table["question"].iloc[row]
        head = [] if _missing(system) else [{"role": "system", "content": str(system)}]
        return [*head, {"role": "user", "content": str(question)}]

    def means(self) -> dict[str, float | int]:
        """Mean trait score and coherence over the rows that were scored, with the number of rows that were not.

        A failed score never leaves the mean silently: `failed` counts rows without a trait score or without a coherence.
        """
        trait, coherence = self.table[self.trait], self.table["coherence"]
        failed = int((trait.isna() | coherence.isna()).sum())
        return {"trait": float(trait.mean()), "coherence": float(coherence.mean()), "n": len(self), "failed": failed}

    def save(self, path: str | Path) -> Path:
        """Write one Parquet file (atomic), the metadata in its schema."""
        return write_parquet(path, self.table, self.meta)

    @classmethod
    def load(cls, path: str | Path) -> Rollouts:
        """Read what `save` wrote. UserError when the file is missing or is no rollout table."""
        table, meta = read_parquet(path)
        absent = [c for c in COLUMNS if c not in table.columns]
        if absent or "trait" not in meta:
            raise UserError(
                f"{path} is no rollout table (without {', '.join(absent) or 'metadata'})", "a file written by `pvsae extract`"
            )
        for column in ("prompt_ids", "answer_ids"):
            table[column] = _ids_column(table[column])
        return cls(table, meta)

    def to_official_csv(self, path: str | Path) -> Path:
        """Write the released code's CSV: question, prompt, answer, question_id, TRAIT, coherence."""
        from pvsae.runs import atomic_path

        columns = [*OFFICIAL_COLUMNS, *(c for c in (self.trait, "coherence") if c in self.table.columns)]
        with atomic_path(path) as tmp:
            self.table[columns].to_csv(tmp, index=False)
        return Path(path)

    @classmethod
    def from_official_csv(cls, path: str | Path, trait: str | None = None) -> Rollouts:
        """Read the released code's CSV. The prompt is kept as the templated text it is; token ids are unknown (None).

        Args:
            trait: the score column; None takes the one column that is no other.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"no rollout CSV at {path}", "an existing file")
        try:  # answers such as "NA" or "null" are text, so only the score columns may turn into missing numbers
            frame = pd.read_csv(path, keep_default_na=False, dtype=str)
        except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
            raise UserError(
                f"{path} cannot be read as CSV ({error})", f"columns {', '.join(OFFICIAL_COLUMNS)} and scores"
            ) from error
        absent = [c for c in OFFICIAL_COLUMNS if c not in frame.columns]
        scores = [c for c in frame.columns if c not in OFFICIAL_COLUMNS and c != "coherence"]
        if absent:
            raise UserError(f"{path} has no column {absent[0]!r}", f"columns {', '.join(OFFICIAL_COLUMNS)}, TRAIT, coherence")
        if trait is None and len(scores) != 1:
            raise UserError(
                f"{path} has {len(scores)} columns that could be the trait's score", "one, or its name", "pass trait=NAME"
            )
        trait = trait or scores[0]
        if trait not in frame.columns:
            raise UserError(f"{path} has no column {trait!r}", f"one of {', '.join(scores)}")
        parsed = [_QUESTION_ID.match(i) for i in frame["question_id"]]
        if not all(parsed):
            raise UserError(
                f"{path}: question_id {frame['question_id'][parsed.index(None)]!r}", "TRAIT_i or TRAIT_i_pos_k or TRAIT_i_neg_k"
            )
        hits = [m.groupdict() for m in parsed if m]
        table = pd.DataFrame({"question_id": frame["question_id"], "question": frame["question"]})
        table["question_index"] = [int(h["question"]) for h in hits]
        table["instruction_index"] = [int(h["instruction"] or -1) for h in hits]
        table["sample"] = table.groupby("question_id").cumcount()
        table["polarity"] = [h["polarity"] or "none" for h in hits]
        table["system"] = None
        table["prompt"], table["answer"] = frame["prompt"], frame["answer"]
        table["prompt_ids"], table["answer_ids"], table["finish"] = None, None, ""
        table[trait] = pd.to_numeric(frame[trait], errors="coerce")
        table["coherence"] = pd.to_numeric(frame["coherence"], errors="coerce") if "coherence" in frame else float("nan")
        polarities = sorted(set(table["polarity"]))
        meta = {"trait": trait, "polarity": polarities[0] if len(polarities) == 1 else "mixed", "source": "official csv"}
        return cls(table, meta)


def generate_rollouts(
    model: Any,
    artifacts: TraitArtifacts,
    polarity: str,
    *,
    which: str = "extract",
    n_samples: int = 10,
    sampling: Sampling | None = None,
    interventions: Sequence[Any] = (),
    max_questions: int | None = None,
    max_instructions: int | None = None,
    assistant_name: str | None = None,
    batch_size: int = 32,
    parts: str | Path | None = None,
    chunk: int = 256,
    progress: str | None = None,
) -> Rollouts:
    """Answers of one polarity: 5 instructions x 20 questions x 10 samples at temperature 1 by default (paper, section 2.2).

    Args:
        model: a ChatModel, or a RemoteModel (no interventions, no token ids).
        parts: folder for finished chunks of `chunk` rows, each written whole or not at all; a run that was killed goes on from
            them and ends with the same texts, because a row's text depends on the seed and its `row_key` only.

    Raises:
        UserError: unknown polarity or question set, or a `parts` folder that another configuration filled.
    """
    tasks = plan_rollouts(
        artifacts, polarity, which=which, n_samples=n_samples, max_questions=max_questions,
        max_instructions=max_instructions, assistant_name=assistant_name,
    )  # fmt: skip
    extra = {
        "trait": artifacts.name,
        "polarity": polarity,
        "which": which,
        "n_samples": n_samples,
        "artifacts_sha256": artifacts.sha256,
    }
    return generate_tasks(
        model, tasks, extra, sampling=sampling, interventions=interventions, batch_size=batch_size, parts=parts, chunk=chunk,
        progress=progress,
    )  # fmt: skip


def generate_tasks(
    model: Any,
    tasks: Sequence[Task],
    meta: dict[str, Any],
    *,
    sampling: Sampling | None = None,
    interventions: Sequence[Any] = (),
    batch_size: int = 32,
    parts: str | Path | None = None,
    chunk: int = 256,
    progress: str | None = None,
) -> Rollouts:
    """The same for any list of tasks (own system prompts, own questions). `meta` needs the key "trait"."""
    from pvsae.models import Sampling as DefaultSampling
    from pvsae.models import to_config

    sampling = sampling or DefaultSampling()
    local = hasattr(model, "chat")
    if interventions and not local:
        raise UserError(
            "a remote model cannot be steered", "no interventions with --rollouts-url", "load the model on this machine"
        )
    about = {
        **meta,
        "model": str(model.name),
        "tokenizer": tokenizer_id(model.tokenizer) if local else None,
        "template_notes": _plain(model.chat.notes) if local else None,
        "sampling": asdict(sampling),
        "interventions": [to_config(i) for i in interventions],
    }

    def one_chunk(rows: range) -> pd.DataFrame:
        batch = [tasks[i] for i in rows]
        prompts: list[Any] = [model.chat.prompt(t.messages) if local else t.messages for t in batch]
        steering = {"interventions": tuple(interventions)} if interventions else {}
        answers = model.generate(
            prompts, sampling, row_keys=[t.row_key for t in batch], batch_size=batch_size, progress=progress, **steering
        )
        table = pd.DataFrame([asdict(t) for t in batch])
        table["prompt"] = [p.text if local else json.dumps(p, ensure_ascii=False) for p in prompts]
        table["answer"] = [a.text for a in answers]
        table["prompt_ids"] = pd.Series([tuple(p.ids) if local else None for p in prompts], dtype=object)
        table["answer_ids"] = pd.Series([tuple(a.ids) if local else None for a in answers], dtype=object)
        table["finish"] = [a.finish for a in answers]
        return table[list(COLUMNS)]

    fingerprint = _fingerprint({"about": about, "tasks": [asdict(t) for t in tasks], "chunk": chunk})
    # A chunk with unanswered rows is not kept as finished: a server may answer next time, and its client repeats no paid call.
    table = in_chunks(len(tasks), chunk, one_chunk, parts, fingerprint, whole=lambda t: not (t["finish"] == "failed").any())
    if not local:
        about["template_notes"] = _plain(model.notes)
    return Rollouts(table, {**about, "failed_rows": int((table["finish"] == "failed").sum())})


def judge_rollouts(
    rollouts: Rollouts,
    judge: Judge,
    artifacts: TraitArtifacts,
    *,
    parts: str | Path | None = None,
    chunk: int = 256,
    progress: str | None = None,
) -> Rollouts:
    """Score every row for the trait and for coherence; the evidence of each score is kept as JSON beside it.

    A score that failed is NaN in the table (its evidence says why) and counted in meta["failed_scores"]; nothing is dropped here.
    Rows that no server answered are not sent to the judge: an empty text would get a score, and bias the mean.
    """
    from pvsae.judges import COHERENCE, Metric, Score

    trait = artifacts.name
    if trait in (*COLUMNS, "coherence"):
        raise UserError(f"a trait cannot be named {trait!r}: the rollout table has a column of that name", "another trait name")
    metrics = {trait: Metric(trait, artifacts.eval_prompt), "coherence": COHERENCE}
    questions, answers = rollouts.table["question"].tolist(), rollouts.table["answer"].tolist()
    failed_rows = (rollouts.table["finish"] == "failed").tolist()

    def one_chunk(rows: range) -> pd.DataFrame:
        answered = [i for i in rows if not failed_rows[i]]
        pairs = [(questions[i], answers[i]) for i in answered]
        columns: dict[str, list[Any]] = {}
        for column, metric in metrics.items():
            none = Score(None, "failed", None, False, (), judge.name, metric.prompt_hash, NO_ANSWER)
            got = dict(zip(answered, judge.score(metric, pairs, progress=progress) if pairs else [], strict=True))
            scores = [got.get(i, none) for i in rows]
            columns[column] = [float("nan") if s.value is None else float(s.value) for s in scores]
            columns[f"{column}_score"] = [_evidence(s) for s in scores]
        return pd.DataFrame(columns)

    prompts = {name: metric.prompt for name, metric in metrics.items()}
    fingerprint = _fingerprint({"judge": judge.name, "prompts": prompts, "pairs": [questions, answers], "chunk": chunk})

    def judged(frame: pd.DataFrame) -> bool:
        """No request of the chunk failed. Otherwise it is not kept: the judge may answer next time, or the limit be raised."""
        evidence = [Score.from_json(text) for name in metrics for text in frame[f"{name}_score"]]
        return not any(score.mode == "failed" and score.error != NO_ANSWER for score in evidence)

    scored = in_chunks(len(rollouts), chunk, one_chunk, parts, fingerprint, whole=judged)
    table = pd.concat([rollouts.table.drop(columns=[c for c in scored if c in rollouts.table]), scored], axis=1)
    failed = {name: int(scored[name].isna().sum()) for name in metrics}
    return replace(rollouts, table=table, meta={**rollouts.meta, "trait": trait, "judge": judge.name, "failed_scores": failed})


def in_chunks(
    n: int,
    chunk: int,
    fn: Callable[[range], pd.DataFrame],
    parts: str | Path | None,
    fingerprint: str,
    whole: Callable[[pd.DataFrame], bool] = lambda table: True,
) -> pd.DataFrame:
    """`fn` over range(n) in chunks, each kept as parts/NNNNN.parquet once it is `whole`, and read back instead of redone.

    A part that cannot be read is made again; one of another `fingerprint` is a UserError (it belongs to another run).
    """
    if chunk < 1:
        raise UserError(f"chunk is {chunk}", "at least 1 row")
    tables = []
    for number, start in enumerate(range(0, n, chunk)):
        rows = range(start, min(start + chunk, n))
        part = Path(parts) / f"{number:05d}.parquet" if parts is not None else None
        table = _stored_part(part, fingerprint) if part is not None else None
        if table is None:
            table = fn(rows)
            if part is not None and whole(table):
                write_parquet(part, table, {"fingerprint": fingerprint})
        tables.append(table)
    table = pd.concat(tables, ignore_index=True)
    for column in ("prompt_ids", "answer_ids"):
        if column in table:
            table[column] = _ids_column(table[column])
    return table


def tokenizer_id(tokenizer: Any) -> str:
    """Short hash of a tokenizer's vocabulary: stored ids are only read back by a model that numbers tokens the same way."""
    return _fingerprint(sorted(tokenizer.get_vocab().items()))[:16]


def _stored_part(part: Path, fingerprint: str) -> pd.DataFrame | None:
    if not part.is_file():
        return None
    try:
        table, meta = read_parquet(part)
    except UserError:  # half a file from a full disk or a bad copy: make it again
        return None
    if meta.get("fingerprint") != fingerprint:
        raise UserError(
            f"{part} was made with another configuration",
            "parts of this very run",
            f"choose another folder, or delete {part.parent}",
        )
    return table


def _fingerprint(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False, default=str).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """JSON's own types, whatever the template keeps its notes in."""
    return json.loads(json.dumps(value, default=str))


def _evidence(score: Any) -> str:
    value = score.to_json()
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)


def _ids_column(column: pd.Series) -> pd.Series:
    """Tuples of int, or None. Parquet gives arrays back, and a column that is all missing comes back as floats."""
    ids = [None if _missing(v) else tuple(int(i) for i in v) for v in column]
    return pd.Series(ids, index=column.index, dtype=object)
