"""What the analyses of a model have in common: its options, and the vectors and blocks that they all start from.

Knows: the command line of an analysis, one folder a model in which extraction and choice of blocks are done once.
Does not know: what is analysed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analyses.pairs import folder_of, vectors_of
from pvsae import load
from pvsae.errors import UserError
from pvsae.models import ChatModel
from pvsae.reports import draw
from pvsae.stages import ExtractConfig, LayersConfig, extract, layers
from pvsae.stages.inputs import check_blocks, chosen_block


@dataclass(frozen=True)
class Prepared:
    """A loaded model with its vectors: `options` go into every config, `out` is the folder of run folders, `layers` that of the
    choice of blocks ("" where none was made)."""

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


def parser_of_given(text: str) -> argparse.ArgumentParser:
    """The same with `--vectors` and `--block`, for `prepare_given`."""
    made = parser(text)
    made.add_argument("--vectors", type=Path, help="folder of `pvsae extract` (default: extract them)")
    made.add_argument("--block", type=int, help="where vectors are read and added (default: the model's own block)")
    return made


def prepare(args: argparse.Namespace) -> Prepared:
    """Vectors of every trait and the block of each, made once for all analyses that use the same folder."""
    out, options = folder_of(args), _options(args, args.traits)
    model = load(args.model)
    vectors, chosen = str(out / "extract"), str(out / "layers")
    extract.run(ExtractConfig(n_samples=1 if args.quick else 2, **options), vectors, model=model)
    sweep = LayersConfig(vectors=vectors, coefs=(1.0, 2.0), max_questions=5 if args.quick else None, **options)
    blocks = layers.run(sweep, chosen, model=model).blocks
    draw(vectors)
    draw(chosen)
    return Prepared(model, options, vectors, chosen, blocks, out, args.quick)


def prepare_given(args: argparse.Namespace, traits: Sequence[str]) -> Prepared:
    """Vectors as they are given (else extracted), at the given block (else the model's own); nothing is swept.

    Raises: UserError for a block that does not exist.
    """
    model = load(args.model)
    blocks = check_blocks([] if args.block is None else [args.block], model)
    out, stored = vectors_of(args, model)
    where = {trait: blocks[0] if blocks else chosen_block(trait, model, None) for trait in traits}
    return Prepared(model, _options(args, traits), str(stored), "", where, out, args.quick)


def by_trait(option: str, words: Sequence[str], traits: Sequence[str]) -> dict[str, str]:
    """trait -> data, of an option's words TRAIT=DATA. UserError for a word of another shape, or a trait that is not asked for."""
    given = dict(word.split("=", 1) for word in words if "=" in word)
    if len(given) < len(words) or not set(given) <= set(traits):
        raise UserError(f"{option} {' '.join(words)}", f"TRAIT=DATA, with a trait of {', '.join(traits)}")
    return given


def _options(args: argparse.Namespace, traits: Sequence[str]) -> dict[str, Any]:
    return {
        "model": args.model, "judge": args.judge, "judge_url": args.judge_url, "library": args.library, "traits": tuple(traits),
        "batch_size": 64,
    }  # fmt: skip
