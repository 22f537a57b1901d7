"""Hugging Face datasets as sources: by name, or in files and folders that the package `datasets` reads.

Knows: the package `datasets` (imported when one is opened), and what it says where something is wrong.
Does not know: what rows hold (sources.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvsae.errors import UserError

if TYPE_CHECKING:
    from pvsae.sources import Source

_BUILDERS = {".json": "json", ".csv": "csv", ".arrow": "arrow"}
_SAVED = ("dataset_dict.json", "state.json")  # one of them lies in every folder that `save_to_disk` wrote


def load_named(source: Source) -> Any:
    """The rows of a dataset by its name; UserError where there is none, or none that may be read."""
    datasets = _datasets()
    try:
        return datasets.load_dataset(
            source.dataset, source.subset, split=source.split, revision=source.revision, streaming=source.streaming
        )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(  # not found, offline, unknown subset or split, gated, or files that are not what their names say
            f"dataset {source.dataset} cannot be loaded: {_why(error)}",
            "the name of a dataset on the Hub (or in the cache), with its subset and split",
            "check the name, the network, or that you may read it; a local file goes into path:",
        ) from error


def load_local(files: Sequence[Path], suffix: str, source: Source) -> Any:
    """The rows of files of one suffix, or of a folder: one that `datasets` saved, or with a dataset's files as the Hub has them.

    Raises: UserError for other files, what cannot be read, and a split or subset that is not there.
    """
    folder = files[0] if files[0].is_dir() else None
    if suffix not in _BUILDERS and folder is None:
        raise UserError(
            f"source {source.name} is of an unknown kind",
            "a file .jsonl, .txt, .parquet, .json, .csv or .arrow, or a saved dataset",
        )
    datasets = _datasets()
    try:
        if folder is None:
            return datasets.load_dataset(_BUILDERS[suffix], data_files=[str(f) for f in files], split="train")
        if not any((folder / name).is_file() for name in _SAVED):
            return datasets.load_dataset(str(folder), source.subset, split=source.split)
        data = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, RuntimeError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{source.path} cannot be read: {_why(error)}", "a file or folder that `datasets` can read") from error
    return _split_of(data, source, isinstance(data, datasets.DatasetDict))


def _split_of(data: Any, source: Source, several: bool) -> Any:
    """The rows that are asked for of what was saved to a folder: `several` splits, or one set of rows."""
    if source.subset is not None:
        raise UserError(f"subset {source.subset!r} of {source.path}", "none: a dataset that was saved to a folder has no subsets")
    own = list(data) if several else [str(data.split or "train")]
    if source.split not in own and (several or source.split != "train"):  # one set of rows is taken as it is, if nothing is said
        raise UserError(f"{source.path} has no split {source.split!r}", f"one of {', '.join(own)}", f"the split {own[0]}")
    return data[source.split] if several else data


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(
            "the package `datasets` is not installed", "it, to read Hugging Face datasets", "pip install 'pvsae[sae]'"
        ) from None
    return datasets


def _why(error: Exception) -> str:
    """What went wrong, with what lay behind it: `datasets` says by itself only that a dataset could not be made."""
    return str(error) if error.__cause__ is None else f"{error} ({error.__cause__})"
