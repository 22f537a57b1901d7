"""What a dictionary's features mean, held against labelled text: purity of the strongest activations, recall, AUROC.

Knows: activations, segments of text (sentences) that carry a label, groups of labels; sums over one pass, in memory that does not
grow with the text: 8 * top bytes a latent, and 4 * BINS bytes a latent and label.
Does not know: what labels stand for, where the text comes from (labelled.py), persona vectors.

A feature can be pure (what it fires at most strongly is all of one label) and still have an AUROC near 0.5, because it fires on
few of the label's words; so recall and AUROC stand beside purity, and both are of whole segments: a segment's activation is the
highest among its tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from pvsae.errors import UserError
from pvsae.models.batch import length_sorted_batches
from pvsae.saes.corpus import Row
from pvsae.saes.dictionary import SAE, SparseActs
from pvsae.saes.evaluate import check_block
from pvsae.saes.harvest import harvest
from pvsae.saes.labelled import OUTSIDE, LabelledRow, Labels

if TYPE_CHECKING:
    from pvsae.models import ChatModel

TOP = 100
PER_OCTAVE_BITS = 4  # of the mantissa: bins 2^-4 of an octave wide, so that activations within 6% of each other may tie
LOWEST, HIGHEST = 2.0**-10, 2.0**14  # activations beyond are counted in the first or the last bin
BINS = (14 + 10) * 2**PER_OCTAVE_BITS + 2  # bin 0: the latent was not active in the segment


class Truth:
    """Sums over labelled text for the latents of one dictionary.

    Args:
        labels: what segments can carry.
        d_sae: latents of the dictionary.
        latents: those to look at; None for all. 131,072 latents and 40 labels would take 8 GB, a few hundred of them nothing.
        top: how many of the strongest activations purity is a share of.
    """

    def __init__(self, labels: Labels, d_sae: int, latents: Sequence[int] | None = None, top: int = TOP) -> None:
        self.labels, self.top = labels, top
        self.latents = torch.arange(d_sae) if latents is None else torch.tensor(sorted(set(latents)), dtype=torch.long)
        if len(self.latents) and not 0 <= int(self.latents[0]) <= int(self.latents[-1]) < d_sae:
            raise UserError(f"latents of a dictionary of {d_sae}", f"indices from 0 to {d_sae - 1}")
        self._row = torch.full((d_sae,), -1, dtype=torch.long)
        self._row[self.latents] = torch.arange(len(self.latents))
        n, n_labels = len(self.latents), len(labels.names)
        self.n_tokens = 0
        self._tokens = torch.zeros(n_labels + 1, dtype=torch.long)  # a label; the last entry: outside of every segment
        self._segments = torch.zeros(n_labels, dtype=torch.long)
        self._active = torch.zeros(n, dtype=torch.long)
        self._histogram = torch.zeros(n, n_labels, BINS, dtype=torch.int32)
        self._values = torch.zeros(n, top)  # of the strongest activations, falling; 0 where there were fewer
        self._kinds = torch.full((n, top), n_labels, dtype=torch.int16)  # their labels

    def add(self, acts: SparseActs, segment: Int[Tensor, " tokens"], label: Int[Tensor, " segments"]) -> None:
        """Counts the activations of some tokens.

        Args:
            acts: of these tokens, `token` counted from 0.
            segment: of each token, counted from 0 in this call, or OUTSIDE. A segment may not go on in another call.
            label: number of each segment's label.
        """
        n_labels = len(self.labels.names)
        kind = torch.cat([label, torch.tensor([n_labels])])[segment]  # OUTSIDE is the last entry
        self.n_tokens += len(segment)
        self._tokens += torch.bincount(kind, minlength=n_labels + 1)
        self._segments += torch.bincount(label[segment[segment != OUTSIDE].unique()], minlength=n_labels)
        row = self._row[acts.latent.cpu()]
        wanted = row >= 0
        row, token, value = row[wanted], acts.token.cpu()[wanted], acts.value.detach().float().cpu()[wanted]
        self._active += torch.bincount(row, minlength=len(self.latents))
        self._strongest(row, value, kind[token])
        inside = segment[token] != OUTSIDE
        self._highest(row[inside], segment[token[inside]], value[inside], label)

    def _strongest(self, row: Tensor, value: Tensor, kind: Tensor) -> None:
        """Merges activations into the strongest ones so far; among equals the earlier one stays."""
        better = value > self._values[row, -1]
        row, value, kind = row[better], value[better], kind[better]
        touched = row.unique()
        rows = torch.cat([touched.repeat_interleave(self.top), row])
        values = torch.cat([self._values[touched].flatten(), value])
        kinds = torch.cat([self._kinds[touched].flatten(), kind.to(torch.int16)])
        order = torch.argsort(values, descending=True, stable=True)
        order = order[torch.argsort(rows[order], stable=True)]
        rows = rows[order]
        rank = torch.arange(len(rows)) - torch.searchsorted(rows, rows)
        kept = order[rank < self.top]
        self._values[touched] = values[kept].reshape(-1, self.top)
        self._kinds[touched] = kinds[kept].reshape(-1, self.top)

    def _highest(self, row: Tensor, segment: Tensor, value: Tensor, label: Tensor) -> None:
        """Counts each segment once for each latent that is active in it, in the bin of its highest activation there."""
        key, pair = (row * max(1, len(label)) + segment).unique(return_inverse=True)
        highest = torch.zeros(len(key)).scatter_reduce_(0, pair, value, "amax")
        of_row, of_segment = key // max(1, len(label)), key % max(1, len(label))
        at = (of_row * len(self.labels.names) + label[of_segment]) * BINS + bin_of(highest)
        where, counts = at.unique(return_counts=True)
        self._histogram.view(-1)[where] += counts.to(torch.int32)

    def table(self) -> pd.DataFrame:
        """A row a latent; shares are from 0 to 1, NaN of a latent that was never active.

        latent, active (tokens), density; strongest (how many of the strongest activations there are: top, or fewer); label and
        label_purity (the label that most of them fall in, and its share), label_base (share of all tokens in that label),
        label_recall (share of that label's segments in which the latent is active at all), label_auroc (segments of that label
        against all others); group, group_purity, group_base, group_recall, group_auroc the same for the group; no_group (share of
        the strongest that falls in no group's segments: outside of every segment, or in one that expresses nothing).
        """
        out = pd.DataFrame({"latent": self.latents.tolist(), "active": self._active.tolist()})
        out["density"] = out["active"] / max(1, self.n_tokens)
        out["strongest"] = self.n_strongest.tolist()
        in_groups = torch.zeros(len(out))
        for kind, sets in (("label", [(n, (n,)) for n in self.labels.names]), ("group", self._group_sets())):
            purity = torch.stack([self.purity(names) for _, names in sets], 1) if sets else torch.zeros(len(out), 0)
            if kind == "group":
                in_groups = purity.sum(1)
            best = purity.nan_to_num(0.0).argmax(1) if sets else torch.zeros(len(out), dtype=torch.long)
            for column in (kind, *(f"{kind}_{m}" for m in ("purity", "base", "recall", "auroc"))):
                out[column] = None if column == kind else math.nan
            for i, (name, names) in enumerate(sets):
                rows = ((best == i) & (purity[:, i] > 0)).nonzero()[:, 0]
                at = rows.tolist()
                out.loc[at, kind] = name
                out.loc[at, f"{kind}_purity"] = purity[rows, i].tolist()
                out.loc[at, f"{kind}_base"] = self.base(names)
                out.loc[at, f"{kind}_recall"] = self.recall(names, rows).tolist()
                out.loc[at, f"{kind}_auroc"] = self.auroc(names, rows).tolist()
        out["no_group"] = (1 - in_groups).tolist()
        return out

    @property
    def n_strongest(self) -> Int[Tensor, " n"]:
        """How many of each latent's strongest activations there are: `top`, or fewer where it was active less often."""
        return (self._values > 0).sum(1)

    def _group_sets(self) -> list[tuple[str, tuple[str, ...]]]:
        return [(g, self.labels.of_group(g)) for g in self.labels.groups]

    def _numbers(self, names: Iterable[str]) -> list[int]:
        return [self.labels.index(name) for name in names]

    def purity(self, names: Iterable[str]) -> Float[Tensor, " n"]:
        """Share of each latent's strongest activations that falls in segments of these labels; NaN if it was never active."""
        wanted, real = torch.tensor(self._numbers(names), dtype=torch.int16), self._values > 0
        return (torch.isin(self._kinds, wanted) & real).sum(1) / real.sum(1)

    def base(self, names: Iterable[str]) -> float:
        """Share of all tokens that lie in segments of these labels."""
        return int(self._tokens[self._numbers(names)].sum()) / max(1, self.n_tokens)

    def recall(self, names: Iterable[str], rows: Int[Tensor, " rows"] | None = None) -> Float[Tensor, " n"]:
        """Share of the segments of these labels in which each latent is active; NaN without such segments.

        Args:
            rows: positions in `latents`; None for all.
        """
        which = self._numbers(names)
        counts = self._histogram if rows is None else self._histogram[rows]
        return counts[:, which].sum((1, 2)) / self._segments[which].sum()

    def auroc(self, names: Iterable[str], rows: Int[Tensor, " rows"] | None = None) -> Float[Tensor, " n"]:
        """For each latent: the chance that a segment of these labels has a higher activation than one of the others (ties half).

        Within the width of a bin, activations tie. NaN where there are no such segments, or no others.

        Args:
            rows: positions in `latents`; None for all.
        """
        which = self._numbers(names)
        n_yes, n_no = self._segments[which].sum(), self._segments.sum() - self._segments[which].sum()
        out = []
        for some in (self._histogram if rows is None else self._histogram[rows]).split(64):
            yes = some[:, which].sum(1).double()
            no = some.sum(1).double() - yes
            yes[:, 0], no[:, 0] = n_yes - yes.sum(1), n_no - no.sum(1)  # bin 0 is not counted while text is read
            below = no.cumsum(1) - no
            out.append((yes * (below + no / 2)).sum(1) / (n_yes * n_no))
        return torch.cat(out).float() if out else torch.zeros(0)


def bin_of(value: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
    """The bin of an activation above 0, from 1 on: its exponent and the first bits of its mantissa."""
    bits = value.clamp(LOWEST, HIGHEST).view(torch.int32) >> (23 - PER_OCTAVE_BITS)
    lowest = int(torch.tensor(LOWEST).view(torch.int32)) >> (23 - PER_OCTAVE_BITS)
    return bits.long() - lowest + 1


def hold_against(
    saes: Sequence[SAE],
    model: ChatModel,
    rows: Iterable[LabelledRow],
    labels: Labels,
    *,
    latents: Sequence[int] | None = None,
    top: int = TOP,
    batch_tokens: int = 8192,
    progress: str | None = None,
) -> list[Truth]:
    """What the latents of some dictionaries mean on labelled text, from one pass over it; a row is forgotten once it was read.

    Args:
        saes: dictionaries of this model, of any blocks.
        latents, top: see Truth.
        progress: label of a progress bar, or None.

    Tokens that a row does not keep, and outliers of a dictionary, count nowhere.

    Raises: UserError for a dictionary that does not fit the model, or no token that counts.
    """
    blocks = [check_block(sae, model) for sae in saes]
    truths = [Truth(labels, sae.d_sae, latents, top) for sae in saes]
    with tqdm(desc=progress, disable=progress is None, unit="row") as bar:
        for batch in _passes(rows, batch_tokens):
            found = harvest(model, [Row(row.ids, row.keep) for row in batch], blocks, torch.float32)
            segment, label = _joined(batch)
            for sae, block, truth in zip(saes, blocks, truths, strict=True):
                x = found[block]
                kept = ~sae.outliers(x).to(x.device)
                truth.add(sae.encode_sparse(x[kept]), segment[kept.cpu()], label)
            bar.update(len(batch))
    if any(not truth.n_tokens for truth in truths):
        raise UserError("not one token was left to measure", "labelled text whose tokens are neither special nor outliers")
    return truths


def _passes(rows: Iterable[LabelledRow], batch_tokens: int, window: int = 512) -> Iterator[list[LabelledRow]]:
    """Rows in forward passes, each of rows of like length among `window` that follow each other."""
    source = iter(rows)
    while some := list(islice(source, window)):
        for batch in length_sorted_batches([len(row.ids) for row in some], batch_tokens=batch_tokens):
            yield [some[i] for i in batch]


def _joined(batch: Sequence[LabelledRow]) -> tuple[Int[Tensor, " tokens"], Int[Tensor, " segments"]]:
    """The segments of the kept tokens of all rows, numbered through, and every segment's label."""
    segments: list[Tensor] = []
    labels: list[int] = []
    for row in batch:
        own = torch.from_numpy(row.segment[row.keep]).long()
        segments.append(torch.where(own == OUTSIDE, OUTSIDE, own + len(labels)))
        labels += row.labels
    return torch.cat(segments), torch.tensor(labels, dtype=torch.long)


def precision_at(ranking: Sequence[int], right: Iterable[int], k: int) -> float:
    """Share of the first k latents of a ranking that are right; a ranking that ends before k counts as k. NaN for k 0."""
    correct = set(right)
    return sum(latent in correct for latent in ranking[:k]) / k if k else math.nan


def found_labels(truth: Truth, ranking: Sequence[int], names: Sequence[str], k: int, purity: float) -> dict[str, int | None]:
    """For each label the first of the k first latents of a ranking whose strongest activations are its to a share of `purity`."""
    place = {latent: i for i, latent in enumerate(truth.latents.tolist())}
    first = [latent for latent in ranking[:k] if latent in place]
    shares = {name: truth.purity((name,)) for name in names}
    return {name: next((x for x in first if float(shares[name][place[x]]) >= purity), None) for name in names}
