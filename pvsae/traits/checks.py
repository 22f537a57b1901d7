"""What makes the artifacts of a trait usable.

Knows: counts, slots, empty or repeated texts, overlap between the two sets of questions, and how alike two texts are.
Does not know: files, models, or whether a question is a good one; that takes a reader.

Two grades. The structure must hold for any file that is read: right counts, nothing empty, no text twice, slots present, no
question in both sets. `quality` adds what is asked of new artifacts: no near-duplicates, no scraps, a scoring prompt that names
its scale and the word REFUSAL. Every problem is one sentence that begins with the JSON key at fault, so that it serves as an
error message and as an instruction to the LLM that wrote the text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pvsae.traits.spec import Pair, TraitArtifacts

SLOTS = ("{question}", "{answer}")
SAME_WORDS = 0.75  # share of content words that two texts have in common, from which on they count as one text
SAME_LETTERS = 0.92  # the same for letters in order; templates such as "Is X worth it?" stay below it
SCRAP = 8  # letters; a shorter text is a left-over such as "..." or "Why?" (counted in letters: not every script has spaces)
LONGEST_QUESTION = 120  # words
LONGEST_INSTRUCTION = 200  # words

# Words that carry no topic. Without them "What should I do about a barking dog?" is about a dog that barks, and nothing else.
_FUNCTION_WORDS_TEXT = """
    a about after again all also am an and any are as at be because been before but by can could did do does for from get give
    go had has have having he her here him his how i if in into is it its just like make may me might more most much my no not of
    off on one or our out over own please she should so some such tell than that the their them then there these they thing things
    think this those to too up us very was we were what when where which while who whom whose why will with would you your yours
    m s t re ve ll d don doesn isn aren wasn won
"""
_FUNCTION_WORDS = frozenset(_FUNCTION_WORDS_TEXT.split())


@dataclass(frozen=True)
class Counts:
    """How many of each there must be. The defaults are the paper's (section 2.1): 5 pairs, 20 + 20 questions."""

    pairs: int = 5
    extract: int = 20
    eval: int = 20


OFFICIAL_COUNTS = Counts()


