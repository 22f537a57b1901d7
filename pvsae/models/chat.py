"""Chat templates: from messages to token ids with spans that are exact to the token.

Knows: that the rendered string is the truth. It is rendered once by the tokenizer's own template, tokenised once without
further special tokens, and every boundary is a character position in that string, carried over to tokens by their
offsets. Nothing here assumes that a prompt's tokens are a prefix of the whole conversation's tokens.
Does not know: models, batches, padding, or what the spans are used for.

How a message's content is found: the template is rendered again with that one content replaced by a marker that occurs
nowhere else. What stands left and right of the marker must stand, character for character, at both ends of the real
string; the content is what is between. So equal texts in two messages, stripped whitespace, and dates or default system
prompts that a template adds on its own cannot mislead it, and a template that does anything else ends in a clear error.

Boundary rules, used everywhere: a content span holds every token that overlaps the content; a token that straddles the
end of the prompt and the start of the answer belongs to the answer; thinking (`<think>...</think>`) and the whitespace
behind it are in no answer span.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

from jinja2.exceptions import TemplateError

from pvsae.errors import UserError
from pvsae.models.clock import date_string, with_pinned_clock
from pvsae.models.contents import (
    Layout,
    Message,
    Piece,
    all_marked,
    between,
    common_prefix,
    layout_of,
    marker_for,
    messages_of,
    spans_in,
)
from pvsae.models.offsets import Cover, Covering, first_beyond, overlapping, token_spans

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"


@dataclass(frozen=True)
class Rendered:
    """One tokenised chat with its spans; all positions are token indices into `ids`, spans are half-open.

    Attributes:
        ids: the token ids, special tokens included.
        n_prompt: tokens [0, n_prompt) are the prompt, the generation prompt (assistant header) included.
        answer: span of the answer's content, without end-of-turn token and thinking; (n_prompt, n_prompt) if there is none.
        spans: (role, start, end) of every message's content, in order.
        text: the rendered string that `ids` encode.
    """

    ids: tuple[int, ...]
    n_prompt: int
    answer: tuple[int, int]
    spans: tuple[tuple[str, int, int], ...]
    text: str

    @property
    def last_prompt(self) -> int:
        """Index of the last prompt token, at which the answer's first token is predicted."""
        return self.n_prompt - 1

    def span(self, name: str) -> tuple[int, int]:
        """Token span of "prompt", "answer", "all", or the last message of that role ("system", "user", ...); (0, 0) if none."""
        if name == "prompt":
            return 0, self.n_prompt
        if name == "answer":
            return self.answer
        if name == "all":
            return 0, len(self.ids)
        for role, start, end in reversed(self.spans):
            if role == name:
                return start, end
        return 0, 0

    def clipped(self, length: int) -> Rendered:
        """The first `length` tokens, with all spans cut there; itself where it is no longer. The text is left as it was."""
        if len(self.ids) <= length:
            return self
        start, end = self.answer
        return replace(
            self,
            ids=self.ids[:length],
            n_prompt=min(self.n_prompt, length),
            answer=(min(start, length), min(end, length)),
            spans=tuple((role, min(first, length), min(last, length)) for role, first, last in self.spans),
        )


def split_thinking(text: str, opened: bool = False) -> tuple[int, int, str | None]:
    """Where the answer proper lies in an assistant text.

    Args:
        text: what the assistant wrote.
        opened: the prompt itself already opened the thinking block, so that only its end occurs in `text`.

    Returns:
        (start, end, thinking): the answer is text[start:end]; thinking is None where there was none. The answer is what
        follows the last `</think>`, whitespace skipped. A block that is never closed (cut off by the length limit) leaves
        what stood before it, mostly nothing.
    """
    open_at, close_at = text.find(THINK_OPEN), text.rfind(THINK_CLOSE)
    inside = 0 if opened else open_at + len(THINK_OPEN)
    if not opened and open_at < 0:
        return 0, len(text), None
    if close_at < inside:
        end = 0 if opened or not text[:open_at].strip() else open_at
        return 0, end, text[inside:].strip()
    start = close_at + len(THINK_CLOSE)
    start += len(text[start:]) - len(text[start:].lstrip())
    return start, len(text), text[inside:close_at].strip()


def opens_thinking(prompt: Rendered) -> bool:
    """True where the prompt ends inside a thinking block, so that the model starts by thinking."""
    return prompt.text.rstrip().endswith(THINK_OPEN)


