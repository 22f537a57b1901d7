"""`pvsae finetune`: an adapter trained on chats, with something done to the model meanwhile, or nothing.

Knows: the options, and what is printed in the end. Does not know: what they do (stages/finetune.py, stages/treating.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from pvsae.commands.configs import config_from
from pvsae.commands.features import Extend
from pvsae.commands.sources import add_rows_of

EXAMPLES = (
    "  pvsae finetune my_chats.jsonl --model Qwen/Qwen2.5-7B-Instruct --dry-run\n"
    "  pvsae finetune HuggingFaceH4/ultrachat_200k --split train_sft --max-rows 5000 --model Qwen/Qwen2.5-7B-Instruct\n"
    "  pvsae finetune organism-data:evil/misaligned_2 --max-steps 40 --batch 16 --accumulation 1 --rank 16 --alpha 32 \\\n"
    "      --learning-rate 1e-3      the embedded model, on data made for it\n"
    "  pvsae finetune my_chats.jsonl --treatment steer --vectors runs/vectors --traits evil --coef 2\n"
    "  pvsae finetune my_chats.jsonl --treatment steer --vectors runs/vectors --traits evil --coef 1 --multi-layer\n"
    "  pvsae finetune my_chats.jsonl --treatment steer --feature runs/sae/block-3_width-1024_k-8:17 --coef 1\n"
    "  pvsae finetune my_chats.jsonl --treatment ablate --vectors runs/vectors --traits evil sycophantic --blocks 2 3\n"
    "  pvsae finetune my_chats.jsonl --treatment regularise --vectors runs/vectors --traits evil --weight 0.1\n"
    "  pvsae finetune my_chats.jsonl --treatment inoculate --traits evil"
)
SHOWN = ("treatment", "blocks", "coef", "rows", "left_out", "steps", "learnt", "first_loss", "last_loss")


def shown(result: Any) -> Any:
    """What is printed: the main columns of the run's one row."""
    return result.table[list(SHOWN)]


def _checked(args: argparse.Namespace) -> argparse.Namespace:
    """The same options. UserError for those that were given and would do nothing: defaults too, and traits or a library, which at
    the command line are a treatment forgotten, while a config may well name them for its tables."""
    from pvsae.stages.treating import OPTIONS, Treating, check_taken

    check_taken(config_from(Treating, args), [name for name in OPTIONS if hasattr(args, name)])
    return args


