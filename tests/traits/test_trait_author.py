"""Authoring against a real OpenAI-compatible server on loopback, which answers well, badly, or not at all as each test says."""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pvsae.errors import UserError
from pvsae.llm import ChatClient
from pvsae.traits import Counts, TraitSpec, check, list_traits, load_trait, save_trait
from pvsae.traits.author import author

SPEC = TraitSpec("stingy", "Hates to give anything away: grudges help, money and praise.")
LIBRARY = [load_trait(name) for name in list_traits()]
QUESTIONS = [question for trait in LIBRARY for question in (*trait.extract_questions, *trait.eval_questions)]
PAIRS = [{"pos": pair.pos, "neg": pair.neg} for trait in LIBRARY for pair in trait.pairs]
PROMPT = LIBRARY[0].eval_prompt


@dataclass(frozen=True)
class Ask:
    """One request as the server saw it: the part it is about, how many texts it asks for, how often the part was asked for."""

    key: str
    n: int
    turn: int
    text: str


@dataclass
class Writer:
    """The scripted model. `answer` gives the reply to an Ask; an int is an HTTP error, (text, finish) a reply cut off."""

    answer: Callable[[Ask], str | int | tuple[str, str]]
    asks: list[Ask] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    url: str = ""

    def reply(self, body: dict) -> tuple[int, dict]:
        text = body["messages"][-1]["content"]
        key = re.findall(r'\{"(instruction|questions|eval_prompt)"', text)[-1]
        wanted = re.search(r"Write (\d+) ", text)
        with self.lock:
            turn = sum(ask.key == key for ask in self.asks)
            ask = Ask(key, int(wanted.group(1)) if wanted else 1, turn, text)
            self.asks.append(ask)
        answer = self.answer(ask)
        if isinstance(answer, int):
            return answer, {"error": {"message": "scripted failure", "code": "scripted"}}
        content, finish = answer if isinstance(answer, tuple) else (answer, "stop")
        choice = {"index": 0, "finish_reason": finish, "logprobs": None, "message": {"role": "assistant", "content": content}}
        usage = {"prompt_tokens": 10, "completion_tokens": 10, "total_tokens": 20}
        return 200, {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}

    def count(self, key: str) -> int:
        return sum(ask.key == key for ask in self.asks)


def well(ask: Ask, start: int = 0) -> str:
    """A flawless reply, with texts from `start` on."""
    if ask.key == "eval_prompt":
        return json.dumps({"eval_prompt": PROMPT})
    return json.dumps({ask.key: (QUESTIONS if ask.key == "questions" else PAIRS)[start : start + ask.n]})


