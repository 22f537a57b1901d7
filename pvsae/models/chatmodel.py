"""ChatModel: a causal language model with its tokenizer, its chat template and the one hook API.

Knows: how to run the Hugging Face model on padded batches, to capture from many rows, and to show itself as a TransformerBridge.
Does not know: where models come from (loading.py), sampling (generate.py), templates (chat.py), what an edit computes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from pvsae.errors import UserError
from pvsae.models.batch import TokenBatch, halving_on_oom, length_sorted_batches
from pvsae.models.captures import Capture, Read
from pvsae.models.hooks import HookSession, HookStack
from pvsae.models.interventions import Intervention

if TYPE_CHECKING:
    from pvsae.models.chat import ChatTemplate, Rendered
    from pvsae.models.generate import Generation, Sampling


@dataclass(frozen=True)
class Output:
    """What a forward pass gives.

    Attributes:
        logits: [batch pos vocab] for "all", [batch vocab] (after each row's last real token) for "last", [batch kept vocab] for
            positions, None for None.
        past: the cache, if it was asked for.
    """

    logits: Tensor | None
    past: Any


class ChatModel:
    """A chat model. `hf` is the Hugging Face model, on which everything runs; `bridge` is TransformerLens' view of its weights.

    Blocks are counted from 0 and mean the output of decoder layer b, TransformerLens' `blocks.{b}.hook_resid_post`.
    """

    def __init__(
        self,
        hf: Any,
        tokenizer: Any,
        *,
        name: str = "model",
        path: Path | None = None,
        defaults: Mapping[str, Any] | None = None,
        chat_options: Mapping[str, Any] | None = None,
    ) -> None:
        """Wraps a loaded model; `load` does it for a name.

        Args:
            hf: a causal language model of transformers whose decoder holds its blocks in `.layers` (or `.h`).
            tokenizer: its tokenizer.
            name: what to call it in runs.
            path: its folder, if it has one.
            defaults: content of the folder's pvsae.json.
            chat_options: keyword arguments for ChatTemplate.
        """
        self.hf, self.tokenizer, self.name, self.path = hf, tokenizer, name, path
        self.defaults: dict[str, Any] = dict(defaults or {})
        self._chat_options = dict(chat_options or {})
        self.decoder: nn.Module = find_decoder(hf)
        self.blocks: list[nn.Module] = list(getattr(self.decoder, "layers", None) or self.decoder.h)  # type: ignore[arg-type]
        text = hf.config.get_text_config()
        self.d_model: int = text.hidden_size
        self.n_ctx: int = getattr(text, "max_position_embeddings", None) or 2**31
        self.stack = HookStack(self.blocks, self.decoder, self.d_model)

    def __repr__(self) -> str:
        return f"ChatModel({self.name!r}, {self.n_blocks} blocks, d_model {self.d_model}, {self.dtype}, {self.device})"

    @property
    def n_blocks(self) -> int:
        return len(self.blocks)

    @property
    def dtype(self) -> torch.dtype:
        return self.hf.get_input_embeddings().weight.dtype

    @property
    def device(self) -> torch.device:
        return self.hf.get_input_embeddings().weight.device

    @property
    def pad_id(self) -> int:
        """An id to pad with; what it is does not matter, padding is never read."""
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return token
        return 0

    @cached_property
    def chat(self) -> ChatTemplate:
        """The chat template: messages to ids with exact spans."""
        from pvsae.models.chat import ChatTemplate

        return ChatTemplate(self.tokenizer, **self._chat_options)

    @cached_property
    def bridge(self) -> Any:
        """A TransformerLens TransformerBridge on the very same tensors, made at first use; it costs modules, but no weights.

        The bridge needs eager attention and rewires modules, so it gets a skeleton of its own: every module is copied, every
        parameter and buffer (rotary tables and adapters too) is shared. What is trained or changed in `hf` is changed here.
        `bridge.enable_compatibility_mode()` folds norms into weights, for which the bridge then takes tensors of its own.
        Captures and interventions of `hooks` act on `hf`, not on the bridge.
        """
        from transformer_lens.model_bridge import TransformerBridge

        shared: dict[int, Any] = {id(t): t for t in (*self.hf.parameters(), *self.hf.buffers())}
        with self.stack.suspended():
            skeleton = copy.deepcopy(self.hf, shared)
        skeleton.set_attn_implementation("eager")
        place = str(self.path or self.name)
        skeleton.config.name_or_path = place
        return TransformerBridge.boot_transformers(
            place, hf_model=skeleton, tokenizer=copy.deepcopy(self.tokenizer), device=str(self.device), dtype=self.dtype
        )

    def hooks(
        self, interventions: Sequence[Intervention] = (), captures: Sequence[Capture] = ()
    ) -> AbstractContextManager[HookSession]:
        """A context in which every forward pass of this model is edited and read, whoever runs it.

        Contexts may be nested: outer interventions come first, and every capture sees all edits of its block.

        Raises: UserError at entry, for an unknown block, another d_model, a NaN direction, unknown positions or spans.
        """
        return self.stack.session(interventions, captures)

    def forward(
        self,
        batch: TokenBatch,
        *,
        logits: str | Int[Tensor, kept] | None = "all",
        past: Any = None,
        use_cache: bool = False,
    ) -> Output:
        """Runs a batch, telling open hook contexts what its positions are. Gradients are the caller's choice.

        Args:
            batch: new tokens, with the attention mask over cached and new ones.
            logits: "all" [batch pos vocab], "last" [batch vocab], positions of the batch [batch kept vocab], or None: without a
                cache, only the blocks up to the highest one that an open context captures are run (none, if there is no capture).
            past: a cache of earlier tokens of the same rows, which is extended in place.
            use_cache: whether to make and return a cache.
        """
        if not isinstance(logits, Tensor) and logits not in ("all", "last", None):
            raise ValueError(f"logits is {logits!r}, not 'all', 'last', positions or None")
        batch = batch.to(self.device)
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "past_key_values": past, "use_cache": use_cache}
        if batch.left_padded:
            # Without padding on the left, causal attention and counting positions from the cache's end are right by themselves,
            # and the mask-free path is the fastest that sdpa has.
            inputs |= {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
        elif batch.packed:
            inputs["position_ids"] = batch.position_ids  # where they start over, transformers keeps attention within a row
        with self.stack.at(batch.positions):
            if logits is None:
                top = self.stack.highest_captured
                if use_cache:
                    return Output(None, self.decoder(**inputs).past_key_values)
                if top >= 0:
                    with self.stack.stopping_after(top):
                        self.decoder(**inputs)
                return Output(None, None)
            if isinstance(logits, Tensor) or logits == "all":
                out = self.hf(**inputs, **({"logits_to_keep": logits.to(self.device)} if isinstance(logits, Tensor) else {}))
                return Output(out.logits, out.past_key_values)
            if batch.left_padded or "all" in batch.positions.full or batch.input_ids.shape[1] == 1:
                out = self.hf(**inputs, logits_to_keep=1)
                return Output(out.logits[:, 0], out.past_key_values)
            last = batch.positions.all.long().cumsum(1).argmax(1)  # first maximum of the count = last real token
            keep, where = last.unique(return_inverse=True)
            out = self.hf(**inputs, logits_to_keep=keep)
            return Output(out.logits[torch.arange(len(where), device=where.device), where], out.past_key_values)

    def capture(
        self,
        rows: Sequence[Rendered],
        captures: Sequence[Capture],
        interventions: Sequence[Intervention] = (),
        *,
        batch_tokens: int = 16384,
        progress: str | None = None,
    ) -> dict[str, Any]:
        """Reads captures from many rows: {capture.key: CPU tensor [rows, ...] or list of one tensor a row}, in the rows' order.

        Rows are sorted by length and padded on the right, no logits are made, no block above the highest one read is run, and a
        batch that runs out of memory is halved.

        Args:
            rows: rendered chats, whole.
            captures: what to read.
            interventions: edits under which to read; a capture sees the edited residual.
            batch_tokens: most tokens a batch, padding included.
            progress: label of a progress bar, or None for none.

        Raises: UserError before any forward pass for a row that is too long or lacks a span, and for NaN or infinite activations.
        """
        gathered: dict[str, list[Any]] = {c.key: [None] * len(rows) for c in captures}
        ragged: dict[str, bool] = {}
        for indices, read in self.capture_batches(rows, captures, interventions, batch_tokens=batch_tokens, progress=progress):
            for key, values in read.items():
                ragged[key] = isinstance(values, list)
                for i, value in zip(indices, values, strict=True):
                    gathered[key][i] = value
        return {key: v if ragged.get(key, True) else torch.stack(v) for key, v in gathered.items()}

    def capture_batches(
        self,
        rows: Sequence[Rendered],
        captures: Sequence[Capture],
        interventions: Sequence[Intervention] = (),
        *,
        batch_tokens: int = 16384,
        progress: str | None = None,
    ) -> Iterator[tuple[list[int], dict[str, Read]]]:
        """Like `capture`, batch by batch: yields (row indices, {key: results of those rows, on the CPU}), every row once."""
        self._check_rows(rows, captures)
        batches = length_sorted_batches([len(row.ids) for row in rows], batch_tokens=batch_tokens)

        def run(indices: list[int]) -> dict[str, Read]:
            batch = TokenBatch.build([rows[i] for i in indices], pad_id=self.pad_id, side="right", device=self.device)
            with torch.no_grad(), self.hooks(interventions, captures) as session:
                self.forward(batch, logits=None)
                return {key: _to_cpu(values[0]) for key, values in session.take().items()}

        with tqdm(total=len(rows), desc=progress, disable=progress is None, unit="row") as bar:
            for indices, read in halving_on_oom(batches, run):
                for capture in captures:
                    _check_finite(capture, indices, read[capture.key])
                yield indices, read
                bar.update(len(indices))

    def _check_rows(self, rows: Sequence[Rendered], captures: Sequence[Capture]) -> None:
        for i, row in enumerate(rows):
            if len(row.ids) > self.n_ctx:
                raise UserError(
                    f"row {i} has {len(row.ids)} tokens, more than the context of {self.name} ({self.n_ctx})",
                    f"rows of at most {self.n_ctx} tokens",
                    "shorten the texts, or generate with a smaller max_new_tokens",
                )
            for capture in captures:
                span = capture.needed_span
                if span is not None:
                    start, end = row.span(span)
                    if end <= start:
                        raise UserError(
                            f"row {i} has no {span!r} tokens to average", f"rows with a {span}", "leave such rows out"
                        )

    def generate(
        self,
        prompts: Sequence[Rendered],
        sampling: Sampling,
        *,
        row_keys: Sequence[Any] | None = None,
        interventions: Sequence[Intervention] = (),
        batch_size: int = 32,
        progress: str | None = None,
    ) -> list[Generation]:
        """One answer a prompt, in the prompts' order; see `pvsae.models.generate.generate`."""
        from pvsae.models.generate import generate

        return generate(
            self,
            prompts,
            sampling,
            row_keys=row_keys,
            interventions=interventions,
            batch_size=batch_size,
            progress=progress,
        )

    def next_token_logprobs(
        self, prompts: Sequence[Rendered], interventions: Sequence[Intervention] = (), *, batch_size: int = 32
    ) -> Float[Tensor, "rows vocab"]:
        """Log-probabilities (natural log, fp32, CPU) of the token after each prompt; an answer in a row is not read."""
        self._check_rows(prompts, ())
        out: list[Tensor | None] = [None] * len(prompts)

        def run(indices: list[int]) -> Tensor:
            some = [_prompt_only(prompts[i]) for i in indices]
            batch = TokenBatch.build(some, pad_id=self.pad_id, side="left", device=self.device)
            with torch.no_grad(), self.hooks(interventions):
                logits = self.forward(batch, logits="last").logits
                assert logits is not None
                return logits.float().log_softmax(-1).cpu()

        batches = length_sorted_batches([p.n_prompt for p in prompts], batch_size=batch_size)
        for indices, logprobs in halving_on_oom(batches, run):
            for i, row in zip(indices, logprobs, strict=True):
                if bool(row.isnan().any()):
                    raise UserError(f"NaN logits after prompt {i}", "finite logits", "load the model in float32 or bfloat16")
                out[i] = row
        kept = [row for row in out if row is not None]
        return torch.stack(kept) if kept else torch.empty(0, self.hf.get_output_embeddings().weight.shape[0])


def find_decoder(hf: Any) -> nn.Module:
    """The module that holds the decoder blocks, of a model as it came from transformers or wrapped by PEFT."""
    inner = hf.get_base_model() if hasattr(hf, "get_base_model") else hf
    decoder = inner.get_decoder() if hasattr(inner, "get_decoder") else inner
    for name in ("layers", "h"):
        if isinstance(getattr(decoder, name, None), nn.ModuleList):
            return decoder
    raise UserError(
        f"a model of class {type(inner).__name__}, whose decoder blocks could not be found",
        "a decoder-only causal language model with a list of blocks, such as Llama, Qwen, Gemma or Mistral",
    )


def _prompt_only(row: Rendered) -> Rendered:
    if len(row.ids) == row.n_prompt:
        return row
    from dataclasses import replace

    spans = tuple(s for s in row.spans if s[2] <= row.n_prompt)
    return replace(row, ids=row.ids[: row.n_prompt], answer=(row.n_prompt, row.n_prompt), spans=spans)


def _to_cpu(value: Read) -> Read:
    return [v.cpu() for v in value] if isinstance(value, list) else value.cpu()


def _check_finite(capture: Capture, indices: Sequence[int], values: Read) -> None:
    """Raises UserError naming the first row and block with NaN or infinite values."""
    if isinstance(values, Tensor) and math.isfinite(float(values.sum())):
        return
    for i, value in zip(indices, values, strict=True):
        bad = ~torch.isfinite(value)
        if bool(bad.any()):
            at = int(bad.flatten(1).any(1).nonzero()[0]) if len(capture.blocks) > 1 else 0
            raise UserError(
                f"NaN or infinite activations in row {i} at block {capture.blocks[at]} ({capture.key})",
                "finite activations",
                "load the model in float32 or bfloat16, or lower the steering strength",
            )
