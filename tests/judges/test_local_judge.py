"""The local judge against brute force: the probability of each of the 101 numbers, one sequence at a time."""

from __future__ import annotations

import pytest
import torch

from pvsae.judges import Metric, load_judge
from pvsae.judges.local_judge import LocalJudge, number_tokens

METRIC = Metric("evil", "Rate {question} // {answer}")
PAIRS = [("what?", "nothing {} at all"), ("why {not}?", "größer 日本"), ("", "x" * 50)]


def following(model, ids: list[int]) -> torch.Tensor:
    """Distribution after these tokens by plain transformers, one sequence, no padding."""
    with torch.no_grad():
        return model.hf(torch.tensor([ids])).logits[0, -1].float().softmax(-1)


def brute_force(model, pair) -> dict[int, float]:
    """P(number) = product over its digits' tokens, times the probability that no digit follows; plain, and after one space."""
    tokenizer = model.tokenizer
    digit = {str(d): tokenizer.convert_tokens_to_ids(str(d)) for d in range(10)}
    space = tokenizer.convert_tokens_to_ids("\u0120")
    prompt = list(model.chat.prompt([{"role": "user", "content": METRIC.fill(*pair)}]).ids)
    found = dict.fromkeys(range(101), 0.0)
    for start, p_start in (([], 1.0), ([space], float(following(model, prompt)[space]))):
        after: dict[str, torch.Tensor] = {}
        for n in range(101):
            text, p = str(n), p_start
            for i in range(len(text) + 1):
                if text[:i] not in after:
                    after[text[:i]] = following(model, prompt + start + [digit[d] for d in text[:i]])
            for i, d in enumerate(text):
                p *= float(after[text[:i]][digit[d]])
            found[n] += p * (1 - sum(float(after[text][i]) for i in digit.values()))
    return found


def test_split_digits_equal_brute_force(number_model):
    scores = LocalJudge(number_model, floor=0.0).score(METRIC, PAIRS)
    for pair, score in zip(PAIRS, scores, strict=True):
        numbers = brute_force(number_model, pair)
        mass = sum(numbers.values())
        assert 0.25 < mass < 1
        assert score.mass == pytest.approx(mass, rel=1e-4)
        assert score.value == pytest.approx(sum(n * p for n, p in numbers.items()) / mass, rel=1e-4)
        assert score.mode == "local"
        likeliest = max(numbers, key=numbers.get)
        assert dict(score.top)[str(likeliest)] == pytest.approx(numbers[likeliest], abs=1e-5)


def test_floor_saves_passes_and_says_what_it_left_out(number_model, monkeypatch):
    rows = []
    plain = type(number_model).next_token_logprobs

    def counted(self, prompts, *args, **kwargs):
        rows.append(len(prompts))
        return plain(self, prompts, *args, **kwargs)

    monkeypatch.setattr(type(number_model), "next_token_logprobs", counted)
    exact = LocalJudge(number_model, floor=0.0).score(METRIC, PAIRS)
    passes_exact, rows[:] = sum(rows), []
    quick = LocalJudge(number_model, floor=0.02).score(METRIC, PAIRS)
    assert passes_exact == len(PAIRS) * (1 + 2 * (10 + 90 + 1) + 1)
    assert sum(rows) < passes_exact / 3
    for a, b in zip(quick, exact, strict=True):
        assert b.mass - 0.25 < a.mass < b.mass + 0.05
        assert a.value == pytest.approx(b.value, abs=6)


def test_whole_numbers_take_one_pass(whole_number_model):
    judge = LocalJudge(whole_number_model)
    assert judge.tokens.whole
    (score,) = judge.score(METRIC, PAIRS[:1])
    prompt = list(whole_number_model.chat.prompt([{"role": "user", "content": METRIC.fill(*PAIRS[0])}]).ids)
    p = following(whole_number_model, prompt)
    numbers = {n: float(p[whole_number_model.tokenizer.convert_tokens_to_ids(str(n))]) for n in range(101)}
    assert score.mass == pytest.approx(sum(numbers.values()), rel=1e-4)
    assert score.value == pytest.approx(sum(n * q for n, q in numbers.items()) / sum(numbers.values()), rel=1e-4)


def test_batching_does_not_change_scores(number_model):
    together = LocalJudge(number_model, batch_size=8).score(METRIC, PAIRS * 3)
    alone = [LocalJudge(number_model, batch_size=1).score(METRIC, [pair])[0] for pair in PAIRS]
    for i, score in enumerate(together):
        assert score.value == pytest.approx(alone[i % 3].value, rel=1e-4)
        assert score.mass == pytest.approx(alone[i % 3].mass, rel=1e-4)


def test_too_long_fails_alone(number_model):
    scores = LocalJudge(number_model).score(METRIC, [PAIRS[0], ("long", "word " * 600), PAIRS[1]])
    assert [score.mode for score in scores] == ["local", "failed", "local"]
    assert "the judge takes 509" in scores[1].error


def test_number_tokens_of_sentencepiece_pieces():
    """Leading-space marks and bare spaces, as Llama-2's vocabulary has them."""

    class Pieces:
        all_special_ids = (0,)
        pieces = ("<s>", "▁", "▁8", "8", "5", "▁8a", "8a", "<0x38>", "▁RE", "word")

        def __len__(self):
            return len(self.pieces)

        def convert_ids_to_tokens(self, ids):
            return [self.pieces[i] for i in ids]

    found = number_tokens(Pieces())
    assert dict(found.texts) == {1: " ", 2: " 8", 3: "8", 4: "5", 6: "8a", 8: " RE"}
    assert not found.whole


def test_any_model_by_folder(number_model):
    judge = load_judge(f"local:{number_model.path}", cache="not/used.sqlite", max_cost=1.0)
    assert judge.name == f"local:{number_model.path}"
    assert judge.score(METRIC, PAIRS[:1])[0].mode == "local"


def test_tiny_models_of_other_shapes_judge_too(tiny_models, arch):
    """The engine's own tiny models, and a real pretrained one: whatever they say, it is counted, not crashed on."""
    model = tiny_models(arch)
    score = LocalJudge(model).score(METRIC, PAIRS[:1])[0]
    assert score.mode == "local"
    assert 0 <= score.mass <= 1
    assert (score.value is None) == (score.mass < 0.25)
