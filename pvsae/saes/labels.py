"""Labels of features, written by a language model and scored by whether they foretell activations on text it did not see.

Knows: the prompts, how replies are read, and the two scores: detection (is the feature active in this passage?) and fuzzing (are
these the tokens at which it is active?), after EleutherAI's delphi (arXiv 2410.13928): 40 passages to label from and 50 to score
on, spread over 10 quantiles of activation, and as many in which the feature is silent. Prompts are our own.
Does not know: servers (llm.py), models, where passages come from (evidence.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np

from pvsae.llm import ChatClient, Reply, Request
from pvsae.saes.evidence import Evidence, Example

ACTIVE = 0.3  # share of a passage's highest activation from which a token is marked
AT_ONCE = 5  # passages in a question
LABEL_TOKENS, ANSWER_TOKENS = 500, 100  # most tokens of a reply
_LABEL = """A unit inside a language model is silent at most tokens of a text and active at some. Below are passages in which
it is active. Tokens at which it is active stand between << and >>; under each passage they are listed with how strongly, from
1 to 10.

What do these tokens, or the text in front of them, have in common? Look at the strongest first, then check that the weaker
ones fit. Be as narrow as the passages allow: name the words, the topic, the tone or the place in the sentence if that is what
they share. Say nothing about the marks. End with one line of this form, of at most fifteen words:
LABEL: what the unit stands for"""
_DETECT = """A unit inside a language model is said to stand for: {label}

Below are {n} numbered passages. For each of them, judge whether the unit is active somewhere in it: 1 if it is, 0 if it is not.
Some, all or none may be. Answer with {n} digits, in order, separated by commas, and nothing else."""
_FUZZ = """A unit inside a language model is said to stand for: {label}

