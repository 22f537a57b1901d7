"""All that is known of a feature in one record of plain values: a line of JSON, from which tables, pages and exports are made.

Knows: how evidence, decoder and unembedding become such a record; how records are written and read.
Does not know: where they are shown.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from pvsae.runs import atomic_path, jsonable
from pvsae.saes.dictionary import SAE
from pvsae.saes.evidence import Context, Evidence, Example, bin_edges
from pvsae.saes.labels import Passage, quantiles
from pvsae.saes.logits import promoted
from pvsae.saes.neuronpedia import link
from pvsae.saes.pieces import Pieces

CHUNK = 64  # features whose cosines with all others, or whose logits, are held at once
DIGITS = 4  # significant digits of activations


def passage(example: Example, rows: Mapping[int, Context], pieces: Pieces) -> Passage:
    """The text of an example."""
    ids = rows[example.row].ids[example.start : example.stop]
    return Passage(tuple(pieces.texts(ids.tolist())), tuple(float(v) for v in example.values))


def cards(
    model: Any,
    sae: SAE,
    evidence: Evidence,
    rows: Mapping[int, Context],
    *,
    n_tokens: int = 10,
    n_nearest: int = 8,
    n_quantiles: int = 10,
    progress: bool = True,
) -> Iterator[dict[str, Any]]:
    """A record a feature, in the order of `evidence.latents`.

    Args:
        rows: the rows in which examples lie.
        n_tokens: promoted and demoted tokens.
        n_nearest: features of the highest decoder cosine.
        n_quantiles: groups of the even sample, the strongest first.
    """
    pieces = Pieces(model.tokenizer)
    edges = bin_edges()

    def shown(e: Example) -> dict[str, Any]:
        text = passage(e, rows, pieces)
        return {
            "value": _short(e.value), "at": e.position - e.start, "tokens": list(text.tokens),
            "values": [_short(v) for v in text.values], "row": e.row, "position": e.position, "document": e.document,
        }  # fmt: skip

    for start in tqdm(range(0, len(evidence.latents), CHUNK), desc="cards", disable=not progress):
        latents = evidence.latents[start : start + CHUNK]
        decoder = sae.W_dec[torch.from_numpy(latents).to(sae.device)].to(torch.float32)
        tokens = promoted(model, decoder, n_tokens)
        near = nearest(sae, latents.tolist(), n_nearest)
        for i, latent in enumerate(latents.tolist()):
            slot = start + i
            sample = evidence.examples(slot, evidence.sample, rows)
            bins = np.flatnonzero(evidence.histogram[slot])
            span = range(int(bins[0]), int(bins[-1]) + 1) if len(bins) else range(0)
            yield {
                "latent": latent,
                "link": link(sae.info.neuronpedia, latent),
                "density": float(evidence.density[slot]),
                "fired": int(evidence.fired[slot]),
                "tokens": evidence.tokens,
                "max": _short(float(evidence.peak[slot])),
                "mean": _short(float(evidence.mean[slot])) if evidence.fired[slot] else None,
                "histogram": [
                    {"low": _short(edges[b]), "high": _short(edges[b + 1]), "n": int(evidence.histogram[slot, b])} for b in span
                ],
                "promoted": _tokens(tokens.up[i], tokens.up_values[i], pieces),
                "demoted": _tokens(tokens.down[i], tokens.down_values[i], pieces),
                "nearest": near[i],
                "top": [shown(e) for e in evidence.examples(slot, evidence.top, rows)],
                "quantiles": [
                    {"low": _short(group[-1].value), "high": _short(group[0].value), "examples": [shown(e) for e in group]}
                    for group in quantiles(sample, n_quantiles)
                ],
            }


def nearest(sae: SAE, latents: Sequence[int], n: int) -> list[list[dict[str, Any]]]:
    """For each feature the n others whose decoder rows have the highest cosine with its own."""
    cosines = sae.cosines(sae.W_dec[torch.as_tensor(list(latents), device=sae.device)].to(torch.float32))
    cosines[torch.arange(len(latents)), torch.as_tensor(list(latents))] = -2.0  # itself
    best = cosines.topk(min(n, sae.d_sae - 1), dim=-1)
    return [
        [{"latent": int(i), "cosine": round(float(c), 4)} for c, i in zip(values, indices, strict=True)]
        for values, indices in zip(best.values.cpu(), best.indices.cpu(), strict=True)
    ]


def write_cards(path: Path, made: Iterator[dict[str, Any]]) -> None:
    """One line of JSON each."""
    with atomic_path(path) as tmp, tmp.open("w", encoding="utf-8") as handle:
        for card in made:
            handle.write(json.dumps(jsonable(card), ensure_ascii=False) + "\n")


def read_cards(path: Path) -> Iterator[dict[str, Any]]:
    """What `write_cards` wrote."""
    with path.open(encoding="utf-8") as handle:
        for line in handle:
            yield json.loads(line)


def _tokens(ids: torch.Tensor, values: torch.Tensor, pieces: Pieces) -> list[dict[str, Any]]:
    return [{"id": int(t), "token": pieces.name(int(t)), "logit": _short(float(v))} for t, v in zip(ids, values, strict=True)]


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
