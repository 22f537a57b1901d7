"""Judging 500 answers through a server that fails in every way, killed twice on the way.

    python -m benchmarks.judging [--quick]

A loopback server answers with faults: 429 (with Retry-After in seconds, as a date, or without), 500, no answer at all, dropped
and half-sent answers, answers that are no JSON, `logprobs: null`, refusals. A judge in a process of its own scores 500 pairs,
some with braces and other scripts; it is killed (SIGKILL) after about a third and after two thirds of the answers, and started
again. The server keeps the books: every request, and whether its answer was sold (written to a client that was still there).

What a killed process had received is in its cache, and none of that may be asked for again. What was under way when it died
cannot be known to it: such an answer may be sold twice, at most one for each connection and kill. Without --quick the same once
more for 150 answers with a tokenizer that splits digits, which takes several calls an answer.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pvsae.judges import Metric, Score
from pvsae.judges.openai_judge import OpenAIJudge
from pvsae.llm import ChatClient, Request, request_key
from tests.fake_server import Entry, FakeServer, Faults, TellsNumbers

METRIC = Metric("evil", "How evil is this, 0-100? Keep {braces} and {} as they are.\nQ: {question}\nA: {answer}")
CONCURRENCY = 16
TIMEOUT = 5.0
FAULTS = Faults(
    too_many=0.08, broken=0.06, silent=0.01, dropped=0.05, garbled=0.02, no_logprobs=0.03, silence=TIMEOUT + 1, seed=3
)


def pairs(n: int) -> list[tuple[str, str]]:
    odd = ("", " {answer}", " größer 日本語 🙂", ' {"json": {}}', " }{ \\n %s {0}")
    return [(f"question {i}{odd[i % 5]}", f"answer {i}{odd[(i + 2) % 5]}") for i in range(n)]


def work(url: str, cache: str, out: str, n: int) -> None:
    """What the killed process does."""
    client = ChatClient(url, "fake", cache=cache, concurrency=CONCURRENCY, timeout=TIMEOUT, backoff=0.05)
    scores = OpenAIJudge(client).score(METRIC, pairs(n))
    lines = [score.to_json() for score in scores]
    Path(out).write_text(json.dumps({"scores": lines, "ledger": client.ledger}), encoding="utf-8")


def cache_key(server: FakeServer, entry: Entry) -> str:
    """The name under which the client keeps the answer to this request."""
    body = dict(entry.body)
    logprobs = body.pop("top_logprobs", None)
    known = {name: body.pop(name) for name in ("messages", "max_tokens", "temperature", "top_p")}
    for name in ("model", "logprobs"):
        body.pop(name, None)
    probe = known["messages"][0]["content"].startswith("Reply with exactly this number")
    tag = f"probe {server.url}" if probe else ""
    messages = tuple(known.pop("messages"))
    return request_key("fake", Request(messages, **known, logprobs=logprobs, tag=tag, extra=body or None))


def cached_keys(cache: Path) -> set[str]:
    if not cache.exists():
        return set()
    with sqlite3.connect(cache) as db:
        return {key for (key,) in db.execute("SELECT key FROM replies")}


def expected_value(brain: TellsNumbers, prompt: str, score: Score) -> float | None:
    """What the brain's own distribution says; its top 20 where that is all a judge could see, its favourite in text."""
    answers: Mapping[str, float] = brain.answers(prompt)
    if score.mode == "text":
        favourite = greedy(brain, prompt)
        return float(favourite) if favourite.isdigit() else None
    ranked = sorted(answers.items(), key=lambda item: -item[1])[: None if brain.split else 20]
    numbers = [(int(answer), p) for answer, p in ranked if answer.isdigit()]
    mass = sum(p for _, p in numbers)
    return sum(n * p for n, p in numbers) / mass if mass >= 0.25 else None


def greedy(brain: TellsNumbers, prompt: str) -> str:
    said = ""
    while True:
        following = brain.following([{"role": "user", "content": prompt}], said)
        token = max(following, key=lambda name: following[name])
        if token.startswith("<"):
            return said
        said += token


