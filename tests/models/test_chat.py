"""Chat templates of four families, as small fixtures of the same behaviour: spans right to the token in each."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from pvsae.errors import UserError
from pvsae.models.chat import ChatTemplate, Rendered, opens_thinking, split_thinking
from pvsae.models.offsets import Covering

TEMPLATES = Path(__file__).parent / "templates"
CORPUS = [
    "The quick brown fox jumps over the lazy dog.\n\nThe lazy dog sleeps. What is the capital of France?\n",
    "You are a helpful assistant. Hello there, how are you? I am well.\n\nassistant user system model\n\n",
    "Zażółć gęślą jaźń 你好世界 🙂🙂 naïve café.\n\n\nHello Hello Hello\n\nHello",
]


# How today's chat models split a text before BPE: line ends keep together, whatever follows them.
LINES = r" ?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level(
    specials: list[str],
    *,
    eos: str,
    bos: str | None = None,
    trim: bool = False,
    added: tuple[str, ...] = (),
    words: str = "lines",
) -> PreTrainedTokenizerFast:
    """A tiny byte-level BPE tokenizer that itself puts `bos` in front.

    words: "lines" splits as today's chat models do; "gpt2" as GPT-2 does, where the last of several line ends goes with what
    follows; "none" splits nothing, so that tokens run over every boundary that no special token guards.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words == "gpt2")
    if words == "lines":
        core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LINES), "isolated"), core.pre_tokenizer])
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=specials)
    core.train_from_iterator(CORPUS, trainer)
    core.add_tokens(list(added))
    steps = [processors.ByteLevel(trim_offsets=trim)]
    if bos is not None:
        steps.append(processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]))
    core.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos, pad_token=eos)


def metaspace(specials: list[str], bos: str, eos: str) -> PreTrainedTokenizerFast:
    """A tiny BPE tokenizer in the manner of SentencePiece: spaces are ▁, unknown characters fall back to byte tokens."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n+"), "isolated")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokens = ["<unk>", *specials, *(f"<0x{i:02X}>" for i in range(256))]
    core.train_from_iterator(
        [c.replace(" ", "▁") for c in CORPUS[:2]], trainers.BpeTrainer(vocab_size=480, special_tokens=tokens)
    )
    core.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos, pad_token=eos, unk_token="<unk>")


def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    chatml = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    llama = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    gemma = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
    made = {
        "qwen2_5": lambda: byte_level(chatml, eos="<|im_end|>"),
        "qwen3": lambda: byte_level(chatml, eos="<|im_end|>", added=("<think>", "</think>")),
        "llama3_1": lambda: byte_level(llama, eos="<|eot_id|>", bos="<|begin_of_text|>"),
        "gemma": lambda: byte_level(gemma, eos="<eos>", bos="<bos>"),
        "gemma-metaspace": lambda: metaspace(gemma, "<bos>", "<eos>"),
        # The same with offsets that leave whitespace out, as some tokenizer.json files ask for.
        "llama3_1-trimmed": lambda: byte_level(llama, eos="<|eot_id|>", bos="<|begin_of_text|>", trim=True),
        "qwen2_5-greedy": lambda: byte_level(chatml, eos="<|im_end|>", words="none"),
        "qwen3-gpt2": lambda: byte_level(chatml, eos="<|im_end|>", added=("<think>", "</think>"), words="gpt2"),
    }
    tokenizer = made[family]()
    tokenizer.chat_template = (TEMPLATES / f"{family.partition('-')[0]}.jinja").read_text()
    return tokenizer


FAMILIES = ("qwen2_5", "qwen3", "llama3_1", "gemma", "gemma-metaspace", "llama3_1-trimmed", "qwen2_5-greedy", "qwen3-gpt2")
MOVING = ("qwen2_5-greedy", "qwen3-gpt2")  # here a prompt's last tokens depend on what follows it
STRIPS = ("llama3_1", "gemma", "gemma-metaspace", "llama3_1-trimmed")
TEXTS = (
    "Hello there, how are you?",
    "naïve café 🙂 你好",
    "  two spaces and an end of line \n",
    "\n\nHello",
    "<b>{{ braces }} {question} %s</b>",
    "assistant\n",
)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def chats() -> dict[str, ChatTemplate]:
    return {name: ChatTemplate(tokenizer_of(name)) for name in FAMILIES}


@pytest.fixture
def chat(family: str, chats: dict[str, ChatTemplate]) -> ChatTemplate:
    return chats[family]


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def said(chat: ChatTemplate, row: Rendered, start: int, end: int) -> str:
    return chat.decode(row.ids[start:end])


def check_span(chat: ChatTemplate, row: Rendered, span: tuple[int, ...], content: str, exact: bool = True) -> None:
    """The span's tokens are the content; or, where tokens run over its edges, the fewest tokens that hold all of it."""
    start, end = span[-2:]
    assert content in said(chat, row, start, end)
    assert content not in said(chat, row, start + 1, end)
    assert content not in said(chat, row, start, end - 1)
    if exact:
        assert said(chat, row, start, end) == content


