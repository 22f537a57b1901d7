"""A small OpenAI-compatible server on loopback, with faults on order. A real server: sockets, threads, HTTP/1.1.

Knows: `/v1/models` and `/v1/chat/completions` (max_tokens, temperature, logprobs, continued answers), how to misbehave, and what
it sold: every request is logged with its outcome, so that a test can tell what was paid for and when.
Does not know: what it is asked, or who asks. What it answers is up to a `Brain`.

Brains: `TellsNumbers` has a fixed distribution over answers for every prompt, in whole-number or digit tokens; `RunsModel` is
a real model behind its own chat template.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import random
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol

END = "<|end|>"


def seeded(*parts: object) -> random.Random:
    """A generator that depends on the parts only."""
    return random.Random(hashlib.sha256("\0".join(map(str, parts)).encode()).digest())


def last_user(messages: Sequence[Mapping[str, Any]]) -> str:
    return next(message["content"] for message in reversed(messages) if message["role"] == "user")


class Brain(Protocol):
    def following(self, messages: Sequence[Mapping[str, Any]], begun: str) -> dict[str, float]:
        """Probability of each token after what the answer says so far; END ends it."""
        ...


class TellsNumbers:
    """Answers with numbers (or REFUSAL, or words) whose probabilities depend on the prompt's text alone.

    Args:
        split: digits are tokens of their own, as with Qwen, Gemma and Mixtral; else every number is one token.
        answers: prompt -> {answer: probability}; None makes some up from the prompt's hash.
    """

    def __init__(self, split: bool = False, answers: Callable[[str], dict[str, float]] | None = None) -> None:
        self.split, self._answers = split, answers

    def answers(self, prompt: str) -> dict[str, float]:
        if prompt.startswith("Reply with exactly this number and nothing else: "):
            number = prompt.rsplit(" ", 1)[1]
            return {number: 0.97, "I": 0.02, "99": 0.01}
        if self._answers is not None:
            return self._answers(prompt)
        generator = seeded("answers", prompt)
        if generator.random() < 0.05:
            return {"REFUSAL": 0.95, "0": 0.05}
        centre, spread = generator.uniform(0, 100), generator.uniform(1, 12)
        weights = {str(n): math.exp(-0.5 * ((n - centre) / spread) ** 2) for n in range(101)}
        total = sum(weights.values()) / 0.98
        return {number: weight / total for number, weight in weights.items()} | {"Hm": 0.02}

    def tokens(self, answer: str) -> tuple[str, ...]:
        if answer.isdigit():
            return (*answer, END) if self.split else (answer, END)
        return (answer[:3], answer[3:], END) if len(answer) > 3 else (answer, END)

    def following(self, messages: Sequence[Mapping[str, Any]], begun: str) -> dict[str, float]:
        found: dict[str, float] = {}
        for answer, p in self.answers(last_user(messages)).items():
            said = ""
            for token in self.tokens(answer):
                if said == begun:
                    found[token] = found.get(token, 0.0) + p
                    break
                said += token
        total = sum(found.values())
        return {token: p / total for token, p in found.items()} if total else {END: 1.0}


class RunsModel:
    """A loaded ChatModel; what it says is what it is."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._lock = threading.Lock()  # torch on two cores: one at a time

    def following(self, messages: Sequence[Mapping[str, Any]], begun: str) -> dict[str, float]:
        from dataclasses import replace

        tokenizer = self.model.tokenizer
        prompt = self.model.chat.prompt(list(messages))
        ids = prompt.ids + tuple(tokenizer(begun, add_special_tokens=False).input_ids if begun else ())
        prompt = replace(prompt, ids=ids, n_prompt=len(ids), answer=(len(ids), len(ids)))
        with self._lock:
            logprobs = self.model.next_token_logprobs([prompt])[0]
        found: dict[str, float] = {}
        for token, value in enumerate(logprobs.exp().tolist()):
            text = END if token in (tokenizer.eos_token_id, tokenizer.pad_token_id) else tokenizer.decode([token])
            found[text] = found.get(text, 0.0) + value
        return found


