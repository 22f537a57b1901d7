"""Chat requests to an OpenAI-compatible server: each answer is paid for once.

Knows: how to send many requests with bounded concurrency, when to try again and how long to wait, what was spent and when
to stop spending. Requests, replies and the file that keeps them are in replies.py.
Does not know: what the requests are for (judging, authoring and remote rollouts all come through here), nor torch.

What holds:
- A reply is committed to the cache by the thread that received it, before anything else happens to it. A killed run that is
  started again asks only for what it never received.
- One item that fails is a `Reply` with `.error`; it never takes the others with it, and it is not cached.
- Nothing is sent anywhere but to `base_url`: redirects are not followed.
- Plain threads do the waiting, so the same call works in a script and inside a running event loop (Jupyter).
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from pvsae.errors import UserError
from pvsae.ledger import Ledger
from pvsae.replies import Reply, ReplyCache, Request, request_key

__all__ = ["MAX_COST_REACHED", "ChatClient", "Reply", "ReplyCache", "Request", "request_key", "retry_after"]

MAX_COST_REACHED = "max-cost reached"
_LONGEST_WAIT = 300.0  # seconds; a server that asks for more is out of quota, not busy
_BYTES_PER_TOKEN = 3.0  # before the first reply; then measured


def retry_after(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """Seconds that the server asks to wait (`retry-after-ms`; `Retry-After`, seconds or HTTP date); None if it says nothing."""
    try:
        if (ms := headers.get("retry-after-ms")) is not None:
            return max(0.0, float(ms) / 1000)
        value = headers.get("retry-after")
        if value is None:
            return None
        try:
            return max(0.0, float(value))
        except ValueError:
            when = parsedate_to_datetime(value)
            when = when if when.tzinfo else when.replace(tzinfo=UTC)
            return max(0.0, (when - (now or datetime.now(UTC))).total_seconds())
    except (ValueError, TypeError):
        return None


class _GiveUp(Exception):
    """This item will not be tried again; the message becomes `Reply.error`."""


class _NotSent(_GiveUp):
    """... because it may not be sent, which is no failure of the server's."""


