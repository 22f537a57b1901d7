"""The benchmark of whole trainings: its parts alone do what the training does, no more and no less, and stop its clock."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.sae_end_to_end import KeptStream, Parts, Race, measure
from pvsae.saes.config import SaeTrainConfig, config_of
from pvsae.saes.corpus import Corpus
from tests.saes.corpora import write_chats

STEPS, BATCH, LOGGED = 33, 128, 5


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> SaeTrainConfig:
    chats = write_chats(tmp_path_factory.mktemp("texts") / "chats.jsonl", 150)
    return config_of(
        {
            "model": {"name": "tiny"},
            "corpus": {"sources": [{"path": chats}], "context": 64, "drop_first": 2, "held_out": 0.3, "repeat": True},
            "stream": {"batch_tokens": 256, "buffer_tokens": 2048, "window": 2, "calibration_tokens": 512},
            "training": {
                "dictionaries": {"block": [0, 1], "d_sae": 96, "k": 4, "lr": 3e-3}, "tokens": STEPS * BATCH, "batch": BATCH,
                "log_every": LOGGED, "calibration_tokens": 500,
            },
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def corpus(config, tiny_models, tmp_path_factory) -> Corpus:
    return Corpus(tiny_models("qwen2"), config.corpus, tmp_path_factory.mktemp("tokens"), progress=False)


def test_the_parts_do_all_that_the_training_does(config, tiny_models, tmp_path: Path) -> None:
    checks, details = measure(tiny_models("qwen2"), config, tmp_path, "tiny")
    names = ("speed_over_parts_alone", "whole_speed_over_parts_alone", "largest_difference_of_weights")
    assert [c["name"] for c in checks] == [f"tiny.{name}" for name in names]
    assert checks[2]["value"] == 0
    turns = details["turns"]
    assert [t["steps"] for t in turns] == [LOGGED] * (STEPS // LOGGED) + [STEPS % LOGGED]
    assert sum(t["passes"] for t in turns) > details["counts"]["harvested"] / config.stream.batch_tokens
    assert len(details["ratios"]) == len(turns) - 1
    assert all(ratio > 0 for ratio in details["ratios"])


def test_passes_of_another_training_are_noticed(config, corpus, tiny_models) -> None:
    model = tiny_models("qwen2")
    stream = KeptStream(model, corpus, config.training.blocks, config.stream)
    next(stream.batches(BATCH))
    parts = Parts(model, corpus, config)
    ids, batches = parts.follow(stream)
    assert (len(batches), parts.harvested) == (1, stream.counts["harvested"])
    assert sum(x.numel() for x in ids) > parts.harvested, "tokens that are not wanted are run as well"
    assert stream.given == []
    narrower = replace(config, stream=replace(config.stream, batch_tokens=200))
    with pytest.raises(AssertionError, match="not the passes"):
        Parts(model, corpus, narrower).follow(stream)


def test_the_model_alone_runs_as_far_as_the_block(config, corpus, tiny_models) -> None:
    model = tiny_models("qwen2")
    ran: list[tuple[int, tuple[int, ...]]] = []
    parts = Parts(model, corpus, config)
    before = [dict(block._forward_hooks) for block in model.blocks]  # the model is shared with other tests
    ids = [torch.ones(2, 7, dtype=torch.long), torch.ones(3, 5, dtype=torch.long)]
    handles = [
        block.register_forward_pre_hook(lambda module, args, i=i: ran.append((i, tuple(args[0].shape[:2]))))
        for i, block in enumerate(model.blocks)
    ]
    try:
        assert parts.forward(ids) == 2
    finally:
        for handle in handles:
            handle.remove()
    assert ran == [(0, (2, 7)), (1, (2, 7)), (0, (3, 5)), (1, (3, 5))]
    assert [dict(block._forward_hooks) for block in model.blocks] == before


def test_the_training_does_not_pay_for_its_parts(config, corpus, tiny_models, tmp_path: Path, monkeypatch) -> None:
    pause = 0.2
    monkeypatch.setattr(Parts, "forward", lambda parts, ids: time.sleep(pause) or len(ids))
    race = Race(tiny_models("qwen2"), corpus, config)
    start = time.perf_counter()
    whole, _ = race.run(tmp_path)
    wall = time.perf_counter() - start
    assert all(t.forward >= pause for t in race.turns)
    assert whole <= wall - pause * len(race.turns)
    assert sum(t.training for t in race.turns) <= whole
