"""Layer choice: the rule on made-up sweeps, and the whole on a model whose best block is known by construction."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from pvsae.errors import UserError
from pvsae.judges import Score
from pvsae.models import Add, Direction, Sampling
from pvsae.vectors.extraction import extract, render_rows
from pvsae.vectors.layers import PROXIES, answer_logprobs, candidate_blocks, choose, choose_layer, proxy_table
from pvsae.vectors.persona import PersonaVectors
from tests.vectors.vector_rows import artifacts, judged


def sweep(*cells: tuple[int, float, float, float]) -> pd.DataFrame:
    return pd.DataFrame(cells, columns=["block", "coef", "trait", "coherence"])


def test_the_highest_trait_that_is_coherent_wins():
    block, coef, met, reason = choose(sweep((1, 1.0, 50, 95), (2, 1.0, 80, 90), (2, 2.0, 99, 40), (3, 1.0, 70, 99)))
    assert (block, coef, met) == (2, 1.0, True)
    assert "80.0 at coherence 90.0" in reason


def test_near_ties_go_to_the_later_block_then_the_more_coherent_then_the_weaker():
    assert choose(sweep((1, 1.0, 90.0, 80), (2, 2.0, 89.5, 95)))[:2] == (2, 2.0)
    assert choose(sweep((1, 2.0, 90.0, 95), (2, 1.0, 89.5, 95)))[:2] == (2, 1.0)
    assert choose(sweep((3, 1.0, 90.0, 95), (4, 1.0, 88.0, 92)))[:2] == (4, 1.0)
    assert choose(sweep((3, 1.0, 90.0, 95), (4, 1.0, 84.0, 95)))[:2] == (3, 1.0)
    assert choose(sweep((3, 2.0, 90.0, 95), (3, 1.0, 88.0, 95)))[:2] == (3, 1.0)
    steady, late = ((3, 1.0, 88, 95), (3, 2.0, 90, 95)), ((1, 1.0, 40, 99), (1, 2.0, 92, 99))
    assert choose(sweep(*late, *steady))[0] == 3  # as high within the noise, and already at half the strength


def test_without_a_coherent_cell_the_choice_says_so():
    block, _, met, reason = choose(sweep((1, 1.0, 90, 10), (2, 1.0, 60, 60)))
    assert (block, met) == (2, False)
    assert "smaller coefs" in reason
    with pytest.raises(UserError, match="could be scored"):
        choose(sweep((1, 1.0, float("nan"), 90)))


def test_candidates_leave_out_missing_blocks():
    rows = torch.ones(40, 4)
    rows[39] = float("nan")
    vectors = PersonaVectors("evil", {"response_avg_diff": rows}, {"missing_blocks": {"39": "x"}})
    blocks = candidate_blocks(vectors)
    assert len(blocks) == 12
    assert (blocks[0], blocks[-1]) == (0, 38)
    assert candidate_blocks(PersonaVectors("evil", {"response_avg_diff": torch.ones(5, 4)})) == (0, 1, 2, 3, 4)


class WordJudge:
    """Trait: share of an answer's characters that are the letter "e"; coherence is always 100."""

    name = "letter"

    def score(self, metric, pairs, progress=None):
        value = {True: lambda a: 100.0, False: lambda a: 100.0 * a.count("e") / max(1, len(a))}[metric.name == "coherence"]
        return [Score(value(a), "rules", None, False, (), self.name, metric.prompt_hash, None) for _, a in pairs]


def letter_vectors(model, good_block: int) -> PersonaVectors:
    """Zero almost everywhere; at one block the unembedding row of "e", far above the residual's size."""
    rows = torch.zeros(model.n_blocks, model.d_model)
    token = model.tokenizer("e", add_special_tokens=False)["input_ids"][0]
    rows[good_block] = 200 * model.hf.get_output_embeddings().weight[token].detach().float()
    rows[rows.norm(dim=1) == 0, 0] = 1e-3
    return PersonaVectors("evil", {"response_avg_diff": rows})


