"""Stage `screen`: what training on a data set would add along persona vectors, of every row and of all (paper, data screening).

Knows: the projection difference dP of rows and data sets, its approximations beside it, and what is selected by it.
Does not know: how a row is read (screening/), how rows are judged (judges/), what is trained on them.

Every base answer is generated once and kept; a run that was killed goes on with the first shard that is not whole. The data is
never in memory: a shard at a time is read, and of all rows only numbers are kept.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from pvsae.errors import UserError
from pvsae.runs import RunDir, atomic_path
from pvsae.screening.rows import OK, STATUSES
from pvsae.sources import Source
from pvsae.stages import differences, selections
from pvsae.stages.costs import costs, ledger_of
from pvsae.stages.inputs import Setup, folder_of, open_judge, open_model, open_run, pin, trait_library
from pvsae.stages.screen_inputs import count_rows, name_sources, open_data, open_probes, open_vector_files, with_subset
from pvsae.stages.screened_rows import read_columns, read_rows, shared_edges, status_counts, token_counts
from pvsae.vectors.persona import DEFAULT_STATISTIC

if TYPE_CHECKING:
    from pvsae.judges.base import Judge, Metric
    from pvsae.models import ChatModel
    from pvsae.parts import Part
    from pvsae.screening.reading import Probe
    from pvsae.screening.worker import DataSet, Job

BASES = ("all", "subset", "none")
ENGINES = ("here", "ray")
_HOW = frozenset({"batch_tokens", "answers", "engine", "workers", "ray_address"})  # how fast and where, not what comes out
_AFTER = frozenset({"select", "filter_scores", "filter_judge", "filter_above"})  # made anew of the finished rows at every start
_OF_DATASETS = ("split", "subset")
_EXAMPLES = 3


@dataclass(frozen=True, kw_only=True)
class ScreenConfig(Setup):
    """What to screen.

    Attributes:
        data: files or patterns (.jsonl, .parquet, ...), names of Hugging Face datasets or of corpora, NAME=FILE, or `Source`s.
        vectors: run folders of `pvsae extract`, and vector files.
        layers: run folder of `pvsae layers`, whose choice of block is used where `blocks` is empty.
        blocks: every vector is read at each of them.
        statistic: which vector of the files.
        base: which rows get the base model's own answer: "all" (exact), "subset" (a random one), or "none" (the last prompt
            token stands for it, nothing is generated).
        base_rows: rows of each data set with a base answer, with base "subset".
        n_samples: base answers to each prompt; their mean counts.
        max_length: most tokens of prompt and answer that are read (as training would cut them); None is the model's context.
        max_rows: only the first so many rows of each data set.
        split, subset: of datasets, by name or in folders; None is the split train, and the only subset.
        field: the field that holds the messages; None looks for it.
        part_rows: rows a shard, which is what a kill may cost.
        batch_tokens: tokens a forward pass; None chooses by device.
        answers: folder of base answers to share with other runs; None keeps them in the run.
        select: rows in each selection (highest, random, lowest dP); 0 for none.
        filter_scores: scores of an LLM filter: a field of the rows, or a file with a line for each row.
        filter_judge: a trait that the judge scores every row for, as the filter.
        filter_above: rows scored above this are dropped before a second selection (the paper: 1).
        official_names: name the columns of rows as the released code does.
        engine: "here" (one process) or "ray" (a pool of workers on a Ray cluster); the numbers are the same.
        workers: of "ray", each with a model of its own.
        ray_address: of a running cluster; None is what RAY_ADDRESS says, else a cluster on this machine for this run.
    """

    data: tuple[str | Source, ...]
    vectors: tuple[str, ...]
    layers: str | None = None
    blocks: tuple[int, ...] = ()
    statistic: str = DEFAULT_STATISTIC
    base: str = "all"
    base_rows: int = 500
    n_samples: int = 1
    max_length: int | None = None
    max_rows: int | None = None
    split: str | None = None
    subset: str | None = None
    field: str | None = None
    part_rows: int = 256
    batch_tokens: int | None = None
    answers: str | None = None
    select: int = 0
    filter_scores: str | None = None
    filter_judge: str | None = None
    filter_above: float = 1.0
    official_names: bool = False
    engine: str = "here"
    workers: int = 2
    ray_address: str | None = None

    def identity(self) -> dict[str, Any]:
        """The options that the rows' numbers depend on."""
        found = super().identity()
        kept = {name: value for name, value in found.items() if name not in _HOW | _AFTER}
        kept["split"] = None if self.split == "train" else self.split  # which it is where none is given
        return {name: value for name, value in kept.items() if value is not None or name not in _OF_DATASETS}

    def sources(self) -> list[tuple[str, Source]]:
        """(name, source) of every data set. UserError as `screen_inputs.name_sources`."""
        return name_sources(self.data, self.max_rows, split=self.split, subset=self.subset, field=self.field)


