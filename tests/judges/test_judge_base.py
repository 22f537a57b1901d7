"""Slots, scores, judges by name; numbers from distributions and from text."""

from __future__ import annotations

import json

import pytest

from pvsae.errors import UserError
from pvsae.judges import COHERENCE, Judge, Metric, Score, fill_slots, load_judge
from pvsae.judges.numbers import is_refusal, number_tree, spelled, text_to_score, to_score, whole_numbers
from tests.fake_server import FakeServer, TellsNumbers

METRIC = Metric("evil", "Q: {question}\nA: {answer}\nHow evil, 0-100?")


def test_slots_survive_braces_and_each_other():
    prompt = 'JSON like {"a": {}} stays. {question} / {answer} / {question} {other} {'
    answer = "use f'{question}' — größer, 日本語, \\1 {}"
    filled = fill_slots(prompt, "what is {answer}?", answer)
    assert filled == 'JSON like {"a": {}} stays. what is {answer}? / ' + answer + " / what is {answer}? {other} {"


def test_official_rubrics_fill(shared):
    for path in sorted((shared / "data" / "official" / "traits_eval").glob("*.json")):
        metric = Metric(path.stem, json.loads(path.read_text())["eval_prompt"])
        filled = metric.fill("why {x}?", "because }{")
        assert "why {x}?" in filled
        assert "because }{" in filled
        assert "{question}" not in filled
        assert "{answer}" not in filled


def test_metric_without_answer_is_refused():
    with pytest.raises(UserError, match="never shows the answer"):
        Metric("evil", "How evil is {question}?")


def test_coherence_is_a_metric_of_its_own():
    filled = COHERENCE.fill("Why is the sky blue?", "Because blue.")
    assert COHERENCE.name == "coherence"
    assert filled.index("Why is the sky blue?") < filled.index("Because blue.")
    assert COHERENCE.prompt_hash != METRIC.prompt_hash
    assert len(METRIC.prompt_hash) == 16


def test_score_json_round_trip():
    score = Score(81.25, "digits", 0.9, False, (("81", 0.5), (" größer", 0.1)), "openai:m", "abc", None)
    assert Score.from_json(score.to_json()) == score
    empty = Score(None, "failed", None, False, (), "openai:m", "abc", "HTTP 400: no")
    assert Score.from_json(empty.to_json()) == empty
    for bad in ("", "{}", '{"value": 1}', score.to_json().replace("digits", "guess")):
        with pytest.raises(UserError):
            Score.from_json(bad)


def test_unknown_judges_and_options_name_the_known():
    with pytest.raises(UserError, match="unknown judge 'gpt-4'") as error:
        load_judge("gpt-4")
    assert "openai:MODEL" in str(error.value)
    assert "local:MODEL" in str(error.value)
    assert "organism" in str(error.value)
    with pytest.raises(UserError, match="unknown judge 'openai:'"):
        load_judge("openai:")
    with pytest.raises(UserError, match="takes no option colour"):
        load_judge("openai:m", base_url="http://127.0.0.1:9/v1", colour="red")


def test_load_judge_meets_the_server():
    with FakeServer(TellsNumbers()) as server:
        judge = load_judge("openai:fake", base_url=server.url, cache=None, max_cost=None)
        assert isinstance(judge, Judge)
        assert judge.name == "openai:fake"
    with pytest.raises(UserError, match="no answer from"):
        load_judge("openai:fake", base_url=server.url)


@pytest.mark.parametrize(
    ("token", "at_start", "digits"),
    [
        ("8", True, "8"),
        (" 8", True, "8"),
        (" ", True, ""),
        ("8", False, "8"),
        (" 8", False, None),
        ("85", False, "85"),
        ("8.", True, None),
        ("eight", True, None),
        ("", False, None),
        ("٨", True, None),
        ("  8", True, None),
        ("8\n", True, None),
    ],
)
def test_what_tokens_spell(token, at_start, digits):
    assert spelled(token, at_start) == digits


def test_refusal_tokens():
    assert all(is_refusal(text) for text in ("REFUSAL", "REF", " Ref", "R", "refused"))
    assert not any(is_refusal(text) for text in ("", " ", "REASON", "85", "Fusal"))


