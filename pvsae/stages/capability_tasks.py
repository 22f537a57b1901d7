"""Tasks of lm-evaluation-harness by name or file, and their results as tables.

Knows: how the harness finds and runs tasks, what its results look like, what is left of them when two conditions are compared
question by question.
Does not know: models beyond the harness' own interface, interventions, run folders.

The harness is the extra `capability`; it is imported where it is needed, and its absence is a UserError.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
import logging
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pvsae.errors import UserError
from pvsae.stages.statistics import Z

if TYPE_CHECKING:
    from lm_eval.api.model import LM

_FILES = (".yaml", ".yml")


@dataclass(frozen=True)
class Evaluated:
    """What tasks gave under one condition.

    Attributes:
        rows: a row a task or group and metric: task, metric, filter, value, stderr (NaN where the harness has none), n
            (questions), shots, higher_is_better, parts (the tasks that a group's value is the mean of, else empty), weighting of
            the parts ("size", "equal" or "": of no parts, or a value that is no such mean).
        samples: a row a question: task, metric, filter, doc, value; metrics that are no number a question are left out.
    """

    rows: pd.DataFrame
    samples: pd.DataFrame

    def save(self, folder: Path) -> None:
        self.rows.to_parquet(folder / "rows.parquet", index=False)
        self.samples.to_parquet(folder / "samples.parquet", index=False)

    @staticmethod
    def load(folder: Path) -> Evaluated:
        return Evaluated(pd.read_parquet(folder / "rows.parquet"), pd.read_parquet(folder / "samples.parquet"))


class Tasks:
    """Tasks to run.

    Args:
        names: of the harness (a task, a group or a tag), or YAML files; beside a file its whole folder is known, so that a group
            finds its members.

    Raises: UserError where the harness is missing, or a name or file is no task.
    """

    def __init__(self, names: Sequence[str]) -> None:
        if importlib.util.find_spec("lm_eval") is None:
            raise UserError("lm-evaluation-harness is not installed", "the extra `capability`", "pip install 'pvsae[capability]'")
        if not names:
            raise UserError("no task is given", "names of lm-evaluation-harness, or YAML files", "--tasks mmlu")
        files = [name for name in names if name.endswith(_FILES)]
        self.files = [Path(name) for name in files]
        with _quiet():
            from lm_eval.tasks import TaskManager

            self.names = [_name_in(Path(name)) if name in files else name for name in names]
            # The harness' own tasks are thousands of files, which are not read for nothing.
            self.manager: Any = TaskManager(
                include_path=sorted({str(file.parent.resolve()) for file in self.files}) or None,
                include_defaults=len(files) < len(names),
            )
        for name in self.names:
            if name not in self.manager.all_tasks:
                near = difflib.get_close_matches(name, self.manager.all_tasks, n=3)
                raise UserError(
                    f"lm-evaluation-harness has no task {name!r}",
                    f"such as {', '.join(near)}" if near else "a name that `lm_eval ls tasks` shows, or a YAML file",
                )

    @property
    def content(self) -> dict[str, str]:
        """Text of the files, and of those beside them that they name: what a run that goes on must find unchanged."""
        beside = {
            file: names
            for folder in sorted({file.parent for file in self.files})
            for file in sorted(folder.iterdir())
            if file.suffix in _FILES and (names := _named(file))
        }
        found = {file: file.read_text(encoding="utf-8") for file in self.files}
        todo = list(found)
        while todo:
            text = found[todo.pop()]
            for file, names in beside.items():
                if file not in found and any(re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text) for name in names):
                    found[file] = file.read_text(encoding="utf-8")
                    todo.append(file)
        return {f"task file {file.name}": text for file, text in found.items()}

    def count(self, limit: int | None) -> dict[str, int]:
        """Questions of each task. UserError where a task cannot be loaded, mostly for its data set."""
        with _quiet(), _as_user_error(self.names):
            loaded = self.manager.load(self.names)["tasks"]
            return {name: min(len(task.eval_docs), limit or len(task.eval_docs)) for name, task in loaded.items()}

    def questions(self, *, shots: int | None, limit: int | None, system: str | None, seed: int) -> dict[str, str]:
        """Hash of all that each task asks, in bare text: the rows of its data, prompts with their examples, and choices.

        A chat template is no part of it, so that it is the same of two models. Arguments as of `evaluate`.
        """
        with _quiet(), _as_user_error(self.names), _seeded(seed):
            out = {}
            for name, task in self._loaded(shots, seed)["tasks"].items():
                task.build_all_requests(limit=limit, system_instruction=system)
                asked = [(one.doc_id, one.doc, one.args) for one in task.instances]
                out[name] = hashlib.sha256(json.dumps(asked, sort_keys=True, default=_plain).encode()).hexdigest()
            return out

    def _loaded(self, shots: int | None, seed: int) -> dict[str, Any]:
        """The harness' own tasks and groups, with so many examples, drawn under the seed."""
        loaded: dict[str, Any] = self.manager.load(list(self.names))
        for task in loaded["tasks"].values():
            own = task.get_config("num_fewshot")
            if own != 0:  # a task that says 0 means it
                task.set_config(key="num_fewshot", value=(own or 0) if shots is None else shots)
            task.set_fewshot_seed(seed=seed)
        return loaded

    def evaluate(
        self, lm: LM, *, shots: int | None, limit: int | None, template: bool, system: str | None, seed: int
    ) -> Evaluated:
        """Runs the tasks.

        Args:
            lm: the model.
            shots: examples in a prompt; None takes each task's own number, and so does a task whose own number is 0.
            limit: questions a task; None for all.
            template: whether prompts go through the model's chat template, examples as turns of a conversation.
            system: a system message.
            seed: of the examples that are drawn.
        """
        # Not `simple_evaluate`, which does the same and then starts half a dozen programs to describe the machine, every time.
        from lm_eval import evaluate

        with _quiet(), _as_user_error(self.names), _seeded(seed):
            found = evaluate(
                lm=lm,
                task_dict=self._loaded(shots, seed),
                limit=limit,
                apply_chat_template=template,
                fewshot_as_multiturn=template,
                system_instruction=system,
                bootstrap_iters=1000,
            )
        assert found is not None
        samples = _samples(found["samples"])
        return Evaluated(_rows(found, samples), samples)


def change(now: Evaluated, before: Evaluated) -> pd.DataFrame:
    """The rows of `now` with what changed against `before`, paired question by question, and its 95% interval (normal).

    Columns beside those of `Evaluated.rows`: change, change_low, change_high; NaN where a metric is no mean over questions.

    Raises: UserError where a question was not asked before.
    """
    keys = ["task", "metric", "filter", "doc"]
    both = now.samples.merge(before.samples, on=keys, suffixes=("", "_before"), validate="one_to_one")
    if len(both) < len(now.samples):
        raise UserError(
            f"{len(now.samples)} answers, of which only {len(both)} were asked for before",
            "the same tasks, with the same limit",
            "compare runs of the same questions",
        )
    both["difference"] = both["value"] - both["value_before"]
    stats = {
        key: (float(part["difference"].mean()), _variance_of_mean(part["difference"].to_numpy()), len(part))
        for key, part in both.groupby(["task", "metric", "filter"], sort=False)
    }
    out = []
    for row in now.rows.itertuples(index=False):
        parts = list(row.parts) or [row.task]
        known = [stats.get((part, row.metric, row.filter)) for part in parts]
        if any(one is None for one in known) or (len(row.parts) and not row.weighting):
            out.append((math.nan, math.nan, math.nan))
            continue
        values, variances, sizes = (np.array(column, dtype=float) for column in zip(*known, strict=True))
        weights = _weights(sizes, str(row.weighting))
        middle, half = float(weights @ values), Z * math.sqrt(float(weights**2 @ variances))
        out.append((middle, middle - half, middle + half))
    columns = pd.DataFrame(out, columns=["change", "change_low", "change_high"])
    return pd.concat([now.rows.reset_index(drop=True), columns], axis=1)


def own_shots(rows: pd.DataFrame, shots: int | None) -> list[str]:
    """What to say of the tasks in `rows` (columns of `Evaluated.rows`) that were not asked with `shots` examples."""
    if shots is None:
        return []
    own = sorted(set(rows.loc[(rows["shots"] != shots) & (rows["shots"] >= 0), "task"]))
    some = ", ".join(own[:5]) + (f" and {len(own) - 5} more" if len(own) > 5 else "")
    why = "a task file with num_fewshot: 0 means it, and the harness keeps to it"
    return [f"shots {shots} had no effect on {some}: {why}."] if own else []


def _plain(value: Any) -> Any:
    """What stands in JSON for a value that it does not know; no address of an object, which differs from run to run."""
    return value.tolist() if hasattr(value, "tolist") else type(value).__name__


def _variance_of_mean(x: np.ndarray) -> float:
    return float(x.var(ddof=1) / len(x)) if len(x) > 1 else math.nan


def _weights(sizes: np.ndarray, weighting: str) -> np.ndarray:
    raw = sizes if weighting == "size" else np.ones_like(sizes)
    return raw / raw.sum()


def _samples(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> pd.DataFrame:
    out = [
        {"task": task, "metric": metric, "filter": one["filter"], "doc": int(one["doc_id"]), "value": float(one[metric])}
        for task, some in found.items()
        for one in some
        for metric in one["metrics"]
        if isinstance(one[metric], int | float | np.number)
    ]
    return pd.DataFrame(out, columns=["task", "metric", "filter", "doc", "value"])


def _rows(found: Mapping[str, Any], samples: pd.DataFrame) -> pd.DataFrame:
    """A row a task and metric; groups after their parts."""
    means = samples.groupby(["task", "metric", "filter"])["value"].agg(["mean", "size"])
    out = []
    for task, values in found["results"].items():
        parts = _leaves(task, found["group_subtasks"])
        for key, value in values.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float | np.number):
                continue
            sizes = [found["n-samples"][part]["effective"] for part in (parts or [task])]
            stderr = values.get(f"{metric}_stderr,{filtered}")
            out.append(
                {
                    "task": task,
                    "metric": metric,
                    "filter": filtered,
                    "value": float(value),
                    "stderr": float(stderr) if isinstance(stderr, int | float | np.number) else math.nan,
                    "n": int(sum(sizes)),
                    "shots": found["n-shot"].get(task, -1),
                    "higher_is_better": bool(found["higher_is_better"].get(task, {}).get(metric, True)),
                    "parts": parts,
                    "weighting": _weighting(float(value), parts, metric, filtered, means),
                }
            )
    return pd.DataFrame(out)


def _leaves(task: str, children: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks below a group, groups in groups taken apart; none below a task."""
    out: list[str] = []
    for child in children.get(task, ()):
        out += _leaves(child, children) or [child]
    return out


def _weighting(value: float, parts: Sequence[str], metric: str, filtered: str, means: pd.DataFrame) -> str:
    """Which mean of its parts a group's value is: by size, equal, or neither ("")."""
    keys = [(part, metric, filtered) for part in parts]
    if not keys or any(key not in means.index for key in keys):
        return ""
    of_parts = means.loc[keys]
    for weighting in ("size", "equal"):
        weights = _weights(of_parts["size"].to_numpy(dtype=float), weighting)
        if math.isclose(float(weights @ of_parts["mean"].to_numpy()), value, rel_tol=1e-9, abs_tol=1e-12):
            return weighting
    return ""


def _named(file: Path) -> tuple[str, ...]:
    """What other task files may call a file: its own name, and the task or group that it defines."""
    try:
        return file.name, _name_in(file)
    except UserError:  # a part that others include, or something else
        return (file.name,)


def _name_in(file: Path) -> str:
    """The name that a task file gives itself. UserError where it is no task file."""
    from lm_eval.tasks._yaml_loader import load_yaml

    if not file.is_file():
        raise UserError(f"no task file {file}", "a YAML file of lm-evaluation-harness", "check the path")
    try:
        content = load_yaml(file, resolve_func=False)
    except Exception as error:
        raise UserError(f"{file} is no task file: {_first_line(error)}", "a YAML file of lm-evaluation-harness") from error
    name = content.get("group") or content.get("task")
    if not isinstance(name, str):
        raise UserError(f"{file} names neither a task nor a group", "`task: NAME` or `group: NAME`")
    return name


@contextmanager
def _as_user_error(names: Sequence[str]) -> Iterator[None]:
    """Data sets that cannot be fetched and settings that do not fit together come out of other people's code as anything."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"lm-evaluation-harness could not run {', '.join(names)}: {type(error).__name__}: {_first_line(error)}",
            "tasks whose data can be fetched, or lies in the cache of `datasets`",
            "check the network, or HF_DATASETS_OFFLINE, and the task's own description",
        ) from error


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Tasks may draw from Python's and numpy's own generators, which are the user's: their state is given back."""
    state, numpy_state = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness logs what is in our tables and configs anyway."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]
