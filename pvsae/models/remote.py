"""Answers from an OpenAI-compatible server (vLLM and the like), for people whose model runs elsewhere.

Knows: how a row's sampling becomes a request, and that a server applies settings of its own if it is not told otherwise.
Does not know: retries, caching, cost (`pvsae.llm.ChatClient`), token ids (a server sends text), interventions (they need the
residual stream).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pvsae.errors import UserError
from pvsae.llm import ChatClient, Reply, Request

if TYPE_CHECKING:
    from pvsae.models.chat import Message
    from pvsae.models.generate import Generation, Sampling

# vLLM and SGLang take top_k and a repetition penalty from the model's generation_config unless a request says something else,
# and templates think unless told not to. Servers that do not know these fields refuse them, or ignore them.
PLAIN_SAMPLING: Mapping[str, Any] = {
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "chat_template_kwargs": {"enable_thinking": False},
}


@dataclass
class RemoteModel:
    """A model behind a server; `generate` is like that of ChatModel, on messages in place of rendered prompts.

    Attributes:
        client: how requests are sent, cached and paid for.
        extra: further fields for every request; None asks the server once whether it takes `PLAIN_SAMPLING`.
        failed: rows without an answer so far, over all calls.
        notes: what was found out about the server; to be stored with the run.
    """

    client: ChatClient
    extra: Mapping[str, Any] | None = None
    failed: int = 0
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.client.model

    @property
    def ledger(self) -> dict[str, Any]:
        """What was asked and spent so far (`ChatClient.ledger`)."""
        return self.client.ledger

    def requests(
        self, prompts: Sequence[Sequence[Message]], sampling: Sampling, row_keys: Sequence[Any] | None = None
    ) -> list[Request]:
        """One request a row, with a seed of its own that depends on (sampling.seed, row key) alone; sends nothing."""
        from pvsae.models.generate import stream_digest

        keys = list(range(len(prompts))) if row_keys is None else list(row_keys)
        if len(keys) != len(prompts):
            raise UserError(f"{len(keys)} row keys for {len(prompts)} prompts", "one key a prompt")
        return [
            Request(
                tuple(dict(message) for message in messages),
                sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                # 31 bits: servers take a signed 32-bit seed, some no negative one.
                seed=int.from_bytes(stream_digest(sampling.seed, key)[:4], "little") >> 1,
                tag=str(key),
                extra=self.extra or None,
            )
            for messages, key in zip(prompts, keys, strict=True)
        ]

    def generate(
        self,
        prompts: Sequence[Sequence[Message]],
        sampling: Sampling,
        *,
        row_keys: Sequence[Any] | None = None,
        interventions: Sequence[Any] = (),
        batch_size: int = 32,
        progress: str | None = None,
    ) -> list[Generation]:
        """One answer a prompt, in the prompts' order. A row that fails for good has finish "failed" and says why in `error`.

        Args:
            prompts: messages of each row.
            sampling: max_new_tokens, temperature, top_p and seed are passed on; whether a server's seeds repeat is its affair.
            row_keys: what identifies a row's seed; by default its index.
            interventions: must be empty.
            batch_size: not used; the client's `concurrency` says how many rows are under way at once.
            progress: label of a progress bar, or None.

        Raises:
            UserError: interventions, use_model_config, or a server that cannot be reached.
        """
        if interventions:
            raise UserError(
                "interventions cannot be applied to a model behind a server",
                "a model that is loaded here",
                "leave --rollouts-url out for steered answers",
            )
        if sampling.use_model_config and self.extra is None:
            self.extra = {}  # then the server's own settings are what was asked for
        if self.extra is None and prompts:
            self._ask_for_plain_sampling()
        replies = self.client.complete(self.requests(prompts, sampling, row_keys), progress)
        generations = [_generation(reply) for reply in replies]
        self.failed += sum(g.finish == "failed" for g in generations)
        return generations

    def _ask_for_plain_sampling(self) -> None:
        """Finds out with one short request whether the server takes the fields of PLAIN_SAMPLING."""
        probe = Request(({"role": "user", "content": "Say yes."},), 1, extra=PLAIN_SAMPLING)
        error = self.client.complete([probe])[0].error
        if error is None:
            self.extra = PLAIN_SAMPLING
            self.notes = ("the server was told to use no top_k, no repetition penalty, and no thinking",)
        else:
            self.extra = {}
            self.notes = (f"the server takes no top_k, repetition penalty or thinking switch, and may apply its own ({error})",)


def _generation(reply: Reply) -> Generation:
    from pvsae.models.chat import THINK_CLOSE, THINK_OPEN, split_thinking
    from pvsae.models.generate import Generation

    if reply.error is not None or reply.text is None:
        return Generation((), "", "failed", error=reply.error or "the server sent no text")
    text = reply.text
    # Servers whose template opens the thinking block send its end only.
    start, end, thinking = split_thinking(text, opened=THINK_CLOSE in text and THINK_OPEN not in text)
    finish = "length" if reply.finish == "length" else "stop"
    return Generation((), text[start:end], finish, thinking)