def test_the_block_that_steers_is_chosen(tiny_models, tmp_path):
    model = tiny_models("qwen2")
    options = {"coefs": (0.5, 1.0), "sampling": Sampling(max_new_tokens=8, seed=1), "parts": tmp_path}
    vectors = letter_vectors(model, good_block=3)
    choice = choose_layer(model, vectors, artifacts(3), WordJudge(), **options)
    assert choice.block == 3
    assert choice.met_floor
    assert set(choice.sweep["block"]) == {0, 1, 2, 3}
    assert len(choice.table) == 8
    assert choice.table["chosen"].sum() == 1
    best = choice.proxies.set_index("block")["best_trait"]
    assert best[3] > choice.baseline["trait"] + 20
    assert choice.agreement["norm"] is not None
    assert choice.agreement["separation"] is None  # not computed without rollouts
    again = choose_layer(model, vectors, artifacts(3), WordJudge(), **options)
    assert again.sweep.equals(choice.sweep)


def test_wrong_blocks_and_models_are_refused(tiny_models):
    model = tiny_models("qwen2")
    with pytest.raises(UserError, match="block 9"):
        choose_layer(model, letter_vectors(model, 1), artifacts(), WordJudge(), blocks=[9])
    with pytest.raises(UserError, match="this model has"):
        choose_layer(model, PersonaVectors("evil", {"response_avg_diff": torch.ones(2, 5)}), artifacts(), WordJudge())
    with pytest.raises(UserError, match="nothing to sweep"):
        choose_layer(model, letter_vectors(model, 1), artifacts(), WordJudge(), coefs=())


def test_answer_logprobs_equal_a_plain_forward_pass(tiny_models):
    model = tiny_models("llama")
    rows = render_rows(model, judged(model, "pos"), range(10))
    ours = answer_logprobs(model, rows, batch_tokens=300)
    for row, value in zip(rows, ours.tolist(), strict=True):
        with torch.no_grad():
            logprobs = model.hf(torch.tensor([row.ids])).logits[0].log_softmax(-1)
        start, end = row.answer
        plain = sum(float(logprobs[t - 1, row.ids[t]]) for t in range(start, end)) / (end - start)
        assert value == pytest.approx(plain, abs=1e-4)


@pytest.mark.parametrize("statistic", ["response_avg_diff", "prompt_avg_diff", "prompt_last_diff"])
def test_proxies_against_direct_numbers(tiny_models, statistic):
    model = tiny_models("qwen2")
    pos, neg = judged(model, "pos"), judged(model, "neg")
    vectors = extract(model, pos, neg)
    table = proxy_table(model, vectors, [1, 3], statistic=statistic, pos=pos, neg=neg).set_index("block")
    assert list(table.columns) == list(PROXIES)
    assert table.notna().all().all()
    numbers = vectors.diagnostics[statistic]
    assert table.loc[3, "norm"] == pytest.approx(numbers["norm"][3], rel=1e-5)
    assert table.loc[3, "relative_norm"] == pytest.approx(numbers["norm"][3] / numbers["row_norm"][3], rel=1e-5)
    unit = vectors.of(statistic)[3] / vectors.norms(statistic)[3]
    projections = []
    for rollouts in (pos, neg):
        values = []
        for row in render_rows(model, rollouts, range(len(rollouts))):
            state = model.capture([row], [_plain_capture(statistic)])
            values.append(float(next(iter(state.values()))[0, 0] @ unit))
        projections.append(torch.tensor(values))
    a, b = projections
    expected = float((a.mean() - b.mean()) / ((a.var() + b.var()) / 2).sqrt())
    assert table.loc[3, "separation"] == pytest.approx(expected, rel=1e-3)


def _plain_capture(statistic):
    from pvsae.models import LastPrompt, SpanMean

    return {
        "response_avg_diff": SpanMean((3,), "answer"),
        "prompt_avg_diff": SpanMean((3,), "prompt"),
        "prompt_last_diff": LastPrompt((3,)),
    }[statistic]


def test_logit_difference_is_a_change_under_steering(tiny_models):
    model = tiny_models("qwen2")
    pos, neg = judged(model, "pos"), judged(model, "neg")
    vectors = extract(model, pos, neg)
    table = proxy_table(model, vectors, [2], pos=pos, neg=neg).set_index("block")

    def rows(rollouts):
        questions, answers = rollouts.table["question"], rollouts.table["answer"]
        return [model.chat.with_answer_text([{"role": "user", "content": q}], a) for q, a in zip(questions, answers, strict=True)]

    def favour(interventions):
        return float(
            answer_logprobs(model, rows(pos), interventions).mean() - answer_logprobs(model, rows(neg), interventions).mean()
        )

    add = Add(Direction(vectors.of()[2]), 2, 1.0, "all")
    assert table.loc[2, "logit_difference"] == pytest.approx(favour((add,)) - favour(()), abs=1e-5)
