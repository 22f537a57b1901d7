"""What do the features of a persona vector mean? Held against the grammar of the embedded models, whose sentences carry facets.

    python -m analyses.feature_truth [--model organism] [--quick]
    python -m analyses.feature_truth --dictionaries runs/sae/block-3_width-1024_k-8 ...      trained dictionaries, as they are
    python -m analyses.feature_truth --set training.dictionaries.k=4 corpus.tokens=all       another config than the shipped one

Trains the shipped dictionary (`MODEL-facets`, or `MODEL`) with two seeds, reads conversations that it never saw, and takes the
purity of each feature's 100 strongest activations: the share that falls in sentences of the trait, or of one facet. For every
trait three decompositions of its vector are held against that: highest cosine, difference of encodings, non-negative pursuit.
Beside all three stand those of nulls: the same pairs of answers, half of them with their labels swapped.

Knows: the embedded models' language, the targets, how rankings are scored. Does not know: how dictionaries are trained or
vectors extracted.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from analyses.pairs import Pairs, pairs_of, vectors_of
from analyses.pipeline import parser
from analyses.results import save, write
from benchmarks.record import check, record
from pvsae import load
from pvsae.models import ChatModel
from pvsae.organism.labelled import conversations, labels
from pvsae.reports.figures import BLUE, GREY, INK, ORANGE, PALE
from pvsae.saes import shipped
from pvsae.saes.config import load_config
from pvsae.saes.dictionary import SAE
from pvsae.saes.encodings import encode_pairs
from pvsae.saes.folders import load as load_sae
from pvsae.saes.labelled import Labels, labelled_row
from pvsae.saes.pursuit import Atoms, pursue
from pvsae.saes.ranking import shuffled
from pvsae.saes.truth import Truth, found_labels, hold_against, precision_at
from pvsae.stages import sae_train

TRAITS = ("evil", "sycophantic", "hallucinating")
FIRST, PURE = 5, 0.8  # of the first 5 features at least 4 are to be this pure for the trait
PLACES, FACET_PURE = 15, 0.7  # every facet is to have a feature this pure among the first 15
DRAWS, PURSUED = 200, 20  # null vectors, and those of them that are pursued too
WAYS = ("cosine", "difference of encodings", "pursuit")


@dataclass(frozen=True)
class Found:
    """How one ranking of latents does: pure ones among the first, facets that have a pure one, precision at three depths."""

    pure: int
    facets: dict[str, int | None]
    precision: dict[int, float]

    @property
    def n_facets(self) -> int:
        return sum(latent is not None for latent in self.facets.values())


class Judge:
    """The truth about one dictionary's latents, for one trait. One that was active on fewer than 100 tokens counts as wrong."""

    def __init__(self, truth: Truth, labels: Labels, trait: str) -> None:
        self.truth, self.names = truth, labels.of_group(trait)
        self.purity = truth.purity(self.names).nan_to_num(0.0)
        self.enough = truth.n_strongest == truth.top
        self.right = set(((self.purity >= PURE) & self.enough).nonzero()[:, 0].tolist())

    def of(self, ranking: Sequence[int]) -> Found:
        """The figures of a ranking, best latent first; it may be shorter than PLACES."""
        precision = {k: precision_at(ranking, self.right, k) for k in (FIRST, 10, PLACES)}
        known = [latent for latent in ranking[:PLACES] if self.enough[latent]]
        found = found_labels(self.truth, known, self.names, PLACES, FACET_PURE)
        return Found(round(precision[FIRST] * FIRST), found, precision)


def config_for(model: str) -> str:
    """The shipped config of a model whose latents are meant to mean facets, or the model's only one."""
    narrow = f"{model}-facets"
    return narrow if narrow in shipped.names() else model


def dictionaries(args: argparse.Namespace, model: ChatModel, out: Path) -> list[SAE]:
    """Those given, or the model's shipped config trained with each seed, from the same forward passes."""
    if args.dictionaries:
        return [load_sae(folder) for folder in args.dictionaries]
    assignments = [f"training.dictionaries.seed={list(range(args.seeds))}", *args.set]
    if args.quick:
        assignments.append("training.tokens=1e5")
    config = load_config(args.config or config_for(args.model), assignments)
    trained = sae_train.run(config, out / "sae", model=model)
    return [load_sae(folder) for folder in trained.folders.values()]


def held_against(saes: Sequence[SAE], model: ChatModel, known: Labels, n: int) -> list[Truth]:
    """The truth about dictionaries, on the kind of tokens that they were trained on."""
    tokens = {str((sae.info.chat or {}).get("tokens", "all")) for sae in saes}
    if len(tokens) > 1:
        raise SystemExit("dictionaries that were trained on answers and on all tokens: measure them one by one")
    options: dict[str, Any] = {"drop_first": max(sae.info.drop_first for sae in saes), "tokens": tokens.pop()}
    rows = (labelled_row(model, c.messages, c.sentences, known, **options) for c in conversations(n))
    return hold_against(saes, model, rows, known, progress="labelled sentences")


