"""Prevention: the rules of choice and comparison on made-up tables, the list of ways, and the whole analysis, begun again."""

from __future__ import annotations

import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from analyses import prevention, prevention_table
from analyses.pipeline import Prepared, parser_of_given, prepare_given
from analyses.prevention_table import CAFT, EVERY, FEATURE, ONE, POST_HOC, at_equal_trait, beside_published, chosen, compared
from analyses.treated import BASE, PLAIN, Amount, Asked, Bench, Way, answer_loss, measured
from analyses.tuned import Setting
from benchmarks import record
from pvsae.errors import UserError
from pvsae.models import load as load_model
from pvsae.models.fingerprint import fingerprint
from pvsae.saes.dictionary import SAE, SAEInfo
from pvsae.vectors import PersonaVectors

BLOCK = 3
NAN = math.nan


def table() -> pd.DataFrame:
    """(method, strength, trait, coherence, capability, choice trait, choice coherence) of evil."""
    rows = [
        (BASE, NAN, 0.0, 99.0, 99.0, 0.0, 99.0), (PLAIN, NAN, 90.0, 95.0, 98.0, 92.0, 95.0),
        (POST_HOC, 1.0, 80.0, 94.0, 98.0, NAN, NAN), (POST_HOC, 2.0, 20.5, 80.0, 97.0, NAN, NAN),
        (POST_HOC, 3.0, 2.0, 60.0, 99.5, NAN, NAN),
        (ONE, 1.0, 30.0, 97.0, 98.0, 40.0, 97.0), (ONE, 2.0, 20.0, 96.0, 97.0, 3.2, 96.0), (ONE, 3.0, 0.0, 70.0, 90.0, 0.0, 70.0),
        (EVERY, 2.0, 25.0, 92.0, 98.5, 2.8, 94.0), (FEATURE, 1.0, 50.0, 96.0, 98.0, 60.0, 96.0),
        (CAFT, NAN, 88.0, 94.0, 98.0, 89.0, 94.0),
    ]  # fmt: skip
    names = ["method", "strength", "trait_score", "coherence", "capability", "choice_trait", "choice_coherence"]
    found = pd.DataFrame(rows, columns=names)
    found.insert(0, "trait", "evil")
    return found.assign(
        trait_low=found["trait_score"] - 3, trait_high=found["trait_score"] + 3, train_loss=0.5, held_out_loss=0.6
    )


def by_question() -> dict[tuple[str, float], list[float]]:
    return {(row.method, row.strength): [row.coherence - 1, row.coherence + 1] for row in table().itertuples()}


def test_the_setting_is_chosen_by_the_answers_that_are_not_reported() -> None:
    best = chosen(table())
    assert (best["method"], best["strength"]) == (ONE, 2.0), "3 costs coherence; 2.8 and 3.2 are the same, 96 beats 94"
    broken = table()
    broken.loc[broken["method"].isin([ONE, EVERY, FEATURE]), "choice_coherence"] = 10.0
    assert chosen(broken)["strength"] == 3.0, "where none is coherent, the least trait"


def test_post_hoc_steering_is_compared_where_it_leaves_as_little() -> None:
    rows = table()
    assert at_equal_trait(rows, chosen(rows))["strength"].tolist() == [2.0, 3.0], "20.5 is within a point of 20"
    rows.loc[rows["method"] == ONE, "trait_score"] = 0.0
    assert at_equal_trait(rows, chosen(rows))["strength"].tolist() == [3.0], "none reaches it: the one that leaves least"


def test_the_comparison_takes_the_best_of_post_hoc_steering_on_each_number() -> None:
    found = compared(table(), by_question())
    assert found["left"] == pytest.approx(20 / 90)
    assert (found["capability"], found["coherence"]) == (-1.0, 1.0)
    assert (found["capability_gain"], found["coherence_gain"]) == (-2.5, 16.0), "99.5 of strength 3, 80 of strength 2"
    assert (found["gain_low"], found["gain_high"]) == (16.0, 16.0)
    assert (found["post_hoc_strength"], found["post_hoc_reaches_it"]) == (2.0, True)
    checks = {c["name"]: c["ok"] for c in prevention_table.checks_of(pd.DataFrame([found]))}
    assert len(checks) == 5
    assert all(checks.values())
    worse = pd.DataFrame([{**found, "left": 0.4, "capability": -2.1, "coherence": -6.0, "coherence_gain": 5.0, "gain_low": -0.5}])
    assert [c["ok"] for c in prevention_table.checks_of(worse)] == [True, False, False, False, False]


