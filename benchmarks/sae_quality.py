"""What the trained dictionaries are worth: ours beside SAELens and dictionary_learning, on the same activations.

    python -m benchmarks.sae_quality [--quick] [--stories FOLDER]

Every trainer sees the same batches in the same order, the same number of tokens, width, k and learning-rate schedule, and counts
a latent as dead after the same silence; the rest is its own default. The activations are residuals of the organism on
conversations of its own language, and, where its folder is given, of a model that tells stories (stories260k) on its own stories.
On held-out tokens, with the batch's own top k: FVU (share of the variance that is not explained) and latents that fire on none of
them. Means over three seeds; what counts is ours against the better of the two.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import PEERS, Recipe
from benchmarks.record import check, record
from pvsae.errors import UserError
from pvsae.models import ChatModel, Rendered, Residual, Sampling, load

HELD_OUT = 16_384


def organism_rows(model: ChatModel, n: int) -> list[Rendered]:
    """Conversations of the grammar that the organism learnt from."""
    from pvsae.organism.corpus import conversation

    rng = random.Random(0)
    rows = []
    for _ in range(n):
        made = conversation(rng)
        messages = [{"role": m["role"], "content": m["content"]} for m in made.messages]
        rows.append(model.chat.conversation(messages))
    return rows


def story_rows(model: ChatModel, n: int) -> list[Rendered]:
    """Stories that the model tells."""
    prompts = [model.chat.plain("") for _ in range(n)]
    told = model.generate(prompts, Sampling(max_new_tokens=250), batch_size=64, progress="stories")
    return [model.chat.with_answer_ids(p, g.ids) for p, g in zip(prompts, told, strict=True) if g.ids]


def activations(model: ChatModel, rows: list[Rendered], block: int) -> Tensor:
    """[tokens d_model] in random order, the first token of each row left out, scaled to a mean square norm of d_model."""
    found = model.capture(rows, [Residual(block, "all")], progress="activations")
    x = torch.cat([row[1:] for row in found[Residual(block, "all").key]])
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    return x * (model.d_model / x.pow(2).sum(1).mean()).sqrt()


def trained(peer: str, x: Tensor, recipe: Recipe) -> dict[str, float]:
    """FVU and dead latents on the held-out tokens after training on the others, over and over if there are too few."""
    held_out, tokens = x[:HELD_OUT], x[HELD_OUT:]
    order = torch.Generator().manual_seed(recipe.seed)
    trainee = PEERS[peer](recipe, tokens[: 4 * recipe.batch])
    left = torch.empty(0, dtype=torch.int64)
    for _ in range(recipe.steps):
        if len(left) < recipe.batch:
            left = torch.randperm(len(tokens), generator=order)
        trainee.step(tokens[left[: recipe.batch]])
        left = left[recipe.batch :]
    with torch.no_grad():
        parts = held_out.split(2048)
        acts = [trainee.encode(part) for part in parts]
        error = sum(float((trainee.decode(a) - part).pow(2).sum()) for a, part in zip(acts, parts, strict=True))
        silent = torch.stack([(a > 0).any(0) for a in acts]).any(0).logical_not()
        l0 = sum(float((a > 0).sum()) for a in acts) / len(held_out)
    return {"fvu": error / float((held_out - held_out.mean(0)).pow(2).sum()), "dead": float(silent.sum()), "l0": l0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, a tenth of the steps")
    parser.add_argument("--stories", type=Path, help="folder of a model that tells stories; left out if not given")
    options = parser.parse_args()
    steps, n_seeds = (300, 1) if options.quick else (1000, 3)
    organism = load("organism", dtype="float32", device="cpu")
    sets = {"organism": (activations(organism, organism_rows(organism, 1500), organism.n_blocks // 2), 1024, 16)}
    if options.stories is not None:
        stories = load(options.stories, dtype="float32", device="cpu", chat="plain")
        sets["stories260k"] = (activations(stories, story_rows(stories, 600), 3), 512, 16)
    checks, details = [], {}
    for name, (x, d_sae, k) in sets.items():
        found: dict[str, list[dict[str, float]]] = {peer: [] for peer in PEERS}
        for seed in range(n_seeds):
            schedule: dict[str, Any] = {"steps": steps, "warmup": steps // 20, "decay": steps // 5, "dead_after": 100_000}
            recipe = Recipe(x.shape[1], d_sae, k, batch=512, lr=1e-3, seed=seed, **schedule)
            for peer in PEERS:
                found[peer].append(trained(peer, x, recipe))
                print(name, seed, peer, found[peer][-1], flush=True)
        mean = {peer: {key: statistics.mean(r[key] for r in runs) for key in runs[0]} for peer, runs in found.items()}
        others = [mean[peer] for peer in PEERS if peer != "pvsae"]
        checks += [
            check(f"{name}.fvu_over_the_better", mean["pvsae"]["fvu"] / min(o["fvu"] for o in others), "<= 1.01"),
            check(f"{name}.dead_minus_the_fewest", mean["pvsae"]["dead"] - min(o["dead"] for o in others), "<= 0"),
        ]
        details[name] = {"tokens": len(x), "d_sae": d_sae, "k": k, "steps": steps, "mean": mean, "seeds": found}
    record("sae_quality", checks, details)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
