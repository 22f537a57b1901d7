"""The stage around a decomposition: its tables, what it refuses, going on after a stop, the causal test, an official file."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pandas as pd
import pytest
import torch
from byte_judge import ByteJudge

from pvsae.errors import UserError
from pvsae.models import ChatModel
from pvsae.reports import draw, write_report
from pvsae.saes.dictionary import SAE, SAEInfo
from pvsae.saes.folders import load, save
from pvsae.saes.pursuit import Atoms, pursue
from pvsae.stages import DecomposeConfig, ExtractConfig, decompose, extract
from pvsae.stages.causal import parts_of, with_effects
from pvsae.stages.readings import Inputs
from pvsae.vectors import PersonaVectors
from tests.browser import assert_fine
from tests.saes.small import make_sae

BLOCK = 1
OFFICIAL = "data/vectors/qwen3-4b_sycophantic_response_avg_diff.pt"


@pytest.fixture(scope="module")
def extracted(tmp_path_factory, tiny_models, stage_library):
    path = tmp_path_factory.mktemp("decompose") / "extract"
    options = {"n_samples": 3, "max_instructions": 2, "max_new_tokens": 6, "max_questions": 6, "seed": 3}
    config = ExtractConfig(model="tiny", library=str(stage_library), threshold=10.0, **options)
    extract.run(config, path, model=tiny_models("qwen2"), judge=ByteJudge())
    return path


def dictionary(folder, model, /, *planted: torch.Tensor, **info) -> str:
    """A random dictionary of 96 latents, whose first rows are the planted directions."""
    sae = make_sae(3, d_model=model.d_model, d_sae=96, threshold=1.0)
    rows = sae.W_dec.clone()
    for i, direction in enumerate(planted):
        rows[i] = torch.nn.functional.normalize(direction, dim=0)
    made = SAE(rows.T, sae.b_enc, rows, sae.b_dec, sae.threshold, info=SAEInfo(**{"model": "qwen2", "block": BLOCK, **info}))
    save(made, folder)
    return str(folder)


@pytest.fixture
def made(tmp_path, extracted, tiny_models):
    model = tiny_models("qwen2")
    gloomy, chatty = (
        PersonaVectors.load(extracted / name / "vectors" / "vectors.safetensors").of()[BLOCK] for name in ("gloomy", "chatty")
    )
    folder = dictionary(tmp_path / "sae", model, gloomy, chatty)
    return model, DecomposeConfig(vectors=str(extracted), dictionary=folder, traits=("gloomy",), top=10, k=12, n_shuffles=30)


def vector_of(config) -> torch.Tensor:
    return PersonaVectors.load(f"{config.vectors}/gloomy/vectors/vectors.safetensors").of()[BLOCK]


def test_every_part_stands_in_the_tables_and_on_the_page(made, tmp_path):
    model, config = made
    result = decompose.run(config, tmp_path / "run", model=model)
    assert set(result.tables) == {
        "decomposition", "curve", "pursuit", "specificity", "encodings", "encoded", "agreement", "nulls", "lengths"
    }  # fmt: skip
    table = result.table.set_index("latent")
    assert table.loc[0, "cosine"] == pytest.approx(1, abs=1e-4), "the vector itself is the first row"
    assert table.loc[0, "rank"] == 1
    assert bool(table.loc[0, "beyond_null"])
    assert table.loc[0, "own_null"] < 1
    assert table["rank_from_below"].min() == 1
    curve = result.tables["curve"]
    assert set(curve["vector"]) == {"vector", "random direction", "shuffled pairs"}
    assert set(curve["k"]) == {1, 2, 5, 10, 12}
    assert curve[(curve["vector"] == "vector") & (curve["k"] == 1)]["explained"].min() == pytest.approx(1, abs=1e-4)
    null = curve[(curve["vector"] == "random direction") & (curve["k"] == 12)]
    assert null["explained"].max() < 1
    assert set(null["draws"]) == {10}, "one direction alone is no null"
    assert (null["explained_95"] > null["explained"]).all()
    atoms = Atoms(load(config.dictionary).W_dec)
    drawn = Inputs("gloomy", vector_of(config), {}, None, None, 10, 12, config.seed).random(10)
    shares = [pursue(atoms, v, 12, nonnegative=False).at_most(12).explained for v in drawn]
    assert null[null["mode"] == "signed"]["explained"].iloc[0] == pytest.approx(sum(shares) / 10, rel=1e-4)
    specificity = result.tables["specificity"].set_index(["latent", "for"])
    assert specificity.loc[(0, "gloomy"), "rank"] == 1
    assert set(result.tables["nulls"]["null"]) == {"analytic", "random directions", "shuffled pairs"}
    lengths = result.tables["lengths"].iloc[0]
    assert lengths["ratio"] == pytest.approx(lengths["length"] / lengths["median_residual"])
    assert len(result.tables["agreement"]) == 10
    assert [p.stem for p in draw(tmp_path / "run")] == ["decomposition"]
    page = write_report(tmp_path / "run").read_text()
    for said in ("2411.08790", "highest cosine", "shuffled pairs", "length over the median residual"):
        assert said in page


def test_both_traits_and_the_vector_of_the_other_is_not_specific(made, tmp_path):
    model, config = made
    result = decompose.run(replace(config, traits=()), tmp_path / "run", model=model)
    assert set(result.table["trait"]) == {"gloomy", "chatty"}
    found = result.tables["specificity"]
    own = found[(found["trait"] == "chatty") & (found["for"] == "chatty") & (found["rank"] == 1)]
    assert own["latent"].tolist() == [1]


def test_a_finished_run_is_read_back_and_other_arrays_are_refused(made, tmp_path, monkeypatch):
    model, config = made
    first = decompose.run(config, tmp_path / "run", model=model)

    def again(*args):
        raise AssertionError("computed twice")

    monkeypatch.setattr(decompose, "read", again)
    monkeypatch.setattr(decompose, "_encodings", again)
    second = decompose.run(replace(config, batch_tokens=100), tmp_path / "run", model=model)
    for name, table in first.tables.items():
        pd.testing.assert_frame_equal(table, second.tables[name], check_dtype=False)
    dictionary(tmp_path / "sae", model, torch.randn(model.d_model, generator=torch.Generator().manual_seed(9)))
    with pytest.raises(UserError, match="changed since"):
        decompose.run(config, tmp_path / "run", model=model)


def test_without_activations_no_model_is_asked_for(made, tmp_path):
    _, config = made
    result = decompose.run(replace(config, activations=False), tmp_path / "run")
    assert "encodings" not in result.tables
    assert set(result.tables["nulls"]["null"]) == {"analytic", "random directions"}
    assert draw(tmp_path / "run")
    torch_table = result.table.set_index("latent")
    assert torch_table.loc[0, "rank"] == 1
    assert "no answers are read" in str(decompose.plan(replace(config, activations=False)))


def test_what_does_not_fit_is_refused_with_the_reason(made, tmp_path):
    model, config = made
    cases = {
        "have d_model 48, .* has 12": {"dictionary": str(save(make_sae(), tmp_path / "narrow"))},
        "belongs to block 1, the vector is asked for at block 2": {"block": 2},
        "layer 0 is no block's output": {"layer": 0},
        "both block 1 and layer 2": {"block": 1, "layer": 2},
        "reads hook_mlp_out": {"dictionary": dictionary(tmp_path / "mlp", model, site="hook_mlp_out")},
        "are of .*qwen2, .* is of other/model": {"dictionary": dictionary(tmp_path / "other", model, model="other/model")},
        "does not say which block": {"dictionary": dictionary(tmp_path / "nowhere", model, block=None)},
        "there is no dictionary": {"dictionary": str(tmp_path / "nothing")},
        "no vectors of 'cheerful'": {"traits": ("cheerful",)},
        "block 9 does not exist": {"dictionary": dictionary(tmp_path / "high", model, block=9)},
    }
    for i, (message, change) in enumerate(cases.items()):
        with pytest.raises(UserError, match=message):
            decompose.run(replace(config, **change), tmp_path / f"run{i}", model=model)
        with pytest.raises(UserError, match=message):
            decompose.plan(replace(config, **change))
    other = replace(config, dictionary=str(tmp_path / "other"), other_model=True, activations=False)
    assert any("Two models" in note for note in decompose.run(other, tmp_path / "same").notes)
    assert decompose.run(replace(config, layer=2, activations=False), tmp_path / "layer").table["rank"].min() == 1


def test_answers_of_another_model_do_not_give_the_vector(made, tmp_path, tiny_models):
    _, config = made
    with pytest.raises(UserError, match=r"is of qwen2, the model is .*llama"):
        decompose.run(config, tmp_path / "run", model=tiny_models("llama"))
    silent = replace(config, dictionary=dictionary(tmp_path / "silent", tiny_models("llama"), model=None))
    with pytest.raises(UserError, match="give a vector of cosine"):
        decompose.run(silent, tmp_path / "run", model=tiny_models("llama"))


def test_a_dictionary_of_scaled_activations_is_recognised(tmp_path):
    """Unexplained variance as measured, and with activations scaled first, decide."""
    from pvsae.saes.encodings import Encodings
    from pvsae.stages.matching import check_scale, open_dictionary

    def measured(fvu: float, scaled: dict[float, float]) -> Encodings:
        nothing = torch.zeros(2, 1, 40)
        return Encodings(nothing, nothing[:, 0], nothing[0, 0], torch.zeros(2, 1, 12), (1, 1), 0, 30.0, fvu, {1.0: fvu, **scaled})

    sae = make_sae()
    assert check_scale(measured(0.3, {0.115: 5.0, 1.4: 0.2}), sae) == [], "a little better at another scale is no proof"
    with pytest.raises(UserError, match=r"(?s)3 of the variance.*unexplained, and 0.2.*multiplied by 0.115.*--scale 0.115"):
        check_scale(measured(3.0, {0.115: 0.2, 0.7: 1.1}), sae)
    with pytest.raises(UserError, match=r"0.12 of .* and 0.04 once they are multiplied by 1.4"):
        check_scale(measured(0.12, {1.4: 0.04}), sae)
    (note,) = check_scale(measured(0.12, {1.4: 0.04}), sae, given=1.0)
    assert "scale 1 was given" in note, "the user's word counts, with a note"
    assert check_scale(measured(1.0, {1.4: 2.0}), sae) == []
    assert "can be trusted" in "".join(check_scale(measured(3.0, {0.125: 0.99}), sae)), "silence is no explanation"
    save(sae, tmp_path / "sae")
    x = torch.randn(5, 12)
    given = open_dictionary(str(tmp_path / "sae"), 0.5)
    torch.testing.assert_close(given.encode(x), sae.encode(0.5 * x) / 0.5)


# ---------------------------------------------------------------------------------------------------------------- causal test
def test_parts_are_what_they_are_called():
    sae = make_sae(d_model=32, d_sae=200)
    atoms, v = Atoms(sae.W_dec), 5 * torch.randn(32, generator=torch.Generator().manual_seed(8))
    solution = pursue(atoms, v, 6, nonnegative=False).at_most(6)
    parts = {p.name: p.values for p in parts_of(v, atoms, solution, [(3, 0.5), (4, -0.5)], alive=range(200), n_random=2, seed=0)}
    assert list(parts)[:5] == ["vector", "reconstruction 6", "residual", "latent 3", "latent 4"]
    assert sum(name.startswith("random latent") for name in parts) == 2
    assert sum(name.startswith("random direction") for name in parts) == 2
    for name, values in parts.items():
        if not name.startswith("reconstruction"):
            assert float(values.norm()) == pytest.approx(float(v.norm()), rel=1e-5)
    rest = v - parts["reconstruction 6"]
    assert float(torch.cosine_similarity(rest, parts["residual"], dim=0)) == pytest.approx(1, abs=1e-5)
    assert float(parts["reconstruction 6"].norm() / v.norm()) ** 2 == pytest.approx(solution.explained, abs=1e-5)
    assert float(parts["latent 4"] @ sae.W_dec[4]) < 0 < float(parts["latent 3"] @ sae.W_dec[3])


def test_effects_are_shares_of_what_the_vector_does():
    rows = [
        ("unsteered", 0.0, 10.0),
        ("vector", 1.0, 50.0),
        ("vector", 2.0, 90.0),
        ("residual", 1.0, 20.0),
        ("residual", 2.0, 10),
    ]
    table = with_effects(pd.DataFrame(rows, columns=["condition", "coef", "trait_score"]))
    assert table["effect"].tolist()[1:] == [1.0, 1.0, 0.25, 0.0]
    flat = with_effects(pd.DataFrame([("unsteered", 0.0, 10.0), ("vector", 1.0, 10.2)], columns=list(table)[:3]))
    assert flat["effect"].isna().all(), "a vector without effect has no share"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coefs": (1.0, 1.0)}, "each strength once"),
        ({"coefs": (1.0, float("nan"))}, "finite strengths"),
        ({"coefs": (float("inf"),)}, "finite strengths"),
        ({"n_features": -1}, "n_features is -1"),
        ({"n_random": -1}, "n_random is -1"),
        ({"scale": 0.0}, "scale is 0.0"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_read(change, message) -> None:
    with pytest.raises(UserError, match=message):
        DecomposeConfig(vectors="v", dictionary="d", causal=True, **change)


def test_the_causal_test_steers_with_every_part_and_goes_on(made, tmp_path, stage_library):
    model, config = made
    setup = replace(
        config, causal=True, coefs=(1.0,), n_features=2, n_random=1, max_questions=2, max_new_tokens=4, library=str(stage_library)
    )
    judge = ByteJudge()
    result = decompose.run(setup, tmp_path / "run", model=model, judge=judge)
    causal = result.tables["causal"]
    names = [name.rstrip("0123456789 ") for name in causal["condition"]]
    assert names == ["unsteered", "vector", "reconstruction", "latent", "latent", "random latent", "random direction"]
    assert causal["length"].iloc[1] == pytest.approx(causal["length"].iloc[3], rel=1e-4)
    assert judge.asked == 2 * 2 * len(causal)
    again = decompose.run(setup, tmp_path / "run", model=model, judge=judge)
    assert judge.asked == 2 * 2 * len(causal), "conditions are steps, and done once"
    pd.testing.assert_series_equal(again.tables["causal"]["trait_score"], causal["trait_score"])
    assert [p.stem for p in draw(tmp_path / "run")] == ["decomposition", "causal"]
    write_report(tmp_path / "run")
    planned = decompose.plan(replace(setup, model="organism")).answers
    assert planned is not None
    assert planned.answers == {"gloomy": 2 * (1 + 3 + 2 + 2)}, "the residual too, which a planted vector does not have"


def test_what_a_reconstruction_leaves_steers_at_the_vectors_length(made, tmp_path, stage_library, monkeypatch):
    """A vector that no latent is: two atoms leave a part of it, which is added like any other."""
    model, config = made
    setup = replace(
        config, dictionary=dictionary(tmp_path / "plain", model), causal=True, coefs=(1.0,), atoms=2, n_features=0, n_random=0,
        max_questions=2, max_new_tokens=6, library=str(stage_library),
    )  # fmt: skip
    edits, generate = [], ChatModel.generate

    def watched(*args, **options):
        edits.append(options.get("interventions", ()))
        return generate(*args, **options)

    monkeypatch.setattr(ChatModel, "generate", watched)
    causal = decompose.run(setup, tmp_path / "run", model=model, judge=ByteJudge()).tables["causal"].set_index("condition")
    assert list(causal.index) == ["unsteered", "vector", "reconstruction 2", "residual"]
    assert causal.loc["residual", "length"] == pytest.approx(causal.loc["vector", "length"], rel=1e-4)
    v, atoms = vector_of(config), Atoms(load(setup.dictionary).W_dec)
    solution = pursue(atoms, v, 2, nonnegative=False).at_most(2)
    rest = v.double() - torch.tensor(solution.weights, dtype=torch.float64) @ atoms.unit(solution.latents)
    (edit,) = edits[-1]
    added = edit.direction.values.double() * edit.coef
    torch.testing.assert_close(added, rest * (v.norm() / rest.norm()), atol=1e-4, rtol=1e-3)


# -------------------------------------------------------------------------------------------------------------- official files
def test_an_official_file_of_qwen3_runs_at_the_block_that_its_row_names(shared, tmp_path):
    """Row 20 of the file, hidden_states[20], is the output of block 19: planted as row 5 of a random dictionary, it is found."""
    raw = torch.load(shared / OFFICIAL, weights_only=True)
    d_model = raw.shape[1]
    sae = make_sae(0, d_model=d_model, d_sae=300)
    rows = sae.W_dec.clone()
    rows[5] = raw[20] / raw[20].norm()
    info = SAEInfo(model="Qwen/Qwen3-4B", block=19)
    save(SAE(rows.T, sae.b_enc, rows, sae.b_dec, 0.5, info=info), tmp_path / "sae")
    config = DecomposeConfig(vectors=str(shared / OFFICIAL), dictionary=str(tmp_path / "sae"), model="Qwen/Qwen3-4B", k=5)
    for i, place in enumerate(({}, {"layer": 20}, {"block": 19})):
        result = decompose.run(replace(config, **place), tmp_path / f"run{i}")
        best = result.table.sort_values("rank").iloc[0]
        assert (best["latent"], best["cosine"]) == (5, pytest.approx(1, abs=1e-5))
        assert result.tables["lengths"]["length"].iloc[0] == pytest.approx(float(raw[20].norm()))
    assert write_report(tmp_path / "run0").is_file()
    for message, change in {
        "belongs to block 19, the vector is asked for at block 20": {"block": 20},
        "belongs to block 19, the vector is asked for at block 18": {"layer": 19},
        "layer 0 is no block's output": {"layer": 0},
    }.items():
        with pytest.raises(UserError, match=message):
            decompose.run(replace(config, **change), tmp_path / "wrong")
    last = str(save(sae.with_info(model=None, block=35), tmp_path / "last"))
    with pytest.raises(UserError, match="after the final norm"):
        decompose.run(replace(config, dictionary=last), tmp_path / "wrong")
    wide = str(save(make_sae(0, d_model=3584, d_sae=50).with_info(model=None, block=19), tmp_path / "wide"))
    with pytest.raises(UserError, match=r"d_model 2560.*3584"):
        decompose.run(replace(config, dictionary=wide), tmp_path / "wrong")


def test_official_files_beside_each_other_are_known_traits(made, tmp_path, extracted):
    from pvsae.vectors import write_official

    _, config = made
    folder = tmp_path / "official"
    for name in ("gloomy", "chatty"):
        write_official(PersonaVectors.load(extracted / name / "vectors" / "vectors.safetensors"), folder)
    shutil.copytree(config.dictionary, tmp_path / "unnamed")
    file = tmp_path / "unnamed" / "cfg.json"
    file.write_text(json.dumps(json.loads(file.read_text())))
    setup = replace(config, vectors=str(folder / "gloomy_response_avg_diff.pt"), traits=())
    result = decompose.run(setup, tmp_path / "run")
    assert set(result.tables["specificity"]["for"]) == {"gloomy", "chatty"}
    assert any("does not say which model" in note for note in result.notes)


def test_another_file_of_the_same_trait_is_compared_and_does_not_take_its_place(made, tmp_path, extracted):
    """Two extractions of one trait: the one that was given is decomposed, the other stands beside it under its file's name."""
    _, config = made
    chatty = PersonaVectors.load(extracted / "chatty" / "vectors" / "vectors.safetensors")
    other = tmp_path / "again.safetensors"
    PersonaVectors("gloomy", chatty.vectors, chatty.meta).save(other)
    setup = replace(config, others=(str(other),), activations=False)
    result = decompose.run(setup, tmp_path / "run")
    table = result.table.set_index("latent")
    assert table.loc[0, "rank"] == 1, "row 0 is the given gloomy, row 1 what the other file calls gloomy"
    assert table.loc[0, "cosine"] == pytest.approx(1, abs=1e-4)
    assert set(result.tables["specificity"]["for"]) == {"gloomy", "chatty", f"gloomy ({other})"}
    with pytest.raises(UserError, match="given twice"):
        decompose.run(replace(setup, others=(str(other), str(other))), tmp_path / "twice")
    shutil.copy(other, tmp_path / "third.safetensors")
    three = replace(setup, others=(str(other), str(tmp_path / "third.safetensors")))
    assert len(set(decompose.run(three, tmp_path / "three").tables["specificity"]["for"])) == 4


