"""How do the traits lie to each other: cosines of their vectors, in the residual stream and in the space of features.

    python -m analyses.vector_geometry [--model organism] [--quick]
    python -m analyses.vector_geometry --model FOLDER --dictionary RELEASE_OR_FOLDER

The paper's figure of trait-by-trait cosines, on any model, and beside it the same in a dictionary's features, twice: the
difference of encodings (mean activation on answers that show the trait, minus that on answers that do not), and the weights of
the non-negative pursuit of the vector on the decoder's rows. Vectors may share a direction that no feature stands for, and
features may be shared by vectors that are nearly orthogonal, so the three need not agree.

The dictionary says the block; without one the model's shipped config is trained (the embedded models have one).

Knows: which cosines to take. Does not know: how vectors are extracted, dictionaries trained or vectors pursued.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from analyses.pairs import pairs_of, vectors_of
from analyses.pipeline import parser
from analyses.results import save
from benchmarks.record import check, record
from pvsae import load
from pvsae.models import ChatModel
from pvsae.reports.figures import INK
from pvsae.runs import atomic_path
from pvsae.saes.config import load_config
from pvsae.saes.dictionary import SAE
from pvsae.saes.encodings import encode_pairs
from pvsae.saes.folders import load as load_sae
from pvsae.saes.pursuit import Atoms, pursue
from pvsae.stages import sae_train
from pvsae.stages.inputs import known_traits

ATOMS = 50
SPACES = ("residual stream", "difference of encodings", "pursuit")


def dictionary(given: str | None, config: str, model: ChatModel, out: Path, changes: Sequence[str] = ()) -> SAE:
    """The given one, or that of a config with some changes, trained where it is not there yet."""
    if given:
        return load_sae(given)
    (folder,) = sae_train.run(load_config(config, changes), out / "sae", model=model).folders.values()
    return load_sae(folder)


def representations(sae: SAE, model: ChatModel, stored: Path, traits: list[str]) -> dict[str, dict[str, Float[Tensor, " n"]]]:
    """Space -> trait -> what stands for the trait there."""
    assert sae.info.block is not None
    found: dict[str, dict[str, Tensor]] = {space: {} for space in SPACES}
    atoms = Atoms(sae.W_dec)
    for trait in traits:
        pairs = pairs_of(stored / trait, model, trait)
        v = pairs.vectors.of()[sae.info.block]
        found["residual stream"][trait] = v
        found["difference of encodings"][trait] = encode_pairs(
            model, sae, sae.info.block, pairs.sides, pairs.questions, progress=trait
        ).difference
        solved = pursue(atoms, v, ATOMS, nonnegative=True).at_most(ATOMS)
        weights = torch.zeros(sae.d_sae)
        weights[list(solved.latents)] = torch.tensor(solved.weights)
        found["pursuit"][trait] = weights
    return found


def cosines(by_trait: Mapping[str, Float[Tensor, " n"]]) -> pd.DataFrame:
    """Trait by trait; NaN where something has no length."""
    x = torch.stack(list(by_trait.values())).double()
    norms = x.norm(dim=1)
    return pd.DataFrame(((x @ x.T) / (norms[:, None] * norms)).numpy(), index=list(by_trait), columns=list(by_trait))


def off_diagonal(table: pd.DataFrame) -> np.ndarray:
    """The cosines above the diagonal, row by row."""
    return table.to_numpy()[np.triu_indices(len(table), 1)]


def draw(tables: Mapping[str, pd.DataFrame], path: Path) -> Path:
    """A panel a space, each cell with its cosine."""
    figure = Figure(figsize=(4.6 * len(tables), 4.4), dpi=150, layout="constrained")
    image = None
    for i, (space, table) in enumerate(tables.items()):
        ax = figure.add_subplot(1, len(tables), i + 1)
        image = ax.imshow(table.to_numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
        ax.set_xticks(range(len(table)), list(table.columns), rotation=45, ha="right", fontsize=8)
        ax.set_yticks(range(len(table)), list(table.index) if not i else [""] * len(table), fontsize=8)
        ax.set_title(space, loc="left", fontsize=10, fontweight="bold", color=INK)
        for (row, column), value in np.ndenumerate(table.to_numpy()):
            ax.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white" if abs(value) > 0.6 else INK)
    if image is not None:
        figure.colorbar(image, ax=figure.axes, shrink=0.7, label="cosine")
    return save(figure, path)


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--dictionary", help="folder of a dictionary (default: train the model's shipped config)")
    options.add_argument("--other-model", action="store_true", help="take a dictionary that says it is of another model")
    options.add_argument("--vectors", type=Path, help="folder of `pvsae extract` (default: extract them)")
    args = options.parse_args()
    model = load(args.model)
    out, stored = vectors_of(args, model)
    traits = known_traits(args.traits, stored)
    sae = (
        dictionary(args.dictionary, args.model, model, out / "geometry")
        .check_model(model)
        .check_trained_on(model.name, args.other_model)
    )
    tables = {space: cosines(found) for space, found in representations(sae, model, stored, traits).items()}
    folder = out / "vector_geometry"
    folder.mkdir(parents=True, exist_ok=True)
    for space, table in tables.items():
        print(f"\n{space}, block {sae.info.block}\n{table.round(2).to_string()}")
        with atomic_path(folder / f"{space.replace(' ', '_')}.csv") as tmp:
            table.to_csv(tmp)
    figure = draw(tables, folder / "cosines.png")
    upper = {space: off_diagonal(table) for space, table in tables.items()}
    agreement = {space: float(np.corrcoef(upper[SPACES[0]], upper[space])[0, 1]) for space in SPACES[1:]}
    print(
        "\nPearson r of the cosines with those in the residual stream: " + ", ".join(f"{s} {r:.2f}" for s, r in agreement.items())
    )
    print(f"figure: {figure}")
    checks = [
        check(f"traits that have a {space} representation", float(np.isfinite(np.diag(table)).sum()), f">= {len(traits)}")
        for space, table in tables.items()
    ]
    if len(traits) > 3:  # a correlation of fewer than six cosines says nothing; of pursuits nothing is expected
        checks.append(check("Pearson r with the residual stream, difference of encodings", agreement[SPACES[1]], ">= 0.5"))
    details = {
        space: {"cosines": table.to_dict(), "mean off the diagonal": float(upper[space].mean())}
        for space, table in tables.items()
    }
    record(f"vector_geometry_{out.name}", checks, details)


if __name__ == "__main__":
    main()
