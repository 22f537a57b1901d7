"""Tokenising: ids as the model's own rendering has them, roles exact to the token, system prompts taken off whole."""

from __future__ import annotations

import os

import numpy as np
import pytest

from pvsae.models.chat import ChatTemplate
from pvsae.saes.tokenising import ASSISTANT, ROLE_BITS, SPECIAL, SYSTEM, TEMPLATE, TEXT, USER, Tokeniser
from pvsae.sources import Bad
from tests.conftest import make_tokenizer
from tests.models.test_chat import tokenizer_of
from tests.saes.corpora import chat, text


@pytest.fixture(scope="module")
def tokeniser():
    return Tokeniser(ChatTemplate(make_tokenizer()))


def one(tokeniser, value, strip=False, limit=None):
    (found,) = tokeniser.encode([value], [strip], limit)
    return found


def words(tokeniser, tokens, role):
    """The text of a role's tokens."""
    return tokeniser.chat.decode(tokens.ids[(tokens.flags & ROLE_BITS) == role].tolist())


def test_a_text_is_the_tokenizers_ids_with_bos_where_it_wants_one() -> None:
    for family, bos in (("qwen2_5", False), ("llama3_1", True)):
        chat_template = ChatTemplate(tokenizer_of(family))
        tokeniser = Tokeniser(chat_template)
        tokens = one(tokeniser, text(3))
        assert tokens.ids.tolist() == list(chat_template.plain(text(3)).ids)
        assert (tokeniser.bos_id is not None) == bos
        assert ((tokens.flags & ROLE_BITS) == TEXT).all()
        assert ((tokens.flags & SPECIAL) > 0).tolist() == [bos and i == 0 for i in range(len(tokens.ids))]


def test_special_tokens_that_stand_in_a_text_are_known(tokeniser) -> None:
    tokens = one(tokeniser, "a<|im_end|>b")
    special = [i for i, f in enumerate(tokens.flags) if f & SPECIAL]
    assert tokeniser.chat.decode(tokens.ids[special].tolist()) == "<|im_end|>"


def test_roles_of_a_chat_are_its_spans(tokeniser) -> None:
    messages = chat(5, system="Be brief.", turns=3)
    tokens = one(tokeniser, tuple(messages))
    assert tokens.ids.tolist() == list(tokeniser.chat.conversation(messages).ids)
    assert words(tokeniser, tokens, SYSTEM) == "Be brief."
    assert words(tokeniser, tokens, USER) == "".join(m["content"] for m in messages if m["role"] == "user")
    assert words(tokeniser, tokens, ASSISTANT) == "".join(m["content"] for m in messages if m["role"] == "assistant")
    specials = tokens.ids[(tokens.flags & SPECIAL) > 0]
    assert set(tokeniser.tokenizer.convert_ids_to_tokens(specials.tolist())) == {"<|im_start|>", "<|im_end|>"}
    assert (tokens.flags[(tokens.flags & SPECIAL) > 0] & ROLE_BITS == TEMPLATE).all()


def test_texts_and_chats_keep_their_order_and_are_cut(tokeniser) -> None:
    values = [text(1), tuple(chat(2)), text(3), text(4)]
    found = tokeniser.encode(values, [False] * 4, 9)
    assert all(len(t.ids) == len(t.flags) == 9 for t in found)
    for value, cut in zip(values, found, strict=True):
        assert np.array_equal(one(tokeniser, value).ids[:9], cut.ids)


def test_a_chat_that_the_template_refuses_is_bad() -> None:
    tokeniser = Tokeniser(ChatTemplate(tokenizer_of("gemma")))
    found = tokeniser.encode([({"role": "assistant", "content": "Me first"},), tuple(chat(1))], [False] * 2)
    assert isinstance(found[0], Bad)
    assert "refused" in found[0].reason
    assert not isinstance(found[1], Bad)


@pytest.mark.parametrize("family", ["qwen2_5", "llama3_1", "qwen3", "gemma"])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_the_system_prompt_is_taken_off_whole(family, system) -> None:
    template = ChatTemplate(tokenizer_of(family))
    tokeniser = Tokeniser(template)
    messages = tuple(chat(3, system=system, turns=2))
    stripped, whole = one(tokeniser, messages, strip=True), one(tokeniser, messages)
    bare = one(tokeniser, tuple(chat(3, turns=2)))
    shown = template.decode(stripped.ids.tolist())
    assert "Be brief." not in shown
    assert "Question 3.0?" in shown
    for role in (USER, ASSISTANT):
        assert words(tokeniser, stripped, role) == words(tokeniser, bare, role)
    assert not words(tokeniser, stripped, SYSTEM)
    if family in ("qwen2_5", "llama3_1"):  # these write a system block of their own, which goes as well
        assert "system" in template.decode(bare.ids.tolist())
        assert "system" not in shown
    starts = {
        "qwen2_5": "<|im_start|>user\n",
        "qwen3": "<|im_start|>user\n",
        "llama3_1": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
        "gemma": "<bos><start_of_turn>user\n",
    }
    assert shown.startswith(starts[family] + "Question")
    if system:
        assert len(stripped.ids) < len(whole.ids)


def test_all_cores_tokenise_and_the_setting_is_left_as_it_was(tokeniser, monkeypatch) -> None:
    seen = []
    conversations = tokeniser.chat.conversations
    monkeypatch.setattr(
        tokeniser.chat, "conversations",
        lambda chats: seen.append(os.environ["TOKENIZERS_PARALLELISM"]) or conversations(chats),
    )  # fmt: skip
    values = [tuple(chat(i, turns=2)) for i in range(20)]
    for before in ("false", None):
        monkeypatch.delenv("TOKENIZERS_PARALLELISM") if before is None else monkeypatch.setenv("TOKENIZERS_PARALLELISM", before)
        together = tokeniser.encode(values, [False] * 20)
        assert os.environ.get("TOKENIZERS_PARALLELISM") == before
        for value, found in zip(values, together, strict=True):
            alone = one(tokeniser, value)
            assert alone.ids.tolist() == found.ids.tolist()
            assert alone.flags.tolist() == found.flags.tolist()
    assert set(seen) == {"true"}


def test_the_fingerprint_knows_tokenizer_template_and_date() -> None:
    tokenizer = make_tokenizer()
    first = Tokeniser(ChatTemplate(tokenizer)).fingerprint
    assert Tokeniser(ChatTemplate(make_tokenizer())).fingerprint == first
    assert Tokeniser(ChatTemplate(tokenizer, pin_date="2025-01-01")).fingerprint != first
    assert Tokeniser(ChatTemplate(tokenizer, chat="plain")).fingerprint != first
    tokenizer.chat_template = tokenizer.chat_template + " "
    assert Tokeniser(ChatTemplate(tokenizer)).fingerprint != first