@dataclass
class Faults:
    """How often a try goes wrong, as probabilities; which tries do is fixed by `seed`, the request and the number of the try.

    Attributes:
        too_many: 429 with Retry-After in seconds, as an HTTP date, or without it, in turns.
        broken: 500.
        silent: no answer until the client has long given up.
        dropped: connection closed, before or in the middle of the answer.
        garbled: 200 with a body that is no JSON.
        no_logprobs: `logprobs: null` although asked for (an answer that is sold like any other).
        refuse: prompts that always get a 400.
        most: faults an item, at most; keeps an item from failing for good.
    """

    too_many: float = 0.0
    broken: float = 0.0
    silent: float = 0.0
    dropped: float = 0.0
    garbled: float = 0.0
    no_logprobs: float = 0.0
    refuse: Callable[[str], bool] | None = None
    most: int = 3
    retry_after: float = 0.2
    silence: float = 3.0
    seed: int = 0

    def draw(self, key: str, attempt: int) -> str | None:
        if attempt >= self.most:
            return None
        at = seeded(self.seed, key, attempt).random()
        for name in ("too_many", "broken", "silent", "dropped", "garbled"):
            at -= getattr(self, name)
            if at < 0:
                return name
        return None


@dataclass
class Entry:
    """One request as the server saw it. `sold`: a whole answer was written to a client that was still there."""

    number: int
    key: str
    body: dict[str, Any]
    outcome: str = "under way"
    at: float = field(default_factory=time.monotonic)

    @property
    def sold(self) -> bool:
        return self.outcome == "sold"


