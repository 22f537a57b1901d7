"""The chat client against a real server that misbehaves."""

from __future__ import annotations

import asyncio
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime

import pytest

from pvsae.errors import UserError
from pvsae.ledger import Ledger
from pvsae.llm import MAX_COST_REACHED, ChatClient, Request, request_key, retry_after
from tests.fake_server import FakeServer, Faults, TellsNumbers


def ask(text: str, **changes) -> Request:
    return Request(({"role": "user", "content": text},), **{"max_tokens": 1, "logprobs": 20, **changes})


def client(server: FakeServer, **options) -> ChatClient:
    return ChatClient(server.url, "fake", **{"backoff": 0.02, "timeout": 1.0, **options})


@pytest.fixture
def server():
    with FakeServer(TellsNumbers()) as running:
        yield running


def test_replies_keep_the_order_and_the_evidence(server):
    with client(server, concurrency=8) as chat:
        replies = chat.complete([ask(f"Reply with exactly this number and nothing else: {n}") for n in range(60)])
    assert [reply.text for reply in replies] == [str(n) for n in range(60)]
    reply = replies[7]
    assert reply.error is None
    assert reply.finish == "length"
    assert reply.model == "fake"
    assert reply.tokens == ("7",)
    assert reply.usage is not None
    assert [token for token, _ in reply.logprobs[0]] == ["7", "I", "99"]
    assert reply.logprobs[0][0][1] == pytest.approx(-0.0304592, abs=1e-6)


def test_concurrency_is_bounded_and_used():
    with FakeServer(TellsNumbers(), latency=0.05) as server, client(server, concurrency=4, timeout=10) as chat:
        chat.complete([ask(str(n)) for n in range(24)])
    assert 2 <= server.most_at_once <= 4


@pytest.mark.parametrize("fault", ["too_many", "broken", "silent", "dropped", "garbled"])
def test_every_fault_is_survived(fault):
    faults = Faults(**{fault: 1.0}, most=2, silence=0.8)
    with FakeServer(TellsNumbers(), faults=faults) as server, client(server, timeout=0.4 if fault == "silent" else 5) as chat:
        replies = chat.complete([ask(str(n)) for n in range(6)])
        assert [reply.error for reply in replies] == [None] * 6
        assert chat.ledger["retries"] == 12
        assert chat.ledger["calls"] == 6
        assert len(server.sold) == 6


def test_an_item_that_never_works_fails_alone():
    class Stubborn(Faults):
        def draw(self, key, attempt):
            return "broken"

    refuse = Faults(refuse=lambda prompt: prompt == "3")
    with FakeServer(TellsNumbers(), faults=refuse) as server, client(server) as chat:
        replies = chat.complete([ask(str(n)) for n in range(6)])
        assert [i for i, reply in enumerate(replies) if reply.error] == [3]
        assert "content policy" in replies[3].error
        assert len(server.log) == 6, "a 400 is not tried again"
    with FakeServer(TellsNumbers(), faults=Stubborn()) as server, client(server, max_retries=2) as chat:
        reply = chat.complete([ask("x")])[0]
        assert reply.text is None
        assert reply.error == "HTTP 500: out of order (gave up after 3 tries)"
        assert len(server.log) == 3
        assert chat.ledger["failed"] == 1


def test_failures_are_not_cached_and_successes_are(tmp_path):
    faults = Faults(refuse=lambda prompt: prompt == "1")
    requests = [ask(str(n)) for n in range(3)]
    with FakeServer(TellsNumbers(), faults=faults) as server:
        with client(server, cache=tmp_path / "deep" / "replies.sqlite") as chat:
            first = chat.complete(requests)
        faults.refuse = None
        with client(server, cache=tmp_path / "deep" / "replies.sqlite") as chat:
            second = chat.complete(requests)
            assert chat.ledger["cached"] == 2
            assert chat.ledger["calls"] == 1
        assert first[1].error is not None
        assert [reply.cached for reply in second] == [True, False, True]
        assert (second[0].text, second[0].logprobs, second[0].usage) == (first[0].text, first[0].logprobs, first[0].usage)
        assert len(server.sold) == 3


