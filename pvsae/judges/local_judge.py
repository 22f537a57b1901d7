"""A judge that is a loaded model: its own next-token distribution after the scoring prompt.

Knows: which tokens of a tokenizer spell numbers, and that tokenizers without a token for each number 0-100 need the tree.
Does not know: chat templates and batching (models/), nor the arithmetic of the tree (numbers.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from pvsae.errors import UserError
from pvsae.judges.base import Metric, Score
from pvsae.judges.numbers import NUMBERS, is_refusal, number_tree, spelled, to_score, whole_numbers

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from pvsae.models import ChatModel, Rendered

_ROWS = 64  # answers scored at a time: 64 rows of a 150k vocabulary are 40 MB


def number_tokens(tokenizer: Any) -> NumberTokens:
    """Look through a tokenizer's vocabulary once for the tokens that matter to a score."""
    special = set(tokenizer.all_special_ids)
    ids = [i for i in range(len(tokenizer)) if i not in special]
    texts: dict[int, str] = {}
    for i, piece in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
        if piece is None:
            continue
        # The raw piece and not the decoded text: decoding drops the leading space that SentencePiece marks.
        text = piece.decode("utf-8", "replace") if isinstance(piece, bytes) else piece
        text = text.replace("\u0120", " ").replace("\u2581", " ")
        if spelled(text, at_start=True) is not None or text[:1] in tuple("0123456789") or is_refusal(text):
            texts[i] = text
    whole = {text.strip() for text in texts.values()} >= set(NUMBERS)
    return NumberTokens(texts, whole)


@dataclass(frozen=True)
class NumberTokens:
    """Attributes:
    texts: token id -> text, of the tokens that hold digits, begin a number or begin REFUSAL.
    whole: every number 0-100 is one token, so that the first token tells the score.
    """

    texts: Mapping[int, str]
    whole: bool


class LocalJudge:
    """Scores by a `ChatModel`'s distribution over the numbers 0-100.

    Args:
        model: the judging model, as `models.load` gives it.
        name: shown in scores; the model's name if None.
        floor: beginnings of a number less likely than this are not followed (0: exact, 100 to 200 passes an answer).
            Not used where every number is one token.
        batch_size: prompts in one forward pass.
    """

    def __init__(self, model: ChatModel, *, name: str | None = None, floor: float = 0.005, batch_size: int = 16) -> None:
        self.model, self.floor, self.batch_size = model, floor, batch_size
        self.name = f"local:{name or model.name}"
        self.tokens = number_tokens(model.tokenizer)
        if not any(text.strip() in NUMBERS for text in self.tokens.texts.values()):
            raise UserError(
                f"model {model.name!r} cannot judge: its tokenizer has no token that is a number",
                "a model that can write 0 to 100",
                "choose another judge",
            )
        self._ids = sorted(self.tokens.texts)

    @classmethod
    def load(
        cls,
        name: str,
        *,
        dtype: Any = "auto",
        device: Any = "auto",
        adapter: Any = None,
        floor: float = 0.005,
        batch_size: int = 16,
    ) -> LocalJudge:
        """Load the model by name, folder or hub id.

        Raises:
            UserError: no such model, or one that has no number in its vocabulary.
        """
        from pvsae.models import load

        return cls(load(name, dtype=dtype, device=device, adapter=adapter), name=name, floor=floor, batch_size=batch_size)

    def score(self, metric: Metric, pairs: Sequence[tuple[str, str]], progress: str | None = None) -> list[Score]:
        """Scores of (question, answer) pairs, in their order. One that does not fit the model's context is of mode "failed"."""
        scores: list[Score] = []
        with tqdm(total=len(pairs), desc=progress, disable=progress is None) as bar:
            for start in range(0, len(pairs), _ROWS):
                part = pairs[start : start + _ROWS]
                scores += self._some(metric, part)
                bar.update(len(part))
        return scores

    def _some(self, metric: Metric, pairs: Sequence[tuple[str, str]]) -> list[Score]:
        scores: dict[int, Score] = {}
        prompts: dict[int, Rendered] = {}
        for i, pair in enumerate(pairs):
            try:
                prompts[i] = self.model.chat.prompt([{"role": "user", "content": metric.fill(*pair)}])
            except UserError as error:
                scores[i] = self._failed(metric, error.what)
                continue
            longest = self.model.n_ctx - 3  # the tree adds up to three tokens
            if prompts[i].n_prompt > longest:
                scores[i] = self._failed(metric, f"prompt of {prompts[i].n_prompt} tokens, the judge takes {longest}")
                del prompts[i]
        rows = list(prompts)
        full = self.model.next_token_logprobs([prompts[i] for i in rows], batch_size=self.batch_size)
        first = [self._numeric(row) for row in full]
        if self.tokens.whole:
            masses = [whole_numbers({self.tokens.texts[token]: p for token, p in row.items()}) for row in first]
        else:

            def ask(nodes: Sequence[tuple[int, tuple[int, ...]]]) -> list[Mapping[Any, float] | None]:
                longer = [_begun(prompts[rows[item]], path) for item, path in nodes]
                following: list[Mapping[Any, float] | None] = []
                for start in range(0, len(longer), _ROWS):
                    part = longer[start : start + _ROWS]
                    following += [self._numeric(row) for row in self.model.next_token_logprobs(part, batch_size=self.batch_size)]
                return following

            masses = number_tree(first, ask, self.tokens.texts.__getitem__, self.floor)
        for i, mass, row in zip(rows, masses, full, strict=True):
            scores[i] = to_score(mass, self._likeliest(row), "local", self.name, metric)
        return [scores[i] for i in range(len(pairs))]

    def _numeric(self, logprobs: Float[Tensor, " vocab"]) -> dict[Any, float]:
        return dict(zip(self._ids, logprobs[self._ids].exp().tolist(), strict=True))

    def _likeliest(self, logprobs: Float[Tensor, " vocab"]) -> dict[str, float]:
        """The likeliest first tokens as text; evidence, not part of the score."""
        top = logprobs.topk(min(20, logprobs.shape[0]))
        texts: dict[str, float] = {}
        for token, p in zip(top.indices.tolist(), top.values.exp().tolist(), strict=True):
            text = self.model.tokenizer.decode([token])
            texts[text] = texts.get(text, 0.0) + p
        return texts

    def _failed(self, metric: Metric, error: str) -> Score:
        return Score(None, "failed", None, False, (), self.name, metric.prompt_hash, error)


def _begun(prompt: Rendered, path: tuple[int, ...]) -> Rendered:
    """The prompt with the first tokens of an answer made part of it."""
    ids = prompt.ids[: prompt.n_prompt] + path
    return replace(prompt, ids=ids, n_prompt=len(ids), answer=(len(ids), len(ids)))
