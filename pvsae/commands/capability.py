"""`pvsae capability`: what a model still can under interventions, or with an adapter.

Knows: the options, and what is printed in the end. Does not know: tasks, conditions (stages/capability.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from pvsae.commands.configs import config_from
from pvsae.commands.features import Extend

EXAMPLES = (
    "  pvsae capability                                                  the model's own test; MMLU where it names none\n"
    "  pvsae capability --vectors runs/vectors --traits evil --coefs 1 2 --ablate      while it is steered\n"
    "  pvsae capability --adapter runs/finetune/adapter --against runs/capability --out runs/after      after a finetuning\n"
    "  pvsae capability --model Qwen/Qwen2.5-7B-Instruct --tasks mmlu gsm8k --shots 5 --limit 100 \\\n"
    "      --vectors runs/qwen --traits evil --unit gap --coefs 0.5 1\n"
    "  pvsae capability --feature runs/sae/block-3_width-1024_k-8:17 --coefs 0.5 1 --dry-run      how many questions?"
)


def _checked(args: argparse.Namespace) -> argparse.Namespace:
    """The same options. UserError for those that were given and would do nothing, defaults too."""
    from pvsae.stages.capability import CapabilityConfig
    from pvsae.stages.capability_options import OPTIONS, check, check_taken

    config = config_from(CapabilityConfig, args)
    check(config)
    check_taken(config, [name for name in OPTIONS if hasattr(args, name)])
    return args


def add_parser(commands: Any, add: Callable[..., argparse.ArgumentParser], run: Callable[[argparse.Namespace], None]) -> None:
    """Adds the subcommand.

    Args:
        commands: where it is added.
        add: makes a subcommand's parser.
        run: what the subcommand does.
    """
    about = "what a model still can while it is steered, or with an adapter"
    parser = add(commands, "capability", lambda args: run(_checked(args)), about, EXAMPLES)
    parser.description = (
        "Tasks of lm-evaluation-harness (pip install 'pvsae[capability]') on the model as it is and under every strength of a\n"
        "vector or feature, with random directions beside them; what changed is compared question by question."
    )
    group = parser.add_argument_group("what to ask")
    group.add_argument(
        "--tasks", nargs="+", metavar="TASK",
        help="names of the harness (`lm_eval ls tasks`), or YAML files (default: what the model's folder says, else mmlu)",
    )  # fmt: skip
    group.add_argument(
        "--shots", type=int, metavar="N", help="examples in a prompt (default: the task's own number; where that is 0 it stays)"
    )
    group.add_argument("--limit", type=int, metavar="N", help="only the first N questions of a task")
    group.add_argument("--system", metavar="TEXT", help="a system message for every question")
    group.add_argument(
        "--no-template", dest="template", action="store_false", help="ask in bare text instead of through the chat template"
    )
    group = parser.add_argument_group("which model")
    group.add_argument("--model", help="a named model, a local folder or a hub id (default: organism)")
    group.add_argument("--adapter", help="folder or id of a PEFT adapter")
    group = parser.add_argument_group("what is done to it")
    group.add_argument("--vectors", metavar="VECTORS", help="run folder of `pvsae extract`, or a vector file")
    group.add_argument("--traits", nargs="+", metavar="TRAIT", help="whose vectors (default: all that are there)")
    group.add_argument("--statistic", choices=("response_avg_diff", "prompt_avg_diff", "prompt_last_diff"), help="which vector")
    group.add_argument("--ablate", action="store_true", help="take the vectors' directions out of the residual as well")
    group.add_argument(
        "--feature", nargs="+", action=Extend, dest="features", metavar="SAE:INDEX",
        help="single features instead of vectors: one, several (SAE:3,7) or a range (SAE:10-19)",
    )  # fmt: skip
    group.add_argument("--mode", choices=("add", "clamp", "ablate"), help="what is done with a feature (default: add)")
    group.add_argument("--activity", nargs="+", metavar="RUN", help="run folders of `pvsae sae eval`, for --unit max")
    group.add_argument("--activity-tokens", type=int, metavar="N", help="tokens to count on otherwise (default: 20000)")
    group.add_argument("--layers", help="run folder of `pvsae layers`, whose blocks are used")
    group.add_argument("--blocks", nargs="+", type=int, metavar="B", help="blocks, counted from 0, one at a time")
    group.add_argument("--multi-layer", action="store_true", help="all blocks at once, with the incremental vectors")
    group.add_argument("--coefs", nargs="+", type=float, metavar="C", help="strengths (default: 1 2)")
    group.add_argument("--unit", choices=("raw", "gap", "kl", "max"), help="of the strengths (default: raw; of features: max)")
    group.add_argument("--positions", choices=("response", "prompt", "all"), help="tokens that are edited (default: all)")
    group.add_argument("--n-random", type=int, metavar="N", help="random directions beside a vector (default: 1)")
    group.add_argument("--library", help="folder of traits, whose questions --unit kl is calibrated on")
    group.add_argument(
        "--against", metavar="RUN",
        help="count changes from an earlier run of the same questions, without the adapter say (default: from this run's own)",
    )  # fmt: skip
    group.add_argument("--other-model", action="store_true", help="let --against and dictionaries be of another model")
    group = parser.add_argument_group("how it runs")
    group.add_argument("--out", help="run folder (default: runs/capability); an unfinished run there goes on")
    group.add_argument("--dry-run", action="store_true", help="say how many questions would be asked, and stop")
    group.add_argument("--seed", type=int, help="(default: 0)")
    group.add_argument("--dtype", help="float32, bfloat16, float16 or auto")
    group.add_argument("--device", help="cpu, cuda, cuda:1, mps or auto")
    group.add_argument("--chat", choices=("auto", "plain"), help="plain: a model without a chat template gets bare text")
    group.add_argument("--batch-size", type=int, metavar="N", help="rows at once (default: 32)")
