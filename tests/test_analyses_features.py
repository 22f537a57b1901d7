"""The paper's table of features: the rules on made-up sweeps, and the whole analysis on the embedded model, begun again."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from analyses import feature_table, sae_features
from analyses.feature_table import assemble, candidates, chosen, effects, own_facets, passing, verdicts
from benchmarks import record
from pvsae.models import ChatModel, Residual
from pvsae.models import load as load_model
from pvsae.organism.labelled import conversations, labels
from pvsae.saes.dictionary import SAE, SAEInfo
from pvsae.saes.folders import save
from pvsae.saes.labelled import Labels, labelled_row
from pvsae.vectors import PersonaVectors
from tests.browser import assert_fine, page_of

ACTIVITY = pd.DataFrame({"latent": range(6), "density": [0.1, 0.2, 0.0, 0.1, 0.3, 0.1], "max": [1.0, 2.0, 0.0, 3.0, 4.0, 5.0]})
BLOCK = 3
PLAIN = {"condition": "unsteered", "feature": "-", "of": "-", "coef": 0.0}


def decomposition() -> pd.DataFrame:
    latents = [4, 0, 2, 1, 5, 3]
    return pd.DataFrame(
        {"trait": "evil", "latent": latents, "rank": range(1, 7), "cosine": [0.5, 0.4, 0.3, 0.2, 0.1, -0.1], "beyond_null": True}
    )


def truth() -> pd.DataFrame:
    labels = ["evil/insult", "evil/cruelty", "evil/insult", "evil/insult", "sad/tears", None]
    rows = {"latent": range(6), "label": labels, "label_purity": 0.5, "label_recall": 0.1, "group": "evil", "group_purity": 0.6}
    return pd.DataFrame(rows)


def sweep(rows: list[tuple[str, str, str, float, float, float, float]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(condition, feature, of, coef, insult, cruelty, coherence) rows of evil beside unsteered answers that show neither."""
    table = [{"trait": "evil", **PLAIN, "coherence": 100.0, "trait_score": 0.0, "trait_low": 0.0}]
    facets = [{"trait": "evil", **PLAIN, "facet": f, "score": 0.0} for f in ("insult", "cruelty")]
    for condition, feature, of, coef, insult, cruelty, coherence in rows:
        key = {"trait": "evil", "condition": condition, "feature": feature, "of": of, "coef": coef}
        score = insult + cruelty
        table.append({**key, "coherence": coherence, "trait_score": score, "trait_low": score - 5.0})
        facets += [{**key, "facet": f, "score": s} for f, s in (("insult", insult), ("cruelty", cruelty))]
    return pd.DataFrame(table), pd.DataFrame(facets)


SWEPT = [
    ("feature", "0", "-", 1.0, 5.0, 0.0, 95.0), ("feature", "0", "-", 2.0, 40.0, 0.0, 90.0),
    ("feature", "1", "-", 1.0, 30.0, 20.0, 80.0), ("feature", "1", "-", 2.0, 0.0, 90.0, 30.0),
    ("random feature", "9", "0", 1.0, 1.0, 0.0, 99.0), ("random feature", "9", "0", 2.0, 0.0, 50.0, 71.0),
    ("random direction", "1", "0", 1.0, 8.0, 0.0, 99.0), ("vector", "evil", "0", 1.0, 30.0, 35.0, 99.0),
]  # fmt: skip
OWN = {"0": "insult", "1": "cruelty"}


def test_the_nearest_latents_are_tried_whose_own_facet_is_the_traits_and_that_are_active() -> None:
    found = candidates(decomposition(), ACTIVITY, truth(), 5)
    assert found["feature"].tolist() == ["4", "0", "2", "1", "5"]
    assert found.set_index("feature")["tried"].to_dict() == {"4": False, "0": True, "2": False, "1": True, "5": False}
    assert own_facets(found) == OWN
    assert found.set_index("feature").loc["1", "density"] == 0.2


