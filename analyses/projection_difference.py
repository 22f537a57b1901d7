"""Projection difference: does a data set say, before training, which trait will come of it?

    python -m analyses.projection_difference [--model organism] [--quick]
    python -m analyses.projection_difference --model Qwen/Qwen2.5-7B-Instruct --judge openai:gpt-4.1-mini \
        --rows 0 --lr 1e-5 --rank 32 --batch 2 --families 'dataset/*/*.jsonl'

dP of each data set along every persona vector, against what the trait scores after training on it (paper, section on data
screening); the base is the untrained model's own answers to the same prompts. Published: r 0.88 to 0.95. The finetunes and their
scores are those of `analyses.finetuning_shift`: run folders are shared, and what is finished is read back.

Beside r stand: other traits' vectors at the same block, random directions (screened like vectors, in the same pass), the rank
correlation, r without the data sets made to show the trait, r along the vector's specific part (foretelling.py), and r of the
approximation that generates nothing.

On `organism`, dP sees the data made for a trait and nothing of what narrow data bring about: a false fact lies where the true one
does. Along the plain vectors r is low for another reason too: data made for one trait lie along every trait's vector.

Knows: what is screened, the checks. Does not know: how a projection difference is made (the stage `screen`), how finetunes are
made and scored (severities.py, tuned.py), correlations (foretelling.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from analyses import foretelling, severities
from analyses.foretelling import SPECIFIC
from analyses.pipeline import Prepared, parser, prepare
from analyses.results import records, write
from analyses.severities import TrainingSet
from benchmarks.record import check, record
from pvsae.stages import ScreenConfig, screen
from pvsae.stages.inputs import read_vectors
from pvsae.vectors import PersonaVectors

PUBLISHED = {"r": (0.88, 0.95)}
RANDOM = "random"
STATISTIC = "response_avg_diff"


def random_vectors(prepared: Prepared, n: int) -> list[str]:
    """Files with random directions, one for each of `n` names, the same at every block."""
    files = []
    for k in range(n):
        path = prepared.out / "projection_difference" / "random" / f"{RANDOM}-{k:03d}.safetensors"
        if not path.is_file():
            one = torch.randn(prepared.model.d_model, generator=torch.Generator().manual_seed(k))
            rows = one.expand(prepared.model.n_blocks, -1).contiguous()
            PersonaVectors(path.stem, {STATISTIC: rows}, {"random seed": k}).save(path)
        files.append(str(path))
    return files


def specific_parts(prepared: Prepared, traits: Sequence[str]) -> list[str]:
    """Files with the part of each trait's vector that no other trait's shares."""
    vectors = {name: read_vectors(prepared.vectors, name, STATISTIC).of(STATISTIC) for name in prepared.blocks}
    files = []
    for trait in traits:
        path = prepared.out / "projection_difference" / "specific" / f"{SPECIFIC}-{trait}.safetensors"
        PersonaVectors(path.stem, {STATISTIC: foretelling.specific_part(vectors, trait)}).save(path)
        files.append(str(path))
    return files


def screened(
    prepared: Prepared,
    data: Sequence[TrainingSet],
    rows: int | None,
    traits: Sequence[str],
    blocks: Sequence[int],
    n_random: int,
    name: str,
) -> pd.DataFrame:
    """A row a data set, vector (random ones too) and block: dp, dp_prompt_last and what else the stage `screen` finds.

    Args:
        rows: only the first so many of each data set.
        name: of the run folder; base answers are shared by all.
    """
    options = {name: value for name, value in prepared.options.items() if name != "traits"}
    config = ScreenConfig(
        data=tuple(one.source(rows) for one in data),
        vectors=(prepared.vectors, *specific_parts(prepared, traits), *random_vectors(prepared, n_random)),
        blocks=tuple(blocks),
        answers=str(prepared.out / "projection_difference" / "answers"),
        **options,
    )
    table = screen.run(config, prepared.out / "projection_difference" / name, model=prepared.model).table
    names = dict(zip(dict.fromkeys(table["data"]), (one.name for one in data), strict=True))
    return table.assign(data=table["data"].map(names))


def beside_scores(
    table: pd.DataFrame, scores: pd.DataFrame, traits: Sequence[str], blocks: dict[str, int], column: str = "dp"
) -> tuple[pd.DataFrame, foretelling.Nulls]:
    """One column of a screening as values beside the scores, at each trait's block; random directions apart from vectors."""
    parts, nulls = [], {}
    for trait in traits:
        own = scores[scores["trait"] == trait]
        wide = table[table["block"] == blocks[trait]].pivot(index="data", columns="vector", values=column).loc[own["data"]]
        random = [name for name in wide.columns if str(name).startswith(f"{RANDOM}-")]
        nulls[trait] = wide[random].to_numpy(dtype=np.float64).T
        wide = wide.rename(columns={f"{SPECIFIC}-{trait}": SPECIFIC})
        for vector in (name for name in wide.columns.drop(random) if not str(name).startswith(f"{SPECIFIC}-")):
            part = own[["data", "family", "severity", "made_for", "trait", "score", "before", "rise", "coherence"]].copy()
            part.insert(5, "vector", vector)
            part.insert(6, "block", blocks[trait])
            part.insert(7, "value", wide[vector].to_numpy())
            parts.append(part)
    return pd.concat(parts, ignore_index=True), nulls


