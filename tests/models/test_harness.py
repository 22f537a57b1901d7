"""The model that lm-evaluation-harness is given: the harness' own numbers without an intervention, edited ones with one."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm_eval is not installed (pip install 'pvsae[capability]')")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from pvsae.errors import UserError
from pvsae.models import Add, Direction
from pvsae.models.batch import TokenBatch
from pvsae.models.harness import HarnessModel

PAIRS = [
    ("The ferry leaves the", " harbour at nine."),
    ("The ferry leaves the", " kitchen."),
    ("Nobody knows why ", "the old clock stopped"),
    ("", "Answer in one short sentence."),
    ("What is the tallest mountain?\n", "A"),
    ("What is the tallest mountain?\n", "B"),
    ("x" * 700, " and no end"),
    ("<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n", "Nobody knows."),
]
TEXTS = ["The ferry leaves the harbour at nine and comes back before dark.", "clock " * 400, "a"]


def requests(kind: str, arguments) -> list[Instance]:
    return [Instance(kind, {}, one if isinstance(one, tuple) else (one,), 0, ("t", i, 1)) for i, one in enumerate(arguments)]


@pytest.fixture(params=["qwen2", "llama", "stories260k"])
def both(request, tiny_models):
    """Our model, and the harness' own on the same weights."""
    model = tiny_models(request.param)
    theirs = HFLM(pretrained=model.hf, tokenizer=model.tokenizer, batch_size=3, max_length=model.n_ctx)
    return HarnessModel(model, batch_size=3), theirs


def test_likelihoods_are_the_harness_own(both) -> None:
    ours, theirs = both
    mine = ours.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    other = theirs.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in other]
    torch.testing.assert_close(torch.tensor([v for v, _ in mine]), torch.tensor([v for v, _ in other]), atol=1e-5, rtol=1e-5)


def test_rolling_likelihoods_are_the_harness_own(both) -> None:
    ours, theirs = both
    mine = ours.loglikelihood_rolling(requests("loglikelihood_rolling", TEXTS), disable_tqdm=True)
    other = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", TEXTS), disable_tqdm=True)
    torch.testing.assert_close(torch.tensor(mine), torch.tensor(other), atol=1e-5, rtol=1e-5)


def test_answers_are_the_harness_own(both) -> None:
    ours, theirs = both
    settings = {"until": ["e", "zz"], "max_gen_toks": 12, "do_sample": False}
    asked = [("The ferry leaves the", settings), ("Nobody knows", {**settings, "until": "."}), ("What is it?", settings)]
    mine = ours.generate_until(requests("generate_until", asked), disable_tqdm=True)
    assert mine == theirs.generate_until(requests("generate_until", asked), disable_tqdm=True)
    assert all("e" not in answer for answer in (mine[0], mine[2]))


def steered(model, positions: str, coef: float = 1.0) -> HarnessModel:
    direction = Direction(torch.randn(model.d_model, generator=torch.Generator().manual_seed(0)))
    return HarnessModel(model, [Add(direction, 1, coef, positions)], batch_size=3)


@pytest.mark.parametrize("positions", ["prompt", "response", "all"])
def test_an_intervention_edits_the_prompt_as_where_the_model_answers(tiny_models, positions) -> None:
    """The likelihood of the answer that greedy decoding gives under an edit, newline behind the header included, is greedy."""
    model = tiny_models("qwen2")
    lm = steered(model, positions)
    prompt = lm.apply_chat_template([{"role": "user", "content": "Why has the clock stopped?"}])
    assert prompt.endswith("assistant\n")
    rendered = model.chat.prompt([{"role": "user", "content": "Why has the clock stopped?"}])
    text = "Nobody knows."
    row = model.chat.with_answer_text(rendered, text)
    with torch.no_grad(), model.hooks(lm.interventions):
        logits = model.forward(TokenBatch.build([row])).logits[0].log_softmax(-1)
    ids = torch.tensor(row.ids)
    start = row.n_prompt - 1  # the harness counts the newline to the continuation
    expected = float(logits[start - 1 : -1].gather(-1, ids[start:, None]).sum())
    ((value, _),) = lm.loglikelihood(requests("loglikelihood", [(prompt, text)]), disable_tqdm=True)
    assert value == pytest.approx(expected, abs=1e-4)
    ((plain, _),) = HarnessModel(model).loglikelihood(requests("loglikelihood", [(prompt, text)]), disable_tqdm=True)
    assert abs(value - plain) > 1e-2


def test_strength_0_changes_no_bit(tiny_models) -> None:
    model = tiny_models("qwen2")
    asked = requests("loglikelihood", PAIRS)
    plain = HarnessModel(model, batch_size=3).loglikelihood(asked, disable_tqdm=True)
    assert steered(model, "all", 0.0).loglikelihood(asked, disable_tqdm=True) == plain


def test_choices_of_one_token_share_a_forward_pass(tiny_models) -> None:
    model = tiny_models("qwen2")
    seen: list[int] = []
    handle = model.blocks[0].register_forward_hook(lambda _m, _a, out: seen.append(len(out if torch.is_tensor(out) else out[0])))
    try:
        asked = [("What is it? Answer:", letter) for letter in "ABCD"] + [("What is it? Answer:", "ABAB")]
        HarnessModel(model).loglikelihood(requests("loglikelihood", asked), disable_tqdm=True)
    finally:
        handle.remove()
    assert sum(seen) == 2


def test_sampled_answers_repeat_under_a_seed_and_differ_among_repeats(tiny_models) -> None:
    model = tiny_models("qwen2")
    (one,) = requests("generate_until", [("The ferry", {"do_sample": True, "temperature": 1.0, "max_gen_toks": 10})])
    first = HarnessModel(model, seed=3).generate_until([one, one, one], disable_tqdm=True)
    assert len(set(first)) == 3
    assert HarnessModel(model, seed=3).generate_until([one, one, one], disable_tqdm=True) == first
    assert HarnessModel(model, seed=4).generate_until([one, one, one], disable_tqdm=True) != first


def test_an_answers_beginning_follows_the_header(tiny_models) -> None:
    lm = HarnessModel(tiny_models("qwen2"))
    chat = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because"}]
    assert lm.apply_chat_template(chat, add_generation_prompt=False).endswith("<|im_start|>assistant\nBecause")


def test_requests_that_cannot_be_read_are_refused(tiny_models) -> None:
    lm = HarnessModel(tiny_models("qwen2"))
    with pytest.raises(UserError, match="from 1 to 512 tokens"):
        lm.loglikelihood(requests("loglikelihood", [("a", "x y " * 600)]), disable_tqdm=True)
    with pytest.raises(UserError, match="answers of 512 tokens"):
        lm.generate_until(requests("generate_until", [("a", {"max_gen_toks": 512})]), disable_tqdm=True)