Below are {n} numbered passages with some tokens between << and >>. For each passage, judge whether the marked tokens are the
ones at which such a unit is active: 1 if they are, 0 if the marks stand at wrong places. Some, all or none may be right. Answer
with {n} digits, in order, separated by commas, and nothing else."""


class Passage(NamedTuple):
    """A stretch of text: the text of each token, and the activation at it."""

    tokens: tuple[str, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Material:
    """What the label of one feature is made from and scored on; no document is in two of the three.

    Attributes:
        latent: the feature.
        train: passages that are shown for the label.
        test: passages that are kept for the scores.
        quiet: passages in which the feature is silent.
    """

    latent: int
    train: tuple[Passage, ...]
    test: tuple[Passage, ...]
    quiet: tuple[Passage, ...]


@dataclass(frozen=True)
class Score:
    """Answers to questions of yes and no. NaN where a kind has no answer.

    Attributes:
        hits, yes: right answers, and all answers, where yes was right.
        rejections, no: the same where no was right.
        unanswered: passages to which there is no answer that can be read.
    """

    hits: int
    yes: int
    rejections: int
    no: int
    unanswered: int

    @property
    def balanced_accuracy(self) -> float:
        """Mean of both shares of right answers; 0.5 is guessing."""
        return (self.hits / self.yes + self.rejections / self.no) / 2 if self.yes and self.no else float("nan")


@dataclass(frozen=True)
class Label:
    """What a feature is said to stand for, and how well that foretells it.

    Attributes:
        text: the label; None where there is none.
        problem: why there is none.
        detection, fuzzing: None without a label.
        train, test, quiet: passages there were.
    """

    latent: int
    text: str | None
    problem: str | None
    detection: Score | None
    fuzzing: Score | None
    train: int
    test: int
    quiet: int


def quantiles(sample: Sequence[Example], n: int) -> list[list[Example]]:
    """A sample in at most n groups of equal size by activation, the strongest first."""
    ranked = sorted(sample, key=lambda e: (-e.value, e.document))
    return [
        [ranked[i] for i in some] for some in np.array_split(np.arange(len(ranked)), max(1, min(n, len(ranked)))) if len(some)
    ]


def split(
    sample: Sequence[Example], *, n_quantiles: int, train: int, test: int, seed: int, latent: int
) -> tuple[list[Example], list[Example]]:
    """Examples to label from and to score on: of each quantile the same number, and where there are too few, in proportion."""
    groups = quantiles(sample, n_quantiles)
    if not groups:
        return [], []
    generator = np.random.default_rng((seed, latent))
    first: list[Example] = []
    second: list[Example] = []
    for group in groups:
        order = [group[i] for i in generator.permutation(len(group))]
        n_train, n_test = -(-train // len(groups)), -(-test // len(groups))
        if len(order) < n_train + n_test:  # a fair share; a single one goes now to one side, now to the other
            share = len(order) * n_train / (n_train + n_test)
            n_train = int(share) + int(generator.random() < share % 1)
            n_test = len(order) - n_train
        first += order[:n_train]
        second += order[n_train : n_train + n_test]
    return first[:train], second[:test]


def material(
    evidence: Evidence,
    slot: int,
    sample: Sequence[Example],
    passage: Callable[[Example], Passage],
    *,
    n_quantiles: int = 10,
    train: int = 40,
    test: int = 50,
) -> Material:
    """What the label of a feature is made from.

    Args:
        slot: the feature.
        sample: its even sample of firings.
        passage: the text of an example.
    """
    latent = int(evidence.latents[slot])
    first, second = split(sample, n_quantiles=n_quantiles, train=train, test=test, seed=evidence.seed, latent=latent)
    seen = {e.document for e in (*first, *second)}
    silent = [e for e in evidence.quiet_for(slot, len(evidence.quiet.windows)) if e.document not in seen][:test]
    return Material(latent, *(tuple(passage(e) for e in some) for some in (first, second, silent)))


# ------------------------------------------------------------------------------------------------------------------- asking
def label_features(
    materials: Sequence[Material], client: ChatClient, *, seed: int = 0, progress: str | None = None
) -> list[Label]:
    """Labels and scores of features, in their order. Replies that the client's cache has are not asked for again.

    What befalls single replies stands in the labels (`problem`, `unanswered`).

    Raises: UserError if the server cannot be reached.
    """
    asked = [m for m in materials if m.train]
    said = dict(zip([m.latent for m in asked], client.complete([label_request(m) for m in asked], progress), strict=True))
    labels = {m.latent: _read_label(said.get(m.latent)) for m in materials}
    questions = [q for m in asked if (text := labels[m.latent][0]) for q in _questions(m, text, seed)]
    replies = client.complete([q.request for q in questions], progress and f"{progress}: scores")
    found: dict[tuple[int, str], list[tuple[Question, Reply]]] = {}
    for question, reply in zip(questions, replies, strict=True):
        found.setdefault((question.latent, question.kind), []).append((question, reply))
    out = []
    for m in materials:
        text, problem = labels[m.latent]
        detection, fuzzing = (_score(found.get((m.latent, kind), [])) if text else None for kind in ("detection", "fuzzing"))
        out.append(Label(m.latent, text, problem, detection, fuzzing, len(m.train), len(m.test), len(m.quiet)))
    return out


def requests_at_most(n_features: int, train: int, test: int, window: int) -> list[Request]:
    """Stand-ins for the requests of n features, each as long as it may get, to estimate a cost by."""
    half = window // 2
    passage = Passage(("token ",) * window, (1.0,) * (window - half) + (0.0,) * half)
    m = Material(0, (passage,) * train, (passage,) * test, (passage,) * test)
    some = [label_request(m), *(q.request for q in _questions(m, "x" * 120, 0))]
    return [Request(r.messages, r.max_tokens, tag=f"{i} {j}") for i in range(n_features) for j, r in enumerate(some)]


def marked(passage: Passage, marks: Sequence[bool]) -> str:
    """The text of a passage with << and >> around the runs of marked tokens."""
    out, inside = [], False
    for token, mark in zip(passage.tokens, marks, strict=True):
        if mark != inside:
            out.append("<<" if mark else ">>")
        inside = mark
        out.append(token)
    return "".join(out) + (">>" if inside else "")


def active(passage: Passage) -> list[bool]:
    """The tokens of a passage that are marked as active: within reach of the passage's strongest."""
    highest = max(passage.values, default=0.0)
    return [v > ACTIVE * highest for v in passage.values]


def label_request(m: Material) -> Request:
    """The question for a label, of a feature that has passages."""
    highest = max(v for p in m.train for v in p.values)
    parts = []
    ranked = sorted(m.train, key=lambda p: -max(p.values))
    for i, p in enumerate(ranked, 1):
        marks = active(p)
        strengths = [f"{t!r} {max(1, round(10 * v / highest))}" for t, v, on in zip(p.tokens, p.values, marks, strict=True) if on]
        parts.append(f"Passage {i}: {marked(p, marks)}\nActive: {', '.join(strengths)}")
    return _request(_LABEL, "\n\n".join(parts), LABEL_TOKENS)


