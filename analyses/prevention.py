"""Prevention: can a model be kept from a trait while it is trained on data that teach the trait, and what does that cost?

    python -m analyses.prevention [--quick]                                                  the embedded model, three traits
    python -m analyses.prevention --dictionary runs/sae/block-3_width-1024_k-8               with single features as well
    python -m analyses.prevention --model Qwen/Qwen2.5-7B-Instruct --judge openai:gpt-4.1-mini --traits evil \\
        --teaching evil=dataset/evil/misaligned_2.jsonl --rows 4800 --steps 300 --lr 1e-5 --rank 32 --batch 2 --coefs 1 3 5 \\
        --post-hoc 1 1.5 2 2.5 --curves                                                      (no curves)

The model is finetuned on data that show a trait: plainly; with the vector added at one block, its increments at every block, or
the one feature nearest to it (preventative steering); with its direction taken out (CAFT); with a penalty on moving along it; and
under system prompts for the trait (inoculation) or against it. Of what comes out: trait score, coherence, capability, fit to the
data, shift along the vector. Beside them the model before, and plain finetuning steered against the vector afterwards (post-hoc).
Strengths are multiples of the vector; a feature is added at the vector's length. Published trait scores stand beside ours.

Then the same at other learning rates and numbers of steps: how much training there is decides what is being compared.

The preventative setting that the checks are about is chosen on the questions that the vectors were made from, and reported on
the evaluation questions. Every finetune and every set of answers is kept: the same command goes on where it was stopped.

Knows: which ways to train are compared, and the order of the work.
Does not know: how one is made and measured (treated.py), how the table is read (prevention_table.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from analyses.feature_truth import TRAITS
from analyses.pipeline import by_trait, parser_of_given, prepare_given
from analyses.prevention_table import (
    CAFT,
    CAFT_EVERY,
    DISCOURAGED,
    EVERY,
    FEATURE,
    INOCULATED,
    ONE,
    POST_HOC,
    PUBLISHED,
    REGULARISED,
    beside_published,
    checks_of,
    compared,
    draw,
    draw_curves,
)
from analyses.results import write
from analyses.treated import BASE, PLAIN, Amount, Asked, Bench, Way, measured
from analyses.tuned import A_STEP, Setting
from benchmarks.record import record
from pvsae.errors import UserError
from pvsae.saes.dictionary import SAE
from pvsae.saes.folders import load as load_sae

SHOWN = ["method", "strength", "trait_score", "coherence", "capability", "held_out_loss", "train_loss", "shift"]


@dataclass(frozen=True)
class Size:
    """How much is trained and asked.

    Attributes:
        coefs: of preventative steering, at one block and at every block; features: the same of single features.
        post_hoc: strengths against the vector, in answering. weights: of the penalty.
        steps, learning_rate: of the comparison.
        curve_steps, curve_rates, curve_coefs: of the curves, on all pairs of the first two.
        asked: answers, and questions of the capability test.
        held_out: rows for the fit.
    """

    coefs: tuple[float, ...]
    features: tuple[float, ...]
    post_hoc: tuple[float, ...]
    weights: tuple[float, ...]
    steps: int
    learning_rate: float
    curve_steps: tuple[int, ...]
    curve_rates: tuple[float, ...]
    curve_coefs: tuple[float, ...]
    asked: Asked
    held_out: int


FULL = Size(
    coefs=(0.5, 1.0, 2.0), features=(1.0, 2.0), post_hoc=(1.0, 2.0, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0), weights=(0.1, 1.0, 10.0),
    steps=40, learning_rate=1e-3, curve_steps=(20, 40, 100), curve_rates=(3e-4, 1e-3, 5e-3), curve_coefs=(1.0, 2.0),
    asked=Asked(samples=3, choice=2, questions=None, able=True, limit=None), held_out=160,
)  # fmt: skip
QUICK = Size(
    coefs=(1.0, 2.0), features=(1.0,), post_hoc=(2.0, 4.0), weights=(0.1,), steps=20, learning_rate=1e-3, curve_steps=(20,),
    curve_rates=(1e-3, 5e-3), curve_coefs=(2.0,), asked=Asked(1, 1, 8, able=True, limit=40), held_out=32,
)  # fmt: skip


def ways(bench: Bench, size: Size, sae: SAE | None) -> list[Way]:
    """Everything that is compared at one amount of training, the model before and plain finetuning first."""
    given = {"vectors": bench.prepared.vectors}
    at, everywhere = {**given, "blocks": (bench.block,)}, {**given, "multi_layer": True}

    def way(method: str, strength: float, **options: Any) -> Way:
        return Way(method, strength, tuple(options.items()))

    none = float("nan")
    found = [Way(BASE), Way(PLAIN), *(Way(POST_HOC, c, afterwards=-c) for c in size.post_hoc)]
    found += [way(ONE, c, treatment="steer", coef=c, **at) for c in size.coefs]
    found += [way(EVERY, c, treatment="steer", coef=c, **everywhere) for c in size.coefs]
    if sae is not None:
        feature, length = nearest(bench, sae)
        options = {"treatment": "steer", "features": (feature,), "unit": "raw"}
        found += [way(FEATURE, c, coef=c * length, **options) for c in size.features]
    found += [way(CAFT, none, treatment="ablate", **at), way(CAFT_EVERY, none, treatment="ablate", **everywhere)]
    found += [way(REGULARISED, w, treatment="regularise", weight=w, **at) for w in size.weights]
    return [*found, way(INOCULATED, none, treatment="inoculate"), way(DISCOURAGED, none, treatment="discourage")]


def nearest(bench: Bench, sae: SAE) -> tuple[str, float]:
    """The feature of highest cosine with the vector, as SAE:INDEX, and how active it must be to be as long as the vector."""
    v = bench.vector.direction(bench.block)
    index = int(sae.cosines(v.values).argmax())
    return f"{sae.ref}:{index}", v.norm / float(sae.W_dec[index].norm())


def curve_ways(bench: Bench, size: Size) -> list[Way]:
    """What is trained at every learning rate and number of steps."""
    return [w for w in ways(bench, replace(size, coefs=size.curve_coefs), None) if w.method in (PLAIN, ONE)]


def comparison(bench: Bench, size: Size, sae: SAE | None) -> tuple[pd.DataFrame, dict[str, Any]]:
    """All ways at one amount of training, and how the chosen one compares."""
    rows = []
    for way in tqdm(ways(bench, size, sae), desc=bench.trait, unit="setting"):
        rows.append(measured(bench, way, Amount(size.steps, size.learning_rate), size.asked))
    by_question = {(row["method"], row["strength"]): row.pop("by_question") for row in rows}
    table = pd.DataFrame(rows)
    return table, compared(table, by_question)


def curves(bench: Bench, size: Size) -> pd.DataFrame:
    """Plain and preventative finetunes at every learning rate and number of steps."""
    amounts = [Amount(steps, rate) for rate in size.curve_rates for steps in size.curve_steps]
    asked = replace(size.asked, samples=1, choice=0, able=False)
    rows = [
        measured(bench, way, amount, asked, "measured-curves")
        for amount in tqdm(amounts, desc=f"{bench.trait}, curves", unit="setting")
        for way in curve_ways(bench, size)
    ]
    return pd.DataFrame(rows).drop(columns="by_question")


# -------------------------------------------------------------------------------------------------------------------- the run
def teaching(words: Sequence[str], traits: Sequence[str]) -> dict[str, str]:
    """trait -> data that teach it, from words TRAIT=DATA; others are the embedded models' own. UserError as `by_trait`."""
    given = by_trait("--teaching", words, traits)
    return {trait: given.get(trait, f"organism-data:{trait}/misaligned_2") for trait in traits}