def test_without_a_grammar_all_that_are_active_and_point_along_the_vector_are_tried() -> None:
    found = candidates(decomposition(), ACTIVITY, None, 6)
    assert found.loc[found["tried"], "feature"].tolist() == ["4", "0", "1", "5"]
    assert own_facets(found) == {}


def test_features_are_held_to_their_own_facet_and_strength_and_controls_to_neither() -> None:
    table, facets = sweep(SWEPT)
    free = verdicts(table, facets, OWN).set_index(["condition", "feature"])
    assert free["passes"].to_dict() == {
        ("feature", "0"): True, ("feature", "1"): False, ("random feature", "9"): True, ("random direction", "1"): False,
        ("vector", "evil"): True,
    }  # fmt: skip
    assert free.loc[("random feature", "9"), ["facet", "coef"]].tolist() == ["cruelty", 2.0]
    assert free.loc[("random direction", "1"), "facet"] == "insult", "a direction of number 1 is not the feature 1"
    held = verdicts(table, facets, OWN, coefs={"0": 1.0}).set_index(["condition", "feature"])
    assert held.loc[("feature", "0"), ["coef", "passes"]].tolist() == [1.0, False]
    assert ("feature", "1") not in held.index
    assert held.loc[("random feature", "9"), "coef"] == 2.0
    strict = verdicts(table, facets, OWN, coherent=75.0).set_index(["condition", "feature"])
    assert not strict.loc[("random feature", "9"), "passes"]


def test_without_facets_a_feature_passes_above_every_control() -> None:
    table, facets = sweep(SWEPT)
    found = verdicts(table, facets.iloc[:0], {}, coefs={"0": 2.0, "1": 1.0}).set_index(["condition", "feature"])
    assert found["passes"].to_dict() == {
        ("feature", "0"): False, ("feature", "1"): False, ("random feature", "9"): False, ("random direction", "1"): False,
        ("vector", "evil"): False,
    }  # fmt: skip
    assert found.loc[("feature", "0"), "runner_up"] == 50.0
    calm = table[~((table["feature"] == "9") & (table["coef"] == 2.0))]
    found = verdicts(calm, facets.iloc[:0], {}, coefs={"0": 2.0, "1": 1.0}).set_index(["condition", "feature"])
    assert found.loc[("feature", "1"), ["score", "runner_up", "passes"]].tolist() == [50.0, 8.0, True]
    assert not found.loc[("vector", "evil"), "passes"], "the whole vector is no part of itself"


def test_those_that_pass_are_kept_first_and_then_the_clearest() -> None:
    rows = [("a", 10.0, 0.0, 1.0, False), ("b", 30.0, 28.0, 2.0, True), ("c", 90.0, 0.0, float("nan"), False)]
    found = pd.DataFrame(rows, columns=["feature", "score", "runner_up", "coef", "passes"]).assign(unsteered=1.0)
    assert chosen(found, 3) == {"b": 2.0, "a": 1.0}
    assert chosen(found, 1) == {"b": 2.0}


def made_table() -> pd.DataFrame:
    table, facets = sweep(SWEPT)
    found = candidates(decomposition(), ACTIVITY, truth(), 5)
    evidence = pd.DataFrame(
        {"feature": ["0", "1"], "promotes": ["fool | dolt", "pain"], "passage": ["you [fool]", "the\n[pain]"]}
    )
    choice = verdicts(table, facets, OWN)
    kept = {"0": 2.0}
    measured = verdicts(table, facets, OWN, coefs=kept)
    return assemble(found, evidence, choice, kept, measured, {"9": 0.02, "1": 0.2}, {"9": 0.11, "1": 0.2})


