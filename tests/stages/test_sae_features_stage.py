"""The stage around the evidence of features: its files, going on after a stop, labels that come later, its page and command."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from pvsae.cli import main
from pvsae.errors import UserError
from pvsae.reports import write_feature_page, write_report
from pvsae.saes.cards import read_cards
from pvsae.saes.folders import load, save
from pvsae.stages.sae_features import SaeFeaturesConfig, _corpus, plan, run
from tests.browser import assert_fine
from tests.fake_server import END, FakeServer
from tests.saes.corpora import text
from tests.saes.small import make_sae


class Says:
    """Labels everything alike and answers yes to everything."""

    def following(self, messages, begun):
        asked = messages[-1]["content"]
        n = len(re.findall(r"Passage \d+:", asked))
        said = "LABEL: letters & <things>" if "LABEL:" in asked else ",".join("1" * n)
        return {END: 1.0} if begun else {said: 1.0}


@pytest.fixture
def made(tmp_path, tiny_models, monkeypatch):
    """A dictionary of the tiny model, a text file and the config that looks at four features on it."""
    monkeypatch.setenv("PVSAE_CACHE", str(tmp_path / "cache"))
    model = tiny_models("qwen2")
    sae = make_sae(d_model=model.d_model, d_sae=96, threshold=1.0)
    save(
        sae.with_info(outliers=None, context_size=32, drop_first=2, neuronpedia="tiny-it/1-res", model="qwen2"), tmp_path / "sae"
    )
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text(i)}) + "\n" for i in range(60)))
    config = SaeFeaturesConfig(
        dictionary=str(tmp_path / "sae"), features=("5", "2", "40", "77"), text=(str(file),), tokens=900, window=8, top=5,
        samples=30, quiet=40, label_train=8, label_test=10,
    )  # fmt: skip
    return model, config


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted((folder / "cards").rglob("*")) if p.is_file()}


def test_files_table_and_page(made, tmp_path):
    model, config = made
    result = run(config, tmp_path / "run", model=model, progress=False)
    assert result.table["feature"].tolist() == [2, 5, 40, 77]
    assert (result.table["label"] == "").all()
    assert result.table["link"][0] == "https://www.neuronpedia.org/tiny-it/1-res/2"
    assert any("no language model was named" in note for note in result.summary["notes"])
    cards = list(read_cards(tmp_path / "run" / "cards" / "cards.jsonl"))
    for card, (_, row) in zip(cards, result.table.iterrows(), strict=True):
        assert card["latent"] == row["feature"]
        assert sum(b["n"] for b in card["histogram"]) == card["fired"] == row["fired"]
        assert card["density"] == pytest.approx(card["fired"] / card["tokens"])
        assert len(card["promoted"]) == len(card["demoted"]) == 10
        assert len(card["nearest"]) == 8
        assert card["latent"] not in [n["latent"] for n in card["nearest"]]
        for e in card["top"]:
            assert len(e["tokens"]) == len(e["values"]) <= 8
            assert e["values"][e["at"]] == pytest.approx(e["value"], rel=2e-3)
    assert (tmp_path / "run" / "neuronpedia" / "tiny-it" / "1-res" / "features" / "batch-0.jsonl.gz").is_file()
    assert len(pd.read_csv(tmp_path / "run" / "tables" / "features.csv")) == 4
    page = write_feature_page(tmp_path / "run").read_text()
    assert page.count("<section") == 4
    assert "<script" not in page
    assert not re.search(r'(src|href)="(?!#|https://www\.neuronpedia\.org/)', page), "nothing is loaded"
    assert "Evidence for features" in write_report(tmp_path / "run").read_text()
    assert write_feature_page(tmp_path / "run", most=1).read_text().count("<section") == 1


def test_the_nearest_features_are_those_of_the_highest_cosine(made, tmp_path):
    from pvsae.saes.folders import load

    model, config = made
    run(config, tmp_path / "run", model=model, progress=False)
    decoder = load(config.dictionary).W_dec.numpy()
    unit = decoder / np.linalg.norm(decoder, axis=1, keepdims=True)
    for card in read_cards(tmp_path / "run" / "cards" / "cards.jsonl"):
        cosines = unit @ unit[card["latent"]]
        cosines[card["latent"]] = -2
        assert [n["latent"] for n in card["nearest"]] == np.argsort(-cosines)[:8].tolist()
        np.testing.assert_allclose([n["cosine"] for n in card["nearest"]], np.sort(cosines)[::-1][:8], atol=1e-4)


def test_stopped_at_any_step_it_ends_with_the_same(made, tmp_path, monkeypatch):
    model, config = made
    run(config, tmp_path / "whole", model=model, progress=False)

    def dies(*args, **kwargs):
        raise KeyboardInterrupt

    for at in ("pvsae.saes.gather.gather", "pvsae.saes.cards.cards", "pvsae.stages.sae_features._table"):
        with monkeypatch.context() as patched:
            patched.setattr(at, dies)
            with pytest.raises(KeyboardInterrupt):
                run(config, tmp_path / "run", model=model, progress=False)
    run(config, tmp_path / "run", model=model, progress=False)
    assert files(tmp_path / "run") == files(tmp_path / "whole")
    monkeypatch.setattr("pvsae.saes.gather.gather", dies)
    again = run(replace(config, batch_tokens=64), tmp_path / "run", model=model, progress=False)
    assert len(again.table) == 4
    with pytest.raises(UserError, match="tokens"):
        run(replace(config, tokens=500), tmp_path / "run", model=model, progress=False)


def test_labels_may_come_later_and_stay(made, tmp_path):
    model, config = made
    run(config, tmp_path / "run", model=model, progress=False)
    with FakeServer(Says()) as server:
        asking = replace(config, label_model="fake", label_url=server.url)
        labelled = run(asking, tmp_path / "run", model=model, progress=False)
        sold = len(server.sold)
        assert run(asking, tmp_path / "run", model=model, progress=False).table.equals(labelled.table)
        assert len(server.sold) == sold
    fired = labelled.table["fired"] > 0
    assert (labelled.table["label"][fired] == "letters & <things>").all()
    scored = labelled.table[fired & (labelled.table["quiet"] > 0)]
    assert len(scored)
    assert (scored["detection"] == 0.5).all()
    assert labelled.summary["costs"][0]["calls"] == sold
    page = write_feature_page(tmp_path / "run").read_text()
    assert "letters &amp; &lt;things&gt;" in page
    assert "detection" in page
    later = run(config, tmp_path / "run", model=model, progress=False)
    assert later.table["label"].equals(labelled.table["label"]), "labels of an earlier start are kept"
    assert (tmp_path / "run" / "neuronpedia" / "tiny-it" / "1-res" / "explanations" / "batch-0.jsonl.gz").is_file()


def test_labels_of_many_features_are_asked_for_in_parts_and_come_out_the_same(made, tmp_path, monkeypatch):
    """So that the passages of all of them are never in memory at once."""
    from pvsae.saes import labels
    from pvsae.stages import sae_features

    model, config = made
    asked, ask = [], labels.label_features
    monkeypatch.setattr(labels, "label_features", lambda some, *a, **k: asked.append(len(some)) or ask(some, *a, **k))
    with FakeServer(Says()) as server:
        wanted = replace(config, label_model="says", label_url=server.url)
        whole = run(wanted, tmp_path / "whole", model=model, progress=False).table
        monkeypatch.setattr(sae_features, "LABELLED_AT_ONCE", 3)
        parts = run(wanted, tmp_path / "parts", model=model, progress=False).table
    assert asked == [4, 3, 1]
    pd.testing.assert_frame_equal(parts, whole)


def test_without_a_server_everything_else_is_made(made, tmp_path):
    model, config = made
    with FakeServer(Says()) as server:
        url = server.url
    result = run(replace(config, label_model="fake", label_url=url), tmp_path / "run", model=model, progress=False)
    assert len(result.table) == 4
    assert any("No labels" in note and "no answer" in note for note in result.summary["notes"])


def test_text_is_read_with_the_model_and_the_masks_of_the_training(made, tmp_path, monkeypatch):
    model, config = made
    asked = []
    monkeypatch.setattr("pvsae.models.load", lambda name, **options: asked.append((name, options)) or model)
    trained = {"model": {"name": "base", "adapter": "lora", "chat": "plain"}}
    trained["corpus"] = {"sources": [{"path": "gone"}], "tokens": "answers", "skip_special": False}
    save(load(config.dictionary).with_info(model="base+lora", training=trained), config.dictionary)
    config = replace(config, other_model=True)  # whatever is asked for, the tiny model comes
    run(config, tmp_path / "run", progress=False)
    assert [(name, options["adapter"], options["chat"]) for name, options in asked] == [("base", "lora", "plain")]
    found, held_out = _corpus(config, model, load(config.dictionary))
    assert (found.tokens, found.skip_special, found.drop_first, held_out) == ("answers", False, 2, False)


def test_a_book_is_read_to_its_end(made, tmp_path):
    """One document, far longer than a row: all of it is read, and its rows give examples as documents do."""
    model, config = made
    book = tmp_path / "book.txt"
    book.write_text("\n".join(text(i) for i in range(60)))
    result = run(replace(config, text=(str(book),)), tmp_path / "run", model=model, progress=False)
    assert not any("The text ended" in note for note in result.summary["notes"])
    assert result.table["fired"].max() > 50
    cards = list(read_cards(tmp_path / "run" / "cards" / "cards.jsonl"))
    assert max(len(card["top"]) for card in cards) == config.top
    assert all(len({e["row"] for e in card["top"]}) == len(card["top"]) for card in cards)


def test_live_and_all_features(made, tmp_path):
    model, config = made
    live = run(replace(config, features=("live:3",)), tmp_path / "live", model=model, progress=False)
    assert len(live.table) == 3
    assert (live.table["fired"] > 0).all()
    every = run(replace(config, features=("all",)), tmp_path / "all", model=model, progress=False)
    assert every.table["feature"].tolist() == list(range(96))
    some = every.table.set_index("feature").loc[live.table["feature"]]
    assert some["fired"].tolist() == live.table["fired"].tolist()


def test_what_cannot_be_is_said(made, tmp_path):
    model, config = made
    for words in (("-1",), ("live:0",), ("some",), ("all", "3"), ()):
        with pytest.raises(UserError, match="features"):
            replace(config, features=words)
    with pytest.raises(UserError, match="no model"):
        replace(config, label_url="http://localhost:1/v1")
    other = save(load(config.dictionary).with_info(model="other/model"), tmp_path / "other-sae")
    for i, (message, wrong) in enumerate(
        {
            "feature 96": replace(config, features=("96",)),
            "there is no dictionary": replace(config, dictionary=str(tmp_path / "nowhere")),
            "does not say on which": replace(config, text=()),
            "held_out": replace(config, held_out=True),
            "block 2 is asked for": replace(config, block=2),
            "is of other/model, the model is": replace(config, dictionary=str(other)),
        }.items()
    ):
        with pytest.raises(UserError, match=message):
            run(wrong, tmp_path / f"run{i}", model=model, progress=False)
    meant = run(replace(config, dictionary=str(other), other_model=True), tmp_path / "meant", model=model, progress=False)
    assert any("Two models" in note for note in meant.summary["notes"])
    with pytest.raises(UserError, match="no evidence"):
        write_feature_page(run_of_another_kind(tmp_path))


def run_of_another_kind(tmp_path):
    from pvsae.runs import RunDir

    RunDir.open(tmp_path / "other", "steer", {}, 0).close()
    return tmp_path / "other"


def test_the_plan_says_memory_disk_and_calls(made, tmp_path):
    model, config = made
    from pvsae.saes.evidence import Evidence

    said = plan(replace(config, features=("all",)))
    record = int(re.search(r"records \(([\d,]+) bytes a feature\)", said)[1].replace(",", ""))
    run(replace(config, features=("all",)), tmp_path / "run", model=model, progress=False)
    assert 0.3 < (tmp_path / "run" / "cards" / "cards.jsonl").stat().st_size / (96 * record) < 2
    assert f"{Evidence.bytes_a_feature(8, 5, 30):,} bytes a feature" in said
    assert "no --label-model" in said
    said = plan(replace(config, label_model="m", label_url="http://localhost:1/v1", label_price=(1.0, 2.0)))
    # One label, 20 passages of detection and 20 of fuzzing in questions of five, for each of the four features.
    assert f"at most {4 * (1 + 4 + 4)} calls" in said
    assert "dollars" in said
    with pytest.raises(UserError, match="feature 99"):
        plan(replace(config, features=("99",)))


def test_the_command(made, tmp_path, tiny_folders, capsys):
    _, config = made
    base = [
        "sae", "features", config.dictionary, "--text", *config.text, "--model", str(tiny_folders("qwen2")),
        "--features", "5", "40", "--tokens", "300", "--window", "8", "--out", str(tmp_path / "run"),
    ]  # fmt: skip
    assert main([*base, "--dry-run"]) == 0
    assert "features    2 (5 40)" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert main(base) == 0
    out = capsys.readouterr().out
    assert "features.html" in out
    assert "note: No labels" in out
    assert (tmp_path / "run" / "features.html").is_file()
    assert main(["sae", "features", config.dictionary, "--features", "x"]) == 2
    assert "live:N" in capsys.readouterr().err


@pytest.mark.slow
def test_the_page_in_a_browser_has_no_errors_and_fits_a_phone(made, tmp_path):
    model, config = made
    run(config, tmp_path / "run", model=model, progress=False)
    assert_fine(write_feature_page(tmp_path / "run"), tmp_path / "evidence", images=0)
    assert_fine(write_report(tmp_path / "run"), tmp_path / "report", images=0)