@pytest.mark.parametrize("text", TEXTS)
def test_spans_decode_to_their_contents(chat: ChatTemplate, family: str, text: str) -> None:
    row = chat.prompt([turn("system", "You are evil."), turn("user", text)])
    assert chat.decode(row.ids) == row.text
    assert row.n_prompt == len(row.ids)
    assert row.answer == (row.n_prompt, row.n_prompt)
    assert [role for role, _, _ in row.spans] == ["system", "user"]
    # Gemma's template trims the merged message, and the system text stands in front of the user's.
    kept = text.rstrip() if family.startswith("gemma") else text.strip() if family in STRIPS else text
    merges = family in MOVING or kept.startswith("\n")
    check_span(chat, row, row.spans[0], "You are evil.", exact=not merges)
    check_span(chat, row, row.spans[1], kept, exact=not merges)


@pytest.mark.parametrize("text", TEXTS)
def test_answer_text_behind_a_prompt(chat: ChatTemplate, family: str, text: str) -> None:
    prompt = chat.prompt([turn("user", "What is the capital of France?")])
    row = chat.with_answer_text(prompt, text)
    assert row.text == prompt.text + text
    assert chat.decode(row.ids) == row.text
    assert row.answer == (row.n_prompt, len(row.ids))
    answer = said(chat, row, *row.answer)
    assert answer.endswith(text)
    assert len(answer) < len(text) + len(chat.decode(row.ids[row.n_prompt : row.n_prompt + 1]))
    if row.ids[: prompt.n_prompt] == prompt.ids:
        assert answer == text
        assert row.n_prompt == prompt.n_prompt
        assert row.spans == prompt.spans
    else:  # the boundary moved: a token that straddles it is the answer's first
        assert chat.decode(row.ids[: row.n_prompt]) == prompt.text.removesuffix(answer.removesuffix(text))


def test_a_merge_over_the_boundary_goes_to_the_answer(chats: dict[str, ChatTemplate]) -> None:
    for family in ("qwen2_5", "qwen2_5-greedy"):
        chat = chats[family]
        prompt = chat.prompt([turn("user", "Hello")])
        row = chat.with_answer_text(prompt, "\nHello")
        assert row.ids[: prompt.n_prompt] != prompt.ids  # the fixture does merge here; the naive boundary would be wrong
        assert chat.decode(row.ids[row.last_prompt : row.n_prompt]).endswith("assistant"[-1])
        assert said(chat, row, *row.answer) == "\n\nHello"
        check_span(chat, row, row.span("user"), "Hello", exact=family == "qwen2_5")


def test_conversation_is_prompt_and_answer(chat: ChatTemplate, family: str) -> None:
    messages = [turn("system", "Be kind."), turn("user", "Hello?"), turn("assistant", "I am well."), turn("user", "The fox?")]
    prompt = chat.prompt(messages)
    assert [role for role, _, _ in prompt.spans] == ["system", "user", "assistant", "user"]
    exact = family != "qwen2_5-greedy"
    for span, content in zip(prompt.spans, ["Be kind.", "Hello?", "I am well.", "The fox?"], strict=True):
        check_span(chat, prompt, span, content, exact)
    whole = chat.conversation([*messages, turn("assistant", "It jumps 🙂.")])
    assert whole.spans[4] == ("assistant", *whole.answer)
    check_span(chat, whole, whole.answer, "It jumps 🙂.", exact)
    assert whole.answer[1] < len(whole.ids)  # the end of the turn is there, and no part of the answer
    text = chat.with_answer_text(prompt, "It jumps 🙂.")
    assert (text.answer[0], text.n_prompt, text.spans) == (whole.answer[0], whole.n_prompt, whole.spans[:4])
    assert text.ids[: text.answer[1] - 1] == whole.ids[: whole.answer[1] - 1]
    if family not in MOVING:
        assert text.ids == whole.ids[: whole.answer[1]]
        assert whole.ids[: prompt.n_prompt] == prompt.ids
        assert (whole.n_prompt, whole.spans[:4]) == (prompt.n_prompt, prompt.spans)


