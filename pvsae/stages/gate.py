"""Stage `gate`: does data stay below a limit of dP? For a CI job in front of a training.

Knows: a screening, limits (given, or found on normal data), a baseline of what is known and accepted, and which rows break them.
Does not know: how dP comes about (screen.py), exit codes, JUnit, annotations (reports/gate.py).

How to choose a limit: as a quantile of the rows of normal data (`calibrate`), measured with the same model, vectors and base
answers (kind, sampling, length), which the file of limits pins. Of normal data a share 1 - q lies above the quantile q; how many
rows that makes of the data at hand is said beside the rows found. One row above the limit fails, unless a share of rows is
allowed or a baseline has it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pvsae.errors import UserError
from pvsae.parts import rows_at
from pvsae.runs import RunDir, jsonable, read_json, write_json
from pvsae.screening.rows import OK
from pvsae.screening.worker import slug
from pvsae.sources import Bad, Reader, content_key
from pvsae.stages import screen, selections
from pvsae.stages.inputs import open_model, open_run
from pvsae.stages.screen import ScreenConfig, ScreenResult
from pvsae.stages.screen_inputs import open_probes, open_vector_files
from pvsae.stages.screened_rows import read_columns, read_rows
from pvsae.stages.statistics import Z

if TYPE_CHECKING:
    from pvsae.models import ChatModel
    from pvsae.screening.reading import Probe
    from pvsae.screening.worker import DataSet


@dataclass(frozen=True, kw_only=True)
class GateConfig(ScreenConfig):
    """What must hold.

    Attributes:
        data: what is checked; may be empty where something is calibrated.
        max_dp: highest dP of a row, along every vector.
        max_data_dp: highest dP of a data set, along every vector.
        limits: file of limits that an earlier calibration wrote, in place of `max_dp`.
        calibrate: normal data on which the limit is found, in place of `max_dp`.
        quantile: of its rows; that is where the limit is put (None: 0.99).
        write_limits: file for what a calibration found.
        allow: share of rows that may lie above the limit.
        allow_unusable: let rows pass that cannot be read or scored, in place of failing on them.
        baseline: file of what is known: rows in it may lie above the limit as far as they do there, and a data set of the
            same name must not lie above the interval that it has there.
        write_baseline: file for what is found now, to be accepted later.
    """

    data: tuple[Any, ...] = ()
    max_dp: float | None = None
    max_data_dp: float | None = None
    limits: str | None = None
    calibrate: tuple[str, ...] = ()
    quantile: float | None = None
    write_limits: str | None = None
    allow: float = 0.0
    allow_unusable: bool = False
    baseline: str | None = None
    write_baseline: str | None = None

    @property
    def at_quantile(self) -> float:
        return 0.99 if self.quantile is None else self.quantile

    def identity(self) -> dict[str, Any]:
        """What the numbers depend on; limits may be changed without measuring again."""
        own = {f.name for f in fields(GateConfig)} - {f.name for f in fields(ScreenConfig)} - {"calibrate"}
        return {name: value for name, value in super().identity().items() if name not in own}


@dataclass(frozen=True)
class Limit:
    """A limit along one vector: `max_dp`, and the `quantile` of normal data that it is (None: it was given)."""

    max_dp: float
    quantile: float | None = None

    def of_normal(self, rows: int) -> str:
        """How many of so many rows of normal data would lie above it, in words; nothing where nobody knows."""
        return "" if self.quantile is None else f" (of as many normal rows about {rows * (1 - self.quantile):.1f} would)"


@dataclass(frozen=True)
class Check:
    """One thing that had to hold of a data set, whether it did, in words, and the rows to blame (numbers of `offending`)."""

    data: str
    name: str
    passed: bool
    message: str
    rows: tuple[int, ...] = ()


@dataclass(frozen=True)
class GateResult:
    """What a gate found.

    Attributes:
        checks: all of them, those that held too.
        offending: a row for each row of data above a limit or not usable, with its place, dp, limit, why and excerpt.
        limits: vector's label -> limit.
        table: a row a data set, vector and block, as of a screening.
        notes: what a reader should know, such as how a limit was found.
        path: the run folder.
    """

    checks: tuple[Check, ...]
    offending: pd.DataFrame
    limits: dict[str, Limit]
    table: pd.DataFrame
    notes: tuple[str, ...]
    path: Path

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


def run(config: GateConfig, run_dir: RunDir | str | Path, *, model: ChatModel | None = None) -> GateResult:
    """Screen the data and check it; finds the limits first where normal data is given.

    Raises:
        UserError: bad options, data or vectors that are missing or do not fit, limits or a baseline that were measured with
            another model, other vectors or other base answers; before anything is generated.
    """
    _check_options(config)
    with open_run(run_dir, "gate", config) as folder:
        model = model or open_model(config)
        found = open_vector_files(config.vectors, config.traits, config.statistic)
        probes = open_probes(found, model, config.blocks, config.layers, config.statistic)
        about = _about(config, probes, model)
        limits = _given_limits(config, probes, about)
        known = _read_baseline(config.baseline, about)["data"] if config.baseline else {}
        result = screen.run(screening(config), folder, model=model)
        names = list(result.data)
        checked, normal = names[: len(config.data)], names[len(config.data) :]
        notes: list[str] = []
        if normal:
            limits = _calibrated(config, result, normal, about, notes)
        gate = _Gate(config, result, limits, known)
        for name in checked:
            gate.check(result.data[name])
        offending = pd.DataFrame(gate.offending, columns=list(_COLUMNS))
        if config.write_baseline:
            now = {name: gate.known_now(result.data[name]) for name in checked}
            write_json(config.write_baseline, {"about": about, "limits": limits, "data": now})
        notes += [f"{name} is not in the baseline" for name in checked if config.baseline and name not in known]
        checks = tuple(gate.checks)
        rows = [{"data": c.data, "check": c.name, "passed": c.passed, "message": c.message} for c in checks]
        folder.table("checks", pd.DataFrame(rows, columns=["data", "check", "passed", "message"]))
        folder.table("offending", offending)
        _write_result(folder, checks, offending, notes)
        table = result.table[result.table["data"].isin(checked)] if checked else result.table
        return GateResult(checks, offending, limits, table, tuple(notes), folder.path)


_COLUMNS = ("data", "file", "line", "vector", "block", "dp", "limit", "why", "excerpt")


def _check_options(config: GateConfig) -> None:
    ways = [name for name in ("max_dp", "limits", "calibrate") if getattr(config, name) not in (None, ())]
    if len(ways) > 1:
        raise UserError(f"{' and '.join(ways)} are given", "one way to say where the limit is")
    if not ways and config.max_data_dp is None and not config.baseline:
        raise UserError(
            "no limit", "--max-dp X, --limits FILE, --calibrate NORMAL, --max-data-dp X or --baseline FILE",
            "pvsae gate --calibrate normal.jsonl --quantile 0.99 --write-limits limits.json finds one",
        )  # fmt: skip
    if not config.data and not config.calibrate:
        raise UserError("nothing to check", "data")
    for name in ("write_limits", "quantile"):
        if getattr(config, name) is not None and not config.calibrate:
            raise UserError(f"{name} without normal data to find limits on", "--calibrate NORMAL with it")
    for name in ("max_dp", "max_data_dp"):
        value = getattr(config, name)
        if value is not None and not math.isfinite(value):
            raise UserError(f"{name} is {value}", "a number, in residual units")
    if not 0 < config.at_quantile < 1:
        raise UserError(f"quantile is {config.at_quantile}", "a share between 0 and 1, such as 0.99")
    if not 0 <= config.allow <= 1:
        raise UserError(f"allow is {config.allow}", "a share from 0 to 1")


def screening(config: GateConfig) -> ScreenConfig:
    """The screening behind a gate: of the data that is checked, and behind it of normal data."""
    own = {f.name: getattr(config, f.name) for f in fields(ScreenConfig)}
    return ScreenConfig(**{**own, "data": (*config.data, *config.calibrate)})


def folder_name(config: GateConfig) -> str:
    """A name for the run folder that says what is checked, and that other data, vectors or options do not have; so data that
    changed is a new run, and a run that was killed goes on.

    Raises:
        UserError: bad options, data or vectors that are missing.
    """
    _check_options(config)
    asked = screening(config)
    found: dict[str, Any] = {"options": config.identity()}
    for name, source in asked.sources():
        found[f"rows of {name}"] = Reader(source).content
    for name, _, vectors in open_vector_files(config.vectors, config.traits, config.statistic):
        own = config.statistic if config.statistic in vectors.statistics else vectors.statistics[0]
        found[f"vectors {name}"] = hashlib.sha256(vectors.of(own).float().cpu().numpy().tobytes()).hexdigest()
    digest = hashlib.sha256(json.dumps(jsonable(found), sort_keys=True).encode()).hexdigest()[:8]
    names = [name for name, _ in asked.sources()][: len(config.data)] or ["calibrate"]
    return f"gate-{slug('-'.join(names))}-{digest}"


def _about(config: GateConfig, probes: Sequence[Probe], model: ChatModel) -> dict[str, Any]:
    """What numbers of two runs have to have in common to be compared."""
    from pvsae.models.fingerprint import fingerprint

    generated = config.base != "none"
    return {
        "model": fingerprint(model),
        "vectors": {probe.label: probe.direction.sha256 for probe in probes},
        "base": config.base,
        "max_length": min(config.max_length or model.n_ctx, model.n_ctx),
        "sampling": asdict(config.sampling(model)) if generated else None,
        "n_samples": config.n_samples if generated else None,
    }


# -------------------------------------------------------------------------------------------------------------- files
def _read_limits(file: str, about: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a file of limits. UserError where it is none, or where it was measured otherwise."""
    found = _read_pinned(file, about, "limits")
    _check_limits(found.get("limits"), file, "limits")
    return found