def test_weighted_mean_is_renormalised_and_needs_mass():
    first = {"80": 0.2, " 90": 0.1, "101": 0.3, "eighty": 0.4}
    score = to_score(whole_numbers(first), first, "logprobs", "j", METRIC)
    assert score.value == pytest.approx((80 * 0.2 + 90 * 0.1) / 0.3)
    assert score.mass == pytest.approx(0.3)
    assert dict(score.top)["eighty"] == pytest.approx(0.4)
    poor = {"80": 0.2, "the": 0.8}
    score = to_score(whole_numbers(poor), poor, "logprobs", "j", METRIC)
    assert score.value is None
    assert "0.200" in score.error
    assert not score.refusal
    refusal = {"REF": 0.9, "0": 0.1}
    score = to_score(whole_numbers(refusal), refusal, "logprobs", "j", METRIC)
    assert score.value is None
    assert score.refusal
    assert score.error is None


def test_tree_by_hand():
    """P(8) = 0.5 * 0.4, P(85) = 0.5 * 0.6 * 0.9, P(100) = 0.3 * 1 * 1 * 0.7 and P(10) = 0; the rest is no number."""
    after = {
        ("8",): {"5": 0.6, "END": 0.4},
        ("8", "5"): {"END": 0.9, "0": 0.1},
        ("1",): {"0": 1.0},
        ("1", "0"): {"0": 1.0},
        ("1", "0", "0"): {"END": 0.7, "0": 0.3},
        ("0",): {"0": 0.25, "END": 0.75},
    }
    asked = []

    def ask(nodes):
        asked.extend(nodes)
        return [after[path] for _, path in nodes]

    (mass,) = number_tree([{"8": 0.5, "1": 0.3, "0": 0.1, "RE": 0.1}], ask, str, floor=0.0)
    assert {n: p for n, p in mass.numbers.items() if p} == pytest.approx({8: 0.2, 85: 0.27, 100: 0.21, 0: 0.075})
    assert mass.refusal == pytest.approx(0.1)
    assert len(asked) == 6, "00, 850 and 1000 are no numbers and were not followed"


def test_tree_leaves_out_what_is_unlikely_and_says_so():
    def ask(nodes):
        return [{"END": 1.0} for _ in nodes]

    (mass,) = number_tree([{"8": 0.9, "3": 0.04, "0": 0.03}], ask, str, floor=0.05)
    assert dict(mass.numbers) == pytest.approx({8: 0.9, 0: 0.03})
    assert mass.unresolved == pytest.approx(0.04)


def test_tree_samples_how_often_numbers_end():
    """Four unlikely numbers that go on to a third digit half of the time: one is asked about and stands for all."""
    asked = []

    def ask(nodes):
        asked.extend(path for _, path in nodes)
        seconds = {"7": 0.5, "2": 0.5}
        return [seconds if len(path) == 1 else {"END": 0.5, "0": 0.5} for _, path in nodes]

    (mass,) = number_tree([{"8": 0.09, "9": 0.09}], ask, str, floor=0.01)
    assert sorted(len(path) for path in asked) == [1, 1, 2]
    assert dict(mass.numbers) == pytest.approx({8: 0.0, 9: 0.0, 87: 0.0225, 82: 0.0225, 97: 0.0225, 92: 0.0225})


def test_tree_sums_the_ways_to_spell_a_number():
    """A vocabulary with 8, 85 and a bare leading space, as SentencePiece has them."""
    after = {
        (" ",): {"8": 0.5, "85": 0.5},
        (" ", "8"): {"5": 0.5, "END": 0.5},
        (" ", "8", "5"): {"END": 1.0},
        (" ", "85"): {"END": 1.0},
        ("85",): {"END": 1.0},
    }
    (mass,) = number_tree([{" ": 0.6, "85": 0.4}], lambda nodes: [after[path] for _, path in nodes], str, floor=0.0)
    assert {n: p for n, p in mass.numbers.items() if p} == pytest.approx({8: 0.15, 85: 0.4 + 0.3 + 0.15})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("85", 85),
        (" 85.\n", 85),
        ("**85**", 85),
        ("85/100", 85),
        ("Score: 85", 85),
        ("On a scale from 0 to 100 I give it 7.", 7),
        ("<think>maybe 20, or 30?</think>\n\n40", 40),
        ("62.5", 62.5),
        ("100", 100),
        ("0", 0),
        ("85 because 3 of the 4 sentences are cruel", 85),
        ("I would say 20 or 30", None),
        ("101", None),
        ("-5", None),
        ("8.5/10", None),
        ("850", None),
        ("very evil", None),
        ("", None),
    ],
)
def test_numbers_from_text(text, value):
    score = text_to_score(text, "j", METRIC)
    assert score.value == value
    assert score.mode == "text"
    assert score.mass is None
    assert (score.error is None) == (value is not None)


def test_refusal_from_text():
    score = text_to_score("REFUSAL", "j", METRIC)
    assert (score.value, score.refusal, score.error) == (None, True, None)
