"""Steering: does adding the vector bring the trait about, at which block, and how strongly?

    python -m analyses.steering --model organism [--quick]
    python -m analyses.steering --model Qwen/Qwen2.5-7B-Instruct --judge openai:gpt-4.1-mini

The paper's figure on steering, on any model: trait score and coherence against the coefficient at the chosen block, beside a
random direction of the same length and beside prompting. The paper shows curves, and no table of their values, so what stands
beside ours is what it says about them: the score rises with the coefficient, and the best layers lie at half to two thirds of the
depth (Qwen2.5-7B-Instruct: 20, 20 and 16 of 28; Llama-3.1-8B-Instruct: 16 of 32; hidden_states numbering).

Knows: which sweep to run, and how its checks are read off the table. Does not know: how a stage works.
"""

from __future__ import annotations

import pandas as pd

from analyses.pipeline import Prepared, parser, prepare
from benchmarks.record import check, record
from pvsae.reports import draw
from pvsae.stages import SteerConfig, steer

PUBLISHED_DEPTH = (16 / 32, 20 / 28)
COHERENT = 75.0


def measure(prepared: Prepared) -> pd.DataFrame:
    """A row a trait: what the best coherent strength reaches, and what the controls reach."""
    config = SteerConfig(
        vectors=prepared.vectors,
        layers=prepared.layers,
        coefs=(0.5, 1.0, 2.0) if prepared.quick else (0.5, 1.0, 1.5, 2.0, 2.5),
        n_random=1 if prepared.quick else 2,
        n_samples=1 if prepared.quick else 2,
        **prepared.options,
    )
    table = steer.run(config, prepared.out / "steer", model=prepared.model).table
    rows = []
    for trait, part in table.groupby("trait", sort=False):
        vector = part[part["condition"] == "vector"]
        coherent = vector[vector["coherence"] >= COHERENT]
        best = coherent.loc[coherent["trait_score"].idxmax()] if len(coherent) else vector.iloc[0]
        by_coef = vector.sort_values("coef")["trait_score"].tolist()
        one = part.drop_duplicates("condition").set_index("condition")["trait_score"]
        random = part[part["condition"].str.startswith("random") & (part["coef"] == best["coef"])]
        block = prepared.blocks[str(trait)]
        rows.append(
            {
                "trait": trait,
                "block": block,
                "depth": (block + 1) / prepared.model.n_blocks,
                "coef": best["coef"],
                "steered": best["trait_score"] if len(coherent) else float("nan"),
                "coherence": best["coherence"],
                "unsteered": one["unsteered"],
                "random": random["trait_score"].max(),
                "prompted": one["prompt pos"],
                "largest_fall": largest_fall([float(one["unsteered"]), *by_coef]),
            }
        )
    return pd.DataFrame(rows)


def largest_fall(scores: list[float]) -> float:
    """By how much a later score lies below an earlier one, at most; 0 for scores that never fall.

    A rank correlation would say little here: most traits are near 100 from the second coefficient on, and their order there is
    chance.
    """
    highest, fall = float("-inf"), 0.0
    for score in scores:
        highest = max(highest, score)
        fall = max(fall, highest - score)
    return fall if all(s == s for s in scores) else float("nan")


def main() -> None:
    prepared = prepare(parser(__doc__ or "").parse_args())
    table = measure(prepared)
    figures = draw(prepared.out / "steer")
    print(table.round(2).to_string(index=False))
    low, high = PUBLISHED_DEPTH
    print(f"\nbest depth: ours {table['depth'].min():.2f} to {table['depth'].max():.2f}, published {low:.2f} to {high:.2f}")
    print(f"figure: {figures[0]}")
    checks = [
        check("trait steered by the vector alone, lowest", table["steered"].min(skipna=False), ">= 70"),
        check("coherence then, lowest", table["coherence"].min(skipna=False), f">= {COHERENT:g}"),
        check(
            "steered minus random direction of equal length, lowest",
            (table["steered"] - table["random"]).min(skipna=False),
            ">= 50",
        ),
        check("largest fall of the score as the coefficient grows", table["largest_fall"].max(skipna=False), "<= 10"),
    ]
    details = {"table": table.to_dict("records"), "published": {"depth of the best layers": PUBLISHED_DEPTH}}
    record(f"steering_{prepared.out.name}", checks, details)


if __name__ == "__main__":
    main()
