"""`pvsae decompose`: which latents of a dictionary a persona vector is made of.

Knows: the options, and what is printed in the end. Does not know: how anything is computed (stages/decompose.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

SHOWN = (
    "trait",
    "latent",
    "cosine",
    "rank",
    "beyond_null",
    "nonnegative",
    "signed",
    "difference",
    "q",
    "lists",
    "best_other_rank",
)
EXAMPLES = (
    "  pvsae decompose runs/vectors runs/sae/block-3_width-1024_k-8 --traits evil\n"
    "  pvsae decompose runs/vectors runs/sae/block-3_width-1024_k-8 --traits evil --causal      and what its parts do\n"
    "  pvsae decompose runs/qwen qwen2.5-7b-instruct-andyrdt/resid_post_layer_19_trainer_1 --traits evil --dry-run\n"
    "  pvsae decompose evil_response_avg_diff.pt my_dictionary --layer 20      an official file; layer 20 is block 19"
)


def shown(result: Any) -> Any:
    """What is printed: the latents of highest cosine of each trait."""
    table = result.table
    return table[table["rank"] <= 10][[column for column in SHOWN if column in table]]


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
    parser = add(commands, "decompose", run, "which latents of a dictionary a persona vector is made of", EXAMPLES)
    parser.description = (
        "Which latents of a dictionary a persona vector is made of: cosines beside nulls, other traits' ranks, difference of\n"
        "encodings, matching pursuit, encode(v) with its warning, the agreement of all these, and what the parts do (--causal)."
    )
    add_setup(parser, vectors=True)
    parser.add_argument("dictionary", help="folder (ours, of SAELens or of dictionary_learning), or RELEASE/ID")
    group = parser.add_argument_group("which place")
    group.add_argument("--block", type=int, metavar="B", help="counted from 0 (default: the dictionary's)")
    group.add_argument("--layer", type=int, metavar="L", help="the same as a row of an official file: block + 1")
    group.add_argument("--statistic", choices=("response_avg_diff", "prompt_avg_diff", "prompt_last_diff"), help="which vector")
    group.add_argument("--scale", type=float, help="factor of the activations in its training, where its folder does not say it")
    group.add_argument("--other-model", action="store_true", help="take a dictionary of another model of the same width")
    group = parser.add_argument_group("what is compared")
    group.add_argument("--others", nargs="+", metavar="FILE", help="vector files of further known traits")
    group.add_argument("--rollouts", metavar="FOLDER", help="run folder of `pvsae extract` with the answers (default: VECTORS)")
    group.add_argument("--no-activations", dest="activations", action="store_false", help="read no answers, load no model")
    group.add_argument("--max-pairs", type=int, metavar="N", help="pairs of answers to read (default: all)")
    group.add_argument("--top", type=int, metavar="N", help="length of the lists (default: 20)")
    group.add_argument("--k", type=int, metavar="N", help="atoms of a pursuit (default: 50)")
    group.add_argument("--n-shuffles", type=int, metavar="N", help="vectors of shuffled pairs (default: 100)")
    group.add_argument("--batch-tokens", type=int, metavar="N", help="tokens a forward pass of the reading (default: 4096)")
    group = parser.add_argument_group("causal test")
    group.add_argument("--causal", action="store_true", help="steer with the vector and its parts, and judge the answers")
    group.add_argument("--coefs", nargs="+", type=float, metavar="C", help="strengths, times the vector (default: 1 2)")
    group.add_argument("--atoms", type=int, metavar="N", help="most atoms of the reconstruction (default: 20)")
    group.add_argument("--n-features", type=int, metavar="N", help="top latents that steer alone (default: 5)")
    group.add_argument("--n-random", type=int, metavar="N", help="random latents, and random directions (default: 2)")
    group.add_argument("--positions", choices=("response", "prompt", "all"), help="tokens that are steered (default: all)")
