"""The causal test of a decomposition: what do its parts do when the model is steered with them?

Knows: which directions are compared (the vector, its sparse reconstruction, the residual, single latents, random latents and
directions), and how they become conditions of the stage `steer`, which generates, judges and keeps them.
Does not know: how latents were chosen, how anything is generated or judged.

A reconstruction is added as it is, so what it explains is part of what it does. Everything else is brought to the length of the
vector: a part that fails must not fail because it is short.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from pvsae.saes.pursuit import Atoms, Solution
from pvsae.stages.inputs import Setup
from pvsae.stages.steer import Condition, SteerConfig, Sweep, row_of

if TYPE_CHECKING:
    from pvsae.judges.base import Judge
    from pvsae.models import ChatModel
    from pvsae.runs import RunDir
    from pvsae.traits import TraitArtifacts
    from pvsae.vectors import PersonaVectors


@dataclass(frozen=True)
class Part:
    """One direction to steer with: its name in the table, and its values."""

    name: str
    values: Float[Tensor, " d_model"]


def parts_of(
    v: Float[Tensor, " d_model"],
    atoms: Atoms,
    solution: Solution,
    latents: Sequence[tuple[int, float]],
    *,
    alive: Sequence[int],
    n_random: int,
    seed: int,
) -> list[Part]:
    """The vector and its parts, and the controls.

    Args:
        solution: the sparse reconstruction.
        latents: (index, cosine) of those to steer with alone; with a negative cosine, against their row.
        alive: latents that random ones are drawn from, whose rows have a length.
        n_random: random latents, and random directions.
    """
    v = v.double().cpu()
    length = v.norm()

    def as_long(x: Tensor) -> Tensor:
        return x * (length / x.norm().clamp(min=1e-30))

    weights = torch.tensor(solution.weights, dtype=torch.float64)
    reconstruction = weights @ atoms.unit(solution.latents) if len(weights) else torch.zeros_like(v)
    parts = [Part("vector", v), Part(f"reconstruction {len(weights)}", reconstruction)]
    residual = v - reconstruction
    if residual.norm() > 1e-6 * length:
        parts.append(Part("residual", as_long(residual)))
    units = atoms.unit([latent for latent, _ in latents])
    for (latent, cosine), unit in zip(latents, units, strict=True):
        parts.append(Part(f"latent {latent}", as_long(math.copysign(1.0, cosine) * unit)))
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/causal".encode()))
    used = {latent for latent, _ in latents} | set(solution.latents)
    pool = [latent for latent in alive if latent not in used and float(atoms.norms[latent]) > 0]
    drawn = [pool[i] for i in torch.randperm(len(pool), generator=generator)[:n_random].tolist()]
    parts += [Part(f"random latent {latent}", as_long(unit)) for latent, unit in zip(drawn, atoms.unit(drawn), strict=True)]
    for k in range(n_random):
        parts.append(Part(f"random direction {k}", as_long(torch.randn(len(v), generator=generator).double())))
    return [Part(part.name, part.values.float()) for part in parts]


def conditions(parts: Sequence[Part], block: int, n_blocks: int, coefs: Sequence[float]) -> Iterator[Condition]:
    """Unsteered answers, then every part at every strength."""
    yield Condition("unsteered", "none")
    for part in parts:
        matrix = torch.zeros(n_blocks, len(part.values))
        matrix[block] = part.values
        for coef in coefs:
            yield Condition(part.name, "none", block, coef, matrix)


def steer_config(config: Any, trait: str, block: int) -> SteerConfig:
    """The options of the stage `steer` that a decomposition's options come to."""
    shared = {f.name: getattr(config, f.name) for f in fields(Setup)}
    return SteerConfig(
        **{**shared, "traits": (trait,)},
        vectors=config.vectors,
        blocks=(block,),
        coefs=config.coefs,
        positions=config.positions,
        statistic=config.statistic,
        max_questions=config.max_questions,
        n_samples=config.n_samples,
    )


def steer_with(
    config: Any,
    folder: RunDir,
    model: ChatModel,
    judge: Judge,
    artifacts: TraitArtifacts,
    vectors: PersonaVectors,
    block: int,
    parts: Sequence[Part],
) -> pd.DataFrame:
    """A row a condition, as the stage `steer` has it, with `length` of what was added at coefficient 1 and `effect`: the share of
    what the whole vector changes in the trait score at that strength. Each condition is a step of the run."""
    steering = steer_config(config, artifacts.name, block)
    sweep = Sweep(steering, folder, model, judge, artifacts, vectors)
    lengths = {part.name: float(part.values.norm()) for part in parts}
    rows = []
    for condition in conditions(parts, block, model.n_blocks, config.coefs):
        rollouts, raw = sweep.answers(condition)
        row = row_of(steering, artifacts.name, condition, raw, rollouts)
        rows.append({**row, "length": lengths.get(condition.name, 0.0)})
    return with_effects(pd.DataFrame(rows))


def with_effects(table: pd.DataFrame) -> pd.DataFrame:
    """The table with a column `effect`; NaN where the vector itself changes the trait score by less than one point."""
    plain = float(table.loc[table["condition"] == "unsteered", "trait_score"].iloc[0])
    whole = table[table["condition"] == "vector"].set_index("coef")["trait_score"] - plain
    effects = []
    for row in table.itertuples():
        moved = float(whole.get(row.coef, math.nan))
        effects.append((row.trait_score - plain) / moved if abs(moved) >= 1 and row.condition != "unsteered" else math.nan)
    return table.assign(effect=effects)
