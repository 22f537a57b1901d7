"""Stage `sae_train`: a run folder with dictionaries, that goes on where it was killed, and that others can evaluate."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from pvsae.errors import UserError
from pvsae.reports import draw, write_report
from pvsae.runs import read_json
from pvsae.saes import stream as stream_module
from pvsae.saes.config import ModelConfig, SaeTrainConfig, config_of, load_config
from pvsae.saes.demand import demand
from pvsae.saes.folders import load
from pvsae.stages import SaeEvalConfig, sae_eval, sae_train
from tests.browser import assert_fine
from tests.saes.corpora import write_chats, write_texts

STEPS = 24


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("texts")
    chats = Path(write_chats(folder / "chats.jsonl", 60, system="Be brief."))
    chats.write_text(chats.read_text() + '{"messages": []}\n')
    return str(chats), write_texts(folder / "texts.jsonl", 200)


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("PVSAE_CACHE", str(tmp_path_factory.getbasetemp() / "tokens"))


def config(texts: tuple[str, str], **training: Any) -> SaeTrainConfig:
    chats, plain = texts
    return config_of(
        {
            "model": {"name": "tiny"},
            "corpus": {
                "sources": [{"path": chats, "weight": 1, "strip_system": 0.5, "repeat": True}, {"path": plain, "repeat": True}],
                "context": 64, "drop_first": 1, "held_out": 0.3, "repeat": True,
            },
            "stream": {"batch_tokens": 256, "buffer_tokens": 2048, "window": 2, "calibration_tokens": 512},
            "training": {
                "dictionaries": {"block": [1, 2], "d_sae": 96, "k": 4, "lr": 3e-3}, "tokens": STEPS * 128, "batch": 128,
                "log_every": 4, "checkpoint_every": 5, "calibration_tokens": 1500, **training,
            },
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_models, texts):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PVSAE_CACHE", str(tmp_path_factory.getbasetemp() / "tokens"))
        out = tmp_path_factory.mktemp("sae") / "run"
        return sae_train.run(config(texts), out, model=tiny_models("qwen2"), progress=False)


def test_a_run_folder_holds_dictionaries_and_how_they_came_about(finished, texts) -> None:
    path = finished.path
    assert list(finished.folders) == ["block-1_width-96_k-4", "block-2_width-96_k-4"]
    for name, folder in finished.folders.items():
        sae = load(folder)
        assert sae.d_sae == 96
        assert f"block-{sae.info.block}_" in name
        assert sae.info.training["corpus"]["drop_first"] == 1
        assert sae.info.training["model"] == asdict(ModelConfig(name="tiny"))
    table = finished.table.set_index("dictionary")
    assert list(table["tokens"]) == [STEPS * 128] * 2
    assert list(table["l0"]) == [4.0, 4.0]
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines[::2]] == [4, 8, 12, 16, 20, 24]
    assert load_config(path / "config.yaml") == config(texts)
    summary = read_json(path / "result.json")
    assert {h["label"]: h["value"] for h in summary["headline"]}["training tokens"] == f"{STEPS * 128:,}"
    assert any("not a list of messages: 1" in note for note in summary["notes"])
    assert not (path / "checkpoint.pt").exists()
    assert read_json(path / "environment.json")


def test_the_page_shows_the_training(finished) -> None:
    assert [file.name for file in draw(finished.path)] == ["training.png"]
    page = write_report(finished.path).read_text()
    assert "Training of dictionaries" in page
    assert "block-2_width-96_k-4" in page
    assert "tiny" in page


def test_a_finished_training_is_read_back_without_the_model(finished, texts) -> None:
    before = (finished.path / "result.json").read_text()
    again = sae_train.run(config(texts), finished.path, progress=False)  # there is no model called "tiny" to load
    assert again.table.equals(finished.table)
    assert (finished.path / "result.json").read_text() == before


@pytest.mark.parametrize("kill_at", [3, 12])
def test_killed_and_started_again_it_ends_with_the_same_bits(
    finished, texts, tiny_models, tmp_path, monkeypatch, kill_at
) -> None:
    batches = stream_module.ActivationStream.batches

    def killed(self: Any, size: int) -> Any:
        for i, batch in enumerate(batches(self, size)):
            if i == kill_at:
                raise KeyboardInterrupt
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(stream_module.ActivationStream, "batches", killed)
        with pytest.raises(KeyboardInterrupt):
            sae_train.run(config(texts), tmp_path / "run", model=tiny_models("qwen2"), progress=False)
    with pytest.raises(UserError, match=r"another configuration; it differs in: config.training.tokens"):
        sae_train.run(config(texts, tokens=STEPS * 256), tmp_path / "run", model=tiny_models("qwen2"), progress=False)
    with pytest.raises(UserError, match=r"the weights of the model \(.*\), the corpus changed since"):
        sae_train.run(config(texts), tmp_path / "run", model=tiny_models("llama"), progress=False)
    resumed = sae_train.run(config(texts, log_every=4), tmp_path / "run", model=tiny_models("qwen2"), progress=False)
    for name in finished.folders:
        a, b = load(finished.folders[name]), load(resumed.folders[name])
        for array in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"):
            assert torch.equal(getattr(a, array), getattr(b, array)), array
    assert (finished.path / "metrics.jsonl").read_text() == (tmp_path / "run" / "metrics.jsonl").read_text()


def test_killed_before_its_summary_it_still_knows_what_was_left_out(finished, texts, tiny_models, tmp_path, monkeypatch) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sae_train, "_write", killed)
        with pytest.raises(KeyboardInterrupt):
            sae_train.run(config(texts), tmp_path / "run", model=tiny_models("qwen2"), progress=False)
    assert not (tmp_path / "run" / "result.json").exists()
    sae_train.run(config(texts), tmp_path / "run", progress=False)
    assert read_json(tmp_path / "run" / "result.json") == read_json(finished.path / "result.json")


def test_too_few_processes_for_the_shards_are_refused_before_anything_is_loaded(texts, tmp_path) -> None:
    with pytest.raises(UserError, match="width_shards is 2, and there is one process") as error:
        sae_train.run(config(texts, width_shards=2), tmp_path / "run", progress=False)  # there is no model called "tiny" to load
    assert "torchrun --nproc_per_node 2" in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_dictionary_is_evaluated_on_what_its_training_held_out(finished, tiny_models, tmp_path, monkeypatch) -> None:
    from pvsae.saes import corpus as corpus_module

    opened: list[Any] = []
    monkeypatch.setattr(
        corpus_module.Corpus, "rows", lambda self, held_out=False, rows=corpus_module.Corpus.rows: (
            opened.append((self.config, held_out)), rows(self, held_out=held_out)
        )[1],
    )  # fmt: skip
    folder = next(iter(finished.folders.values()))
    config = SaeEvalConfig(dictionary=str(folder), tokens=1000, loss_tokens=0)
    result = sae_eval.run(config, tmp_path / "eval", model=tiny_models("qwen2"))
    ((used, held_out),) = opened
    assert held_out
    assert (used.held_out, used.seed, used.drop_first, len(used.sources)) == (0.3, 0, 1, 2)
    quality = result.tables["quality"].set_index("set")
    assert quality["tokens"]["kept"] >= 1000
    assert 0 < quality["fvu"]["kept"] < 1.2


def test_a_dictionary_that_says_nothing_of_its_text_needs_some(finished, tiny_models, tmp_path) -> None:
    import shutil

    folder = tmp_path / "dictionary"
    shutil.copytree(next(iter(finished.folders.values())), folder)
    about = json.loads((folder / "cfg.json").read_text())
    del about["metadata"]["pvsae"]["training"]["corpus"]
    (folder / "cfg.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"does not say on which it was trained(?s:.*)--text FILE"):
        sae_eval.run(SaeEvalConfig(dictionary=str(folder)), tmp_path / "eval", model=tiny_models("qwen2"))


def test_the_plan_counts_what_the_training_takes(finished, texts, tiny_models, tiny_folders, tmp_path, monkeypatch) -> None:
    from dataclasses import replace

    from pvsae.models import model_shape

    model, wanted = tiny_models("qwen2"), config(texts)
    shape = model_shape(tiny_folders("qwen2"))
    assert shape.parameters == sum(p.numel() for p in model.hf.parameters())
    assert (shape.n_blocks, shape.d_model, shape.n_ctx) == (model.n_blocks, model.d_model, model.n_ctx)
    assert shape.block_parameters == tuple(sum(p.numel() for p in block.parameters()) for block in model.blocks)
    found = demand(shape, torch.float32, torch.device("cpu"), wanted.training, wanted.stream, 64)
    assert (found.tokens, found.steps) == (STEPS * 128, STEPS)
    arrays = 2 * (2 * 96 * 48 + 96 + 48) * 4
    assert found.memory["weights"] == found.saved == arrays
    assert found.memory["Adam"] == 2 * arrays
    assert found.memory["shuffle buffer"] == 2 * 2048 * 48 * 2
    assert found.model_seconds > 0 < found.step_seconds
    halves = replace(wanted.training, width_shards=2)
    half = demand(shape, torch.float32, torch.device("cpu"), halves, wanted.stream, 64)
    assert [half.memory[name] for name in ("weights", "Adam", "gradients")] == [
        found.memory[name] // 2 for name in ("weights", "Adam", "gradients")
    ]
    assert half.memory["shuffle buffer"] == found.memory["shuffle buffer"]
    assert half.checkpoint == found.checkpoint
    assert "each of 2 processes" in str(half)
    sizes = []
    monkeypatch.setattr(Path, "unlink", lambda self, missing_ok=False, unlink=Path.unlink: (
        sizes.append(self.stat().st_size) if self.name == "checkpoint.pt" else None, unlink(self, missing_ok=missing_ok)
    )[1])  # fmt: skip
    sae_train.run(wanted, tmp_path / "run", model=model, progress=False)
    assert sizes[0] == pytest.approx(found.checkpoint, rel=0.2)
    named = replace(wanted, model=replace(wanted.model, name=str(tiny_folders("qwen2"))))
    said = sae_train.plan(named)
    assert "3,072 in 24 steps of 128" in said
    assert "block-2_width-96_k-4" in said
    both = tuple(replace(d, block=9 if d.block == 2 else 1) for d in wanted.training.dictionaries)
    unknown = replace(named, training=replace(wanted.training, dictionaries=both))
    with pytest.raises(UserError, match=r"blocks 1, 9 of (?s:.*)0 to 3"):
        sae_train.plan(unknown)
    with pytest.raises(UserError, match="unknown device 'gpu'"):
        sae_train.plan(replace(named, stream=replace(named.stream, buffer_device="gpu")))


@pytest.mark.slow
def test_the_page_in_a_browser(finished, tmp_path) -> None:
    assert_fine(write_report(finished.path), tmp_path, images=1)
