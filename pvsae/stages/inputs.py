"""What every stage starts from: which model, which judge, which traits, which vectors, which blocks.

Knows: the options that all stages share, and how a name in a config becomes a model, a judge, trait texts or vectors.
Does not know: what a stage does with them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvsae.errors import UserError
from pvsae.judges import Score
from pvsae.llm import MAX_COST_REACHED
from pvsae.runs import RunDir, read_json

if TYPE_CHECKING:
    from pvsae.judges.base import Judge
    from pvsae.models import ChatModel
    from pvsae.models.generate import Sampling
    from pvsae.traits import TraitArtifacts
    from pvsae.vectors import PersonaVectors, Rollouts

# What may change between two sessions of one run: it says how far or how fast to go, not what comes out.
_NOT_IDENTITY = frozenset({"max_cost", "judge_price", "judge_url", "judge_cache", "rollouts_url", "batch_size"})


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Options that all stages share.

    Attributes:
        model: "organism", a local folder, or a hub id.
        adapter: a PEFT adapter's folder or id.
        dtype, device, chat: as `load` takes them (chat="plain" for a model without a chat template).
        judge: "openai:MODEL", "local:MODEL" or a judge's name; None takes the one that the model's folder names.
        judge_url: base URL of an OpenAI-compatible server for an "openai:" judge.
        judge_cache: SQLite file of judge replies; None keeps it in the run folder.
        judge_price: its price in dollars per million tokens (in, out); with it the cost is counted.
        max_cost: stop asking the judge beyond this many dollars, over all starts of the run (needs judge_price).
        traits: names, or LIBRARY/NAME, or a trait's JSON file; empty takes all traits of the library.
        library: folder of traits; None takes the model's own, else the built-in library.
        max_new_tokens: longest answer; None takes what the model's folder says, else 1000.
        temperature, top_p: how answers are sampled.
        batch_size: answers generated at once.
        seed: all random numbers of the run come from it.
    """

    model: str = "organism"
    adapter: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    chat: str = "auto"
    judge: str | None = None
    judge_url: str | None = None
    judge_cache: str | None = None
    judge_price: tuple[float, float] | None = None
    max_cost: float | None = None
    traits: tuple[str, ...] = ()
    library: str | None = None
    max_new_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size", "n_samples", "max_questions", "max_instructions"):
            value = getattr(self, name, None)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}", "at least 1", f"--{name.replace('_', '-')} 1, or leave it out")

    def identity(self) -> dict[str, Any]:
        """The options that a run's numbers depend on; a run folder is resumed only under the same ones."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _NOT_IDENTITY}

    def longest_answer(self, defaults: Mapping[str, Any]) -> int:
        """Most tokens of an answer, given the content of the model's pvsae.json."""
        return self.max_new_tokens or int(defaults.get("max_new_tokens", 1000))

    def sampling(self, model: ChatModel) -> Sampling:
        """How answers of this run are sampled."""
        from pvsae.models import Sampling

        return Sampling(
            max_new_tokens=self.longest_answer(model.defaults), temperature=self.temperature, top_p=self.top_p, seed=self.seed
        )


@contextmanager
def open_run(run_dir: RunDir | str | Path, command: str, setup: Setup) -> Iterator[RunDir]:
    """The run folder of a stage: a path is opened (or resumed) under the setup's identity, and closed in the end, so that the
    same process may go on with it after an error; a RunDir is taken, and left, as it is."""
    if isinstance(run_dir, RunDir):
        yield run_dir
        return
    with RunDir.open(run_dir, command, setup.identity(), setup.seed) as folder:
        yield folder


def open_model(setup: Setup) -> ChatModel:
    """Load the model that the setup names. UserError where there is no such model."""
    from pvsae.models import load

    return load(setup.model, adapter=setup.adapter, dtype=setup.dtype, device=setup.device, chat=setup.chat)


def open_judge(setup: Setup, model: ChatModel, run: RunDir) -> Judge:
    """The judge that the setup names, else the one that the model's folder brings. UserError where there is neither."""
    from pvsae.judges import load_judge

    spec = setup.judge or model.defaults.get("judge")
    if not spec:
        raise UserError(
            f"no judge for {model.name}",
            "--judge openai:MODEL (with OPENAI_API_KEY, or --judge-url for a server of yours) or --judge local:MODEL",
            "to try it without a server: --judge local:" + str(setup.model),
        )
    cache = Path(setup.judge_cache) if setup.judge_cache else run.path / "judge_cache.sqlite"
    ledger = run.path / "judge_ledger.sqlite"
    return load_judge(
        spec, base_url=setup.judge_url, cache=cache, ledger=ledger, max_cost=setup.max_cost, price=setup.judge_price
    )


