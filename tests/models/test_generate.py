"""Generation: the same row gives the same text whatever its batch, cached or not, steered or not; against plain references."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    MistralConfig,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pvsae.errors import UserError
from pvsae.models import Ablate, Add, Direction, Generation, Rendered, Sampling, load
from pvsae.models.cache import RoomyLayer, keep_rows, new_cache
from pvsae.models.chatmodel import ChatModel
from pvsae.models.generate import Policy, _generation, _Row, draw, generate, policy_of, stop_ids, uniforms
from tests.conftest import make_tokenizer
from tests.models.rows import direction

TEXT = "the old clock in the kitchen stopped and nobody knows why it would do that before dark"
PLAIN = Policy(temperature=1.0, top_p=1.0, top_k=0, repetition_penalty=1.0)


def prompts_of(model: ChatModel, lengths: Sequence[int] = (3, 17, 1, 9, 30, 5)) -> list[Rendered]:
    words = TEXT.split()
    texts = [" ".join(words[(i + k) % len(words)] for k in range(n)) for i, n in enumerate(lengths)]
    return [model.chat.prompt([{"role": "user", "content": text}]) for text in texts]


@torch.no_grad()
def reference(model: ChatModel, prompt: Rendered, sampling: Sampling, key: Any, add: Add | None = None) -> Generation:
    """One row, the whole sequence run anew at every step, no padding, no cache, a plain torch hook for the steering."""
    ids = list(prompt.ids)
    limit = min(sampling.max_new_tokens, model.n_ctx - len(ids))
    stream = uniforms(sampling.seed, key, limit)
    stops, finish = stop_ids(model), "length"

    def steer(module: Any, args: Any, output: Any) -> Any:
        assert add is not None
        h = output if isinstance(output, Tensor) else output[0]
        first, last = {"prompt": (0, prompt.n_prompt), "response": (prompt.n_prompt - 1, len(ids)), "all": (0, len(ids))}[
            add.positions
        ]
        h = h.clone()
        h[:, first:last] += add.coef * add.direction.values
        return h if isinstance(output, Tensor) else (h, *output[1:])

    handle = model.blocks[add.block].register_forward_hook(steer) if add else None
    try:
        for step in range(limit):
            logits = model.hf(input_ids=torch.tensor([ids])).logits[:, -1]
            token = int(draw(logits, policy_of(model, sampling), torch.tensor(stream[step : step + 1]))[0])
            if token in stops:
                finish = "stop"
                break
            ids.append(token)
    finally:
        if handle:
            handle.remove()
    new = tuple(ids[prompt.n_prompt :])
    return Generation(new, model.chat.decode(new, special=False), finish)


@pytest.mark.parametrize("sampling", [Sampling(12, temperature=0), Sampling(12), Sampling(12, temperature=0.7, top_p=0.9)])
def test_any_batch_gives_what_one_row_gives_without_cache(tiny_model: ChatModel, sampling: Sampling) -> None:
    prompts = prompts_of(tiny_model)
    expected = [reference(tiny_model, p, sampling, i) for i, p in enumerate(prompts)]
    for batch_size in (1, 4):
        assert tiny_model.generate(prompts, sampling, batch_size=batch_size) == expected
    order = [4, 0, 5, 2, 1, 3]
    shuffled = tiny_model.generate([prompts[i] for i in order], sampling, row_keys=order, batch_size=3)
    assert shuffled == [expected[i] for i in order]


@pytest.mark.parametrize("positions", ["prompt", "response", "all"])
def test_steering_means_the_same_at_prefill_and_decode(tiny_model: ChatModel, positions: str) -> None:
    prompts, sampling = prompts_of(tiny_model, (3, 17, 9)), Sampling(12)
    add = Add(direction(tiny_model, 3), 1, 3.0, positions)
    expected = [reference(tiny_model, p, sampling, i, add) for i, p in enumerate(prompts)]
    assert tiny_model.generate(prompts, sampling, interventions=[add], batch_size=2) == expected
    with tiny_model.hooks([add]):  # a context around the call does the same
        assert tiny_model.generate(prompts, sampling) == expected
    assert tiny_model.generate(prompts, sampling) != expected


def test_strength_zero_changes_nothing(tiny_model: ChatModel) -> None:
    prompts = prompts_of(tiny_model)
    nothing = [Add(direction(tiny_model), 1, 0.0, "response"), Add(direction(tiny_model), 2, 0.0)]
    assert tiny_model.generate(prompts, Sampling(16), interventions=nothing) == tiny_model.generate(prompts, Sampling(16))


def test_greedy_is_what_hugging_face_gives(tiny_model: ChatModel) -> None:
    prompts = prompts_of(tiny_model)
    ours = tiny_model.generate(prompts, Sampling(24, temperature=0))
    for prompt, answer in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt.ids])
        theirs = tiny_model.hf.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, pad_token_id=0
        )
        new = theirs[0, prompt.n_prompt :].tolist()
        assert answer.ids == tuple(new[:-1] if new[-1] in stop_ids(tiny_model) else new)


@pytest.fixture
def qwen(tiny_models: Callable[[str], ChatModel], monkeypatch: pytest.MonkeyPatch) -> ChatModel:
    """The tiny Qwen2, whose generation_config may be changed in a test."""
    model = tiny_models("qwen2")
    config = type(model.hf.generation_config)(**model.hf.generation_config.to_dict())
    monkeypatch.setattr(model.hf, "generation_config", config)
    return model


def test_every_stop_id_ends_its_row_and_no_other(qwen: ChatModel) -> None:
    prompts = prompts_of(qwen)
    free = qwen.generate(prompts, Sampling(30))
    # Two tokens that rows produce at different steps become stop tokens.
    stops = [free[0].ids[4], free[3].ids[11]]
    qwen.hf.generation_config.eos_token_id = stops
    assert set(stops) < set(stop_ids(qwen))
    for batch_size in (6, 2, 1):
        cut = qwen.generate(prompts, Sampling(30), batch_size=batch_size)
        for long, short in zip(free, cut, strict=True):
            at = next((i for i, token in enumerate(long.ids) if token in stops), None)
            assert short.ids == long.ids[:at]
            assert short.finish == ("stop" if at is not None else long.finish)
    assert {g.finish for g in cut} == {"stop", "length"}


def test_finished_rows_leave_the_batch(qwen: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = prompts_of(qwen, tuple(range(1, 13)))
    free = qwen.generate(prompts, Sampling(30))
    qwen.hf.generation_config.eos_token_id = [free[i].ids[i] for i in range(10)]
    sizes, forward = [], qwen.forward

    def counting(batch: Any, **options: Any) -> Any:
        sizes.append((len(batch.input_ids), options["past"].get_seq_length()))
        return forward(batch, **options)

    monkeypatch.setattr(qwen, "forward", counting)
    answers = qwen.generate(prompts, Sampling(30), batch_size=12)
    wanted = [len(a.ids) + (a.finish == "stop") for a in answers]
    assert sizes[0][0] == 12
    assert sorted({n for n, _ in sizes}, reverse=True) == [n for i, (n, _) in enumerate(sizes) if i == 0 or n != sizes[i - 1][0]]
    assert sum(n for n, _ in sizes) <= sum(wanted) + 12 / 8 * len(sizes)  # at most an eighth of the work is for finished rows
    longest = max(p.n_prompt for p in prompts)
    left = [p.n_prompt for p, w in zip(prompts, wanted, strict=True) if w == len(sizes)]
    assert sizes[-1][1] < longest + len(sizes) - 2 or longest in left  # padding that no row needs is cut off


def test_the_context_ends_an_answer(qwen: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = prompts_of(qwen, (2, 6))
    short, long = (p.n_prompt for p in prompts)
    free = qwen.generate(prompts, Sampling(40, temperature=0))
    monkeypatch.setattr(qwen, "n_ctx", long + 3)
    answers = qwen.generate(prompts, Sampling(40, temperature=0))
    assert [a.ids for a in answers] == [free[0].ids[: long + 3 - short], free[1].ids[:3]]
    assert [a.finish for a in answers] == ["length", "length"]
    monkeypatch.setattr(qwen, "n_ctx", long)
    assert qwen.generate(prompts, Sampling(40))[1] == Generation((), "", "length")
    monkeypatch.setattr(qwen, "n_ctx", long - 1)
    with pytest.raises(UserError, match=f"prompt 1 has {long} tokens"):
        qwen.generate(prompts, Sampling(40))


@pytest.mark.parametrize("at_step", [0, 5])
def test_running_out_of_memory_loses_no_row(qwen: ChatModel, monkeypatch: pytest.MonkeyPatch, at_step: int) -> None:
    prompts = prompts_of(qwen, (3, 17, 1, 9, 30, 5, 8))
    qwen.hf.generation_config.eos_token_id = [qwen.generate(prompts, Sampling(20))[2].ids[2]]  # one row is done by then
    expected = qwen.generate(prompts, Sampling(20))
    assert expected[2].finish == "stop"
    forward, calls, refused = qwen.forward, [0], []

    def small_memory(batch: Any, **options: Any) -> Any:
        calls[0] = 0 if options["past"].get_seq_length() == 0 else calls[0] + 1
        if len(batch.input_ids) > 2 and calls[0] >= at_step:
            refused.append(len(batch.input_ids))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(batch, **options)

    monkeypatch.setattr(qwen, "forward", small_memory)
    assert qwen.generate(prompts, Sampling(20), batch_size=7) == expected
    assert refused
    monkeypatch.setattr(qwen, "forward", lambda *a, **k: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory")))
    with pytest.raises(UserError, match="single row"):
        qwen.generate(prompts, Sampling(20))


def test_the_models_own_settings_only_on_request(qwen: ChatModel) -> None:
    prompts = prompts_of(qwen, (3, 9))
    greedy, sampled = qwen.generate(prompts, Sampling(12, temperature=0)), qwen.generate(prompts, Sampling(12))
    qwen.hf.generation_config.update(top_k=1, repetition_penalty=1.0, do_sample=True)
    assert qwen.generate(prompts, Sampling(12)) == sampled
    assert qwen.generate(prompts, Sampling(12, use_model_config=True)) == greedy
    qwen.hf.generation_config.update(top_k=20, top_p=0.8, temperature=0.6, repetition_penalty=1.2)
    assert policy_of(qwen, Sampling(use_model_config=True)) == Policy(0.6, 0.8, 20, 1.2)
    assert policy_of(qwen, Sampling(temperature=0.3)) == Policy(0.3, 1.0, 0, 1.0)
    qwen.hf.generation_config.update(do_sample=False, top_k=None, top_p=None)
    assert policy_of(qwen, Sampling(use_model_config=True)).temperature == 0
    # Greedy with a penalty, against Hugging Face.
    qwen.hf.generation_config.update(temperature=1.0)
    for prompt, answer in zip(prompts, qwen.generate(prompts, Sampling(12, use_model_config=True)), strict=True):
        ids = torch.tensor([prompt.ids])
        theirs = qwen.hf.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, repetition_penalty=1.2, pad_token_id=0
        )
        assert tuple(theirs[0, prompt.n_prompt :].tolist())[: len(answer.ids)] == answer.ids


def test_bad_input(qwen: ChatModel) -> None:
    prompts = prompts_of(qwen, (2, 6))
    for options in ({"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(UserError, match=next(iter(options))):
            Sampling(**options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="row keys"):
        qwen.generate(prompts, Sampling(), row_keys=["a"])
    with pytest.raises(UserError, match="holds an answer"):
        qwen.generate([qwen.chat.with_answer_text(prompts[0], "Well.")], Sampling())
    huge = Direction(torch.ones(qwen.d_model))
    with pytest.raises(UserError, match="not finite"):
        qwen.generate(prompts, Sampling(4), interventions=[Add(huge, 1, 3e38), Add(huge, 2, 3e38)])
    with pytest.raises(UserError, match="block"):
        qwen.generate(prompts, Sampling(4), interventions=[Ablate(direction(qwen), 99)])
    assert qwen.generate([], Sampling()) == []


def test_thinking_is_kept_apart(qwen: ChatModel) -> None:
    prompt = prompts_of(qwen, (2,))[0]
    ids = qwen.tokenizer("<think>\nwho?\n</think>\n\nnobody", add_special_tokens=False)["input_ids"]
    row = _Row(0, prompt, np.zeros(1), 99, ids=ids, finish="stop")
    assert _generation(qwen, row) == Generation(tuple(ids), "nobody", "stop", "who?")


def test_generation_leaves_no_hooks_behind(qwen: ChatModel) -> None:
    def hooks() -> list[int]:  # transformers leaves some of its own on a model that was asked for hidden states
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in qwen.hf.modules()]

    before = hooks()
    generate(qwen, prompts_of(qwen, (2, 6)), Sampling(3), interventions=[Add(direction(qwen), 1, 1.0)])
    assert hooks() == before


def test_padding_under_eager_attention(tiny_folders: Callable[[str], Path]) -> None:
    """Models are loaded with sdpa attention where they have it; eager attention sees padding in another way."""
    model = load(tiny_folders("qwen2"), device="cpu", attn="eager")
    prompts, sampling = prompts_of(model, (1, 3, 30, 9)), Sampling(12)
    add = Add(direction(model, 3), 1, 3.0, "response")
    expected = [reference(model, p, sampling, i, add) for i, p in enumerate(prompts)]
    assert model.generate(prompts, sampling, interventions=[add], batch_size=4) == expected


def test_sliding_windows(tmp_path: Path) -> None:
    """Layers that forget: rows of one batch fill their windows at different steps."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=12, max_position_embeddings=512, initializer_range=0.2, eos_token_id=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = load(tmp_path, device="cpu")
    prompts, sampling = prompts_of(model, (1, 3, 30)), Sampling(25)
    model.hf.generation_config.eos_token_id = [reference(model, prompts[2], sampling, 2).ids[6]]
    expected = [reference(model, p, sampling, i) for i, p in enumerate(prompts)]
    assert "stop" in {g.finish for g in expected}
    assert model.generate(prompts, sampling, batch_size=3) == expected