def size_of(args: argparse.Namespace) -> Size:
    """The size with what the command line changes of it."""
    size = QUICK if args.quick else FULL
    names = ("coefs", "features", "post_hoc", "weights", "curve_steps", "curve_rates", "curve_coefs")
    given: dict[str, Any] = {name: tuple(getattr(args, name)) for name in names if getattr(args, name) is not None}
    given |= {name: value for name in ("steps", "learning_rate") if (value := getattr(args, name)) is not None}
    asked = {name: value for name in ("samples", "limit") if (value := getattr(args, name)) is not None}
    return replace(size, asked=replace(size.asked, **asked), **given)


def options() -> argparse.ArgumentParser:
    """The command line."""
    made = parser_of_given(__doc__ or "")
    made.add_argument("--dictionary", help="a folder, or RELEASE/ID, whose nearest features are used in the vectors' place too")
    made.add_argument("--other-model", action="store_true", help="take a dictionary that says it is of another model")
    made.add_argument(
        "--teaching", nargs="+", default=[], metavar="TRAIT=DATA",
        help="files, datasets or corpora that teach a trait (default: the embedded models' own)",
    )  # fmt: skip
    made.add_argument("--rows", type=int, default=640, help="to train on; those behind them measure the fit (default: 640)")
    made.add_argument("--rank", type=int, default=16, help="of the adapters (default: 16)")
    made.add_argument("--batch", type=int, default=A_STEP, help=f"rows a forward pass, of {A_STEP} a step (default: {A_STEP})")
    made.add_argument("--steps", type=int, help=f"of the comparison (default: {FULL.steps})")
    made.add_argument("--lr", dest="learning_rate", type=float, help=f"of the comparison (default: {FULL.learning_rate:g})")
    made.add_argument("--coefs", nargs="+", type=float, help="strengths of preventative steering")
    made.add_argument("--features", nargs="+", type=float, help="strengths of single features")
    made.add_argument("--post-hoc", nargs="+", type=float, help="strengths of steering against the vector afterwards")
    made.add_argument("--weights", nargs="+", type=float, help="of projection regularisation")
    made.add_argument("--curves", nargs="*", metavar="TRAIT", help="traits of the curves (default: all; none given: none)")
    made.add_argument("--curve-steps", nargs="+", type=int, metavar="N", help="their steps")
    made.add_argument("--curve-rates", nargs="+", type=float, metavar="LR", help="their learning rates")
    made.add_argument("--curve-coefs", nargs="+", type=float, metavar="C", help="their strengths of preventative steering")
    made.add_argument("--samples", type=int, help=f"answers to each evaluation question (default: {FULL.asked.samples})")
    made.add_argument("--tasks", nargs="+", default=[], help="of lm-evaluation-harness (default: the model's own, else mmlu)")
    made.add_argument("--limit", type=int, help="questions of a task (default: all)")
    return made