def test_equal_texts_are_told_apart(chat: ChatTemplate, family: str) -> None:
    """Contents that occur elsewhere in the string: as another content, as a role name, as the template's own words."""
    for text in ("user", "assistant", "system", "a", "Hello"):
        row = chat.conversation([turn("system", text), turn("user", text), turn("assistant", text)])
        for span in row.spans:
            check_span(chat, row, span, text, exact=family != "qwen2_5-greedy")
        (_, _, s1), (_, u0, u1), (_, a0, _) = row.spans
        assert s1 < u0 < u1 < a0


def test_empty_contents(chat: ChatTemplate, family: str) -> None:
    row = chat.prompt([turn("system", ""), turn("user", "Hello")])
    _, start, end = row.spans[0]
    assert start == end
    check_span(chat, row, row.span("user"), "Hello", exact=family != "qwen2_5-greedy")
    row = chat.conversation([turn("user", "Hello"), turn("assistant", "")])
    assert row.answer[0] == row.answer[1] >= row.n_prompt


def test_answer_ids_are_kept_as_they_are(chat: ChatTemplate, family: str) -> None:
    prompt = chat.prompt([turn("user", "Hello?")])
    made = [chat.tokenizer.encode(c, add_special_tokens=False) for c in "\nI am well."]
    ids = tuple(i for part in made for i in part)  # letter by letter: not what the text would be tokenised to
    row = chat.with_answer_ids(prompt, (*ids, *chat.stop_ids[-1:]))
    assert row.ids == (*prompt.ids, *ids, *chat.stop_ids[-1:])
    assert row.answer == (prompt.n_prompt, prompt.n_prompt + len(ids))
    assert row.text.startswith(prompt.text + "\nI am well.")
    with pytest.raises(ValueError, match="none yet"):
        chat.with_answer_ids(row, ids)


@pytest.mark.parametrize("name", [family for family in FAMILIES if not family.startswith("qwen")])
def test_one_bos(chats: dict[str, ChatTemplate], name: str) -> None:
    chat = chats[name]
    bos = chat.tokenizer.bos_token_id
    row = chat.prompt([turn("user", "Hello")])
    assert chat.tokenizer(row.text)["input_ids"].count(bos) == 2  # what goes wrong without care
    assert row.ids.count(bos) == 1
    assert row.ids[0] == bos


def test_bos_that_only_the_tokenizer_wants() -> None:
    tokenizer = tokenizer_of("llama3_1")
    tokenizer.chat_template = tokenizer.chat_template.replace("bos_token ~ ", "")
    chat = ChatTemplate(tokenizer)
    row = chat.prompt([turn("user", "Hello")])
    assert row.ids[0] == tokenizer.bos_token_id
    assert row.ids.count(tokenizer.bos_token_id) == 1
    assert any("put in front" in note for note in chat.notes)
    assert not any("put in front" in note for note in ChatTemplate(tokenizer_of("llama3_1")).notes)


def test_stop_ids_hold_the_end_of_turn(chat: ChatTemplate, family: str) -> None:
    ends = {"qwen2_5": "<|im_end|>", "qwen3": "<|im_end|>", "llama3_1": "<|eot_id|>", "gemma": "<end_of_turn>"}
    end = chat.tokenizer.convert_tokens_to_ids(ends[family.partition("-")[0]])
    assert set(chat.stop_ids) == {end, chat.tokenizer.eos_token_id}


def test_qwen2_5_inserts_its_default_system_prompt(chats: dict[str, ChatTemplate]) -> None:
    default = "You are Tiny, a model made for tests. You are a helpful assistant."
    chat = chats["qwen2_5"]
    assert chat.default_system == default
    assert any(default in note for note in chat.notes)
    row = chat.prompt([turn("user", "Hello")])
    assert default in row.text
    assert row.span("system") == (0, 0)  # nobody wrote that message
    assert default not in chat.prompt([turn("system", "Be evil."), turn("user", "Hello")]).text
    for other in ("qwen3", "llama3_1", "gemma"):
        assert chats[other].default_system is None


def test_llama_dates_are_pinned() -> None:
    for name in ("llama3_1", "clock"):
        tokenizer = tokenizer_of("llama3_1")
        tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
        messages = [turn("user", "Hello")]
        rows = [ChatTemplate(tokenizer, pin_date=date).prompt(messages) for date in ("2024-07-26", "2023-01-02")]
        shown = {
            "llama3_1": ("Today Date: 26 Jul 2024\n", "02 Jan 2023"),
            "clock": ("[Friday, 26 July 2024, 00:00]\nuser", "2 January 2023"),
        }
        assert shown[name][0] in rows[0].text
        assert shown[name][1] in rows[1].text
        chat = ChatTemplate(tokenizer)
        assert chat.prompt(messages) == rows[0]
        check_span(chat, rows[0], rows[0].span("user"), "Hello", exact=name != "clock")  # "user: Hello" has a token " Hello"
    # A template that asks the clock only where no date is given is pinned both ways.
    tokenizer.chat_template = (TEMPLATES / "llama3_1.jinja").read_text().replace("date_string", "day")
    assert "Today Date: 26 Jul 2024\n" in ChatTemplate(tokenizer).prompt(messages).text
    assert any("2024-07-26" in note for note in ChatTemplate(tokenizer_of("llama3_1")).notes)
    with pytest.raises(UserError, match="not a date"):
        ChatTemplate(tokenizer, pin_date="today")