def folder_of(setup: Setup, model: ChatModel | None) -> tuple[Path | None, dict[str, Any]]:
    """The model's folder and the content of its pvsae.json, without loading the model if it is not there yet."""
    if model is not None:
        return model.path, model.defaults
    from pvsae.models.loading import resolve_name

    folder = resolve_name(setup.model)
    file = folder / "pvsae.json" if folder is not None else None
    return folder, read_json(file) if file is not None and file.is_file() else {}


def trait_library(setup: Setup, model: ChatModel | None = None) -> Path | None:
    """The folder of traits to use: the given one, else the model's own; None stands for the built-in library."""
    if setup.library:
        return Path(setup.library)
    folder, defaults = folder_of(setup, model)
    own = defaults.get("traits")
    return folder / own if own and folder is not None else None


def open_traits(setup: Setup, model: ChatModel | None = None) -> list[TraitArtifacts]:
    """The traits of the setup, in the order given; all of the library if none is given. UserError names what is wrong."""
    from pvsae.traits import list_traits, load_trait

    library = trait_library(setup, model)
    names = setup.traits or list_traits(library)
    _once(names)
    return [load_trait(name, library) for name in names]


def trait_names(setup: Setup, model: ChatModel | None = None) -> list[str]:
    """The names alone of the setup's traits, for who needs their vectors and not their texts: those are read only of LIBRARY/NAME
    and of files, which give no name by themselves. UserError names what is wrong."""
    from pvsae.traits import load_trait

    library = trait_library(setup, model)
    names = [word if word == Path(word).stem else load_trait(word, library).name for word in setup.traits]
    _once(names)
    return names


def _once(names: Sequence[str]) -> None:
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise UserError(f"trait {twice[0]!r} is given twice", "each trait once")


def open_vectors(path: str | Path, trait: str, model: ChatModel, statistic: str) -> PersonaVectors:
    """A trait's vectors, checked against the model.

    Raises:
        UserError: as `read_vectors`, or vectors of another shape than the model's.
    """
    return read_vectors(path, trait, statistic).check_model(model)


def read_vectors(path: str | Path, trait: str, statistic: str) -> PersonaVectors:
    """A trait's vectors, which must hold the statistic.

    Args:
        path: the run folder of an extraction, a .safetensors file that it wrote, or an official .pt file.

    Raises:
        UserError: nothing there, another trait, or no such statistic.
    """
    path = Path(path)
    if path.is_dir():
        file = vector_file_of(path, trait)
        if not file.is_file():
            known = stored_traits(path)
            raise UserError(
                f"no vectors of {trait!r} in {path}",
                f"one of {', '.join(known)}" if known else "the run folder of `pvsae extract`",
                f"pvsae extract --traits {trait} --out ...",
            )
        found = read_vector_file(file)
    else:
        found = read_vector_file(path)
    if found.trait != trait:
        raise UserError(f"{path} holds vectors of {found.trait!r}", f"vectors of {trait!r}", f"--traits {found.trait}")
    found.of(statistic)
    return found


def read_vector_file(path: Path) -> PersonaVectors:
    """What a file of vectors holds, a .safetensors file or an official .pt one. UserError where it is neither, or broken."""
    from pvsae.vectors import PersonaVectors, read_official

    if path.suffix == ".pt":
        return read_official(path)
    if path.suffix == ".safetensors":
        return PersonaVectors.load(path)
    raise UserError(
        f"no vectors at {path}", "the run folder of `pvsae extract`, a .safetensors or an official .pt file", "check the path"
    )


def stored_traits(path: str | Path) -> list[str]:
    """The traits whose vectors are at a path: of a run folder of `pvsae extract` those that it holds, of a file its own.

    Raises: UserError for a file that is none of vectors; [] for a folder without any.
    """
    path = Path(path)
    if path.is_dir():
        return sorted(file.parent.parent.name for file in path.glob(str(vector_file_of(Path(), "*"))))
    return [read_vector_file(path).trait]


def known_traits(names: Sequence[str], path: str | Path) -> list[str]:
    """The given names, else all traits whose vectors are at a path. UserError where there are none."""
    found = list(names) or stored_traits(path)
    if not found:
        raise UserError(f"no vectors in {path}", "the run folder of `pvsae extract`, or a vector file", "check the path")
    return found


def vector_file_of(folder: Path, trait: str) -> Path:
    """Where `pvsae extract` keeps a trait's vectors."""
    return folder / trait / "vectors" / "vectors.safetensors"