# -- sampling -------------------------------------------------------------------------------------------------------------


def shares(logits: Tensor, policy: Policy, n: int = 20000) -> Tensor:
    """How often each token is drawn, over evenly spread uniforms."""
    spread = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    drawn = draw(logits.expand(n, -1), policy, spread)
    return torch.bincount(drawn, minlength=logits.shape[-1]) / n


def warped(logits: Tensor, temperature: float, top_p: float, top_k: int) -> Tensor:
    """The distribution that Hugging Face samples from."""
    ids = torch.zeros(1, 1, dtype=torch.long)
    scores = logits[None] / temperature
    if top_k:
        scores = TopKLogitsWarper(top_k)(ids, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(ids, scores)
    return scores.softmax(-1)[0]


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(1, 1, 0), (0.5, 1, 0), (1, 0.7, 0), (2, 0.9, 0), (1, 1, 5), (0.8, 0.8, 7)]
)
def test_draws_follow_the_distribution(temperature: float, top_p: float, top_k: int) -> None:
    logits = 2 * torch.randn(50, generator=torch.Generator().manual_seed(1))
    logits[7] = -torch.inf
    expected = warped(logits, temperature, top_p, top_k)
    found = shares(logits, Policy(temperature, top_p, top_k, 1.0))
    assert torch.all((found - expected).abs() <= 1.5 / 20000)
    assert found[7] == 0


