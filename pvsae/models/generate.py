"""Generation: batched, KV-cached, hookable, and the same text for a row whatever its batch.

Knows: how to decode from a ChatModel: batches, the cache, sampling, when to stop.
Does not know: templates, what interventions compute, what the texts are for.

The loop is our own because every forward pass has to say which of its positions are prompt and which are answer, because each
row draws from its own stream of random numbers, and because finished rows leave the batch. Row `key` uses, at its step t, the
t-th uniform of a counter-based generator keyed by (seed, key), and takes the token at that quantile of the distribution in
vocabulary order. So a row's text depends on its prompt, the seed and its key, not on its batch, order or position. (Logits
differ in their last bits between batch shapes; a uniform within that distance of an edge, about one in 10^6, may still flip.)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from pvsae.errors import UserError
from pvsae.models.batch import Positions, TokenBatch, halving_on_oom, length_sorted_batches
from pvsae.models.cache import keep_rows, new_cache
from pvsae.models.chat import Rendered, opens_thinking, split_thinking

if TYPE_CHECKING:
    from pvsae.models.chatmodel import ChatModel
    from pvsae.models.interventions import Intervention

# Rows leave the batch once this share of it has finished: selecting rows copies the cache, a step's worth of memory traffic.
COMPACT_SHARE = 1 / 8


@dataclass(frozen=True)
class Sampling:
    """How to sample.

    Attributes:
        max_new_tokens: most tokens an answer; the context's end stops it too.
        temperature: 0 is greedy.
        top_p: nucleus: the smallest set of most likely tokens with at least this mass.
        seed: with a row's key it fixes the row's random numbers.
        use_model_config: take temperature, top_p, top_k, repetition_penalty and do_sample from the model's own
            generation_config where it sets them. Otherwise nothing of it is used but its stop ids.
    """

    max_new_tokens: int = 1000
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    use_model_config: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}", "at least 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature is {self.temperature}", "0 (greedy) or a positive number")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}", "a share in (0, 1]")


@dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
        ids: the generated ids without the stop token, thinking included; `chat.with_answer_ids(prompt, ids)` is exact.
            Empty for answers from a server, which sends text.
        text: the answer without thinking and special tokens.
        finish: "stop" at a stop token, "length" at max_new_tokens or the end of the context, "failed" where a server gave none.
        thinking: what was thought, if the model thought.
        error: why there is no answer.
    """

    ids: tuple[int, ...]
    text: str
    finish: str
    thinking: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class Policy:
    """What is done to logits before a token is drawn, in this order: repetition penalty, temperature, top_k, top_p."""

    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float


@dataclass
class _Row:
    """An answer in the making. It outlives an out-of-memory error, after which it goes on from where it stood."""

    index: int
    prompt: Rendered
    uniforms: np.ndarray
    limit: int
    ids: list[int] = field(default_factory=list)
    finish: str | None = None

    def so_far(self) -> Rendered:
        return replace(self.prompt, ids=(*self.prompt.ids, *self.ids)) if self.ids else self.prompt


def generate(
    model: ChatModel,
    prompts: Sequence[Rendered],
    sampling: Sampling,
    *,
    row_keys: Sequence[Any] | None = None,
    interventions: Sequence[Intervention] = (),
    batch_size: int = 32,
    progress: str | None = None,
) -> list[Generation]:
    """One answer a prompt, in the prompts' order.

    Args:
        model: the model; hook contexts that are open around the call act as well, before `interventions`.
        prompts: rendered prompts, without answers.
        sampling: how to sample.
        row_keys: what identifies a row's random numbers (anything with a stable str); by default its index.
        interventions: edits of the residual stream, at prompt, response or all positions.
        batch_size: most rows at once. A batch that runs out of memory is halved and goes on.
        progress: label of a progress bar, or None for none.

    Raises:
        UserError: a prompt longer than the context, keys that do not match the prompts, logits that are not finite.
    """
    keys = list(range(len(prompts))) if row_keys is None else list(row_keys)
    if len(keys) != len(prompts):
        raise UserError(f"{len(keys)} row keys for {len(prompts)} prompts", "one key a prompt")
    rows = []
    for i, (prompt, key) in enumerate(zip(prompts, keys, strict=True)):
        if len(prompt.ids) != prompt.n_prompt or not prompt.ids:
            raise UserError(f"prompt {i} is empty or already holds an answer", "rendered prompts, such as chat.prompt gives")
        if prompt.n_prompt > model.n_ctx:
            raise UserError(
                f"prompt {i} has {prompt.n_prompt} tokens, more than the context of {model.name} ({model.n_ctx})",
                f"prompts of at most {model.n_ctx} tokens",
                "shorten the prompt",
            )
        limit = min(sampling.max_new_tokens, model.n_ctx - prompt.n_prompt)
        # A prompt that fills the context leaves no room for an answer; that is an answer of length 0.
        rows.append(_Row(i, prompt, uniforms(sampling.seed, key, limit), limit, finish=None if limit else "length"))
    policy, stops = policy_of(model, sampling), frozenset(stop_ids(model))
    todo = [i for i, row in enumerate(rows) if row.finish is None]
    batches = length_sorted_batches([rows[i].prompt.n_prompt for i in todo], batch_size=batch_size)
    with (
        torch.inference_mode(),
        model.hooks(interventions),
        tqdm(total=len(todo), desc=progress, disable=progress is None) as bar,
    ):
        decoder = _Decoder(model, policy, stops, bar)
        for _ in halving_on_oom([[todo[j] for j in batch] for batch in batches], lambda b: decoder.run([rows[i] for i in b])):
            pass
    return [_generation(model, row) for row in rows]