class ChatTemplate:
    """A tokenizer's chat template with exact spans.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        chat: "auto" uses the tokenizer's template; "plain" uses none: the contents, joined by blank lines, are the prompt
            and the answer follows at once. For models without a template.
        pin_date: ISO date that templates see as today, so that a run repeats on another day.
        system: what to do with a system message where the template refuses one: "merge" puts its text in front of the next
            user message, a blank line between (said in `notes`); "error" raises a UserError.

    Attributes:
        notes: what the template did on its own, or what was done in its place; to be stored with every run.
        supports_system: whether the template itself takes a system message.
        default_system: the system prompt that the template writes where no system message is given, or None.
    """

    def __init__(self, tokenizer: Any, *, chat: str = "auto", pin_date: str = "2024-07-26", system: str = "merge") -> None:
        if chat not in ("auto", "plain"):
            raise UserError(f"unknown chat mode {chat!r}", 'chat="auto" or chat="plain"')
        if system not in ("merge", "error"):
            raise UserError(f"unknown system mode {system!r}", 'system="merge" or system="error"')
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"{type(tokenizer).__name__} gives no character offsets, so spans cannot be exact",
                "a fast tokenizer (a tokenizer.json in the model folder)",
                "convert it once with transformers' AutoTokenizer and save_pretrained",
            )
        self.tokenizer, self.mode, self.system_mode = tokenizer, chat, system
        try:
            self.date = datetime.date.fromisoformat(pin_date)
        except ValueError as error:
            raise UserError(f"pin_date {pin_date!r} is not a date", "an ISO date such as 2024-07-26") from error
        self._added = {int(i): str(token) for i, token in tokenizer.added_tokens_decoder.items()}
        self._tokenise = Covering(tokenizer, self._added)
        self._template: str | None = None
        if chat == "auto" and getattr(tokenizer, "chat_template", None):
            template = tokenizer.get_chat_template()
            self._template = with_pinned_clock(template, self.date) if "strftime_now" in template else template
        bos = tokenizer.bos_token_id
        # What the tokenizer would put in front of a text. Templates mostly write it themselves; never both.
        self._bos = tokenizer.bos_token if bos is not None and bos in tokenizer("x")["input_ids"][:1] else ""
        self._layout = lru_cache(maxsize=1024)(self._layout_of)
        self.supports_system, self.default_system, self.notes = self._probe()

    # -- public -------------------------------------------------------------------------------------------------------

    def prompt(self, messages: Sequence[Message]) -> Rendered:
        """Messages with the assistant header behind them: what a model is given before it answers.

        Raises:
            UserError: no template (and not chat="plain"), a malformed message, or messages that the template refuses.
        """
        text, spans = self._locate(_checked(messages), generation=True)
        ids, cover = self._tokenise(text)
        return Rendered(ids, len(ids), (len(ids), len(ids)), token_spans(cover, spans, len(ids)), text)

    def conversation(self, messages: Sequence[Message]) -> Rendered:
        """A whole chat, end-of-turn tokens included. If its last message is the assistant's, that one is the answer.

        `n_prompt` is where the string of the messages before it, rendered with the generation prompt, ends. Where the
        answer brings thinking of its own, the prompt ends before that.
        """
        (found,) = self.conversations([messages])
        if isinstance(found, UserError):
            raise found
        return found

    def conversations(self, chats: Sequence[Sequence[Message]]) -> list[Rendered | UserError]:
        """`conversation` of each chat, or the error it would raise; many are tokenised faster together than one by one."""
        located: list[tuple[str, list[tuple[str, int, int]], int | None] | UserError] = []
        for messages in chats:
            try:
                located.append(self._conversation(_checked(messages)))
            except UserError as error:
                located.append(error)
        tokens = iter(self._tokenise.all([one[0] for one in located if not isinstance(one, UserError)]))
        return [one if isinstance(one, UserError) else _with_spans(*one, *next(tokens)) for one in located]

    def with_answer_ids(self, prompt: Rendered, ids: Iterable[int]) -> Rendered:
        """The prompt followed by exactly these token ids, as they were generated. Stop tokens at the end and thinking are
        in `ids` but in no answer span. `prompt.ids` are kept as they are: nothing is tokenised again."""
        _require_prompt(prompt)
        new = tuple(int(i) for i in ids)
        n, end = prompt.n_prompt, len(new)
        while end and new[end - 1] in self.stop_ids:
            end -= 1
        text, opened = self.decode(new), opens_thinking(prompt)
        # Only an answer that thinks is decoded again, without its end of turn.
        start, stop = self.answer_tokens(new[:end], opened) if opened or THINK_OPEN in text else (0, end)
        return Rendered(prompt.ids + new, n, (n + start, n + stop), prompt.spans, prompt.text + text)

    def with_answer_text(self, prompt: Rendered | Sequence[Message], text: str) -> Rendered:
        """The prompt's string followed by `text`, tokenised together, with nothing behind it.

        Tokens may merge over the boundary; such a token belongs to the answer, and the prompt ends before it.
        """
        rendered = prompt if isinstance(prompt, Rendered) else self.prompt(prompt)
        _require_prompt(rendered)
        ids, cover = self._tokenise(rendered.text)
        if ids != rendered.ids:
            raise UserError(
                "the prompt's ids are not what this tokenizer makes of its text",
                "a prompt rendered by the same model",
                "render the messages again with this model's chat.prompt",
            )
        spans = [(role, int(cover[start, 0]), int(cover[end - 1, 1])) for role, start, end in rendered.spans if end > start]
        empty = [(role, 0, 0) for role, start, end in rendered.spans if end == start]
        boundary = len(rendered.text)
        ids, cover = self._tokenise(rendered.text + text)
        n_prompt = first_beyond(cover, boundary)
        start, end, _ = split_thinking(text, opens_thinking(rendered))
        first, last = overlapping(cover, boundary + start, boundary + end)
        tokens = iter(token_spans(cover, spans, n_prompt))
        blank = iter(empty)
        ordered = tuple(next(tokens) if end > start else next(blank) for _, start, end in rendered.spans)
        return Rendered(ids, n_prompt, (max(first, n_prompt), max(last, n_prompt)), ordered, rendered.text + text)

    def plain(self, text: str) -> Rendered:
        """A raw text as the prompt, no template at all (with the BOS token if the tokenizer wants one)."""
        ids, cover = self._tokenise(self._bos + text)
        spans = [("user", len(self._bos), len(self._bos) + len(text))]
        return Rendered(ids, len(ids), (len(ids), len(ids)), token_spans(cover, spans, len(ids)), self._bos + text)

    def decode(self, ids: Iterable[int], *, special: bool = True) -> str:
        """Text of ids, exactly; without special tokens if `special` is False."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False)
        return str(text)

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an assistant turn: the tokenizer's EOS, and the special token that the template writes after an answer."""
        stops = set() if self.tokenizer.eos_token_id is None else {int(self.tokenizer.eos_token_id)}
        if self._template is not None:
            try:
                probe = self.conversation(({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}))
            except UserError:
                return tuple(sorted(stops))
            behind = [i for i in probe.ids[probe.answer[1] :] if self.decode((i,)).strip()]
            stops |= {i for i in behind[:1] if i in self._added}
        return tuple(sorted(stops))

    # -- rendering ----------------------------------------------------------------------------------------------------

    def _render(self, messages: Sequence[Message], generation: bool, date: datetime.date | None = None, **options: Any) -> str:
        """The template's string for these messages, with exactly one BOS where the tokenizer wants one."""
        if self._template is None:
            raise UserError(
                "this model has no chat template",
                "a tokenizer with a chat template",
                'load the model with chat="plain", which gives it the raw text as prompt',
            )
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(m) for m in messages],
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=generation,
                date_string=date_string(date or self.date),
                **{"enable_thinking": False, **options},
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            roles = [m["role"] for m in messages]
            raise UserError(
                f"the model's chat template refused messages with the roles {roles}: {error}",
                "messages that this template can render",
                "see the template's own rules (alternating user and assistant turns, the user first, are always safe)",
            ) from error
        return text if not self._bos or text.startswith(self._bos) else self._bos + text

    def _pieces(self, messages: Sequence[Message]) -> list[Piece]:
        """Messages as the template will see them, with system texts merged into user turns where that has to be."""
        pieces: list[Piece] = []
        waiting: list[str] = []
        index = 0
        for message in messages:
            role, content = message["role"], message["content"]
            if role == "system" and not self.supports_system:
                if self.system_mode == "error":
                    raise UserError(
                        "this model's chat template takes no system message",
                        "messages without a system role",
                        'put the text into the first user message, or use system="merge" to have that done',
                    )
                waiting.append(content)
                continue
            if waiting and role != "user":
                raise UserError(
                    "a system message is followed by no user message, and the template has no system role to merge into",
                    "a user message after each system message",
                )
            pieces += [Piece(index, "system", "", text, "\n\n" if text.strip() else "") for text in waiting]
            waiting = []
            start, end, _ = split_thinking(content) if role == "assistant" else (0, len(content), None)
            pieces.append(Piece(index, role, content[:start], content[start:end], content[end:]))
            index += 1
        if waiting:
            raise UserError("there is a system message but no user message after it", "at least one user message")
        return pieces

    def _locate(self, messages: Sequence[Message], generation: bool) -> tuple[str, list[tuple[str, int, int]]]:
        """The rendered string and the character span of every message's content, by marker renders (see the module's head)."""
        if self.mode == "plain":
            return self._joined(messages, generation)
        pieces = self._pieces(messages)
        text = self._render(messages_of(pieces), generation)
        found = self._by_layout(pieces, text, generation)
        if found is not None:
            return text, [(piece.role, *span) for piece, span in zip(pieces, found, strict=True)]
        marker = marker_for(self._template or "", messages)
        spans = []
        for i, piece in enumerate(pieces):
            marked = self._render(messages_of(pieces, i, marker), generation).split(marker)
            span = between(text, marked, piece.body)
            if span is None:
                raise UserError(
                    f"the chat template does not keep the {piece.role} message in one piece, so its tokens cannot be told apart",
                    "a template that writes each content once, at most with whitespace stripped",
                    f"look at what it makes of it: {text[:300]!r}",
                )
            spans.append((piece.role, *span))
        return text, spans

    def _by_layout(self, pieces: Sequence[Piece], text: str, generation: bool) -> list[tuple[int, int]] | None:
        """The spans by the layout that chats with these roles have, without a render a message; None where it does not fit.

        What is left out of a message as thinking is in no layout, and what a template makes of one content may depend on it.
        """
        if any(piece.before or piece.after not in ("", "\n\n") for piece in pieces):
            return None
        layout = self._layout(tuple((piece.message, piece.role, piece.after) for piece in pieces), generation)
        return None if layout is None else spans_in(text, layout, [piece.body for piece in pieces])

    def _layout_of(self, shape: tuple[tuple[int, str, str], ...], generation: bool) -> Layout | None:
        messages, markers = all_marked(
            [Piece(i, role, "", "", after) for i, role, after in shape], marker_for(self._template or "", ())
        )
        try:
            return layout_of(self._render(messages, generation), markers)
        except UserError:  # refused for what is in them
            return None

    def _joined(self, messages: Sequence[Message], generation: bool) -> tuple[str, list[tuple[str, int, int]]]:
        """Plain mode: contents joined by blank lines; a last assistant message follows its prompt at once."""
        text, spans = self._bos, []
        for i, message in enumerate(messages):
            is_answer = not generation and i == len(messages) - 1 and message["role"] == "assistant"
            text += "" if i == 0 or is_answer else "\n\n"
            content = message["content"]
            start, end, _ = split_thinking(content) if message["role"] == "assistant" else (0, len(content), None)
            spans.append((message["role"], len(text) + start, len(text) + end))
            text += content
        return text, spans

    def _conversation(self, messages: Sequence[Message]) -> tuple[str, list[tuple[str, int, int]], int | None]:
        """The string of a chat, its contents' spans, and where its prompt ends; None where its last message is no answer."""
        text, spans = self._locate(messages, generation=False)
        if messages[-1]["role"] != "assistant" or len(messages) < 2:
            return text, spans, None
        return text, spans, self._prompt_end(messages[:-1], text, spans[-1][1])

    def _prompt_end(self, before: Sequence[Message], whole: str, answer_start: int) -> int:
        """Character position in `whole` at which the prompt of its last message ends."""
        if self.mode == "plain":
            return len(self._joined(before, generation=True)[0])
        prompt = self._render(messages_of(self._pieces(before)), generation=True)
        common = common_prefix(prompt, whole)
        if common < len(prompt):
            # The answer thinks, and the generation prompt holds a closed empty block instead: end before the block.
            think = whole.rfind(THINK_OPEN, 0, answer_start)
            common = min(common, think) if think >= 0 else common
        return min(common, answer_start)

    def _probe(self) -> tuple[bool, str | None, tuple[str, ...]]:
        """What the template does on its own, found by rendering: (takes a system role, default system prompt, notes)."""
        if self.mode == "plain":
            return True, None, ("no chat template used: contents are joined by blank lines and the answer follows at once",)
        if self._template is None:
            return True, None, ("the tokenizer has no chat template",)
        system, user = marker_for(self._template, (), "S"), marker_for(self._template, (), "U")
        alone = [{"role": "user", "content": user}]
        notes, default, supports = [], None, False
        try:
            without = self._render(alone, True)
        except UserError as error:
            return True, None, (f"the template refused a single user message: {error.what}",)
        try:
            both = self._render([{"role": "system", "content": system}, *alone], True)
            supports = both.count(system) == 1 and both.count(user) == 1
        except UserError:
            pass
        if not supports:
            how = "is merged into the next user message" if self.system_mode == "merge" else "is refused"
            notes.append(f"the template takes no system role: a system message {how}")
        else:
            default = _inserted(without, *both.partition(user)[0].partition(system)[::2], user) if user in without else None
            if default:
                notes.append(f"without a system message the template inserts its default system prompt: {default!r}")
        if without != self._render(alone, True, date=self.date + datetime.timedelta(days=401)):
            notes.append(f"the template writes today's date: pinned to {self.date.isoformat()}")
        if without != self._render(alone, True, enable_thinking=True):
            notes.append("thinking turned off (enable_thinking=False)")
        if without.rstrip().endswith(THINK_OPEN):
            notes.append("the template opens a thinking block that cannot be turned off: thinking is kept out of answer spans")
        if self._bos and not self.tokenizer.apply_chat_template(
            alone, chat_template=self._template, tokenize=False, add_generation_prompt=True
        ).startswith(self._bos):
            notes.append(f"the tokenizer's {self._bos!r}, which the template does not write, is put in front")
        return supports, default, tuple(notes)

    # -- tokens -------------------------------------------------------------------------------------------------------

    def answer_tokens(self, ids: Sequence[int], opened: bool) -> tuple[int, int]:
        """Token span of the answer proper among generated ids."""
        text = self.decode(ids)
        start, end, thinking = split_thinking(text, opened)
        if thinking is None:
            return 0, len(ids)
        if start == 0:
            # Never closed: the answer is what stood before the block, in whole tokens.
            return 0, 0 if end == 0 else _bisect(len(ids), lambda k: THINK_OPEN in self.decode(ids[:k])) - 1
        closes = text.count(THINK_CLOSE)
        first = _bisect(len(ids), lambda k: self.decode(ids[:k]).count(THINK_CLOSE) == closes)
        while first < len(ids) and not self.decode((ids[first],)).strip():
            first += 1
        return first, len(ids)