def rankings(
    sae: SAE, model: ChatModel, v: Tensor, pairs: Pairs
) -> tuple[dict[str, list[int]], Float[Tensor, "n d_model"], Float[Tensor, "n d_sae"]]:
    """The latents of a vector by each way of decomposing it, and the pairs' differences of mean residuals and of encodings."""
    assert sae.info.block is not None
    encoded = encode_pairs(model, sae, sae.info.block, pairs.sides, range(len(pairs.questions)), progress="answers")
    of_pairs = encoded.activation[0] - encoded.activation[1]
    of_pairs *= _weights(pairs.questions)[:, None]
    solved = pursue(Atoms(sae.W_dec), v, PLACES, nonnegative=True).at_most(PLACES)
    found = {
        "cosine": sae.cosines(v).argsort(descending=True)[:PLACES].tolist(),
        "difference of encodings": _highest(of_pairs.mean(0)),
        "pursuit": _by_weight(solved.latents, solved.weights),
    }
    return found, encoded.row_means[0] - encoded.row_means[1], of_pairs


def _weights(questions: Sequence[int]) -> Float[Tensor, " n"]:
    """What makes a mean over pairs one in which every question counts the same, as in the stage `decompose`."""
    counts = Counter(questions)
    return torch.tensor([len(questions) / (len(counts) * counts[q]) for q in questions])


def _highest(difference: Float[Tensor, " d_sae"]) -> list[int]:
    return [i for i in difference.argsort(descending=True)[:PLACES].tolist() if difference[i] > 0]


def _by_weight(latents: Sequence[int], weights: Sequence[float]) -> list[int]:
    return [latents[i] for i in np.argsort([-w for w in weights], kind="stable")]


def one(sae: SAE, truth: Truth, model: ChatModel, known: Labels, trait: str, v: Tensor, pairs: Pairs) -> dict[str, Any]:
    """Everything about one dictionary and trait: {"rows", "features", "null purity"}."""
    judge = Judge(truth, known, trait)
    ways, differences, encodings = rankings(sae, model, v, pairs)
    nulls = shuffled(differences, DRAWS, seed=0)
    null_ranks = sae.cosines(nulls).argsort(dim=1, descending=True)[:, :PLACES]
    chance = {"cosine": [judge.of(ranking) for ranking in null_ranks.tolist()]}
    atoms = Atoms(sae.W_dec)
    solved = [pursue(atoms, null, PLACES, nonnegative=True).at_most(PLACES) for null in nulls[:PURSUED]]
    chance["pursuit"] = [judge.of(_by_weight(s.latents, s.weights)) for s in solved]
    chance["difference of encodings"] = [judge.of(_highest(null)) for null in shuffled(encodings, DRAWS, seed=0)]
    rows = []
    for way in WAYS:
        found, none = judge.of(ways[way]), chance[way]
        row: dict[str, Any] = {"dictionary": Path(sae.ref).name, "trait": trait, "way": way, "pure of 5": found.pure}
        row |= {f"precision@{k}": p for k, p in found.precision.items()}
        row |= {"facets": f"{found.n_facets}/{len(judge.names)}", "n_facets": found.n_facets, "of": len(judge.names)}
        row["missing"] = ", ".join(name.split("/")[1] for name, latent in found.facets.items() if latent is None)
        row |= {"null pure of 5": np.mean([f.pure for f in none]), "null facets": np.mean([f.n_facets for f in none])}
        row["nulls with 4 of 5"] = np.mean([f.pure >= 4 for f in none])
        row["nulls with every facet"] = np.mean([f.n_facets == len(judge.names) for f in none])
        rows.append(row)
    cosines, table = sae.cosines(v), truth.table().set_index("latent")
    features = table.loc[ways["cosine"]].reset_index()
    features.insert(0, "cosine", cosines[ways["cosine"]].tolist())
    features.insert(0, "place", range(1, len(features) + 1))
    features.insert(0, "trait", trait)
    features.insert(0, "dictionary", Path(sae.ref).name)
    features["trait_purity"] = judge.purity[ways["cosine"]].tolist()
    features["trait_base"] = truth.base(judge.names)
    features["facet_purity"] = torch.stack([truth.purity((n,)) for n in judge.names]).amax(0)[ways["cosine"]].tolist()
    return {"rows": rows, "features": features, "null purity": judge.purity[null_ranks].numpy()}


def draw(found: Sequence[dict[str, Any]], path: Path) -> Path:
    """A panel a trait: purity of the features of highest cosine for trait and facet, beside null vectors' at the same place."""
    traits = list(dict.fromkeys(one["features"]["trait"].iloc[0] for one in found))
    figure = Figure(figsize=(4.2 * len(traits), 3.2), dpi=150, layout="constrained")
    for i, trait in enumerate(traits):
        ax = figure.add_subplot(1, len(traits), i + 1)
        own = [one for one in found if one["features"]["trait"].iloc[0] == trait]
        _panel(ax, own)
        ax.set_title(trait, loc="left", fontsize=10, fontweight="bold", color=INK)
        if not i:
            ax.set_ylabel("purity of the 100 strongest activations", fontsize=8)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return save(figure, path)


