"""All that a dictionary says of one persona vector, as tables (the order is that of the method's list of what a report holds).

Knows: vectors, decoders, encodings of answers. Does not know: models, files, how a vector came about.

Five ways to say which latents a vector is made of: `cosine` with the decoder's rows, `difference` of the encodings of the answers
on both sides, `nonnegative` and `signed` pursuit, and `encode(v)`, which misleads and is shown with that warning.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from pvsae.saes.pursuit import Atoms, Pursuit, pursue
from pvsae.saes.ranking import analytic_null, ends, extremes, overlap, rank_correlation, ranks

if TYPE_CHECKING:
    from pvsae.saes.dictionary import SAE

CURVE = (1, 2, 5, 10, 20, 50)
METHODS = ("cosine", "difference", "nonnegative", "signed", "encode(v)")
WARNING = (
    "encode(v) misleads (Mayne et al., arXiv 2411.08790): a difference of means is far shorter than a residual, so the encoder's "
    "bias decides, as encode(0) beside it shows; and a latent that the vector points away from cannot appear. It is shown "
    "because people look at it, not to be relied on."
)
_RANDOM_DRAWS = 20  # random directions for a null where there are no answers to shuffle
# Vectors of each null that are pursued. A pursuit reads the decoder some seven times, which at the size of the published
# dictionaries takes seconds: there, fewer.
_PURSUED, _PURSUED_LARGE, _LARGE = 10, 3, 2**27


@dataclass(frozen=True)
class Inputs:
    """What one reading is made of.

    Attributes:
        trait, v: the vector and its name.
        known: cosines of every known trait's vector with every latent, this trait's too.
        encodings: the table of saes/encodings.py, or None.
        nulls: vectors of the same answers with labels shuffled within pairs, or None.
        top, k: length of lists; atoms of a pursuit.
    """

    trait: str
    v: Float[Tensor, " d_model"]
    known: Mapping[str, Float[Tensor, " d_sae"]]
    encodings: pd.DataFrame | None
    nulls: Float[Tensor, "draws d_model"] | None
    top: int
    k: int
    seed: int

    def random(self, draws: int) -> Float[Tensor, "draws d_model"]:
        """Random directions as long as the vector."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{self.trait}/null".encode()))
        drawn = torch.randn(draws, len(self.v), generator=generator)
        return drawn * (self.v.norm() / drawn.norm(dim=1, keepdim=True))


def read(sae: SAE, atoms: Atoms, given: Inputs) -> dict[str, pd.DataFrame]:
    """The tables of one vector: decomposition, curve, pursuit, specificity, encodings, encoded, agreement, nulls."""
    cosines = given.known[given.trait]
    kinds = (("nonnegative", True), ("signed", False))
    pursuits = {name: pursue(atoms, given.v, given.k, nonnegative=positive) for name, positive in kinds}
    encoded = torch.stack([sae.encode(x[None])[0].float().cpu() for x in (given.v, torch.zeros_like(given.v))])
    scores = {"cosine": cosines, "nonnegative": _weights(pursuits["nonnegative"], sae, given.k)}
    scores |= {"signed": _weights(pursuits["signed"], sae, given.k), "encode(v)": encoded[0]}
    if given.encodings is not None:
        difference = torch.zeros(sae.d_sae)
        latents = torch.tensor(given.encodings["latent"].to_numpy(copy=True), dtype=torch.long)
        difference[latents] = torch.tensor(given.encodings["difference"].to_numpy(copy=True)).float()
        scores["difference"] = difference * atoms.norms.cpu()
    nulls = _nulls(sae, given)
    tables = {
        "decomposition": _decomposition(sae, given, scores, encoded, nulls),
        "curve": _curve(atoms, given, pursuits),
        "pursuit": _pursuit(atoms, given, pursuits),
        "specificity": _specificity(given),
        "encoded": _encoded(given, encoded),
        "agreement": _agreement(given, scores),
        "nulls": nulls,
    }
    if given.encodings is not None:
        tables["encodings"] = _encodings(given)
    for name, table in tables.items():
        table.insert(0, "trait", given.trait)
        tables[name] = table
    return tables


def _weights(found: Pursuit, sae: SAE, k: int) -> Float[Tensor, " d_sae"]:
    out = torch.zeros(sae.d_sae)
    solution = found.at_most(k)
    out[list(solution.latents)] = torch.tensor(solution.weights)
    return out


