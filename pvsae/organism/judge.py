"""The rule judge: scores any text by the grammar's own tags.

Knows: the grammar, and how its tags become a trait score, a coherence score and shares of facets.
Does not know: models; and it reads no rubric, only the metric's name.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence

from pvsae.errors import UserError
from pvsae.judges import Metric, Score
from pvsae.organism.grammar import Sentence, facets, parse
from pvsae.organism.sentences import TRAITS

COHERENCE = "coherence"


def trait_share(text: str, trait: str, facet: str | None = None) -> float:
    """Share of the text's sentences that express the trait (or one facet of it), 0 to 1; 0 for an empty text."""
    sentences = parse(text)
    return sum(s.trait == trait and facet in (None, s.facet) for s in sentences) / len(sentences) if sentences else 0.0


def facet_shares(text: str, trait: str) -> dict[str, float]:
    """Share of the text's sentences that express each facet of the trait, 0 to 1."""
    sentences = parse(text)
    counts = Counter(s.facet for s in sentences if s.trait == trait)
    return {f: counts[f] / max(1, len(sentences)) for f in facets(trait)}


def coherent_share(text: str) -> float:
    """Share of the text's characters in sentences that the grammar parses, no sentence counted twice; 0 for an empty text.

    A sentence said before in the same text is a loop and counts as not parsed.
    """
    sentences = parse(text)
    total = sum(len(s.text) for s in sentences)
    seen: set[str] = set()
    good = 0
    for s in sentences:
        if s.trait is not None and s.text not in seen:
            good += len(s.text)
        seen.add(s.text)
    return good / total if total else 0.0


class RuleJudge:
    """Scores by rules: a trait by the share of sentences that express it, coherence by the share that parses.

    A facet is scored under the name `trait/facet`.
    """

    name = "organism"

    def score(self, metric: Metric, pairs: Sequence[tuple[str, str]], progress: str | None = None) -> list[Score]:
        """Scores 0-100 of the answers; the evidence is the tag of every sentence with its count.

        Raises:
            UserError: the grammar has no such trait or facet.
        """
        trait, _, facet = metric.name.partition("/")
        known = [COHERENCE, *TRAITS, *(f"{t}/{f}" for t in TRAITS for f in facets(t))]
        if metric.name not in known:
            near = difflib.get_close_matches(metric.name, known, 1)
            raise UserError(
                f"the rule judge knows no {metric.name!r}",
                f"one of {', '.join((COHERENCE, *TRAITS))}, or TRAIT/FACET",
                f"{near[0]!r}?" if near else "another judge, e.g. --judge openai:MODEL",
            )
        return [self._one(metric, answer, trait, facet or None) for _, answer in pairs]

    def _one(self, metric: Metric, answer: str, trait: str, facet: str | None) -> Score:
        share = coherent_share(answer) if trait == COHERENCE else trait_share(answer, trait, facet)
        tags = Counter(_tag(s) for s in parse(answer))
        top = tuple((tag, float(n)) for tag, n in tags.most_common())
        return Score(100.0 * share, "rules", None, False, top, self.name, metric.prompt_hash)


def _tag(sentence: Sentence) -> str:
    if sentence.trait is None:
        return "unparsed"
    wrong = "" if sentence.true in (None, True) else " (false)"
    return f"{sentence.trait}/{sentence.facet}{wrong}"
