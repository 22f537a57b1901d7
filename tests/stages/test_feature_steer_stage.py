"""Steering with single features on a tiny random model: which conditions there are, what each does, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from byte_judge import ByteJudge
from tiny_sae import open_sae, save_sae

from pvsae.errors import UserError
from pvsae.judges import Score
from pvsae.reports import write_report
from pvsae.saes.activity import measure
from pvsae.saes.evaluate import token_rows
from pvsae.stages import FeatureSteerConfig, feature_steer
from pvsae.traits import load_trait
from pvsae.vectors import PersonaVectors, Rollouts
from tests.browser import assert_fine

SMALL = {"max_new_tokens": 6, "max_questions": 3, "seed": 3}


class TagJudge(ByteJudge):
    """Tags words of an answer by their hash as facets of the trait, as a rule judge tags sentences."""

    def _one(self, metric, answer: str) -> Score:
        if metric.name == "coherence":
            return super()._one(metric, answer)
        tags = [("gloomy/rain", "gloomy/fog (false)", "neutral/talk", "unparsed")[len(word) % 4] for word in answer.split()]
        top = tuple((tag, float(tags.count(tag))) for tag in dict.fromkeys(tags))
        share = sum(tag.startswith("gloomy") for tag in tags) / max(1, len(tags))
        return Score(100 * share, "rules", None, False, top, self.name, metric.prompt_hash)


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_models):
    root = tmp_path_factory.mktemp("features")
    save_sae(tiny_models("qwen2"), root / "sae")
    matrix = torch.randn(4, 48, generator=torch.Generator().manual_seed(5))
    PersonaVectors("gloomy", {"response_avg_diff": matrix}).save(root / "gloomy.safetensors")
    return root


def config(place, stage_library, **changes) -> FeatureSteerConfig:
    settings = {
        "features": (f"{place}/sae:7,20",), "traits": ("gloomy",), "coefs": (0.5, 1.0), "vectors": f"{place}/gloomy.safetensors",
        "n_random": 2, **SMALL, **changes,
    }  # fmt: skip
    return FeatureSteerConfig(model="tiny", library=str(stage_library), **settings)


def stored(run, slug: str) -> Rollouts:
    return Rollouts.load(run / "gloomy" / slug / "rollouts.parquet")


@pytest.fixture(scope="module")
def swept(tmp_path_factory, place, tiny_models, stage_library):
    judge = TagJudge()
    path = tmp_path_factory.mktemp("swept") / "run"
    setup = config(place, stage_library, together=True)
    return setup, feature_steer.run(setup, path, model=tiny_models("qwen2"), judge=judge), judge


def test_every_control_of_every_feature_stands_in_the_same_table(swept) -> None:
    setup, result, judge = swept
    table = result.table
    kinds = table.groupby(["condition", "of"], sort=False).size().to_dict()
    assert kinds == {
        ("unsteered", "-"): 1, ("prompt pos", "-"): 1, ("feature", "-"): 4, ("together", "-"): 2,
        ("random feature", "7"): 4, ("random direction", "7"): 4, ("vector", "7"): 2,
        ("random feature", "20"): 4, ("random direction", "20"): 4, ("vector", "20"): 2,
    }  # fmt: skip
    planned = feature_steer.plan(replace(setup, model="organism"))
    assert planned.answers == {"gloomy": table["n"].sum()}
    assert planned.scores == judge.asked
    assert not table.duplicated(["trait", "condition", "feature", "of", "coef"]).any()


def test_what_is_added_is_the_strength_in_multiples_of_the_highest_activation(swept, place, tiny_models) -> None:
    """Counted anew here, on the unsteered answers: this dictionary says nothing of a text of its own."""
    _, result, _ = swept
    model, sae = tiny_models("qwen2"), open_sae(place / "sae")
    plain = stored(result.path, "unsteered").table
    ids = [(*p, *a) for p, a in zip(plain["prompt_ids"], plain["answer_ids"], strict=True)]
    counted = measure(sae, model, token_rows(model, ids), "x")
    assert "unsteered answers" in next(iter(result.activity.values()))
    assert len(stored(result.path, "together-7+20_coef+0.5").meta["interventions"]) == 2
    rows = result.table.set_index(["condition", "feature", "of", "coef"]).sort_index()
    for index in (7, 20):
        (edit,) = stored(result.path, f"feature-{index}_coef+0.5").meta["interventions"]
        assert (edit["type"], edit["index"], edit["block"]) == ("add_feature", index, 1)
        assert edit["strength"] == pytest.approx(0.5 * counted.maximum(index))
        one = rows.loc[("feature", str(index), "-", 0.5)].squeeze()
        assert one["raw"] == pytest.approx(0.5 * counted.maximum(index))
        assert one["length"] == pytest.approx(one["raw"] * float(sae.W_dec[index].norm()))
        assert one["density"] == pytest.approx(float(counted.density[index]))


def test_controls_have_the_features_length_and_its_density(swept, place) -> None:
    _, result, _ = swept
    sae, table = open_sae(place / "sae"), result.table
    for index in (7, 20):
        own = table[(table["condition"] == "feature") & (table["feature"] == str(index)) & (table["coef"] == 1.0)].iloc[0]
        mine = table[table["of"] == str(index)]
        assert set(mine[mine["coef"] == 1.0]["length"].round(4)) == {round(own["length"], 4)}
        others = mine[mine["condition"] == "random feature"]
        assert not set(others["feature"]) & {"7", "20"}
        # The farthest of the 16 nearest densities is the bound that a draw has to keep.
        counts = pd.read_parquet(next((result.path / "activity").glob("*/table.parquet")))
        alive = counts[(counts["max"] > 0) & ~counts.index.isin([7, 20])]
        nearest = np.sort(np.abs(np.log(alive["density"]) - np.log(own["density"])))[15]
        assert (np.abs(np.log(others["density"]) - np.log(own["density"])) <= nearest + 1e-6).all()
        added = []
        for other in sorted(set(others["feature"])):
            (edit,) = stored(result.path, f"random-feature-{other}_of-{index}_coef+1").meta["interventions"]
            added.append(edit["strength"] * float(sae.W_dec[int(other)].norm()))
        for name in ("random-direction-0", "random-direction-1", "vector-gloomy"):
            (edit,) = stored(result.path, f"{name}_of-{index}_coef+1").meta["interventions"]
            added.append(edit["coef"] * edit["direction"]["norm"])
        assert added == pytest.approx([own["length"]] * 5, rel=1e-4)


def test_controls_repeat_under_a_seed_and_change_with_it(swept, tmp_path, place, stage_library, tiny_models) -> None:
    setup, result, _ = swept
    drawn = []
    for seed in (3, 4):
        again = replace(setup, seed=seed, coefs=(0.5,), together=False, n_samples=1)
        found = feature_steer.run(again, tmp_path / str(seed), model=tiny_models("qwen2"), judge=TagJudge()).table
        drawn.append(sorted(found[found["condition"] == "random feature"]["feature"]))
    first = result.table
    assert drawn[0] == sorted(first[(first["condition"] == "random feature") & (first["coef"] == 0.5)]["feature"])
    assert drawn[0] != drawn[1]


def test_facet_means_are_those_of_the_judges_evidence(swept) -> None:
    _, result, _ = swept
    assert set(result.facets["facet"]) == {"fog", "rain"}
    for slug, keys in {
        "unsteered": ("unsteered", "-", "-", 0.0), "feature-7_coef+1": ("feature", "7", "-", 1.0),
        "vector-gloomy_of-20_coef+0.5": ("vector", "gloomy", "20", 0.5),
    }.items():  # fmt: skip
        expected = {"rain": [], "fog": []}
        for text in stored(result.path, slug).table["gloomy_score"]:
            counts = dict(Score.from_json(text).top)
            n = sum(counts.values()) or 1.0
            expected["rain"].append(100 * counts.get("gloomy/rain", 0.0) / n)
            expected["fog"].append(100 * counts.get("gloomy/fog (false)", 0.0) / n)
        rows = result.facets.set_index(["condition", "feature", "of", "coef", "facet"])["score"]
        for facet, values in expected.items():
            assert rows[(*keys, facet)] == pytest.approx(np.mean(values))
    wide = result.dose_response("gloomy")
    assert len(wide) == len(result.table)
    assert (wide["fog"] + wide["rain"]).to_numpy() == pytest.approx(wide["trait_score"].to_numpy())


def test_strength_0_gives_the_unsteered_texts(tmp_path, place, stage_library, tiny_models) -> None:
    setup = config(place, stage_library, coefs=(0.0,), n_random=1)
    path = feature_steer.run(setup, tmp_path / "run", model=tiny_models("qwen2"), judge=TagJudge()).path
    plain = list(stored(path, "unsteered").table["answer_ids"])
    slugs = [p.name for p in (path / "gloomy").glob("*_coef*")]
    assert len(slugs) == 2 * 4
    for slug in slugs:
        assert list(stored(path, slug).table["answer_ids"]) == plain


def test_what_is_chosen_on_extractions_questions_may_be_measured_on_the_others(
    tmp_path, place, stage_library, tiny_models
) -> None:
    gloomy = load_trait("gloomy", stage_library)
    setup = config(place, stage_library, questions="extract", coefs=(1.0,), n_random=0, features=(f"{place}/sae:7",))
    path = feature_steer.run(setup, tmp_path / "run", model=tiny_models("qwen2"), judge=TagJudge()).path
    for slug in ("unsteered", "prompt-pos", "feature-7_coef+1"):
        assert tuple(stored(path, slug).table["question"]) == gloomy.extract_questions[:3]
    assert not set(gloomy.extract_questions) & set(gloomy.eval_questions)


def test_clamped_and_ablated_features(tmp_path, place, stage_library, tiny_models) -> None:
    for mode, value in (("clamp", 2.0), ("ablate", 0.0)):
        setup = config(place, stage_library, mode=mode, unit="raw", coefs=(2.0,), n_random=1, features=(f"{place}/sae:7",))
        result = feature_steer.run(setup, tmp_path / mode, model=tiny_models("qwen2"), judge=TagJudge())
        coef = "+1" if mode == "ablate" else "+2"
        (edit,) = stored(result.path, f"feature-7_coef{coef}").meta["interventions"]
        assert (edit["type"], edit["value"]) == ("clamp", value)
        (control,) = stored(result.path, f"random-direction-0_of-7_coef{coef}").meta["interventions"]
        assert control["type"] == {"clamp": "add", "ablate": "ablate"}[mode]
        assert feature_steer.plan(replace(setup, model="organism")).answers["gloomy"] == result.table["n"].sum()


def test_a_prefilter_keeps_the_features_of_the_highest_output_score(tmp_path, place, stage_library, tiny_models) -> None:
    setup = config(place, stage_library, features=(f"{place}/sae:3-12",), prefilter=2, coefs=(1.0,), n_random=0, vectors=None)
    result = feature_steer.run(setup, tmp_path / "run", model=tiny_models("qwen2"), judge=TagJudge())
    scores = result.output_scores
    assert len(scores) == 10
    assert scores["output_score"].is_monotonic_decreasing
    assert scores["kept"].sum() == 2
    steered = result.table[result.table["condition"] == "feature"]["feature"]
    assert set(steered) == set(scores["feature"][:2])
    assert feature_steer.plan(replace(setup, model="organism")).answers["gloomy"] == result.table["n"].sum()


def test_a_finished_run_is_read_back_and_has_a_page(swept, place, tiny_models) -> None:
    setup, result, judge = swept
    asked = judge.asked
    again = feature_steer.run(setup, result.path, model=tiny_models("qwen2"), judge=judge)
    assert judge.asked == asked
    pd.testing.assert_frame_equal(again.table, result.table)
    pd.testing.assert_frame_equal(again.facets, result.facets)
    page = write_report(result.path).read_text()
    assert (result.path / "figures" / "feature_steering.png").is_file()
    assert "Steering with single features" in page
    assert "Highest activations and densities" in page


def test_without_facets_in_the_evidence_there_is_a_page_all_the_same(tmp_path, place, stage_library, tiny_models) -> None:
    setup = config(place, stage_library, coefs=(1.0,), n_random=1, features=(f"{place}/sae:7",), vectors=None)
    result = feature_steer.run(setup, tmp_path / "run", model=tiny_models("qwen2"), judge=ByteJudge())
    assert not len(result.facets)
    assert not len(result.specificity)
    assert "names no facets" in write_report(result.path).read_text()
    assert (result.path / "figures" / "feature_steering.png").is_file()
    assert len(result.dose_response("gloomy")) == 2 + 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": ("{p}/sae:60",)}, "latent 60 of .*which has 60"),
        ({"features": ("{p}/sae:7", "{p}/sae:7")}, "given twice"),
        ({"features": ("{p}/sae",)}, "SAE:INDEX"),
        ({"features": ("{p}/sae:x",)}, "SAE:INDEX"),
        ({"features": ("{p}/sae:1", "{p}/sae:9-3")}, "feature .*sae:9-3"),
        ({"features": ("{p}/sae:1,9-3",)}, "feature .*sae:1,9-3"),
        ({"features": ("{p}/nowhere:1",)}, "there is no dictionary"),
        ({"features": ("{p}/narrow:1",)}, "d_model 32"),
        ({"features": ("{p}/deep:1",)}, "belongs to block 9"),
        ({"features": ("{p}/homeless:1",)}, "does not say which block"),
        ({"blocks": (2,)}, "dictionary of block 1, and block 2"),
        ({"features": ("{p}/foreign:1",)}, "is of other/model, the model is"),
        ({"blocks": (1, 2)}, "one block at most"),
        ({"mode": "shout"}, "mode 'shout'"),
        ({"questions": "mine"}, "questions 'mine'"),
        ({"unit": "gap"}, "unit 'gap'"),
        ({"coefs": ()}, "coefs are"),
        ({"coefs": (1.0, 1.0)}, "each strength once"),
        ({"coefs": (float("nan"),)}, "coefs are"),
        ({"prefilter": 0}, "prefilter is 0"),
        ({"activity": ("{p}",)}, "no finished evaluation"),
        ({"vectors": "{p}/none"}, "no vectors at"),
        ({"features": ()}, "no feature is given"),
    ],
)
def test_bad_options_are_refused_before_anything_is_generated(
    tmp_path, place, stage_library, tiny_models, changes, message
) -> None:
    from pvsae.saes.folders import save
    from tests.saes.small import make_sae

    model = tiny_models("qwen2")
    if not (place / "narrow").exists():
        save(make_sae(d_model=32), place / "narrow")
        save(open_sae(place / "sae").with_info(block=9), place / "deep")
        save_sae(model, place / "homeless", block=None)
        save(open_sae(place / "sae").with_info(model="other/model"), place / "foreign")
    filled = {
        key: tuple(v.format(p=place) if isinstance(v, str) else v for v in value) if isinstance(value, tuple)
        else value.format(p=place) if isinstance(value, str) else value
        for key, value in changes.items()
    }  # fmt: skip
    judge = TagJudge()
    with pytest.raises(UserError, match=message):
        feature_steer.run(config(place, stage_library, **filled), tmp_path / "run", model=model, judge=judge)
    assert judge.asked == 0
    assert not (tmp_path / "run" / "manifest.json").exists(), "the options may still be put right under this folder"


def test_a_block_is_given_for_a_dictionary_that_does_not_say_its_own(tmp_path, place, stage_library, tiny_models) -> None:
    save_sae(tiny_models("qwen2"), tmp_path / "sae", block=None)
    setup = config(
        place, stage_library, features=(f"{tmp_path}/sae:7",), blocks=(2,), coefs=(1.0,), n_random=0, vectors=None, unit="raw"
    )
    result = feature_steer.run(setup, tmp_path / "run", model=tiny_models("qwen2"), judge=TagJudge())
    (edit,) = stored(result.path, "feature-7_coef+1").meta["interventions"]
    assert edit["block"] == 2


def test_counts_of_another_model_are_not_taken_and_a_foreign_dictionary_only_if_it_is_meant(
    tmp_path, place, stage_library, tiny_models
) -> None:
    from pvsae.saes.folders import save
    from pvsae.stages import SaeEvalConfig, sae_eval
    from pvsae.stages.counts import activity_of_run

    model, other = tiny_models("qwen2"), tiny_models("llama")
    (tmp_path / "text.txt").write_text("The ferry leaves the harbour at nine and comes back before dark. " * 20)
    options = {"dictionary": f"{place}/sae", "text": (f"{tmp_path}/text.txt",), "tokens": 60, "loss_tokens": 0}
    sae_eval.run(SaeEvalConfig(model=model.name, **options), tmp_path / "eval", model=model)
    sae = open_sae(place / "sae")
    assert activity_of_run(tmp_path / "eval", sae, model) is not None
    assert activity_of_run(tmp_path / "eval", sae, other) is None
    save(sae.with_info(model="other/model"), tmp_path / "foreign")
    setup = config(
        place, stage_library, features=(f"{tmp_path}/foreign:7",), coefs=(1.0,), n_random=0, vectors=None, unit="raw",
        other_model=True,
    )  # fmt: skip
    result = feature_steer.run(setup, tmp_path / "run", model=model, judge=TagJudge())
    assert "Two models" in (result.path / "result.json").read_text()


@pytest.fixture(scope="module")
def counted(tmp_path_factory, place, tiny_models):
    """A run folder of an evaluation, which counted the dictionary's latents."""
    from pvsae.stages import SaeEvalConfig, sae_eval

    root = tmp_path_factory.mktemp("counted")
    (root / "text.txt").write_text("The ferry leaves the harbour at nine and comes back before dark. " * 20)
    setup = SaeEvalConfig(dictionary=f"{place}/sae", text=(f"{root}/text.txt",), tokens=60, loss_tokens=0)
    sae_eval.run(setup, root / "eval", model=tiny_models("qwen2"))
    return root / "eval"


