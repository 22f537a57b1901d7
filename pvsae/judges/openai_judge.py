"""A judge behind an OpenAI-compatible server.

Knows: how to find out, once, what the server's log-probabilities are good for, and how to score with what there is:
  "logprobs"  every number 0-100 is one token: one call of one token, mean over its top 20 (the released code's way);
  "digits"    numbers take several tokens and the server can continue a begun answer: a tree of one-token calls;
  "text"      neither: the number is read from a short answer. No probabilities, so scores are whole numbers.
Does not know: retries, cache, cost (llm.py), nor the arithmetic of the tree (numbers.py).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pvsae.errors import UserError
from pvsae.judges.base import Metric, Score
from pvsae.judges.numbers import NUMBERS, number_tree, spelled, text_to_score, to_score, whole_numbers
from pvsae.llm import ChatClient, Reply, Request

log = logging.getLogger(__name__)

_PROBES = ("85", "100", "62")
# How servers are asked to continue an answer that has begun: fields of the last message, fields of the body.
_CONTINUE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "continue_final_message": ({}, {"continue_final_message": True, "add_generation_prompt": False}),  # vLLM, SGLang
    "prefix": ({"prefix": True}, {}),  # Mistral, DeepSeek
    "last message": ({}, {}),  # llama.cpp and others that take a last assistant message as a beginning
}


def distribution(row: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Token -> probability of one position; the raw space marks of BPE and SentencePiece become spaces."""
    probabilities: dict[str, float] = {}
    for token, logprob in row:
        token = _plain(token)
        probabilities[token] = probabilities.get(token, 0.0) + math.exp(logprob)
    return probabilities


def _plain(token: str) -> str:
    return token.replace("\u0120", " ").replace("\u2581", " ")


def distance(p: Mapping[str, float], q: Mapping[str, float]) -> float:
    """Total variation distance of two distributions of which only the likeliest tokens are known."""
    return 0.5 * sum(abs(p.get(token, 0.0) - q.get(token, 0.0)) for token in {*p, *q})