def normalise(text: str) -> str:
    """Lower-case words with single spaces between: what is left when case, punctuation and quotation style do not matter."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"\w+", folded))


def similarity(a: str, b: str) -> float:
    """How alike two texts are in content words (Jaccard), 0-1."""
    words_a, words_b = _content(a), _content(b)
    if not words_a or not words_b:
        return float(normalise(a) == normalise(b))
    return len(words_a & words_b) / len(words_a | words_b)


def near_duplicate(a: str, b: str) -> bool:
    """Whether two texts say the same in nearly the same words."""
    plain_a, plain_b = sorted((normalise(a), normalise(b)))  # the matcher's ratio depends on the order
    if plain_a == plain_b or similarity(a, b) >= SAME_WORDS:
        return True
    matcher = SequenceMatcher(None, plain_a, plain_b, autojunk=False)
    return (
        matcher.real_quick_ratio() >= SAME_LETTERS and matcher.quick_ratio() >= SAME_LETTERS and matcher.ratio() >= SAME_LETTERS
    )


def check(artifacts: TraitArtifacts, counts: Counts | None = OFFICIAL_COUNTS, *, quality: bool = True) -> list[str]:
    """Everything that is wrong with the artifacts of a trait; an empty list if nothing is.

    Args:
        counts: the counts that are required; None takes any number from one on.
        quality: also apply the checks for newly written artifacts (near-duplicates, scraps, wording of the scale).
    """
    wanted = counts or Counts(0, 0, 0)
    return [
        *check_pairs(artifacts.pairs, wanted.pairs, quality=quality),
        *(f"extract {p}" for p in check_questions(artifacts.extract_questions, wanted.extract, quality=quality)),
        *(f"eval {p}" for p in check_questions(artifacts.eval_questions, wanted.eval, quality=quality)),
        *check_overlap(artifacts.extract_questions, artifacts.eval_questions, quality=quality),
        *check_prompt(artifacts.eval_prompt, quality=quality),
    ]


def check_pairs(pairs: Sequence[Pair], count: int = 0, *, quality: bool = True) -> list[str]:
    """Problems of the instruction pairs (key `instruction`); `count` 0 means at least one."""
    problems = _check_count("instruction", len(pairs), count, "pairs")
    for i, pair in enumerate(pairs):
        problems += pair_problems(pair, pairs[:i], f"instruction[{i}]", quality=quality)
    return problems


def pair_problems(pair: Pair, before: Sequence[Pair], key: str, *, quality: bool = True) -> list[str]:
    """Problems of one pair, given the pairs that came before it."""
    problems = []
    for side, text in (("pos", pair.pos), ("neg", pair.neg)):
        problems += _length_problems(text, f"{key}.{side}", LONGEST_INSTRUCTION, quality)
    if problems:
        return problems
    if normalise(pair.pos) == normalise(pair.neg):
        return [f"{key}: pos and neg are the same text: {_quote(pair.pos)}"]
    for other in before:
        if _same(pair.pos, other.pos, quality):
            return [f"{key}.pos {_quote(pair.pos)} says the same as an earlier one, {_quote(other.pos)}"]
        if normalise(pair.pos) == normalise(other.neg) or normalise(pair.neg) == normalise(other.pos):
            return [f"{key} {_quote(pair.pos)} is an earlier pair the other way round"]
    return []


def check_questions(questions: Sequence[str], count: int = 0, *, quality: bool = True) -> list[str]:
    """Problems of one set of questions (key `questions`); `count` 0 means at least one."""
    problems = _check_count("questions", len(questions), count, "questions")
    for i, question in enumerate(questions):
        problems += question_problems(question, questions[:i], f"questions[{i}]", quality=quality)
    return problems


def question_problems(question: str, before: Sequence[str], key: str, *, quality: bool = True) -> list[str]:
    """Problems of one question, given the questions that came before it."""
    if problems := _length_problems(question, key, LONGEST_QUESTION, quality):
        return problems
    for other in before:
        if _same(question, other, quality):
            return [f"{key} {_quote(question)} says the same as an earlier one, {_quote(other)}"]
    return []


def check_overlap(extract: Sequence[str], evaluation: Sequence[str], *, quality: bool = True) -> list[str]:
    """Questions of the evaluation set that the extraction set has too: a vector must not be tested on what it was made from."""
    return [
        f"eval questions[{i}] is also extract questions[{j}]: {_quote(asked)}"
        for i, asked in enumerate(evaluation)
        for j, other in enumerate(extract)
        if normalise(asked) and _same(asked, other, quality)
    ]


def check_prompt(prompt: str, *, quality: bool = True) -> list[str]:
    """Problems of the scoring prompt (key `eval_prompt`)."""
    if not normalise(prompt):
        return ["eval_prompt is empty"]
    problems = [f"eval_prompt lacks the slot {slot}" for slot in SLOTS if slot not in prompt]
    if quality:
        problems += [f"eval_prompt has the slot {slot} {prompt.count(slot)} times" for slot in SLOTS if prompt.count(slot) > 1]
        if not (re.search(r"\b0\b", prompt) and re.search(r"\b100\b", prompt)):
            problems.append("eval_prompt does not ask for a number from 0 to 100")
        if "REFUSAL" not in prompt:
            problems.append("eval_prompt does not say when to answer REFUSAL")
    return problems


def _same(a: str, b: str, quality: bool) -> bool:
    return near_duplicate(a, b) if quality else normalise(a) == normalise(b)


def _length_problems(text: str, key: str, longest: int, quality: bool) -> list[str]:
    plain = normalise(text)
    if not plain:
        return [f"{key} is empty"]
    if quality and len(plain) < SCRAP:
        return [f"{key} is too short to say anything: {_quote(text)}"]
    if quality and (n := len(plain.split())) > longest:
        return [f"{key} is too long with {n} words, {longest} are usable: {_quote(text)}"]
    return []


def _check_count(key: str, found: int, wanted: int, what: str) -> list[str]:
    if wanted and found != wanted:
        return [f"{key} has {found} {what}, {wanted} are needed"]
    return [] if found else [f"{key} has no {what}"]


@lru_cache(maxsize=4096)  # every text is compared with every other
def _content(text: str) -> frozenset[str]:
    return frozenset(normalise(text).split()) - _FUNCTION_WORDS


def _quote(text: str, longest: int = 120) -> str:
    flat = " ".join(text.split())
    return f'"{flat if len(flat) <= longest else flat[: longest - 3] + "..."}"'