def test_too_few_latents_to_draw_from_end_the_run_before_anything_is_generated(
    tmp_path, place, stage_library, tiny_models, counted
) -> None:
    judge, model = TagJudge(), tiny_models("qwen2")
    setup = config(place, stage_library, n_random=59, activity=(str(counted),))
    with pytest.raises(UserError, match="other latents that were active"):
        feature_steer.run(setup, tmp_path / "run", model=model, judge=judge)
    assert judge.asked == 0
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_some_latents_are_never_drawn_as_random_ones(tmp_path, place, stage_library, tiny_models, counted) -> None:
    model = tiny_models("qwen2")
    setup = config(
        place, stage_library, features=(f"{place}/sae:7",), coefs=(1.0,), vectors=None, activity=(str(counted),), max_questions=1
    )
    drawn = feature_steer.run(setup, tmp_path / "a", model=model, judge=TagJudge()).table.query("condition == 'random feature'")
    spared = replace(setup, not_random=(f"{place}/sae:{','.join(drawn['feature'])}",))
    others = feature_steer.run(spared, tmp_path / "b", model=model, judge=TagJudge()).table.query("condition == 'random feature'")
    assert len(others) == len(drawn) == 2
    assert not set(others["feature"]) & set(drawn["feature"])
    assert "not_random" not in setup.identity()
    assert "not_random" in spared.identity()
    for wrong, message in ((f"{place}/sae:60", "latent 60"), (f"{place}/nowhere:1", "no feature of .*nowhere is steered with")):
        with pytest.raises(UserError, match=message):
            feature_steer.run(replace(setup, not_random=(wrong,)), tmp_path / "c", model=model, judge=TagJudge())


