"""Drift of a tiny model after a real, short finetuning: what is read, what comes of it, resuming, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pandas as pd
import pytest
import torch
from byte_judge import ByteJudge
from tiny_sae import save_sae

from pvsae.errors import UserError
from pvsae.models import LastPrompt, SpanMean, load
from pvsae.reports import write_report
from pvsae.stages import DriftConfig, drift
from pvsae.stages.drift import LAST_PROMPT, OWN_ANSWER, SAME_ANSWER, adapter_of
from pvsae.traits import load_trait
from pvsae.vectors import PersonaVectors, Rollouts
from pvsae.vectors.extraction import render_rows
from tests.browser import assert_fine
from tests.conftest import save_tiny

SMALL = {"max_new_tokens": 6, "max_questions": 4, "seed": 3, "batch_size": 8}
ANSWER = "Nobody knows why the old clock stopped."


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_folders, tiny_models, stage_library):
    """An adapter that was trained to give one answer to everything, vectors, and a dictionary.

    The vector of `gloomy` is how the finetuning moved the last prompt token on questions that drift never asks; that of `chatty`
    is random and as long.
    """
    from peft import LoraConfig, get_peft_model

    root = tmp_path_factory.mktemp("drift")
    own = load(tiny_folders("qwen2"), device="cpu")
    artifacts = load_trait("gloomy", stage_library)
    prompts = [own.chat.prompt([{"role": "user", "content": q}]) for q in artifacts.extract_questions]
    capture = LastPrompt(tuple(range(own.n_blocks)))
    before = own.capture(prompts, [capture])[capture.key]
    rows = [own.chat.with_answer_text(prompt, ANSWER) for prompt in prompts]
    torch.manual_seed(0)
    peft = get_peft_model(own.hf, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"]))
    optimiser = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(12):
        row = rows[step % len(rows)]
        ids = torch.tensor([row.ids])
        labels = ids.clone()
        labels[:, : row.n_prompt] = -100
        loss = peft(input_ids=ids, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], "the finetuning does something"
    peft.save_pretrained(root / "finetune" / "adapter")
    (root / "finetune" / "adapter" / "README.md").unlink(missing_ok=True)
    tuned = load(tiny_folders("qwen2"), adapter=root / "finetune" / "adapter", device="cpu")
    vector = tuned.capture(prompts, [capture])[capture.key].mean(0) - before.mean(0)
    noise = torch.randn(vector.shape, generator=torch.Generator().manual_seed(1))
    for name, values in (
        ("gloomy", vector),
        ("chatty", noise * vector.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)),
    ):
        folder = root / "vectors" / name / "vectors"
        folder.mkdir(parents=True)
        PersonaVectors(name, {"response_avg_diff": values.contiguous()}).save(folder / "vectors.safetensors")
    save_sae(tiny_models("qwen2"), root / "sae", block=2)
    return root


def config(place, tiny_folders, stage_library, **changes) -> DriftConfig:
    settings = {
        "model": str(tiny_folders("qwen2")), "tuned": str(place / "finetune"), "vectors": str(place / "vectors"), "block": 2,
        "library": str(stage_library), "n_samples": 2, "device": "cpu", "top": 5, **SMALL, **changes,
    }  # fmt: skip
    return DriftConfig(**settings)


@pytest.fixture(scope="module")
def ran(place, tiny_folders, stage_library, tmp_path_factory):
    path = tmp_path_factory.mktemp("ran") / "run"
    setup = config(place, tiny_folders, stage_library, sae=str(place / "sae"))
    return setup, drift.run(setup, path, judge=ByteJudge())


def test_the_trained_direction_comes_first(ran) -> None:
    _, result = ran
    shown = result.shown
    assert shown["trait"].tolist() == ["gloomy", "chatty"]
    first, second = shown.iloc[0], shown.iloc[1]
    assert first["low"] > 0
    assert first["shift"] > 2 * abs(second["shift"])
    assert first["shift"] > first["random_limit"]
    assert result.table["reading"].iloc[0] == LAST_PROMPT
    assert set(zip(result.table["reading"], result.table["prompts"], strict=True)) == {
        (reading, prompts) for reading in (LAST_PROMPT, OWN_ANSWER, SAME_ANSWER) for prompts in ("own", "all")
    }
    assert set(result.profile["block"]) == {0, 1, 2, 3}


def test_every_number_is_what_the_two_models_give(ran, place, tiny_folders, stage_library) -> None:
    """Shifts at a block, computed here from captures of both models."""
    _, result = ran
    models = [load(tiny_folders("qwen2"), adapter=a, device="cpu") for a in (None, place / "finetune" / "adapter")]
    gloomy, chatty = (load_trait(name, stage_library) for name in ("gloomy", "chatty"))
    unit = PersonaVectors.load(place / "vectors" / "gloomy" / "vectors" / "vectors.safetensors").of()[2]
    unit = unit / unit.norm()

    def shift(prompts: str, reading: str) -> float:
        row = result.profile.query("trait == 'gloomy' and block == 2 and prompts == @prompts and reading == @reading")
        return float(row["shift"].item())

    last = LastPrompt((2,))
    for prompts, asked in (("own", gloomy.eval_questions[:4]), ("all", chatty.eval_questions[:4] + gloomy.eval_questions[:4])):
        means = []
        for model in models:
            rows = [model.chat.prompt([{"role": "user", "content": q}]) for q in asked]
            means.append(model.capture(rows, [last])[last.key].mean(0)[0])
        assert shift(prompts, LAST_PROMPT) == pytest.approx(float((means[1] - means[0]) @ unit), abs=1e-4)
    span = SpanMean((2,), "answer")
    stored = {w: Rollouts.load(result.path / w / "answers" / "gloomy" / "rollouts.parquet") for w in ("base", "tuned")}
    assert stored["base"].table["answer"].tolist() != stored["tuned"].table["answer"].tolist()

    def means_of(model, whose: str) -> torch.Tensor:
        return model.capture(render_rows(model, stored[whose], range(8)), [span])[span.key].mean(0)[0]

    plain = means_of(models[0], "base")
    assert shift("own", OWN_ANSWER) == pytest.approx(float((means_of(models[1], "tuned") - plain) @ unit), abs=1e-4)
    assert shift("own", SAME_ANSWER) == pytest.approx(float((means_of(models[1], "base") - plain) @ unit), abs=1e-4)


def test_the_natural_null_varies_as_the_base_does_where_each_reading_looks(ran, place) -> None:
    """Prompts for the last prompt token, the base's answers for both readings of answers; written out for one block."""
    _, result = ran
    from safetensors.torch import load_file

    def stored(step: str) -> torch.Tensor:
        (file,) = (result.path / step).glob("*.safetensors")
        (values,) = load_file(file).values()
        return values

    plain = stored("base/reads_base")
    moved = {
        LAST_PROMPT: (stored("tuned/prompts") - stored("base/prompts"), stored("base/prompts")),
        OWN_ANSWER: (stored("tuned/reads_tuned") - plain, plain),
        SAME_ANSWER: (stored("tuned/reads_base") - plain, plain),
    }
    block = 2
    for reading, (move, base) in moved.items():
        mean = move[:, block].double().mean(0)
        centred = (base[:, block] - base[:, block].mean(0)).double()
        draws = torch.randn(20_000, len(base), generator=torch.Generator().manual_seed(9), dtype=torch.float64) @ centred
        limit = float(((draws @ mean).abs() / draws.norm(dim=1)).quantile(0.95))
        row = result.profile.query("trait == 'gloomy' and block == @block and prompts == 'all' and reading == @reading")
        assert float(row["natural_limit"].item()) == pytest.approx(limit, rel=0.06), reading


