"""Stage `monitor`: does the residual before the answer foretell the trait of the answer? (paper, section on monitoring)

Knows: graded and many-shot prompts in, projections and scores out, their correlations, and traces of whole conversations.
Does not know: how prompts are worded (graded.py), how answers are scored (judges/).

The projection is that of the last prompt token's residual on the unit vector, taken before a single token is generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from pvsae.errors import UserError
from pvsae.runs import RunDir, read_json
from pvsae.stages.costs import costs, ledger_of
from pvsae.stages.graded import SHOTS, GradedTask, graded_prompts, many_shot_tasks, pick_examples, system_tasks
from pvsae.stages.inputs import (
    Setup,
    check_blocks,
    chosen_block,
    open_judge,
    open_model,
    open_run,
    open_traits,
    open_vectors,
    pin_inputs,
    read_vectors,
    require_scores,
)
from pvsae.stages.plan import Plan, plan_answers
from pvsae.stages.statistics import Estimate, correlation, within_correlation
from pvsae.vectors.persona import DEFAULT_STATISTIC, PersonaVectors
from pvsae.vectors.rollouts import Rollouts, generate_tasks, judge_rollouts

if TYPE_CHECKING:
    from pvsae.judges.base import Judge
    from pvsae.models import ChatModel
    from pvsae.models.chat import Rendered
    from pvsae.traits import TraitArtifacts


@dataclass(frozen=True, kw_only=True)
class MonitorConfig(Setup):
    """What to monitor.

    Attributes:
        vectors: the run folder of `pvsae extract`, or a vector file (then there are no examples for many-shot prompts).
        layers: run folder of `pvsae layers`, whose choice of block is used where `block` is None.
        block: block whose residual is read.
        statistic: which vector of the file.
        shots: numbers of examples of the many-shot prompts; empty for none.
        max_questions, n_samples: evaluation questions used (None: all), answers to each prompt; a point is their mean.
        conversation: JSON file [{"role", "content"}, ...] to trace token by token; None traces a conversation of the first
            trait's own answers that turns from ordinary to eliciting.
    """

    vectors: str
    layers: str | None = None
    block: int | None = None
    statistic: str = DEFAULT_STATISTIC
    shots: tuple[int, ...] = SHOTS
    max_questions: int | None = None
    n_samples: int = 1
    conversation: str | None = None


@dataclass(frozen=True)
class MonitorResult:
    """Tables of a monitoring run.

    Attributes:
        points: a row a prompt: trait, kind, level, question_index, block, projection, trait_score, coherence, n, n_failed.
        correlations: a row a trait, kind ("system", "many-shot", "all") and scope ("overall", "within", "level k"): r with its
            95% interval, n and n_missing.
        by_block: overall r of each trait at every block.
        trace: a row a trait and token of the traced conversation: role, token, projection.
    """

    points: pd.DataFrame
    correlations: pd.DataFrame
    by_block: pd.DataFrame
    trace: pd.DataFrame
    path: Path


def run(
    config: MonitorConfig, run_dir: RunDir | str | Path, *, model: ChatModel | None = None, judge: Judge | None = None
) -> MonitorResult:
    """Monitor every trait of the config; answers of a trait are a step, so a killed run goes on.

    Raises:
        UserError: bad options, vectors of another trait or shape, a block that does not exist, a conversation file that is
            broken, that the chat template refuses or that does not fit the context; all before anything is generated.
    """
    conversation = _read_conversation(config.conversation) if config.conversation else None
    with open_run(run_dir, "monitor", config) as folder:
        model = model or open_model(config)
        traits = open_traits(config, model)
        vectors = {t.name: open_vectors(config.vectors, t.name, model, config.statistic) for t in traits}
        given = check_blocks([] if config.block is None else [config.block], model)
        blocks = {t.name: vectors[t.name].check_block(*(given or [chosen_block(t.name, model, config.layers)])) for t in traits}
        if conversation and not _fits(model, conversation):
            raise UserError(
                f"the conversation in {config.conversation} is longer than the context of {model.name}",
                f"at most {model.n_ctx} tokens",
                "leave out its first turns",
            )
        notes: list[str] = []
        prompts = {t.name: _fitting(config, model, t, plan_tasks(config, t, notes), notes) for t in traits}
        before = ledger_of(judge)
        judge = judge or open_judge(config, model, folder)
        texts = {f"prompts of {name}": [task.messages for task in tasks] for name, tasks in prompts.items()}
        pin_inputs(folder, model, traits, vectors, {**texts, "conversation": conversation})
        points, per_block, answers = [], [], {}
        for artifacts in traits:
            tasks = prompts[artifacts.name]
            rollouts = _rollouts(config, folder, model, judge, artifacts, tasks)
            answers[artifacts.name] = rollouts
            projections = _projections(config, folder, model, artifacts.name, tasks, vectors[artifacts.name])
            part = _points(artifacts.name, tasks, rollouts, projections, blocks[artifacts.name])
            points.append(part)
            per_block.append(_by_block(artifacts.name, part, projections))
        table = pd.concat(points, ignore_index=True)
        correlations = pd.concat(
            [_correlations(t, p, config.seed) for t, p in table.groupby("trait", sort=False)], ignore_index=True
        )
        by_block = pd.concat(per_block, ignore_index=True)
        for name, frame in (("correlations", correlations), ("by_block", by_block), ("points", table)):
            folder.table(name, frame)
        title = Path(config.conversation).name if config.conversation else f"an ordinary answer, then the most {traits[0].name}"
        conversation = conversation or _turning(model, traits[0], answers[traits[0].name])
        trace = trace_conversation(model, conversation, vectors, blocks, config.statistic, title)
        folder.table("trace", trace)
        summary = _summary(table, correlations, blocks, traits, answers, judge, notes)
        folder.result({**summary, "costs": costs(judge, before)})
        return MonitorResult(table, correlations, by_block, trace, folder.path)


def plan(config: MonitorConfig) -> Plan:
    """What a run would generate and judge; loads no model and asks nobody. UserError where inputs are missing or broken."""
    if config.conversation:
        _read_conversation(config.conversation)
    notes: list[str] = []
    parts = []
    for artifacts in open_traits(config):
        vectors = read_vectors(config.vectors, artifacts.name, config.statistic)
        if config.block is not None:
            vectors.check_block(config.block)
        parts.append((artifacts, plan_tasks(config, artifacts, notes)))
    if config.shots:
        notes.append("many-shot prompts that do not fit the model's context will be left out")
    return plan_answers(config, parts, notes)


# ---------------------------------------------------------------------------------------------------------------- points
def plan_tasks(config: MonitorConfig, artifacts: TraitArtifacts, notes: list[str]) -> list[GradedTask]:
    """All tasks of a trait that there are prompts and examples for; what is left out is said in `notes`."""
    tasks = system_tasks(artifacts, config.n_samples, config.max_questions)
    if not config.shots:
        return tasks
    file = Path(config.vectors) / artifacts.name / "rollouts_pos" / "rollouts.parquet"
    if not file.is_file():
        notes.append(f"{artifacts.name}: no many-shot prompts, because {config.vectors} holds no answers to take examples from")
        return tasks
    examples = pick_examples(Rollouts.load(file))
    missing = [count for count in config.shots if count > len(examples)]
    if missing:
        notes.append(f"{artifacts.name}: no prompts of {missing} shots, because only {len(examples)} answers are good examples")
    return tasks + many_shot_tasks(artifacts, examples, config.shots, config.n_samples, config.max_questions, config.seed)


def _fitting(
    config: MonitorConfig, model: ChatModel, artifacts: TraitArtifacts, tasks: Sequence[GradedTask], notes: list[str]
) -> list[GradedTask]:
    """The tasks without the many-shot ones that leave no room for an answer in the context; those are said in `notes`."""
    room = model.n_ctx - config.sampling(model).max_new_tokens
    many = [t for t in tasks if t.kind == "many-shot"]
    too_long = {t.level for t in _first_of_each(many) if model.chat.prompt(t.messages).n_prompt > room}
    if too_long:
        notes.append(f"{artifacts.name}: no prompts of {sorted(too_long)} shots, because they do not fit {model.n_ctx} tokens")
    return [t for t in tasks if t.kind != "many-shot" or t.level not in too_long]


def _rollouts(
    config: MonitorConfig, folder: RunDir, model: ChatModel, judge: Judge, artifacts: TraitArtifacts, tasks: Sequence[GradedTask]
) -> Rollouts:
    name = f"{artifacts.name}/answers"

    def compute() -> Rollouts:
        answers = generate_tasks(
            model,
            tasks,
            {"trait": artifacts.name, "stage": "monitor"},
            sampling=config.sampling(model),
            batch_size=config.batch_size,
            parts=folder.parts(name) / "answers",
            progress=f"{artifacts.name} answers",
        )
        scores, label = folder.parts(name) / "scores", f"{artifacts.name} scores"
        return require_scores(judge_rollouts(answers, judge, artifacts, parts=scores, progress=label))

    return folder.do(
        name,
        compute,
        lambda value, where: value.save(where / "rollouts.parquet"),
        lambda where: Rollouts.load(where / "rollouts.parquet"),
    )


def _first_of_each(tasks: Sequence[GradedTask]) -> list[GradedTask]:
    """One task a prompt (samples of a prompt share its residual)."""
    return [t for t in tasks if t.sample == 0]


def _projections(
    config: MonitorConfig, folder: RunDir, model: ChatModel, trait: str, tasks: Sequence[GradedTask], vectors: PersonaVectors
) -> np.ndarray:
    """[prompts, n_blocks] projection of the last prompt token on the unit vector of each block; NaN where there is no vector."""
    from pvsae.models import LastPrompt

    def compute() -> pd.DataFrame:
        capture = LastPrompt(tuple(range(model.n_blocks)))
        rows = [model.chat.prompt(t.messages) for t in _first_of_each(tasks)]
        residual = model.capture(rows, [capture], progress=f"{trait} projections")[capture.key]
        matrix = vectors.of(config.statistic)
        unit = matrix / matrix.norm(dim=1, keepdim=True)
        return pd.DataFrame(torch.einsum("rbd,bd->rb", residual, unit).numpy(), columns=[str(b) for b in range(model.n_blocks)])

    return folder.do_table(f"{trait}/projections", compute).to_numpy(dtype=np.float64)


def _points(trait: str, tasks: Sequence[GradedTask], rollouts: Rollouts, projections: np.ndarray, block: int) -> pd.DataFrame:
    """A row a prompt: mean score over the answers that have one."""
    frame = pd.DataFrame(
        {
            "question_id": [t.question_id for t in tasks],
            "trait_score": rollouts.table[trait].to_numpy(),
            "coherence": rollouts.table["coherence"].to_numpy(),
        }
    )
    means = frame.groupby("question_id", sort=False).agg(
        trait_score=("trait_score", "mean"),
        coherence=("coherence", "mean"),
        n=("trait_score", "size"),
        n_failed=("trait_score", lambda x: int(x.isna().sum())),
    )
    first = _first_of_each(tasks)
    out = pd.DataFrame(
        {
            "trait": trait,
            "kind": [t.kind for t in first],
            "level": [t.level for t in first],
            "question_index": [t.question_index for t in first],
            "block": block,
            "projection": projections[:, block],
        }
    )
    return pd.concat([out, means.loc[[t.question_id for t in first]].reset_index(drop=True)], axis=1)


# ---------------------------------------------------------------------------------------------------------- correlations
def _correlations(trait: str, points: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Overall and within-prompt-type r of every kind, and r inside each single prompt type, intervals over questions."""
    rows = []

    def add(kind: str, scope: str, estimate: Estimate) -> None:
        rows.append(
            {
                "trait": trait, "kind": kind, "scope": scope, "r": estimate.value, "low": estimate.low,
                "high": estimate.high, "n": estimate.n, "n_missing": estimate.n_missing,
            }
        )  # fmt: skip

    parts = {"all": points, **{str(kind): part for kind, part in points.groupby("kind", sort=False)}}
    for kind, part in parts.items():
        x, y, questions = part["projection"], part["trait_score"], part["question_index"].tolist()
        types = list(zip(part["kind"], part["level"], strict=True))
        add(kind, "overall", correlation(x, y, questions, seed=seed))
        add(kind, "within", within_correlation(x, y, types, questions, seed=seed))
        if kind != "all":
            for level, inside in part.groupby("level"):
                where = inside["question_index"].tolist()
                add(kind, f"level {level}", correlation(inside["projection"], inside["trait_score"], where, seed=seed))
    return pd.DataFrame(rows)