def test_a_whole_dictionary_of_names_is_read_at_once() -> None:
    """A check of each name against each would take hours here."""
    from pvsae.stages.handles import parse

    assert len(parse(["sae:0-131071"])) == 131_072
    with pytest.raises(UserError, match="sae:131071 is given twice"):
        parse(["sae:0-131071", "sae:131071"])


def test_a_feature_that_is_never_active_has_no_unit(tmp_path, place, stage_library, tiny_models) -> None:
    setup = config(place, stage_library, features=(f"{place}/sae:59",))
    with pytest.raises(UserError, match="active at none"):
        feature_steer.run(setup, tmp_path / "run", model=tiny_models("qwen2"), judge=TagJudge())
    plain = replace(setup, unit="raw", n_random=0)
    assert len(feature_steer.run(plain, tmp_path / "raw", model=tiny_models("qwen2"), judge=TagJudge()).table) == 2 + 2 * 2


def test_other_weights_of_the_dictionary_do_not_go_on_with_a_run(tmp_path, place, stage_library, tiny_models) -> None:
    model = tiny_models("qwen2")
    save_sae(model, tmp_path / "sae")
    setup = config(place, stage_library, features=(f"{tmp_path}/sae:7",), coefs=(1.0,), n_random=0, vectors=None)
    feature_steer.run(setup, tmp_path / "run", model=model, judge=TagJudge())
    save_sae(model, tmp_path / "sae", seed=1)
    with pytest.raises(UserError, match="changed since the run"):
        feature_steer.run(setup, tmp_path / "run", model=model, judge=TagJudge())


@pytest.mark.slow
def test_the_page_in_a_browser(swept, tmp_path) -> None:
    assert_fine(write_report(swept[1].path), tmp_path, images=1)
