"""Where metrics go beside metrics.jsonl: TensorBoard and Weights & Biases.

Knows: both packages (imported when they are asked for), and how a run that goes on is the same run there.
Does not know: what a metric means.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pvsae.errors import UserError
from pvsae.runs import atomic_write_text

LOGS = ("tensorboard", "wandb")
Log = Callable[[dict[str, Any]], None]


@contextlib.contextmanager
def open_logs(names: Sequence[str], folder: Path, config: Mapping[str, Any]) -> Iterator[Log | None]:
    """A function that sends a line of metrics to every log named; None for no names. All are closed at the end.

    Args:
        names: of LOGS.
        folder: of the run. TensorBoard's files go into `folder`/tensorboard, those of W&B into `folder`/wandb.
        config: shown by W&B.

    Raises:
        UserError: an unknown name, or a package that is not installed.
    """
    unknown = [name for name in names if name not in LOGS]
    if unknown:
        raise UserError(f"unknown log {unknown[0]!r}", "one of " + ", ".join(LOGS))
    with contextlib.ExitStack() as stack:
        logs = [{"tensorboard": _tensorboard, "wandb": _wandb}[name](folder, config, stack) for name in dict.fromkeys(names)]

        def log(line: dict[str, Any]) -> None:
            for send in logs:
                send(line)

        yield log if logs else None


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a line as NAME_OF_DICTIONARY/NAME_OF_METRIC."""
    kept = {key: value for key, value in line.items() if isinstance(value, (int, float)) and key not in ("step", "tokens")}
    return {f"{line['dictionary']}/{key}": value for key, value in kept.items()}


def _tensorboard(folder: Path, config: Mapping[str, Any], stack: contextlib.ExitStack) -> Log:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise _missing("tensorboard") from None
    writers: list[Any] = []

    def send(line: dict[str, Any]) -> None:
        if not writers:
            # A training that goes on logs the steps behind its checkpoint again; what was written of them before is not shown.
            writers.append(SummaryWriter(str(folder / "tensorboard"), purge_step=line["step"]))
            stack.callback(writers[0].close)
        for name, value in _numbers(line).items():
            writers[0].add_scalar(name, value, line["step"])

    return send


def _wandb(folder: Path, config: Mapping[str, Any], stack: contextlib.ExitStack) -> Log:
    try:
        import wandb
    except ImportError:
        raise _missing("wandb") from None
    folder.mkdir(parents=True, exist_ok=True)
    known = folder / ".wandb-run"
    if not known.is_file():
        identity = f"{folder.resolve()}{folder.stat().st_mtime_ns}"
        atomic_write_text(known, hashlib.sha256(identity.encode()).hexdigest()[:12])
    try:
        run = wandb.init(
            project="pvsae", name=folder.name, id=known.read_text(), resume="allow", dir=str(folder), config=dict(config)
        )
    except (wandb.errors.Error, OSError) as error:
        raise UserError(
            f"W&B could not start: {error}", "an account that is logged in, or WANDB_MODE=offline", "`wandb login`"
        ) from None
    stack.callback(run.finish)

    def send(line: dict[str, Any]) -> None:
        # Several dictionaries log at the same step, and W&B drops a line with a step that is not the current one or a later one.
        run.log({**_numbers(line), "tokens": line["tokens"]}, step=line["step"])

    return send


def _missing(name: str) -> UserError:
    return UserError(f"the package {name} is not installed", f"it, for --log {name}", "pip install 'pvsae[log]'")