def test_cache_answers_without_any_server(server, tmp_path):
    with client(server, cache=tmp_path / "c.sqlite") as chat:
        before = chat.complete([ask("7")])[0]
    elsewhere = ChatClient("http://127.0.0.1:9/v1", "fake", cache=tmp_path / "c.sqlite")
    after = elsewhere.complete([ask("7")])[0]
    assert after.text == before.text
    assert after.cached


def test_equal_requests_are_sent_once(server):
    with client(server) as chat:
        replies = chat.complete([ask("same")] * 5 + [ask("same", tag="sample 1")])
        again = chat.complete([ask("same")])
    assert len(server.log) == 2
    assert sum(reply.cached for reply in replies) == 4
    assert again[0].cached


def test_key_depends_on_content_only():
    base = ask("text {with} braces, ünïcode, \ud800")
    keys = {
        request_key("m", base),
        request_key("n", base),
        request_key("m", ask("other")),
        request_key("m", ask(base.messages[0]["content"], max_tokens=2)),
        request_key("m", ask(base.messages[0]["content"], temperature=1.0)),
        request_key("m", ask(base.messages[0]["content"], seed=1)),
        request_key("m", ask(base.messages[0]["content"], tag="1")),
        request_key("m", ask(base.messages[0]["content"], extra={"a": 1})),
    }
    assert len(keys) == 8
    turned = Request(({"content": base.messages[0]["content"], "role": "user"},), 1, logprobs=20)
    assert request_key("m", turned) == request_key("m", base), "the order of a message's fields is no content"


def test_text_that_cannot_be_sent_fails_alone(server):
    with client(server) as chat:
        replies = chat.complete([ask("\ud800"), ask("fine")])
    assert replies[0].error is not None
    assert replies[1].error is None


def test_retry_after_in_all_its_forms():
    now = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
    assert retry_after({"retry-after": "2.5"}) == 2.5
    assert retry_after({"retry-after-ms": "250"}) == 0.25
    assert retry_after({"retry-after": "Sun, 01 Mar 2026 12:00:07 GMT"}, now) == 7.0
    assert retry_after({"retry-after": "Sun, 01 Mar 2026 11:00:00 GMT"}, now) == 0.0
    assert retry_after({"retry-after": "soon"}) is None
    assert retry_after({}) is None


def test_retry_after_is_waited_for():
    class Once(Faults):
        def draw(self, key, attempt):
            return "too_many" if attempt == 0 else None

    with FakeServer(TellsNumbers(), faults=Once(retry_after=1.0)) as server, client(server) as chat:
        body = chat.complete([ask(str(n)) for n in range(12)])
        assert all(reply.error is None for reply in body)
        by_key: dict[str, list] = {}
        for entry in server.log:
            by_key.setdefault(entry.key, []).append(entry)
        seconds_given = [entries for key, entries in by_key.items() if int(key, 16) % 3 == 0]
        assert seconds_given, "none of the twelve was told to wait in seconds"
        assert all(entries[1].at - entries[0].at >= 1.0 for entries in seconds_given)


def test_a_wait_of_hours_fails_the_item():
    with (
        FakeServer(TellsNumbers(), faults=Faults(too_many=1.0, retry_after=7200)) as server,
        client(server, max_retries=1) as chat,
    ):
        started = time.monotonic()
        replies = chat.complete([ask(str(n)) for n in range(6)])
        assert time.monotonic() - started < 5
        assert any("asks to wait 7" in (reply.error or "") for reply in replies)


def test_max_cost_stops_sending_and_loses_nothing(tmp_path):
    price = (100.0, 1000.0)  # a request of 400 characters costs (104 * 100 + 1000) / 1e6 = 0.0114 dollars here
    requests = [ask(f"{n:03d}" + "x" * 397) for n in range(40)]
    with FakeServer(TellsNumbers()) as server:
        with client(server, cache=tmp_path / "c.sqlite", max_cost=0.15, price=price) as chat:
            replies = chat.complete(requests)
            ledger = chat.ledger
        paid = [reply for reply in replies if reply.error is None]
        assert {reply.error for reply in replies if reply.error} == {MAX_COST_REACHED}
        assert 0.15 - 2 * 0.0161 <= ledger["cost"] <= 0.15
        assert len(server.sold) == len(paid) == ledger["calls"]
        assert ledger["cost"] == pytest.approx(len(paid) * 0.0114)
        with client(server, cache=tmp_path / "c.sqlite") as chat:
            rest = chat.complete(requests)
        assert all(reply.error is None for reply in rest)
        assert len(server.sold) == 40


