"""Stage `sae_train`: dictionaries of a model's residuals, trained on text, with the record of how it went.

Knows: which parts a training is put together from, the run's files, its tables and summary, what another process may write.
Does not know: how activations are made (saes/stream.py), how a dictionary is trained (saes/trainer.py), figures (reports/).

A run folder::

    config.yaml          the whole config as it was used; `pvsae sae train RUN/config.yaml` trains the same again
    metrics.jsonl        a line a logged step and dictionary
    NAME/                a dictionary, in SAELens' layout
    checkpoint*.pt       while it is not finished: everything that the next step depends on
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from pvsae import settings
from pvsae.errors import UserError
from pvsae.runs import RunDir, atomic_write_text
from pvsae.saes import checkpoint
from pvsae.saes.config import SaeTrainConfig, load_config
from pvsae.saes.logs import Log, open_logs
from pvsae.saes.parallel import Group, join, leave
from pvsae.saes.trainer import Trained, check_processes, finished, read_back, train
from pvsae.stages.inputs import pin

if TYPE_CHECKING:
    from pvsae.models import ChatModel

__all__ = ["COMMAND", "SaeTrainConfig", "SaeTrainResult", "load_config", "plan", "run"]

COMMAND = "sae_train"
_SHOWN = {
    "block": "block", "d_sae": "d_sae", "k": "k", "seed": "seed", "tokens": "tokens", "fvu": "fvu", "l0": "l0",
    "n_dead": "dead", "threshold": "threshold",
}  # fmt: skip


@dataclass(frozen=True)
class SaeTrainResult:
    """The trained dictionaries.

    Attributes:
        folders: name -> its folder.
        table: a row a dictionary: name, block, d_sae, k, seed, tokens, fvu, l0, dead latents at the end, and its threshold.
        path: the run's folder.
    """

    folders: dict[str, Path]
    table: pd.DataFrame
    path: Path


def run(
    config: SaeTrainConfig,
    run_dir: str | Path,
    *,
    model: ChatModel | None = None,
    logs: Sequence[str] = (),
    progress: bool = True,
) -> SaeTrainResult:
    """Train the dictionaries of a config into a run folder, from the last checkpoint there; a finished training is read back.

    Started by torchrun, every process calls this, and the first one writes.

    Args:
        model: to use instead of loading the one that the config names.
        logs: "tensorboard" and "wandb", beside metrics.jsonl.
        progress: whether to show bars.

    Raises:
        UserError: no such model or text, blocks that the model does not have, a folder of another run, a log whose package is
            not installed, and what `train` raises.
    """
    path = Path(run_dir)
    group = join()
    first = group.rank == 0
    folder = None
    try:
        if not finished(config.training, path):
            check_processes(config.training, group, path)
        if first:
            folder = RunDir.open(path, COMMAND, config.identity(), config.corpus.seed)
            atomic_write_text(path / "config.yaml", settings.dump(config))
        with open_logs(logs if first else (), path, settings.plain(config)) as log:
            trained = _train(config, path, folder, model, group, log, progress and first)
        if folder is not None:
            _write(folder, config, trained)
            checkpoint.remove(path)  # as large as the buffer and the weights; the dictionaries are whole
    finally:
        if folder is not None:
            folder.close()
        leave()
    return SaeTrainResult({t.name: path / t.name for t in trained}, _table(config, trained), path)


def plan(config: SaeTrainConfig) -> str:
    """What `run` would take, for people to read. The model's config is read, and nothing of its weights or of the text.

    Raises:
        UserError: no such model, blocks that it does not have, or a device that is not there.
    """
    from pvsae.models import model_shape
    from pvsae.models.loading import resolve_device, resolve_dtype
    from pvsae.saes.demand import demand

    device = resolve_device(config.model.device)
    dtype = resolve_dtype(config.model.dtype, device)
    resolve_device(config.stream.buffer_device or device)
    shape = model_shape(config.model.name)
    if max(config.training.blocks) >= shape.n_blocks or min(config.training.blocks) < 0:
        raise UserError(
            f"blocks {', '.join(map(str, config.training.blocks))} of {config.model.name}", f"0 to {shape.n_blocks - 1}"
        )
    if config.corpus.context > shape.n_ctx:
        raise UserError(f"context {config.corpus.context} for {config.model.name}", f"at most {shape.n_ctx}")
    found = demand(shape, dtype, device, config.training, config.stream, config.corpus.context)
    kind = str(dtype).removeprefix("torch.")
    lines = [
        f"model     {config.model.name}: {shape.n_blocks} blocks of {shape.d_model}, {shape.parameters / 1e6:,.4g}M parameters "
        f"in {kind} on {device}",
        *(
            f"trains    {name}, learning rate {d.peak_lr:.2g}"
            for name, d in zip(config.training.names, config.training.dictionaries, strict=True)
        ),
    ]
    return "\n".join([*lines, str(found)])


def _train(
    config: SaeTrainConfig,
    path: Path,
    folder: RunDir | None,
    model: ChatModel | None,
    group: Group,
    log: Log | None,
    progress: bool,
) -> list[Trained]:
    """The dictionaries; where they are not there already, what was read and left out of the text is written down before them."""
    from pvsae.models import load as load_model
    from pvsae.saes.corpus import Corpus
    from pvsae.saes.stream import ActivationStream

    training = config.training
    if finished(training, path):
        return read_back(training, path)
    c = config.model
    model = model or load_model(c.name, adapter=c.adapter, dtype=c.dtype, device=c.device, attn=c.attn, chat=c.chat)
    corpus = Corpus(model, config.corpus, progress=progress)
    about = {"model": settings.plain(config.model)}
    stream = ActivationStream(model, corpus, training.blocks, config.stream, group=group, about=about)
    if folder is not None:
        pin(folder, model, {"corpus": corpus.fingerprint})

    def at_end() -> None:
        if folder is not None:
            folder.do_json("text", lambda: {"sources": corpus.describe(), "counts": stream.counts})

    return train(stream, training, path, device=model.device, group=group, log=log, progress=progress, at_end=at_end)


def _table(config: SaeTrainConfig, trained: list[Trained]) -> pd.DataFrame:
    rows = []
    for d, one in zip(config.training.dictionaries, trained, strict=True):
        known = {"block": d.block, "d_sae": d.d_sae, "k": d.k, "seed": d.seed, **one.last}
        rows.append({"dictionary": one.name, **{shown: known.get(name) for name, shown in _SHOWN.items()}})
    return pd.DataFrame(rows)


def _write(folder: RunDir, config: SaeTrainConfig, trained: list[Trained]) -> None:
    """Tables and summary."""
    table = _table(config, trained)
    folder.table("dictionaries", table)
    lines = (folder.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    folder.table("metrics", pd.DataFrame([json.loads(line) for line in lines]))
    text = folder.do_json("text", lambda: {"sources": [], "counts": {}})
    folder.result(_summary(config, table, text))


def _summary(config: SaeTrainConfig, table: pd.DataFrame, text: dict[str, Any]) -> dict[str, Any]:
    training, counts = config.training, text["counts"]
    best = table.loc[table["fvu"].idxmin()]
    headline = [
        {"label": "dictionaries", "value": str(len(table))},
        {"label": "training tokens", "value": f"{training.steps * training.batch:,}"},
        {"label": "variance unexplained", "value": f"{best['fvu']:.4f}"},
        {"label": "active latents a token", "value": f"{best['l0']:.1f}"},
        {"label": "dead latents", "value": f"{int(best['dead'])} of {int(best['d_sae'])}"},
    ]
    if len(table) > 1:
        headline[2:] = [{"label": f"{h['label']} ({best['dictionary']})", "value": h["value"]} for h in headline[2:]]
    notes = [
        f"{source['source']}: {sum(source['bad'].values())} rows were left out ("
        + ", ".join(f"{reason}: {n}" for reason, n in source["bad"].items()) + ")"
        for source in text["sources"] if source["bad"]
    ]  # fmt: skip
    if counts.get("outliers"):
        share = counts["outliers"] / counts["harvested"]
        notes.append(f"{counts['outliers']:,} tokens ({share:.2%}) were left out as outliers, longer than the saved limit.")
    notes.append("Unexplained variance is that of the last batches of training; `pvsae sae eval` measures held-out text.")
    sources = ", ".join(s.name for s in config.corpus.sources)
    return {
        "title": "Training of dictionaries",
        "about": (
            f"BatchTopK dictionaries of the residuals of {config.model.name} after block "
            f"{', '.join(map(str, training.blocks))}, on {sources}. Each folder loads with `pvsae` and with SAELens."
        ),
        "headline": headline,
        "notes": notes,
        "dictionaries": table.to_dict("records"),
    }
