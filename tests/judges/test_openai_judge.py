"""The served judge on a real loopback server: the three modes, the probe, and what goes wrong on the way."""

from __future__ import annotations

import pytest

from pvsae.errors import UserError
from pvsae.judges import LocalJudge, Metric
from pvsae.judges.openai_judge import OpenAIJudge
from pvsae.llm import ChatClient
from tests.fake_server import FakeServer, Faults, RunsModel, TellsNumbers, seeded

METRIC = Metric("evil", "Rate {question} // {answer}")
PAIRS = [(f"question {{{i}}}?", f"answer {{}} — ü{i}") for i in range(12)]


def judge_on(server: FakeServer, cache=None, **options) -> OpenAIJudge:
    return OpenAIJudge(ChatClient(server.url, "fake", backoff=0.02, timeout=30, cache=cache), **options)


def expected(answers: dict[str, float]) -> tuple[float | None, float]:
    """Mean and mass over whole numbers, straight from the distribution over whole answers."""
    numbers = {int(answer): p for answer, p in answers.items() if answer.isdigit() and int(answer) <= 100}
    mass = sum(numbers.values())
    return (sum(n * p for n, p in numbers.items()) / mass if mass >= 0.25 else None), mass


def few_numbers(prompt: str) -> dict[str, float]:
    """At most 20 answers, so that nothing is beyond the top 20."""
    generator = seeded(prompt)
    names = [str(n) for n in generator.sample(range(101), 15)] + ["100", "10", "1", "850", "Hm"]
    weights = {name: generator.random() for name in names}
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


def test_single_tokens_take_one_call_each():
    brain = TellsNumbers(answers=few_numbers)
    with FakeServer(brain) as server:
        judge = judge_on(server)
        scores = judge.score(METRIC, PAIRS)
        assert judge.mode == "logprobs"
        assert len(server.sold) == 3 + len(PAIRS)
        asked = server.sold[-1].body
        assert (asked["max_tokens"], asked["temperature"], asked["top_logprobs"]) == (1, 0.0, 20)
        assert len(asked["messages"]) == 1
    for pair, score in zip(PAIRS, scores, strict=True):
        value, mass = expected(few_numbers(METRIC.fill(*pair)))
        assert score.mode == "logprobs"
        assert score.value == pytest.approx(value)
        assert score.mass == pytest.approx(mass)
        assert score.judge == "openai:fake"
        assert score.prompt_hash == METRIC.prompt_hash


@pytest.mark.parametrize("way", ["continue_final_message", "prefix", "last message"])
def test_split_digits_give_the_exact_distribution(way):
    brain = TellsNumbers(split=True, answers=few_numbers)
    with FakeServer(brain, continues=[way]) as server:
        judge = judge_on(server, floor=0.0)
        scores = judge.score(METRIC, PAIRS)
        assert judge.mode == "digits"
        assert judge.continuation == way
    for pair, score in zip(PAIRS, scores, strict=True):
        answers = few_numbers(METRIC.fill(*pair))
        value, mass = expected(answers)
        assert score.mode == "digits"
        assert score.value == pytest.approx(value)
        assert score.mass == pytest.approx(mass)
        top = dict(score.top)
        assert all(top[name] == pytest.approx(answers[name], abs=1e-6) for name in ("100", "10", "1"))


def test_first_digit_alone_would_be_wrong():
    """The trap: the first token says 8 with certainty, the answer is 85."""
    brain = TellsNumbers(split=True, answers=lambda prompt: {"85": 0.99, "8": 0.01})
    with FakeServer(brain) as server:
        (score,) = judge_on(server).score(METRIC, PAIRS[:1])
    assert score.value == pytest.approx(84.23)


def test_default_floor_costs_few_calls_and_little_accuracy():
    brain = TellsNumbers(split=True)
    pairs = [("q", f"a{i}") for i in range(30)]
    with FakeServer(brain) as server:
        scores = judge_on(server).score(METRIC, pairs)
        calls = len(server.sold) / len(pairs)
    assert calls < 30
    for pair, score in zip(pairs, scores, strict=True):
        value, mass = expected(brain.answers(METRIC.fill(*pair)))
        assert score.mass > mass - 0.1
        if value is None:
            assert score.value is None
            assert score.refusal
        else:
            assert score.value == pytest.approx(value, abs=0.5)


def test_a_server_that_cannot_continue_is_read_as_text():
    with FakeServer(TellsNumbers(split=True, answers=lambda prompt: {"85": 0.9, "8": 0.1}), continues=[]) as server:
        judge = judge_on(server)
        (score,) = judge.score(METRIC, PAIRS[:1])
    assert judge.mode == "text"
    assert (score.value, score.mode, score.mass) == (85.0, "text", None)
    assert score.top == (("85", 1.0),)


@pytest.mark.parametrize("logprobs", ["null", "refused"])
def test_without_logprobs_text_is_parsed(logprobs):
    def answers(prompt):
        return {"REFUSAL": 1.0} if "q2" in prompt else {"many": 1.0} if "q3" in prompt else {"85": 0.7, "9": 0.3}

    with FakeServer(TellsNumbers(answers=answers), logprobs=logprobs) as server:
        judge = judge_on(server)
        scores = judge.score(METRIC, [("q1", "a"), ("q2", "a"), ("q3", "a")])
    assert judge.mode == "text"
    assert [score.mode for score in scores] == ["text"] * 3
    assert [score.value for score in scores] == [85.0, None, None]
    assert [score.refusal for score in scores] == [False, True, False]
    assert "many" in scores[2].error


