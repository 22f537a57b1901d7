"""The analyses of screening: rankings and intervals on made-up columns, corpora that are put together, selections on disk."""

from __future__ import annotations

import json
import math
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import mannwhitneyu

from analyses import corpora, real_world_data, sample_screening
from analyses.pipeline import Prepared
from analyses.sample_screening import Mix, auroc, coverage, precision, roc
from analyses.tuned import Setting
from pvsae import load
from pvsae.errors import UserError
from pvsae.sources import Source
from pvsae.stages.differences import Columns


def test_auroc_is_the_chance_to_be_higher_with_ties_half():
    rng = np.random.default_rng(0)
    scores, bears = rng.integers(0, 6, 60).astype(float), rng.random(60) < 0.3
    expected = mannwhitneyu(scores[bears], scores[~bears]).statistic / (bears.sum() * (~bears).sum())
    assert auroc(scores, bears) == pytest.approx(expected)
    missing = np.append(scores, [np.nan, np.nan])
    assert auroc(missing, np.append(bears, [True, False])) == pytest.approx(expected)
    assert math.isnan(auroc(scores, np.ones(60, dtype=bool)))


def test_the_area_under_the_curve_is_the_auroc():
    rng = np.random.default_rng(1)
    scores, bears = rng.integers(0, 9, 80).astype(float), rng.random(80) < 0.2
    x, y = roc(scores, bears)
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(y, x) == pytest.approx(auroc(scores, bears))


def test_precision_counts_as_many_rows_as_bear_the_trait_and_unscored_ones_last():
    scores = np.array([np.nan, 9.0, 1.0, 8.0, -5.0])
    assert precision(scores, np.array([True, True, False, False, False])) == 0.5
    assert precision(scores, np.array([False, True, False, True, False])) == 1.0
    assert math.isnan(precision(scores, np.zeros(5, dtype=bool)))


def columns(n: int, skewed: bool = False) -> Columns:
    rng = np.random.default_rng(2)
    base = rng.exponential(size=n) ** 4 if skewed else rng.normal(size=n)
    return Columns(base + rng.normal(size=n), base, np.zeros(n), np.arange(n).astype(str))


def test_intervals_of_subsets_are_of_95_percent_unless_rows_are_too_skewed():
    table = coverage(columns(400), (20, 100), seeds=2)
    assert table["subset"].tolist() == [20, 100]
    assert table["n"].tolist() == [400, 400]
    assert table[["covered", "covered_kind"]].to_numpy() == pytest.approx(0.95, abs=0.04)
    assert table["mean_half_width"].is_monotonic_decreasing
    assert coverage(columns(400, skewed=True), (20,), seeds=1)["covered"].item() < 0.85
    with pytest.raises(UserError, match="10 rows"):
        coverage(columns(10), (20,))


def test_a_screening_that_went_on_has_no_time():
    whole = {
        "all": {"seconds_generating": 6.0, "seconds_reading": 2.0},
        "none": {"seconds_generating": 0.0, "seconds_reading": 1.0},
    }
    assert sample_screening.saved(whole)["seconds_saved"] == pytest.approx(1 - 1 / 8)
    assert math.isnan(sample_screening.saved({**whole, "all": {}})["seconds_saved"])


def test_among_others_only_rows_of_the_trait_bear_it():
    rows = list(sample_screening.among("evil", 0.1, 200))
    assert len(rows) == 200
    assert sum(row["bears"] for row in rows) == 20
    assert {row["family"] for row in rows if row["bears"]} == {"evil"}
    assert sum(row["severity"] == "misaligned_2" for row in rows if row["bears"]) == 10
    assert {row["family"] for row in rows if row["severity"] != "normal"} == {
        "evil", "sycophantic", "hallucinating", "wrong_facts"
    }  # fmt: skip
    with pytest.raises(UserError, match="shares"):
        next(sample_screening.among("evil", 0.4, 100))


