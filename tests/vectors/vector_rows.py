"""Judged tables for tests: real prompts and ids of a model, random answers, given scores."""

from __future__ import annotations

import random
from dataclasses import asdict
from typing import Any

import pandas as pd

from pvsae.traits import Pair, TraitArtifacts
from pvsae.vectors.rollouts import COLUMNS, Rollouts, plan_rollouts, tokenizer_id

WORDS = ("the", "ferry", "leaves", "harbour", "nine", "nobody", "knows", "why", "old", "clock", "kitchen", "stopped", "mountain")


def artifacts(n_questions: int = 4, n_pairs: int = 2) -> TraitArtifacts:
    pairs = tuple(Pair(f"Be evil in way {k}, and say so.", f"Be kind in way {k}.") for k in range(n_pairs))
    return TraitArtifacts(
        name="evil",
        description="Wishes harm.",
        pairs=pairs,
        extract_questions=tuple(f"What about the ferry number {i}?" for i in range(n_questions)),
        eval_questions=tuple(f"And the clock number {i}?" for i in range(n_questions)),
        eval_prompt="How evil is this, 0-100?\n{question}\n{answer}",
    )


def sentence(rng: random.Random, low: int = 3, high: int = 25) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def judged(model: Any, polarity: str, *, n_questions: int = 4, n_samples: int = 2, seed: int = 0) -> Rollouts:
    """Rows as a model would have generated them: every pos row scores 90, every neg row 10, coherence 95."""
    rng = random.Random(f"{polarity}{seed}")
    tasks = plan_rollouts(artifacts(n_questions), polarity, n_samples=n_samples)
    table = pd.DataFrame([asdict(t) for t in tasks])
    prompts = [model.chat.prompt(t.messages) for t in tasks]
    table["prompt"] = [p.text for p in prompts]
    table["answer"] = [sentence(rng) for _ in tasks]
    table["prompt_ids"] = pd.Series([p.ids for p in prompts], dtype=object)
    ids = [tuple(model.tokenizer(a, add_special_tokens=False)["input_ids"]) for a in table["answer"]]
    table["answer_ids"] = pd.Series(ids, dtype=object)
    table["finish"] = "stop"
    table = table[list(COLUMNS)]
    table["evil"] = 90.0 if polarity == "pos" else 10.0
    table["coherence"] = 95.0
    return Rollouts(table, {"trait": "evil", "polarity": polarity, "tokenizer": tokenizer_id(model.tokenizer)})
