"""Monitoring: is the projection before the answer correlated with the trait of the answer?

    python -m analyses.monitoring --model organism [--quick]
    python -m analyses.monitoring --model Qwen/Qwen2.5-7B-Instruct --judge openai:gpt-4.1-mini --target 0.75

The paper's figure on monitoring, on any model: eight graded system prompts and many-shot prompts, Pearson r of the last prompt
token's projection with the trait score. Published: overall r 0.75 to 0.83 (three traits, Qwen2.5-7B-Instruct and
Llama-3.1-8B-Instruct); within one prompt type it is much weaker, and so both are shown here.

Knows: which prompts to run, and how its checks are read off the table. Does not know: how a stage works.
"""

from __future__ import annotations

import pandas as pd

from analyses.pipeline import Prepared, parser, prepare
from benchmarks.record import check, record
from pvsae.reports import draw
from pvsae.stages import MonitorConfig, monitor

PUBLISHED_R = (0.75, 0.83)


def measure(prepared: Prepared) -> pd.DataFrame:
    """A row a trait: overall and within-type r over system prompts, many-shot prompts and all, with the overall interval."""
    config = MonitorConfig(
        vectors=prepared.vectors,
        layers=prepared.layers,
        n_samples=1 if prepared.quick else 4,
        max_questions=10 if prepared.quick else None,
        **prepared.options,
    )
    found = monitor.run(config, prepared.out / "monitor", model=prepared.model).correlations
    rows = []
    for trait, part in found.groupby("trait", sort=False):
        r = part.set_index(["kind", "scope"])
        row: dict[str, object] = {"trait": trait, "block": prepared.blocks[str(trait)]}
        for kind in ("all", "system", "many-shot"):
            for scope in ("overall", "within"):
                row[f"{kind} {scope}"] = r["r"].get((kind, scope), float("nan"))
        row |= {"low": r.loc[("all", "overall"), "low"], "high": r.loc[("all", "overall"), "high"]}
        rows.append(row)
    return pd.DataFrame(rows)


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--target", type=float, default=0.85, help="overall r that every trait must reach (default: 0.85)")
    args = options.parse_args()
    prepared = prepare(args)
    table = measure(prepared)
    figures = draw(prepared.out / "monitor")
    print(table.round(2).to_string(index=False))
    ours, (low, high) = table["system overall"], PUBLISHED_R
    print(f"\noverall r over system prompts: ours {ours.min():.2f} to {ours.max():.2f}, published {low} to {high}")
    print(f"figures: {', '.join(map(str, figures))}")
    checks = [
        check("overall r over system prompts, lowest trait", ours.min(skipna=False), f">= {args.target:g}"),
        check(
            "overall r over system and many-shot prompts, lowest trait",
            table["all overall"].min(skipna=False),
            f">= {args.target:g}",
        ),
    ]
    record(
        f"monitoring_{prepared.out.name}", checks, {"table": table.to_dict("records"), "published": {"overall r": PUBLISHED_R}}
    )


if __name__ == "__main__":
    main()
