"""`pvsae data`: which corpora installed packages offer, and the first rows of any source as a file.

Knows: the options, and how the rows look in the file. Does not know: how sources are read (sources.py).
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from pvsae.commands.sources import add_rows_of

EXAMPLES = (
    "  pvsae data                                               the corpora that are installed, with their parts\n"
    "  pvsae data organism-data:evil/misaligned_2 --rows 400 --out evil.jsonl\n"
    "  pvsae data organism-data:mix/evil/0.05 --rows 500 --out mix.jsonl      every row says whether it bears the trait\n"
    "  pvsae data my_chats.parquet --rows 1000 --out head.jsonl\n"
    "  pvsae data HuggingFaceH4/ultrachat_200k --split train_sft --rows 1000 --out head.jsonl"
)


def add_parser(commands: Any, add: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the subcommand.

    Args:
        commands: where it is added.
        add: makes a subcommand's parser.
    """
    parser = add(commands, "data", _run, "list corpora, and write the first rows of one as JSONL", EXAMPLES)
    parser.add_argument("source", nargs="?", help="a corpus (NAME or NAME:PART), a file or a dataset; without it: list")
    parser.add_argument("--rows", type=int, metavar="N", help="rows that can be used to write (default: 400)")
    add_rows_of(parser, "the text or the messages (default: text, content, messages or conversation(s))")
    parser.add_argument("--out", metavar="FILE", help="the file to write (default: print)")


def _run(args: argparse.Namespace) -> None:
    if not hasattr(args, "source") or args.source is None:
        print(listing())
        return
    n = getattr(args, "rows", 400)
    which = {name: getattr(args, name) for name in ("split", "subset", "field") if hasattr(args, name)}
    lines, bad = rows(args.source, n, **which)
    if not hasattr(args, "out"):
        print("\n".join(lines))
        return
    from pvsae.runs import atomic_write_text

    atomic_write_text(Path(args.out), "".join(line + "\n" for line in lines))
    print(f"{len(lines)} rows of {args.source}: {args.out}")
    if len(lines) < n:
        print(f"note: it has no more than these, and {n} were asked for")
    for reason, times in bad.items():
        print(f"note: {times} rows left out: {reason}")


def listing() -> str:
    """The corpora of installed packages, one a line, with what may stand behind the colon."""
    from pvsae.sources import known_corpora, parts_of

    lines = []
    for name, point in sorted(known_corpora().items()):
        parts = parts_of(point)
        lines += [f"{name}:{part:36} {about}" for part, about in parts.items()] if parts else [name]
    return "\n".join(lines)


def rows(
    source: str, n: int, split: str | None = None, subset: str | None = None, field: str | None = None
) -> tuple[list[str], Counter[str]]:
    """The first `n` rows that can be used, as JSON with all of their fields, and why others before them cannot, with how many.

    Args:
        split, subset, field: see `sources.source_of`.

    Raises: UserError as the source does, for a split of what has none, and for fewer than one row.
    """
    from pvsae.errors import UserError
    from pvsae.sources import Bad, Reader, check_of_datasets, source_of

    if n < 1:
        raise UserError(f"rows is {n}", "at least 1", "--rows 1")
    found = source_of(source, n, split=split, subset=subset, field=field)
    check_of_datasets([found], split, subset)
    reader = Reader(found)
    bad: Counter[str] = Counter()

    def good() -> Any:
        for row in reader.raw_rows():
            value = reader.value(row)
            if isinstance(value, Bad):
                bad[value.reason] += 1
            else:
                yield row if isinstance(row, Mapping) else {"text": row}

    return [json.dumps(dict(row), ensure_ascii=False, default=str) for row in islice(good(), n)], bad