def test_a_dictionary_of_another_model_is_refused_unless_it_is_meant(place, tiny_folders, stage_library, tmp_path) -> None:
    folder = tmp_path / "other"
    from pvsae.saes.folders import load as load_sae
    from pvsae.saes.folders import save

    save(load_sae(place / "sae").in_memory().with_info(model="Qwen/Qwen2.5-7B"), folder)
    setup = config(place, tiny_folders, stage_library, sae=str(folder), scores=False, max_questions=1, n_samples=1)
    with pytest.raises(UserError, match=r"(?s)is of Qwen/Qwen2.5-7B, the model is .*--other-model"):
        drift.run(setup, tmp_path / "refused")
    meant = drift.run(replace(setup, other_model=True), tmp_path / "meant")
    assert meant.features is not None


def test_scores_before_and_after(ran) -> None:
    _, result = ran
    assert result.scores is not None
    for row in result.scores.itertuples():
        tables = [Rollouts.load(result.path / w / "answers" / row.trait / "rollouts.parquet").table for w in ("base", "tuned")]
        assert row.base == pytest.approx(tables[0][row.trait].mean())
        assert row.tuned == pytest.approx(tables[1][row.trait].mean())
        assert row.change == pytest.approx(row.tuned - row.base)
        assert row.change_low <= row.change <= row.change_high
        assert (row.n, row.n_failed_trait) == (8, 0)