def uniforms(seed: int, key: Any, n: int) -> np.ndarray:
    """The first n uniforms in [0, 1) of a row's stream: Philox, a counter-based generator, keyed by a hash of (seed, key)."""
    key128 = np.frombuffer(stream_digest(seed, key)[:16], dtype="<u8")
    return np.random.Generator(np.random.Philox(key=key128)).random(n)


def stream_digest(seed: int, key: Any) -> bytes:
    """32 bytes that name a row's stream of random numbers."""
    return hashlib.sha256(f"{seed}\x1f{key}".encode()).digest()


def stop_ids(model: ChatModel) -> tuple[int, ...]:
    """Every id that ends an answer: EOS of tokenizer, config and generation_config, and the template's end of turn."""
    stops = set(model.chat.stop_ids)
    for config in (model.hf.config, getattr(model.hf, "generation_config", None)):
        eos = getattr(config, "eos_token_id", None)
        stops |= {int(i) for i in (eos if isinstance(eos, list | tuple) else [eos]) if i is not None}
    return tuple(sorted(stops))


def policy_of(model: ChatModel, sampling: Sampling) -> Policy:
    """The policy that `sampling` asks for, with the model's own settings where `use_model_config` says so."""
    policy = Policy(sampling.temperature, sampling.top_p, 0, 1.0)
    config = getattr(model.hf, "generation_config", None) if sampling.use_model_config else None
    for name in ("temperature", "top_p", "top_k", "repetition_penalty"):
        value = getattr(config, name, None)
        if value is not None:
            policy = replace(policy, **{name: value})
    return replace(policy, temperature=0.0) if getattr(config, "do_sample", None) is False else policy


def draw(
    logits: Float[Tensor, "batch vocab"],
    policy: Policy,
    uniform: Float[Tensor, " batch"] | None,
    seen: Bool[Tensor, "batch vocab"] | None = None,
) -> Int[Tensor, " batch"]:
    """The next token of each row; -1 where the logits are not finite.

    Args:
        logits: next-token logits of any float type; the arithmetic is fp32.
        policy: what to do to them.
        uniform: one number in [0, 1) a row; not needed at temperature 0.
        seen: tokens that a repetition penalty applies to (negative logits are multiplied by it, positive ones divided).
    """
    scores = logits.float()
    if seen is not None:
        penalised = torch.where(scores < 0, scores * policy.repetition_penalty, scores / policy.repetition_penalty)
        scores = torch.where(seen, penalised, scores)
    top, greedy = scores.max(-1)
    if policy.temperature == 0:
        return torch.where(top.isfinite(), greedy, -1)
    assert uniform is not None
    weights = ((scores - top[:, None]) / policy.temperature).exp()
    if 0 < policy.top_k < weights.shape[-1]:
        smallest = weights.topk(policy.top_k, dim=-1).values[:, -1:]
        weights = torch.where(weights >= smallest, weights, 0.0)
    if policy.top_p < 1:
        ordered, order = weights.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        kept = before < policy.top_p * ordered.sum(-1, keepdim=True)
        # Back in vocabulary order, where near ties, which a batch's shape may order either way, do not move any edge.
        weights = torch.zeros_like(weights).scatter(-1, order, torch.where(kept, ordered, 0.0))
    cdf = weights.cumsum(-1)
    total = cdf[:, -1:]
    # Below the total, so that rounding cannot point behind the last token; the first edge above it has a weight above 0.
    below = torch.minimum(uniform[:, None].to(total.device, torch.float32) * total, total.nextafter(torch.zeros_like(total)))
    chosen = torch.searchsorted(cdf, below, right=True)[:, 0]
    return torch.where(total[:, 0].isfinite() & top.isfinite(), chosen, -1)


