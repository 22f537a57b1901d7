"""Accumulators against dense arrays; the same whatever the order and the batches."""

from __future__ import annotations

import numpy as np
import pytest

from pvsae.errors import UserError
from pvsae.saes.evidence import BINS, Context, Evidence, Firings, bin_edges, hashed, part_of, stretch

LATENTS = [3, 7, 8, 20, 41]
WINDOW, TOP, SAMPLES, QUIET = 8, 6, 25, 30


def make(n_rows: int = 60, seed: int = 0):
    """Rows, some of them packed with several samples and some of one sample in several rows, and dense activations of each."""
    g = np.random.default_rng(seed)
    rows, acts = [], []
    for i in range(n_rows):
        n = int(g.integers(5, 40))
        keep = g.random(n) < 0.9
        keep[0], keep[-1] = False, True
        parts = ((0, 0, i // 2),) if i % 3 else ((1, 0, 1000 + i), (max(2, n // 2), 1, i))
        rows.append(Context(g.integers(0, 500, n).astype(np.int32), keep, parts, i))
        dense = np.where(g.random((n, len(LATENTS))) < [0.5, 0.05, 0.2, 0.0, 0.01], g.lognormal(0, 1.5, (n, len(LATENTS))), 0)
        dense = np.round(dense, 1) * keep[:, None]  # ties
        acts.append(dense.astype(np.float32))
    return rows, acts


def feed(evidence: Evidence, rows, acts, size: int, order=None) -> Evidence:
    order = np.arange(len(rows)) if order is None else order
    for at in range(0, len(rows), size):
        some = order[at : at + size]
        dense = np.concatenate([acts[i] for i in some])
        cell, slot = np.nonzero(dense)
        keep = np.concatenate([rows[i].keep for i in some])
        evidence.add([rows[i] for i in some], keep, Firings(cell, slot, dense[cell, slot]))
    return evidence


def empty() -> Evidence:
    return Evidence(LATENTS, window=WINDOW, top=TOP, samples=SAMPLES, quiet=QUIET, seed=3)


def document(row: Context, position: int) -> int:
    mine = [p for p in row.parts if p[0] <= position] or [row.parts[0]]
    return mine[-1][1] << 40 | mine[-1][2]


@pytest.fixture(scope="module")
def made():
    rows, acts = make()
    return rows, acts, feed(empty(), rows, acts, 7)


def test_counts_and_histograms(made):
    rows, acts, evidence = made
    dense = np.concatenate(acts)
    assert evidence.tokens == sum(r.keep.sum() for r in rows)
    assert evidence.rows == len(rows)
    np.testing.assert_array_equal(evidence.fired, (dense > 0).sum(0))
    np.testing.assert_array_equal(evidence.peak, dense.max(0))
    np.testing.assert_allclose(evidence.mean[:3], [dense[dense[:, i] > 0, i].astype(float).mean() for i in range(3)], rtol=1e-4)
    assert np.isnan(evidence.mean[3]), "never active"
    for slot in range(len(LATENTS)):
        values = dense[dense[:, slot] > 0, slot]
        expected, _ = np.histogram(np.clip(values, 2.0**-9.99, 2.0**13.99), bin_edges())
        np.testing.assert_array_equal(evidence.histogram[slot], expected)
    assert evidence.histogram.shape == (5, BINS)
    np.testing.assert_allclose(evidence.density, (dense > 0).sum(0) / evidence.tokens)


def test_top_examples_are_the_highest_of_distinct_documents(made):
    rows, acts, evidence = made
    by_number = {r.number: r for r in rows}
    for slot in range(len(LATENTS)):
        best: dict[int, tuple] = {}
        for row, dense in zip(rows, acts, strict=True):
            for position in np.flatnonzero(dense[:, slot]):
                d = document(row, position)
                best[d] = min(best.get(d, (0.0, 0, 0)), (-float(dense[position, slot]), row.number, int(position)))
        expected = sorted((value, d, row, position) for d, (value, row, position) in best.items())[:TOP]
        found = evidence.examples(slot, evidence.top, by_number)
        assert [(-e.value, e.document, e.row, e.position) for e in found] == expected


def test_examples_show_the_activations_of_their_tokens(made):
    rows, acts, evidence = made
    by_number = {r.number: r for r in rows}
    seen = 0
    for slot in range(len(LATENTS)):
        for kept in (evidence.top, evidence.sample):
            for e in evidence.examples(slot, kept, by_number):
                row = rows[e.row]
                begin, end = part_of(row, e.position)
                assert begin <= e.start <= e.position < e.stop <= end
                assert e.stop - e.start == min(WINDOW, end - begin)
                np.testing.assert_allclose(e.values, acts[e.row][e.start : e.stop, slot], rtol=1e-3)
                assert e.value == acts[e.row][e.position, slot]
                seen += 1
    assert seen > 80


def test_the_sample_is_even_over_firings_and_has_a_document_once():
    """Of one feature that fires at known values in documents of one firing each, the sample's mean is that of all."""
    n = 4000
    values = np.random.default_rng(1).lognormal(0, 1, n).astype(np.float32)
    rows = [Context(np.zeros(3, np.int32), np.ones(3, bool), ((0, 0, i),), i) for i in range(n)]
    evidence = Evidence([5], window=2, top=3, samples=400, seed=0)
    evidence.add(rows, np.ones(3 * n, bool), Firings(np.arange(n) * 3 + 1, np.zeros(n, int), values))
    sampled = evidence.sample.value[0]
    assert len(set(evidence.sample.document[0])) == 400
    assert np.log(sampled).mean() == pytest.approx(np.log(values).mean(), abs=4 / np.sqrt(400))
    assert (np.log(sampled) < 0).mean() == pytest.approx(0.5, abs=0.1)
    other = Evidence([6], window=2, top=3, samples=400, seed=0)
    other.add(rows, np.ones(3 * n, bool), Firings(np.arange(n) * 3 + 1, np.zeros(n, int), values))
    assert set(other.sample.document[0]) != set(evidence.sample.document[0]), "another feature, another sample"


@pytest.mark.parametrize("size", [1, 13, 60])
def test_batches_and_order_change_nothing(made, size):
    rows, acts, evidence = made
    order = np.random.default_rng(size).permutation(len(rows))
    other = feed(empty(), rows, acts, size, order)
    by_number = {r.number: r for r in rows}
    for name in ("fired", "peak", "histogram", "sums"):
        assert evidence.state()[name].tobytes() == other.state()[name].tobytes(), name
    for slot in range(len(LATENTS)):
        for one, two in ((evidence.top, other.top), (evidence.sample, other.sample)):
            a, b = evidence.examples(slot, one, by_number), other.examples(slot, two, by_number)
            assert [(e._replace(values=None), e.values.tolist()) for e in a] == [
                (e._replace(values=None), e.values.tolist()) for e in b
            ]
        assert [e._replace(values=None) for e in evidence.quiet_for(slot, 9)] == [
            e._replace(values=None) for e in other.quiet_for(slot, 9)
        ]
    assert evidence.quiet.windows == other.quiet.windows
    assert evidence.tokens == other.tokens


def test_a_feature_alone_has_the_evidence_that_it_has_among_others(made):
    rows, acts, evidence = made
    alone = Evidence([LATENTS[2]], window=WINDOW, top=TOP, samples=SAMPLES, quiet=QUIET, seed=3)
    feed(alone, rows, [a[:, 2:3] for a in acts], 7)
    by_number = {r.number: r for r in rows}
    one = [e[:6] for e in evidence.examples(2, evidence.sample, by_number)]
    two = [e[:6] for e in alone.examples(0, alone.sample, by_number)]
    assert [e[:5] for e in one] == [e[:5] for e in two]


def test_it_goes_on_from_its_state(made, tmp_path):
    rows, acts, evidence = made
    half = feed(empty(), rows[:28], acts[:28], 7)
    np.savez(tmp_path / "state.npz", **half.state())
    again = empty()
    with np.load(tmp_path / "state.npz") as saved:
        again.restore(saved)
    feed(again, rows[28:], acts[28:], 7)
    for name, array in evidence.state().items():
        assert array.tobytes() == again.state()[name].tobytes(), name


def test_quiet_windows_are_silent_and_count(made):
    rows, acts, evidence = made
    for slot in range(len(LATENTS)):
        windows = evidence.quiet_for(slot, 10)
        for e in windows:
            assert not acts[e.row][e.start : e.stop, slot].any()
            assert rows[e.row].keep[e.start : e.stop].sum() * 2 >= WINDOW
            begin, end = part_of(rows[e.row], e.start)
            assert begin <= e.start < e.stop <= end
    assert len(evidence.quiet_for(3, 10)) == 10, "a feature that never fires is silent everywhere"
    total = len(evidence.quiet.windows)
    assert len(evidence.quiet_for(0, total)) < total, "a frequent one is not"


def test_stretches_and_hashes():
    assert stretch(20, 0, 100, 9) == (14, 23)
    assert stretch(1, 0, 100, 9) == (0, 9)
    assert stretch(99, 0, 100, 9) == (91, 100)
    assert stretch(12, 10, 15, 9) == (10, 15)
    x = hashed(1, 2, np.arange(10_000))
    assert x.min() >= 0
    assert x.max() < 1
    assert x.mean() == pytest.approx(0.5, abs=0.02)
    assert len(np.unique(x)) == 10_000


def test_what_cannot_be_is_said():
    with pytest.raises(UserError, match="each of them once"):
        Evidence([1, 1])
    with pytest.raises(UserError, match="some features"):
        Evidence([])
    with pytest.raises(UserError, match="windows of 1"):
        Evidence([1], window=1)


def test_memory_is_what_is_said():
    evidence = Evidence(list(range(300)), window=32, top=20, samples=100)
    arrays = [a for name, a in evidence.state().items() if not name.startswith("quiet") and a.ndim]
    arrays += [evidence.top.worst, evidence.sample.worst]
    assert sum(a.nbytes for a in arrays) == 300 * Evidence.bytes_a_feature(32, 20, 100)
    assert 131_072 * Evidence.bytes_a_feature(32, 20, 100) < 2e9, "all features of the published dictionaries"