class FakeServer:
    """Context manager. `.url` is the base_url; `.log` is every chat request so far, in order of arrival.

    Args:
        latency: seconds each answer takes.
        api_key: refuse any other; None takes all.
        continues: ways of continuing a begun answer that the server understands ("continue_final_message", "prefix",
            "last message"). One that it does not understand starts a new answer, as real servers do.
        logprobs: "yes", "null" (field is there and empty), "refused" (400).
        most_logprobs: 400 for a larger top_logprobs.
        new_names: 400 for `max_tokens`; wants `max_completion_tokens`.
    """

    def __init__(
        self,
        brain: Brain,
        *,
        faults: Faults | None = None,
        latency: float = 0.0,
        model: str = "fake",
        api_key: str | None = None,
        continues: Sequence[str] = ("continue_final_message",),
        logprobs: str = "yes",
        most_logprobs: int = 20,
        new_names: bool = False,
    ) -> None:
        self.brain, self.faults, self.latency, self.model = brain, faults or Faults(), latency, model
        self.api_key, self.continues, self.logprobs = api_key, tuple(continues), logprobs
        self.most_logprobs, self.new_names = most_logprobs, new_names
        self.log: list[Entry] = []
        self.lock = threading.Lock()
        self.most_at_once = self._at_once = 0
        self.closing = threading.Event()
        self.connections: set[socket.socket] = set()
        server = self

        class Handler(_Handler):
            owner = server

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request: Any, client_address: Any) -> None:
                """A client that went away is no news."""

        self._http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def __enter__(self) -> FakeServer:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()
        for connection in list(self.connections):  # a server that is gone leaves no connection open
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def enter(self, body: dict[str, Any]) -> tuple[Entry, int]:
        """Log a request; returns its entry and how many equal ones went wrong before."""
        key = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        with self.lock:
            entry = Entry(len(self.log), key, body)
            attempt = sum(1 for earlier in self.log if earlier.key == key and earlier.outcome not in ("sold", "client gone"))
            self.log.append(entry)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            return entry, attempt

    def leave(self) -> None:
        with self.lock:
            self._at_once -= 1

    @property
    def idle(self) -> bool:
        with self.lock:
            return self._at_once == 0

    @property
    def sold(self) -> list[Entry]:
        with self.lock:
            return [entry for entry in self.log if entry.sold]

    def outcomes(self) -> dict[str, int]:
        with self.lock:
            names = [entry.outcome for entry in self.log]
        return {name: names.count(name) for name in sorted(set(names))}

    def begun(self, messages: Sequence[Mapping[str, Any]], body: Mapping[str, Any]) -> str:
        """The beginning of the answer that this request wants continued, if this server knows its way of asking."""
        last = messages[-1]
        if last["role"] != "assistant":
            return ""
        asked = (
            "continue_final_message" if body.get("continue_final_message") else "prefix" if last.get("prefix") else "last message"
        )
        return last["content"] if asked in self.continues else ""

    def answer(self, body: Mapping[str, Any], null: bool) -> dict[str, Any]:
        """The chat completion: greedy at temperature 0, else sampled with the request's seed."""
        messages = body["messages"]
        begun = self.begun(messages, body)
        if begun:
            messages = messages[:-1]
        limit = body.get("max_completion_tokens") or body["max_tokens"]
        generator = seeded(body.get("seed"), json.dumps(messages))
        text, content, finish = "", [], "length"
        for _ in range(limit):
            following = self.brain.following(messages, begun + text)
            if body.get("temperature", 1.0) == 0:
                token = max(following, key=lambda name: following[name])
            else:
                token = generator.choices(list(following), list(following.values()))[0]
            ranked = sorted(following.items(), key=lambda item: -item[1])[: body.get("top_logprobs", 0)]
            top = [{"token": name, "logprob": math.log(max(p, 1e-30)), "bytes": list(name.encode())} for name, p in ranked]
            content.append({"token": token, "logprob": math.log(following[token]), "bytes": None, "top_logprobs": top})
            if token == END:
                finish = "stop"
                break
            text += token
        size = sum(len(message["content"]) for message in messages)
        tokens_in, tokens_out = size // 4 + 4, len(content)
        return {
            "id": "chatcmpl-0",
            "object": "chat.completion",
            "created": 0,
            "model": self.model,
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": text},
                    "finish_reason": finish,
                    "logprobs": {"content": content} if body.get("logprobs") and not null else None,
                }
            ],
            "usage": {"prompt_tokens": tokens_in, "completion_tokens": tokens_out, "total_tokens": tokens_in + tokens_out},
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body go out in two writes; do not wait for an acknowledgement between
    owner: FakeServer

    def setup(self) -> None:
        super().setup()
        self.owner.connections.add(self.connection)

    def finish(self) -> None:
        self.owner.connections.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""

    def do_GET(self) -> None:
        if not self._key_fits():
            return
        if self.path == "/v1/models":
            self._send(
                200, {"object": "list", "data": [{"id": self.owner.model, "object": "model", "created": 0, "owned_by": "test"}]}
            )
        else:
            self._send(404, {"error": {"message": "no such page"}})

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        if not self._key_fits():
            return
        body = json.loads(raw)
        if self.path != "/v1/chat/completions":
            self._send(404, {"error": {"message": "no such page"}})
            return
        entry, attempt = self.owner.enter(body)
        try:
            entry.outcome = self._serve(body, entry.key, attempt)
        except OSError:
            entry.outcome = "client gone"
            self.close_connection = True
        finally:
            self.owner.leave()

    def _serve(self, body: dict[str, Any], key: str, attempt: int) -> str:
        owner, faults = self.owner, self.owner.faults
        if problem := self._refusal(body):
            self._send(*problem)
            return f"refused {problem[0]}"
        fault = faults.draw(key, attempt)
        if fault == "too_many":
            soon = faults.retry_after
            after = [{"Retry-After": f"{soon:g}"}, {"Retry-After": formatdate(time.time() + soon, usegmt=True)}, {}][
                int(key, 16) % 3
            ]
            self._send(429, {"error": {"message": "slow down", "type": "rate_limit"}}, after)
        elif fault == "broken":
            self._send(500, {"error": {"message": "out of order"}})
        elif fault == "silent":
            owner.closing.wait(faults.silence)
            self._hang_up()
        elif fault == "dropped":
            if int(key, 16) % 2:  # half of an answer
                half = json.dumps(owner.answer(body, null=False)).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(half)))
                self.end_headers()
                self.wfile.write(half[: len(half) // 2])
                self.wfile.flush()
            self._hang_up()
        elif fault == "garbled":
            self._send(200, b"<html>gateway</html>")
        else:
            null = owner.logprobs == "null" or seeded("null", faults.seed, key).random() < faults.no_logprobs
            answer = owner.answer(body, null)
            owner.closing.wait(owner.latency)
            if self._client_gone():
                self.close_connection = True
                return "client gone"
            self._send(200, answer)
            return "sold"
        return fault

    def _refusal(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]] | None:
        def error(status: int, message: str) -> tuple[int, dict[str, Any]]:
            return status, {"error": {"message": message, "type": "invalid_request_error", "code": None}}

        owner = self.owner
        if body["model"] != owner.model:
            return error(404, f"model {body['model']} does not exist")
        if owner.new_names and "max_tokens" in body:
            return error(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
        if body.get("logprobs") and (owner.logprobs == "refused" or body.get("top_logprobs", 0) > owner.most_logprobs):
            return error(400, "logprobs not supported")
        if owner.faults.refuse is not None and owner.faults.refuse(last_user(body["messages"])):
            return error(400, "content policy")
        return None

    def _key_fits(self) -> bool:
        if self.owner.api_key is not None and self.headers.get("Authorization") != f"Bearer {self.owner.api_key}":
            self._send(401, {"error": {"message": "wrong key"}})
            return False
        return True

    def _client_gone(self) -> bool:
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and self.connection.recv(1, socket.MSG_PEEK) == b""

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _send(self, status: int, content: dict[str, Any] | bytes, headers: Mapping[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()