# -- helpers without state ------------------------------------------------------------------------------------------------


def _checked(messages: Sequence[Message]) -> Sequence[Message]:
    """The messages, if they are a non-empty list of {"role": str, "content": str}."""
    shape = 'a list of messages, each {"role": "system"|"user"|"assistant", "content": text}'
    if isinstance(messages, (str, Mapping)) or not len(messages):
        raise UserError(f"these are not messages: {messages!r:.80}", shape)
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise UserError(f"message {i} is malformed: {message!r:.120}", shape)
    return messages


def _with_spans(
    text: str, spans: Sequence[tuple[str, int, int]], boundary: int | None, ids: tuple[int, ...], cover: Cover
) -> Rendered:
    """A tokenised chat; `boundary` is where its prompt ends, None if it ends without an answer."""
    if boundary is None:
        return Rendered(ids, len(ids), (len(ids), len(ids)), token_spans(cover, spans, len(ids)), text)
    _, start, end = spans[-1]
    n_prompt = first_beyond(cover, boundary)
    tokens = token_spans(cover, spans[:-1], n_prompt)
    first, last = overlapping(cover, start, end)
    answer = (max(first, n_prompt), max(last, n_prompt))
    return Rendered(ids, n_prompt, answer, (*tokens, ("assistant", *answer)), text)


def _require_prompt(rendered: Rendered) -> None:
    if len(rendered.ids) != rendered.n_prompt:
        raise ValueError("an answer can only be put behind a prompt that has none yet")


def _inserted(text: str, before: str, after: str, user: str) -> str | None:
    """What stands in place of the system message in a render without one, if its header is there all the same."""
    head = text.partition(user)[0]
    if head.startswith(before) and head.endswith(after) and len(head) > len(before) + len(after):
        return head[len(before) : len(head) - len(after)]
    return None


def _bisect(n: int, holds: Any) -> int:
    """Smallest k in [0, n] for which a monotone condition holds; n if it never does."""
    low, high = 0, n
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low
