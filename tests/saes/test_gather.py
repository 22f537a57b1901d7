"""One pass over a corpus against everything computed at once; stopped and gone on with; rows read again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pvsae.errors import UserError
from pvsae.saes.evidence import Evidence
from pvsae.saes.gather import Place, gather, live_latents, median_norm, rows_again
from pvsae.saes.harvest import harvest
from pvsae.sources import Source
from tests.saes.corpora import open_corpus, write_texts
from tests.saes.small import make_sae

LATENTS = [2, 5, 40, 77]


@pytest.fixture
def place(tiny_models, tmp_path):
    model = tiny_models("qwen2")
    sae = make_sae(d_model=model.d_model, d_sae=96, threshold=1.0).with_info(outliers=None)
    source = Source(path=write_texts(tmp_path / "texts.jsonl", 120))
    return Place(model, sae, 1, open_corpus(model, tmp_path, source, drop_first=2, held_out=0.2))


def empty(**options) -> Evidence:
    return Evidence(LATENTS, **{"window": 8, "top": 5, "samples": 12, "quiet": 20, "seed": 1, **options})


def dense(place):
    """Of each row of the walk all activations, [pos, latents], 0 where a token does not count."""
    out = []
    for row in place.rows():
        x = harvest(place.model, [row], [place.block], torch.float32)[place.block]
        acts = place.sae.encode(x)[:, LATENTS].numpy() * (~place.sae.outliers(x)).numpy()[:, None]
        full = np.zeros((len(row.ids), len(LATENTS)), np.float32)
        full[row.keep] = acts
        out.append(full)
    return out


def compare(place, evidence, every, n_rows):
    acts = np.concatenate(every[:n_rows])
    np.testing.assert_array_equal(evidence.fired, (acts > 0).sum(0))
    np.testing.assert_allclose(evidence.peak, acts.max(0), rtol=1e-4)
    rows = rows_again(place, evidence.rows_needed())
    walk = [row for _, row in zip(range(n_rows), place.rows(), strict=False)]
    for slot in range(len(LATENTS)):
        top = evidence.examples(slot, evidence.top, rows)
        expected = sorted((a[:, slot].max() for a in every[:n_rows]), reverse=True)[:5]
        np.testing.assert_allclose([e.value for e in top], [v for v in expected if v > 0], rtol=1e-4)
        for e in (*top, *evidence.examples(slot, evidence.sample, rows)):
            np.testing.assert_array_equal(rows[e.row].ids, walk[e.row].ids)
            np.testing.assert_allclose(e.values, every[e.row][e.start : e.stop, slot], rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("batch_tokens", [64, 700])
def test_the_evidence_is_that_of_all_activations(place, batch_tokens):
    every = dense(place)
    evidence = gather(place, empty(), 10**9, batch_tokens=batch_tokens, progress=False)
    assert evidence.rows == len(every)
    assert evidence.tokens == sum(int(row.keep.sum()) for row in place.rows())
    compare(place, evidence, every, len(every))


def test_it_ends_after_so_many_tokens_whatever_the_batches(place):
    seen = {gather(place, empty(), 300, batch_tokens=n, progress=False).tokens for n in (40, 90, 4000)}
    assert len(seen) == 1
    assert 300 <= seen.pop() < 340


def test_outliers_do_not_count(place):
    norms = torch.cat([harvest(place.model, [r], [1], torch.float32)[1].norm(dim=-1) for r in place.rows()])
    from pvsae.saes.dictionary import OutlierFilter

    limit = float(norms.quantile(0.7))
    cut = place._replace(sae=place.sae.with_info(outliers=OutlierFilter(2.0, limit / 2)))
    evidence = gather(cut, empty(), 10**9, progress=False)
    assert evidence.tokens == int((norms <= limit).sum())
    every = dense(cut)
    compare(cut, evidence, every, len(every))


def test_all_latents_and_a_few_of_them_say_the_same(place, monkeypatch):
    few = gather(place, empty(), 500, progress=False)
    monkeypatch.setattr("pvsae.saes.gather.FEW", 1)
    many = gather(place, empty(), 500, progress=False)
    np.testing.assert_array_equal(few.fired, many.fired)
    np.testing.assert_allclose(few.peak, many.peak, rtol=1e-5)
    assert [w[:5] for w in few.quiet.windows] == [w[:5] for w in many.quiet.windows]


class Killed(Exception):
    pass


@pytest.mark.parametrize("kill_at", [3, 6])
def test_killed_it_goes_on_bit_for_bit(place, tmp_path, monkeypatch, kill_at):
    import pvsae.saes.gather as module

    monkeypatch.setattr(module, "PASSES", 1)
    whole = gather(place, empty(), 1200, batch_tokens=200, progress=False)
    file, add, calls = tmp_path / "at" / "state.npz", module._add, []

    def dies(*args):
        if len(calls) == kill_at:
            raise Killed
        calls.append(1)
        add(*args)

    monkeypatch.setattr(module, "_add", dies)
    with pytest.raises(Killed):
        gather(place, empty(), 1200, batch_tokens=200, checkpoint=file, every=0, progress=False)
    assert file.is_file()
    monkeypatch.setattr(module, "_add", lambda *args: (calls.append(1), add(*args)))
    before = len(calls)
    again = gather(place, empty(), 1200, batch_tokens=200, checkpoint=file, every=0, progress=False)
    assert len(calls) - before > 0
    for name, array in whole.state().items():
        assert array.tobytes() == again.state()[name].tobytes(), name


def test_live_latents_fire_and_depend_on_the_seed(place):
    found = live_latents(place, 9, 0)
    assert found == sorted(set(found)) == live_latents(place, 9, 0)
    assert found != live_latents(place, 9, 1)
    evidence = gather(place, Evidence(found, window=4), 10**9, progress=False)
    assert (evidence.fired > 0).all()
    with pytest.raises(UserError, match="live features"):
        live_latents(place, 97, 0)


def test_the_median_norm_is_that_of_the_wanted_tokens(place):
    norms = torch.cat([harvest(place.model, [r], [1], torch.float32)[1].norm(dim=-1) for r in place.rows()])
    assert median_norm(place) == pytest.approx(float(norms.median()), rel=1e-4)


def test_packed_rows_keep_documents_apart(place, tmp_path):
    source = Source(path=write_texts(tmp_path / "more.jsonl", 60))
    corpus = open_corpus(place.model, tmp_path, source, fit="pack", context=64, held_out=0.0)
    packed = place._replace(corpus=corpus)
    rows = list(packed.rows())
    for row in rows:
        for begin, source_number, index in row.parts:
            sample = corpus.sample(source_number, index).ids
            assert row.ids[begin] in sample
        assert all(a[0] < b[0] for a, b in zip(row.parts, row.parts[1:], strict=False))
    whole = [row.parts[i] for row in rows for i in range(1, len(row.parts) - 1)]
    assert len(whole) > 10
    evidence = gather(packed, empty(samples=60), 10**9, progress=False)
    for kept in (evidence.top, evidence.sample):
        for slot in range(len(LATENTS)):
            documents = kept.document[slot][np.isfinite(kept.key[slot])]
            assert len(set(documents.tolist())) == len(documents)