class Question(NamedTuple):
    """Some passages to judge. `right` has the answers."""

    latent: int
    kind: str
    right: tuple[bool, ...]
    request: Request


def _questions(m: Material, label: str, seed: int) -> list[Question]:
    """Detection: passages in which the feature is active, and silent ones. Fuzzing: each passage once with its own marks and
    once with marks at silent tokens, in two rounds, so that no question shows a passage twice."""
    generator = np.random.default_rng((seed, m.latent, 1))
    shown = [(marked(p, [False] * len(p.tokens)), right) for some, right in ((m.test, True), (m.quiet, False)) for p in some]
    out = _asked(m.latent, "detection", _DETECT, label, shown, generator)
    own_first = generator.random(len(m.test)) < 0.5
    for round_ in (False, True):
        shown = []
        for p, first in zip(m.test, own_first, strict=True):
            marks = active(p)
            wrong = _elsewhere(p, marks, generator)
            own = bool(first) != round_
            if own or any(wrong):
                shown.append((marked(p, marks if own else wrong), own))
        out += _asked(m.latent, "fuzzing", _FUZZ, label, shown, generator)
    return out


def _elsewhere(passage: Passage, marks: Sequence[bool], generator: np.random.Generator) -> list[bool]:
    """Marks at silent tokens, in runs as long as those of `marks`, or as long as there is room: scattered ones would be told from
    the right ones by their looks."""
    lengths = [len(list(run)) for on, run in groupby(marks) if on]
    free, n = [v == 0 for v in passage.values], len(marks)
    wrong = [False] * n
    for longest in sorted(lengths, reverse=True):
        for length in range(longest, 0, -1):
            starts = [i for i in range(n - length + 1) if all(free[i : i + length])]
            if starts:
                start = starts[int(generator.integers(len(starts)))]
                wrong[start : start + length] = [True] * length
                for i in range(max(0, start - 1), min(n, start + length + 1)):  # two runs side by side would look like one
                    free[i] = False
                break
    return wrong


def _asked(
    latent: int, kind: str, prompt: str, label: str, shown: Sequence[tuple[str, bool]], generator: np.random.Generator
) -> list[Question]:
    order = [shown[i] for i in generator.permutation(len(shown))]
    out = []
    for at in range(0, len(order), AT_ONCE):
        some = order[at : at + AT_ONCE]
        text = "\n\n".join(f"Passage {i}: {passage}" for i, (passage, _) in enumerate(some, 1))
        request = _request(prompt.format(label=label, n=len(some)), text, ANSWER_TOKENS)
        out.append(Question(latent, kind, tuple(right for _, right in some), request))
    return out


def _request(instruction: str, text: str, max_tokens: int) -> Request:
    # One message: not every served model takes a system prompt.
    return Request(({"role": "user", "content": f"{instruction}\n\n{text}"},), max_tokens)


# ------------------------------------------------------------------------------------------------------------------ reading
def _read_label(reply: Reply | None) -> tuple[str | None, str | None]:
    """(label, why there is none)."""
    if reply is None:
        return None, "it was never active"
    if reply.error is not None or reply.text is None:
        return None, reply.error or "an empty reply"
    found = re.findall(r"LABEL:\s*(.+)", reply.text)
    text = " ".join(found[-1].split()).strip(" *\"'`") if found else ""
    return (text[:200], None) if text else (None, "the reply has no line that begins with LABEL:")


def read_answers(text: str, n: int) -> list[bool] | None:
    """n digits 0 or 1 from a reply: its last line that holds just so many; None where there is none."""
    for line in reversed(text.splitlines()):
        digits = re.findall(r"(?<![\d.])[01](?![\d.])", line)
        if len(digits) == n:
            return [d == "1" for d in digits]
    return None


def _score(answered: Sequence[tuple[Question, Reply]]) -> Score:
    hits = yes = rejections = no = unanswered = 0
    for question, reply in answered:
        answers = None if reply.text is None else read_answers(reply.text, len(question.right))
        if answers is None:
            unanswered += len(question.right)
            continue
        for right, answer in zip(question.right, answers, strict=True):
            yes, no = yes + right, no + (not right)
            hits, rejections = hits + (right and answer), rejections + (not right and not answer)
    return Score(hits, yes, rejections, no, unanswered)
