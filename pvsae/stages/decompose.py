"""Stage `decompose`: which latents of a dictionary a persona vector is made of, how sure that is, and what they do.

Knows: the order of the work, what needs a model and what does not, the run's files, its tables and summary.
Does not know: whether vector and dictionary fit (matching.py), how anything is computed (readings.py, saes/), nor steering
(causal.py).

Without answers (an official file, `activations` off) no model is loaded: cosines, pursuits and encode(v) need the vector alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from pvsae.errors import UserError
from pvsae.runs import RunDir, read_json, write_json
from pvsae.stages.costs import costs, ledger_of
from pvsae.stages.inputs import Setup, open_judge, open_model, open_run, open_traits, pin, pin_inputs
from pvsae.stages.matching import (
    Source,
    answers_of,
    block_number,
    check_pair,
    check_scale,
    extraction_config,
    find_source,
    kept_pairs,
    open_dictionary,
)
from pvsae.stages.plan import Plan, plan_answers
from pvsae.stages.readings import WARNING, Inputs, explained_by, read
from pvsae.vectors.persona import DEFAULT_STATISTIC

if TYPE_CHECKING:
    from pvsae.judges.base import Judge
    from pvsae.models import ChatModel
    from pvsae.saes.dictionary import SAE
    from pvsae.saes.pursuit import Atoms
    from pvsae.traits import TraitArtifacts
    from pvsae.vectors.rollouts import Task

TABLES = ("decomposition", "curve", "pursuit", "specificity", "encodings", "encoded", "agreement", "nulls", "lengths", "causal")
SAME = 0.9  # least cosine of a vector with the one that its own answers give; rounding costs less than 0.01
POSITIONS = ("prompt", "response", "all")


@dataclass(frozen=True, kw_only=True)
class DecomposeConfig(Setup):
    """What to decompose into what.

    Attributes:
        vectors: the run folder of `pvsae extract`, a .safetensors or an official .pt file.
        dictionary: a folder (SAELens, dictionary_learning or ours) or "RELEASE/ID".
        model: empty takes the one of the extraction.
        block: counted from 0; None takes the dictionary's own.
        layer: the same in the numbering of hidden_states (row of an official file, the paper's layer): block + 1.
        statistic: which vector of the file.
        scale: factor of the activations in the dictionary's training, where its folder does not say it.
        other_model: take a dictionary of another model of the same width all the same.
        others: vector files of further known traits.
        rollouts: run folder of `pvsae extract` with the answers, where `vectors` is a file.
        activations: read answers with the model, where there are any; without, no model is loaded.
        max_pairs: pairs of answers that are read; None reads all that the vector was made of.
        top: length of the lists.
        k: atoms of a pursuit.
        n_shuffles: vectors with labels shuffled within pairs.
        causal: steer with the parts and have the answers judged.
        coefs: strengths of that, in multiples of the vector.
        atoms: most atoms of the reconstruction that steers.
        n_features: latents that steer alone.
        n_random: random latents, and random directions, that steer for comparison.
        positions: "all", "prompt" or "response".
        max_questions, n_samples: evaluation questions used (None: all), answers to each.
        batch_tokens: tokens a forward pass of the reading.
    """

    vectors: str
    dictionary: str
    model: str = ""
    block: int | None = None
    layer: int | None = None
    statistic: str = DEFAULT_STATISTIC
    scale: float | None = None
    other_model: bool = False
    others: tuple[str, ...] = ()
    rollouts: str | None = None
    activations: bool = True
    max_pairs: int | None = None
    top: int = 20
    k: int = 50
    n_shuffles: int = 100
    causal: bool = False
    coefs: tuple[float, ...] = (1.0, 2.0)
    atoms: int = 20
    n_features: int = 5
    n_random: int = 2
    positions: str = "all"
    max_questions: int | None = None
    n_samples: int = 1
    batch_tokens: int = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("top", "k", "atoms", "n_shuffles", "batch_tokens", "max_pairs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}", "at least 1", f"--{name.replace('_', '-')} 1")
        if self.positions not in POSITIONS:
            raise UserError(f"unknown positions {self.positions!r}", f"one of {', '.join(POSITIONS)}")
        for name in ("n_features", "n_random"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}", "0 or more", f"--{name.replace('_', '-')} 0 for none")
        if not self.coefs or 0 in self.coefs or not all(math.isfinite(coef) for coef in self.coefs):
            raise UserError(
                f"coefs are {list(self.coefs)}", "finite strengths, at least one, none of them 0 (unsteered is always there)"
            )
        if len(set(self.coefs)) < len(self.coefs):
            raise UserError(f"coefs are {list(self.coefs)}", "each strength once")
        if self.scale is not None and not 0 < self.scale < math.inf:
            raise UserError(f"scale is {self.scale}", "a positive number", "--scale 0.1")

    def identity(self) -> dict[str, Any]:
        """As of every stage; how many tokens a forward pass takes changes no number."""
        return {name: value for name, value in super().identity().items() if name != "batch_tokens"}


@dataclass(frozen=True)
class DecomposeResult:
    """Tables by name (TABLES; those that could not be made are missing), notes on what was not checked, the run's folder.
    `table` is the decomposition: a row a trait and latent."""

    tables: dict[str, pd.DataFrame]
    notes: list[str]
    path: Path

    @property
    def table(self) -> pd.DataFrame:
        return self.tables["decomposition"]


@dataclass(frozen=True)
class _Job:
    """What was found out before anything is computed."""

    config: DecomposeConfig  # with the model's name
    sae: SAE
    block: int
    source: Source
    notes: list[str]

    @property
    def reads_answers(self) -> bool:
        return self.config.activations and any(answers_of(self.source.rollouts, trait) for trait in self.source.vectors)

    def vector(self, trait: str) -> Float[Tensor, " d_model"]:
        """Of a trait that is decomposed, or of what is known beside."""
        found = self.source.vectors.get(trait) or self.source.known[trait]
        return found.of(self.config.statistic)[self.block]


def prepare(config: DecomposeConfig) -> _Job:
    """Opens vectors and dictionary and checks that they fit. UserError otherwise, with the reason."""
    source = find_source(config.vectors, config.traits, config.statistic, others=config.others, rollouts=config.rollouts)
    sae = open_dictionary(config.dictionary, config.scale)
    block = block_number(config.block, config.layer, sae)
    made = extraction_config(source.rollouts)
    if not config.model and made:
        same = {name: made[name] for name in ("model", "adapter", "chat") if made.get(name) is not None}
        config = replace(config, **{name: value for name, value in same.items() if name == "model" or not getattr(config, name)})
    notes = list(source.notes)
    for vectors in source.vectors.values():
        found = check_pair(vectors, sae, block, model=config.model or None, other_model=config.other_model)
        notes += [note for note in found if note not in notes]
    for trait, vectors in list(source.known.items()):
        if block in vectors.missing_blocks or not float(vectors.of(config.statistic)[block].norm()):
            if trait in source.vectors:
                raise UserError(f"the vector of {trait!r} is zero or missing at block {block}", "a vector that points somewhere")
            notes.append(f"The vectors of {trait} have nothing at block {block} and are left out of the comparison.")
            del source.known[trait]
    return _Job(config, sae, block, source, notes)


def run(
    config: DecomposeConfig, run_dir: RunDir | str | Path, *, model: ChatModel | None = None, judge: Judge | None = None
) -> DecomposeResult:
    """Decompose every trait of the config into a run folder; go on with what an earlier session left.

    Args:
        model, judge: to use instead of loading those that the config names.

    Raises:
        UserError: no such vector or dictionary, one that does not fit the other or the model, answers that do not give the
            vector, a causal test without a model or judge.
    """
    from pvsae.saes.pursuit import Atoms

    with open_run(run_dir, "decompose", config) as folder:
        job = prepare(config)
        config, sae = job.config, job.sae
        if job.reads_answers or config.causal:
            if model is None and not config.model:
                raise UserError("nothing says which model the vector is of", "a model for the causal test", "--model NAME")
            model = model or open_model(config)
            sae = sae.to(model.device).in_memory().check_model(model).check_trained_on(model.name, config.other_model)
            job.notes.extend(note for note in sae.info.notes if note not in job.sae.info.notes)
            for vectors in job.source.vectors.values():
                vectors.check_model(model)
        else:
            model = None
        traits = open_traits(replace(config, traits=config.traits or tuple(job.source.vectors)), model) if config.causal else []
        before = ledger_of(judge)
        if config.causal:
            assert model is not None
            judge = judge or open_judge(config, model, folder)
        _pin(folder, job, model, traits)
        atoms = Atoms(sae.W_dec)
        cosines = sae.cosines(torch.stack([job.vector(trait) for trait in job.source.known])).cpu()
        known = dict(zip(job.source.known, cosines, strict=True))
        parts: dict[str, list[pd.DataFrame]] = {}
        for trait in job.source.vectors:
            made, said = _trait(job, folder, trait, sae, atoms, known, model)
            job.notes.extend(note for note in said if note not in job.notes)
            if config.causal:
                assert model is not None
                assert judge is not None
                artifacts = next(a for a in traits if a.name == trait)
                made["causal"] = _causal(job, folder, model, judge, artifacts, atoms, made)
            for name, table in made.items():
                parts.setdefault(name, []).append(table)
        tables = {name: pd.concat(parts[name], ignore_index=True) for name in TABLES if name in parts}
        for name, table in tables.items():
            folder.table(name, table)
        folder.result({**_summary(job, tables), "costs": costs(judge, before) if config.causal else []})
        return DecomposeResult(tables, job.notes, folder.path)


def _pin(folder: RunDir, job: _Job, model: ChatModel | None, traits: Sequence[TraitArtifacts]) -> None:
    """Refuse to go on with other arrays under the same names than the run began with; a run without a model pins none."""
    from pvsae.saes.fingerprint import fingerprint

    digests = {f"dictionary {job.sae.ref}": fingerprint(job.sae)}
    if model is not None:
        pin_inputs(folder, model, traits, job.source.known, digests)
        return
    numbers = {f"vectors of {name}": hashlib.sha256(job.vector(name).numpy().tobytes()).hexdigest() for name in job.source.known}
    pin(folder, None, {**digests, **numbers})


def _trait(
    job: _Job,
    folder: RunDir,
    trait: str,
    sae: SAE,
    atoms: Atoms,
    known: dict[str, Float[Tensor, " d_sae"]],
    model: ChatModel | None,
) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """The tables of one trait but the causal one, and what is to be said of them; two steps of the run."""
    from safetensors.torch import load_file, save_file

    from pvsae.saes.ranking import shuffled

    config, notes = job.config, list[str]()
    answers = answers_of(job.source.rollouts, trait) if model is not None and config.activations else None
    encodings, differences = None, None
    numbers: dict[str, Any] = {}
    if answers is not None and model is not None:
        with folder.step(f"{trait}/encodings") as step:
            if not step.done:
                table, means, numbers = _encodings(job, trait, sae, model, answers)
                table.to_parquet(step.folder / "table.parquet", index=False)
                save_file({"differences": means.contiguous()}, step.folder / "means.safetensors")
                write_json(step.folder / "numbers.json", numbers)
        where = folder.path / step.name
        encodings, numbers = pd.read_parquet(where / "table.parquet"), read_json(where / "numbers.json")
        differences = load_file(where / "means.safetensors")["differences"]
        notes += numbers["notes"]
    elif config.activations:
        notes.append(f"There are no answers of {trait}: no difference of encodings, and no null of shuffled pairs.")
    nulls = shuffled(differences, config.n_shuffles, config.seed) if differences is not None and len(differences) > 1 else None
    with folder.step(f"{trait}/tables") as step:
        if not step.done:
            given = Inputs(trait, job.vector(trait), known, encodings, nulls, config.top, config.k, config.seed)
            for name, table in read(sae, atoms, given).items():
                table.to_parquet(step.folder / f"{name}.parquet", index=False)
    tables = {file.stem: pd.read_parquet(file) for file in sorted((folder.path / step.name).glob("*.parquet"))}
    length, median = float(job.vector(trait).norm()), numbers.get("median_norm")
    tables["lengths"] = pd.DataFrame(
        [
            {
                "trait": trait, "block": job.block, "length": length, "median_residual": median,
                "ratio": length / median if median else None,
                **{name: numbers.get(name) for name in ("unexplained", "pairs", "units", "unit", "tokens", "outliers")},
            }
        ]
    )  # fmt: skip
    return tables, notes


def _encodings(
    job: _Job, trait: str, sae: SAE, model: ChatModel, answers: Any
) -> tuple[pd.DataFrame, Float[Tensor, "n_pairs d_model"], dict[str, Any]]:
    """(table of latents, pos minus neg of every pair in the vector's own statistic, numbers and notes)."""
    from pvsae.models import LastPrompt, SpanMean
    from pvsae.saes.encodings import encode_pairs, units_of

    config, vectors = job.config, job.source.vectors[trait]
    pos, neg, questions = kept_pairs(model, vectors, answers, config.max_pairs)
    units, unit = units_of(questions)
    found = encode_pairs(
        model, sae, job.block, (pos, neg), units, batch_tokens=config.batch_tokens, progress=f"{trait} encodings"
    )
    notes = check_scale(found, sae, config.scale)
    means = found.row_means
    if config.statistic != DEFAULT_STATISTIC:
        kind = SpanMean((job.block,), "prompt") if config.statistic == "prompt_avg_diff" else LastPrompt((job.block,))
        read = [model.capture(rows, [kind])[kind.key] for rows in (pos, neg)]
        means = torch.stack([torch.as_tensor(values)[:, 0] for values in read])
    differences = means[0] - means[1]
    cosine = float(torch.cosine_similarity(differences.mean(0), job.vector(trait), dim=0))
    whole = config.max_pairs is None or len(pos) < config.max_pairs
    if cosine < SAME and whole and not config.other_model:
        raise UserError(
            f"the answers of {trait!r}, read with {model.name}, give a vector of cosine {cosine:.3f} with the one in the file",
            f"the model that the vector was extracted with, and a cosine of at least {SAME}",
            "--model and --adapter as for `pvsae extract`, or --other-model if you mean another one",
        )
    if unit == "pair":
        notes.append(f"{trait}: only {len(set(questions))} questions, so that pairs are the units of the test; p is too small.")
    numbers = {
        "median_norm": found.median_norm, "unexplained": found.fvu, "pairs": len(pos), "units": len(set(units)), "unit": unit,
        "tokens": sum(found.tokens), "outliers": found.outliers, "cosine_of_answers": cosine, "notes": notes,
    }  # fmt: skip
    return found.table(), differences, numbers


def _causal(
    job: _Job, folder: RunDir, model: ChatModel, judge: Judge, artifacts: Any, atoms: Atoms, made: dict[str, pd.DataFrame]
) -> pd.DataFrame:
    from pvsae.saes.pursuit import pursue
    from pvsae.stages.causal import parts_of, steer_with

    config, trait = job.config, artifacts.name
    v = job.vector(trait)
    solution = pursue(atoms, v, config.atoms, nonnegative=False).at_most(config.atoms)
    top = made["decomposition"].sort_values("rank").head(config.n_features)
    latents = [(int(row.latent), float(row.cosine)) for row in top.itertuples()]
    read_answers = folder.path / f"{trait}/encodings" / "table.parquet"
    alive = pd.read_parquet(read_answers)["latent"].tolist() if read_answers.is_file() else range(job.sae.d_sae)
    parts = parts_of(v, atoms, solution, latents, alive=alive, n_random=config.n_random, seed=config.seed)
    return steer_with(config, folder, model, judge, artifacts, job.source.vectors[trait], job.block, parts)


# ------------------------------------------------------------------------------------------------------------- what it takes
@dataclass(frozen=True)
class Outline:
    """What a run would do, in words; `answers` for the causal test."""

    lines: tuple[str, ...]
    answers: Plan | None

    def __str__(self) -> str:
        return "\n".join((*self.lines, *([str(self.answers)] if self.answers else [])))


def plan(config: DecomposeConfig) -> Outline:
    """What a run would read, generate and judge; opens vectors and dictionary, loads no model. UserError as `run`."""
    from pvsae.stages.causal import Part, conditions
    from pvsae.stages.sweep import tasks_under

    job = prepare(config)
    config, sae = job.config, job.sae
    traits = ", ".join(job.source.vectors)
    lines = [
        f"{traits} at block {job.block} (layer {job.block + 1} of hidden_states) into {sae.d_sae} latents of {sae.ref}",
        f"known traits: {', '.join(job.source.known)}",
        f"each pass over the decoder reads {sae.d_sae * sae.d_model * sae.W_dec.element_size() / 2**30:.2f} GiB",
    ]
    if job.reads_answers:
        counts = {t: len(found[0]) for t in job.source.vectors if (found := answers_of(job.source.rollouts, t))}
        lines.append(f"answers of {config.model} to read, pairs: {', '.join(f'{t} {n}' for t, n in counts.items())}, at most")
    else:
        lines.append("no answers are read: no difference of encodings, no shuffled pairs")
    lines += job.notes
    answers = None
    if config.causal:
        n = 3 + config.n_features + 2 * config.n_random
        some = list(conditions([Part(str(i), torch.zeros(1)) for i in range(n)], 0, 1, config.coefs))
        parts: list[tuple[Any, Sequence[Task]]] = []
        for artifacts in open_traits(replace(config, traits=config.traits or tuple(job.source.vectors))):
            tasks = tasks_under(artifacts, "none", config.n_samples, config.max_questions)
            parts.append((artifacts, tasks * len(some)))
        answers = plan_answers(config, parts)
    return Outline(tuple(lines), answers)


# ------------------------------------------------------------------------------------------------------------------ the page
def _summary(job: _Job, tables: dict[str, pd.DataFrame]) -> dict[str, Any]:
    config, sae = job.config, job.sae
    headline: list[dict[str, Any]] = [
        {"label": "dictionary", "value": f"{sae.ref}: {sae.d_sae} latents"},
        {"label": "block (layer of hidden_states)", "value": f"{job.block} ({job.block + 1})"},
    ]
    for trait in job.source.vectors:
        headline += _headline(trait, {name: table[table["trait"] == trait] for name, table in tables.items()}, config)
    return {
        "title": "Decomposition",
        "about": (
            "Which latents of a dictionary a persona vector is made of, by methods that fail in different ways. A cosine counts "
            "where it is beyond what vectors of the same answers with shuffled labels reach; a share of the vector that is "
            "explained counts beside the same share of a random direction; a latent that other traits' vectors rank as high is "
            "not this trait's."
        ),
        "headline": headline,
        "notes": [WARNING, *job.notes],
        "failures": _failures(tables),
        "numbers": {"d_sae": sae.d_sae, "d_model": sae.d_model, "block": job.block},
    }


def _headline(trait: str, tables: dict[str, pd.DataFrame], config: DecomposeConfig) -> list[dict[str, Any]]:
    best = tables["decomposition"].sort_values("rank").iloc[0]
    null = tables["nulls"].iloc[-1]
    rows = [
        {
            "label": f"{trait}: highest cosine (95% of nulls below)",
            "value": f"{best['cosine']:.3f}, latent {best['latent']} ({null['limit']:.3f}, {null['null']})",
        }
    ]
    k = min(20, config.k)
    shares = [explained_by(tables["curve"], mode, k) for mode in ("nonnegative", "signed")]
    random = explained_by(tables["curve"], "signed", k, "random direction")
    rows.append(
        {
            "label": f"{trait}: explained by {k} latents",
            "value": f"{shares[1]:.0%} signed, {shares[0]:.0%} non-negative (random directions {random:.0%})",
        }
    )
    length = tables["lengths"].iloc[0]
    if pd.notna(length["ratio"]):
        rows.append({"label": f"{trait}: length over the median residual", "value": f"{length['ratio']:.3f}"})
    agreement = tables["agreement"]
    pair = agreement[(agreement["first"] == "cosine") & (agreement["second"] == "difference")]
    if len(pair):
        rows.append(
            {"label": f"{trait}: cosine and encodings share of top {config.top}", "value": f"{pair['overlap'].iloc[0]:.0%}"}
        )
    if "causal" in tables:
        part = tables["causal"]
        for name in ("reconstruction", "residual"):
            found = part[part["condition"].str.startswith(name)]
            shown = ", ".join(f"{row.effect:.0%} at {row.coef:g}" for row in found.itertuples() if row.effect == row.effect)
            rows.append({"label": f"{trait}: {name} steers, of the vector's effect", "value": shown or "no effect of the vector"})
    return rows


def _failures(tables: dict[str, pd.DataFrame]) -> list[dict[str, Any]]:
    if "causal" not in tables:
        return []
    table = tables["causal"]
    return [
        {"what": "answers without a trait score (left out of the mean)", "n": int(table["n_failed_trait"].sum())},
        {"what": "answers without a coherence score (left out of the mean)", "n": int(table["n_failed_coherence"].sum())},
    ]