def test_the_ledger_and_the_limit_go_on_with_the_next_client(server, tmp_path):
    price, files = (100.0, 1000.0), {"cache": tmp_path / "c.sqlite", "ledger": tmp_path / "ledger.sqlite"}
    requests = [ask(f"{n:03d}" + "x" * 397) for n in range(40)]
    for _ in range(3):
        with client(server, **files, max_cost=0.15, price=price) as chat:
            replies = chat.complete(requests)
            ledger = chat.ledger
        assert ledger["calls"] == len(server.sold)
        assert 0.15 - 2 * 0.0161 <= ledger["cost"] <= 0.15
        assert ledger["failed"] == 0, "what was not sent did not fail"
        assert {reply.error for reply in replies if reply.error} == {MAX_COST_REACHED}
    before = ledger
    with client(server, **files, max_cost=1.0, price=price) as chat:
        chat.complete(requests)
        ledger = chat.ledger
    assert ledger["calls"] == len(server.sold) == 40
    assert ledger["cost"] == pytest.approx(40 * 0.0114)
    assert ledger["cached"] == before["cached"] + before["calls"]


def test_what_one_run_paid_costs_another_that_shares_its_cache_nothing(server, tmp_path):
    requests = [ask(str(n)) for n in range(5)]
    ledgers = []
    for name in ("one", "other"):
        with client(server, cache=tmp_path / "c.sqlite", ledger=tmp_path / name, price=(1.0, 1.0)) as chat:
            chat.complete(requests)
            ledgers.append(chat.ledger)
    assert [(found["calls"], found["cached"]) for found in ledgers] == [(5, 0), (0, 5)]
    assert ledgers[0]["cost"] > 0 == ledgers[1]["cost"]


def test_a_killed_client_has_counted_what_it_received(tmp_path):
    """What is under way when a process dies cannot be known to it; everything before that is in the file."""
    code = (
        "import sys\nfrom pvsae.llm import ChatClient, Request\n"
        "chat = ChatClient(sys.argv[1], 'fake', cache=sys.argv[2], ledger=sys.argv[3], concurrency=4)\n"
        "chat.complete([Request(({'role': 'user', 'content': str(n)},), 1) for n in range(1000)])"
    )
    paths = [str(tmp_path / name) for name in ("c.sqlite", "ledger.sqlite")]
    with FakeServer(TellsNumbers(), latency=0.02) as server:
        process = subprocess.Popen([sys.executable, "-c", code, server.url, *paths])
        while len(server.sold) < 20:
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
        process.wait()
        while not server.idle:
            time.sleep(0.01)
        sold = len(server.sold)
    with sqlite3.connect(paths[0]) as cache:
        kept = cache.execute("SELECT COUNT(*) FROM replies").fetchone()[0]
    assert 16 <= kept <= Ledger(tmp_path / "ledger.sqlite").totals["calls"] <= sold <= kept + 4


def test_estimate_sends_nothing(server, tmp_path):
    price = (1.0, 10.0)
    with client(server, cache=tmp_path / "c.sqlite", price=price) as chat:
        chat.complete([ask("a" * 300)])
        sent = len(server.log)
        guess = chat.estimate([ask("a" * 300), ask("b" * 300, max_tokens=50), ask("b" * 300, max_tokens=50)])
    assert len(server.log) == sent
    assert guess["calls"] == 1
    assert guess["cached"] == 2
    assert guess["tokens_out"] == 50
    assert 75 <= guess["tokens_in"] <= 130
    assert guess["cost"] == pytest.approx((guess["tokens_in"] * 1.0 + 500) / 1e6)


