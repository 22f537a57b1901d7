"""Where highest activations and densities come from: a run that counted them, a pass over text, or this very run's memory.

Knows: the run folder of `pvsae sae eval`, the text that a dictionary was trained on, how counts are kept as a step of a run.
Does not know: how latents are counted (saes/activity.py), what the counts are for.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch

from pvsae.errors import UserError
from pvsae.runs import RunDir, read_json
from pvsae.saes.activity import LatentActivity, measure, own_text
from pvsae.saes.fingerprint import fingerprint
from pvsae.saes.info import same_model

if TYPE_CHECKING:
    from pvsae.models import ChatModel
    from pvsae.saes.dictionary import SAE
    from pvsae.saes.evaluate import MarkedTokens


def activity_of_run(folder: str | Path, sae: SAE, model: ChatModel) -> LatentActivity | None:
    """What a `pvsae sae eval` run counted of this dictionary, or None where it was of another one (the arrays decide) or of
    another model.

    Raises: UserError for a folder that is no such run, or not a finished one.
    """
    folder = Path(folder)
    table, result, inputs = (folder / name for name in ("tables/features.csv", "result.json", "inputs/value.json"))
    if not (table.is_file() and result.is_file() and inputs.is_file()):
        raise UserError(f"{folder} holds no finished evaluation of a dictionary", "the run folder of `pvsae sae eval`")
    digest = fingerprint(sae)
    if digest not in read_json(inputs, "inputs of a run").values():
        return None
    of = read_json(folder / "config.json", "config of a run")["config"].get("model") or sae.info.model
    if of is not None and not same_model(of, model.name):
        return None
    frame = pd.read_csv(table).sort_values("latent")
    if len(frame) != sae.d_sae:
        return None
    tokens = int(read_json(result, "result of a run")["numbers"]["tokens kept"])
    density, highest = (torch.tensor(frame[name].to_numpy(dtype="float32")) for name in ("density", "max"))
    return LatentActivity(density, highest, tokens, f"evaluation in {folder}", sae)


def activity_of_text(
    sae: SAE,
    model: ChatModel,
    block: int,
    tokens: int,
    *,
    rows: Sequence[MarkedTokens] = (),
    source: str = "answers",
    progress: str | None = None,
) -> LatentActivity | None:
    """A count on the text that the dictionary's training held out, else on `rows`; None where there is neither."""
    own = own_text(sae, model, tokens)
    if own:
        return measure(sae, model, own, "text that the dictionary's training held out", block=block, progress=progress)
    return measure(sae, model, rows, source, block=block, progress=progress) if rows else None


def count(
    sae: SAE, model: ChatModel, block: int, runs: Sequence[str | Path], tokens: int, progress: str | None = None
) -> LatentActivity | None:
    """The counts of the first of `runs` that is of this dictionary, else counts on its own text; None where it has none."""
    given = (activity_of_run(run, sae, model) for run in runs)
    found = next((counts for counts in given if counts is not None), None)
    return found or activity_of_text(sae, model, block, tokens, progress=progress)


def is_kept(folder: RunDir, sae: SAE) -> bool:
    """Whether a run remembers counts of the dictionary."""
    return _step(sae) in folder.finished


def kept(folder: RunDir, sae: SAE, compute: Callable[[], LatentActivity]) -> LatentActivity:
    """Counts as a step of a run: made once, so that a run that goes on measures strengths in the units that it began with."""

    def frame() -> pd.DataFrame:
        found = compute()
        outliers = found.sae.info.outliers
        median = None if outliers is None else outliers.median_norm
        columns = {"density": found.density.numpy(), "max": found.max.numpy(), "tokens": found.tokens, "source": found.source}
        return pd.DataFrame({**columns, "median_norm": math.nan if median is None else median})

    table = folder.do_table(_step(sae), frame)
    median = float(table["median_norm"].iloc[0])
    if sae.info.outliers is not None and not math.isnan(median):
        sae = sae.calibrated(median)
    density, highest = (torch.tensor(table[name].to_numpy(dtype="float32")) for name in ("density", "max"))
    return LatentActivity(density, highest, int(table["tokens"].iloc[0]), str(table["source"].iloc[0]), sae)


def _step(sae: SAE) -> str:
    return f"activity/{hashlib.sha256(sae.ref.encode()).hexdigest()[:12]}"
