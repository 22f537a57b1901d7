"""The answers that persona vectors came from, in pairs, for analyses that read them again.

Knows: where the stage `extract` keeps rollouts and vectors. Does not know: dictionaries, or what is done with a pair.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pvsae.models import ChatModel, Rendered
from pvsae.stages import ExtractConfig, extract
from pvsae.vectors import PersonaVectors, Rollouts
from pvsae.vectors.extraction import filter_pairs, render_rows


@dataclass(frozen=True)
class Pairs:
    """One trait's vectors and the pairs of answers that they are the mean difference of.

    Attributes:
        vectors: as extracted.
        sides: answers that show the trait, and their partners that do not; row i pairs with row i.
        questions: which question each pair answers.
    """

    vectors: PersonaVectors
    sides: tuple[list[Rendered], list[Rendered]]
    questions: list[int]


def folder_of(args: argparse.Namespace) -> Path:
    """The folder of an analysis' run folders: the one given as --out, else one that all analyses of the model share."""
    name = args.model.strip("/").split("/")[-1]
    return args.out or Path("runs") / f"analysis-{name}{'-quick' if args.quick else ''}"


def vectors_of(args: argparse.Namespace, model: ChatModel) -> tuple[Path, Path]:
    """Where vectors and rollouts are: in the folder given as --vectors, else all traits are extracted, once for all analyses.

    Returns: (folder of the analysis' run folders, folder with a folder a trait).
    """
    out = folder_of(args)
    if args.vectors is not None:
        return out, args.vectors
    options: dict[str, Any] = {"model": args.model, "judge": args.judge, "judge_url": args.judge_url, "library": args.library}
    config = ExtractConfig(n_samples=1 if args.quick else 2, traits=(), batch_size=64, **options)
    extract.run(config, out / "extract", model=model)
    return out, out / "extract"


def pairs_of(folder: Path, model: ChatModel, trait: str) -> Pairs:
    """The pairs that count, from a trait's folder."""
    pos, neg = (Rollouts.load(folder / f"rollouts_{side}" / "rollouts.parquet") for side in ("pos", "neg"))
    kept = filter_pairs(pos, neg, trait).kept
    questions = [int(q) for q in pos.table["question_index"].iloc[list(kept)]]
    stored = PersonaVectors.load(folder / "vectors" / "vectors.safetensors")
    return Pairs(stored, (render_rows(model, pos, kept), render_rows(model, neg, kept)), questions)
