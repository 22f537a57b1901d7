"""Stages that read a text through a dictionary: the options that they share, and how model, dictionary and text are found.

Knows: what a dictionary's folder says of its model and of the tokens that it is for, and what a word given as text means.
Does not know: what is read off (sae_eval.py, sae_features.py).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from pvsae.errors import UserError

if TYPE_CHECKING:
    from pvsae.models import ChatModel
    from pvsae.saes.dictionary import SAE
    from pvsae.sources import Source


@dataclass(frozen=True, kw_only=True)
class OnText:
    """Which dictionary is read on which text.

    Attributes:
        dictionary: a folder (SAELens or dictionary_learning) or "RELEASE/ID".
        text: files or patterns (.txt, .jsonl, .parquet, ...), names of Hugging Face datasets, or `Source`s; none stands for text
            of the dictionary's own training, where its folder says which that is.
        model: None takes the dictionary's own.
        adapter, dtype, device, chat: as `load` takes them.
        block: where the dictionary is read, if it does not say which block it is of.
        other_model: take a model that is not the dictionary's all the same.
        tokens: tokens that count, at least; rows are whole.
        context: tokens a row; None takes the dictionary's own, else 512, and never more than the model has.
        batch_tokens: tokens a forward pass.
        seed: of everything that is random.
    """

    dictionary: str
    text: tuple[str | Source, ...] = ()
    model: str | None = None
    adapter: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    chat: str = "auto"
    block: int | None = None
    other_model: bool = False
    tokens: int = 200_000
    context: int | None = None
    batch_tokens: int = 8192
    seed: int = 0

    NOT_IDENTITY: ClassVar[frozenset[str]] = frozenset({"batch_tokens", "other_model"})

    def __post_init__(self) -> None:
        self.require_positive("tokens", "batch_tokens")
        if self.context is not None and self.context < 1:
            raise UserError(f"context is {self.context}", "at least 1", "leave it out for the dictionary's own")
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}", "0 or more")

    def require_positive(self, *names: str) -> None:
        """UserError where one of these options is below 1."""
        for name in names:
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}", "at least 1")

    def identity(self) -> dict[str, Any]:
        """The options that the numbers depend on; a run folder is resumed only under the same ones."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in self.NOT_IDENTITY}

    def open(self, model: ChatModel | None = None) -> tuple[ChatModel, SAE]:
        """The model (the given one, else the config's, else the dictionary's), and the dictionary in its memory.

        Raises: UserError where there is no such dictionary or model, nothing names a model, the two do not fit, or (without
            `other_model`) the dictionary is of another model.
        """
        from pvsae.models import load as load_model
        from pvsae.saes.folders import load

        if model is None:
            name, adapter, chat = self._model_of(load(self.dictionary))
            model = load_model(name, adapter=adapter, dtype=self.dtype, device=self.device, chat=chat)
        sae = load(self.dictionary, device=model.device).in_memory().check_model(model)
        return model, sae.check_trained_on(model.name, self.other_model)

    def _model_of(self, sae: SAE) -> tuple[str, str | None, str]:
        """Name, adapter and chat mode: the config's, else those of the dictionary's training. UserError without a name."""
        own = sae.info.training.get("model") or {"name": sae.info.model}  # only our own trainings say more than a name
        if self.model is not None:
            own = {"name": self.model}
        if own["name"] is None:
            raise UserError(f"{self.dictionary} does not say which model it is of", "a model", "--model NAME")
        chat = self.chat if self.chat != "auto" else own.get("chat", "auto")
        return own["name"], self.adapter or own.get("adapter"), chat

    def context_of(self, sae: SAE, model: ChatModel) -> int:
        """Tokens a row."""
        return min(self.context or sae.info.context_size or 512, model.n_ctx)

    def sources(self) -> tuple[Source, ...]:
        """The text that was given."""
        return tuple(source_of(text) for text in self.text)


def masks_of(sae: SAE) -> dict[str, Any]:
    """Which tokens of any text the dictionary is for, as options of a corpus."""
    trained = sae.info.training.get("corpus", {})
    found = {name: trained[name] for name in ("tokens", "skip_special") if name in trained}
    return {"drop_first": sae.info.drop_first, **found}


def source_of(text: str | Source) -> Source:
    """As it is, or what the word stands for."""
    from pvsae import sources

    return sources.source_of(text) if isinstance(text, str) else text