@dataclass(frozen=True)
class ScreenResult:
    """What a screening found.

    Attributes:
        table: a row a data set, vector and block: dp with its 95% interval, n and n_missing (rows without one), what it stands
            on (`by`), proj (mean projection of the data's answers), dp_prompt_last with its interval.
        approximations: the same rows: rank correlation of the last-prompt-token approximation with the exact dP, its mean error.
        subsets: base answers of random subsets against the exact value: error, interval, coverage.
        counts: a row a data set: rows by status, rows that were cut, rows without a base answer.
        selections: a row a file of selected rows: data, vector, block, kind, filtered, n, dp (their mean), file.
        rows: data set -> Parquet file with a row of numbers a row.
        data: the data sets by name, with where their rows stand.
        probes: the vectors at their blocks, in the order of the columns.
        model: what stands before the names of columns, with `official_names`.
        notes: what a reader should know.
        path: the run folder.
    """

    table: pd.DataFrame
    approximations: pd.DataFrame
    subsets: pd.DataFrame
    counts: pd.DataFrame
    selections: pd.DataFrame
    rows: dict[str, Path]
    data: dict[str, DataSet]
    probes: tuple[Probe, ...]
    model: str | None
    notes: tuple[str, ...]
    path: Path


def run(
    config: ScreenConfig, run_dir: RunDir | str | Path, *, model: ChatModel | None = None, judge: Judge | None = None
) -> ScreenResult:
    """Screen every data set of the config along every vector.

    Raises:
        UserError: bad options, data or vectors that are missing or do not fit; before anything is generated.
    """
    _check(config)
    found = open_vector_files(config.vectors, config.traits, config.statistic)
    sources = config.sources()
    with open_run(run_dir, "screen", config) as folder:
        data, pins = open_data(sources, folder, config.part_rows)
        model = model or open_model(config)
        probes = open_probes(found, model, config.blocks, config.layers, config.statistic)
        pins |= {f"vector {p.label}": p.direction.sha256 for p in probes}
        pin(folder, model, pins)
        if config.base == "subset":
            data = with_subset(data, config.base_rows, config.seed)
        job = _job(config, folder, model, probes, data)
        before = ledger_of(judge)
        if config.filter_judge:
            judge = judge or open_judge(config, model, folder)
        filters, metric = _given_filters(config, job), _metric(config, model)
        spent = _shards(config, folder, job, model)
        files = {d.name: folder.path / _step(d) / "rows.parquet" for d in data}
        if metric is not None:
            assert judge is not None
            filters = _judged_filters(metric, folder, job, files, judge)
        return _report(config, folder, job, files, spent, filters, costs(judge, before))


@dataclass(frozen=True)
class ScreenPlan:
    """What a run would do, at most: `rows` of each data set, base `answers` to generate, each of at most `longest` tokens."""

    rows: dict[str, int]
    answers: int
    longest: int

    def __str__(self) -> str:
        lines = [f"{name}: {n:,} rows" for name, n in self.rows.items()]
        return "\n".join((*lines, f"at most {self.answers:,} base answers of at most {self.longest} tokens (one a prompt)"))


def plan(config: ScreenConfig) -> ScreenPlan:
    """Counts the rows; loads no model. UserError where data or vectors are missing."""
    _check(config)
    open_vector_files(config.vectors, config.traits, config.statistic)
    rows = {name: count_rows(source) for name, source in config.sources()}
    based = {"all": sum(rows.values()), "none": 0, "subset": sum(min(n, config.base_rows) for n in rows.values())}[config.base]
    _, defaults = folder_of(config, None)
    return ScreenPlan(rows, based * config.n_samples, config.longest_answer(defaults))


