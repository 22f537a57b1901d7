"""What stages that read a text through a dictionary share: what a word means, what a dictionary says of its tokens and model."""

from __future__ import annotations

import pytest

from pvsae.errors import UserError
from pvsae.sources import Source
from pvsae.stages import SaeEvalConfig, SaeFeaturesConfig
from pvsae.stages.on_text import OnText, masks_of, source_of
from tests.saes.small import make_sae


def test_a_word_is_a_file_where_it_looks_like_one_and_else_a_dataset(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "talks").write_text("a", encoding="utf-8")
    assert source_of("talks") == Source(path="talks")
    for word in ("talks.jsonl", "more/*", "/x/y", "../x"):
        assert source_of(word) == Source(path=word)
    assert source_of("owner/name") == Source(dataset="owner/name")
    assert source_of("owner/Name-2.5") == Source(dataset="owner/Name-2.5")
    given = Source(named="organism", max_samples=3)
    assert source_of(given) is given


def test_masks_are_those_of_the_training() -> None:
    sae = make_sae().with_info(drop_first=4)
    assert masks_of(sae) == {"drop_first": 4}
    trained = sae.with_info(training={"corpus": {"tokens": "answers", "skip_special": False, "context": 99}})
    assert masks_of(trained) == {"drop_first": 4, "tokens": "answers", "skip_special": False}


@pytest.mark.parametrize("kind", [OnText, SaeEvalConfig, SaeFeaturesConfig])
def test_how_much_is_read_at_once_is_no_part_of_what_a_run_is(kind) -> None:
    plain, other = kind(dictionary="d"), kind(dictionary="d", batch_tokens=7)
    assert plain.identity() == other.identity()
    assert plain.identity() != kind(dictionary="d", tokens=7).identity()
    assert not kind.NOT_IDENTITY & plain.identity().keys()


def test_labels_may_be_asked_for_later_and_another_loss_is_another_run() -> None:
    assert SaeFeaturesConfig(dictionary="d", label_model="m").identity() == SaeFeaturesConfig(dictionary="d").identity()
    assert SaeEvalConfig(dictionary="d", loss_tokens=0).identity() != SaeEvalConfig(dictionary="d").identity()
    assert SaeEvalConfig(dictionary="d", loss_batch_tokens=9).identity() == SaeEvalConfig(dictionary="d").identity()


@pytest.mark.parametrize("change", [{"seed": -1}, {"batch_tokens": 0}, {"context": 0}, {"tokens": 0}])
@pytest.mark.parametrize("kind", [OnText, SaeEvalConfig, SaeFeaturesConfig])
def test_numbers_that_cannot_be_are_refused_before_anything_is_read(kind, change) -> None:
    (name,) = change
    with pytest.raises(UserError, match=f"{name} is"):
        kind(dictionary="d", **change)


def test_options_of_labels_are_looked_at_before_the_text_is_read() -> None:
    with pytest.raises(UserError, match="label_test is 0"):
        SaeFeaturesConfig(dictionary="d", label_test=0)
    with pytest.raises(UserError, match="--label-price"):
        SaeFeaturesConfig(dictionary="d", label_model="m", max_cost=1.0)
    SaeFeaturesConfig(dictionary="d", label_model="m", max_cost=1.0, label_price=(0.4, 1.6))