def _by_block(trait: str, points: pd.DataFrame, projections: np.ndarray) -> pd.DataFrame:
    score = points["trait_score"]
    rows = [
        {"trait": trait, "block": b, "r_overall": correlation(projections[:, b], score, n_boot=0).value}
        for b in range(projections.shape[1])
    ]
    return pd.DataFrame(rows)


# ---------------------------------------------------------------------------------------------------------------- traces
def _read_conversation(path: str) -> list[dict[str, str]]:
    """Messages of a JSON file. UserError unless it is a list of {"role", "content"} texts."""
    content = read_json(path, "conversation")
    roles = ("system", "user", "assistant")
    right = isinstance(content, list) and content
    if not right or not all(
        isinstance(m, dict) and m.get("role") in roles and isinstance(m.get("content"), str) for m in content
    ):
        raise UserError(
            f"{path} is not a conversation", '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]'
        )
    return [{"role": m["role"], "content": m["content"]} for m in content]


def _turning(model: ChatModel, artifacts: TraitArtifacts, rollouts: Rollouts) -> list[dict[str, str]]:
    """Two questions: an answer under the most suppressing prompt, then the best scored one under the most eliciting prompt (to
    another question where there is one); the prompts themselves are left out. The second alone where both do not fit the
    context."""
    table = rollouts.table[rollouts.table["sample"] == 0]
    by_system = [table[table["system"] == prompt] for prompt in graded_prompts(artifacts)]
    others = by_system[-1].iloc[1:] if len(by_system[-1]) > 1 else by_system[-1]
    low, high = (
        by_system[0].iloc[0],
        others.sort_values(artifacts.name, ascending=False, na_position="last", kind="stable").iloc[0],
    )
    talk = [
        {"role": "user", "content": str(low["question"])},
        {"role": "assistant", "content": str(low["answer"])},
        {"role": "user", "content": str(high["question"])},
        {"role": "assistant", "content": str(high["answer"])},
    ]
    return talk if _fits(model, talk) else talk[2:]