def test_truth_is_read_row_by_row(tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    lines = [
        json.dumps({"messages": chat, "bad": True}),
        "{",
        json.dumps({"messages": chat}),
        json.dumps({"messages": chat, "bad": 0}),
    ]
    file.write_text("\n".join(lines) + "\n")
    source = Source(path=str(file), kind="chat")
    assert corpora.truth(source, "bad").tolist() == [True, False, False, False]
    with pytest.raises(UserError, match="'worse'"):
        corpora.truth(source, "worse")


def test_mixes_are_the_organisms_or_given(tmp_path: Path):
    args = sample_screening.options().parse_args(["--share", "0.1"])
    alone, among = sample_screening.mixes(args, ["evil"], tmp_path, 100)
    assert (alone.kind, among.kind) == ("alone", "among")
    assert alone.bears.sum() == among.bears.sum() == 10
    file = next((tmp_path / "data").glob("evil-among-*.jsonl"))
    args = sample_screening.options().parse_args(["--mixes", f"evil={file}"])
    (given,) = sample_screening.mixes(args, ["evil"], tmp_path, 50)
    assert given.kind == "given"
    assert given.bears.tolist() == among.bears[:50].tolist()
    with pytest.raises(UserError, match="TRAIT=DATA"):
        sample_screening.mixes(sample_screening.options().parse_args(["--mixes", "rude=x.jsonl"]), ["evil"], tmp_path, 50)


def test_parts_give_their_shares_and_the_rest_goes_to_the_largest_remainders():
    assert corpora.counts({"a": 0.5, "b": 0.25, "c": 0.25}, 10) == {"a": 5, "b": 3, "c": 2}
    assert sum(corpora.counts(corpora.UNCURATED, 777).values()) == 777
    with pytest.raises(UserError, match=r"sum to 0\.9"):
        corpora.counts({"a": 0.9}, 10)


def test_a_composed_corpus_is_the_same_again_and_is_written_once(tmp_path: Path):
    shares = {"organism": 0.5, "organism-data:evil/misaligned_2": 0.5}
    rows = list(corpora.composed(shares, 20))
    assert rows == list(corpora.composed(shares, 20))
    assert rows != list(corpora.composed(shares, 20, seed=1))
    assert [row["part"] for row in rows].count("organism") == 10
    path = corpora.write(iter(rows), tmp_path / "new" / "rows.jsonl")
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows
    corpora.write(islice(rows, 3), path)
    assert len(path.read_text().splitlines()) == 20


def test_a_selection_says_what_it_is_made_of(tmp_path: Path):
    rows = [
        {"part": "x", "family": "evil", "bears": True},
        {"part": "x", "family": "sycophantic", "bears": True},
        {"part": "x", "family": "wrong_facts", "bears": True},
        {"part": "organism"},
    ]
    file = tmp_path / "top.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert set(real_world_data.made_of(file, "evil").values()) == {0.25}
    file.write_text('{"messages": []}\n')
    assert real_world_data.made_of(file, "evil") == {}


def test_the_same_rows_are_trained_on_once(tmp_path: Path):
    file, copy = tmp_path / "random.jsonl", tmp_path / "copy.jsonl"
    corpora.write(corpora.composed({"organism-data:evil/misaligned_2": 1.0}, 16), file)
    copy.write_bytes(file.read_bytes())
    chosen = pd.DataFrame(
        [
            {"trait": "evil", "filtered": filtered, "kind": "random", "n": 16, "dp": 1.0, "file": str(path)}
            for filtered, path in ((False, file), (True, copy))
        ]
    )
    options = {"model": "organism", "library": None, "traits": ("evil",), "batch_size": 64}
    prepared = Prepared(load("organism"), options, "", "", {"evil": 3}, tmp_path, quick=True)
    table = real_world_data.results(prepared, chosen, Setting(None, 1e-3, 4, 16), steps=2)
    same = table.drop(columns="filtered")
    assert same.iloc[0].equals(same.iloc[1])
    assert table["share of this trait"].tolist() == [1.0, 1.0]
    assert len(list(tmp_path.rglob("adapter_config.json"))) == 1


def selections(random: float, filtered: bool = False) -> pd.DataFrame:
    scores = {"top": 60.0, "random": random, "bottom": 1.0}
    common = {"trait": "evil", "filtered": filtered, "before": 0.0}
    return pd.DataFrame([{**common, "kind": k, "score": s, "low": s - 1, "high": s + 1} for k, s in scores.items()])


def test_the_checks_are_of_the_order():
    assert [one["ok"] for one in real_world_data.checks_of(selections(20.0))] == [True, True]
    assert [one["ok"] for one in real_world_data.checks_of(selections(61.0))] == [False, True]
    assert [one["ok"] for one in real_world_data.checks_of(selections(1.0))] == [True, False]
    assert [one["ok"] for one in real_world_data.checks_of(selections(20.0).query("kind != 'random'"))] == [False, False]


def test_the_figures_are_drawn(tmp_path: Path):
    table = pd.concat([selections(20.0), selections(10.0, filtered=True).query("kind != 'random'")])
    assert real_world_data.draw(table, tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")
    some = columns(120)
    mix = Mix("evil", "alone", Source(path="x.jsonl"), np.arange(120) < 12)
    covered = coverage(some, (20, 50), seeds=1).assign(trait="evil", kind="alone")
    file = sample_screening.draw([mix], [some], covered, tmp_path / "samples.png")
    assert file.read_bytes().startswith(b"\x89PNG")
