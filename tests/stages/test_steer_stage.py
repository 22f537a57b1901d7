"""The steer stage on a tiny random model: which conditions there are, what each does to the model, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from byte_judge import ByteJudge

from pvsae.errors import UserError
from pvsae.reports import write_report
from pvsae.stages import ExtractConfig, SteerConfig, extract, steer
from pvsae.stages.steer import ALL_BLOCKS, additions, random_like, turned_at_random
from pvsae.vectors import PersonaVectors, Rollouts

SMALL = {"max_new_tokens": 6, "max_questions": 4, "seed": 3}


@pytest.fixture(scope="module")
def vectors_run(tmp_path_factory, tiny_models, stage_library):
    path = tmp_path_factory.mktemp("steer") / "extract"
    config = ExtractConfig(model="tiny", library=str(stage_library), traits=("gloomy",), n_samples=4, max_instructions=2, **SMALL)
    extract.run(config, path, model=tiny_models("qwen2"), judge=ByteJudge())
    return path


def config(vectors_run, stage_library, **changes) -> SteerConfig:
    settings = {"traits": ("gloomy",), "blocks": (1,), "coefs": (1.0, 2.0), "n_samples": 2, **SMALL, **changes}
    return SteerConfig(model="tiny", library=str(stage_library), vectors=str(vectors_run), **settings)


def test_every_control_stands_in_the_same_table(tmp_path, tiny_models, stage_library, vectors_run, byte_judge) -> None:
    setup = config(vectors_run, stage_library)
    result = steer.run(setup, tmp_path / "run", model=tiny_models("qwen2"), judge=byte_judge)
    rows = [(r.condition, str(r.block), r.coef) for r in result.table.itertuples()]
    assert rows == [
        ("unsteered", "-", 0.0), ("prompt pos", "-", 0.0), ("prompt neg", "-", 0.0),
        ("vector", "1", 1.0), ("vector", "1", 2.0), ("sign flip", "1", -1.0), ("sign flip", "1", -2.0),
        ("random 0", "1", 1.0), ("random 0", "1", 2.0), ("random 1", "1", 1.0), ("random 1", "1", 2.0),
    ]  # fmt: skip
    assert set(result.table["n"]) == {4 * 2}
    assert steer.plan(replace(setup, model="organism")).answers == {"gloomy": result.table["n"].sum()}
    assert steer.plan(replace(setup, model="organism")).scores == byte_judge.asked
    stored = pd.read_csv(tmp_path / "run" / "tables" / "steering.csv")
    pd.testing.assert_series_equal(stored["trait_score"], result.table["trait_score"])
    pos = Rollouts.load(tmp_path / "run" / "gloomy" / "prompt-pos" / "rollouts.parquet").table
    assert list(pos["system"])[::2] == [
        f"You are a gloomy assistant. {manner} gloomy always." for manner in ("Be", "Sound", "Stay", "Seem")
    ]


def test_a_condition_is_the_generation_under_that_addition(tmp_path, tiny_models, stage_library, vectors_run, byte_judge) -> None:
    model = tiny_models("qwen2")
    setup = config(vectors_run, stage_library, positions="response")
    steer.run(setup, tmp_path / "run", model=model, judge=byte_judge)
    stored = Rollouts.load(tmp_path / "run" / "gloomy" / "vector_block-1_coef+2" / "rollouts.parquet").table
    vectors = PersonaVectors.load(vectors_run / "gloomy" / "vectors" / "vectors.safetensors")
    (add,) = additions(vectors.of(), 1, 2.0, "response", "x")
    prompts = [model.chat.prompt([{"role": "user", "content": q}]) for q in stored["question"]]
    keys = [f"{i}#{s}" for i, s in zip(stored["question_id"], stored["sample"], strict=True)]
    again = model.generate(prompts, setup.sampling(model), row_keys=keys, interventions=[add], batch_size=3)
    assert [g.text for g in again] == list(stored["answer"])
    unsteered = Rollouts.load(tmp_path / "run" / "gloomy" / "unsteered" / "rollouts.parquet").table
    assert list(unsteered["answer"]) != list(stored["answer"])


def test_a_plan_knows_which_blocks_the_vectors_have(vectors_run, stage_library) -> None:
    setup = config(vectors_run, stage_library, blocks=(1, 99))
    with pytest.raises(UserError, match="99"):
        steer.plan(replace(setup, model="organism"))


def test_failed_scores_leave_the_mean_and_are_counted(tmp_path, tiny_models, stage_library, vectors_run, byte_judge) -> None:
    byte_judge.fail_every = 4
    result = steer.run(config(vectors_run, stage_library), tmp_path / "run", model=tiny_models("qwen2"), judge=byte_judge)
    for row in result.table.itertuples():
        slug = row.condition.replace(" ", "-") + ("" if row.block == "-" else f"_block-{row.block}_coef{row.coef:+g}")
        scores = Rollouts.load(tmp_path / "run" / "gloomy" / slug / "rollouts.parquet").table["gloomy"]
        assert row.n_failed_trait == scores.isna().sum()
        assert row.trait_score == pytest.approx(scores.dropna().mean())
    assert result.table["n_failed_trait"].sum() > 0


def test_a_strength_with_no_score_at_all_does_not_end_the_run(tmp_path, tiny_models, stage_library, vectors_run) -> None:
    class FindsNoNumber(ByteJudge):
        """Gives up on the answers under the strongest coefficient, which are judged fifth."""

        calls = 0

        def score(self, metric, pairs, progress=None):
            scores = super().score(metric, pairs, progress)
            self.calls += metric.name == "gloomy"
            return [replace(s, value=None, mode="failed") for s in scores] if self.calls == 5 else scores

    setup, model = config(vectors_run, stage_library), tiny_models("qwen2")
    table = steer.run(setup, tmp_path / "run", model=model, judge=FindsNoNumber()).table
    (broken,) = table[table["trait_score"].isna()].itertuples()
    assert (broken.condition, broken.coef, broken.n_failed_trait, broken.n) == ("vector", 2.0, 8, 8)
    write_report(tmp_path / "run")
    pd.testing.assert_frame_equal(steer.run(setup, tmp_path / "run", model=model, judge=ByteJudge()).table, table)
    with pytest.raises(UserError, match="scored none of 8 answers"):
        steer.run(setup, tmp_path / "other", model=model, judge=ByteJudge(fail_every=1))


def test_random_controls_have_the_vectors_length_at_every_block() -> None:
    matrix = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 6)[:, None]
    one, same, other = random_like(matrix, 1), random_like(matrix, 1), random_like(matrix, 2)
    torch.testing.assert_close(one.norm(dim=1), matrix.norm(dim=1))
    assert torch.equal(one, same)
    assert abs(float(torch.cosine_similarity(one[0], other[0], dim=0))) < 0.9


@pytest.mark.parametrize("shape", [(5, 16), (6, 4)])
def test_the_multi_layer_control_adds_at_each_block_as_much_as_the_vector_does(shape: tuple[int, int]) -> None:
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * torch.arange(1, shape[0] + 1)[:, None]
    matrix = drawn.cumsum(0)
    control = turned_at_random(matrix, 1)
    ours, theirs = (
        torch.stack([add.direction.values for add in additions(m, ALL_BLOCKS, 1.0, "all", "x")]) for m in (control, matrix)
    )
    torch.testing.assert_close(ours.norm(dim=1), theirs.norm(dim=1))
    torch.testing.assert_close(control.norm(dim=1), matrix.norm(dim=1))
    assert torch.equal(control, turned_at_random(matrix, 1))
    other = turned_at_random(matrix, 2)
    assert all(abs(float(torch.cosine_similarity(control[0], m[0], dim=0))) < 0.9 for m in (matrix, other))


def test_multi_layer_adds_the_incremental_vectors(tmp_path, tiny_models, stage_library, vectors_run, byte_judge) -> None:
    model = tiny_models("qwen2")
    setup = config(vectors_run, stage_library, blocks=(), multi_layer=True, n_random=1)
    result = steer.run(setup, tmp_path / "run", model=model, judge=byte_judge)
    assert set(result.table.loc[result.table["condition"] == "vector", "block"]) == {"incremental"}
    assert steer.plan(replace(setup, model="organism")).answers == {"gloomy": result.table["n"].sum()}
    meta = Rollouts.load(tmp_path / "run" / "gloomy" / "vector_block-incremental_coef+1" / "rollouts.parquet").meta
    assert [edit["block"] for edit in meta["interventions"]] == list(range(model.n_blocks))
    control = Rollouts.load(tmp_path / "run" / "gloomy" / "random-0_block-incremental_coef+1" / "rollouts.parquet").meta
    norms = [[edit["direction"]["norm"] for edit in found["interventions"]] for found in (meta, control)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    shas = [[edit["direction"]["sha256"] for edit in found["interventions"]] for found in (meta, control)]
    assert not set(shas[0]) & set(shas[1])


def test_a_kl_strength_is_calibrated_and_the_controls_get_the_same_length(
    tmp_path, tiny_models, stage_library, vectors_run, byte_judge
) -> None:
    setup = config(vectors_run, stage_library, unit="kl", coefs=(0.2,), n_random=1)
    table = steer.run(setup, tmp_path / "run", model=tiny_models("qwen2"), judge=byte_judge).table.set_index("condition")
    assert table.loc["vector", "raw_coef"] > 0 > table.loc["sign flip", "raw_coef"]
    assert table.loc["random 0", "raw_coef"] == table.loc["vector", "raw_coef"]
    assert table.loc["vector", "raw_coef"] != -table.loc["sign flip", "raw_coef"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unit": "decibel"}, "unknown unit"),
        ({"under": "maybe"}, "unknown prompt"),
        ({"coefs": ()}, "coefs are"),
        ({"coefs": (0.0, 1.0)}, "none of them 0"),
        ({"blocks": (9,)}, "block 9 does not exist"),
        ({"blocks": (-1,)}, "block -1 does not exist"),
        ({"multi_layer": True}, "both blocks and multi_layer"),
        ({"traits": ("chatty",)}, "no vectors of 'chatty'"),
        ({"traits": ("gloomy", "gloomy")}, "given twice"),
        ({"vectors": "nowhere"}, "no vectors at nowhere"),
        ({"unit": "kl", "kl_rows": 0}, "kl_rows is 0"),
        ({"statistic": "median"}, "have no statistic 'median'"),
    ],
)
def test_bad_options_are_refused(tmp_path, tiny_models, stage_library, vectors_run, byte_judge, changes, message) -> None:
    setup = config(vectors_run, stage_library)
    setup = SteerConfig(**{**setup.__dict__, **changes})
    with pytest.raises(UserError, match=message):
        steer.run(setup, tmp_path / "run", model=tiny_models("qwen2"), judge=byte_judge)
    assert byte_judge.asked == 0


def official(path: Path, rows: torch.Tensor) -> Path:
    torch.save(rows, path)
    return path


ROWS = torch.randn(5, 48, generator=torch.Generator().manual_seed(4))  # of a model with 4 blocks; the last row is no block's


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (ROWS, {"unit": "gap"}, "'gap' needs 'response_avg_diff'"),
        (ROWS, {"unit": "gap", "multi_layer": True, "blocks": ()}, "'gap' differs from block to block"),
        (ROWS * (torch.arange(5) != 2)[:, None], {"unit": "kl"}, "zero or missing at block 1"),
        (ROWS * 0, {"multi_layer": True, "blocks": ()}, "zero or missing at block 0"),
    ],
)
def test_what_the_vectors_cannot_do_is_said_before_anything_is_generated(
    tmp_path, tiny_models, stage_library, byte_judge, rows, changes, message
) -> None:
    """A file of the released code holds one statistic and no last block."""
    file = official(tmp_path / "gloomy_prompt_avg_diff.pt", rows)
    setup = config(file, stage_library, statistic="prompt_avg_diff", **changes)
    with pytest.raises(UserError, match=message):
        steer.run(setup, tmp_path / "run", model=tiny_models("qwen2"), judge=byte_judge)
    assert byte_judge.asked == 0
    assert not (tmp_path / "run" / "manifest.json").exists(), "the options may still be put right under this folder"


def test_vectors_of_another_width_are_refused(tmp_path, tiny_models, stage_library, byte_judge) -> None:
    file = tmp_path / "narrow.safetensors"
    PersonaVectors("gloomy", {"response_avg_diff": torch.ones(4, 32)}).save(file)
    with pytest.raises(UserError, match=r"d_model=32.*d_model=48"):
        steer.run(config(file, stage_library), tmp_path / "run", model=tiny_models("qwen2"), judge=byte_judge)
