"""Addresses, and the files of the export."""

from __future__ import annotations

import gzip
import json

from pvsae.saes.neuronpedia import Source, export, link, source_names

CARD = {
    "latent": 12, "density": 0.01, "max": 4.0,
    "histogram": [{"low": 1.0, "high": 2.0, "n": 5}, {"low": 2.0, "high": 4.0, "n": 2}],
    "promoted": [{"id": 1, "token": " a", "logit": 2.0}], "demoted": [{"id": 2, "token": "b", "logit": -1.0}],
    "nearest": [{"latent": 3, "cosine": 0.5}],
    "top": [{"value": 4.0, "at": 1, "tokens": ["x", "é"], "values": [0.0, 4.0], "row": 0, "position": 5, "document": 0}],
    "quantiles": [
        {"low": 1.5, "high": 4.0, "examples": [
            {"value": 1.5, "at": 0, "tokens": ["y", "z"], "values": [1.5, 3.0], "row": 2, "position": 7, "document": 1}]},
    ],
}  # fmt: skip
ABOUT = Source("m-it", "3-resid-post-aa", "blocks.3.hook_resid_post", "d", 64, 9, "2026-01-01T00:00:00+00:00")


def read(path):
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]


def test_links_are_those_of_the_published_dictionaries():
    assert link("qwen2.5-7b-it/19-resid-post-aa", 12061) == "https://www.neuronpedia.org/qwen2.5-7b-it/19-resid-post-aa/12061"
    assert link(None, 5) is None
    assert source_names("llama3.1-8b-it/7-resid-post-aa", "x", 1, "resid_post") == ("llama3.1-8b-it", "7-resid-post-aa")
    assert source_names(None, "Org/Qwen3-1.7B", 9, "resid_post") == ("qwen3-1.7b", "9-resid-post-pvsae")


def test_the_layout_of_the_export(tmp_path):
    cards = [{**CARD, "latent": i} for i in range(1030)]
    place = export(tmp_path, ABOUT, iter(cards), {12: {"text": "a label"}, 13: {"text": None}}, "llm")
    assert place == tmp_path / "m-it" / "3-resid-post-aa"
    assert sorted(p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file()) == [
        "activations/batch-0.jsonl.gz", "activations/batch-1.jsonl.gz", "explanations/batch-0.jsonl.gz",
        "features/batch-0.jsonl.gz", "features/batch-1.jsonl.gz", "model.jsonl", "release.jsonl", "source.jsonl",
        "sourceset.jsonl",
    ]  # fmt: skip
    features = read(place / "features" / "batch-0.jsonl.gz")
    assert [f["index"] for f in features] == [str(i) for i in range(1024)]
    one = features[12]
    assert (one["modelId"], one["layer"], one["pos_str"], one["neg_values"]) == ("m-it", "3-resid-post-aa", [" a"], [-1.0])
    assert one["freq_hist_data_bar_heights"] == [5, 2]
    assert one["topkCosSimIndices"] == [3]
    acts = [a for a in read(place / "activations" / "batch-0.jsonl.gz") if a["index"] == "12"]
    assert [(a["binMin"], a["maxValue"], a["maxValueTokenIndex"], a["qualifyingTokenIndex"]) for a in acts] == [
        (-1.0, 4.0, 1, 1), (1.5, 3.0, 1, 0),
    ]  # fmt: skip
    assert acts[0]["tokens"] == ["x", "é"]
    ids = [a["id"] for a in read(place / "activations" / "batch-0.jsonl.gz")]
    assert len(set(ids)) == len(ids) == 2 * 1024
    assert all(len(i) == 25 for i in ids)
    (explained,) = read(place / "explanations" / "batch-0.jsonl.gz")
    assert (explained["index"], explained["description"], explained["explanationModelName"]) == ("12", "a label", "llm")
    source = json.loads((place / "source.jsonl").read_text())
    assert (source["id"], source["setName"], source["num_prompts"]) == ("3-resid-post-aa", "resid-post-aa", 9)


def test_the_fields_are_those_that_sae_dashboard_writes():
    """Names of the rows of its bulk files (`Feature` and `Activation` of its neuronpedia_export)."""
    from pvsae.saes.neuronpedia import _activations, _feature

    feature = {
        "modelId", "layer", "index", "creatorId", "createdAt", "maxActApprox", "hasVector", "vector", "vectorLabel", "hookName",
        "topkCosSimIndices", "topkCosSimValues", "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1",
        "correlated_neurons_indices", "correlated_neurons_pearson", "correlated_neurons_l1", "correlated_features_indices",
        "correlated_features_pearson", "correlated_features_l1", "neg_str", "neg_values", "pos_str", "pos_values", "frac_nonzero",
        "freq_hist_data_bar_heights", "freq_hist_data_bar_values", "logits_hist_data_bar_heights", "logits_hist_data_bar_values",
        "decoder_weights_dist", "sourceSetName",
    }  # fmt: skip
    activation = {
        "id", "tokens", "index", "layer", "modelId", "maxValue", "maxValueTokenIndex", "minValue", "values", "creatorId",
        "dataSource", "dataIndex", "dfaValues", "dfaTargetIndex", "dfaMaxValue", "createdAt", "lossValues", "logitContributions",
        "binMin", "binMax", "binContains", "qualifyingTokenIndex",
    }  # fmt: skip
    assert set(_feature(CARD, ABOUT)) == feature
    assert set(_activations(CARD, ABOUT)[0]) == activation
