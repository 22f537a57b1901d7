"""The three statistics of every row, with each distinct prompt computed once.

Knows: that rollouts come as several samples of one prompt, so that the prompt's keys and values can be cached and each row costs
its answer only; when that pays, and how padded prompts and their answers fit together. Where it does not pay, or where a model's
layers look at a sliding window, rows go through `ChatModel.capture_batches` whole.
Does not know: what the statistics are summed into.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from pvsae.errors import UserError
from pvsae.vectors.persona import STATISTICS

if TYPE_CHECKING:
    from pvsae.models import Capture, ChatModel, Rendered, TokenBatch

CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 2048, 16384
# Sharing runs two smaller passes instead of one: below this ratio of tokens without and with it, there is nothing to gain.
WORTH = 1.15

Rows = tuple[list[int], dict[str, Tensor]]


def statistics_batches(
    model: ChatModel,
    rows: Sequence[Rendered],
    *,
    batch_tokens: int | None = None,
    share_prompts: bool = True,
    progress: str | None = None,
) -> Iterator[Rows]:
    """Yields (row indices, {statistic: Float["batch n_blocks d_model"]}), fp32 on the CPU, every row once.

    Args:
        batch_tokens: tokens a forward pass, padding included; None is 16384, or 2048 on a CPU, whose caches hold no more.
        share_prompts: compute equal prompts once. The numbers are the same up to rounding.

    Raises:
        UserError: a row that is too long or has no answer, or activations that are NaN or infinite.
    """
    if batch_tokens is None:
        batch_tokens = CPU_BATCH_TOKENS if model.device.type == "cpu" else GPU_BATCH_TOKENS
    prompts = {row.ids[: row.n_prompt]: row for row in reversed(rows)}
    saved = sum(len(r.ids) for r in rows) / max(1, sum(map(len, prompts)) + sum(len(r.ids) - r.n_prompt for r in rows))
    if share_prompts and saved >= WORTH and _caches_whole_prompts(model):
        batches = _shared(model, rows, batch_tokens, progress)
    else:
        batches = _whole(model, rows, batch_tokens, progress)
    for indices, values in batches:
        _check_finite(values)
        yield indices, values


def _captures(model: ChatModel) -> tuple[Capture, ...]:
    """In the order of STATISTICS."""
    from pvsae.models import LastPrompt, SpanMean

    blocks = tuple(range(model.n_blocks))
    return SpanMean(blocks, "prompt"), SpanMean(blocks, "answer"), LastPrompt(blocks)


def _whole(model: ChatModel, rows: Sequence[Rendered], batch_tokens: int, progress: str | None) -> Iterator[Rows]:
    captures = _captures(model)
    for indices, found in model.capture_batches(rows, captures, batch_tokens=batch_tokens, progress=progress):
        yield indices, {s: _tensor(found[c.key]) for s, c in zip(STATISTICS, captures, strict=True)}


def _shared(model: ChatModel, rows: Sequence[Rendered], batch_tokens: int, progress: str | None) -> Iterator[Rows]:
    """Prompts in batches of like length; then the rows of those prompts in batches of answers of like length."""
    from pvsae.models import halving_on_oom, length_sorted_batches

    _check_rows(model, rows)
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row.ids[: row.n_prompt], []).append(i)
    prompts = list(groups)
    members = list(groups.values())

    def read_prompts(chosen: list[int]) -> tuple[Any, dict[str, Tensor]]:
        return _read_prompts(model, [rows[members[p][0]] for p in chosen])

    with tqdm(total=len(rows), desc=progress, disable=progress is None, unit="row") as bar:
        prompt_batches = length_sorted_batches([len(p) for p in prompts], batch_tokens=batch_tokens)
        for chosen, (cache, of_prompt) in halving_on_oom(prompt_batches, read_prompts):
            own = [(at, i) for at, p in enumerate(chosen) for i in members[p]]
            lengths = [len(rows[i].ids) - rows[i].n_prompt for _, i in own]
            context = max(len(prompts[p]) for p in chosen)  # counts too: attention goes over prompt and answer

            def read_answers(picked: list[int], cache: Any = cache, own: list[tuple[int, int]] = own) -> Tensor:
                at = torch.tensor([own[k][0] for k in picked])
                return _read_answers(model, [rows[own[k][1]] for k in picked], cache, at)

            for picked, answers in halving_on_oom(
                length_sorted_batches([n + context // 4 for n in lengths], batch_tokens=batch_tokens), read_answers
            ):
                at = torch.tensor([own[k][0] for k in picked])
                values = {s: v[at] for s, v in of_prompt.items()}
                yield [own[k][1] for k in picked], {**values, "response_avg_diff": answers}
                bar.update(len(picked))


def _read_prompts(model: ChatModel, rows: Sequence[Rendered]) -> tuple[Any, dict[str, Tensor]]:
    """The prompts' cache (padded on the left) and their two statistics."""
    from pvsae.models import Rendered, TokenBatch
    from pvsae.models.cache import new_cache

    bare = [Rendered(r.ids[: r.n_prompt], r.n_prompt, (r.n_prompt, r.n_prompt), (), "") for r in rows]
    batch = TokenBatch.build(bare, pad_id=model.pad_id, side="left", device=model.device)
    mean, _, last = _captures(model)
    with torch.no_grad(), model.hooks((), (mean, last)) as session:
        cache = model.forward(batch, logits=None, past=new_cache(model.hf.config), use_cache=True).past
        found = session.take()
    return cache, {s: _tensor(found[c.key][0]).cpu() for s, c in ((STATISTICS[0], mean), (STATISTICS[2], last))}