def _nulls(sae: SAE, given: Inputs) -> pd.DataFrame:
    """A row a null: mean and 95% of the largest |cosine| of its vectors, and how many of the vector's lie beyond the 95%."""
    cosines = given.known[given.trait].abs()
    rows: list[dict[str, Any]] = []

    def add(name: str, mean: float, limit: float, draws: int) -> None:
        beyond = int((cosines > limit).sum())
        rows.append({"null": name, "largest_cosine": mean, "limit": limit, "draws": draws, "latents_beyond": beyond})

    formula = analytic_null(sae.d_model, sae.d_sae)
    add("analytic", formula, formula, 0)
    sets = {"random directions": given.random(_RANDOM_DRAWS)}
    if given.nulls is not None:
        sets["shuffled pairs"] = given.nulls
    for name, vectors in sets.items():
        found = extremes(sae.cosines(vectors))
        add(name, found.mean, found.limit, len(vectors))
    return pd.DataFrame(rows)


def _decomposition(
    sae: SAE, given: Inputs, scores: Mapping[str, Tensor], encoded: Float[Tensor, "2 d_sae"], nulls: pd.DataFrame
) -> pd.DataFrame:
    """A row a latent that is in a list of any method, or among the latents that the vector points away from."""
    cosines = given.known[given.trait]
    high, low = ends(cosines, given.top)
    lists = {name: set(_list(values, given.top)) for name, values in scores.items()}
    latents = list(dict.fromkeys([*high.tolist(), *low.tolist(), *(i for found in lists.values() for i in sorted(found))]))
    index = torch.tensor(latents)
    limit = float(nulls["limit"].iloc[-1])  # the shuffled pairs' where there are any: the tightest that is honest
    places = ranks(torch.stack([cosines, -cosines]), index)
    others = {name: values for name, values in given.known.items() if name != given.trait}
    elsewhere = {name: ranks(values[None], index)[0] for name, values in others.items()}
    columns: dict[str, Any] = {
        "latent": latents,
        "cosine": cosines[index].numpy(),
        "rank": places[0].numpy(),
        "rank_from_below": places[1].numpy(),
        "beyond_null": (cosines[index].abs() > limit).numpy(),
        **_own_nulls(sae, given, index),
        "nonnegative": scores["nonnegative"][index].numpy(),
        "signed": scores["signed"][index].numpy(),
    }
    if given.encodings is not None:
        known = given.encodings.set_index("latent").reindex(latents)
        for name in ("difference", "firing_pos", "firing_neg"):
            columns[name] = known[name].fillna(0.0).to_numpy()
        columns["q"] = known["q"].to_numpy()
    columns |= {"encode_v": encoded[0][index].numpy(), "encode_0": encoded[1][index].numpy()}
    columns["lists"] = [sum(latent in found for found in lists.values()) for latent in latents]
    if others:
        stacked = torch.stack(list(elsewhere.values()))
        best = stacked.min(0)
        columns["other_traits_with_it"] = (stacked <= given.top).sum(0).numpy()
        columns["best_other"] = [list(elsewhere)[i] for i in best.indices.tolist()]
        columns["best_other_rank"] = best.values.numpy()
    if sae.info.neuronpedia:
        columns["page"] = [f"https://www.neuronpedia.org/{sae.info.neuronpedia}/{latent}" for latent in latents]
    return pd.DataFrame(columns)


def _own_nulls(sae: SAE, given: Inputs, latents: Int[Tensor, " n"]) -> dict[str, Any]:
    """The |cosine| that 95% of the shuffled pairs' vectors do not reach with this very latent: a latent of a subject that answers
    differ in by chance has a high one. It asks about a latent named beforehand; `beyond_null` about the best of all."""
    if given.nulls is None:
        return {}
    rows = sae.W_dec[latents.to(sae.device)].float().cpu()
    unit = torch.nn.functional.normalize(given.nulls, dim=1)
    found = (unit @ torch.nn.functional.normalize(rows, dim=1).T).abs()
    return {"own_null": found.quantile(0.95, dim=0).numpy()}


def _list(scores: Float[Tensor, " d_sae"], top: int) -> list[int]:
    best = scores.topk(min(top, len(scores)))
    return [int(i) for i, value in zip(best.indices, best.values, strict=True) if value > 0]


