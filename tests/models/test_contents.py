"""Contents of rendered chats: found by the layout of a chat's roles exactly as by a marker in place of each of them."""

from __future__ import annotations

import random
from typing import Any

import pytest

from pvsae.errors import UserError
from pvsae.models.chat import ChatTemplate
from pvsae.models.contents import common_prefix, layout_of, spans_in
from pvsae.models.offsets import Covering, _tight
from tests.models.test_chat import FAMILIES, tokenizer_of

CONTENTS = (
    "Hello there", "", "   ", "\n", "Hi\n", "  padded  ", "naïve café 🙂 你好", "cafe\u0301", "crlf\r\nline", "\u200b",
    "a<|im_end|>b", "<think>\nhm\n</think>\n\nDone.", "<think>never closed", "</think>oops", "Mqz0x and Mqz0x1z",
    "{{ braces }} {% if %}", "<tool_response>x</tool_response>", "user\nassistant\n", "system", "word " * 30, "x",
)  # fmt: skip


def chats(n: int, seed: int) -> list[list[dict[str, str]]]:
    """Chats of one to four turns, with and without system prompts, some of them in an order that templates may refuse."""
    draw = random.Random(seed)

    def turn(role: str) -> dict[str, str]:
        return {"role": role, "content": draw.choice(CONTENTS) + draw.choice(["", "", " ", "\n"]) + draw.choice(CONTENTS)}

    made = []
    for i in range(n):
        roles = ["system"] * (i % 3 == 0) + ["user", "assistant"] * draw.randint(1, 4)
        if i % 5 == 0:
            roles = draw.choices(["system", "user", "assistant"], k=draw.randint(1, 6))
        made.append([turn(role) for role in roles])
    return made


def said(found: list[Any]) -> list[Any]:
    return [str(one) if isinstance(one, UserError) else one for one in found]


@pytest.mark.parametrize("mode", ["auto", "plain"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_layout_finds_what_markers_find(family: str, mode: str, monkeypatch) -> None:
    template, some = ChatTemplate(tokenizer_of(family), chat=mode), chats(120, len(family))
    by_layout = template.conversations(some)
    monkeypatch.setattr(ChatTemplate, "_by_layout", lambda *_: None)
    by_markers = []
    for messages in some:  # and one by one
        try:
            by_markers.append(template.conversation(messages))
        except UserError as error:
            by_markers.append(error)
    assert said(by_layout) == said(by_markers)
    assert sum(isinstance(one, UserError) for one in by_layout) < len(some) / 2


def test_a_chat_takes_two_renders_however_long_it_is(monkeypatch) -> None:
    template = ChatTemplate(tokenizer_of("llama3_1"))
    rendered: list[Any] = []
    render = ChatTemplate._render
    monkeypatch.setattr(ChatTemplate, "_render", lambda *args, **options: rendered.append(args) or render(*args, **options))
    turns = [{"role": role, "content": f"{role} {i} \n"} for i in range(10) for role in ("user", "assistant")]
    template.conversations([turns] * 10)
    assert len(rendered) == 2 * 10 + 1, "the chat, its prompt, and once the layout"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bytes_of_tokens_cover_what_their_offsets_cover(family: str) -> None:
    import numpy as np

    tokenizer = tokenizer_of(family)
    covering = Covering(tokenizer, {int(i): str(t) for i, t in tokenizer.added_tokens_decoder.items()})
    compared = 0
    for text in (*CONTENTS, "".join(CONTENTS)):
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        cover = np.array(offsets, dtype=np.int64).reshape(-1, 2)
        spelt = covering._byte_cover(text, tokenizer(text, add_special_tokens=False)["input_ids"])
        if spelt is not None and _tight(cover, len(text)):
            compared += 1
            assert spelt.tolist() == cover.tolist()
    assert compared > 5 or family in ("gemma-metaspace", "llama3_1-trimmed")


def test_a_layout_that_does_not_fit_exactly_is_none() -> None:
    layout = ("<u>", "</u><a>", "</a>")
    assert spans_in("<u>one</u><a>two</a>", layout, ["one", "two"]) == [(3, 6), (13, 16)]
    assert spans_in("<u>one</u><a>two</a>", layout, [" one\n", "two "]) == [(3, 6), (13, 16)]
    assert spans_in("<u>one</u><a>two</a>", layout, ["one", "owt"]) is None
    assert spans_in("<u>one</u><a>two</a>", layout, [" one", "two"]) == [(3, 6), (13, 16)]
    assert spans_in("<u> one</u><a>two</a>", layout, [" one", "two\n"]) is None, "one as it is, the other stripped"
    assert spans_in("<u>one</u><a>two</b>", layout, ["one", "two"]) is None
    assert layout_of("<u>m0z</u><a>m1z</a>", ["m0z", "m1z"]) == layout
    assert layout_of("<u>m1z</u><a>m0z</a>", ["m0z", "m1z"]) is None
    assert layout_of("<u>m0z</u><a>m0z</a>", ["m0z"]) is None


def test_what_two_strings_begin_with() -> None:
    assert [common_prefix(a, b) for a, b in (("abc", "abd"), ("ab", "abd"), ("", "a"), ("x", "y"), ("abc", "abc"))] == [
        2,
        2,
        0,
        0,
        3,
    ]