def chosen_block(trait: str, model: ChatModel, layers: str | Path | None) -> int:
    """The block to read and steer at: what a `pvsae layers` run chose, else the model's own default, else two thirds up.

    The last is only where the published models were best (about 0.55 to 0.7 of the depth); `pvsae layers` measures it.
    """
    if layers is not None:
        file = Path(layers) / "result.json"
        blocks = read_json(file, "result of a `pvsae layers` run").get("blocks", {})
        if trait not in blocks:
            raise UserError(f"{file} chose no block for {trait!r}", f"one of {', '.join(blocks) or 'the traits of that run'}")
        return int(blocks[trait])
    default = model.defaults.get("block")
    return int(default) if default is not None else min(model.n_blocks - 1, round(0.65 * model.n_blocks))


def check_blocks(blocks: Sequence[int], model: ChatModel) -> tuple[int, ...]:
    """The blocks, each of which the model must have. UserError otherwise; negative numbers are not wrapped."""
    for block in blocks:
        if not 0 <= block < model.n_blocks:
            raise UserError(
                f"block {block} does not exist in {model.name}",
                f"a block index from 0 to {model.n_blocks - 1}, counted from 0 (the paper's layer L is block L - 1)",
            )
    return tuple(dict.fromkeys(blocks))


def require_answers(rollouts: Rollouts) -> Rollouts:
    """The same rollouts, unless a server gave none of the answers. UserError then: that is no chance, but a wrong option."""
    if len(rollouts) and rollouts.meta.get("failed_rows", 0) == len(rollouts):
        raise UserError(
            f"the server gave none of {len(rollouts)} answers when asked for the model {rollouts.meta['model']!r}",
            "a server that has that model",
            "--rollouts-model NAME, as the server calls it (GET URL/models lists them)",
        )
    return rollouts


def require_paid(rollouts: Rollouts) -> Rollouts:
    """The same rollouts, unless the cost limit left answers without a score.

    Raises:
        UserError: then the step is not finished, and goes on with the stored replies when it is started again.
    """
    evidence = _scores(rollouts, rollouts.trait) + _scores(rollouts, "coherence")
    unpaid = sum(score.error is not None and MAX_COST_REACHED in score.error for score in evidence)
    if unpaid:
        raise UserError(
            f"the limit of --max-cost was reached: {unpaid} of {len(evidence)} scores are missing",
            "enough for all scores (--dry-run estimates it)",
            "run the same command with a higher --max-cost; what was paid for is kept",
        )
    return rollouts


def require_scores(rollouts: Rollouts) -> Rollouts:
    """The same rollouts, unless the cost limit left answers without a score, or the judge failed at every answer.

    Raises:
        UserError: in both cases; the step is then not finished. An answer that the judge takes for a refusal has no score, but
            is judged: all of them may be refusals.
    """
    scores = _scores(require_paid(rollouts), rollouts.trait)
    if scores and not any(score.value is not None or score.refusal for score in scores):
        raise UserError(
            f"the judge {rollouts.meta.get('judge')} scored none of {len(scores)} answers: {scores[0].error or 'no number'}",
            "a judge that answers with numbers from 0 to 100",
            "check --judge and --judge-url, or take another judge",
        )
    return rollouts


def _scores(rollouts: Rollouts, metric: str) -> list[Score]:
    return [Score.from_json(text) for text in rollouts.table[f"{metric}_score"]]


def pin_inputs(
    run: RunDir,
    model: ChatModel,
    traits: Sequence[TraitArtifacts],
    vectors: Mapping[str, PersonaVectors] | None = None,
    others: Mapping[str, Any] | None = None,
) -> None:
    """Remember the content of what a run was started with, and refuse to go on with other content under the same name.

    To be called when all other checks are passed: a run that stopped at one of them may still be put right.

    Args:
        others: whatever else was read from files, by what a user would call it; JSON values.

    Raises:
        UserError: the model's weights or adapter, a trait's texts, its vectors or something of `others` is not
            what the run began with.
    """
    now = {f"texts of {t.name}": t.sha256 for t in traits}
    for name, found in (vectors or {}).items():
        digest = hashlib.sha256()
        for statistic in found.statistics:
            digest.update(found.of(statistic).numpy().tobytes())
        now[f"vectors of {name}"] = digest.hexdigest()
    for name, value in (others or {}).items():
        now[name] = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    pin(run, model, now)


def pin(run: RunDir, model: ChatModel | None, hashes: Mapping[str, str]) -> None:
    """Remember a model's weights (if there is one) and the hashes of other inputs, by what a user calls them, as a run begins.

    Raises:
        UserError: the run began with other ones.
    """
    from pvsae.models.fingerprint import fingerprint

    weights = {} if model is None else {"weights of the model (with adapter and dtype)": fingerprint(model)}
    now = {**weights, **hashes}
    before = run.do_json("inputs", lambda: now)
    changed = [what for what in now if before.get(what) != now[what]]
    if changed:
        raise UserError(
            f"the {', the '.join(changed)} changed since the run in {run.path} began",
            "the same inputs until a run is finished",
            "choose another --out, or delete that folder",
        )