class _Decoder:
    """Decodes batches of rows; whatever it learns of a row is kept in the row."""

    def __init__(self, model: ChatModel, policy: Policy, stops: frozenset[int], bar: Any) -> None:
        self.model, self.policy, self.stops, self.bar = model, policy, stops, bar
        self.tokens = 0

    def run(self, rows: Sequence[_Row]) -> None:
        """Decodes the rows that are not finished, all of them to their ends."""
        rows = [row for row in rows if row.finish is None]
        if not rows:
            return
        device = self.model.device
        batch = TokenBatch.build([row.so_far() for row in rows], pad_id=self.model.pad_id, side="left", device=device)
        width = batch.input_ids.shape[1]
        padding = [width - len(row.prompt.ids) - len(row.ids) for row in rows]
        steps = _Steps(padding, width + max(row.limit - len(row.ids) for row in rows), device)
        seen = self._seen(rows) if self.policy.repetition_penalty != 1 else None
        out = self.model.forward(batch, logits="last", past=new_cache(self.model.hf.config), use_cache=True)
        while True:
            assert out.logits is not None
            chosen = draw(out.logits, self.policy, self._uniforms(rows), seen)
            running = self._append(rows, chosen.tolist())
            if not any(running):
                return
            if len(rows) - sum(running) >= COMPACT_SHARE * len(rows):
                kept = [i for i, runs in enumerate(running) if runs]
                rows, padding = [rows[i] for i in kept], [padding[i] for i in kept]
                index = torch.tensor(kept, device=device)
                chosen, seen = chosen[index], None if seen is None else seen[index]
                cut = keep_rows(out.past, index, min(padding))
                padding = [p - cut for p in padding]
                steps = _Steps(padding, steps.room - cut, device)
            if seen is not None:
                seen.scatter_(1, chosen[:, None], True)
            step = steps.batch(chosen, out.past.get_seq_length() + 1)
            out = self.model.forward(step, logits="last", past=out.past, use_cache=True)

    def _append(self, rows: Sequence[_Row], chosen: Sequence[int]) -> list[bool]:
        """Gives each running row its token; returns which rows go on."""
        for row, token in zip(rows, chosen, strict=True):
            if row.finish is not None:
                continue
            if token < 0:
                raise UserError(
                    f"the logits of row {row.index} are not finite after {len(row.ids)} answer tokens",
                    "finite logits",
                    "load the model in float32 or bfloat16, or lower the steering strength",
                )
            if token in self.stops:
                row.finish = "stop"
            else:
                row.ids.append(token)
                self.tokens += 1
                row.finish = "length" if len(row.ids) >= row.limit else None
            if row.finish is not None:
                self.bar.set_postfix(tokens=self.tokens, refresh=False)
                self.bar.update(1)
        return [row.finish is None for row in rows]

    def _uniforms(self, rows: Sequence[_Row]) -> Tensor | None:
        if self.policy.temperature == 0:
            return None
        return torch.tensor([row.uniforms[min(len(row.ids), row.limit - 1)] for row in rows], dtype=torch.float32)

    def _seen(self, rows: Sequence[_Row]) -> Tensor:
        vocab = self.model.hf.get_output_embeddings().weight.shape[0]
        seen = torch.zeros(len(rows), vocab, dtype=torch.bool)
        for i, row in enumerate(rows):
            seen[i, list({*row.prompt.ids, *row.ids})] = True
        return seen.to(self.model.device)


class _Steps:
    """Decode steps of a batch whose rows stay the same: one token a row behind a cache."""

    def __init__(self, padding: Sequence[int], room: int, device: torch.device) -> None:
        self.room = room
        self.padding = torch.tensor(padding, device=device)
        self.left_padded = any(padding)
        self.positions = Positions.decode(len(padding), device)
        self.mask = (torch.arange(room, device=device) >= self.padding[:, None]).long()

    def batch(self, chosen: Int[Tensor, " batch"], total: int) -> TokenBatch:
        """The step that makes the cache `total` tokens long."""
        place = (total - 1 - self.padding)[:, None]
        return TokenBatch(chosen[:, None], self.mask[:, :total], place, self.positions, self.left_padded)


def _generation(model: ChatModel, row: _Row) -> Generation:
    opened = opens_thinking(row.prompt)
    _, _, thinking = split_thinking(model.chat.decode(row.ids), opened)
    start, end = model.chat.answer_tokens(row.ids, opened) if thinking is not None else (0, len(row.ids))
    text = model.chat.decode(row.ids[start:end], special=False)
    return Generation(tuple(row.ids), text, str(row.finish), thinking)