def checks_of(table: pd.DataFrame) -> list[dict[str, object]]:
    """r of every trait, and that random directions do not reach it."""
    checks = []
    for row in table.to_dict("records"):
        checks.append(check(f"{row['trait']}: r of dP and score", row["r"], ">= 0.85"))
        checks.append(check(f"{row['trait']}: share of random directions that reach it", row["random_reaching"], "<= 0.05"))
        checks.append(check(f"{row['trait']}: r of dP along the specific part and score", row["r_specific"], ">= 0.85"))
    return checks


def main() -> None:
    made = severities.options(parser(__doc__ or ""))
    made.add_argument("--null", type=int, default=40, help="random directions, screened with the vectors (default: 40)")
    made.add_argument(
        "--screened", type=int, default=200, help="rows of each data set that are screened; 0 for those trained on (default: 200)"
    )
    made.add_argument("--by-block", action="store_true", help="r at every block as well, by another pass over the data")
    args = made.parse_args()
    prepared = prepare(args)
    setting, data = severities.setting_of(args), severities.training_sets(args, list(prepared.blocks))
    traits = list(dict.fromkeys(one.trait for one in data if one.trait))
    most = args.screened or setting.rows
    blocks = sorted({prepared.blocks[trait] for trait in traits})
    found = screened(prepared, data, most, traits, blocks, args.null, "screen")
    before, after = severities.every(prepared, data, setting)
    scores = severities.scores_table(before, after, data)
    values, random = beside_scores(found, scores, traits, prepared.blocks)
    cheap, cheap_random = beside_scores(found, scores, traits, prepared.blocks, "dp_prompt_last")
    correlations, nulls = foretelling.correlations(values), foretelling.null_rs(values, random)
    table = foretelling.summary(correlations, nulls)
    approximation = foretelling.summary(foretelling.correlations(cheap), foretelling.null_rs(cheap, cheap_random))
    table["r_prompt_last"], table["r_prompt_last_specific"] = approximation["r"], approximation["r_specific"]
    folder: Path = prepared.out / "projection_difference"
    write(folder, screened=found, values=values, correlations=correlations, summary=table)
    by_block = pd.DataFrame()
    if args.by_block:
        everywhere = screened(prepared, data, most, traits, range(prepared.model.n_blocks), 0, "screen-every-block")
        at = [beside_scores(everywhere, scores, traits, dict.fromkeys(traits, b))[0] for b in range(prepared.model.n_blocks)]
        by_block = foretelling.by_block(pd.concat(at, ignore_index=True))
        write(folder, by_block=by_block)
    figure = foretelling.draw(values, correlations, nulls, "dP", folder / "dp.png")
    own = values[values["trait"] == values["vector"]]
    print(own[["data", "trait", "value", "score"]].round(2).to_string(index=False))
    print(f"\n{table.round(3).to_string(index=False)}")
    if args.by_block:
        print(f"\nr by block\n{by_block.round(2).to_string(index=False)}")
    low, high = PUBLISHED["r"]
    print(f"\nr of dP and score: ours {table['r'].min():.2f} to {table['r'].max():.2f}, published {low} to {high}")
    print(f"\nfigure: {figure}\ntables: {folder}/*.csv")
    details = {
        "setting": setting.name, "rows screened": most, "blocks": prepared.blocks, "published": PUBLISHED,
        "summary": records(table), "correlations": records(correlations),
        "values": records(own), "by block": records(by_block),
    }  # fmt: skip
    record(f"projection_difference_{prepared.out.name}", checks_of(table), details)


if __name__ == "__main__":
    main()
