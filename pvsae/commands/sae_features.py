"""`pvsae sae features`: evidence for what single features of a dictionary stand for.

Knows: the options, and what is printed in the end. Does not know: how evidence is gathered (stages/sae_features.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pvsae.commands.configs import config_from

SHOWN = ["feature", "label", "detection", "fuzzing", "density", "max", "strongest_token", "promoted"]
EXAMPLES = (
    "  pvsae sae features runs/sae/block-3_width-1024_k-8                       20 live features at random, on its own text\n"
    "  pvsae sae features runs/sae/block-3_width-1024_k-8 --features 12 402 --tokens 200000\n"
    "  pvsae sae features runs/sae/block-3_width-1024_k-8 --features all --dry-run      memory that all of them take\n"
    "  pvsae sae features qwen2.5-7b-instruct-andyrdt/resid_post_layer_19_trainer_1 --features 12061 128289 14739 \\\n"
    "      --text my_texts.jsonl --tokens 10000000 --label-model gpt-4.1-mini --label-price 0.40 1.60 --max-cost 2\n"
    "  pvsae sae features DICTIONARY --label-model NAME --label-url http://localhost:8000/v1      labels by a local server"
)


def add_parser(kinds: Any, add: Callable[..., argparse.ArgumentParser], started: Callable[[Path], None], text: Any) -> None:
    """Adds the subcommand.

    Args:
        kinds: where it is added.
        add: makes a subcommand's parser.
        started: is told the run folder, for the message of an interruption.
        text: a table as text.
    """
    parser = add(
        kinds, "features", lambda args: _run(args, started, text),
        "what single features stand for: examples, tokens they promote, neighbours, labels with scores",
        EXAMPLES,
    )  # fmt: skip
    parser.add_argument("dictionary", help="folder (of SAELens or dictionary_learning), or RELEASE/ID")
    parser.add_argument("--features", nargs="+", metavar="N", help="numbers of features, or live:N, or all (default: live:20)")
    parser.add_argument("--out", help="run folder (default: runs/sae_features); an unfinished run there goes on")
    parser.add_argument("--dry-run", action="store_true", help="say how much memory and how many calls it takes, and stop")
    group = parser.add_argument_group("what is read")
    group.add_argument("--text", nargs="+", help="files or Hugging Face datasets (default: the dictionary's own text)")
    group.add_argument("--held-out", action="store_true", help="of its own text, the part that training never saw")
    group.add_argument("--tokens", type=int, metavar="N", help="tokens to read (default: 1000000)")
    group.add_argument("--context", type=int, metavar="N", help="tokens a row (default: the dictionary's)")
    group.add_argument("--model", help="a named model, a local folder or a hub id (default: the dictionary's)")
    group.add_argument("--adapter", help="folder or id of a PEFT adapter")
    group.add_argument("--other-model", action="store_true", help="take a model that is not the dictionary's, of its width")
    group.add_argument("--block", type=int, metavar="B", help="counted from 0, where the dictionary does not say it")
    group = parser.add_argument_group("what is kept")
    group.add_argument("--window", type=int, metavar="N", help="tokens of an example (default: 32)")
    group.add_argument("--top", type=int, metavar="N", help="examples of highest activation (default: 20)")
    group.add_argument("--samples", type=int, metavar="N", help="firings in the even sample (default: 100)")
    group.add_argument("--quiet", type=int, metavar="N", help="random passages for the scores of labels (default: 500)")
    group.add_argument("--n-quantiles", type=int, metavar="N", help="groups of the sample (default: 10)")
    group.add_argument("--promoted", type=int, metavar="N", help="promoted and demoted tokens (default: 10)")
    group.add_argument("--nearest", type=int, metavar="N", help="nearest features (default: 8)")
    group.add_argument("--page-features", type=int, metavar="N", help="most features on the page (default: 100)")
    group = parser.add_argument_group("labels (none without --label-model)")
    group.add_argument("--label-model", metavar="NAME", help="language model that writes labels and is asked about them")
    group.add_argument("--label-url", metavar="URL", help="base URL of its OpenAI-compatible server (default: OpenAI's own)")
    group.add_argument("--label-price", nargs=2, type=float, metavar=("IN", "OUT"), help="dollars per million tokens in and out")
    group.add_argument("--max-cost", type=float, metavar="USD", help="spend no more, over all starts (needs --label-price)")
    group.add_argument("--label-train", type=int, metavar="N", help="passages a label is made from (default: 40)")
    group.add_argument("--label-test", type=int, metavar="N", help="passages it is scored on (default: 50)")
    group = parser.add_argument_group("how it runs")
    group.add_argument("--seed", type=int, help="(default: 0)")
    group.add_argument("--dtype", help="float32, bfloat16, float16 or auto")
    group.add_argument("--device", help="cpu, cuda, cuda:1, mps or auto")
    group.add_argument("--chat", choices=("auto", "plain"), help="plain: a model without a chat template gets bare text")
    group.add_argument("--batch-tokens", type=int, metavar="N", help="tokens a forward pass (default: 8192)")
    group.add_argument("--checkpoint-every", type=float, metavar="S", help="seconds between checkpoints (default: 300)")


def _run(args: argparse.Namespace, started: Callable[[Path], None], text: Callable[[Any], str]) -> None:
    from pvsae.stages import sae_features

    config = config_from(sae_features.SaeFeaturesConfig, args)
    if getattr(args, "dry_run", False):
        print(sae_features.plan(config))
        return
    out = Path(getattr(args, "out", None) or "runs/sae_features")
    started(out)
    result = sae_features.run(config, out)
    from pvsae.reports import write_feature_page, write_report

    page = write_feature_page(out, most=config.page_features)
    write_report(out, title="pvsae sae features")
    shown = [c for c in SHOWN if c not in ("label", "detection", "fuzzing") or result.table["label"].any()]
    print(text(result.table[shown].head(60)))
    for note in result.summary["notes"]:
        print(f"note: {note}")
    print(f"\ntables and records: {out}\nfor Neuronpedia: {out / 'neuronpedia'}\nfeatures: {page}")