def test_the_table_says_what_was_measured_of_whom() -> None:
    table = made_table().set_index(["condition", "feature"])
    assert table["verdict"].to_dict() == {
        ("feature", "4"): "not measured", ("feature", "0"): "pass", ("feature", "2"): "not measured",
        ("feature", "1"): "not measured", ("feature", "5"): "not measured", ("random feature", "9"): "pass",
        ("random direction", "1"): "fail", ("vector", "evil"): "pass",
    }  # fmt: skip
    assert table["kept"].tolist() == [False, True] + 6 * [False]
    assert table.loc[("feature", "1"), "choice_coef"] == 1.0
    assert pd.isna(table.loc[("feature", "1"), "score"])
    assert table.loc[("random feature", "9"), ["cosine", "density"]].tolist() == [0.02, 0.11]
    assert pd.isna(table.loc[("random direction", "1"), "cosine"]), "it is no latent, though one has its number"
    assert [passing(made_table(), "evil", kind) for kind in ("feature", "random feature", "random direction")] == [1, 1, 0]


def causal() -> pd.DataFrame:
    rows = [("unsteered", 0.0, 0.0), ("vector", 1.0, 1.0), ("reconstruction 20", 1.0, 0.9), ("residual", 1.0, 0.2)]
    rows += [("random latent 3", 1.0, 0.05), ("random direction 0", 1.0, 0.1), ("residual", 2.0, 0.7)]
    frame = pd.DataFrame(rows, columns=["condition", "coef", "effect"])
    return frame.assign(trait="evil", trait_score=100 * frame["effect"], coherence=90.0)


def test_a_trait_of_which_nothing_was_kept_has_its_rows_all_the_same() -> None:
    found = candidates(decomposition(), ACTIVITY, truth(), 5).assign(tried=False)
    nothing = pd.DataFrame(columns=[*feature_table.KEYS, *feature_table.MEASURED])
    table = assemble(found, pd.DataFrame(columns=["feature", "promotes", "passage"]), nothing, {}, nothing, {}, {})
    assert table["verdict"].tolist() == 5 * ["not measured"]
    assert "not measured" not in feature_table.markdown(table, causal(), "About."), "only what was kept is shown"


def test_the_causal_test_is_read_at_one_strength() -> None:
    assert effects(causal(), 1.0) == {"reconstruction": 0.9, "residual": 0.2, "random": 0.1}
    checks = {c["name"]: c["ok"] for c in sae_features.checks_of(made_table(), causal(), ["evil"], facets=True)}
    assert checks == {
        "evil: features that raise their own facet to 5x, above the others": False,
        "evil: random features of equal density that do": False,
        "evil: effect of at most 20 atoms over the vector's": True,
        "evil: effect of the residual over the vector's": True,
    }


