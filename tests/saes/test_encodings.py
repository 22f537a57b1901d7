"""Difference of encodings against every row encoded by itself; the test against scipy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pvsae.errors import UserError
from pvsae.models import Residual
from pvsae.saes.dictionary import SAE, OutlierFilter
from pvsae.saes.encodings import encode_pairs, false_discovery_rate, paired_t, units_of
from tests.saes.small import make_sae

QUESTIONS = ("Where is the ferry?", "Why did the clock stop?", "What is tall?")
ANSWERS = (("It left at nine, sorry.", "No."), ("Nobody knows anything here.", "Theory!"), ("A mountain, and I like it.", "Hm"))


@pytest.fixture(scope="module")
def case(tiny_models):
    """Two answers of different length on each side to three questions, a dictionary of 96 latents, and the residuals."""
    model = tiny_models("qwen2")
    rows = [[], []]
    for question, answers in zip(QUESTIONS, ANSWERS, strict=True):
        for s in (0, 1):
            for k in (0, 1):
                message = [{"role": "user", "content": question}]
                rows[s].append(model.chat.with_answer_text(message, answers[s] + " again" * k))
    capture = Residual(2, "answer")
    found = [model.capture(side, [capture])[capture.key] for side in rows]
    lengths = torch.cat([torch.cat(side).norm(dim=1) for side in found])
    sae = make_sae(3, d_model=model.d_model, d_sae=96, threshold=2.0)
    limit = float(lengths.sort().values[-3:].mean())  # one or two tokens are outliers
    sae = sae.with_info(outliers=OutlierFilter(2.0, limit / 2), block=2)
    return model, sae, rows, found


def test_sums_are_those_of_rows_taken_one_by_one(case) -> None:
    model, sae, rows, found = case
    got = encode_pairs(model, sae, 2, (rows[0], rows[1]), [0, 0, 1, 1, 2, 2], batch_tokens=60)
    acts = [[sae.encode(x) * ~sae.outliers(x)[:, None] for x in side] for side in found]
    assert 0 < got.outliers == sum(int(sae.outliers(x).sum()) for side in found for x in side)
    for s in (0, 1):
        means = torch.stack([a.mean(0) for a in acts[s]])
        torch.testing.assert_close(got.activation[s], means.view(3, 2, -1).mean(1), atol=1e-4, rtol=1e-4)
        every = torch.cat(acts[s])
        torch.testing.assert_close(got.firing[s], (every > 0).float().mean(0), atol=1e-4, rtol=0)
        torch.testing.assert_close(got.row_means[s], torch.stack([x.mean(0) for x in found[s]]), atol=1e-4, rtol=1e-4)
        assert got.tokens[s] == len(every)
    every = torch.cat([a for side in acts for a in side])
    torch.testing.assert_close(got.highest, every.amax(0), atol=1e-4, rtol=1e-4)
    x = torch.cat([x for side in found for x in side])
    x = x[~sae.outliers(x)]
    assert got.median_norm == pytest.approx(float(x.norm(dim=1).median()), rel=1e-4)
    variance = (x - x.mean(0)).square().sum()
    assert got.fvu == pytest.approx(float((sae(x) - x).square().sum() / variance), rel=1e-3)
    table = got.table().set_index("latent")
    assert set(table.index) == set((got.highest > 0).nonzero()[:, 0].tolist())
    torch.testing.assert_close(
        torch.tensor(table["difference"].tolist()), got.difference[table.index.tolist()], atol=1e-5, rtol=1e-5
    )


def test_the_unexplained_share_is_that_of_the_measured_tokens_whatever_the_batches(case, monkeypatch) -> None:
    """More tokens than are measured: numerator and denominator have to be of the same ones."""
    from pvsae.saes import encodings

    monkeypatch.setattr(encodings, "MEASURED", 20)
    model, sae, rows, found = case
    values = [x for side in found for x in side]
    chosen = encodings._measured([len(x) for x in values])
    assert sum(chosen.values()) == 20 < sum(len(x) for x in values)
    x = torch.cat([values[row][: chosen[row]] for row in sorted(chosen)])
    x = x[~sae.outliers(x)]
    expected = float((sae(x) - x).square().sum() / (x - x.mean(0)).square().sum())
    for batch_tokens in (30, 60, 100_000):
        got = encode_pairs(model, sae, 2, (rows[0], rows[1]), list(range(6)), batch_tokens=batch_tokens)
        assert got.fvu == pytest.approx(expected, rel=1e-3)
        assert got.scaled[1.0] == pytest.approx(expected, rel=1e-3)


def test_a_dictionary_of_scaled_residuals_explains_most_at_its_scale(case) -> None:
    """A dictionary of these residuals (their mean and directions), and the same one for 0.5, 1.5, 3 and 20 times them."""
    model, _, rows, found = case
    x = torch.cat([x for side in found for x in side])
    directions = torch.linalg.svd(x - x.mean(0)).Vh
    both = torch.cat([directions, -directions])
    sae = SAE(both.T, torch.zeros(len(both)), both, x.mean(0), top_k=model.d_model // 2)
    for scale in (1.0, 0.5, 1.5, 3.0, 20.0):
        got = encode_pairs(model, sae.unscaled(1 / scale), 2, (rows[0], rows[1]), list(range(6))).scaled
        best = min(got, key=got.get)
        assert 0.7 < best / scale < 1.45, (scale, got)


def test_a_latent_that_fires_on_one_side_alone_is_found(case) -> None:
    """Planted: a latent that reads the direction in which the two sides differ, above what the other side reaches."""
    model, sae, rows, found = case
    sae = sae.with_info(outliers=None)
    means = [torch.stack([x.mean(0) for x in side]) for side in found]
    direction = torch.nn.functional.normalize((means[0] - means[1]).mean(0), dim=0)
    encoder = sae.W_enc.clone()
    encoder[:, 17] = 5 * direction
    got = encode_pairs(model, sae._with(W_enc=encoder), 2, (rows[0], rows[1]), list(range(6)))
    assert int(got.difference.argmax()) == 17
    row = got.table().set_index("latent").loc[17]
    assert row["t"] > 0
    assert row["mean_pos"] > row["mean_neg"]


def test_p_values_are_scipys_and_rates_are_benjaminis() -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy is the reference")
    rng = np.random.default_rng(0)
    for n in (2, 3, 4, 5, 6, 20, 21, 100):
        x = rng.normal(0.3, 1, (n, 40))
        t, p = paired_t(x)
        expected = stats.ttest_1samp(x, 0)
        assert t == pytest.approx(expected.statistic)
        assert p == pytest.approx(expected.pvalue, rel=1e-9, abs=1e-13)
    assert false_discovery_rate(p) == pytest.approx(stats.false_discovery_control(p))
    with_gap = false_discovery_rate(np.array([0.01, np.nan, 0.5]))
    assert with_gap[[0, 2]] == pytest.approx([0.02, 0.5])
    assert np.isnan(with_gap[1])
    assert paired_t(np.zeros((5, 1)))[1] == pytest.approx(1)
    assert np.isnan(paired_t(np.ones((1, 3)))[0]).all()


def test_questions_are_the_units_unless_there_are_too_few() -> None:
    assert units_of([3, 3, 4, 5, 6, 7]) == ([3, 3, 4, 5, 6, 7], "question")
    assert units_of([3, 3, 4]) == ([0, 1, 2], "pair")


def test_what_does_not_pair_is_refused(case) -> None:
    model, sae, rows, _ = case
    with pytest.raises(UserError, match="6 and 5 answers"):
        encode_pairs(model, sae, 2, (rows[0], rows[1][:5]), list(range(6)))
    with pytest.raises(UserError, match="d_model 12"):
        encode_pairs(model, make_sae(), 1, (rows[0], rows[1]), list(range(6)))
