"""What every steering sweep shares: the questions of a condition, its judged answers as a step of a run, its scores as columns.

Knows: evaluation questions under system prompts, generating and judging under interventions so that a killed run goes on.
Does not know: which conditions there are, or what an intervention does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from pvsae.runs import RunDir
from pvsae.stages.inputs import Setup, require_paid, require_scores
from pvsae.stages.statistics import mean_ci
from pvsae.vectors.rollouts import Rollouts, Task, generate_tasks, judge_rollouts

if TYPE_CHECKING:
    from pvsae.judges.base import Judge
    from pvsae.models import ChatModel, Intervention
    from pvsae.traits import TraitArtifacts

UNDER = ("none", "pos", "neg")
QUESTIONS = ("eval", "extract")
POSITIONS = ("prompt", "response", "all")


def tasks_under(
    artifacts: TraitArtifacts, system: str, n_samples: int, max_questions: int | None, questions: str = "eval"
) -> list[Task]:
    """A trait's questions of one kind under no system prompt ("none") or under its instructions, which take turns by question."""
    from pvsae.traits import system_message

    tasks = []
    for i, question in enumerate(artifacts.questions(questions)[:max_questions]):
        k = i % len(artifacts.pairs)
        message = None
        if system != "none":
            name = artifacts.name if system == "pos" else "helpful"
            message = system_message(name, getattr(artifacts.pairs[k], system))
        index = -1 if message is None else k
        tasks += [Task(f"{artifacts.name}_{i}", question, i, index, s, system, message) for s in range(n_samples)]
    return tasks


def judged_answers(
    config: Setup,
    folder: RunDir,
    model: ChatModel,
    judge: Judge,
    artifacts: TraitArtifacts,
    *,
    step: str,
    condition: str,
    tasks: Sequence[Task],
    edits: Sequence[Intervention],
) -> Rollouts:
    """Answers to some tasks under some edits, with their scores; done once, as step `step` of the run.

    Raises:
        UserError: the cost limit left scores out; or, without edits, the judge scored no answer at all.
    """

    def compute() -> Rollouts:
        answers = generate_tasks(
            model,
            tasks,
            {"trait": artifacts.name, "condition": condition},
            sampling=config.sampling(model),
            interventions=edits,
            batch_size=config.batch_size,
            parts=folder.parts(step) / "answers",
            progress=step,
        )
        scores = folder.parts(step) / "scores"
        # Without an edit a judge that finds no number is at fault; with one, the answers may be that broken.
        accept = require_paid if edits else require_scores
        return accept(judge_rollouts(answers, judge, artifacts, parts=scores))

    return folder.do(
        step,
        compute,
        lambda value, where: value.save(where / "rollouts.parquet"),
        lambda where: Rollouts.load(where / "rollouts.parquet"),
    )


def score_columns(trait: str, rollouts: Rollouts, seed: int) -> dict[str, Any]:
    """Columns of a condition's row: trait_score and coherence with their 95% intervals over questions, n, and missing scores."""
    questions = rollouts.table["question_index"].tolist()
    score = mean_ci(rollouts.table[trait], questions, seed=seed)
    coherence = mean_ci(rollouts.table["coherence"], questions, seed=seed)
    return {
        "trait_score": score.value,
        "trait_low": score.low,
        "trait_high": score.high,
        "coherence": coherence.value,
        "coherence_low": coherence.low,
        "coherence_high": coherence.high,
        "n": len(rollouts),
        "n_failed_trait": score.n_missing,
        "n_failed_coherence": coherence.n_missing,
    }


def failures(table: pd.DataFrame) -> list[dict[str, Any]]:
    """What a page says of scores that are missing."""
    return [
        {"what": "answers without a trait score (left out of the mean)", "n": int(table["n_failed_trait"].sum())},
        {"what": "answers without a coherence score (left out of the mean)", "n": int(table["n_failed_coherence"].sum())},
    ]