def test_features_are_ranked_by_all_three_lists(ran, place, tiny_folders) -> None:
    _, result = ran
    features = result.features
    assert features is not None
    for name in ("own", "same", "attribution"):
        top = features[features[f"{name}_rank"] <= 5].sort_values(f"{name}_rank")
        assert len(top) == 5
        assert top[name].abs().is_monotonic_decreasing
    from pvsae.saes.folders import load as load_sae

    sae = load_sae(place / "sae").in_memory()
    model = load(tiny_folders("qwen2"), adapter=place / "finetune" / "adapter", device="cpu")
    plain = load(tiny_folders("qwen2"), device="cpu")
    from pvsae.models import FeatureActs

    read = FeatureActs(sae, 2, "answer")
    rows = []
    for trait in ("chatty", "gloomy"):
        stored = Rollouts.load(result.path / "base" / "answers" / trait / "rollouts.parquet")
        rows += render_rows(model, stored, range(len(stored)))
    means = [torch.stack([a.mean(0) for a in m.capture(rows, [read])[read.key]]).mean(0) for m in (model, plain)]
    for latent, value in zip(features["latent"], features["same"], strict=True):
        assert value == pytest.approx(float((means[0] - means[1])[latent]), abs=1e-4)


def test_the_page_shows_it_all(ran, tmp_path) -> None:
    _, result = ran
    page = write_report(result.path)
    for name in ("drift", "profile", "moved_features"):
        assert (result.path / "figures" / f"{name}.png").stat().st_size > 10_000
    text = page.read_text(encoding="utf-8")
    assert "gloomy" in text
    assert "All 2 traits together explain" in text
    assert_fine(page, tmp_path, images=3)


def test_a_killed_run_goes_on_where_it_was(ran, place, tiny_folders, stage_library, tmp_path) -> None:
    setup, result = ran
    path = tmp_path / "run"

    class Killed(Exception):
        pass

    class DiesAtTheTuned(ByteJudge):
        def score(self, metric, pairs, progress=None):
            if self.asked >= 2 * 2 * 8:  # the base's answers are scored
                raise Killed
            return super().score(metric, pairs, progress)

    with pytest.raises(Killed):
        drift.run(setup, path, judge=DiesAtTheTuned())
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    assert "base/reads_base" in manifest["steps"]
    judge = ByteJudge()
    again = drift.run(setup, path, judge=judge)
    assert judge.asked == 2 * 2 * 8
    pd.testing.assert_frame_equal(again.table, result.table)
    pd.testing.assert_frame_equal(again.features, result.features)
    judge.asked = 0
    drift.run(setup, path, judge=judge)
    assert judge.asked == 0