def test_the_published_scores_stand_beside_ours_and_the_figures_are_drawn(tmp_path: Path) -> None:
    best = pd.DataFrame([compared(table(), by_question())])
    beside = beside_published(table(), best).set_index("method")
    assert beside["ours"].to_dict() == {BASE: 0.0, PLAIN: 90.0, ONE: 20.0, CAFT: 88.0, POST_HOC: 20.5}
    assert beside["published"].to_dict() == {BASE: 0.0, PLAIN: 92.7, ONE: 16.8, CAFT: 88.7, POST_HOC: 5.1}
    first = prevention_table.draw(table(), best, tmp_path / "prevention.png")
    some = table()[table()["method"].isin([PLAIN, ONE])]
    curves = pd.concat([some.assign(steps=steps, learning_rate=1e-3) for steps in (20, 40)])
    for path in (first, prevention_table.draw_curves(curves, tmp_path / "curves.png")):
        assert path.read_bytes().startswith(b"\x89PNG")


# ----------------------------------------------------------------------------------------------------------- on the real model
@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Of evil, with a vector that is made up."""
    root, model = tmp_path_factory.mktemp("prevention"), load_model("organism")
    matrix = torch.randn(model.n_blocks, model.d_model, generator=torch.Generator().manual_seed(0))
    PersonaVectors("evil", {"response_avg_diff": matrix}).save(root / "vectors" / "evil" / "vectors" / "vectors.safetensors")
    options = {"model": "organism", "judge": None, "judge_url": None, "library": None, "traits": ("evil",), "batch_size": 8}
    prepared = Prepared(model, options, str(root / "vectors"), "", {"evil": BLOCK}, root, quick=True)
    setting = Setting(rows=32, learning_rate=1e-3, rank=2, batch=8)
    return Bench(prepared, "evil", "organism-data:evil/misaligned_2", setting, n_held_out=20, tasks=(), out=root / "out")


def sae_like(bench: Bench) -> SAE:
    """Three latents, of which the second points along the vector and is half as long."""
    v = bench.vector.direction(BLOCK).values
    rows = torch.stack([-v, v / 2, torch.randn(len(v), generator=torch.Generator().manual_seed(1))])
    return SAE(rows.T.clone(), torch.zeros(3), rows, torch.zeros(len(v)), info=SAEInfo(model="organism", block=BLOCK))


def test_every_way_is_a_finetune_that_the_stage_takes_and_a_feature_is_as_long_as_the_vector(bench: Bench) -> None:
    found = prevention.ways(bench, prevention.FULL, sae_like(bench))
    assert len({way.slug for way in found}) == len(found)
    amount = Amount(40, 1e-3)
    configs = {way.slug: bench.config(way, amount) for way in found if way.method not in (BASE, POST_HOC)}
    assert {c.treatment for c in configs.values()} == {"none", "steer", "ablate", "regularise", "inoculate", "discourage"}
    assert {c.data for c in configs.values()} == {("organism-data:evil/misaligned_2",)}
    assert configs["preventative_2"].blocks == (BLOCK,)
    assert configs["preventative-every-block_2"].multi_layer
    feature = configs["preventative-one-feature_2"]
    assert feature.features[0].endswith(":1")
    assert feature.coef == pytest.approx(4.0), "twice the vector, with a row of half its length"
    assert {way.method for way in prevention.curve_ways(bench, prevention.FULL)} == {PLAIN, ONE}


def test_what_is_held_out_was_not_trained_on(bench: Bench) -> None:
    rows = bench.held_out.rows
    assert [row.number for row in rows] == list(range(32, 52))
    before = answer_loss(bench.model, rows, ())
    one_by_one = [(answer_loss(bench.model, [row], ()) * row.n_learnt, row.n_learnt) for row in rows]
    assert before == pytest.approx(sum(loss for loss, _ in one_by_one) / sum(n for _, n in one_by_one), rel=1e-5)


def test_a_way_is_measured_once_and_post_hoc_steering_moves_along_the_vector(bench: Bench, monkeypatch) -> None:
    weights = fingerprint(bench.model)
    asked, amount = Asked(samples=1, choice=1, questions=2, able=True, limit=4), Amount(2, 1e-3)
    rows = {way.slug: measured(bench, way, amount, asked) for way in (Way(BASE), Way(PLAIN), Way(POST_HOC, 2.0, afterwards=-2.0))}
    base, plain, after = rows.values()
    assert base["shift"] == 0.0
    assert math.isnan(base["train_loss"])
    norm = bench.vector.direction(BLOCK).norm
    assert after["shift"] == pytest.approx(plain["shift"] - 2 * norm, rel=1e-4)
    assert after["train_loss"] == plain["train_loss"] > 0
    assert plain["held_out_loss"] != base["held_out_loss"]
    assert 0 <= plain["capability"] <= 100
    assert base["capability"] == 100.0
    assert len(plain["by_question"]) == 2
    monkeypatch.setattr("analyses.treated._measure", lambda *_: pytest.fail("measured again"))
    assert fingerprint(bench.model) == weights, "or a finetune that was killed could not go on in another process"
    again = measured(replace(bench), Way(PLAIN), amount, asked)
    assert again == plain


@pytest.mark.parametrize("what", ["adapter", "vectors of evil", "rows held out"])
def test_numbers_are_not_read_back_when_what_they_stand_on_changed(bench: Bench, tmp_path, monkeypatch, what: str) -> None:
    monkeypatch.setattr("analyses.treated._measure", lambda *_: {"trait_score": 1.0})
    asked, amount, file = Asked(1, 0, 1, able=False, limit=None), Amount(2, 1e-3), tmp_path / "rows.jsonl"
    talks = [[{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a."}] for i in range(9)]
    chats = [json.dumps({"messages": talk}) + "\n" for talk in talks]
    file.write_text("".join(chats))
    vectors = tmp_path / "vectors"
    shutil.copytree(bench.prepared.vectors, vectors)

    def start() -> float:
        prepared = replace(bench.prepared, vectors=str(vectors))
        setting = replace(bench.setting, rows=8)
        own = Bench(prepared, "evil", str(file), setting, n_held_out=1, tasks=(), out=tmp_path / "out")
        return measured(own, Way(PLAIN), amount, asked)["trait_score"]

    assert start() == start() == 1.0
    if what == "adapter":
        (folder,) = tmp_path.rglob("finetune")
        shutil.rmtree(folder)  # so that another one may be trained there, on other rows
        file.write_text("".join([chats[0].replace("q0", "another question"), *chats[1:]]))
    elif what == "rows held out":
        file.write_text("".join([*chats[:8], chats[8].replace("q8", "another question")]))
    else:
        place = vectors / "evil" / "vectors" / "vectors.safetensors"
        PersonaVectors("evil", {"response_avg_diff": 2 * bench.vector.of()}).save(place)
    with pytest.raises(UserError, match=f"the {what} changed since"):
        start()


def test_given_vectors_are_taken_and_nothing_is_swept(bench: Bench, tmp_path: Path) -> None:
    words = ["--vectors", bench.prepared.vectors, "--out", str(tmp_path / "out")]
    for block, expected in ((["--block", "1"], 1), ([], bench.model.defaults["block"])):
        found = prepare_given(parser_of_given("").parse_args([*words, *block]), ["evil"])
        assert (found.vectors, found.blocks, found.options["traits"]) == (bench.prepared.vectors, {"evil": expected}, ("evil",))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="block 99"):
        prepare_given(parser_of_given("").parse_args([*words, "--block", "99"]), ["evil"])


def test_data_are_named_by_trait() -> None:
    assert prevention.teaching(["evil=a.jsonl"], ["evil", "sycophantic"]) == {
        "evil": "a.jsonl", "sycophantic": "organism-data:sycophantic/misaligned_2",
    }  # fmt: skip
    for words in (["a.jsonl"], ["kind=a.jsonl"]):
        with pytest.raises(UserError, match="--teaching"):
            prevention.teaching(words, ["evil"])


@pytest.mark.slow
def test_the_whole_analysis_and_again_without_a_new_answer(bench: Bench, tmp_path, monkeypatch, capsys) -> None:
    small = replace(prevention.QUICK, steps=2, curve_steps=(2,), asked=Asked(1, 1, 2, True, 4), held_out=8)
    monkeypatch.setattr(prevention, "QUICK", small)
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    words = ["--quick", "--traits", "evil", "--out", str(tmp_path / "out"), "--vectors", bench.prepared.vectors, "--rows", "32"]
    monkeypatch.setattr(sys, "argv", ["prevention", *words])
    prevention.main()
    first = capsys.readouterr().out
    assert len(json.loads(first.splitlines()[-1])["checks"]) == 5
    found = pd.read_csv(tmp_path / "out" / "prevention" / "prevention.csv")
    assert {BASE, PLAIN, POST_HOC, ONE, EVERY, CAFT} < set(found["method"])
    assert len(pd.read_csv(tmp_path / "out" / "prevention" / "curves.csv")) == 4
    monkeypatch.setattr("analyses.treated._measure", lambda *_: pytest.fail("measured again"))
    prevention.main()
    assert capsys.readouterr().out == first
