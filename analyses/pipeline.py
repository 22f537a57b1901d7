"""What the analyses of a model have in common: its options, and the vectors and blocks that they all start from.

Knows: the command line of an analysis, one folder a model in which extraction and choice of blocks are done once.
Does not know: what is analysed.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pvsae import load
from pvsae.models import ChatModel
from pvsae.reports import draw
from pvsae.stages import ExtractConfig, LayersConfig, extract, layers


@dataclass(frozen=True)
class Prepared:
    """A loaded model with its vectors: `options` go into every config, `out` is the folder of run folders."""

    model: ChatModel
    options: dict[str, Any]
    vectors: str
    layers: str
    blocks: dict[str, int]
    out: Path
    quick: bool


def parser(text: str) -> argparse.ArgumentParser:
    """Options of an analysis of one model."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="organism", help="a named model, a folder or a hub id (default: organism)")
    made.add_argument("--judge", help="openai:MODEL, local:MODEL or a judge's name (default: the model's own)")
    made.add_argument("--judge-url", help="base URL of an OpenAI-compatible server")
    made.add_argument("--library", help="folder of traits (default: the model's own, else the built-in one)")
    made.add_argument("--traits", nargs="+", default=[], help="(default: the whole library)")
    made.add_argument("--out", type=Path, help="folder of the run folders (default: runs/analysis-MODEL); a killed run goes on")
    made.add_argument("--quick", action="store_true", help="fewer answers")
    return made


def prepare(args: argparse.Namespace) -> Prepared:
    """Vectors of every trait and the block of each, made once for all analyses that use the same folder."""
    name = args.model.strip("/").split("/")[-1]
    out = args.out or Path("runs") / f"analysis-{name}{'-quick' if args.quick else ''}"
    options = {
        "model": args.model, "judge": args.judge, "judge_url": args.judge_url, "library": args.library,
        "traits": tuple(args.traits), "batch_size": 64,
    }  # fmt: skip
    model = load(args.model)
    vectors, chosen = str(out / "extract"), str(out / "layers")
    extract.run(ExtractConfig(n_samples=1 if args.quick else 2, **options), vectors, model=model)
    sweep = LayersConfig(vectors=vectors, coefs=(1.0, 2.0), max_questions=5 if args.quick else None, **options)
    blocks = layers.run(sweep, chosen, model=model).blocks
    draw(vectors)
    draw(chosen)
    return Prepared(model, options, vectors, chosen, blocks, out, args.quick)
