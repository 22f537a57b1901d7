"""Stage `extract`: from a trait's texts to its persona vectors (paper, section 2.2).

Knows: the order of the work for each trait, its files and its table.
Does not know: how answers are generated or judged, or how a vector is computed (vectors/ does).

In the run folder, a trait each: NAME/rollouts_pos, NAME/rollouts_neg (judged answers) and NAME/vectors/vectors.safetensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from pvsae.runs import RunDir
from pvsae.stages.costs import costs, ledger_of
from pvsae.stages.inputs import (
    Setup,
    open_judge,
    open_model,
    open_run,
    open_traits,
    pin_inputs,
    require_answers,
    require_scores,
)
from pvsae.stages.plan import Plan, plan_answers

if TYPE_CHECKING:
    from pvsae.judges.base import Judge
    from pvsae.models import ChatModel
    from pvsae.traits import TraitArtifacts
    from pvsae.vectors import EmptyFilter, PersonaVectors, Rollouts

N_EXAMPLES = 2  # answers a polarity and trait that the report shows


@dataclass(frozen=True, kw_only=True)
class ExtractConfig(Setup):
    """How vectors are extracted; the defaults are the paper's (5 instructions x 20 questions x 10 samples a polarity).

    Attributes:
        n_samples: answers a question and instruction.
        max_questions, max_instructions: use only the first so many; None uses all.
        threshold: a pair counts when pos scores at least this and neg less than 100 minus this (0-100).
        rollouts_url, rollouts_model: let an OpenAI-compatible server (e.g. vLLM) that serves the same model answer instead.
    """

    n_samples: int = 10
    max_questions: int | None = None
    max_instructions: int | None = None
    threshold: float = 50.0
    rollouts_url: str | None = None
    rollouts_model: str | None = None

    def identity(self) -> dict[str, Any]:
        """As of every stage. A server may move to another address, but its answers are not those of the model here."""
        return {**super().identity(), "answers_from_server": self.rollouts_url is not None}


@dataclass(frozen=True)
class ExtractResult:
    """Vectors and judged answers a trait; `table` has a row a trait, `blocks` a row a trait and block."""

    vectors: dict[str, PersonaVectors]
    table: pd.DataFrame
    blocks: pd.DataFrame
    path: Path


def run(
    config: ExtractConfig, run_dir: RunDir | str | Path, *, model: ChatModel | None = None, judge: Judge | None = None
) -> ExtractResult:
    """Extract the vectors of every trait of the config into a run folder; go on with what an earlier session left.

    Args:
        run_dir: a path, or an open run folder.
        model, judge: to use instead of loading those that the config names.

    Raises:
        EmptyFilter: there are traits of which no pair of answers passed the filter. Raised at the end, when all other traits
            are done and saved, with table and summary.
        UserError: bad options or inputs, a server that does not answer, activations that are not finite.
    """
    from pvsae.vectors import EmptyFilter, PersonaVectors, extract

    with open_run(run_dir, "extract", config) as folder:
        model = model or open_model(config)
        traits = open_traits(config, model)
        before = ledger_of(judge)
        judge = judge or open_judge(config, model, folder)
        answerer = model if config.rollouts_url is None else _server(config, folder)
        pin_inputs(folder, model, traits)
        vectors: dict[str, PersonaVectors] = {}
        rollouts: dict[str, tuple[Rollouts, Rollouts]] = {}
        empty: dict[str, EmptyFilter] = {}
        for artifacts in traits:
            pos, neg = (_rollouts(config, folder, artifacts, polarity, model, answerer, judge) for polarity in ("pos", "neg"))
            rollouts[artifacts.name] = pos, neg
            try:
                with folder.step(f"{artifacts.name}/vectors") as step:
                    if not step.done:
                        label = f"{artifacts.name} vectors"
                        made = extract(model, pos, neg, threshold=config.threshold, seed=config.seed, progress=label)
                        made.save(step.folder / "vectors.safetensors")
                vectors[artifacts.name] = PersonaVectors.load(folder.path / step.name / "vectors.safetensors")
            except EmptyFilter as error:
                empty[artifacts.name] = error
        if not vectors:
            raise next(iter(empty.values()))
        table = pd.DataFrame([_trait_row(name, *rollouts[name], vectors.get(name), config.threshold) for name in rollouts])
        blocks = pd.concat([_block_rows(v) for v in vectors.values()], ignore_index=True)
        folder.table("extraction", table)
        folder.table("blocks", blocks)
        summary = _summary(table, blocks, rollouts, model, judge, empty)
        folder.result({**summary, "costs": costs(judge, before, answerer)})
        if empty:
            first = next(iter(empty.values()))
            raise EmptyFilter(
                f"no vector for {', '.join(empty)}; the other traits are done. {first.what}", first.expected, first.fix
            )
        return ExtractResult(vectors, table, blocks, folder.path)


def plan(config: ExtractConfig) -> Plan:
    """What a run would generate and judge; loads no model and asks nobody."""
    from pvsae.vectors.rollouts import plan_rollouts

    parts = []
    for artifacts in open_traits(config):
        tasks = [
            task
            for polarity in ("pos", "neg")
            for task in plan_rollouts(
                artifacts,
                polarity,
                n_samples=config.n_samples,
                max_questions=config.max_questions,
                max_instructions=config.max_instructions,
            )
        ]
        parts.append((artifacts, tasks))
    return plan_answers(config, parts)


def _server(config: ExtractConfig, folder: RunDir) -> Any:
    from pvsae.llm import ChatClient
    from pvsae.models import RemoteModel

    cache, ledger = (folder.path / f"rollouts_{name}.sqlite" for name in ("cache", "ledger"))
    client = ChatClient(config.rollouts_url, config.rollouts_model or config.model, cache=cache, ledger=ledger)
    client.check()
    return RemoteModel(client)


def _rollouts(
    config: ExtractConfig,
    folder: RunDir,
    artifacts: TraitArtifacts,
    polarity: str,
    model: ChatModel,
    answerer: Any,
    judge: Judge,
) -> Rollouts:
    """Judged answers of one polarity: a step whose parts (answers, then scores) survive a kill."""
    from pvsae.vectors import Rollouts, generate_rollouts, judge_rollouts

    name = f"{artifacts.name}/rollouts_{polarity}"

    def compute() -> Rollouts:
        answers = generate_rollouts(
            answerer,
            artifacts,
            polarity,
            n_samples=config.n_samples,
            sampling=config.sampling(model),
            max_questions=config.max_questions,
            max_instructions=config.max_instructions,
            batch_size=config.batch_size,
            parts=folder.parts(name) / "answers",
            progress=f"{artifacts.name} {polarity} answers",
        )
        label = f"{artifacts.name} {polarity} scores"
        scores = folder.parts(name) / "scores"
        return require_scores(judge_rollouts(require_answers(answers), judge, artifacts, parts=scores, progress=label))

    return folder.do(
        name,
        compute,
        lambda value, where: value.save(where / "rollouts.parquet"),
        lambda where: Rollouts.load(where / "rollouts.parquet"),
    )


def _trait_row(trait: str, pos: Rollouts, neg: Rollouts, vectors: PersonaVectors | None, threshold: float) -> dict[str, Any]:
    from pvsae.vectors import filter_pairs

    pairs = filter_pairs(pos, neg, trait, threshold=threshold) if vectors is None else None
    counts = vectors.meta["counts"] if vectors is not None else None
    dropped = counts["dropped"] if counts else pairs.dropped if pairs else {}
    up, down = pos.means(), neg.means()
    return {
        "trait": trait,
        "pairs": len(pos),
        "kept": counts["kept"] if counts else 0,
        "pos_score": up["trait"],
        "neg_score": down["trait"],
        "pos_coherence": up["coherence"],
        "neg_coherence": down["coherence"],
        "failed_scores": int(up["failed"]) + int(down["failed"]),
        **{f"dropped_{reason}": count for reason, count in dropped.items()},
    }


def _block_rows(vectors: PersonaVectors) -> pd.DataFrame:
    """A row a block: norm of the vector, its half-split cosines, and the norm of the mean residual it is to be compared with."""
    numbers = vectors.diagnostics["response_avg_diff"]
    return pd.DataFrame({"trait": vectors.trait, "block": range(vectors.n_blocks), **numbers})


def _summary(
    table: pd.DataFrame,
    blocks: pd.DataFrame,
    rollouts: dict[str, tuple[Rollouts, Rollouts]],
    model: ChatModel,
    judge: Judge,
    empty: dict[str, EmptyFilter],
) -> dict[str, Any]:
    prompts, examples = [], []
    for name, (pos, neg) in rollouts.items():
        for polarity, part in (("eliciting", pos), ("suppressing", neg)):
            prompts.append({"label": f"{name}, {polarity}", "text": str(part.table["prompt"].iloc[0])})
            for _, row in part.table.head(N_EXAMPLES).iterrows():
                label = f"{name}, {polarity}: {row['question']} (trait {row[name]:.0f}, coherence {row['coherence']:.0f})"
                examples.append({"label": label, "text": row["answer"]})
    unanswered = sum(part.meta.get("failed_rows", 0) for pair in rollouts.values() for part in pair)
    best = blocks.groupby("trait", sort=False)["half_split_cosine"].max()
    return {
        "title": "Extraction",
        "about": (
            "For each trait the model answered the same questions under system prompts that ask for the trait and under their "
            "twins that forbid it. The vector is the difference of the mean residuals over the answers' tokens."
        ),
        "headline": [
            {"label": "traits", "value": len(table)},
            {"label": "pairs kept", "value": f"{table['kept'].sum()} of {table['pairs'].sum()}"},
            {"label": "judge", "value": judge.name},
            {"label": "half-split cosine, worst trait at its best block", "value": f"{best.min():.3f}"},
        ],
        "notes": [f"Chat template: {note}" for note in model.chat.notes],
        "failures": [
            {"what": "scores that the judge did not give (rows left out and counted)", "n": int(table["failed_scores"].sum())},
            {"what": "answers that the server did not give", "n": unanswered},
            *({"what": error.what, "n": 1} for error in empty.values()),
        ],
        "prompts": prompts,
        "examples": examples,
    }