def measure(folder: Path, n: int = 500, split: bool = False, latency: float = 0.03) -> dict[str, Any]:
    """Run the scenario; counts as described in the module's head.

    Args:
        folder: for the cache and the scores.
        n: answers to judge.
        split: the served tokenizer splits digits.
        latency: seconds an answer takes.
    """
    cache, out = folder / "replies.sqlite", folder / "scores.json"
    brain = TellsNumbers(split=split)
    at_kill: list[tuple[int, set[str]]] = []  # length of the server's log, keys in the cache
    lost: set[str] = set()
    started = time.monotonic()
    with FakeServer(brain, faults=FAULTS, latency=latency) as server:
        code = "import sys; from benchmarks.judging import work; work(*sys.argv[1:4], int(sys.argv[4]))"
        command = [sys.executable, "-c", code, server.url, str(cache), str(out), str(n)]
        root = Path(__file__).resolve().parents[1]
        per_item = 6 if split else 1
        for kill_at in (n * per_item // 3, 2 * n * per_item // 3, None):
            process = subprocess.Popen(command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
            while process.poll() is None:
                if time.monotonic() - started > 600:
                    process.kill()
                    raise RuntimeError("the judging process did not end within ten minutes")
                if kill_at is not None and len(server.sold) >= kill_at:
                    process.send_signal(signal.SIGKILL)
                    break
                time.sleep(0.005)
            code_back = process.wait()
            if kill_at is None:
                if code_back != 0:
                    raise RuntimeError(f"the judging process ended with code {code_back}")
                break
            while not server.idle:
                time.sleep(0.01)
            kept = cached_keys(cache)
            at_kill.append((len(server.log), kept))
            lost |= {key for key in (cache_key(server, entry) for entry in server.sold) if key not in kept}
        log, outcomes = list(server.log), server.outcomes()
        names = [cache_key(server, entry) for entry in log]
    done = json.loads(out.read_text(encoding="utf-8"))
    scores = [Score.from_json(text) for text in done["scores"]]
    sold: dict[str, int] = {}
    for name, entry in zip(names, log, strict=True):
        sold[name] = sold.get(name, 0) + entry.sold
    again = sum(names[i] in kept for length, kept in at_kill for i in range(length, len(log)))
    wrong = 0
    for pair, score in zip(pairs(n), scores, strict=True):
        right = expected_value(brain, METRIC.fill(*pair), score)
        near = 0.5 if score.mode == "digits" else 1e-6
        wrong += (right is None) != (score.value is None) or (right is not None and abs(right - (score.value or 0.0)) > near)
    modes = [score.mode for score in scores]
    return {
        "items": len(scores),
        "scored": sum(score.mode != "failed" and (score.value is not None or score.refusal) for score in scores),
        "wrong": wrong,
        "kills": len(at_kill),
        "cached_at_kills": [len(kept) for _, kept in at_kill],
        "kept_but_asked_again": again,
        "sold": sum(sold.values()),
        "distinct": sum(count > 0 for count in sold.values()),
        "sold_again_not_in_flight": sum(count > 1 for name, count in sold.items() if name not in lost),
        "in_flight_at_kills": len(lost),
        "modes": {mode: modes.count(mode) for mode in sorted(set(modes))},
        "refusals": sum(score.refusal for score in scores),
        "server": outcomes,
        "last_run": done["ledger"],
        "seconds": round(time.monotonic() - started, 1),
    }


def checks_of(found: Mapping[str, Any], prefix: str = "") -> list[dict[str, Any]]:
    """The measured counts beside what they must be."""
    faults = ("too_many", "broken", "silent", "dropped", "garbled")

    def check(name: str, value: Any, target: str, ok: bool) -> dict[str, Any]:
        return {"name": prefix + name, "value": value, "target": target, "ok": bool(ok)}

    limit = found["kills"] * CONCURRENCY
    return [
        check("items_scored", found["scored"], f"= {found['items']}", found["scored"] == found["items"]),
        check("scores_wrong", found["wrong"], "= 0", found["wrong"] == 0),
        check("kills_on_the_way", found["kills"], "= 2", found["kills"] == 2 and found["cached_at_kills"][0] > 0),
        check("kept_replies_asked_again", found["kept_but_asked_again"], "= 0", found["kept_but_asked_again"] == 0),
        check("paid_twice_not_in_flight", found["sold_again_not_in_flight"], "= 0", found["sold_again_not_in_flight"] == 0),
        check("in_flight_at_kills", found["in_flight_at_kills"], f"<= {limit}", found["in_flight_at_kills"] <= limit),
        check(
            "paid_calls_beyond_distinct",
            found["sold"] - found["distinct"],
            f"<= {limit}",
            found["sold"] - found["distinct"] <= limit,
        ),
        check(
            "kinds_of_fault_met",
            sum(name in found["server"] for name in faults),
            "= 5",
            all(name in found["server"] for name in faults),
        ),
        check("fell_back_to_text", found["modes"].get("text", 0), ">= 1", found["modes"].get("text", 0) >= 1),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="single-token numbers only")
    args = parser.parse_args()
    from benchmarks.record import record

    checks, details = [], {}
    for split in (False,) if args.quick else (False, True):
        with tempfile.TemporaryDirectory() as folder:
            name = "digits" if split else "logprobs"
            found = measure(Path(folder), n=150 if split else 500, split=split)
        details[name] = found
        checks += checks_of(found, f"{name}_")
    record("judging", checks, details)


if __name__ == "__main__":
    main()