def test_qwen3_thinking_is_off_and_excluded(chats: dict[str, ChatTemplate]) -> None:
    chat = chats["qwen3"]
    assert any("thinking turned off" in note for note in chat.notes)
    prompt = chat.prompt([turn("user", "Hello?")])
    assert prompt.text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not opens_thinking(prompt)
    whole = chat.conversation([turn("user", "Hello?"), turn("assistant", "<think>\nThe user is lazy.\n</think>\n\nI am well.")])
    assert said(chat, whole, *whole.answer) == "I am well."
    assert chat.decode(whole.ids[: whole.n_prompt]) == "<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\n"
    assert "lazy" in said(chat, whole, whole.n_prompt, whole.answer[0])
    history = chat.prompt([turn("user", "Hello?"), turn("assistant", "<think>\nlazy\n</think>\n\nWell."), turn("user", "Hello?")])
    assert "lazy" not in history.text
    assert [said(chat, history, a, b) for _, a, b in history.spans] == ["Hello?", "Well.", "Hello?"]


@pytest.mark.parametrize("name", ["qwen3", "qwen2_5", "llama3_1"])  # think tokens of its own, and tags spelled out
def test_thinking_in_generated_ids_and_texts(chats: dict[str, ChatTemplate], name: str) -> None:
    chat = chats[name]
    prompt = chat.prompt([turn("user", "Hello?")])
    text = "<think>\nThe user said </think>? No.\n</think>\n\nI am well 🙂."
    for row in (
        chat.with_answer_text(prompt, text),
        chat.with_answer_ids(prompt, chat.tokenizer.encode(text, add_special_tokens=False)),
    ):
        assert said(chat, row, *row.answer) == "I am well 🙂."
        assert row.n_prompt == prompt.n_prompt
    for text in ("<think>\nThe user said", "<think>"):
        for row in (
            chat.with_answer_text(prompt, text),
            chat.with_answer_ids(prompt, chat.tokenizer.encode(text, add_special_tokens=False)),
        ):
            assert row.answer[0] == row.answer[1]


def test_a_template_that_always_opens_a_thinking_block() -> None:
    tokenizer = tokenizer_of("qwen3")
    tokenizer.chat_template = (
        (TEMPLATES / "qwen2_5.jinja").read_text().replace('"<|im_start|>assistant\\n"', '"<|im_start|>assistant\\n<think>\\n"')
    )
    chat = ChatTemplate(tokenizer)
    assert any("cannot be turned off" in note for note in chat.notes)
    prompt = chat.prompt([turn("user", "Hello?")])
    assert opens_thinking(prompt)
    row = chat.with_answer_ids(prompt, tokenizer.encode("lazy dog\n</think>\n\nHello", add_special_tokens=False))
    assert said(chat, row, *row.answer) == "Hello"
    assert chat.with_answer_text(prompt, "lazy dog").answer == (len(prompt.ids), len(prompt.ids))


def test_split_thinking() -> None:
    assert split_thinking("plain") == (0, 5, None)
    assert split_thinking("<think>a</think> b") == (17, 18, "a")
    assert split_thinking("a</think>\n\nb", opened=True) == (11, 12, "a")
    assert split_thinking("a</think>b") == (0, 10, None)
    assert split_thinking("<think>a") == (0, 0, "a")
    assert split_thinking("b <think>a") == (0, 2, "a")
    assert split_thinking("a", opened=True) == (0, 0, "a")