def test_draws_at_the_edges() -> None:
    logits = torch.full((1, 4), -torch.inf)
    logits[0, 1], logits[0, 2] = 0.0, 0.0
    for u, token in ((0.0, 1), (0.4999, 1), (0.5001, 2), (1 - 1e-16, 2), (1.0, 2)):
        assert draw(logits, PLAIN, torch.tensor([u], dtype=torch.float64)).item() == token
    assert draw(torch.tensor([[0.0, torch.nan]]), PLAIN, torch.tensor([0.5])).item() == -1
    assert draw(torch.tensor([[0.0, torch.inf]]), PLAIN, torch.tensor([0.5])).item() == -1
    assert draw(torch.tensor([[0.0, torch.nan]]), Policy(0, 1, 0, 1), None).item() == -1
    assert draw(torch.tensor([[0.0, 1.0]], dtype=torch.bfloat16), Policy(0, 1, 0, 1), None).item() == 1
    flat = torch.zeros(1, 150_000)
    assert draw(flat, PLAIN, torch.tensor([1 - 2**-25])).item() >= 149_990


def test_repetition_penalty() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5, 1.9]])
    seen = torch.tensor([[True, True, False, False]])
    theirs = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([[0, 1]]), logits.clone())
    found = torch.zeros(4)
    n = 10000
    drawn = draw(logits.expand(n, -1), Policy(1.0, 1.0, 0, 1.3), (torch.arange(n) + 0.5) / n, seen.expand(n, -1))
    found = torch.bincount(drawn, minlength=4) / n
    assert torch.allclose(found, theirs.softmax(-1)[0], atol=2e-4)


