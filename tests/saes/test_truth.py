"""Sums over labelled text give what sorting and comparing every activation would give."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pvsae.errors import UserError
from pvsae.saes.dictionary import SparseActs
from pvsae.saes.labelled import OUTSIDE, LabelledRow, Labels
from pvsae.saes.truth import HIGHEST, LOWEST, Truth, bin_of, found_labels, hold_against, precision_at
from tests.saes.small import make_sae

LABELS = Labels({"a/x": "a", "a/y": "a", "b/x": "b", "none": None})
D_SAE, TOP = 9, 12


def sparse(dense: torch.Tensor) -> SparseActs:
    token, latent = dense.nonzero(as_tuple=True)
    return SparseActs(token, latent, dense[token, latent])


def some_text(seed: int, n_segments: int = 70):
    """Dense activations on the grid of bins, each token's segment, each segment's label."""
    g = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 4, (n_segments,), generator=g)
    segment = torch.cat([torch.full((int(n),), i) for i, n in enumerate(torch.randint(1, 5, (n_segments,), generator=g))])
    segment[torch.rand(len(segment), generator=g) < 0.2] = OUTSIDE
    acts = torch.rand(len(segment), D_SAE, generator=g) * (torch.rand(len(segment), D_SAE, generator=g) < 0.15)
    acts[:, 3] = 0.0  # never active
    acts[:, 4] *= label[segment.clamp(min=0)] == 2  # active on one label alone, but for tokens outside
    return acts, segment, label


def measured(texts, **options) -> Truth:
    truth = Truth(LABELS, D_SAE, top=TOP, **options)
    for acts, segment, label in texts:
        truth.add(sparse(acts), segment, label)
    return truth


def by_hand(texts, latent: int, names: tuple[str, ...]) -> dict[str, float]:
    """Purity, base, recall and AUROC the slow way."""
    wanted = {LABELS.names.index(name) for name in names}
    tokens = [
        (float(a), int(label[s]) if s >= 0 else -1)
        for acts, seg, label in texts
        for a, s in zip(acts[:, latent], seg, strict=True)
    ]
    top = sorted((t for t in tokens if t[0] > 0), key=lambda t: -t[0])[:TOP]
    segments = [
        (max(acts[seg == i, latent].tolist()), int(label[i]) in wanted)
        for acts, seg, label in texts for i in range(len(label)) if (seg == i).any()
    ]  # fmt: skip
    yes, no = [a for a, right in segments if right], [a for a, right in segments if not right]
    ranks = (
        [bin_of(torch.tensor([a])).item() if a > 0 else 0 for a in yes],
        [bin_of(torch.tensor([a])).item() if a > 0 else 0 for a in no],
    )
    wins = [float(y > n) + 0.5 * (y == n) for y in ranks[0] for n in ranks[1]]
    return {
        "purity": sum(t[1] in wanted for t in top) / len(top) if top else math.nan,
        "base": sum(t[1] in wanted for t in tokens) / len(tokens),
        "recall": sum(a > 0 for a in yes) / len(yes),
        "auroc": sum(wins) / len(wins),
        "exact": sum(float(y > n) + 0.5 * (y == n) for y in yes for n in no) / len(wins),
    }


@pytest.mark.parametrize("names", [("a/x",), ("a/x", "a/y"), ("b/x",), ("none",)])
def test_measures_are_those_of_brute_force(names):
    texts = [some_text(seed) for seed in range(3)]
    truth = measured(texts)
    for latent in range(D_SAE):
        slow = by_hand(texts, latent, names)
        assert float(truth.purity(names)[latent]) == pytest.approx(slow["purity"], nan_ok=True)
        assert float(truth.recall(names)[latent]) == pytest.approx(slow["recall"])
        assert float(truth.auroc(names)[latent]) == pytest.approx(slow["auroc"], abs=1e-6)
        assert float(truth.auroc(names)[latent]) == pytest.approx(slow["exact"], abs=0.01)  # what the bins cost
        assert truth.base(names) == pytest.approx(slow["base"])


def test_the_table_names_what_each_latent_is_most():
    texts = [some_text(seed) for seed in range(3)]
    truth = measured(texts)
    table = truth.table().set_index("latent")
    for latent, row in table.iterrows():
        if latent == 3:
            assert row["active"] == row["strongest"] == 0
            assert row[["label", "group"]].isna().all()
            assert math.isnan(row["label_purity"])
            assert math.isnan(row["no_group"])
            continue
        purities = {name: by_hand(texts, latent, (name,))["purity"] for name in LABELS.names}
        assert row["label_purity"] == pytest.approx(max(purities.values()))
        assert purities[row["label"]] == max(purities.values())
        slow = by_hand(texts, latent, LABELS.of_group(row["group"]))
        for measure in ("purity", "base", "recall", "auroc"):
            assert row[f"group_{measure}"] == pytest.approx(slow[measure], abs=1e-6)
        in_groups = by_hand(texts, latent, ("a/x", "a/y", "b/x"))["purity"]
        assert row["no_group"] == pytest.approx(1 - in_groups, abs=1e-6)
        assert row["density"] == pytest.approx(row["active"] / sum(len(t[1]) for t in texts))
    assert table.loc[4, "group"] == "b"
    assert table.loc[4, "group_auroc"] > 0.6 > table.loc[0, "group_auroc"]


def test_how_the_text_is_cut_makes_no_difference():
    acts, segment, label = some_text(5, n_segments=60)
    border = int((segment == 30).nonzero()[0]) if (segment == 30).any() else int((segment == 31).nonzero()[0])
    first = (acts[:border], segment[:border], label[:31])
    later = segment[border:].clone()
    later[later != OUTSIDE] -= int(later[later != OUTSIDE].min())
    lowest = int(segment[border:][segment[border:] != OUTSIDE].min())
    second = (acts[border:], later, label[lowest:])
    whole, halves = measured([(acts, segment, label)]), measured([first, second])
    assert whole.table().equals(halves.table())


def test_some_latents_alone_give_the_same_rows():
    texts = [some_text(seed) for seed in range(2)]
    whole, some = measured(texts).table(), measured(texts, latents=[7, 2, 4]).table()
    assert some.equals(whole[whole["latent"].isin([2, 4, 7])].reset_index(drop=True))


def test_bins_are_in_the_order_of_their_values():
    values = torch.tensor([1e-9, LOWEST, 0.01, 0.0101, 0.5, 0.54, 1.0, 900.0, HIGHEST, 1e9])
    bins = bin_of(values)
    assert bool((bins.diff() >= 0).all())
    assert int(bins[0]) == 1 == int(bins[1])
    assert int(bins[-1]) == int(bins[-2])
    assert int(bins[4]) < int(bins[5])


def test_unknown_labels_and_latents_are_refused():
    truth = measured([some_text(0)])
    with pytest.raises(UserError, match="c/z"):
        truth.purity(("c/z",))
    with pytest.raises(UserError, match="no label belongs"):
        LABELS.of_group("c")
    with pytest.raises(UserError, match="9"):
        Truth(LABELS, D_SAE, latents=[D_SAE])


def test_rankings_are_scored_by_their_first_places():
    truth = measured([some_text(seed) for seed in range(3)])
    assert precision_at([5, 1, 2], {1, 2}, 2) == 0.5
    assert precision_at([1], {1}, 4) == 0.25
    assert math.isnan(precision_at([1], {1}, 0))
    pure = {name: float(truth.purity((name,))[4]) for name in LABELS.names}
    best = max(pure, key=lambda name: pure[name])
    assert found_labels(truth, [0, 4], (best,), 2, pure[best]) == {best: 4}
    assert found_labels(truth, [0, 4], (best,), 1, pure[best]) == {best: None}


def test_a_pass_over_a_model_counts_kept_tokens_alone_and_batches_change_nothing(tiny_models):
    model = tiny_models("qwen2")
    sae = make_sae(d_model=model.d_model, d_sae=30)
    sae = make_sae(d_model=model.d_model, d_sae=30, info=sae.info.__class__(model=model.name, block=1))
    rng = np.random.default_rng(0)
    rows = []
    for n in (12, 30, 7, 19):
        segment = np.minimum(np.arange(n) // 5, 3).astype(np.int32)
        segment[:2] = OUTSIDE
        keep = np.arange(n) > 0
        rows.append(LabelledRow(rng.integers(3, 300, n).astype(np.int32), keep, segment, (0, 1, 2, 3)[: segment.max() + 1]))
    (one,) = hold_against([sae], model, rows, LABELS, batch_tokens=1000)
    (many,) = hold_against([sae], model, rows, LABELS, batch_tokens=16)
    assert one.n_tokens == sum(int(row.keep.sum()) for row in rows)
    x = torch.cat([model_residuals(model, row)[torch.from_numpy(row.keep)] for row in rows])
    firsts = np.cumsum([0, *(len(row.labels) for row in rows[:-1])])
    kept = [row.segment[row.keep] for row in rows]
    segment = torch.cat([torch.from_numpy(np.where(s < 0, OUTSIDE, s + first)) for s, first in zip(kept, firsts, strict=True)])
    slow = Truth(LABELS, 30)
    slow.add(sae.encode_sparse(x), segment.long(), torch.tensor([label for row in rows for label in row.labels]))
    expected = slow.table()
    assert expected["active"].sum() > 100
    for table in (one.table(), many.table()):
        assert table["active"].tolist() == expected["active"].tolist()
        for column in ("label_purity", "group_recall"):
            assert table[column].tolist() == pytest.approx(expected[column].tolist(), nan_ok=True)


def model_residuals(model, row: LabelledRow) -> torch.Tensor:
    """[pos d_model] after block 1, the row alone in its batch."""
    from pvsae.models import Rendered, Residual

    n = len(row.ids)
    rendered = Rendered(tuple(int(i) for i in row.ids), n, (n, n), (), "")
    read = Residual(1, "all")
    return model.capture([rendered], [read])[read.key][0]