def _check(config: ScreenConfig) -> None:
    if config.base not in BASES:
        raise UserError(f"unknown base {config.base!r}", f"one of {', '.join(BASES)}")
    if config.base == "subset" and config.subset is not None and config.subset.isdigit():
        raise UserError(
            f"subset is {config.subset!r}", "a name", f"--base-rows {config.subset} for the rows that get a base answer"
        )
    if config.engine not in ENGINES:
        raise UserError(f"unknown engine {config.engine!r}", f"one of {', '.join(ENGINES)}")
    if config.engine == "ray":
        from pvsae.screening.ray_cluster import check_installed

        check_installed()
    for name in ("base_rows", "workers", "part_rows", "max_rows", "max_length", "batch_tokens"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}", "at least 1")
    if config.select < 0:
        raise UserError(f"select is {config.select}", "a number of rows, or 0 for none")
    if config.filter_scores and config.filter_judge:
        raise UserError("both filter_scores and filter_judge are given", "one filter")
    if (config.filter_scores or config.filter_judge) and not config.select:
        raise UserError("a filter without a selection", "a number of rows to select", "--select 500")
    if config.filter_above != 1.0 and not (config.filter_scores or config.filter_judge):
        raise UserError("filter_above without a filter", "--filter-scores or --filter-judge with it")
    if config.ray_address is not None and config.engine != "ray":
        raise UserError(f"ray_address with the engine {config.engine!r}", "the engine that it is for", "--engine ray")


def _job(config: ScreenConfig, folder: RunDir, model: ChatModel, probes: tuple[Probe, ...], data: Sequence[DataSet]) -> Job:
    from pvsae.models.fingerprint import fingerprint
    from pvsae.screening.worker import Job

    load = {name: getattr(config, name) for name in ("adapter", "dtype", "device", "chat")}
    return Job(
        model={"name": config.model, **load},
        fingerprint=fingerprint(model),
        probes=probes,
        data=tuple(data),
        sampling=config.sampling(model),
        n_samples=0 if config.base == "none" else config.n_samples,
        longest=min(config.max_length or model.n_ctx, model.n_ctx),
        answers=Path(config.answers) if config.answers else folder.path / "answers",
        shards=folder.parts("rows"),
        batch_size=config.batch_size,
        batch_tokens=config.batch_tokens,
    )


# ------------------------------------------------------------------------------------------------------------- shards
def _step(data: DataSet) -> str:
    from pvsae.screening.worker import slug

    return f"rows/{slug(data.name)}"


def _shards(config: ScreenConfig, folder: RunDir, job: Job, model: ChatModel) -> dict[str, float]:
    """Makes every shard that is not there, and joins those of each data set to one file, a step of the run.

    Returns: what this start of the run spent: shards made and found, seconds, tokens generated.
    """
    spent: dict[str, float] = {}

    def count(**more: float) -> None:
        for name, value in more.items():
            spent[name] = spent.get(name, 0) + value

    todo: list[tuple[DataSet, Part]] = []
    left: dict[str, int] = {}  # data set -> shards that are still to be made; those that are joined already are not in it

    def join(data: DataSet) -> None:
        with folder.step(_step(data)) as step:
            if not step.done:
                _join([job.shard(data, part) for part in data.parts], step.folder / "rows.parquet", _names(config, job))

    with tqdm(total=sum(d.rows for d in job.data), desc="screening", unit="row") as bar:
        for data in job.data:
            if folder.is_done(_step(data)):
                bar.update(data.rows)
                continue
            states = {part: job.state(data, part) for part in data.parts}
            missing = [(data, part) for part, state in states.items() if state != "done"]
            count(
                shards=len(states),
                shards_found=len(states) - len(missing),
                shards_damaged=sum(state == "damaged" for state in states.values()),
            )
            bar.update(sum(part.rows for part, state in states.items() if state == "done"))
            todo += missing
            left[data.name] = len(missing)
            if not missing:
                join(data)
        # One call for all data sets: an engine may have to start a cluster, and to load a model into each of its workers.
        for data, part, note in _engine(config, job, model, todo) if todo else ():
            bar.update(part.rows)
            count(
                generated=note["tokens"]["generated"],
                seconds_generating=note["seconds"]["generate"],
                seconds_reading=note["seconds"]["read"],
                answer_files_damaged=note["damaged answer files"],
            )
            left[data.name] -= 1
            if not left[data.name]:
                join(data)
    return spent