def _fits(model: ChatModel, messages: Sequence[dict[str, str]]) -> bool:
    """Whether a conversation can be read at once. UserError where the chat template refuses it."""
    return len(model.chat.conversation(messages).ids) <= model.n_ctx


def trace_conversation(
    model: ChatModel,
    messages: Sequence[dict[str, str]],
    vectors: dict[str, PersonaVectors],
    blocks: dict[str, int],
    statistic: str = DEFAULT_STATISTIC,
    name: str = "conversation",
) -> pd.DataFrame:
    """Projection of every token of a conversation on each trait's unit vector at its block.

    Returns: columns conversation, trait, index (token), role ("system", "user", "assistant" for contents, "template" for the
    tokens between), token (its text) and projection.

    Raises:
        UserError: the conversation is longer than the model's context.
    """
    from pvsae.models import Projection

    rendered = model.chat.conversation(list(messages))
    captures = {trait: Projection((vectors[trait].direction(block, statistic),), block) for trait, block in blocks.items()}
    read = model.capture([rendered], list(captures.values()))
    roles = _roles(rendered)
    tokens = [model.tokenizer.decode([token]) for token in rendered.ids]
    parts = []
    for trait, capture in captures.items():
        values = read[capture.key][0][:, 0].tolist()
        parts.append(
            pd.DataFrame(
                {
                    "conversation": name, "trait": trait, "index": range(len(tokens)), "role": roles, "token": tokens,
                    "projection": values,
                }
            )
        )  # fmt: skip
    return pd.concat(parts, ignore_index=True)