def _read_answers(
    model: ChatModel, rows: Sequence[Rendered], cache: Any, at: Int[Tensor, " batch"]
) -> Float[Tensor, "batch n_blocks d_model"]:
    """Mean over each row's answer, its prompt being row at[i] of the cache."""
    from pvsae.models.cache import new_cache

    width = max(row.n_prompt for row in rows)
    own: Any = new_cache(model.hf.config)
    at = at.to(model.device)
    for layer, (old, new) in enumerate(zip(cache.layers, own.layers, strict=True)):
        cut = old.keys.shape[-2] - width  # columns on the left that are padding in all these rows
        new.update(old.keys[at, :, cut:], old.values[at, :, cut:], layer)
    batch = _answer_batch(rows, width, model.pad_id).to(model.device)
    capture = _captures(model)[1]
    with torch.no_grad(), model.hooks((), (capture,)) as session:
        model.forward(batch, logits=None, past=own, use_cache=True)
        return _tensor(session.take()[capture.key][0]).cpu()


def _answer_batch(rows: Sequence[Rendered], width: int, pad_id: int) -> TokenBatch:
    """The tokens after the prompts, padded on the right, behind `width` cached positions that are padded on the left."""
    from pvsae.models import Positions, TokenBatch

    lengths = torch.tensor([len(r.ids) - r.n_prompt for r in rows])
    prompts = torch.tensor([r.n_prompt for r in rows])
    place = torch.arange(int(lengths.max()))
    real = place < lengths[:, None]
    ids = torch.full(real.shape, pad_id, dtype=torch.long)
    content = torch.zeros_like(real)
    for i, row in enumerate(rows):
        ids[i, : lengths[i]] = torch.tensor(row.ids[row.n_prompt :], dtype=torch.long)
        content[i, row.answer[0] - row.n_prompt : row.answer[1] - row.n_prompt] = True
    cached = torch.arange(width) >= (width - prompts)[:, None]
    nothing = torch.zeros_like(real)
    positions = Positions(nothing, real, nothing, {"answer": content})
    mask = torch.cat([cached, real], dim=1).long()
    return TokenBatch(ids, mask, prompts[:, None] + place, positions, left_padded=not bool(cached.all()))


def _caches_whole_prompts(model: ChatModel) -> bool:
    """Whether every layer keeps all keys and values in order: a sliding window drops some, and other states cannot be cut."""
    from pvsae.models.cache import RoomyLayer, new_cache

    layers = new_cache(model.hf.config).layers
    return len(layers) == model.n_blocks and all(isinstance(layer, RoomyLayer) for layer in layers)


def _check_rows(model: ChatModel, rows: Sequence[Rendered]) -> None:
    for i, row in enumerate(rows):
        if len(row.ids) > model.n_ctx:
            raise UserError(
                f"row {i} has {len(row.ids)} tokens, more than the context of {model.name} ({model.n_ctx})",
                f"rows of at most {model.n_ctx} tokens",
                "shorten the texts, or generate with a smaller max_new_tokens",
            )
        if row.answer[1] <= row.answer[0] or row.n_prompt == 0:
            raise UserError(f"row {i} has no answer or no prompt to average", "rows with both", "leave such rows out")


def _check_finite(values: dict[str, Tensor]) -> None:
    for x in values.values():
        if math.isfinite(float(x.sum())):
            continue
        bad = ~torch.isfinite(x).all(dim=2)
        if bool(bad.any()):
            raise UserError(
                f"NaN or infinite activations at block {int(bad.any(dim=0).nonzero()[0])} ({int(bad.any(dim=1).sum())} of a "
                f"batch's {len(x)} rows)",
                "finite activations at every block",
                "load the model in bfloat16 or float32 (float16 overflows in some models), or check its weights",
            )


def _tensor(value: Any) -> Tensor:
    assert isinstance(value, Tensor)  # all three captures reduce a row to one vector a block
    return value