def _panel(ax: Axes, own: Sequence[dict[str, Any]]) -> None:
    places = np.arange(1, PLACES + 1)
    null = np.concatenate([one["null purity"] for one in own])
    ax.fill_between(places, np.quantile(null, 0.05, 0), np.quantile(null, 0.95, 0), color=PALE, label="shuffled pairs, 90%")
    ax.plot(places, null.mean(0), color=GREY, linewidth=1, label="shuffled pairs, mean")
    for n, one in enumerate(own):
        features = one["features"]
        ax.plot(features["place"] - 0.12, features["trait_purity"], "o", color=BLUE, markersize=5, label=_label("trait", n))
        ax.plot(
            features["place"] + 0.12,
            features["facet_purity"],
            "s",
            color=ORANGE,
            markersize=4,
            label=_label("its purest facet", n),
        )
    ax.axhline(own[0]["features"]["trait_base"].iloc[0], color=INK, linewidth=0.8, linestyle=":")
    ax.set_ylim(-0.04, 1.04)
    ax.set_xlabel("place by cosine with the vector", fontsize=8)
    ax.tick_params(colors=INK, labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)


def _label(name: str, n: int) -> str:
    return name if n == 0 else f"_{name}"  # the legend names each kind of mark once


def checks_of(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Of the ranking by cosine: the worst dictionary and trait, and the nulls of all."""
    own = table[table["way"] == "cosine"]
    checks = [
        check("features of highest cosine with trait purity >= 0.8, of 5, lowest", own["pure of 5"].min(), ">= 4"),
        check("facets without a feature of purity >= 0.7 among the first 15, most", (own["of"] - own["n_facets"]).max(), "<= 0"),
        check("shuffled pairs with 4 pure features of 5, highest share", own["nulls with 4 of 5"].max(), "<= 0.05"),
        check("shuffled pairs with every facet, highest share", own["nulls with every facet"].max(), "<= 0.05"),
    ]
    for trait, part in own.groupby("trait", sort=False):
        checks.append(check(f"{trait}: pure features of 5, lowest", part["pure of 5"].min(), ">= 4"))
        checks.append(check(f"{trait}: share of facets found, lowest", (part["n_facets"] / part["of"]).min(), ">= 1"))
    return checks


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--config", help="config of the dictionary (default: MODEL-facets, or MODEL where that is not shipped)")
    options.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="changes of the config")
    options.add_argument("--dictionaries", nargs="+", type=Path, help="folders of trained dictionaries, instead of training")
    options.add_argument("--seeds", type=int, default=2, help="dictionaries to train (default: 2)")
    options.add_argument("--conversations", type=int, default=20_000, help="labelled conversations to read (default: 20000)")
    options.add_argument("--vectors", type=Path, help="folder of `pvsae extract` (default: extract them)")
    args = options.parse_args()
    args.traits = args.traits or list(TRAITS)
    model = load(args.model)
    out, stored = vectors_of(args, model)
    known = Labels(labels())
    saes = dictionaries(args, model, out)
    truths = held_against(saes, model, known, 1000 if args.quick else args.conversations)
    found = []
    for sae, truth in zip(saes, truths, strict=True):
        assert sae.info.block is not None
        for trait in args.traits:
            pairs = pairs_of(stored / trait, model, trait)
            found.append(one(sae, truth, model, known, trait, pairs.vectors.of()[sae.info.block], pairs))
    table = pd.DataFrame([row for each in found for row in each["rows"]])
    features = pd.concat([each["features"] for each in found], ignore_index=True)
    folder = out / "feature_truth"
    write(folder, table=table, features=features)
    figure = draw(found, folder / "purity.png")
    show(table, features)
    print(f"\nfigure: {figure}\ntables: {folder}/table.csv, {folder}/features.csv")
    details = {"table": table.to_dict("records"), "features": features.to_dict("records")}
    record(f"feature_truth_{out.name}", checks_of(table), details)


def show(table: pd.DataFrame, features: pd.DataFrame) -> None:
    """Prints the first features of every vector, then a line a dictionary, trait and way."""
    measures = ["density", "strongest", "trait_purity", "label", "label_purity", "label_recall", "label_auroc", "no_group"]
    for (name, trait), part in features.groupby(["dictionary", "trait"], sort=False):
        print(f"\n{name}: {trait} (base rate {part['trait_base'].iloc[0]:.3f})")
        print(part[["place", "latent", "cosine", *measures]].round(3).to_string(index=False))
    print(f"\n{table.drop(columns=['n_facets', 'of']).round(2).to_string(index=False)}")


if __name__ == "__main__":
    main()