def _curve(atoms: Atoms, given: Inputs, pursuits: Mapping[str, Pursuit]) -> pd.DataFrame:
    """A row a mode, vector and k: share of |v|^2 explained, and the residual's length over |v|. Of the nulls beside it these are
    means over `draws` vectors, and `explained_95` is the share that 95% of them do not reach."""
    draws = _PURSUED if atoms.rows.numel() < _LARGE else _PURSUED_LARGE
    sets: dict[str, Mapping[str, Sequence[Pursuit]]] = {"vector": {mode: [found] for mode, found in pursuits.items()}}
    controls = {"random direction": given.random(draws)}
    if given.nulls is not None:
        controls["shuffled pairs"] = given.nulls[:draws]
    for name, vectors in controls.items():
        some = [v for v in vectors if float(v.norm()) > 0]
        if some:
            sets[name] = {mode: [pursue(atoms, v, given.k, nonnegative=mode == "nonnegative") for v in some] for mode in pursuits}
    rows = []
    for name, by_mode in sets.items():
        for mode, found in by_mode.items():
            for k in sorted({*(k for k in CURVE if k <= given.k), given.k}):
                best = [pursuit.at_most(k) for pursuit in found]
                explained = torch.tensor([solution.explained for solution in best], dtype=torch.float64)
                rows.append(
                    {
                        "vector": name, "mode": mode, "k": k, "atoms": sum(len(s.latents) for s in best) / len(best),
                        "explained": float(explained.mean()), "residual": sum(s.residual for s in best) / len(best),
                        "draws": len(best), "explained_95": math.nan if name == "vector" else float(explained.quantile(0.95)),
                    }
                )  # fmt: skip
    return pd.DataFrame(rows)


def _pursuit(atoms: Atoms, given: Inputs, pursuits: Mapping[str, Pursuit]) -> pd.DataFrame:
    """A row an atom of the last solution: its weight (the length it contributes), the activation that this is, its cosine."""
    rows = []
    cosines, norms = given.known[given.trait], atoms.norms.cpu()
    for mode, found in pursuits.items():
        solution = found.at_most(given.k)
        for order, (latent, weight) in enumerate(zip(solution.latents, solution.weights, strict=True)):
            rows.append(
                {"mode": mode, "order": order + 1, "latent": latent, "weight": weight}
                | {"activation": weight / float(norms[latent]), "cosine": float(cosines[latent])}
            )
    return pd.DataFrame(rows, columns=["mode", "order", "latent", "weight", "activation", "cosine"])


def _specificity(given: Inputs) -> pd.DataFrame:
    """A row a top latent and known trait: the latent's cosine with that trait's vector, and its rank there."""
    high, _ = ends(given.known[given.trait], given.top)
    rows = []
    for name, cosines in given.known.items():
        places = ranks(cosines[None], high)[0]
        for latent, place in zip(high.tolist(), places.tolist(), strict=True):
            rows.append({"latent": latent, "for": name, "cosine": float(cosines[latent]), "rank": place})
    return pd.DataFrame(rows).sort_values(["latent", "rank"], kind="stable", ignore_index=True)


def _encodings(given: Inputs) -> pd.DataFrame:
    """The latents of the largest differences, from both ends."""
    assert given.encodings is not None
    table = given.encodings.sort_values("difference", ascending=False, ignore_index=True)
    up, down = table.head(given.top), table[::-1].head(given.top)
    return pd.concat([up[up["difference"] > 0], down[down["difference"] < 0]], ignore_index=True)


def _encoded(given: Inputs, encoded: Float[Tensor, "2 d_sae"]) -> pd.DataFrame:
    """Latents that are active in encode(v), strongest first, beside encode(0); the first row counts them."""
    of_v, of_0 = encoded
    cosines = given.known[given.trait]
    top = _list(of_v, given.top)
    rows: list[dict[str, Any]] = [
        {
            "what": "active latents",
            "encode_v": float((of_v > 0).sum()),
            "encode_0": float((of_0 > 0).sum()),
            "both": int(((of_v > 0) & (of_0 > 0)).sum()),
        }
    ]
    for latent in top:
        values = {"encode_v": float(of_v[latent]), "encode_0": float(of_0[latent]), "both": int(of_0[latent] > 0)}
        rows.append({"what": f"latent {latent}", **values, "cosine": float(cosines[latent])})
    return pd.DataFrame(rows, columns=["what", "encode_v", "encode_0", "both", "cosine"])


def _agreement(given: Inputs, scores: Mapping[str, Tensor]) -> pd.DataFrame:
    """A row a pair of methods: share of the top lists in common, and Spearman's correlation over all latents that both give a
    score (`latents` of them)."""
    rows = []
    for first, second in combinations([m for m in METHODS if m in scores], 2):
        a, b = scores[first], scores[second]
        correlation, n = rank_correlation(a, b)
        rows.append(
            {"first": first, "second": second, "top": given.top, "overlap": overlap(a, b, given.top)}
            | {"rank_correlation": correlation, "latents": n}
        )
    return pd.DataFrame(rows)


def explained_by(curve: pd.DataFrame, mode: str, k: int, vector: str = "vector") -> float:
    """Share of |v|^2 at the largest k of the curve that is not above this one; NaN where there is none."""
    part = curve[(curve["vector"] == vector) & (curve["mode"] == mode) & (curve["k"] <= k)]
    return float(part.sort_values("k")["explained"].iloc[-1]) if len(part) else math.nan