class OpenAIJudge:
    """Scores by the next-token distribution of a served model (see the module's head for the three ways).

    Args:
        client: where to ask.
        mode: skip the probe and use this one; "digits" still probes how to continue an answer.
        floor: in "digits", beginnings of a number less likely than this are not followed (0: exact, 100 to 200 calls an answer).
        text_tokens: length of the answer that "text" reads.
        extra: further fields of each request's body, e.g. {"chat_template_kwargs": {"enable_thinking": False}}.
    """

    def __init__(
        self,
        client: ChatClient,
        *,
        mode: Literal["logprobs", "digits", "text"] | None = None,
        floor: float = 0.005,
        text_tokens: int = 16,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self.client, self.floor, self.text_tokens, self.extra = client, floor, text_tokens, extra
        self.name = f"openai:{client.model}"
        self.mode: Literal["logprobs", "digits", "text"] | None = mode
        self.top_logprobs = 20
        self.continuation: str | None = None
        self._probed = False

    @classmethod
    def connect(
        cls,
        model: str,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        cache: str | Path | None = None,
        ledger: str | Path | None = None,
        concurrency: int = 16,
        timeout: float = 60.0,
        max_retries: int = 6,
        max_cost: float | None = None,
        price: tuple[float, float] | None = None,
        mode: Literal["logprobs", "digits", "text"] | None = None,
        floor: float = 0.005,
        extra: Mapping[str, Any] | None = None,
        check: bool = True,
    ) -> OpenAIJudge:
        """A judge with a client of its own (arguments as there).

        Args:
            check: see at once whether the server is there (free of charge); a dry run does without.

        Raises:
            UserError: the server cannot be reached or refuses the key.
        """
        client = ChatClient(
            base_url,
            model,
            api_key=api_key,
            cache=cache,
            ledger=ledger,
            concurrency=concurrency,
            timeout=timeout,
            max_retries=max_retries,
            max_cost=max_cost,
            price=price,
        )
        if check:
            client.check()
        return cls(client, mode=mode, floor=floor, extra=extra)

    @property
    def ledger(self) -> dict[str, Any]:
        """What was asked and spent so far (`ChatClient.ledger`)."""
        return self.client.ledger

    def request(self, metric: Metric, question: str, answer: str) -> Request:
        """The first request for one answer: one token with its likeliest alternatives (in "text", a short answer)."""
        return self._ask(metric.fill(question, answer), as_text=self.mode == "text")

    def estimate(self, metric: Metric, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
        """Dry run, sends nothing: `ChatClient.estimate` of each answer's first request; "digits" takes a few times as many."""
        return self.client.estimate([self.request(metric, *pair) for pair in pairs])

    def score(self, metric: Metric, pairs: Sequence[tuple[str, str]], progress: str | None = None) -> list[Score]:
        """Scores of (question, answer) pairs, in their order. An item whose requests fail is a Score of mode "failed".

        Raises:
            UserError: the server cannot be reached, or answers nothing at all to the probe.
        """
        if not pairs:
            return []
        self.probe()
        prompts = [metric.fill(question, answer) for question, answer in pairs]
        if self.mode == "text":
            return self._by_text(metric, prompts, progress)
        replies = self.client.complete([self._ask(prompt) for prompt in prompts], progress)
        scores: list[Score | None] = [self._failure(metric, reply) for reply in replies]
        rows = [i for i, reply in enumerate(replies) if reply.error is None and reply.logprobs]
        first = [distribution((replies[i].logprobs or ((),))[0]) for i in rows]
        made = self._by_tree(metric, prompts, rows, first) if self.mode == "digits" else self._by_token(metric, first)
        for i, score in zip(rows, made, strict=True):
            scores[i] = score
        rest = [i for i, score in enumerate(scores) if score is None]  # no log-probabilities this time
        for i, score in zip(rest, self._by_text(metric, [prompts[i] for i in rest]), strict=True):
            scores[i] = score
        return [score for score in scores if score is not None]

    def probe(self) -> None:
        """Find out, once, which mode the server allows: a few tiny requests, kept in the cache like any other.

        Raises:
            UserError: the server cannot be reached, or has no answer to a chat request (e.g. unknown model).
        """
        if self._probed:
            return
        kind = self.mode
        if kind in (None, "digits"):
            replies = self._probe_replies()
            kind = kind or self._kind(replies)
        if kind == "digits":
            self.continuation = self._find_continuation()
            if self.continuation is None:
                log.warning("%s splits numbers into tokens and cannot continue a begun answer: scores are parsed text", self.name)
                kind = "text"
        self.mode, self._probed = kind, True
        log.info("%s: mode %s, continuation %s", self.name, self.mode, self.continuation)

    # -- scoring -----------------------------------------------------------------------------------------------------

    def _ask(self, prompt: str, begun: str | None = None, as_text: bool = False) -> Request:
        messages: tuple[dict[str, Any], ...] = ({"role": "user", "content": prompt},)
        extra = dict(self.extra or {})
        if begun is not None:
            fields, body = _CONTINUE[self.continuation or ""]
            messages += ({"role": "assistant", "content": begun, **fields},)
            extra.update(body)
        if as_text:
            return Request(messages, self.text_tokens, extra=extra or None)
        return Request(messages, 1, logprobs=self.top_logprobs, extra=extra or None)

    def _by_token(self, metric: Metric, first: Sequence[dict[str, float]]) -> list[Score | None]:
        return [to_score(whole_numbers(row), row, "logprobs", self.name, metric) for row in first]

    def _by_tree(
        self, metric: Metric, prompts: Sequence[str], rows: Sequence[int], first: Sequence[dict[str, float]]
    ) -> list[Score | None]:
        """Scores of the items `rows`; None for one that lost its log-probabilities on the way (it goes to text)."""
        failed: dict[int, Reply] = {}
        lost: set[int] = set()

        def ask(nodes: Sequence[tuple[int, tuple[str, ...]]]) -> list[Mapping[Any, float] | None]:
            replies = self.client.complete([self._ask(prompts[rows[item]], begun="".join(path)) for item, path in nodes])
            following: list[Mapping[Any, float] | None] = []
            for (item, _), reply in zip(nodes, replies, strict=True):
                if reply.error is not None:
                    failed[item] = reply
                elif not reply.logprobs and (reply.text or reply.finish != "stop"):
                    lost.add(item)  # else the answer simply ended here: some servers give an end no position
                following.append(distribution(reply.logprobs[0]) if reply.logprobs else None)
            return following

        masses = number_tree(first, ask, str, self.floor)
        return [
            self._failure(metric, failed[item])
            if item in failed
            else None
            if item in lost
            else to_score(mass, first[item], "digits", self.name, metric)
            for item, mass in enumerate(masses)
        ]

    def _by_text(self, metric: Metric, prompts: Sequence[str], progress: str | None = None) -> list[Score]:
        replies = self.client.complete([self._ask(prompt, as_text=True) for prompt in prompts], progress)
        return [self._failure(metric, reply) or text_to_score(reply.text or "", self.name, metric) for reply in replies]

    def _failure(self, metric: Metric, reply: Reply) -> Score | None:
        if reply.error is None:
            return None
        return Score(None, "failed", None, False, (), self.name, metric.prompt_hash, reply.error)

    # -- the probe ---------------------------------------------------------------------------------------------------

    def _probe_request(self, number: str) -> Request:
        request = self._ask(f"Reply with exactly this number and nothing else: {number}")
        return replace(request, max_tokens=4, tag=f"probe {self.client.base_url}")

    def _probe_replies(self) -> list[Reply]:
        for self.top_logprobs in (20, 10, 5):  # servers differ in how many they give
            replies = self.client.complete([self._probe_request(number) for number in _PROBES])
            answered = [reply for reply in replies if reply.error is None]
            if answered:
                return answered
            if not all((reply.error or "").startswith(("HTTP 400", "HTTP 422")) for reply in replies):
                break
        else:  # refused because of the log-probabilities, perhaps: ask for text alone
            requests = [replace(self._probe_request(number), logprobs=None, max_tokens=self.text_tokens) for number in _PROBES]
            replies = self.client.complete(requests)
            answered = [reply for reply in replies if reply.error is None]
            if answered:
                return answered
        raise UserError(
            f"{self.client.base_url} gives model {self.client.model!r} no answer: {replies[0].error}",
            "an answer to a chat request",
            "check the model's name and the server's log",
        )

    @staticmethod
    def _kind(replies: Sequence[Reply]) -> Literal["logprobs", "digits", "text"]:
        """What the tokens of the probe's answers say about how this model writes numbers."""
        replies = [reply for reply in replies if reply.logprobs]
        for reply in replies:
            written = [spelled(_plain(token), at_start=i == 0) for i, token in enumerate(reply.tokens or ())]
            if any(a and b for a, b in pairwise(written)):
                return "digits"  # one number, two tokens
        seen = {token.strip() for reply in replies for row in reply.logprobs or () for token in distribution(row)}
        if any(len(token) > 1 and token in NUMBERS for token in seen):
            return "logprobs"
        return "digits" if any(token in NUMBERS for token in seen) else "text"

    def _find_continuation(self) -> str | None:
        """The way of continuing under which this server really continues.

        The free answer t1 t2 ... came with the distribution of t2 given t1. A request that begins the answer with t1 must give
        the same one; a server that ignores the beginning, or opens a new turn after it, gives another.
        """
        for style in _CONTINUE:
            self.continuation = style
            agreed = 0
            for number in _PROBES:
                free = self.client.complete([self._probe_request(number)])[0]
                if free.error is not None or not free.logprobs or len(free.logprobs) < 2 or not free.tokens:
                    continue
                one, two = distribution(free.logprobs[0]), distribution(free.logprobs[1])
                if distance(one, two) < 0.2 or not free.tokens[0].strip():
                    continue  # could not tell a continuation from a fresh start
                request = self._ask(f"Reply with exactly this number and nothing else: {number}", begun=free.tokens[0])
                begun = self.client.complete([replace(request, tag=f"probe {self.client.base_url}")])[0]
                if begun.error is not None or not begun.logprobs:
                    continue
                if distance(distribution(begun.logprobs[0]), two) > 0.05:  # servers in bf16 differ from themselves by about 0.01
                    agreed = 0
                    break
                agreed += 1
            if agreed:
                return style
        return None
