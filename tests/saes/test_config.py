"""Configs of trainings: the shipped ones are whole, grids are spread out, mistakes are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pvsae import settings
from pvsae.errors import UserError
from pvsae.saes import shipped
from pvsae.saes.config import config_of, load_config

SHIPPED = (
    "llama-3.1-8b-instruct", "llama-3.2-1b-instruct", "organism", "organism-facets", "organism-llama",
    "qwen2.5-0.5b-instruct", "qwen2.5-7b-instruct", "qwen3-1.7b", "stories260k",
)  # fmt: skip


def values(**training: Any) -> dict[str, Any]:
    return {
        "model": {"name": "m"},
        "corpus": {"sources": [{"path": "a.jsonl"}], "context": 128},
        "training": {"dictionaries": {"block": 1, "d_sae": 64, "k": 4}, "tokens": 100_000, **training},
    }


def test_the_shipped_configs() -> None:
    assert tuple(shipped.names()) == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_config_is_valid_and_says_what_it_is(name: str, tmp_path: Path) -> None:
    config = load_config(name, ["model.name=FOLDER"] if name == "stories260k" else [])
    assert shipped.about(name) == config.about != ""
    text = shipped.find(name).read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert f"pvsae sae train {name}" in text
    (tmp_path / "again.yaml").write_text(settings.dump(config), encoding="utf-8")
    assert load_config(tmp_path / "again.yaml") == config


def test_the_recipe_behind_the_paper() -> None:
    config = load_config("qwen2.5-7b-instruct")
    assert [(d.block, d.d_sae, d.k, d.peak_lr) for d in config.training.dictionaries] == [
        (15, 131_072, 64, 1e-4), (19, 131_072, 64, 1e-4),
    ]  # fmt: skip
    t, s, c = config.training, config.stream, config.corpus
    assert (t.tokens, t.batch, t.warmup, t.decay, t.step.clip) == (500_000_000, 2048, 1000, 0.2, 1.0)
    assert (t.step.aux_coef, t.step.aux_k, t.step.dead_after, t.step.threshold_decay) == (1 / 32, None, 10_000_000, 0.999)
    assert (c.context, c.drop_first, s.buffer_tokens, s.outlier_multiple) == (1024, 8, 250_000, 10)
    assert [(source.kind, source.weight, source.strip_system) for source in c.sources] == [
        ("chat", 0.35, 0.8),
        ("text", 0.64, 0.0),
    ]
    llama = load_config("llama-3.1-8b-instruct")
    assert [d.name for d in llama.training.dictionaries] == ["block-15_width-131072_k-64"]
    assert llama.corpus.drop_first == 1
    assert llama.training.step == t.step


def test_the_model_of_stories260k_has_to_be_named() -> None:
    with pytest.raises(UserError) as error:
        load_config("stories260k")
    assert "stories260k.yaml: model.name is missing" in str(error.value)
    assert "add model.name=..." in str(error.value)


def test_lists_in_an_entry_are_combined() -> None:
    grid = {"block": [1, 3], "d_sae": [64, 128], "k": [4, 8], "lr": "1e-3"}
    found = config_of(values(dictionaries=grid)).training.dictionaries
    assert [(d.block, d.d_sae, d.k) for d in found] == [(b, f, k) for b in (1, 3) for f in (64, 128) for k in (4, 8)]
    assert {d.lr for d in found} == {1e-3}
    both = config_of(values(dictionaries=[grid, {"block": 0, "d_sae": 32, "k": 2, "seed": [0, 1]}])).training.dictionaries
    assert both[:8] == found
    assert [d.name for d in both[8:]] == ["block-0_width-32_k-2", "block-0_width-32_k-2_seed-1"]


def test_learning_rates_side_by_side_are_told_apart_by_their_folders() -> None:
    grid = [{"block": 1, "d_sae": 64, "k": [4, 8], "lr": [1e-3, 2e-3]}, {"block": 0, "d_sae": 2**14, "k": 4, "lr": 5e-4}]
    assert config_of(values(dictionaries=grid)).training.names == (
        "block-1_width-64_k-4_lr-0.001", "block-1_width-64_k-4_lr-0.002",
        "block-1_width-64_k-8_lr-0.001", "block-1_width-64_k-8_lr-0.002", "block-0_width-16384_k-4",
    )  # fmt: skip
    beside_the_law = {"block": 0, "d_sae": 2**14, "k": 4, "lr": [None, 1e-3]}
    assert config_of(values(dictionaries=beside_the_law)).training.names[0] == "block-0_width-16384_k-4_lr-0.0002"
    with pytest.raises(UserError, match=r"two dictionaries are the same: block-0_width-16384_k-4_lr-0\.0002"):
        config_of(values(dictionaries={**beside_the_law, "lr": [None, 2e-4]}))


def test_words_change_a_config() -> None:
    words = ["training.dictionaries.k=[4, 16]", "training.tokens=2e5", "corpus.sources.0.max_samples=500", "stream.seed=3"]
    config = load_config("organism", words)
    assert [d.k for d in config.training.dictionaries] == [4, 16]
    assert (config.training.tokens, config.corpus.sources[0].max_samples, config.stream.seed) == (200_000, 500, 3)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trainig.tokens=5"], "unknown key trainig"), (["trainig.tokens=5"], "did you mean training?"),
        (["tokens=5"], "did you mean corpus.tokens or training.tokens?"),
        (["training.lr=1e-3"], "did you mean training.dictionaries.0.lr?"),
        (["training.dictionaries.bloc=5"], "did you mean training.dictionaries.block?"),
        (["training.dictionaries.k=many"], "training.dictionaries.k is 'many'"),
        (["training.dictionaries=5"], "an entry or a list of entries"),
        (["training.batch=2.5"], "training.batch is 2.5"), (["training.step.clip=high"], "training.step.clip is 'high'"),
        (["corpus.sources.0.weigth=5"], "did you mean corpus.sources.0.weight?"),
        (["corpus.sources.0.weight=-1"], "in corpus.sources.0: weight -1"),
        (["corpus.sources.0.max_samples=null"], "without max_samples"),
        (["corpus.held_out=0"], "thresholds are set on tokens"), (["corpus.held_out=2"], "in corpus: held_out 2"),
        (["stream.dtype=float8"], "in stream: dtype 'float8'"), (["training.batch=200000"], "training.batch 200000"),
        (["training.decay=2"], "in training: decay is 2"), (["training.dictionaries.k=2000"], "k 2000"),
        (["training.dictionaries.k=[4, 4]"], "two dictionaries are the same"),
    ],
)  # fmt: skip
def test_mistakes_are_named(words: list[str], said: str) -> None:
    with pytest.raises(UserError) as error:
        load_config("organism", words)
    assert str(error.value).startswith("organism.yaml: ")
    assert said in str(error.value)


def test_a_config_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match=r"there is no config 'organsim'(?s:.*)did you mean organism\?"):
        load_config("organsim")


def test_only_where_and_how_the_work_is_done_may_change_in_a_run() -> None:
    base = load_config("organism").identity()
    free = ["about=x", "model.device=cuda", "stream.overlap=false", "stream.buffer_device=cpu", "stream.shards=folder",
            "training.log_every=3", "training.checkpoint_every=7"]  # fmt: skip
    assert load_config("organism", free).identity() == base
    for word in ("stream.seed=1", "training.tokens=2e5", "corpus.context=200", "model.dtype=bfloat16"):
        assert load_config("organism", [word]).identity() != base
