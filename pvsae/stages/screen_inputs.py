"""What a screening is started with: which vectors at which blocks, and which rows.

Knows: the words of a config, and how they become probes and data sets.
Does not know: what is done with them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pvsae.errors import UserError
from pvsae.parts import divisible, parts_of
from pvsae.runs import RunDir, atomic_path
from pvsae.screening.worker import DataSet, slug
from pvsae.sources import Bad, Reader, Source, check_of_datasets, source_of
from pvsae.stages.inputs import check_blocks, chosen_block, read_vector_file, read_vectors, stored_traits

if TYPE_CHECKING:
    from pvsae.models import ChatModel
    from pvsae.screening.reading import Probe
    from pvsae.vectors import PersonaVectors

NAMED_ROWS = 10_000  # of a corpus of a package, which may have no end


def open_vector_files(paths: Sequence[str], traits: Sequence[str], statistic: str) -> list[tuple[str, str, PersonaVectors]]:
    """(name, stem of the released code's file, vectors) of everything that `paths` lead to and `traits` name (none: all).

    Names are traits; where two vectors have one trait, the stem stands for it, or else what they lie in stands before it. Stems
    that are equal begin with what the vectors lie in as well, so that names and stems are each of one vector.

    Raises:
        UserError: nothing there, a trait that none of the paths has, a vector given twice.
    """
    found: list[tuple[str, str, str, PersonaVectors]] = []  # what it lies in, trait, stem, vectors
    for given, home in zip(paths, _homes(paths), strict=True):
        path = Path(given)
        if path.is_dir():
            there = stored_traits(path)
            wanted = [t for t in traits if t in there] if traits else there
            if not there:
                read_vectors(path, traits[0] if traits else "any trait", statistic)  # says what is wrong with it
            found += [(home, t, f"{t}_{statistic}", read_vectors(path, t, statistic)) for t in wanted]
        else:
            vectors = read_vector_file(path)
            if not traits or vectors.trait in traits:
                own = statistic if statistic in vectors.statistics or len(vectors.statistics) > 1 else vectors.statistics[0]
                vectors.of(own)
                stem = path.stem if path.suffix == ".pt" else f"{vectors.trait}_{own}"
                found.append((home, vectors.trait, stem, vectors))
    missing = sorted(set(traits) - {trait for _, trait, _, _ in found})
    if missing or not found:
        raise UserError(
            f"no vectors of {', '.join(missing) or 'any trait'} in {', '.join(paths) or 'nothing'}",
            "run folders of `pvsae extract`, .safetensors files or official .pt files that hold them",
            "pvsae extract --traits " + " ".join(missing or ["..."]) + " --out runs/vectors",
        )
    traits_found = Counter(trait for _, trait, _, _ in found)
    stems_found = Counter(stem for _, _, stem, _ in found)
    out = []
    for home, trait, stem, vectors in found:
        alone = stems_found[stem] == 1
        name = trait if traits_found[trait] == 1 else stem if alone else f"{home}-{trait}"
        out.append((name, stem if alone else f"{home}-{stem}", vectors))
    for names in ([name for name, _, _ in out], [stem for _, stem, _ in out]):
        twice = sorted(name for name, n in Counter(names).items() if n > 1)
        if twice:
            raise UserError(f"two vectors would be called {twice[0]!r}", "folders or files of other names, each vector once")
    return out


def _homes(paths: Sequence[str]) -> list[str]:
    """A name of each path that no other has: its own, else that of a folder above, else as many of them as tell all apart."""
    parts = [
        (p.parent / (p.name if p.is_dir() else p.stem)).parts for p in (Path(given).expanduser().absolute() for given in paths)
    ]
    twice = sorted(given for given, n in Counter(str(Path(p).absolute()) for p in paths).items() if n > 1)
    if twice:
        raise UserError(f"{twice[0]} is given twice", "each folder or file of vectors once")
    depth = max((len(one) for one in parts), default=1)
    single = ([one[-k] if k <= len(one) else "" for one in parts] for k in range(1, depth + 1))
    joined = (["-".join(one[-k:]) for one in parts] for k in range(2, depth + 1))
    for names in (*single, *joined):
        if len(set(names)) == len(names) and all(names):
            return names
    return [f"{i + 1}-{one[-1]}" for i, one in enumerate(parts)]  # a.pt beside a.safetensors: only the suffix differs


def open_probes(
    found: Sequence[tuple[str, str, PersonaVectors]], model: ChatModel, blocks: Sequence[int], layers: str | None, statistic: str
) -> tuple[Probe, ...]:
    """Every vector at every block (at its trait's chosen block where none is given). UserError for what does not fit."""
    from pvsae.screening.reading import Probe

    probes = []
    for name, stem, vectors in found:
        vectors.check_model(model)
        own = statistic if statistic in vectors.statistics else vectors.statistics[0]
        for block in check_blocks(blocks, model) or (chosen_block(vectors.trait, model, layers),):
            direction = vectors.direction(block, own)
            if not direction.norm:
                raise UserError(f"the vector {name!r} is zero at block {block}", "a vector that points somewhere")
            probes.append(Probe(name, stem, block, direction))
    return tuple(probes)


def chats_of(
    text: str, max_rows: int | None, *, split: str | None = None, subset: str | None = None, field: str | None = None
) -> Source:
    """The chats that a word stands for (see `sources.source_of`); of a corpus that may have no end, the first NAMED_ROWS."""
    found = replace(source_of(text, max_rows, split=split, subset=subset, field=field), kind="chat")
    return found if found.named is None or max_rows is not None else replace(found, max_samples=NAMED_ROWS)


def name_sources(
    data: Sequence[str | Source],
    max_rows: int | None = None,
    *,
    split: str | None = None,
    subset: str | None = None,
    field: str | None = None,
) -> list[tuple[str, Source]]:
    """(name, source) of everything given, in order; NAME=PATH names it, else it is the file's stem. Names are made unique.

    Raises: UserError without data, for a source that cannot be right, and for a split or subset where no dataset is.
    """
    if not data:
        raise UserError("no data to screen", "JSONL or Parquet files with messages, a dataset's or a corpus' name")
    out: list[tuple[str, Source]] = []
    for given in data:
        if isinstance(given, Source):
            name, source = given.name, given
        else:
            before, equals, after = given.partition("=")
            named = bool(equals) and "/" not in before and not Path(given).exists()
            source = chats_of(after if named else given, max_rows, split=split, subset=subset, field=field)
            is_file = source.path is not None and not Path(source.path).is_dir()
            stem = source.name.removesuffix(".gz").rpartition(".")[0] if is_file else ""
            name = before if named else stem or source.name
        source.check()
        taken = {n for n, _ in out}
        unique, k = name, 2
        while unique in taken:
            unique, k = f"{name} ({k})", k + 1
        out.append((unique, source))
    check_of_datasets([source for _, source in out], split, subset)
    return out


def open_data(sources: Sequence[tuple[str, Source]], folder: RunDir, part_rows: int) -> tuple[list[DataSet], dict[str, Any]]:
    """The data sets with their parts, and what pins their content.

    What can only be read from its start (corpora, datasets by name, packed files) is copied to a JSONL file in the run folder
    first, once; JSONL and Parquet files are read where they lie.

    Raises:
        UserError: a source that is missing or in whose first rows nothing can be used, or without rows.
    """
    data, pins = [], {}
    for name, source in sources:
        reader = Reader(source)
        if reader.kind != "chat":
            raise UserError(f"{name} holds texts", "chats: a field messages with [{'role': ..., 'content': ...}, ...]")
        if divisible(reader.files):
            pins[f"rows of {name}"] = reader.content
            files, kept = list(reader.files), source
        else:
            with folder.step(f"copied/{slug(name)}") as step:
                if not step.done:
                    _copy(reader, step.folder / "rows.jsonl")
            files = [folder.path / f"copied/{slug(name)}" / "rows.jsonl"]
            kept = Source(path=str(files[0]), kind="chat", field=reader.field, roles=source.roles)
            pins |= {f"rows of {name}": Reader(kept).content, f"source of {name}": reader.content}
        parts = parts_of(files, part_rows, source.max_samples)
        if not parts:
            raise UserError(f"{name} has no rows", "at least one")
        data.append(DataSet(name, kept, tuple(parts)))
    return data, pins


def count_rows(source: Source) -> int:
    """Rows of a source, found by reading it once."""
    reader = Reader(source)
    if divisible(reader.files):
        return sum(part.rows for part in parts_of(reader.files, 1 << 20, source.max_samples))
    return sum(1 for _ in islice(reader.raw_rows(), source.max_samples))


def _copy(reader: Reader, path: Path) -> None:
    """Every row as a line of JSON; a row that cannot be parsed as a line that cannot, so that it is counted where it is read."""
    most = reader.source.max_samples
    with atomic_path(path) as tmp, tmp.open("w", encoding="utf-8", errors="surrogatepass") as out:
        for i, row in enumerate(reader.raw_rows()):
            if i == most:
                break
            line = row.reason if isinstance(row, Bad) else json.dumps(row, default=str)
            out.write(line + "\n")


def with_subset(data: Sequence[DataSet], size: int, seed: int) -> list[DataSet]:
    """The data sets with a random choice of `size` rows each that get a base answer."""
    out = []
    for i, one in enumerate(data):
        rng = np.random.default_rng([seed, i])
        chosen = rng.choice(one.rows, min(size, one.rows), replace=False)
        out.append(replace(one, with_base=frozenset(int(row) for row in chosen)))
    return out