def benches(args: argparse.Namespace, size: Size) -> list[Bench]:
    """What each trait's finetunes share; vectors are extracted where they are not given.

    Raises:
        UserError: options that do not fit, a block that does not exist.
    """
    traits = args.traits or list(TRAITS)
    data = teaching(args.teaching, traits)
    setting = Setting(args.rows, size.learning_rate, args.rank, args.batch)
    prepared = prepare_given(args, traits)
    return [
        Bench(prepared, trait, data[trait], setting, size.held_out, tuple(args.tasks), prepared.out / "prevention" / trait)
        for trait in traits
    ]


def main() -> None:
    args = options().parse_args()
    size = size_of(args)
    all_of_them = benches(args, size)
    model = all_of_them[0].model
    sae = load_sae(args.dictionary).check_model(model).check_trained_on(model.name, args.other_model) if args.dictionary else None
    if sae is not None and sae.info.block != all_of_them[0].block:
        raise UserError(f"{sae.ref} is of block {sae.info.block}", f"one of block {all_of_them[0].block}", "--block")
    folder = all_of_them[0].out.parent
    parts, picked = zip(*(comparison(bench, size, sae) for bench in all_of_them), strict=True)
    table, best = pd.concat(parts, ignore_index=True), pd.DataFrame(picked)
    published = beside_published(table, best)
    write(folder, prevention=table, comparison=best, published=published)
    figure = draw(table, best, folder / "prevention.png")
    for trait, part in table.groupby("trait", sort=False):
        print(f"\n{trait}, {size.steps} steps at {size.learning_rate:g}\n{part[SHOWN].round(3).to_string(index=False)}")
    print(f"\nchosen on other questions, reported here\n{best.round(3).to_string(index=False)}")
    print(f"\nbeside an independent replication on Qwen2.5-7B-Instruct\n{published.round(1).to_string(index=False)}")
    print(f"\nfigure: {figure}\ntables: {folder}/*.csv", flush=True)
    details = {
        "setting": {"steps": size.steps, "learning_rate": size.learning_rate, "rows": args.rows, "rank": args.rank},
        "blocks": {bench.trait: bench.block for bench in all_of_them}, "published": PUBLISHED,
        "table": table.to_dict("records"), "comparison": best.to_dict("records"),
    }  # fmt: skip
    shown = [bench for bench in all_of_them if args.curves is None or bench.trait in args.curves]
    if shown:
        grown = pd.concat([curves(bench, size) for bench in shown], ignore_index=True)
        write(folder, curves=grown)
        wide = grown.assign(way=grown["method"] + " " + grown["strength"].map(lambda s: "" if s != s else f"{s:g}"))
        grid = wide.pivot(index=["trait", "way"], columns=["learning_rate", "steps"], values="trait_score")
        print(f"\ntrait score by learning rate and steps\n{grid.round(1).to_string()}")
        print(f"\nfigure: {draw_curves(grown, folder / 'prevention_curves.png')}")
        details["curves"] = grown.to_dict("records")
    record(f"prevention_{folder.parent.name}", checks_of(best), details)


if __name__ == "__main__":
    main()