def test_ledger_counts_what_the_server_counted(server):
    with client(server, price=(1.0, 10.0)) as chat:
        replies = chat.complete([ask("word " * n) for n in range(1, 9)])
        ledger = chat.ledger
    assert ledger["tokens_in"] == sum(reply.usage[0] for reply in replies)
    assert ledger["tokens_out"] == 8
    assert ledger["cost"] == pytest.approx((ledger["tokens_in"] + 80) / 1e6)
    with client(server) as chat:
        assert chat.ledger["cost"] is None


def test_unreachable_server_is_told_within_seconds():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = time.monotonic()
    with ChatClient(f"http://127.0.0.1:{port}/v1", "fake") as chat, pytest.raises(UserError, match="refused"):
        chat.complete([ask("x")])
    assert time.monotonic() - started < 8


def test_a_server_that_goes_away_does_not_cost_hours():
    with FakeServer(TellsNumbers()) as server:
        chat = client(server, max_retries=1, concurrency=2)
        assert chat.complete([ask("x")])[0].error is None
    replies = chat.complete([ask(str(n)) for n in range(200)])
    assert all(reply.error for reply in replies)
    assert chat.ledger["retries"] < 10
    assert "any more" in replies[-1].error


def test_bad_settings_are_told_at_once(server, tmp_path):
    with pytest.raises(UserError, match="no URL"):
        ChatClient("localhost:8000/v1", "m")
    with pytest.raises(UserError, match="without prices"):
        ChatClient(server.url, "m", max_cost=1.0)
    with pytest.raises(UserError, match="concurrency"):
        ChatClient(server.url, "m", concurrency=0)
    text = tmp_path / "notes.txt"
    text.write_text("this is no database, and it is longer than a header would be" * 30)
    with pytest.raises(UserError, match="cache of replies"):
        ChatClient(server.url, "m", cache=text)
    with pytest.raises(UserError, match="ledger"):
        ChatClient(server.url, "m", ledger=text)
    with FakeServer(TellsNumbers(), api_key="right") as locked, pytest.raises(UserError, match="refuses the API key"):
        ChatClient(locked.url, "fake", api_key="wrong").complete([ask("x")])


def test_newer_name_of_max_tokens():
    with FakeServer(TellsNumbers(), new_names=True) as server, client(server, concurrency=1) as chat:
        replies = chat.complete([ask(str(n)) for n in range(3)])
        assert all(reply.error is None for reply in replies)
        assert server.outcomes() == {"refused 400": 1, "sold": 3}


def test_redirects_are_not_followed():
    """Nothing is sent anywhere but to base_url, whatever that server says."""
    with FakeServer(TellsNumbers()) as other:

        def serve(listener: socket.socket) -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(65536)
                    head = f"HTTP/1.1 307 Temporary Redirect\r\nLocation: {other.url}/chat/completions\r\n"
                    connection.sendall((head + "Content-Length: 0\r\nConnection: close\r\n\r\n").encode())

        with socket.create_server(("127.0.0.1", 0)) as listener:
            threading.Thread(target=serve, args=(listener,), daemon=True).start()
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
            with ChatClient(url, "fake", backoff=0.01, max_retries=1) as chat:
                reply = chat.complete([ask("x")])[0]
        assert reply.error is not None
        assert other.log == []


def test_inside_a_running_event_loop(server):
    async def notebook_cell():
        with client(server) as chat:
            return chat.complete([ask(str(n)) for n in range(5)])

    assert all(reply.error is None for reply in asyncio.run(notebook_cell()))


def test_replies_are_on_disk_before_the_call_returns(tmp_path):
    """Rows appear while the call is still under way, readable by another process."""
    path = tmp_path / "c.sqlite"
    with FakeServer(TellsNumbers(), latency=0.1) as server, client(server, cache=path, concurrency=2, timeout=10) as chat:
        worker = threading.Thread(target=chat.complete, args=([ask(str(n)) for n in range(12)],))
        worker.start()
        counts = set()
        while worker.is_alive():
            with sqlite3.connect(path) as other:
                counts.add(other.execute("SELECT COUNT(*) FROM replies").fetchone()[0])
            time.sleep(0.02)
        worker.join()
    assert any(0 < count < 12 for count in counts)


def test_import_is_light():
    code = "import sys, pvsae.llm, pvsae.judges.base; print([m for m in ('torch', 'openai', 'pandas') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
