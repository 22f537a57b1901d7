"""A ChatModel as lm-evaluation-harness sees it: log-likelihoods and generation under interventions.

Knows: the harness' interface of a language model (`lm_eval.api.model`), and how its requests become rows and prompts.
Does not know: tasks, metrics, which interventions there are. Needs the extra `capability`; nothing imports this module before it
is asked for.

Where a text is cut into context and continuation is the harness' own affair (`TemplateLM`), so that without an intervention every
number is that of the harness' own HFLM on the same model. For interventions the context is the prompt and the continuation is the
response: "prompt" edits every context token, "response" the last context token and the continuation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm.auto import tqdm

from pvsae.errors import UserError
from pvsae.models.batch import TokenBatch, halving_on_oom, length_sorted_batches
from pvsae.models.chat import Rendered
from pvsae.models.chatmodel import ChatModel
from pvsae.models.generate import Sampling
from pvsae.models.interventions import Intervention

Request = tuple[Any, list[int], list[int]]  # (the texts, ids of the context, ids of the continuation)

BATCH_TOKENS = 16384
LONGEST = 256  # tokens of an answer where a task does not say, as in HFLM
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # names that tasks use, the first wins


class _Row(NamedTuple):
    """What is read of requests that share it: ids, of which the first n_prompt are the prompt."""

    ids: tuple[int, ...]
    n_prompt: int


class HarnessModel(TemplateLM):
    """A language model for `lm_eval.simple_evaluate`.

    Args:
        model: hook contexts that are open around the call act as well, before `interventions`.
        interventions: edits that are active in every forward pass.
        batch_size: most rows at once; a batch that runs out of memory is halved.
        seed: of answers that a task wants sampled.
        progress: label of progress bars, or None for none.
    """

    def __init__(
        self,
        model: ChatModel,
        interventions: Sequence[Intervention] = (),
        *,
        batch_size: int = 32,
        seed: int = 0,
        progress: str | None = None,
    ) -> None:
        super().__init__()
        self.model, self.interventions, self.batch_size, self.seed = model, tuple(interventions), batch_size, seed
        self.progress = progress
        self.tokenizer = model.tokenizer
        self._device = model.device

    # -- tokens -------------------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id if self.tokenizer.eos_token_id is not None else self.model.pad_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context: BOS, or else the end of a text."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def max_length(self) -> int:
        return self.model.n_ctx

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids. The tokenizer's own special tokens are added, but never a BOS before one that the text begins with."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.model.chat.decode([self.prefix_token_id]))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt's text by this model's template; without a generation prompt the last message is an answer's beginning."""
        if add_generation_prompt:
            return self.model.chat.prompt(chat_history).text
        return self.model.chat.prompt(chat_history[:-1]).text + chat_history[-1]["content"]

    # -- likelihoods --------------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, natural log, fp32; whether greedy decoding would say it) a request.

        Continuations of one token after the same context share a forward pass, as the choices of most multiple-choice tasks.

        Raises: UserError for a continuation that is empty or longer than the context, and for logits that are not finite.
        """
        rows: dict[_Row, list[int]] = {}
        for i, (texts, context, continuation) in enumerate(requests):
            if not continuation or len(continuation) > self.max_length:
                raise UserError(
                    f"request {i} of the task continues with {len(continuation)} tokens",
                    f"from 1 to {self.max_length} tokens, the context of {self.model.name}",
                    "choose another task",
                )
            whole = [*context, *continuation]
            cut = max(0, len(whole) - self.max_length - 1)  # a context that is too long loses its beginning
            # The last token is predicted and never read.
            row = _Row(tuple(whole[cut:-1]), max(1, self._n_prompt(texts, context, whole) - cut))
            rows.setdefault(row, []).append(i)
        keys = list(rows)
        predicted = {row: max(len(requests[i][2]) for i in members) for row, members in rows.items()}
        out: list[tuple[float, bool] | None] = [None] * len(requests)
        label = None if disable_tqdm else self.progress
        with tqdm(total=len(requests), desc=label, disable=label is None, unit="request") as bar:
            batches = length_sorted_batches([len(row.ids) for row in keys], batch_tokens=BATCH_TOKENS, batch_size=self.batch_size)
            for indices, logprobs in halving_on_oom(batches, lambda some: self._run([keys[i] for i in some], predicted)):
                for k, found in zip(indices, logprobs, strict=True):
                    for i in rows[keys[k]]:
                        out[i] = _read(found, requests[i][2])
                        if requests[i][0] is not None:
                            self.cache_hook.add_partial("loglikelihood", requests[i][0], out[i])
                    bar.update(len(rows[keys[k]]))
        return [one for one in out if one is not None]

    def _n_prompt(self, texts: tuple[str, str] | None, context: list[int], whole: list[int]) -> int:
        """How many tokens of a whole request are its prompt.

        Whitespace at a context's end, such as the newline behind an assistant header, is the continuation's in the harness'
        count; to an intervention it belongs to the prompt, as it does where the model answers.
        """
        if texts is None or texts[0] == texts[0].rstrip():
            return len(context)
        full = self.tok_encode(texts[0])
        return len(full) if whole[: len(full)] == full and len(full) < len(whole) else len(context)

    def _run(self, rows: Sequence[_Row], predicted: dict[_Row, int]) -> list[Float[Tensor, "predicted vocab"]]:
        """Log-probabilities of the last `predicted` next tokens of each row, on the model's device."""
        rendered = [Rendered(row.ids, row.n_prompt, (row.n_prompt, len(row.ids)), (), "") for row in rows]
        batch = TokenBatch.build(rendered, pad_id=self.model.pad_id, side="right", device=self.model.device)
        needed = torch.tensor(sorted({at for row in rows for at in range(len(row.ids) - predicted[row], len(row.ids))}))
        with torch.no_grad(), self.model.hooks(self.interventions):
            logits = self.model.forward(batch, logits=needed).logits
        assert logits is not None
        out = []
        for row, some in zip(rows, logits, strict=True):
            end = int(torch.searchsorted(needed, len(row.ids) - 1)) + 1
            logprobs = some[end - predicted[row] : end].float().log_softmax(-1)
            if not bool(torch.isfinite(logprobs.max(-1).values).all()):
                raise UserError(
                    "logits that are not finite", "finite logits", "load the model in float32 or bfloat16, or lower the strength"
                )
            out.append(logprobs)
        return out

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts (for perplexities), each token with as much context as the model has room for."""
        windows: list[Request] = []
        owner: list[int] = []
        for i, request in enumerate(requests):
            cut = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, cut):
                windows.append((None, context, continuation))
                owner.append(i)
        totals = [0.0] * len(requests)
        for i, (value, _) in zip(owner, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[i] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # -- generation ---------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers without thinking, cut at the first stop string; greedy unless the task samples.

        Of a task's settings the stop strings, the length, do_sample, temperature and top_p count. The model's own
        generation_config does not: a repetition penalty in it would be a capability of its own. An answer ends at an
        end-of-turn token or at the length limit; a stop string is looked for afterwards.
        """
        groups: dict[Sampling, list[int]] = {}
        stops: list[list[str]] = []
        for i, request in enumerate(requests):
            sampling, until = self._sampling(request.args[1])
            groups.setdefault(sampling, []).append(i)
            stops.append(until)
        out = [""] * len(requests)
        for sampling, members in groups.items():
            room = self.max_length - sampling.max_new_tokens
            if room < 1:
                raise UserError(
                    f"the task wants answers of {sampling.max_new_tokens} tokens",
                    f"less than the context of {self.model.name} ({self.max_length})",
                )
            prompts = [_prompt(self.tok_encode(requests[i].args[0])[-room:], requests[i].args[0]) for i in members]
            answers = self.model.generate(
                prompts,
                sampling,
                # Repeated requests are the same object several times over, and are to be sampled anew each time.
                row_keys=members,
                interventions=self.interventions,
                batch_size=self.batch_size,
                progress=None if disable_tqdm else self.progress,
            )
            for i, answer in zip(members, answers, strict=True):
                out[i] = _cut(answer.text, stops[i])
                self.cache_hook.add_partial("generate_until", requests[i].args, out[i])
        return out

    def _sampling(self, settings: dict[str, Any]) -> tuple[Sampling, list[str]]:
        """How to sample, and the stop strings."""
        until = settings.get("until") or []
        longest = next((settings[name] for name in _LENGTHS if settings.get(name)), LONGEST)
        temperature = float(settings.get("temperature") or 0.0)
        if settings.get("do_sample") is False:
            temperature = 0.0
        elif settings.get("do_sample") and temperature == 0:
            temperature = 1.0
        top_p = float(settings.get("top_p") or 1.0)
        sampling = Sampling(max_new_tokens=int(longest), temperature=temperature, top_p=top_p, seed=self.seed)
        return sampling, [until] if isinstance(until, str) else list(until)


def _prompt(ids: list[int], text: str) -> Rendered:
    return Rendered(tuple(ids), len(ids), (len(ids), len(ids)), (), text)


def _read(logprobs: Float[Tensor, "predicted vocab"], continuation: Sequence[int]) -> tuple[float, bool]:
    """Sum of a continuation's log-probabilities, and whether each of its tokens is the likeliest."""
    logprobs = logprobs[-len(continuation) :]
    tokens = torch.tensor(continuation, device=logprobs.device)
    total = float(logprobs.gather(-1, tokens[:, None]).sum())
    return total, bool((logprobs.argmax(-1) == tokens).all())


def _cut(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        if stop:
            text = text.split(stop)[0]
    return text