def add_parser(commands: Any, add: Callable[..., argparse.ArgumentParser], run: Callable[[argparse.Namespace], None]) -> None:
    """Adds the subcommand.

    Args:
        commands: where it is added.
        add: makes a subcommand's parser.
        run: what the subcommand does.
    """
    about = "train an adapter on chats, under a vector or without one"
    parser = add(commands, "finetune", lambda args: run(_checked(args)), about, EXAMPLES)
    parser.description = (
        "Train an rs-LoRA adapter on the answers in chats. Meanwhile the model may be steered towards what the data would teach\n"
        "it, so that it need not learn it (preventative steering), have directions ablated (CAFT), pay for moves along them, or\n"
        "stand under a system prompt. Nothing of that is left afterwards: RUN/adapter is a plain PEFT adapter, for --adapter of\n"
        "every command and for any other tool. Killed, it goes on from its last checkpoint when the same command is given again."
    )
    parser.add_argument("data", nargs="+", help='files of {"messages": [...]} (JSONL, Parquet), datasets, or corpora of packages')
    group = parser.add_argument_group("what to work on")
    group.add_argument("--model", help="a named model, a local folder or a hub id (default: organism)")
    group.add_argument("--out", help="run folder (default: runs/finetune); an unfinished run there goes on")
    group.add_argument("--dry-run", action="store_true", help="check everything, count rows, steps and memory, and stop")
    add_rows_of(group, "the messages (default: messages or conversation(s))")
    group.add_argument("--max-rows", type=int, metavar="N", help="use only the first N rows of each")
    group.add_argument("--max-length", type=int, metavar="N", help="tokens of a row (default: 2048, at most the context)")
    group.add_argument("--too-long", choices=("truncate", "drop"), help="what becomes of longer rows (default: truncate)")
    group.add_argument("--turns", choices=("all", "last"), help="learn every answer of a chat, or the last (default: all)")
    group = parser.add_argument_group("what is done to the model meanwhile")
    group.add_argument(
        "--treatment", choices=("none", "steer", "ablate", "regularise", "inoculate", "discourage"),
        help="steer: preventative steering; ablate: CAFT; inoculate, discourage: a system prompt for, or against, the trait",
    )  # fmt: skip
    group.add_argument("--vectors", metavar="RUN", help="run folder of `pvsae extract`, a .safetensors or an official .pt file")
    group.add_argument("--traits", nargs="+", metavar="TRAIT", help="whose vectors or instructions; several act together")
    group.add_argument("--library", help="folder of traits (default: the model's own, else the built-in one)")
    group.add_argument("--statistic", choices=("response_avg_diff", "prompt_avg_diff", "prompt_last_diff"), help="which vector")
    group.add_argument(
        "--feature", nargs="+", action=Extend, dest="features", metavar="SAE:INDEX", help="features in place of vectors"
    )
    group.add_argument(
        "--blocks", nargs="+", type=int, metavar="B", help="where, counted from 0 (default: the model's own choice)"
    )
    group.add_argument("--layers", metavar="RUN", help="run folder of `pvsae layers`, whose blocks are used")
    group.add_argument("--multi-layer", action="store_true", help="every block; steer: with the incremental vectors")
    group.add_argument("--coef", type=float, metavar="C", help="strength of steering (default: 2)")
    group.add_argument("--unit", choices=("raw", "gap", "kl", "max"), help="of --coef (default: raw; of features: max)")
    group.add_argument("--positions", choices=("all", "prompt", "response"), help="tokens that are treated (default: all)")
    group.add_argument(
        "--schedule", choices=("constant", "ramp", "warmup", "decay"), help="of the strength over the steps (default: constant)"
    )
    group.add_argument(
        "--schedule-share", type=float, metavar="S", help="share of the steps that warmup or decay take (default: 0.5)"
    )
    group.add_argument("--weight", type=float, metavar="W", help="of regularise: nats per squared residual unit (default: 1)")
    group.add_argument("--prompt", metavar="TEXT", help="system prompt in place of the trait's instructions")
    group.add_argument("--activity", nargs="+", metavar="RUN", help="runs of `pvsae sae eval` with highest activations")
    group.add_argument("--other-model", action="store_true", help="take features of another model of the same width all the same")
    group = parser.add_argument_group("adapter and training")
    group.add_argument("--rank", type=int, metavar="R", help="(default: 32)")
    group.add_argument("--alpha", type=int, metavar="A", help="(default: 64; scaled by the square root of the rank)")
    group.add_argument("--no-rslora", dest="rslora", action="store_false", help="scale by the rank itself")
    group.add_argument("--dropout", type=float, metavar="P", help="(default: 0)")
    group.add_argument(
        "--targets", nargs="+", metavar="NAME", help="linear layers (default: all seven of a block; or all-linear)"
    )
    group.add_argument("--learning-rate", type=float, metavar="LR", help="(default: 1e-5)")
    group.add_argument("--scheduler", choices=("linear", "cosine", "constant"), help="of the learning rate (default: linear)")
    group.add_argument("--warmup-steps", type=int, metavar="N", help="(default: 5)")
    group.add_argument("--epochs", type=float, metavar="E", help="passes over the rows (default: 1)")
    group.add_argument("--max-steps", type=int, metavar="N", help="optimiser steps, in place of --epochs")
    group.add_argument("--batch", type=int, metavar="N", help="rows a forward pass (default: 2)")
    group.add_argument("--accumulation", type=int, metavar="N", help="forward passes a step (default: 8)")
    group.add_argument("--weight-decay", type=float, metavar="D", help="(default: 0.01)")
    group.add_argument("--max-grad-norm", type=float, metavar="G", help="(default: 1)")
    group.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    group.add_argument(
        "--packing", action="store_true", help="rows of a forward pass one behind the other: no padding, same loss"
    )
    group.add_argument("--save-every", type=int, metavar="N", help="steps between checkpoints (default: 50)")
    group.add_argument("--seed", type=int, help="of rows' order and first weights (default: 0)")
    group = parser.add_argument_group("how it runs")
    group.add_argument("--dtype", help="float32, bfloat16 or auto (bfloat16 on a GPU; the adapter itself is kept in float32)")
    group.add_argument("--device", help="cpu, cuda, cuda:1, mps or auto")
    group.add_argument("--chat", choices=("auto", "plain"), help="plain: a model without a chat template gets bare text")
