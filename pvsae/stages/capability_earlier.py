"""An earlier run of `pvsae capability` to count changes from: whether it was asked the same, and what it answered.

Knows: what a run remembers of its questions, what two runs must share to be compared.
Does not know: conditions, tables, what tasks are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvsae.errors import UserError
from pvsae.runs import RunDir, read_json
from pvsae.saes.info import same_model
from pvsae.stages.capability_tasks import Evaluated, Tasks

if TYPE_CHECKING:
    from pvsae.models import ChatModel
    from pvsae.stages.capability import CapabilityConfig

NONE = "none"  # the condition under which nothing is done to the model
COMPARED = ("shots", "limit", "template", "system", "chat", "seed")  # options that two runs must share to be compared
_ASKED = "asked"
_FIX = "give the same options, or make the run to compare with again"


def against(config: CapabilityConfig, tasks: Tasks, model: ChatModel | None) -> tuple[Evaluated | None, dict[str, Any]]:
    """The untouched model's values in the earlier run that the config names (None where it names none), and what this run asks.

    Args:
        model: None before it is loaded.

    Raises:
        UserError: the earlier run has no such values, or is of another model, or was asked other questions, or the same ones in
            another way; a task whose data cannot be fetched.
    """
    was = None if config.against is None else _values(config, Path(config.against))
    now = _asked(config, tasks, model)
    if was is None:
        return None, now
    _compare(Path(str(config.against)), now)
    return was, now


def remember(folder: RunDir, asked: dict[str, Any]) -> None:
    """Keeps what a run asks, for runs that are compared with it. UserError where the run began with other questions."""
    if _ASKED not in folder.finished and f"conditions/{NONE}" in folder.finished:
        return  # of an earlier version, and nobody knows what it was asked
    before = folder.do_json(_ASKED, lambda: asked)
    changed = _differing(before["questions"], asked["questions"])
    if changed:
        raise UserError(
            f"the questions of {_few(changed)} changed since the run in {folder.path} began",
            "the same data until a run is finished",
            "choose another --out, or delete that folder",
        )


def _asked(config: CapabilityConfig, tasks: Tasks, model: ChatModel | None) -> dict[str, Any]:
    """What a run asks, as JSON: the dtype that the model has or would be loaded in, and a hash of each task's questions."""
    from pvsae.models.loading import resolve_device, resolve_dtype

    dtype = resolve_dtype(config.dtype, resolve_device(config.device)) if model is None else model.dtype
    questions = tasks.questions(shots=config.shots, limit=config.limit, system=config.system, seed=config.seed)
    return {"dtype": str(dtype).removeprefix("torch."), "questions": questions}


def _values(config: CapabilityConfig, path: Path) -> Evaluated:
    """The earlier run's values. UserError where there are none, or where its options say that they are no match."""
    place = path / "conditions" / NONE
    if not (place / "rows.parquet").is_file() or not (place / "samples.parquet").is_file():
        raise UserError(f"{path} holds no values to compare with", "the run folder of `pvsae capability`", "check --against")
    was = RunDir.read(path).config
    asked = {name: (was.get(name), getattr(config, name)) for name in COMPARED}
    wrong = [f"{name} {before!r}, here {here!r}" for name, (before, here) in asked.items() if before != here]
    if wrong:
        raise _otherwise(path, wrong)
    if not config.other_model and not same_model(str(was.get("model")), config.model):
        raise UserError(
            f"{path} is of the model {was.get('model')}, and this run of {config.model}",
            "runs of one model",
            "--other-model, if the models are close relatives (a base model and its finetune) and you mean it",
        )
    return Evaluated.load(place)


def _compare(path: Path, now: dict[str, Any]) -> None:
    """UserError where the earlier run had other questions or another dtype, or does not say."""
    file = path / _ASKED / "value.json"
    if not file.is_file():
        raise UserError(
            f"{path} was made by an earlier version of pvsae, which kept no record of its questions",
            "a run that says what it was asked",
            "make the run to compare with again, under another --out",
        )
    before = read_json(file, "record of a run's questions")
    if before["dtype"] != now["dtype"]:
        raise _otherwise(path, [f"dtype {before['dtype']!r}, here {now['dtype']!r}"])
    missing = [task for task in now["questions"] if task not in before["questions"]]
    if missing:
        raise UserError(f"{path} was not asked {_few(missing)}", f"its tasks, {_few(before['questions'])}", _FIX)
    other = _differing(before["questions"], now["questions"])
    if other:
        raise UserError(
            f"{path} was asked other questions under the name {_few(other)}",
            "the same questions, with the same examples and choices",
            "use the task files and data of that run, or make it again",
        )


def _otherwise(path: Path, wrong: Sequence[str]) -> UserError:
    return UserError(
        f"{path} was asked otherwise: {'; '.join(wrong)}", "runs that differ only in what is done to the model", _FIX
    )


def _differing(before: dict[str, str], now: dict[str, str]) -> list[str]:
    return [task for task, digest in now.items() if before.get(task) != digest]


def _few(names: Iterable[str]) -> str:
    """Names for a message; a group such as MMLU has dozens of tasks."""
    first, *rest = list(names)
    return ", ".join([first, *rest[:4]]) + (f" and {len(rest) - 4} more" if len(rest) > 4 else "")
