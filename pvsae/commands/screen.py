"""`pvsae screen`: what training on data would add along persona vectors.

Knows: the options, and what is printed in the end. Does not know: how anything is computed (stages/screen.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from pvsae.commands.sources import add_rows_of

SHOWN = ("data", "vector", "block", "dp", "low", "high", "n", "n_missing", "dp_prompt_last")
EXAMPLES = (
    "  pvsae screen train.jsonl --vectors runs/vectors --traits evil\n"
    "  pvsae screen mine=a.jsonl theirs=b.parquet --vectors runs/vectors --blocks 2 3 --select 500 --out runs/two\n"
    "  pvsae screen train.jsonl --vectors runs/vectors --base none --out runs/quick      nothing is generated\n"
    "  pvsae screen train.jsonl --vectors runs/vectors --base subset --base-rows 500 --out runs/subset\n"
    "  pvsae screen 'big/*.parquet' --vectors runs/vectors --base none --engine ray --workers 8 --out runs/big\n"
    "  pvsae screen HuggingFaceH4/ultrachat_200k --split train_sft --max-rows 20000 --vectors runs/vectors --out runs/chats\n"
    "  pvsae screen lmsys/lmsys-chat-1m --max-rows 20000 --model Qwen/Qwen2.5-7B-Instruct --select 500 \\\n"
    "      --vectors evil_response_avg_diff.pt --layer 20 --official-names --filter-scores judged.csv --filter-above 1"
)
_OF_BASE = ("base_rows", "answers", "n_samples", "max_new_tokens", "temperature", "top_p")


def shown(result: Any) -> Any:
    """What is printed: dP of every data set along every vector."""
    return result.table[[column for column in SHOWN if column in result.table]]


def add_vectors(parser: argparse.ArgumentParser) -> None:
    """The options that say along which vectors and where, for everything that screens."""
    group = parser.add_argument_group("along which vectors")
    group.add_argument(
        "--vectors", nargs="+", metavar="PATH",
        help="run folders of `pvsae extract`, .safetensors or official .pt files (default: runs/extract)",
    )  # fmt: skip
    group.add_argument("--blocks", nargs="+", type=int, metavar="B", help="counted from 0 (default: the trait's chosen block)")
    group.add_argument(
        "--layer", type=int, nargs="+", dest="layer", metavar="L", help="the same as rows of an official file: block + 1"
    )
    group.add_argument("--layers", help="run folder of `pvsae layers`, whose blocks are used")
    group.add_argument("--statistic", choices=("response_avg_diff", "prompt_avg_diff", "prompt_last_diff"), help="which vector")


def add_base(parser: argparse.ArgumentParser) -> None:
    """The options that say what a row's answer is compared with, and how rows are read."""
    group = parser.add_argument_group("compared with what")
    group.add_argument(
        "--base", choices=("all", "subset", "none"),
        help="rows that get the base model's own answer: all (exact, the default), a random subset, or none (the last prompt "
        "token stands for it: nothing is generated)",
    )  # fmt: skip
    group.add_argument("--base-rows", type=int, metavar="N", help="rows of each data set with --base subset (default: 500)")
    group.add_argument("--answers", metavar="FOLDER", help="base answers to share with other runs (default: in the run folder)")
    group = parser.add_argument_group("how rows are read")
    add_rows_of(group, "the messages (default: messages or conversation(s))")
    group.add_argument("--max-rows", type=int, metavar="N", help="only the first N rows of each data set")
    group.add_argument("--max-length", type=int, metavar="N", help="most tokens of prompt and answer (default: the context)")
    group.add_argument("--part-rows", type=int, metavar="N", help="rows a shard, which is what a kill may cost (default: 256)")
    group = parser.add_argument_group("where it runs")
    group.add_argument("--engine", choices=("here", "ray"), help="one process, or workers on a Ray cluster (default: here)")
    group.add_argument("--workers", type=int, metavar="N", help="of --engine ray, each with a model of its own (default: 2)")
    group.add_argument(
        "--ray-address", metavar="ADDRESS", help="a running cluster (default: RAY_ADDRESS, else one on this machine)"
    )
    group.add_argument("--batch-tokens", type=int, metavar="N", help="tokens a forward pass (default: by device)")


def complete(args: argparse.Namespace) -> None:
    """What the config is to be given besides the options as they stand."""
    from pvsae.errors import UserError

    if not hasattr(args, "vectors"):
        args.vectors = ["runs/extract"]
    if hasattr(args, "layer"):
        if hasattr(args, "blocks"):
            raise UserError("both --blocks and --layer are given", "one of them")
        args.blocks = [layer - 1 for layer in args.layer]
    wasted = []
    if getattr(args, "engine", "here") != "ray":
        wasted += [(name, "--engine ray") for name in ("workers", "ray_address") if hasattr(args, name)]
    if getattr(args, "base", "all") == "none":
        wasted += [(name, "base answers, and --base none makes none") for name in _OF_BASE if hasattr(args, name)]
    for name, what in wasted:
        raise UserError(f"--{name.replace('_', '-')} does nothing here: it is for {what}", "options that do something")


def add_parser(
    commands: Any,
    add: Callable[..., argparse.ArgumentParser],
    run: Callable[[argparse.Namespace], None],
    add_setup: Callable[..., None],
) -> None:
    """Adds the subcommand.

    Args:
        commands: where it is added.
        add: makes a subcommand's parser.
        run: what the subcommand does.
        add_setup: adds the options that all stages share.
    """

    def command(args: argparse.Namespace) -> None:
        complete(args)
        run(args)

    parser = add(commands, "screen", command, "what training on data would add along persona vectors, row by row", EXAMPLES)
    parser.description = (
        "Projection difference of data sets and of every row: how much further along a persona vector the data's answers lie\n"
        "than the base model's own answers to the same prompts. Killed, it goes on from its last whole shard; data may be\n"
        "larger than memory. Rows that cannot be used are counted and listed by line."
    )
    parser.add_argument(
        "data", nargs="+", metavar="DATA",
        help="files or patterns (.jsonl, .parquet), NAME=FILE, datasets on the Hub or in folders, or named corpora",
    )  # fmt: skip
    add_setup(parser, vectors=False)
    add_vectors(parser)
    add_base(parser)
    group = parser.add_argument_group("what is written")
    group.add_argument(
        "--select", type=int, metavar="N", help="copy out the N rows of highest, lowest and random dP (default: none)"
    )
    group.add_argument(
        "--filter-scores", metavar="WHERE", help="scores of an LLM filter: a field of the rows, or a file with a line a row"
    )
    group.add_argument("--filter-judge", metavar="TRAIT", help="let --judge score every row for a trait, as the filter")
    group.add_argument(
        "--filter-above", type=float, metavar="X", help="drop rows scored above this before selecting (default: 1)"
    )
    group.add_argument("--official-names", action="store_true", help="name the columns of rows as the released code does")