def _roles(rendered: Rendered) -> list[str]:
    roles = ["template"] * len(rendered.ids)
    for role, start, end in rendered.spans:
        roles[start:end] = [role] * (end - start)
    return roles


# --------------------------------------------------------------------------------------------------------------- summary
def _summary(
    points: pd.DataFrame,
    correlations: pd.DataFrame,
    blocks: dict[str, int],
    traits: Sequence[TraitArtifacts],
    answers: dict[str, Rollouts],
    judge: Judge,
    notes: list[str],
) -> dict[str, Any]:
    headline: list[dict[str, Any]] = [{"label": "judge", "value": judge.name}]
    whole = correlations[correlations["kind"] == "all"].set_index(["trait", "scope"])
    for trait, block in blocks.items():
        overall, within = whole.loc[(trait, "overall")], whole.loc[(trait, "within")]
        value = f"r {overall['r']:.2f} [{overall['low']:.2f}, {overall['high']:.2f}], within {within['r']:.2f}"
        headline.append({"label": f"{trait}, block {block}", "value": value})
    prompts = []
    for artifacts in traits:
        prompts += [
            {"label": f"{artifacts.name}, level {level}", "text": text} for level, text in enumerate(graded_prompts(artifacts))
        ]
        prompts.append({"label": f"{artifacts.name}, as rendered", "text": str(answers[artifacts.name].table["prompt"].iloc[0])})
    return {
        "title": "Monitoring",
        "about": (
            "Prompts ask for each trait by degrees (eight system prompts, and many-shot examples). The projection of the last "
            "prompt token is known before the answer; the score is the judge's, of the answer that follows."
        ),
        "headline": headline,
        "notes": notes,
        "failures": [{"what": "answers without a trait score (left out)", "n": int(points["n_failed"].sum())}],
        "prompts": prompts,
    }
