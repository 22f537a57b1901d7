"""Rows: exactly the assistant's tokens are learnt, nothing is lost uncounted, the order is the seed's."""

from __future__ import annotations

from typing import Any

import pytest

from pvsae.errors import UserError
from pvsae.finetuning.rows import CUT_AWAY, EMPTY, LONG, NO_ANSWER, TRUNCATED, make_rows, order, with_system
from tests.finetuning.small import rows_of
from tests.saes.corpora import chat


def learnt(model: Any, messages: Any, **options: Any) -> list[str]:
    """The text of each span that is learnt."""
    (row,), _ = make_rows([messages], model.chat, **{"max_length": 512, **options})
    return [model.chat.decode(row.rendered.ids[start:end]) for start, end in row.learnt]


def test_answers_with_their_end_are_learnt_and_nothing_else(tiny_models) -> None:
    model = tiny_models("qwen2")
    talk = chat(3, "Be brief.", turns=3)
    answers = [m["content"] + "<|im_end|>" for m in talk if m["role"] == "assistant"]
    assert learnt(model, talk) == answers
    assert learnt(model, talk, turns="last") == answers[-1:]
    assert learnt(model, [*talk, {"role": "user", "content": "And then?"}]) == answers


def test_without_a_template_the_answer_alone_is_learnt(tiny_models) -> None:
    model = tiny_models("stories260k")
    talk = [
        {"role": "user", "content": "Tell me a story."},
        {"role": "assistant", "content": "Once upon a time there was a cat."},
    ]
    (said,) = learnt(model, talk)
    assert said.strip() == talk[1]["content"]


def test_thinking_before_an_answer_is_learnt_since_the_model_has_to_write_it(tiny_models) -> None:
    model = tiny_models("qwen2")
    talk = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "<think>Hm.</think>\n\nNobody knows."}]
    assert learnt(model, talk) == ["<think>Hm.</think>\n\nNobody knows.<|im_end|>"]


def test_every_row_is_counted(tiny_models) -> None:
    model = tiny_models("qwen2")
    long = [{"role": "user", "content": "Why? " * 40}, {"role": "assistant", "content": "It stopped. " * 40}]
    prompt_only = [{"role": "user", "content": "Why? " * 200}, {"role": "assistant", "content": "It stopped."}]
    empty = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": " \n"}]
    unanswered = [{"role": "user", "content": "Why?"}]
    chats = [chat(0), "a line that is not JSON", empty, unanswered, long, prompt_only, "a line that is not JSON", chat(1)]
    n_prompt = model.chat.conversation(long).n_prompt
    rows, counts = make_rows(chats, model.chat, max_length=n_prompt + 10)
    assert [row.number for row in rows] == [0, 4, 7]
    assert counts.read == 8
    assert counts.used == 3
    assert counts.left_out == {"a line that is not JSON": 2, EMPTY: 1, NO_ANSWER: 1, CUT_AWAY: 1}
    assert counts.examples == {"a line that is not JSON": [1, 6], EMPTY: [2], NO_ANSWER: [3], CUT_AWAY: [5]}
    assert counts.changed == {TRUNCATED: 1}
    assert counts.read == counts.used + counts.left_out.total()
    assert rows[1].learnt == ((n_prompt, n_prompt + 10),)
    assert len(rows[1].rendered.ids) == n_prompt + 10
    assert counts.learnt == sum(row.n_learnt for row in rows)
    rows, counts = make_rows(chats, model.chat, max_length=n_prompt + 10, too_long="drop")
    assert [row.number for row in rows] == [0, 7]
    assert counts.left_out[LONG] == 2
    assert not counts.changed


def test_a_chat_that_the_template_refuses_is_counted_by_its_reason(tiny_models) -> None:
    model = tiny_models("qwen2")
    rows, counts = make_rows([[{"role": "assistant", "content": "Hello."}], chat(1)], model.chat, max_length=512)
    assert counts.read == 2
    assert counts.used + counts.left_out.total() == 2
    assert len(rows) == counts.used


def test_bad_options_are_refused(tiny_models) -> None:
    model = tiny_models("qwen2")
    for options in ({"turns": "first"}, {"too_long": "keep"}, {"max_length": 1}):
        with pytest.raises(UserError):
            rows_of(model, 2, **options)


def test_an_instruction_stands_in_front() -> None:
    talk = chat(1)
    assert with_system(talk, "Be dull.") == ({"role": "system", "content": "Be dull."}, *talk)
    assert with_system(chat(1, "Be brief."), "Be dull.")[0]["content"] == "Be dull.\n\nBe brief."
    assert talk == chat(1)


def test_every_pass_sees_every_row_once_in_an_order_of_its_own() -> None:
    seen = order(10, 25, seed=3)
    assert sorted(seen[:10]) == sorted(seen[10:20]) == list(range(10))
    assert seen[:10] != seen[10:20]
    assert len(set(seen[20:])) == 5
    assert order(10, 25, seed=3) == seen
    assert order(10, 8, seed=3) == seen[:8]
    assert order(10, 25, seed=4) != seen
