"""One pass over a corpus that gathers the evidence of some features: rows, forward passes, activations, checkpoints.

Knows: how rows become activations of the features that were asked for, which tokens do not count, how a pass is stopped and gone
on with bit for bit, and how rows are read again without the model.
Does not know: what evidence is made of (evidence.py), what it is shown as.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool
from tqdm.auto import tqdm

from pvsae.errors import UserError
from pvsae.models import length_sorted_batches
from pvsae.runs import atomic_path
from pvsae.saes.corpus import Corpus, Row, Rows
from pvsae.saes.dictionary import SAE
from pvsae.saes.evidence import Context, Evidence, Firings
from pvsae.saes.harvest import harvest

if TYPE_CHECKING:
    from pvsae.models import ChatModel

PASSES = 8  # forward passes whose rows are sorted by length together
FEW = 1024  # up to so many features are encoded alone; for more of them all latents are searched
PROBE_TOKENS = 50_000  # on which live features are looked for, and the median norm is measured where it was not published


class Place(NamedTuple):
    """What is read: a dictionary, the model and block that it reads, and the text.

    Attributes:
        held_out: whether the samples are read that training never saw, in place of those it saw.
    """

    model: ChatModel
    sae: SAE
    block: int
    corpus: Corpus
    held_out: bool = False

    def rows(self) -> Rows:
        return self.corpus.rows(held_out=self.held_out)


def gather(
    place: Place,
    evidence: Evidence,
    tokens: int,
    *,
    batch_tokens: int = 8192,
    checkpoint: Path | None = None,
    every: float = 300.0,
    progress: bool = True,
) -> Evidence:
    """Reads rows until so many tokens were marked as wanted (rows are whole), or the text ends; goes on at a checkpoint.

    Args:
        evidence: empty, made the same way each time; it is filled and given back.
        batch_tokens: tokens a forward pass.
        checkpoint: file that holds everything that is known so far; None keeps nothing.
        every: seconds between checkpoints.

    Raises: UserError where the text has no token that counts.
    """
    walk, number, read = place.rows(), 0, 0
    if checkpoint is not None and checkpoint.is_file():
        with np.load(checkpoint) as saved:
            evidence.restore(saved)
            at = json.loads(str(saved["walk"]))
        walk, number, read = place.corpus.rows(held_out=place.held_out, state=at["rows"]), at["number"], at["read"]
    written = time.monotonic()
    with tqdm(total=tokens, initial=read, desc="evidence", unit=" tokens", unit_scale=True, disable=not progress) as bar:
        while read < tokens:
            rows = _window(place, walk, number, tokens - read, batch_tokens * PASSES)
            if not rows:
                break
            for some in length_sorted_batches([len(row.ids) for row in rows], batch_tokens=batch_tokens):
                _add(place, evidence, [rows[i] for i in some])
            wanted = sum(int(row.keep.sum()) for row in rows)
            number, read = number + len(rows), read + wanted
            bar.update(wanted)
            if checkpoint is not None and time.monotonic() - written >= every:
                at = {"rows": walk.state(), "number": number, "read": read}
                with atomic_path(checkpoint) as tmp, tmp.open("wb") as handle:
                    np.savez(handle, walk=np.array(json.dumps(at)), **evidence.state())  # type: ignore[arg-type]
                written = time.monotonic()
    if not evidence.tokens:
        raise UserError("the text has no token that counts", "text whose tokens are neither special, nor first, nor outliers")
    return evidence


def rows_again(place: Place, numbers: Iterable[int]) -> dict[int, Context]:
    """Some rows of the walk by their numbers, read from the token store."""
    left = set(numbers)
    found: dict[int, Context] = {}
    for number, row in enumerate(place.rows()):
        if number in left:
            found[number] = _context(place, row, number)
        if len(found) == len(left):
            break
    return found


def live_latents(place: Place, n: int, seed: int, *, batch_tokens: int = 8192) -> list[int]:
    """n features at random (ascending), of those that are active at the first tokens of the text. UserError if fewer are."""
    fired = np.zeros(place.sae.d_sae, dtype=np.int64)
    for rows in _some_rows(place, batch_tokens):
        x, _ = _residuals(place, rows)
        latents = place.sae.encode_sparse(x[~place.sae.outliers(x)]).latent.cpu().numpy()
        fired += np.bincount(latents, minlength=len(fired))
    alive = np.flatnonzero(fired)
    if len(alive) < n:
        raise UserError(
            f"{n} live features, but {len(alive)} of {len(fired)} fire on the first {PROBE_TOKENS} tokens",
            f"live:{len(alive)} at most",
            "name features by their numbers, or take another text",
        )
    return np.sort(np.random.default_rng(seed).choice(alive, n, replace=False)).tolist()


def median_norm(place: Place, *, batch_tokens: int = 8192) -> float:
    """Median length of a residual on the first tokens of the text."""
    norms = [_residuals(place, rows)[0].norm(dim=-1).cpu() for rows in _some_rows(place, batch_tokens)]
    return float(torch.cat(norms).median())


# --------------------------------------------------------------------------------------------------------------- activations
def _add(place: Place, evidence: Evidence, rows: list[Context]) -> None:
    """Counts a forward pass."""
    x, keep = _residuals(place, rows)
    inlier = (~place.sae.outliers(x)).cpu().numpy()
    cells = np.flatnonzero(keep)[inlier]
    counted = np.zeros_like(keep)
    counted[cells] = True
    token, slot, value = _activations(place.sae, x[torch.from_numpy(inlier).to(x.device)], evidence.latents)
    evidence.add(rows, counted, Firings(cells[token], slot, value))


def _residuals(place: Place, rows: Sequence[Context]) -> tuple[torch.Tensor, Bool[np.ndarray, " cells"]]:
    """Residuals [wanted d_model] of the wanted tokens, and which tokens those are."""
    plain = [Row(row.ids, row.keep) for row in rows]
    x = harvest(place.model, plain, [place.block], torch.float32)[place.block]
    if not bool(x.isfinite().all()):
        raise UserError(
            f"NaN or infinite residuals at block {place.block}", "finite ones", "load the model in float32 or bfloat16"
        )
    return x, np.concatenate([row.keep for row in rows])


def _activations(sae: SAE, x: torch.Tensor, latents: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(token, slot, value) of what is active of some latents, by token, then slot."""
    if len(latents) <= FEW and sae.top_k is None:
        acts = sae.encode_latents(x, latents.tolist())
        token, slot = acts.nonzero(as_tuple=True)
        value = acts[token, slot]
    else:
        slots = torch.full((sae.d_sae,), -1, dtype=torch.long, device=sae.device)
        slots[torch.from_numpy(latents).to(sae.device)] = torch.arange(len(latents), device=sae.device)
        found = sae.encode_sparse(x)
        wanted = slots[found.latent] >= 0
        token, slot, value = found.token[wanted], slots[found.latent[wanted]], found.value[wanted]
    return token.cpu().numpy(), slot.cpu().numpy(), value.float().cpu().numpy()


# ---------------------------------------------------------------------------------------------------------------------- rows
def _context(place: Place, row: Row, number: int) -> Context:
    """A row that knows its number. Of a text that is split into rows each row counts as a document of its own: there may be no
    more than one book, and what is wanted of it are many examples."""
    return Context(np.asarray(row.ids), row.keep, () if place.corpus.config.fit == "split" else row.parts, number)


def _window(place: Place, walk: Iterator[Row], number: int, wanted: int, size: int) -> list[Context]:
    """The next rows of a walk, worth `size` tokens, or fewer where `wanted` wanted ones are enough."""
    rows: list[Context] = []
    while size > 0 and wanted > 0 and (row := next(walk, None)) is not None:
        rows.append(_context(place, row, number + len(rows)))
        size -= len(row.ids)
        wanted -= int(row.keep.sum())
    return rows


def _some_rows(place: Place, batch_tokens: int) -> Iterator[list[Context]]:
    """Forward passes over the first PROBE_TOKENS wanted tokens."""
    rows = _window(place, place.rows(), 0, PROBE_TOKENS, 2**62)
    for some in length_sorted_batches([len(row.ids) for row in rows], batch_tokens=batch_tokens):
        yield [rows[i] for i in some]