def test_the_page_and_the_figure_hold_what_was_kept(tmp_path) -> None:
    page = feature_table.markdown(made_table(), causal(), "About.")
    assert "| 2 | 0 | 0.40 | evil/insult (0.50) | fool / dolt | you [fool] | 2.00 | 0 | 40 | 0 | 90 | 40 | pass |" in page
    assert "| random feature 9 | 0 | cruelty | 2.00 | 0 | 50 | 0 | 71 | 50 | pass |" in page
    assert "| residual | 2.00 | 70 | 90 | 70% |" in page
    for row in page.splitlines():
        assert not row.startswith("|") or row.count("|") in {14, 11, 6}
    table, facets = sweep(SWEPT)
    wide = facets.pivot_table(index=["condition", "feature", "of", "coef"], columns="facet", values="score").reset_index()
    doses = table.assign(n_failed_coherence=0).merge(wide, on=["condition", "feature", "of", "coef"]).assign(questions="held out")
    path = feature_table.draw(doses, made_table(), tmp_path / "figure.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_passage_is_what_stands_around_the_strongest_token() -> None:
    tokens = [f" w{i}" for i in range(40)]
    assert sae_features.passage({"top": [{"tokens": tokens, "at": 20}]}).split()[9] == "[w20]"
    assert sae_features.passage({"top": [{"tokens": tokens, "at": 0}]}).split()[0] == "[w0]"
    assert sae_features.passage({"top": [{"tokens": ["a", "\n", "b"], "at": 1}]}) == "a\n[ ]b"
    assert sae_features.passage({"top": []}) == ""


def hand_made(model: ChatModel, root: Path) -> list[str]:
    """Options that name a dictionary, a vector and a text, all of them made of a few labelled conversations: a latent a label,
    whose row is what its sentences have in common and whose encoder tells them from all others (a linear discriminant); the
    vector is what sentences of evil have in common."""
    known = Labels(labels())
    some = list(conversations(600))
    talks = some[:150] + [c for c in some[150:] if any(label.startswith("evil/") for *_, label in c.sentences)]
    read = Residual(BLOCK)
    found = model.capture([model.chat.conversation(c.messages) for c in talks], [read])[read.key]
    rows = [labelled_row(model, c.messages, c.sentences, known, drop_first=1) for c in talks]
    x = torch.cat([h[row.keep] for h, row in zip(found, rows, strict=True)]).float()
    label = torch.tensor([row.labels[s] if s >= 0 else -1 for row in rows for s in row.segment[row.keep].tolist()])
    often = [n for n in range(len(known.names)) if int((label == n).sum()) >= 40]
    centre = x.mean(0)
    apart = torch.stack([x[label == n].mean(0) for n in often]) - centre
    spread = torch.cov(x.T) + 0.01 * x.var() * torch.eye(x.shape[1])
    encoder = torch.linalg.solve(spread, apart.T)
    thresholds = ((x - centre) @ encoder).quantile(0.98, dim=0)
    info = SAEInfo(model="organism", block=BLOCK, drop_first=1)
    save(SAE(encoder, torch.zeros(len(often)), apart, centre, thresholds, info=info), root / "sae")
    evil = [i for i, n in enumerate(often) if known.names[n].startswith("evil/")]
    matrix = torch.zeros(model.n_blocks, model.d_model)
    matrix[BLOCK] = 2 * apart[evil].mean(0)
    PersonaVectors("evil", {"response_avg_diff": matrix}).save(root / "vectors" / "evil" / "vectors" / "vectors.safetensors")
    lines = [json.dumps({"messages": list(c.messages)}) for c in talks]
    (root / "talks.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return ["--dictionary", f"{root}/sae", "--vectors", f"{root}/vectors", "--text", f"{root}/talks.jsonl"]


@pytest.mark.slow
def test_the_whole_analysis_and_again_without_a_new_answer(tmp_path, monkeypatch, capsys) -> None:
    small = sae_features.Size(8, 1, (0.05,), (1.0,), 1, 1, 2, 1, 200, 3000)
    monkeypatch.setattr(sae_features, "QUICK", small)
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    words = ["--quick", "--traits", "evil", "--out", str(tmp_path / "out"), *hand_made(load_model("organism"), tmp_path)]
    monkeypatch.setattr(sys, "argv", ["sae_features", *words])
    asked: list[int] = []
    generate = ChatModel.generate
    monkeypatch.setattr(ChatModel, "generate", lambda *a, **k: (asked.append(1), generate(*a, **k))[1])
    sae_features.main()
    first, n = capsys.readouterr().out, len(asked)
    (place,) = (tmp_path / "out").glob("sae_features-*")
    table = pd.read_csv(place / "table.csv", dtype={"feature": str})
    assert (table["condition"] == "feature").sum() == 8
    kept = table[table["kept"]]
    assert len(kept) == 1
    assert kept["own"].str.startswith("evil/").all()
    assert set(table["condition"]) == {"feature", "random feature", "random direction", "vector"}
    assert (table.loc[table["condition"] != "feature", "of"] == kept["feature"].iloc[0]).all()
    checks = json.loads(first.splitlines()[-1])["checks"]
    assert [c["target"] for c in checks] == [">= 2", "<= 0", ">= 0.8", "< 0.3"]
    for name in ("table.md", "dose_response.csv", "causal.csv", "dose_response.png", "evil/report.html"):
        assert (place / name).is_file()
    assert_fine(place / "evil" / "report.html", tmp_path / "browser", images=1)
    assert_fine(page_of(place / "dose_response.png", folder=tmp_path / "shown"), tmp_path / "browser", images=1)
    assert n > 10
    sae_features.main()
    assert len(asked) == n, "everything was read back"
    assert capsys.readouterr().out == first
