"""`pvsae drift`: what a finetuning did to a model, along every known trait.

Knows: the options, and what is printed in the end. Does not know: what is read and computed (stages/drift.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

EXAMPLES = (
    "  pvsae drift organism runs/finetune --vectors runs/vectors\n"
    "  pvsae drift Qwen/Qwen2.5-7B-Instruct my_adapter --vectors runs/qwen --judge openai:gpt-4.1-mini\n"
    "  pvsae drift Qwen/Qwen2.5-7B-Instruct my_org/my_finetune --vectors runs/qwen --no-scores \\\n"
    "      --sae qwen2.5-7b-instruct-andyrdt/resid_post_layer_19_trainer_1\n"
    "  pvsae drift organism runs/finetune --vectors runs/vectors --no-answers      prompts alone: seconds, and no judge"
)


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
    parser = add(commands, "drift", run, "what a finetuning did to a model, along every known trait", EXAMPLES)
    parser.description = (
        "What a finetuning did to a model: how far the residual moved along every known trait's vector, with intervals and\n"
        "nulls, block by block; trait scores before and after; and, with a dictionary, which features moved most. One model is\n"
        "in memory at a time, and what the base gave is kept."
    )
    parser.add_argument("model", metavar="BASE", help="a named model, a local folder or a hub id")
    parser.add_argument(
        "tuned", metavar="TUNED", help="its finetune: an adapter's folder, a run folder of `pvsae finetune`, a model"
    )
    add_setup(parser, vectors=False, model=False)
    group = parser.add_argument_group("what is compared")
    group.add_argument(
        "--vectors", metavar="VECTORS", help="run folder of `pvsae extract`, or a vector file (default: runs/extract)"
    )
    group.add_argument("--statistic", choices=("response_avg_diff", "prompt_avg_diff", "prompt_last_diff"), help="which vector")
    group.add_argument("--layers", help="run folder of `pvsae layers`, whose blocks are used")
    group.add_argument("--block", type=int, metavar="B", help="block of the main table, counted from 0 (the profile has all)")
    group.add_argument("--no-answers", dest="answers", action="store_false", help="read prompts alone; nothing is generated")
    group.add_argument("--no-scores", dest="scores", action="store_false", help="do not have the answers judged")
    group.add_argument("--sae", metavar="DICTIONARY", help="folder, or RELEASE/ID: which of its features moved most")
    group.add_argument("--sae-block", type=int, metavar="B", help="its block, where it does not say which")
    group.add_argument("--other-model", action="store_true", help="take a dictionary of another model of its width all the same")
    group.add_argument("--top", type=int, metavar="N", help="features of each list (default: 20)")
    group.add_argument("--batch-tokens", type=int, metavar="N", help="tokens a forward pass of the reading (default: 4096)")