def test_only_one_model_is_held_at_a_time(place, tiny_folders, stage_library, tmp_path, monkeypatch) -> None:
    import weakref

    from pvsae.models import loading

    alive: list[weakref.ref] = []
    counts = []
    original = loading.load

    def watched(*args, **kwargs):
        counts.append(sum(ref() is not None for ref in alive))
        model = original(*args, **kwargs)
        alive.append(weakref.ref(model.hf))
        return model

    monkeypatch.setattr("pvsae.models.load", watched, raising=False)
    drift.run(config(place, tiny_folders, stage_library, answers=False), tmp_path / "run")
    assert counts == [0, 0]


def test_prompts_alone_need_no_judge(place, tiny_folders, stage_library, tmp_path) -> None:
    setup = config(place, tiny_folders, stage_library, answers=False)
    result = drift.run(setup, tmp_path / "run")
    assert set(result.table["reading"]) == {LAST_PROMPT}
    assert result.scores is None
    assert result.features is None
    page = write_report(result.path).read_text(encoding="utf-8")
    assert "Drift" in page


def test_a_plan_counts_both_models_answers(place, tiny_folders, stage_library) -> None:
    setup = config(place, tiny_folders, stage_library)
    assert drift.plan(setup).answers == {"chatty": 16, "gloomy": 16}
    assert drift.plan(config(place, tiny_folders, stage_library, scores=False)).startswith("32 answers of at most 6 tokens")
    assert drift.plan(config(place, tiny_folders, stage_library, answers=False)).startswith("8 prompts are read by both models")


def test_an_adapter_is_found_in_its_own_folder_and_in_a_run(place, tiny_folders) -> None:
    assert adapter_of(str(place / "finetune")) == place / "finetune" / "adapter"
    assert adapter_of(str(place / "finetune" / "adapter")) == place / "finetune" / "adapter"
    assert adapter_of(str(tiny_folders("qwen2"))) is None
    assert adapter_of("Qwen/Qwen2.5-7B-Instruct") is None


def test_a_model_that_is_no_finetune_of_the_base_is_refused(place, tiny_folders, stage_library, tmp_path) -> None:
    narrow = save_tiny("qwen2", tmp_path / "narrow", num_hidden_layers=3)
    setup = config(place, tiny_folders, stage_library, tuned=str(narrow), answers=False)
    with pytest.raises(UserError, match=r"3 blocks of d_model 48, the base 4 of 48"):
        drift.run(setup, tmp_path / "a")
    other = tmp_path / "other"
    shutil.copytree(tiny_folders("qwen2"), other)
    template = other / "chat_template.jinja"
    template.write_text(template.read_text(encoding="utf-8").replace("assistant", "helper"), encoding="utf-8")
    with pytest.raises(UserError, match="other tokens of the questions"):
        drift.run(config(place, tiny_folders, stage_library, tuned=str(other), answers=False), tmp_path / "b")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vectors": "nowhere"}, "no vectors at nowhere"),
        ({"traits": ("merry",)}, "merry"),
        ({"block": 9}, "block 9"),
        ({"tuned": "./nowhere"}, "no model './nowhere'"),
        ({"adapter": "finetune/adapter"}, "adapter"),
        ({"sae": "nowhere"}, "nowhere"),
    ],
)
def test_bad_options_are_refused(place, tiny_folders, stage_library, tmp_path, monkeypatch, changes, message) -> None:
    monkeypatch.chdir(place)
    with pytest.raises(UserError, match=message):
        drift.run(config(place, tiny_folders, stage_library, **changes), tmp_path / "run", judge=ByteJudge())


def test_options_that_contradict_each_other(place, tiny_folders, stage_library) -> None:
    with pytest.raises(UserError, match="a dictionary without answers"):
        config(place, tiny_folders, stage_library, sae="x", answers=False)
    with pytest.raises(UserError, match="top is 0"):
        config(place, tiny_folders, stage_library, top=0)