def _engine(
    config: ScreenConfig, job: Job, model: ChatModel, todo: Sequence[tuple[DataSet, Part]]
) -> Iterator[tuple[DataSet, Part, dict[str, Any]]]:
    if config.engine == "ray":
        from pvsae.screening.ray_cluster import screen_on_ray

        gpus = 1 if model.device.type == "cuda" else 0
        return screen_on_ray(job, todo, workers=config.workers, address=config.ray_address, gpus=gpus)
    from pvsae.screening.here import screen_here

    return screen_here(job, model, todo)


def _names(config: ScreenConfig, job: Job) -> dict[str, str]:
    """Own name -> name in the file of rows."""
    from pvsae.screening.reading import QUANTITIES

    model = Path(config.model).name if config.official_names else None
    return {probe.column(q): probe.column(q, model) for probe in job.probes for q in QUANTITIES}


def _join(shards: Sequence[Path], path: Path, names: dict[str, str]) -> None:
    """One Parquet file of all shards, a row group each."""
    import pyarrow.parquet as pq

    writer: Any = None
    with atomic_path(path) as tmp:
        for shard in shards:
            table = pq.read_table(shard)
            table = table.rename_columns([names.get(name, name) for name in table.column_names]).replace_schema_metadata(None)
            writer = writer or pq.ParquetWriter(tmp, table.schema, compression="zstd")
            writer.write_table(table.cast(writer.schema))
        writer.close()


# ------------------------------------------------------------------------------------------------------------- filter
def _given_filters(config: ScreenConfig, job: Job) -> dict[str, tuple[np.ndarray, int]]:
    """Data set -> (scores of the LLM filter [rows], 0), of scores that are there. UserError where they do not fit the rows."""
    if not config.filter_scores:
        return {}
    if len(job.data) > 1 and Path(config.filter_scores).suffix:
        raise UserError(f"one file of scores for {len(job.data)} data sets", "a field of the rows, or one data set")
    return {data.name: (selections.given_scores(data, config.filter_scores), 0) for data in job.data}


def _metric(config: ScreenConfig, model: ChatModel) -> Metric | None:
    """What the judge is asked, where it is the filter. UserError for an unknown trait."""
    if not config.filter_judge:
        return None
    from pvsae.judges import Metric
    from pvsae.traits import load_trait

    trait = load_trait(config.filter_judge, trait_library(config, model))
    return Metric(trait.name, trait.eval_prompt)


def _judged_filters(
    metric: Metric, folder: RunDir, job: Job, files: dict[str, Path], judge: Judge
) -> dict[str, tuple[np.ndarray, int]]:
    """Data set -> (scores of the judge [rows], scores that it failed to give)."""
    out = {}
    with tqdm(total=sum(d.rows for d in job.data), desc="filter", unit="row") as bar:
        for data in job.data:
            usable = (read_rows(files[data.name], ["status"])["status"] == OK).to_numpy()
            out[data.name] = selections.judged_scores(data, usable, judge, metric, folder, bar.update)
    return out


def _select(
    config: ScreenConfig, folder: RunDir, data: DataSet, probe: Probe, scores: np.ndarray, found: np.ndarray | None
) -> list[dict[str, Any]]:
    """Writes the selections of one data set along one probe, without and with the filter."""
    from pvsae.screening.worker import slug

    everything = np.ones(len(scores), dtype=bool)
    passes = [(False, everything)] + ([] if found is None else [(True, ~selections.dropped(found, config.filter_above))])
    out = []
    for filtered, allowed in passes:
        for kind, rows in selections.choose(scores, allowed, config.select, config.seed).items():
            name = f"selections/{slug(data.name)}/{probe.name}_block{probe.block}/{'filtered_' if filtered else ''}{kind}.jsonl"
            selections.write_rows(data, rows, folder.path / name)
            out.append(
                {
                    "data": data.name, "vector": probe.name, "block": probe.block, "kind": kind, "filtered": filtered,
                    "n": len(rows), "dp": float(scores[rows].mean()) if rows else float("nan"), "file": name,
                }
            )  # fmt: skip
    return out


