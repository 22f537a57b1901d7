"""`pvsae specific`: the part of each vector that no other trait's vector shares, as vectors of their own.

Knows: the options, and the folder that is written. Does not know: how a part is computed (vectors/specificity.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

EXAMPLES = (
    "  pvsae specific runs/vectors --out runs/specific                     of every trait, against all others in the folder\n"
    "  pvsae specific runs/vectors --traits evil --against sycophantic humorous --out runs/specific\n"
    "  pvsae specific official/*_response_avg_diff.pt --out runs/specific"
)
NOISE = 0.05


def add_parser(commands: Any, add: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the subcommand.

    Args:
        commands: where it is added.
        add: makes a subcommand's parser.
    """
    about = "take out of each vector what the vectors of other traits share with it"
    parser = add(commands, "specific", _run, about, EXAMPLES)
    parser.description = (
        "Vectors of different traits point in partly the same direction, so that data showing one trait lie along every\n"
        "trait's vector. This writes what is left of each when the others' are projected out, as a folder that --vectors\n"
        "takes. The answers behind the vectors stay where they are: decompose and many-shot monitoring want those too."
    )
    parser.add_argument("vectors", nargs="+", help="a run folder of `pvsae extract`, .safetensors files or official .pt files")
    parser.add_argument("--traits", nargs="+", metavar="TRAIT", help="whose parts are wanted (default: all)")
    parser.add_argument("--against", nargs="+", metavar="TRAIT", help="what is taken out (default: all other traits there)")
    parser.add_argument("--statistic", help="which vector's shares are printed (default: response_avg_diff)")
    parser.add_argument("--out", metavar="FOLDER", help="where they are written (default: runs/specific)")


def _run(args: argparse.Namespace) -> None:
    from pvsae.errors import UserError
    from pvsae.stages.inputs import known_traits, read_vectors, stored_traits, vector_file_of
    from pvsae.vectors.persona import DEFAULT_STATISTIC
    from pvsae.vectors.specificity import shares, specific

    statistic = getattr(args, "statistic", DEFAULT_STATISTIC)
    found = {}
    for path in args.vectors:
        for trait in known_traits((), path):
            if trait in found:
                raise UserError(f"two vectors of {trait!r} are given", "one of each trait")
            found[trait] = read_vectors(path, trait, statistic)
    against = getattr(args, "against", None)
    wanted = list(dict.fromkeys(getattr(args, "traits", ()))) or [trait for trait in found if trait not in (against or ())]
    parts = [specific(found, trait, against) for trait in wanted]
    out = Path(getattr(args, "out", "runs/specific"))
    if out.exists() and (not out.is_dir() or stored_traits(out)):  # an extraction would be gone, or parts of several calls mixed
        expected = "a folder without any, since those in one folder are read as one set"
        raise UserError(f"{out} {'holds vectors already' if out.is_dir() else 'is a file'}", expected, "--out NEW")
    for part in parts:
        part.save(vector_file_of(out, part.trait))
    table = shares(parts, statistic)
    print(f"share: what is left of the squared length of {statistic}\n{table.round(3).to_string(index=False)}\n{out}")
    for trait, rows in table[table["share"] < NOISE].groupby("trait", sort=False):
        blocks = ", ".join(map(str, rows["block"]))
        print(f"note: less than {NOISE:.0%} of {trait!r} is left at block {blocks}; what is left may be noise of the extraction")