def _cached(path) -> list[tuple[str]]:
    """Keys of the replies in a cache that another process is writing."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        return db.execute("SELECT key FROM replies").fetchall()


@pytest.fixture
def serve():
    servers = []

    def start(answer) -> Writer:
        writer = Writer(answer)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args) -> None:
                pass

            def send(self, status: int, data: dict) -> None:
                body = json.dumps(data).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self) -> None:
                self.send(200, {"object": "list", "data": [{"id": "m", "object": "model"}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.send(*writer.reply(body))

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
        writer.url = f"http://127.0.0.1:{server.server_port}/v1"
        return writer

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def connect(tmp_path):
    clients = []

    def make(writer: Writer, **options) -> ChatClient:
        settings = {"cache": tmp_path / "replies.sqlite", "backoff": 0.01, "max_retries": 2, **options}
        clients.append(ChatClient(writer.url, "m", api_key="none", **settings))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


def test_a_good_model_is_asked_once_a_part(serve, connect, tmp_path):
    writer = serve(well)
    trait = author(SPEC, connect(writer), tmp_path / "lib")
    assert [writer.count(key) for key in ("instruction", "questions", "eval_prompt")] == [1, 1, 1]
    assert check(trait) == []
    assert load_trait("stingy", tmp_path / "lib") == trait
    assert trait.description == SPEC.description
    assert (trait.extract_questions, trait.eval_questions) == (tuple(QUESTIONS[0:40:2]), tuple(QUESTIONS[1:40:2]))
    assert not list((tmp_path / "lib").glob("*.partial.json"))
    for ask in writer.asks:
        assert SPEC.description in ask.text
        assert "a stingy assistant" in ask.text
        assert "accepted already" not in ask.text


def test_messy_replies_are_read(serve, connect):
    def messily(ask: Ask) -> str:
        good = well(ask)
        if ask.key == "questions":
            return "Here you are:\n```json\n" + good.replace("]}", ",]}") + "\n```\nHope this helps {you}!"
        if ask.key == "instruction":
            return good.replace('"pos": "', "“pos”: “").replace('", "neg": "', "”, “neg”: “").replace('"}', "”}")
        return "<think>{}</think>" + good.replace("\\n", "\n")

    writer = serve(messily)
    trait = author(SPEC, connect(writer))
    assert len(writer.asks) == 3
    assert trait.eval_prompt == PROMPT
    assert [pair.pos for pair in trait.pairs] == [pair["pos"] for pair in PAIRS[:5]]
    assert trait.questions("eval") == tuple(QUESTIONS[1:40:2])


def test_only_what_fails_is_asked_for_again_with_its_faults(serve, connect):
    def answer(ask: Ask) -> str:
        if ask.key == "eval_prompt" and ask.turn == 0:
            return json.dumps({"eval_prompt": "How stingy is this: {question}? Say 0 to 100."})
        return well(ask)

    writer = serve(answer)
    trait = author(SPEC, connect(writer))
    assert [ask.key for ask in writer.asks[3:]] == ["eval_prompt"]
    assert "lacks the slot {answer}" in writer.asks[3].text
    assert "when to answer REFUSAL" in writer.asks[3].text
    assert trait.eval_prompt == PROMPT


def test_repeated_questions_are_replaced_and_the_good_ones_kept(serve, connect):
    def answer(ask: Ask) -> str:
        if ask.key != "questions":
            return well(ask)
        if ask.turn == 0:
            first = QUESTIONS[:34]
            return json.dumps(
                {"questions": [*first, first[3].upper(), f"And {first[5]}", "", "...", 7, {"question": QUESTIONS[40]}]}
            )
        if ask.turn == 1:
            return json.dumps({"questions": [QUESTIONS[0], *QUESTIONS[50:53]]})  # one that was accepted before, three new ones
        return well(ask, 60)

    writer = serve(answer)
    trait = author(SPEC, connect(writer))
    asks = [ask for ask in writer.asks if ask.key == "questions"]
    assert [ask.n for ask in asks] == [40, 5, 2]
    assert all(f"- {question}" in asks[1].text for question in (*QUESTIONS[:34], QUESTIONS[40]))
    assert asks[1].text.count("says the same as an earlier one") == 2
    assert "questions[38] was not a text" in asks[1].text
    assert f'"{QUESTIONS[0]}" says the same as an earlier one' in asks[2].text
    assert set(trait.extract_questions + trait.eval_questions) == {
        *QUESTIONS[:34],
        QUESTIONS[40],
        *QUESTIONS[50:53],
        *QUESTIONS[60:62],
    }
    assert writer.count("instruction") == writer.count("eval_prompt") == 1


def test_pairs_that_are_none_are_replaced(serve, connect):
    def answer(ask: Ask) -> str:
        if ask.key != "instruction" or ask.turn:
            return well(ask, 10 * ask.turn)
        same = {"pos": "Give nothing away, ever.", "neg": "Give nothing away – ever!"}
        turned = {"pos": PAIRS[0]["neg"], "neg": PAIRS[0]["pos"]}
        return json.dumps({"instruction": [PAIRS[0], same, turned, {"pos": "Only this one side."}, PAIRS[1]]})

    writer = serve(answer)
    trait = author(SPEC, connect(writer))
    again = [ask for ask in writer.asks if ask.key == "instruction"][1]
    assert again.n == 3
    for fault in ("pos and neg are the same", "the other way round", "did not have the two texts"):
        assert fault in again.text
    assert [pair.pos for pair in trait.pairs] == [PAIRS[i]["pos"] for i in (0, 1, 10, 11, 12)]


def test_too_many_texts_are_no_fault(serve, connect):
    writer = serve(lambda ask: well(replace(ask, n=ask.n + 7)))
    trait = author(SPEC, connect(writer))
    assert len(writer.asks) == 3
    assert check(trait) == []


def test_a_reply_that_was_cut_off_is_used_as_far_as_it_goes(serve, connect):
    def answer(ask: Ask):
        if ask.key == "questions" and ask.turn == 0:
            text = well(ask)
            return text[: text.index(QUESTIONS[30]) + 4], "length"
        return well(ask, 40 if ask.turn else 0)

    writer = serve(answer)
    author(SPEC, connect(writer))
    again = writer.asks[-1]
    assert (again.key, again.n) == ("questions", 10)
    assert "was cut off" in again.text


def test_a_model_that_refuses_is_reported_and_the_rest_is_saved(serve, connect, tmp_path):
    def answer(ask: Ask) -> str:
        return "I'm sorry, but I can't write that." if ask.key == "instruction" else well(ask)

    writer = serve(answer)
    with pytest.raises(UserError) as error:
        author(SPEC, connect(writer), tmp_path / "lib", rounds=3)
    assert "in 3 rounds" in error.value.what
    assert "instruction: 5 pairs" in error.value.what
    assert "I'm sorry, but I can't" in error.value.what
    assert writer.count("instruction") == 3  # a new request each round, not the cached refusal
    assert writer.count("questions") == 1
    partial = tmp_path / "lib" / "stingy.partial.json"
    assert str(partial) in error.value.fix
    saved = json.loads(partial.read_text(encoding="utf-8"))
    assert saved["missing"] == {"instruction": 5}
    assert saved["questions"] == QUESTIONS[:40]
    assert list_traits(tmp_path / "lib") == ()

    writer.answer = well  # another run, with the same cache, goes on where the first gave up
    trait = author(SPEC, connect(writer), tmp_path / "lib", rounds=1)
    assert [ask.key for ask in writer.asks[5:]] == ["instruction"]
    assert trait == load_trait("stingy", tmp_path / "lib")
    assert not partial.exists()


def test_a_killed_run_goes_on_without_asking_twice(serve, connect, tmp_path):
    hold = threading.Event()

    def answer(ask: Ask) -> str:
        if ask.key == "eval_prompt" and not hold.is_set():
            hold.wait(60)  # the first run is killed while it waits for this
        return well(ask)

    writer = serve(answer)
    code = (
        "import sys\nfrom pvsae.llm import ChatClient\nfrom pvsae.traits import TraitSpec\n"
        "from pvsae.traits.author import author\n"
        "url, cache, folder, name, text = sys.argv[1:]\n"
        "author(TraitSpec(name, text), ChatClient(url, 'm', api_key='none', cache=cache), folder)"
    )
    cache, folder = tmp_path / "replies.sqlite", tmp_path / "lib"
    process = subprocess.Popen([sys.executable, "-c", code, writer.url, str(cache), str(folder), SPEC.name, SPEC.description])
    try:
        client = connect(writer)
        deadline = time.monotonic() + 60
        while len(_cached(cache)) < 2:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    hold.set()
    trait = author(SPEC, client, folder)
    assert check(trait) == []
    assert writer.count("instruction") == writer.count("questions") == 1
    assert writer.count("eval_prompt") == 2  # the one under way when it was killed, and its repetition
    assert client.ledger["cached"] == 2


def test_a_failing_request_is_tried_again_in_the_next_round(serve, connect):
    writer = serve(lambda ask: 400 if ask.key == "questions" and ask.turn == 0 else well(ask))
    assert check(author(SPEC, connect(writer))) == []
    assert writer.count("questions") == 2


def test_a_server_that_only_fails_ends_the_rounds(serve, connect, tmp_path):
    writer = serve(lambda ask: 400)
    with pytest.raises(UserError, match="scripted failure"):
        author(SPEC, connect(writer), tmp_path / "lib", rounds=50)
    assert len(writer.asks) == 3


def test_what_is_there_is_kept(serve, connect, tmp_path):
    writer = serve(well)
    client = connect(writer)
    trait = author(SPEC, client, tmp_path)
    edited = replace(trait, extract_questions=("Would you lend me your pencil?", *trait.extract_questions[1:]))
    save_trait(edited, tmp_path)
    assert author(SPEC, client, tmp_path) == edited
    assert len(writer.asks) == 3
    other = replace(SPEC, description="Something else.")
    with pytest.raises(UserError, match="another description"):
        author(other, client, tmp_path)
    assert len(writer.asks) == 3
    assert author(other, client, tmp_path, overwrite=True).description == "Something else."
    assert load_trait("stingy", tmp_path).description == "Something else."


def test_nothing_is_asked_where_nothing_can_be_saved(serve, connect, tmp_path):
    writer = serve(well)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        author(SPEC, connect(writer), tmp_path / "file" / "lib")
    assert writer.asks == []


def test_an_unreachable_server_is_one_clear_error(tmp_path):
    with ChatClient("http://127.0.0.1:9/v1", "m", api_key="none") as client, pytest.raises(UserError, match="no answer from"):
        author(SPEC, client, tmp_path)


def test_partial_results_of_others_do_not_count(serve, connect, tmp_path):
    partial = tmp_path / "stingy.partial.json"
    writer = serve(well)
    partial.write_text("{}")
    with pytest.raises(UserError, match="is no partial result"):
        author(SPEC, connect(writer), tmp_path)
    old = {"name": "stingy", "description": "Another meaning.", "rounds": 1, "faults": {}, "missing": {}}
    partial.write_text(json.dumps({**old, "instruction": PAIRS[20:25], "questions": [], "eval_prompt": ""}))
    trait = author(SPEC, connect(writer), tmp_path)
    assert trait.pairs[0].pos == PAIRS[0]["pos"]


def test_edited_partial_results_are_checked_like_replies(serve, connect, tmp_path):
    state = {"name": SPEC.name, "description": SPEC.description, "rounds": 2, "faults": {}, "missing": {}}
    broken = {"instruction": [*PAIRS[:2], {"pos": "x"}], "questions": [QUESTIONS[80]] * 3, "eval_prompt": "no slots"}
    (tmp_path / "stingy.partial.json").write_text(json.dumps({**state, **broken}))
    writer = serve(lambda ask: well(ask, 5))
    trait = author(SPEC, connect(writer), tmp_path)
    assert {ask.key: ask.n for ask in writer.asks} == {"instruction": 3, "questions": 39, "eval_prompt": 1}
    assert trait.extract_questions[0] == QUESTIONS[80]


@pytest.mark.parametrize("counts", [Counts(2, 4, 4), Counts(1, 3, 1), Counts(3, 1, 4)])
def test_other_counts(serve, connect, counts):
    trait = author(SPEC, connect(serve(well)), counts=counts)
    assert (len(trait.pairs), len(trait.extract_questions), len(trait.eval_questions)) == (
        counts.pairs,
        counts.extract,
        counts.eval,
    )
    assert check(trait, counts) == []