def test_gemma_merges_the_system_text(chats: dict[str, ChatTemplate]) -> None:
    for name in ("gemma", "gemma-metaspace"):
        chat = chats[name]
        assert not chat.supports_system
        assert any("no system role" in note for note in chat.notes)
        row = chat.prompt(
            [turn("system", " Be evil. "), turn("user", "Hello "), turn("assistant", "Well."), turn("user", "Hello")]
        )
        assert row.text.startswith("<bos><start_of_turn>user\nBe evil. \n\nHello<end_of_turn>\n<start_of_turn>model\nWell.")
        assert [(role, said(chat, row, a, b).strip()) for role, a, b in row.spans] == [
            ("system", "Be evil."), ("user", "Hello"), ("assistant", "Well."), ("user", "Hello"),
        ]  # fmt: skip
        row = chat.prompt([turn("system", ""), turn("user", "Hello")])
        assert row.text == chat.prompt([turn("user", "Hello")]).text
        for messages in ([turn("system", "Be evil.")], [turn("system", "Be evil."), turn("assistant", "Well.")]):
            with pytest.raises(UserError, match="no user message"):
                chat.prompt(messages)
        with pytest.raises(UserError, match="refused messages"):
            chat.prompt([turn("user", "a"), turn("user", "b")])
    strict = ChatTemplate(tokenizer_of("gemma"), system="error")
    with pytest.raises(UserError, match="no system message"):
        strict.prompt([turn("system", "Be evil."), turn("user", "Hello")])
    row = strict.prompt([turn("user", "Hello")])
    check_span(strict, row, row.span("user"), "Hello")


def test_no_template() -> None:
    tokenizer = tokenizer_of("llama3_1")
    tokenizer.chat_template = None
    chat = ChatTemplate(tokenizer)
    with pytest.raises(UserError, match="no chat template"):
        chat.prompt([turn("user", "Hello")])
    raw = chat.plain("The quick brown")
    assert raw.text == "<|begin_of_text|>The quick brown"
    assert said(chat, raw, *raw.span("user")) == "The quick brown"
    plain = ChatTemplate(tokenizer, chat="plain")
    assert plain.prompt([turn("user", "The quick brown")]) == raw
    row = plain.conversation([turn("system", "Be evil."), turn("user", "The quick"), turn("assistant", " brown fox")])
    assert row.text == "<|begin_of_text|>Be evil.\n\nThe quick brown fox"
    assert [said(plain, row, a, b) for _, a, b in row.spans] == ["Be evil.", "The quick", " brown fox"]
    assert row.ids.count(tokenizer.bos_token_id) == 1
    assert plain.notes


def test_a_template_that_cannot_be_trusted() -> None:
    tokenizer = tokenizer_of("qwen2_5")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content | upper }} {{ m.content | upper }}\n{% endfor %}"
    with pytest.raises(UserError, match="in one piece"):
        ChatTemplate(tokenizer).prompt([turn("user", "Hello")])


@pytest.mark.parametrize(
    "messages", ["Hello", [], [{"role": "user"}], [{"role": "user", "content": None}], {"role": "user"}, ["a"]]
)
def test_malformed_messages(chats: dict[str, ChatTemplate], messages: object) -> None:
    with pytest.raises(UserError, match=r"messages|malformed"):
        chats["qwen2_5"].prompt(messages)  # type: ignore[arg-type]


def test_a_prompt_of_another_model(chats: dict[str, ChatTemplate]) -> None:
    foreign = chats["llama3_1"].prompt([turn("user", "Hello")])
    with pytest.raises(UserError, match="not what this tokenizer makes"):
        chats["qwen2_5"].with_answer_text(foreign, "Hello")


def test_offsets_that_trim_whitespace(chats: dict[str, ChatTemplate]) -> None:
    """A tokenizer whose offsets leave whitespace out covers the same characters as one whose offsets do not."""
    text = "Hello there \n\n  the lazy dog.\n🙂 naïve\n"
    plain, trimmed = (chats[name] for name in ("llama3_1", "llama3_1-trimmed"))
    offsets = trimmed.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    (ids, cover), (same_ids, same_cover) = (Covering(c.tokenizer, {})(text) for c in (plain, trimmed))
    assert ids == same_ids
    assert cover.tolist() == same_cover.tolist()
    assert [list(o) for o in offsets] != cover.tolist()  # the tokenizer itself said something else


def test_a_row_that_is_cut_keeps_its_spans_inside_of_itself(chats: dict[str, ChatTemplate]) -> None:
    turns = [{"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "The lazy dog sleeps."}]
    row = chats["qwen2_5"].conversation([*turns, {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "I am"}])
    for length in range(2, len(row.ids)):
        cut = row.clipped(length)
        assert cut.ids == row.ids[:length]
        assert cut.n_prompt == min(row.n_prompt, length)
        for (_, *now), (_, *before) in zip((*cut.spans, ("", *cut.answer)), (*row.spans, ("", *row.answer)), strict=True):
            assert now == [min(place, length) for place in before]
    assert row.clipped(len(row.ids)) is row


def test_slow_tokenizers_are_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(UserError, match="no character offsets"):
        ChatTemplate(Slow())
