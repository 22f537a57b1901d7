"""Answers from a server: a real one on loopback that runs a tiny model, and that misbehaves on demand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from pvsae.errors import UserError
from pvsae.llm import ChatClient
from pvsae.models.chatmodel import ChatModel
from pvsae.models.generate import Sampling
from pvsae.models.remote import PLAIN_SAMPLING, RemoteModel
from tests.fake_server import END, FakeServer, Faults, RunsModel

PROMPTS = [[{"role": "user", "content": f"Question {i}?"}] for i in range(6)]


class Says:
    """Always the same answer, token by token."""

    def __init__(self, *tokens: str) -> None:
        self.tokens = (*tokens, END)

    def following(self, messages: Sequence[Mapping[str, Any]], begun: str) -> dict[str, float]:
        said = ""
        for token in self.tokens:
            if said == begun:
                return {token: 1.0}
            said += token
        return {END: 1.0}


def client_of(server: FakeServer, **options: Any) -> ChatClient:
    return ChatClient(server.url, "fake", backoff=0.01, **options)


def test_a_row_repeats_in_any_order(tiny_models: Callable[[str], ChatModel]) -> None:
    """Sampled from a real model behind the server, whose answers depend on the seed that it is sent."""
    sampling = Sampling(max_new_tokens=4, temperature=1.0, seed=1)
    rows = [PROMPTS[0], PROMPTS[0], PROMPTS[1]]
    with FakeServer(RunsModel(tiny_models("qwen2"))) as server:
        first, second = RemoteModel(client_of(server)), RemoteModel(client_of(server))
        answers = first.generate(rows, sampling, row_keys=["a", "b", "c"])
        again = second.generate(rows[::-1], sampling, row_keys=["c", "b", "a"])
    assert again[::-1] == answers
    assert answers[0].text != answers[1].text
    assert all(a.text and a.ids == () for a in answers)


def test_every_row_has_a_seed_of_its_own() -> None:
    with FakeServer(Says("yes")) as server:
        remote = RemoteModel(client_of(server))
        sampling = Sampling(max_new_tokens=8, seed=3)
        answers = remote.generate([PROMPTS[0]] * 4, sampling)
        assert [(a.text, a.finish, a.error) for a in answers] == [("yes", "stop", None)] * 4
        sent = [e.body for e in server.log[1:]]  # the first asks what the server takes
        assert len({body["seed"] for body in sent}) == 4
        assert all(0 <= body["seed"] < 2**31 for body in sent)
        assert all(body["top_k"] == PLAIN_SAMPLING["top_k"] and body["repetition_penalty"] == 1.0 for body in sent)
        assert all(body["max_tokens"] == 8 and body["temperature"] == 1.0 for body in sent)
    mine = [r.seed for r in remote.requests([PROMPTS[0]] * 4, sampling, row_keys=[3, 2, 1, 0])]
    assert mine == [r.seed for r in remote.requests([PROMPTS[0]] * 4, sampling)][::-1]
    assert not set(mine) & {r.seed for r in remote.requests([PROMPTS[0]] * 4, Sampling(seed=4))}


def test_failed_rows_are_counted_and_not_lost() -> None:
    faults = Faults(broken=0.3, dropped=0.2, refuse=lambda prompt: "Question 2" in prompt or "Question 4" in prompt)
    with FakeServer(Says("yes"), faults=faults) as server:
        remote = RemoteModel(client_of(server))
        answers = remote.generate(PROMPTS, Sampling(max_new_tokens=8))
    assert [a.finish for a in answers] == ["stop", "stop", "failed", "stop", "failed", "stop"]
    assert remote.failed == 2
    for i in (2, 4):
        assert "content policy" in (answers[i].error or "")
        assert answers[i].text == ""


def test_thinking_is_taken_out() -> None:
    cases = {
        ("<think>", "hm", "</think>", "\n\n", "yes"): ("yes", "hm", "stop"),
        ("hm", "</think>", "\n\n", "yes"): ("yes", "hm", "stop"),
        ("<think>", *"a very long thought"): ("", "a very", "length"),
    }
    for tokens, expected in cases.items():
        with FakeServer(Says(*tokens)) as server:
            answer = RemoteModel(client_of(server)).generate(PROMPTS[:1], Sampling(max_new_tokens=7))[0]
        assert (answer.text, answer.thinking, answer.finish) == expected


def test_a_server_that_knows_no_other_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.fake_server import _Handler

    refusal = _Handler._refusal
    known = {"model", "messages", "max_tokens", "temperature", "top_p", "seed"}

    def strict(handler: Any, body: dict[str, Any]) -> tuple[int, dict[str, Any]] | None:
        foreign = sorted(set(body) - known)
        return (400, {"error": {"message": f"Unrecognized request argument: {foreign}"}}) if foreign else refusal(handler, body)

    monkeypatch.setattr(_Handler, "_refusal", strict)
    with FakeServer(Says("yes")) as server:
        remote = RemoteModel(client_of(server))
        assert [a.text for a in remote.generate(PROMPTS, Sampling(max_new_tokens=8))] == ["yes"] * 6
    assert remote.failed == 0
    assert "may apply its own" in remote.notes[0]


def test_what_cannot_be_done_remotely() -> None:
    with FakeServer(Says("yes")) as server:
        remote = RemoteModel(client_of(server))
        with pytest.raises(UserError, match="interventions"):
            remote.generate(PROMPTS, Sampling(), interventions=("anything",))
        with pytest.raises(UserError, match="row keys"):
            remote.generate(PROMPTS, Sampling(), row_keys=[1])
        url = server.url
    with pytest.raises(UserError, match="no answer"):
        RemoteModel(ChatClient(url, "fake", backoff=0.01)).generate(PROMPTS, Sampling())
