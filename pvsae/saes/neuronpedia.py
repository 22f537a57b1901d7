"""Neuronpedia: the address of a published feature, and features as files that its importer reads.

Knows: the layout of its bulk files, MODEL/SOURCE/{features,activations,explanations}/batch-N.jsonl.gz beside model.jsonl,
release.jsonl, sourceset.jsonl and source.jsonl, one JSON object a line. Names of files and fields are those that SAEDashboard
writes (sae_dashboard/neuronpedia/neuronpedia_export.py) and, of explanations, neuronpedia-utils (batch-autointerp.py); fields
that they know and nothing here measures are left at the empty values that they write.
Does not know: how anything was measured.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

from pvsae.runs import atomic_write_bytes

SITE = "https://www.neuronpedia.org"
BATCH = 1024  # features a file


def link(neuronpedia_id: str | None, latent: int) -> str | None:
    """The page of a feature of a published dictionary; None where its id is not known."""
    return f"{SITE}/{neuronpedia_id}/{latent}" if neuronpedia_id else None


@dataclass(frozen=True)
class Source:
    """What the importer wants to know of a dictionary.

    Attributes:
        model: Neuronpedia's name of the model, e.g. "qwen2.5-7b-it".
        source: its name of the dictionary, e.g. "19-resid-post-aa": block, then the set.
        hook_name: site, in TransformerLens' words.
        dataset: the text.
        context: tokens a row of it.
        rows: how many rows were read.
        made: when, ISO 8601.
        creator: id of the account that the features will belong to.
    """

    model: str
    source: str
    hook_name: str | None
    dataset: str | None
    context: int | None
    rows: int
    made: str
    creator: str = ""

    @property
    def set_name(self) -> str:
        return self.source.partition("-")[2] or self.source


def source_names(neuronpedia_id: str | None, model: str | None, block: int, site: str) -> tuple[str, str]:
    """(model, source): of a published dictionary its own, else made from the names of model and site."""
    if neuronpedia_id and neuronpedia_id.count("/") == 1:
        known, _, source = neuronpedia_id.partition("/")
        return known, source
    return (model or "model").rstrip("/").rpartition("/")[2].lower(), f"{block}-{site.replace('_', '-')}-pvsae"


def export(
    folder: Path,
    about: Source,
    cards: Iterable[Mapping[str, Any]],
    labels: Mapping[int, Mapping[str, Any]],
    explainer: str | None,
) -> Path:
    """Write features under folder/MODEL/SOURCE, and give that folder.

    Args:
        cards: records of features (cards.py).
        labels: latent -> its label, as plain values, where it has one.
        explainer: name of the model that wrote them.
    """
    place = folder / about.model / about.source
    for name, row in _heads(about).items():
        _write(place / f"{name}.jsonl", [row], compress=False)
    rest = iter(cards)
    for i in count():
        some = list(islice(rest, BATCH))
        if not some:
            break
        _write(place / "features" / f"batch-{i}.jsonl.gz", [_feature(card, about) for card in some])
        _write(place / "activations" / f"batch-{i}.jsonl.gz", [a for card in some for a in _activations(card, about)])
        explained = [
            _explanation(card["latent"], labels[card["latent"]], about, explainer)
            for card in some
            if labels.get(card["latent"], {}).get("text")
        ]
        if explained:
            _write(place / "explanations" / f"batch-{i}.jsonl.gz", explained)
    return place


def _heads(about: Source) -> dict[str, dict[str, Any]]:
    common = {"creatorId": about.creator, "createdAt": about.made}
    release = f"{about.model}-{about.set_name}"
    return {
        "model": {
            **common, "id": about.model, "instruct": about.model.endswith(("-it", "-instruct")), "displayName": about.model,
            "displayNameShort": about.model, "updatedAt": about.made, "visibility": "PUBLIC",
        },
        "release": {**common, "name": release, "description": release, "creatorName": "", "urls": [], "visibility": "PUBLIC"},
        "sourceset": {
            **common, "modelId": about.model, "name": about.set_name, "releaseName": release, "description": "",
            "creatorName": "", "visibility": "PUBLIC",
        },
        "source": {
            **common, "id": about.source, "modelId": about.model, "setName": about.set_name, "dataset": about.dataset,
            "num_prompts": about.rows, "num_tokens_in_prompt": about.context, "visibility": "PUBLIC",
        },
    }  # fmt: skip


def _feature(card: Mapping[str, Any], about: Source) -> dict[str, Any]:
    unknown: dict[str, list[Any]] = {
        f"{name}_{kind}": []
        for name, kinds in (
            ("neuron_alignment", ("indices", "values", "l1")),
            ("correlated_neurons", ("indices", "pearson", "l1")),
            ("correlated_features", ("indices", "pearson", "l1")),
            ("logits_hist_data", ("bar_heights", "bar_values")),
        )
        for kind in kinds
    }
    return {
        "modelId": about.model, "layer": about.source, "index": str(card["latent"]), "creatorId": about.creator,
        "createdAt": about.made, "maxActApprox": card["max"], "hasVector": False, "vector": [], "vectorLabel": None,
        "hookName": about.hook_name, "sourceSetName": about.set_name,
        "topkCosSimIndices": [n["latent"] for n in card["nearest"]], "topkCosSimValues": [n["cosine"] for n in card["nearest"]],
        **unknown,
        "pos_str": [t["token"] for t in card["promoted"]], "pos_values": [t["logit"] for t in card["promoted"]],
        "neg_str": [t["token"] for t in card["demoted"]], "neg_values": [t["logit"] for t in card["demoted"]],
        "frac_nonzero": card["density"],
        "freq_hist_data_bar_heights": [b["n"] for b in card["histogram"]],
        "freq_hist_data_bar_values": [(b["low"] * b["high"]) ** 0.5 for b in card["histogram"]],
        "decoder_weights_dist": [],
    }  # fmt: skip


def _activations(card: Mapping[str, Any], about: Source) -> list[dict[str, Any]]:
    """The top examples (bins -1, as SAEDashboard marks them), then those of the quantiles, with the range of each."""
    groups = [(-1.0, card["max"], -1.0, card["top"])]
    n = sum(len(q["examples"]) for q in card["quantiles"])
    groups += [(q["low"], q["high"], len(q["examples"]) / n, q["examples"]) for q in card["quantiles"]]
    out = []
    for low, high, share, examples in groups:
        for e in examples:
            highest = max(e["values"])
            out.append(
                {
                    "id": _id(about.model, about.source, card["latent"], low, e["row"], e["position"]),
                    "modelId": about.model, "layer": about.source, "index": str(card["latent"]), "creatorId": about.creator,
                    "createdAt": about.made, "tokens": e["tokens"], "values": e["values"], "maxValue": highest,
                    "maxValueTokenIndex": e["values"].index(highest), "minValue": min(e["values"]), "dfaValues": [],
                    "dfaTargetIndex": None, "dfaMaxValue": None, "lossValues": [], "logitContributions": None, "binMin": low,
                    "binMax": high, "binContains": share, "qualifyingTokenIndex": e["at"], "dataIndex": None, "dataSource": None,
                }
            )  # fmt: skip
    return out


def _explanation(latent: int, label: Mapping[str, Any], about: Source, explainer: str | None) -> dict[str, Any]:
    return {
        "id": _id(about.model, about.source, latent, label["text"]), "modelId": about.model, "layer": about.source,
        "index": str(latent), "description": label["text"], "typeName": "pvsae_quantiles", "explanationModelName": explainer,
        "authorId": about.creator,
    }  # fmt: skip


def _id(*parts: Any) -> str:
    """25 characters as a cuid has them, the same for the same content."""
    return "c" + hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _write(path: Path, rows: list[dict[str, Any]], *, compress: bool = True) -> None:
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(path, gzip.compress(data, mtime=0) if compress else data)