def _read_baseline(file: str, about: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a baseline. UserError where it is none, or where it was measured otherwise."""
    found = _read_pinned(file, about, "baseline")
    _check_limits(found.get("limits"), file, "baseline")
    data: Any = found.get("data")
    vectors = [one for each in data.values() for one in each.values()] if _is_table(data, 2) else None
    if vectors is None or not all(
        isinstance(one, dict)
        and all(one.get(name) is None or _is_number(one[name]) for name in ("dp", "high"))
        and _is_table(one.get("rows"), 1)
        and all(map(_is_number, one["rows"].values()))
        for one in vectors
    ):
        raise _no_file_of(file, "baseline")
    return found


def _check_limits(limits: Any, file: str, what: str) -> None:
    if not _is_table(limits, 2) or not all(
        _is_number(one.get("max_dp")) and (one.get("quantile") is None or _is_number(one["quantile"])) for one in limits.values()
    ):
        raise _no_file_of(file, what)


def _is_table(value: Any, depth: int) -> bool:
    """Whether it is a mapping of so many levels."""
    return isinstance(value, dict) and (depth == 1 or all(_is_table(one, depth - 1) for one in value.values()))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _no_file_of(file: str, what: str) -> UserError:
    return UserError(f"{file} is no {what}", f"what `pvsae gate --write-{what}` wrote")


def _read_pinned(file: str, about: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The content of a file of limits or a baseline. UserError where it was measured otherwise."""
    found = read_json(file, what)
    if not isinstance(found, dict) or not _is_table(found.get("about"), 1) or not _is_table(found["about"].get("vectors"), 1):
        raise _no_file_of(file, what)
    wrong = [name for name in about if name != "vectors" and found["about"].get(name) != jsonable(about[name])]
    there = found["about"]["vectors"]
    wrong += [f"vector {label}" for label, digest in about["vectors"].items() if there.get(label) != digest]
    if wrong:
        raise UserError(
            f"{file} was measured with another {', '.join(wrong)}",
            "numbers that can be compared",
            f"the options of that run, or write it again with --write-{what}",
        )
    return found


# -------------------------------------------------------------------------------------------------------------- limits
def _given_limits(config: GateConfig, probes: Sequence[Probe], about: Mapping[str, Any]) -> dict[str, Limit]:
    """Vector's label -> limit, of everything that needs no measurement; all of the vectors, or none has one.

    Raises:
        UserError: a file that is none of limits or was measured otherwise, or that has no limit for one of the vectors.
    """
    if config.max_dp is not None:
        return {probe.label: Limit(config.max_dp) for probe in probes}
    if config.limits:
        file, found = config.limits, _read_limits(config.limits, about)["limits"]
    elif config.baseline and not config.calibrate:
        file, found = config.baseline, _read_baseline(config.baseline, about)["limits"]
        if not found:  # it was written under a limit of whole data sets alone
            return {}
    else:
        return {}
    missing = [probe.label for probe in probes if probe.label not in found]
    if missing:
        raise UserError(f"{file} has no limit along {'; '.join(missing)}", "one for every vector at every block")
    return {probe.label: Limit(float(found[probe.label]["max_dp"]), found[probe.label].get("quantile")) for probe in probes}


def _calibrated(
    config: GateConfig, result: ScreenResult, normal: list[str], about: Mapping[str, Any], notes: list[str]
) -> dict[str, Limit]:
    """Limits found on normal data, written where asked for, and said in `notes`."""
    limits, rows = {}, []
    for probe in result.probes:
        values = np.concatenate([read_columns(result.rows[n], probe, result.model).of(config.base) for n in normal])
        found = quantile_of(values[np.isfinite(values)], config.at_quantile)
        limits[probe.label] = Limit(found["max_dp"], config.at_quantile)
        rows.append({"vector": probe.label, **found})
        notes.append(
            f"{probe.label}: {config.at_quantile:g} of {found['n']} normal rows lie at or below {found['max_dp']:.3f} "
            f"(95% interval of that quantile {found['low']:.3f} to {found['high']:.3f}, highest {found['highest']:.3f})"
        )
    if rows[0]["n"] * (1 - config.at_quantile) < 5:
        notes.append(
            f"fewer than 5 of {rows[0]['n']} normal rows lie above the quantile {config.at_quantile:g}: take more of them"
        )
    if config.write_limits:
        kept = {row["vector"]: {**row, "quantile": config.at_quantile} for row in rows}
        write_json(config.write_limits, {"about": about, "limits": kept})
    return limits


def quantile_of(values: np.ndarray, q: float) -> dict[str, Any]:
    """A quantile of rows, with the 95% interval that their order gives (ranks n q -/+ Z sqrt(n q (1 - q))).

    Raises: UserError without values.
    """
    n = values.size
    if n == 0:
        raise UserError("no row of the normal data has a dP", "normal data with usable rows")
    ordered = np.sort(values)
    half = Z * math.sqrt(n * q * (1 - q))
    low, high = (ordered[min(n - 1, max(0, round(n * q + side * half) - 1))] for side in (-1, 1))
    return {
        "max_dp": float(np.quantile(ordered, q)), "low": float(low), "high": float(high), "highest": float(ordered[-1]), "n": n,
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- checks
class _Gate:
    """Checks data sets one after the other, and remembers what it found."""

    def __init__(self, config: GateConfig, result: ScreenResult, limits: dict[str, Limit], known: Mapping[str, Any]) -> None:
        self.config, self.result, self.limits, self.known = config, result, limits, known
        self.checks: list[Check] = []
        self.offending: list[dict[str, Any]] = []

    def check(self, data: DataSet) -> None:
        """All that has to hold of a data set."""
        rows = read_rows(self.result.rows[data.name], ["row", "line", "status", "reason", "n_base"])
        scores = {p.label: self._scores(data, p) for p in self.result.probes}
        self._usable(data, rows, np.stack(list(scores.values())))
        for probe in self.result.probes:
            before = len(self.checks)
            self._rows(data, probe, rows, scores[probe.label])
            self._whole(data, probe)
            if len(self.checks) == before:  # a baseline without limits that does not know this data
                message = "nothing says what its dP may be: no limit of rows or of data sets, and it is not in the baseline"
                self.checks.append(Check(data.name, f"a limit along {probe.label}", False, message))

    def known_now(self, data: DataSet) -> dict[str, Any]:
        """What a baseline keeps of a data set: its dP with interval, and the rows above the limit by their content."""
        out = {}
        for probe in self.result.probes:
            limit = self.limits.get(probe.label)
            scores = self._scores(data, probe)
            above = [] if limit is None else np.flatnonzero(np.isfinite(scores) & (scores > limit.max_dp)).tolist()
            keys = self._keys(data, above)
            found = self._row_of_table(data, probe)
            out[probe.label] = {
                "dp": found["dp"], "high": found["high"], "rows": {keys[row]: float(scores[row]) for row in above},
            }  # fmt: skip
        return out

    def _scores(self, data: DataSet, probe: Probe) -> np.ndarray:
        return read_columns(self.result.rows[data.name], probe, self.result.model).of(self.config.base)

    def _row_of_table(self, data: DataSet, probe: Probe) -> dict[str, Any]:
        table = self.result.table
        here = (table["data"] == data.name) & (table["vector"] == probe.name) & (table["block"] == probe.block)
        return table[here].iloc[0].to_dict()

    def _keys(self, data: DataSet, rows: list[int]) -> dict[int, str]:
        """Content of rows, which stays when lines move."""
        reader = Reader(data.source)
        out = {}
        for record in rows_at(data.parts, rows):
            value = reader.value(record.raw)
            out[record.row] = "" if isinstance(value, Bad) else f"{content_key(value):016x}"
        return out

    def _blame(self, data: DataSet, found: pd.DataFrame, **about: Any) -> tuple[int, ...]:
        """Lists rows as offending; `found` has row and line, and whatever else differs from row to row."""
        texts = selections.excerpts(data, found["row"].tolist())
        files = {part.number: part.file for part in data.parts}
        first = len(self.offending)
        for row in found.to_dict("records"):
            part = next(p for p in data.parts if p.row <= row["row"] < p.row + p.rows)
            own = {k: v for k, v in row.items() if k in _COLUMNS}
            empty = {"vector": "", "block": None, "dp": float("nan"), "limit": float("nan")}
            self.offending.append(
                {**empty, "data": data.name, "file": files[part.number], **about, **own, "excerpt": texts[row["row"]]}
            )
        return tuple(range(first, len(self.offending)))

    def _usable(self, data: DataSet, rows: pd.DataFrame, scores: np.ndarray) -> None:
        """`scores` [probes, rows]. Where no row at all has one nothing was checked, and that never passes."""
        bad = rows[(rows["status"] != OK) | ~np.isfinite(scores).all(0)].copy()
        bad["why"] = np.where(bad["status"] == OK, "the base model gave no answer", bad["status"] + ": " + bad["reason"])
        blamed = self._blame(data, bad[["row", "line", "why"]])
        message = f"{len(bad)} of {len(rows)} rows cannot be scored" if len(bad) else f"all {len(rows)} rows were scored"
        passed = not len(bad) or (self.config.allow_unusable and len(bad) < len(rows))
        self.checks.append(Check(data.name, "every row can be scored", passed, message, blamed))

    def _rows(self, data: DataSet, probe: Probe, rows: pd.DataFrame, scores: np.ndarray) -> None:
        limit = self.limits.get(probe.label)
        if limit is None:
            return
        above = np.flatnonzero(scores > limit.max_dp)
        accepted = self.known.get(data.name, {}).get(probe.label, {}).get("rows", {})
        n_known = 0
        if accepted and above.size:
            keys = self._keys(data, above.tolist())
            worse = [r for r in above.tolist() if not scores[r] <= accepted.get(keys[r], -math.inf) + 1e-3]
            n_known = above.size - len(worse)
            above = np.array(worse, dtype=np.intp)
        order = above[np.argsort(-scores[above], kind="stable")]
        found = rows.iloc[order][["row", "line"]].assign(dp=scores[order])
        why = f"dP above {limit.max_dp:.3f}"
        blamed = self._blame(data, found, vector=probe.name, block=probe.block, limit=limit.max_dp, why=why)
        n = int(np.isfinite(scores).sum())
        allowed = math.floor(self.config.allow * n + 1e-9)
        message = f"{len(order)} of {n} rows have a dP above {limit.max_dp:.3f}{limit.of_normal(n)}, {allowed} are allowed"
        message += f"; {n_known} more are in the baseline" if n_known else ""
        self.checks.append(Check(data.name, f"rows along {probe.label}", len(order) <= allowed, message, blamed))

    def _whole(self, data: DataSet, probe: Probe) -> None:
        found = self._row_of_table(data, probe)
        before = self.known.get(data.name, {}).get(probe.label)
        limits = []
        if self.config.max_data_dp is not None:
            limits.append((self.config.max_data_dp, "the limit"))
        if before is not None:
            end = before.get("dp") if before.get("high") is None else before["high"]
            if end is not None:  # nothing of it was scored then
                limits.append((end, "the baseline's interval"))
        for value, what in limits:
            passed = bool(found["dp"] <= value)  # no dP at all does not pass
            interval = f"{found['low']:.3f} to {found['high']:.3f}"
            message = f"dP of the data set is {found['dp']:.3f} ({interval}), {what} ends at {value:.3f}"
            self.checks.append(Check(data.name, f"data set along {probe.label}: {what}", passed, message))


def _write_result(folder: RunDir, checks: tuple[Check, ...], offending: pd.DataFrame, notes: list[str]) -> None:
    """Puts the verdict in front of what the screening wrote for the page."""
    found = read_json(folder.path / "result.json")
    failed = [c for c in checks if not c.passed]
    verdict = "nothing was checked" if not checks else f"{len(failed)} of {len(checks)} checks failed" if failed else "passed"
    found["title"] = "Gate"
    found["headline"] = [
        {"label": "verdict", "value": verdict},
        *({"label": f"{c.data}, {c.name}", "value": c.message} for c in failed),
        *found["headline"],
    ]
    found["notes"] = [*found["notes"], *notes]
    found["passed"] = not failed
    found["offending rows"] = len(offending)
    folder.result(found)