class ChatClient:
    """Client of one model on one OpenAI-compatible server.

    Args:
        base_url: address including the `/v1` part; None means OPENAI_BASE_URL, else OpenAI's own.
        model: the model's name as the server knows it.
        api_key: None takes OPENAI_API_KEY, else "none" (local servers do not look).
        cache: SQLite file for the replies; None keeps them only as long as this object lives.
        concurrency: most requests under way at once.
        timeout: seconds for one request.
        max_retries: tries after the first, an item.
        ledger: SQLite file that counts on from what earlier clients with the same file did and spent; None counts this object
            alone.
        max_cost: US dollars that may be spent, what the ledger's file knows of included; needs `price`.
        price: US dollars per million tokens (in, out).
        backoff: seconds of the first wait; doubles each time up to 30, with jitter.

    Raises:
        UserError: malformed address, `max_cost` without `price`, unusable cache or ledger file.
    """

    def __init__(
        self,
        base_url: str | None,
        model: str,
        *,
        api_key: str | None = None,
        cache: str | Path | None = None,
        ledger: str | Path | None = None,
        concurrency: int = 16,
        timeout: float = 60.0,
        max_retries: int = 6,
        max_cost: float | None = None,
        price: tuple[float, float] | None = None,
        backoff: float = 0.5,
    ) -> None:
        if base_url is not None and not base_url.startswith(("http://", "https://")):
            raise UserError(f"server address {base_url!r} is no URL", "http://HOST:PORT/v1 or https://...", f"http://{base_url}")
        if not model:
            raise UserError("no model was named for the server", "the name of a model that the server has")
        if max_cost is not None and price is None:
            raise UserError(
                f"a limit of {max_cost} US dollars cannot be kept without prices",
                "price=(US dollars per million tokens in, ... out)",
                "give the prices of your provider's page, or leave the limit out",
            )
        if concurrency < 1:
            raise UserError(f"concurrency {concurrency} sends nothing", "a whole number of at least 1")
        import openai  # 0.7 s: not at import of this module

        self.model, self.concurrency, self.timeout, self.max_retries = model, concurrency, timeout, max_retries
        self.max_cost, self.price, self.backoff = max_cost, price, backoff
        key = api_key or os.environ.get("OPENAI_API_KEY") or "none"
        self._openai = openai
        self._api = openai.OpenAI(
            base_url=base_url,
            api_key=key,
            timeout=timeout,
            max_retries=0,  # the loop below counts, waits and reports
            http_client=openai.DefaultHttpxClient(follow_redirects=False),
        )
        self.base_url = str(self._api.base_url).rstrip("/")
        self.cache = ReplyCache(Path(cache)) if cache is not None else None
        self._ledger = Ledger(None if ledger is None else Path(ledger))
        self._memory: dict[str, Reply] = {}
        self._lock = threading.Lock()
        self._settled = threading.Condition(self._lock)
        self._stop = threading.Event()
        self._not_before = 0.0  # monotonic time before which no thread sends: one 429 holds all of them back
        self._checked = False
        self._max_tokens_field = "max_tokens"
        self._reserved = 0.0
        self._down_in_a_row = 0

    # -- what a caller asks ------------------------------------------------------------------------------------------

    def key(self, request: Request) -> str:
        """The request's name in the cache."""
        return request_key(self.model, request)

    @property
    def ledger(self) -> dict[str, Any]:
        """So far: calls answered, replies from the cache, items failed, retries, tokens, cost in US dollars (None: no prices)."""
        with self._lock:
            shown = {name: total for name, total in self._ledger.totals.items() if name != "bytes_in"}
            return {**shown, "cost": self._spent()}

    def estimate(self, requests: Sequence[Request]) -> dict[str, Any]:
        """Dry run, sends nothing: the calls that the cache cannot answer, their tokens (out: at most), cost (None: no prices)."""
        todo = {self.key(request): request for request in requests}
        known = self._known(todo)
        todo = {key: request for key, request in todo.items() if key not in known}
        tokens_in = sum(round(self._tokens_in(request)) for request in todo.values())
        tokens_out = sum(request.max_tokens for request in todo.values())
        return {
            "calls": len(todo),
            "cached": len(requests) - len(todo),
            "tokens_in": tokens_in,
            "tokens_out": tokens_out,
            "cost": self._cost(tokens_in, tokens_out),
        }

    def check(self) -> None:
        """Ask the server for its list of models (free), once. Any answer will do, except that the key is refused.

        Raises:
            UserError: nobody answers, within seconds, or the key is refused.
        """
        if self._checked:
            return
        for wait in (0.3, 0.7, None):
            try:
                self._api.with_options(timeout=10.0).models.with_raw_response.list()
            except self._openai.APIStatusError as error:
                if error.status_code in (401, 403):
                    raise UserError(
                        f"{self.base_url} refuses the API key (HTTP {error.status_code})",
                        "a valid key in OPENAI_API_KEY",
                        "export OPENAI_API_KEY=...",
                    ) from error
            except self._openai.APIConnectionError as error:
                if wait is not None and not isinstance(error, self._openai.APITimeoutError):
                    time.sleep(wait)
                    continue
                raise UserError(
                    f"no answer from {self.base_url}: {_reason(error)}",
                    "a running OpenAI-compatible server at that address",
                    "start the server, or correct the address (it usually ends in /v1)",
                ) from error
            break
        self._checked = True

    def complete(self, requests: Sequence[Request], progress: str | None = None) -> list[Reply]:
        """Answer all requests, in their order. Cached ones cost nothing; equal ones are sent once.

        Args:
            progress: label of a progress bar on stderr; None shows none.

        Raises:
            UserError: something must be sent and the server cannot be reached at all. Anything that befalls single items
                is in their `Reply.error`.
        """
        keys = [self.key(request) for request in requests]
        known = self._known(keys)
        todo = {key: request for key, request in zip(keys, requests, strict=True) if key not in known}
        fresh: dict[str, Reply] = {}
        if todo:
            self.check()
            fresh = self._send_all(todo, progress)
        replies, seen, cached = [], set(), 0
        for key in keys:
            reply = known[key] if key in known else fresh[key]
            if reply.error is None and (key in known or key in seen):
                reply = replace(reply, cached=True)
                cached += 1
            seen.add(key)
            replies.append(reply)
        with self._lock:
            self._ledger.add(cached=cached)
        return replies

    def close(self) -> None:
        """Close connections, ledger and cache."""
        self._api.close()
        self._ledger.close()
        if self.cache is not None:
            self.cache.close()

    def __enter__(self) -> ChatClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- how it is done ----------------------------------------------------------------------------------------------

    def _known(self, keys: Iterable[str]) -> dict[str, Reply]:
        if self.cache is not None:
            return self.cache.get_many(keys)
        return {key: self._memory[key] for key in keys if key in self._memory}

    def _send_all(self, todo: Mapping[str, Request], progress: str | None) -> dict[str, Reply]:
        from tqdm import tqdm

        self._stop.clear()
        self._down_in_a_row = 0
        replies: dict[str, Reply] = {}
        pool = ThreadPoolExecutor(min(self.concurrency, len(todo)), thread_name_prefix="pvsae-llm")
        try:
            futures = {pool.submit(self._one, key, request): key for key, request in todo.items()}
            for future in tqdm(as_completed(futures), total=len(futures), desc=progress, disable=progress is None):
                replies[futures[future]] = future.result()
        finally:  # also on Ctrl-C: nothing new is sent, what is under way still reaches the cache
            self._stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
        return replies

    def _one(self, key: str, request: Request) -> Reply:
        try:
            return self._until_answered(key, request)
        except _NotSent as error:
            return Reply(None, None, None, None, self.model, error=str(error))
        except _GiveUp as error:
            return self._failed(str(error))
        except Exception as error:  # e.g. text that is no valid Unicode: this item's own trouble
            return self._failed(f"{type(error).__name__}: {error}")

    def _book(self, request: Request, reply: Reply) -> None:
        """Into the ledger, by the server's count of tokens, else by our estimate."""
        tokens_in, tokens_out = reply.usage or (round(self._tokens_in(request)), max(1, len(reply.text or "") // 4))
        with self._lock:
            self._down_in_a_row = 0
            self._ledger.add(calls=1, tokens_in=tokens_in, tokens_out=tokens_out, bytes_in=_size(request))

    def _failed(self, error: str) -> Reply:
        with self._lock:
            self._ledger.add(failed=1)
        return Reply(None, None, None, None, self.model, error=error)

    def _until_answered(self, key: str, request: Request) -> Reply:
        """Send, wait, send again, until there is a reply; it is in the cache and in the ledger when this returns."""
        api, tries = self._openai, 0
        body = self._body(request)
        reserved = self._reserve(request)
        try:
            while True:
                self._wait_for_turn()
                wait: float | None = None
                try:
                    reply = _read_reply(self._api.chat.completions.create(**body), self.model)
                    self._book(request, reply)  # first: killed in between, it is paid for again, and then counted again
                    if self.cache is not None:
                        self.cache.put(key, reply)
                    else:
                        self._memory[key] = reply
                    return reply
                except api.APIConnectionError as error:
                    problem, down = _reason(error), not isinstance(error, api.APITimeoutError)
                except api.APIStatusError as error:
                    problem, down = f"HTTP {error.status_code}: {_message(error)}", False
                    if self._other_max_tokens_field(error, body):
                        continue
                    if getattr(error, "code", None) == "insufficient_quota":
                        raise _GiveUp(problem) from error
                    if error.status_code not in (408, 409, 429) and error.status_code < 500:
                        raise _GiveUp(problem) from error
                    wait = retry_after(error.response.headers)
                except (api.APIResponseValidationError, ValueError, AttributeError, TypeError, IndexError) as error:
                    problem, down = f"the server's answer is no chat completion ({type(error).__name__}: {error})", False
                tries += 1
                if tries > self.max_retries:
                    with self._lock:
                        self._down_in_a_row += down
                    raise _GiveUp(f"{problem} (gave up after {tries} tries)")
                self._hold(wait, tries, problem)
        finally:
            with self._settled:
                self._reserved -= reserved
                self._settled.notify_all()

    def _wait_for_turn(self) -> None:
        while True:
            if self._stop.is_set():
                raise _NotSent("interrupted")
            if self._down_in_a_row >= 3:  # three whole items in a row met no server at all
                raise _GiveUp(f"no answer from {self.base_url} any more")
            pause = self._not_before - time.monotonic()
            if pause <= 0:
                return
            self._stop.wait(pause + random.uniform(0, 0.1))  # not all at the same instant

    def _hold(self, wait: float | None, tries: int, problem: str) -> None:
        """Wait before the next try: as long as the server said (and then every thread waits), else back off."""
        with self._lock:
            self._ledger.add(retries=1)
        if wait is not None:
            if wait > _LONGEST_WAIT:
                raise _GiveUp(f"{problem} (the server asks to wait {wait:.0f} s)")
            with self._lock:
                self._not_before = max(self._not_before, time.monotonic() + wait)
            return
        self._stop.wait(min(30.0, self.backoff * 2 ** (tries - 1)) * random.uniform(0.5, 1.0))

    def _body(self, request: Request) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [dict(message) for message in request.messages],
            self._max_tokens_field: request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
        }
        if request.seed is not None:
            body["seed"] = request.seed
        if request.logprobs is not None:
            body["logprobs"], body["top_logprobs"] = True, request.logprobs
        if request.extra:
            body["extra_body"] = dict(request.extra)
        return body

    def _other_max_tokens_field(self, error: Any, body: dict[str, Any]) -> bool:
        """Newer models know `max_tokens` only as `max_completion_tokens` and say so in a 400; True if the body was changed."""
        if error.status_code != 400 or "max_tokens" not in body or "max_completion_tokens" not in _message(error):
            return False
        self._max_tokens_field = "max_completion_tokens"
        body["max_completion_tokens"] = body.pop("max_tokens")
        return True

    def _reserve(self, request: Request) -> float:
        """Set aside what the request may cost at most. Waits while only unsettled requests are in the way; else gives up."""
        if self.max_cost is None:
            return 0.0
        need = self._cost(self._tokens_in(request), request.max_tokens) or 0.0
        with self._settled:
            while True:
                spent = self._spent() or 0.0
                if spent + need > self.max_cost:
                    raise _NotSent(MAX_COST_REACHED)
                if spent + self._reserved + need <= self.max_cost:
                    self._reserved += need
                    return need
                self._settled.wait()

    def _spent(self) -> float | None:
        return self._cost(self._ledger.totals["tokens_in"], self._ledger.totals["tokens_out"])

    def _cost(self, tokens_in: float, tokens_out: float) -> float | None:
        return None if self.price is None else (tokens_in * self.price[0] + tokens_out * self.price[1]) / 1e6

    def _tokens_in(self, request: Request) -> float:
        """Tokens of the prompt, from its bytes: by this run's own ratio once there is one, a little on the high side."""
        ratio, known = _BYTES_PER_TOKEN, self._ledger.totals
        if known["calls"] >= 5 and known["tokens_in"]:
            ratio = known["bytes_in"] / known["tokens_in"] / 1.1
        return _size(request) / ratio + 8


def _size(request: Request) -> int:
    return sum(len(str(message.get("content") or "").encode("utf-8", "replace")) for message in request.messages)


def _read_reply(completion: Any, model: str) -> Reply:
    choice = completion.choices[0]
    positions = tokens = None
    content = choice.logprobs.content if choice.logprobs is not None else None
    if content:
        rows = []
        for position in content:
            top = {item.token: item.logprob for item in position.top_logprobs or ()}
            top.setdefault(position.token, position.logprob)
            rows.append(tuple(sorted(top.items(), key=lambda item: -item[1])))
        positions, tokens = tuple(rows), tuple(position.token for position in content)
    usage = completion.usage
    counted = (usage.prompt_tokens, usage.completion_tokens) if usage is not None else None
    return Reply(choice.message.content or "", positions, choice.finish_reason, counted, model, tokens=tokens)


def _message(error: Any) -> str:
    body = getattr(error, "body", None)
    text = body.get("message") if isinstance(body, Mapping) else None
    return " ".join(str(text or getattr(error, "message", error)).split())[:300]


def _reason(error: BaseException) -> str:
    """The deepest cause's own words: "Connection refused" says more than "Connection error."."""
    words = str(error)
    while error.__cause__ is not None:
        error = error.__cause__
        words = str(error) or type(error).__name__
    return words