def test_notes_reach_the_terminal_and_a_folder_without_answers_is_refused(made, tmp_path, capsys):
    from pvsae.cli import main

    _, config = made
    foreign = dictionary(tmp_path / "foreign", made[0], model="other/model")
    line = ["decompose", config.vectors, foreign, "--traits", "gloomy", "--no-activations", "--other-model"]
    assert main([*line, "--out", str(tmp_path / "run")]) == 0
    assert "note: Two models, by --other-model" in capsys.readouterr().out
    for nowhere in (tmp_path / "nowhere", tmp_path):
        assert main([*line, "--out", str(tmp_path / "none"), "--rollouts", str(nowhere)]) == 2
        assert f"no answers of gloomy in {nowhere}" in capsys.readouterr().err


def test_an_official_file_under_another_name_and_damaged_neighbours(made, tmp_path, extracted):
    from pvsae.vectors import write_official

    _, config = made
    folder = tmp_path / "official"
    for name in ("gloomy", "chatty"):
        write_official(PersonaVectors.load(extracted / name / "vectors" / "vectors.safetensors"), folder)
    (folder / "torn_response_avg_diff.pt").write_bytes(b"no tensor")
    torch.save(torch.ones(3, 5), folder / "small_response_avg_diff.pt")
    setup = replace(config, vectors=str(folder / "gloomy_response_avg_diff.pt"), traits=("chatty",))
    result = decompose.run(setup, tmp_path / "run")
    best = result.table.sort_values("rank").iloc[0]
    assert best["latent"] == 0, "the file that was given, whatever it is called"
    assert set(result.tables["specificity"]["for"]) == {"chatty", "chatty (chatty_response_avg_diff.pt)"}
    for name in ("torn", "small"):
        assert any(name in note and "left out" in note for note in result.notes), name


@pytest.mark.slow
def test_the_page_in_a_browser(made, tmp_path, stage_library):
    """With both figures: the decomposition, and the causal test."""
    model, config = made
    answers = {"max_questions": 2, "max_new_tokens": 4, "library": str(stage_library)}
    setup = replace(config, causal=True, coefs=(1.0, 2.0), n_features=1, n_random=1, **answers)
    decompose.run(setup, tmp_path / "run", model=model, judge=ByteJudge())
    draw(tmp_path / "run")
    assert_fine(write_report(tmp_path / "run"), tmp_path / "browser", images=2)