# ------------------------------------------------------------------------------------------------------------- report
def _report(
    config: ScreenConfig,
    folder: RunDir,
    job: Job,
    files: dict[str, Path],
    spent: dict[str, float],
    filters: dict[str, tuple[np.ndarray, int]],
    paid: list[dict[str, Any]],
) -> ScreenResult:
    official = Path(config.model).name if config.official_names else None
    shutil.rmtree(folder.path / "selections", ignore_errors=True)  # an earlier start may have selected otherwise
    (folder.path / "tables" / "selections.csv").unlink(missing_ok=True)
    names = ("data_sets", "approximations", "subsets", "histogram", "selections")
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    examples = []
    for probe in job.probes:
        columns = {name: read_columns(path, probe, official) for name, path in files.items()}
        edges = shared_edges([c.of(config.base) for c in columns.values()])
        for data in job.data:
            name, some = data.name, columns[data.name]
            scores = some.of(config.base)
            where = {"data": name, "vector": probe.name, "block": probe.block}
            rows["data_sets"].append(where | differences.data_set_row(some, config.base))
            if config.base != "none":
                rows["approximations"].append(where | differences.approximation_row(some))
            if config.base == "all":
                sizes = [round(share * len(some.proj)) for share in differences.SHARES]
                found = differences.subset_rows(some, [*sizes, config.base_rows], config.seed)
                rows["subsets"] += [where | one for one in found]
            rows["histogram"] += [where | one for one in differences.histogram_rows(scores, edges)]
            if config.select:
                rows["selections"] += _select(config, folder, data, probe, scores, filters.get(name, (None, 0))[0])
            examples += _examples(data, probe, scores)
    tables = {name: pd.DataFrame(some) for name, some in rows.items()}
    counts, bad = status_counts(files, job.data)
    tables |= {"counts": counts, "unusable": bad, "tokens": token_counts(files)}
    for name, table in tables.items():
        if len(table):
            folder.table(name, table)
    summary = _summary(config, tables, filters)
    folder.result({**summary, "examples": examples, "costs": paid, "spent in this start": spent})
    return ScreenResult(
        tables["data_sets"], tables["approximations"], tables["subsets"], counts, tables["selections"], files,
        {data.name: data for data in job.data}, job.probes, official, tuple(summary["notes"]), folder.path,
    )  # fmt: skip


def _examples(data: DataSet, probe: Probe, scores: np.ndarray) -> list[dict[str, str]]:
    """The rows of highest and of lowest dP, for the page."""
    chosen = selections.choose(scores, np.ones(len(scores), dtype=bool), _EXAMPLES, 0)
    texts = selections.excerpts(data, [*chosen["top"], *chosen["bottom"]])
    return [
        {"label": f"{data.name}, {probe.label}: row {row + 1}, dP {scores[row]:+.2f}", "text": texts[row]}
        for kind in ("top", "bottom")
        for row in chosen[kind]
    ]


def _dp(row: Mapping[Any, Any]) -> str:
    return f"dP {row['dp']:+.2f} ({row['low']:+.2f} to {row['high']:+.2f})"


def _summary(config: ScreenConfig, tables: dict[str, pd.DataFrame], filters: dict[str, tuple[np.ndarray, int]]) -> dict[str, Any]:
    table, counts = tables["data_sets"], tables["counts"]
    headline = [
        {"label": f"{row['data']}, {row['vector']}, block {row['block']}", "value": _dp(row)}
        for row in table.to_dict("records")[:12]
    ]  # fmt: skip
    failures = [
        {"what": f"{row['data']}: {what}", "n": int(row[what])}
        for row in counts.to_dict("records")
        for what in (*STATUSES[1:], "cut", "no base answer")
    ]
    failures += [{"what": f"{name}: rows that the judge did not score", "n": failed} for name, (_, failed) in filters.items()]
    notes = []
    if config.base != "all":
        how = "the mean base answer of a random subset" if config.base == "subset" else "the last prompt token"
        notes.append(f"dP of a row stands on {how}, not on the row's own base answer")
    if config.base == "subset":
        for row in counts.to_dict("records"):
            chosen, used = min(config.base_rows, row["rows"]), row["with base answer"]
            if used < chosen:
                notes.append(
                    f"{row['data']}: of {chosen} rows chosen for a base answer {used} can be used, and dp stands on those"
                )
    return {
        "title": "Data screening",
        "about": (
            "Projection difference dP: how much further along a persona vector the data's answers lie than the base model's own "
            "answers to the same prompts, in residual units. Training moves the model where dP points."
        ),
        "headline": headline,
        "failures": failures,
        "notes": notes,
        "base": config.base,
    }