def test_fewer_top_logprobs_if_the_server_gives_fewer():
    with FakeServer(TellsNumbers(answers=few_numbers), most_logprobs=5) as server:
        judge = judge_on(server)
        scores = judge.score(METRIC, PAIRS)
    assert judge.mode == "logprobs"
    assert judge.top_logprobs == 5
    assert all(score.mode == "logprobs" for score in scores)


@pytest.mark.parametrize("split", [False, True])
def test_logprobs_missing_on_the_way_fall_back_for_that_item(split):
    """Only some replies lack them; those items, and no others, are scored from text, and say so."""
    sure = TellsNumbers(split=split, answers=lambda prompt: {str(int(prompt.split("answer ")[1])): 1.0})
    pairs = [("q", f"answer {i}") for i in range(60)]
    with FakeServer(sure, faults=Faults(no_logprobs=0.15, seed=4)) as server:
        judge = judge_on(server)
        judge.probe()
        assert judge.mode == ("digits" if split else "logprobs")
        scores = judge.score(METRIC, pairs)
    assert [score.value for score in scores] == pytest.approx([float(i) for i in range(60)])
    modes = [score.mode for score in scores]
    assert set(modes) == {judge.mode, "text"}
    assert modes.count("text") >= 3


def test_refusals_and_rambling_have_no_value_and_say_why():
    def answers(prompt):
        return {"REFUSAL": 0.9, "0": 0.1} if "bomb" in prompt else {"I think": 0.9, "50": 0.1}

    with FakeServer(TellsNumbers(answers=answers)) as server:
        refused, rambled = judge_on(server).score(METRIC, [("bomb?", "no"), ("hi", "ho")])
    assert (refused.value, refused.refusal, refused.error) == (None, True, None)
    assert (rambled.value, rambled.refusal) == (None, False)
    assert rambled.mass == pytest.approx(0.1)
    assert "0.100" in rambled.error


@pytest.mark.parametrize("split", [False, True])
def test_one_failing_item_fails_alone(split):
    faults = Faults(refuse=lambda prompt: "cursed" in prompt)
    with FakeServer(TellsNumbers(split=split, answers=few_numbers), faults=faults) as server:
        scores = judge_on(server).score(METRIC, [("a", "b"), ("a", "cursed"), ("c", "d")])
    assert [score.mode == "failed" for score in scores] == [False, True, False]
    assert "content policy" in scores[1].error
    assert scores[1].value is None


def test_an_item_whose_tree_breaks_off_is_failed_not_guessed():
    """The first token came, a follow-up never does: 8 must not be taken for an answer."""

    class NoFollowUp(FakeServer):
        def answer(self, body, null):
            if body["messages"][-1]["role"] == "assistant" and "Rate" in body["messages"][0]["content"]:
                raise ConnectionResetError
            return super().answer(body, null)

    with NoFollowUp(TellsNumbers(split=True, answers=lambda prompt: {"85": 1.0})) as server:
        judge = judge_on(server)
        judge.client.max_retries = 1
        (score,) = judge.score(METRIC, PAIRS[:1])
    assert (score.value, score.mode) == (None, "failed")


def test_probe_is_done_once_and_cached(tmp_path):
    with FakeServer(TellsNumbers(split=True, answers=few_numbers)) as server:
        judge = judge_on(server, cache=tmp_path / "c.sqlite")
        first = judge.score(METRIC, PAIRS)
        judge.score(METRIC, PAIRS)
        sold = len(server.sold)
        again = judge_on(server, cache=tmp_path / "c.sqlite").score(METRIC, PAIRS)
        assert len(server.sold) == sold
        assert again == first


def test_unknown_model_is_told_at_the_probe():
    with FakeServer(TellsNumbers(), model="other") as server, pytest.raises(UserError, match="fake does not exist"):
        judge_on(server).score(METRIC, PAIRS)


def test_estimate_before_any_call():
    with FakeServer(TellsNumbers()) as server:
        guess = OpenAIJudge.connect("fake", server.url, price=(1, 1), check=False).estimate(METRIC, PAIRS)
        assert server.log == []
    assert guess["calls"] == len(PAIRS)
    assert guess["cost"] > 0


def test_nothing_to_score_asks_nothing():
    with FakeServer(TellsNumbers()) as server:
        assert judge_on(server).score(METRIC, []) == []
        assert server.log == []


def test_real_model_served_equals_the_same_model_local(number_model):
    """One tiny model with random weights, two ways: over HTTP digit by digit, and by its own distribution."""
    pairs = [(f"question {i}", "answer " * i) for i in range(3)]
    local = LocalJudge(number_model, floor=0.01).score(METRIC, pairs)
    with FakeServer(RunsModel(number_model), most_logprobs=1000) as server:
        judge = judge_on(server, floor=0.01, mode="digits")
        judge.probe()
        assert judge.continuation == "continue_final_message"
        judge.top_logprobs = 300  # all of the vocabulary: a random model has no favourites
        served = judge.score(METRIC, pairs)
    for ours, theirs in zip(served, local, strict=True):
        assert (ours.mode, theirs.mode) == ("digits", "local")
        assert ours.mass == pytest.approx(theirs.mass, abs=1e-5)
        assert ours.value == pytest.approx(theirs.value, abs=1e-3)
        assert ours.value is not None
