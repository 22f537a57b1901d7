from __future__ import annotations

import pytest

from pvsae.screening.rows import EMPTY, MALFORMED, NO_ANSWER, OK, PROMPT_TOO_LONG, prepare
from pvsae.sources import Bad

USER = {"role": "user", "content": "What of rain?"}


@pytest.fixture(scope="module")
def model(tiny_models):
    return tiny_models("qwen2")


def says(text: str) -> dict:
    return {"role": "assistant", "content": text}


def test_every_row_gets_a_status_and_a_reason(model) -> None:
    values = [
        (USER, says("It falls.")),
        Bad("a line that is not JSON"),
        (USER,),
        (says("Hello."), USER),
        (USER, says("  \n ")),
        (USER, says("<think>Only this.")),
        ({"role": "user", "content": "long " * 600}, says("It falls.")),
        "a text",
    ]
    rows = prepare(model.chat, values, model.n_ctx)
    assert [r.status for r in rows] == [OK, MALFORMED, NO_ANSWER, NO_ANSWER, EMPTY, EMPTY, PROMPT_TOO_LONG, MALFORMED]
    assert all(bool(r.reason) != (r.status == OK) for r in rows)
    assert rows[1].reason == "a line that is not JSON"
    assert all(r.whole is None and r.prompt is None for r in rows[1:])


def test_a_long_answer_is_cut_to_what_fits_and_says_how_much_is_missing(model) -> None:
    (whole,) = prepare(model.chat, [(USER, says("rain " * 40))], model.n_ctx)
    start, end = whole.whole.answer
    (cut,) = prepare(model.chat, [(USER, says("rain " * 40))], start + 5)
    assert cut.status == OK
    assert cut.whole.answer == (start, start + 5)
    assert cut.whole.ids == whole.whole.ids[: start + 5]
    assert (whole.cut, cut.cut) == (0, end - start - 5)
    (none,) = prepare(model.chat, [(USER, says("rain " * 40))], start)
    assert none.status == PROMPT_TOO_LONG


def test_the_key_is_the_prompt_and_nothing_else(model) -> None:
    other = {"role": "user", "content": "What of snow?"}
    a, b, c = prepare(model.chat, [(USER, says("It falls.")), (USER, says("No.")), (other, says("No."))], model.n_ctx)
    assert a.key == b.key != c.key
    assert a.prompt.ids == model.chat.prompt([USER]).ids