def test_streams_of_uniforms() -> None:
    assert np.array_equal(uniforms(0, "a", 10), uniforms(0, "a", 1000)[:10])
    assert np.array_equal(uniforms(0, 1, 5), uniforms(0, "1", 5))
    firsts = {uniforms(seed, key, 1)[0] for seed in range(20) for key in range(50)}
    assert len(firsts) == 1000
    assert abs(np.mean([uniforms(0, key, 50).mean() for key in range(100)]) - 0.5) < 0.02
    # The stream is part of what a stored run means: these numbers must never change.
    assert uniforms(0, "row", 2).tolist() == pytest.approx(UNIFORMS_OF_ROW, abs=0)


UNIFORMS_OF_ROW = [0.1822966947502207, 0.07670560826764738]


# -- cache ----------------------------------------------------------------------------------------------------------------


def test_roomy_layers_hold_what_plain_ones_hold(qwen: ChatModel) -> None:
    roomy, plain = new_cache(qwen.hf.config), DynamicCache(config=qwen.hf.config)
    assert all(type(layer) is RoomyLayer for layer in roomy.layers)
    generator = torch.Generator().manual_seed(0)
    for step, width in enumerate((7, 1, 1, 200, 1, 150, 1)):
        k, v = torch.randn(2, len(roomy.layers[0].keys) if step else 5, 2, width, 3, generator=generator)
        for layer in range(len(roomy.layers)):
            ours, theirs = roomy.update(k, v, layer), plain.update(k, v, layer)
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert roomy.get_seq_length() == plain.get_seq_length()
        if step in (1, 4):
            rows = torch.tensor([2, 0] if step == 4 else [0, 1, 4])
            assert keep_rows(roomy, rows, 2 if step == 4 else 0) == (2 if step == 4 else 0)
            plain.batch_select_indices(rows)
            if step == 4:
                for layer in plain.layers:
                    layer.keys, layer.values = layer.keys[:, :, 2:], layer.values[:, :, 2:]
