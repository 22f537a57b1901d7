"""Whether a persona vector and a dictionary belong together (model, block, site, scale), and which answers the vector came from.

Knows: what vectors and dictionaries say of themselves, the layer numbers that people give, the run folder of `pvsae extract`.
Does not know: what is computed with them.

A dictionary of another place gives numbers as smooth as those of the right one, so everything that can be checked is, and what
nobody can know is said in `notes`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvsae.errors import UserError
from pvsae.runs import read_json
from pvsae.saes.info import same_model

if TYPE_CHECKING:
    from pvsae.models import ChatModel
    from pvsae.saes.dictionary import SAE
    from pvsae.saes.encodings import Encodings
    from pvsae.vectors import PersonaVectors, Rollouts

WORSE_THAN_MEAN = 1.0  # unexplained variance that no dictionary of the place has
BETTER, EXPLAINS = 0.5, 0.9  # what another scale has to leave of it to be the right one: this share, and less than this in all


def open_dictionary(name: str, scale: float | None) -> SAE:
    """The dictionary; with `scale`, one that was trained on activations times that factor. UserError where it cannot be had."""
    from pvsae.saes.folders import SCALER, load

    if scale is None:
        return load(name)
    if (Path(name).expanduser() / SCALER).is_file():
        return load(name, scale=scale)
    try:
        found = load(name)
    except UserError:  # it says that there was a factor, and not which: the loader takes ours
        return load(name, scale=scale)
    return found.unscaled(scale)


def block_number(block: int | None, layer: int | None, sae: SAE) -> int:
    """The block, counted from 0: as given, or from a layer in the numbering of hidden_states (official files, the paper), or the
    dictionary's own.

    Raises: UserError for both, for the embeddings (layer 0), and where nobody says it.
    """
    if block is not None and layer is not None:
        raise UserError(f"both block {block} and layer {layer} are given", "one of them", f"layer {layer} is block {layer - 1}")
    if layer is not None:
        if layer < 1:
            raise UserError(
                f"layer {layer} is no block's output: row 0 of hidden_states is the embedding",
                "a layer from 1, in the numbering of hidden_states",
                "--layer L for row L of an official file, which is --block L-1",
            )
        return layer - 1
    block = sae.info.block if block is None else block
    if block is None:
        raise UserError(
            f"{sae.ref} does not say which block it belongs to", "a block, counted from 0", "--block B, or --layer B+1"
        )
    return block


def check_pair(vectors: PersonaVectors, sae: SAE, block: int, *, model: str | None, other_model: bool) -> list[str]:
    """What could not be checked, in words.

    Args:
        model: the model's name, where the user gave one.
        other_model: take a dictionary of another model of the same width all the same.

    Raises: UserError where width, site, block or model differ, or where the vectors have no usable row at the block.
    """
    if vectors.d_model != sae.d_model:
        raise UserError(
            f"the vectors of {vectors.trait!r} have d_model {vectors.d_model}, {sae.ref} has {sae.d_model}",
            "a vector and a dictionary of one model" + (f" (the dictionary says {sae.info.model})" if sae.info.model else ""),
            "take the dictionary of the model that the vectors came from",
        )
    if sae.info.site != "resid_post":
        raise UserError(
            f"{sae.ref} reads {sae.info.site}, and persona vectors are of the residual after a block (resid_post)",
            "a dictionary of resid_post",
            "no conversion exists: its features are directions of another space",
        )
    if sae.info.block is not None and sae.info.block != block:
        raise UserError(
            f"{sae.ref} belongs to block {sae.info.block}, the vector is asked for at block {block}",
            f"one block; block {sae.info.block} is layer {sae.info.block + 1} in the numbering of hidden_states",
            f"leave --block and --layer out, or take a dictionary of block {block}",
        )
    vectors.check_block(block)
    notes = [f"Of the dictionary: {note}" for note in sae.info.notes]
    if sae.info.block is None:
        notes.append(f"The dictionary does not say which block it is of; block {block} was given.")
    source = vectors.meta.get("model", {}).get("name") or model
    if source is None:
        notes.append("The vector file does not say which model it is of; only its width could be checked.")
    elif sae.info.model is None:
        notes.append("The dictionary does not say which model it is of; only its width could be checked.")
    elif not same_model(source, sae.info.model):
        said = f"the vectors of {vectors.trait!r} are of {source}, {sae.ref} is of {sae.info.model}"
        if not other_model:
            raise UserError(
                said,
                "a vector and a dictionary of one model",
                "--other-model, if the models are close relatives (a base model and its finetune) and you mean it",
            )
        notes.append(f"Two models, by --other-model: {said}.")
    return notes


def check_scale(found: Encodings, sae: SAE, given: float | None = None) -> list[str]:
    """A note where the dictionary explains less of the residuals than their mean does, or (with a scale that the user gave) where
    another scale would explain far more.

    Args:
        given: the scale under which the dictionary was opened, where the user gave one.

    Raises: UserError where nobody gave a scale, and another one leaves less than half unexplained of what the dictionary leaves:
        it was trained on scaled activations, and its file does not say so.
    """
    known = {factor: fvu for factor, fvu in found.scaled.items() if math.isfinite(fvu)}
    if 1.0 in known:
        factor = min(known, key=known.__getitem__)
        if known[factor] < min(BETTER * known[1.0], EXPLAINS):
            said = (
                f"{sae.ref} leaves {known[1.0]:.3g} of the variance of this block's residuals unexplained, and "
                f"{known[factor]:.3g} once they are multiplied by {factor:.3g}"
            )
            if given is None:
                raise UserError(
                    f"{said}: it was trained on scaled activations",
                    "weights into which the factor was folded, or the factor",
                    f"--scale {factor:.3g}, or better the factor that its training used (--scale 1 if it used none)",
                )
            return [f"The scale {given:g} was given, but {said}: nothing below that reads activations can be trusted."]
    if found.fvu <= WORSE_THAN_MEAN:
        return []
    return [
        f"The dictionary explains these residuals worse than their mean does (unexplained: {found.fvu:.3g}). It is not "
        "trained, or of another model, block or scale than it says: nothing below that reads activations can be trusted."
    ]


# ---------------------------------------------------------------------------------------------------- vectors and their answers
@dataclass(frozen=True)
class Source:
    """Where vectors came from.

    Attributes:
        vectors: of the traits to decompose.
        known: what there is to compare with, those included. A file whose trait has a name that is taken goes by "TRAIT (FILE)":
            it may be another extraction of the same trait.
        rollouts: the run folder of `pvsae extract` with the judged answers, or None.
        notes: files beside an official one that could not be taken, in words.
    """

    vectors: dict[str, PersonaVectors]
    known: dict[str, PersonaVectors]
    rollouts: Path | None
    notes: tuple[str, ...] = ()


def find_source(
    path: str | Path, traits: Sequence[str], statistic: str, *, others: Sequence[str] = (), rollouts: str | None = None
) -> Source:
    """Reads vectors and looks for their relatives: the other traits of a run folder, or the files beside an official one.

    Args:
        path: run folder of `pvsae extract`, a .safetensors or an official .pt file.
        traits: of a folder, those to decompose (none: all); of one file, at most its own name, or another for an official one.
        others: further files of known traits.
        rollouts: run folder with the answers, where it is not `path`.

    Raises: UserError for nothing there, a trait that is not there, no such statistic, others of another shape or given twice,
        rollouts that hold no answers of any of the traits.
    """
    from pvsae.stages.inputs import read_vector_file, read_vectors, stored_traits
    from pvsae.vectors import read_official

    path, notes = Path(path), list[str]()
    if path.is_dir():
        names = stored_traits(path)
        wanted = [Path(t).stem if t.endswith(".json") else t.rpartition("/")[2] for t in traits] or names
        if not wanted:
            raise UserError(f"no vectors in {path}", "the run folder of `pvsae extract`", "extract vectors first")
        vectors = {name: read_vectors(path, name, statistic) for name in wanted}
        known = {name: vectors.get(name) or read_vectors(path, name, statistic) for name in names}
        answers: Path | None = path
    else:
        if len(traits) > 1:
            raise UserError(f"{path} holds one trait, {len(traits)} are given", "one name", "give the run folder for several")
        if path.suffix == ".pt":
            one = read_official(path, traits[0] if traits else None)
            one.of(statistic)
        else:
            (name,) = traits or stored_traits(path)
            one = read_vectors(path, name, statistic)
        vectors = {one.trait: one}
        known = dict(vectors)
        if path.suffix == ".pt":
            notes = _add_relatives(known, path, statistic)
        answers = None
    for name in others:
        other = read_vector_file(Path(name))
        other.of(statistic)
        label = other.trait if other.trait not in known else f"{other.trait} ({name})"
        if label in known:
            raise UserError(f"{name} is given twice", "each file once", "--others without it")
        known[label] = other
    first = next(iter(vectors.values()))
    for trait, other in known.items():
        if (other.n_blocks, other.d_model) != (first.n_blocks, first.d_model):
            raise UserError(
                f"the vectors of {trait!r} are [{other.n_blocks}, {other.d_model}], those of {first.trait!r} "
                f"[{first.n_blocks}, {first.d_model}]",
                "vectors of one model",
            )
    if rollouts and not any(_answer_files(Path(rollouts), trait) for trait in vectors):
        raise UserError(
            f"no answers of {', '.join(vectors)} in {rollouts}",
            "the run folder of `pvsae extract` that holds them",
            "leave --rollouts out, and no answers are read",
        )
    return Source(vectors, known, Path(rollouts) if rollouts else answers, tuple(notes))


def _add_relatives(known: dict[str, PersonaVectors], path: Path, statistic: str) -> list[str]:
    """Adds the official files of a statistic that lie beside one of them; gives a note for each that cannot be taken."""
    from pvsae.vectors import read_official

    (one,) = known.values()
    notes = []
    for relative in sorted(path.parent.glob(f"*_{statistic}.pt")):
        if relative.resolve() == path.resolve():
            continue
        try:
            other = read_official(relative)
        except UserError as error:  # nobody asked for it, so it ends nothing
            notes.append(f"{relative.name} lies beside the vectors and is left out of the comparison: {error.what}.")
            continue
        if (other.n_blocks, other.d_model) != (one.n_blocks, one.d_model):
            notes.append(f"{relative.name} lies beside the vectors and is left out of the comparison: it is of another shape.")
            continue
        known[other.trait if other.trait not in known else f"{other.trait} ({relative.name})"] = other
    return notes


def extraction_config(folder: Path | None) -> dict[str, Any]:
    """Options of the `pvsae extract` run in a folder; empty where there is none."""
    file = folder / "config.json" if folder is not None else None
    stored = read_json(file, "the run's config") if file is not None and file.is_file() else {}
    return dict(stored.get("config", {})) if stored.get("command") == "extract" else {}


def answers_of(folder: Path | None, trait: str) -> tuple[Rollouts, Rollouts] | None:
    """The judged answers of both polarities, or None where the folder has none of the trait."""
    from pvsae.vectors import Rollouts

    files = _answer_files(folder, trait)
    return (Rollouts.load(files[0]), Rollouts.load(files[1])) if files else None


def _answer_files(folder: Path | None, trait: str) -> list[Path]:
    """The files of both polarities; [] where one of them is missing."""
    files = [folder / trait / f"rollouts_{p}" / "rollouts.parquet" for p in ("pos", "neg")] if folder is not None else []
    return files if all(file.is_file() for file in files) else []


def kept_pairs(model: ChatModel, vectors: PersonaVectors, answers: tuple[Rollouts, Rollouts], most: int | None) -> Any:
    """(rendered pos rows, rendered neg rows, question of each pair) of the pairs that the vector was made of, at most `most` of
    them, spread evenly."""
    from pvsae.vectors import filter_pairs
    from pvsae.vectors.extraction import render_rows

    pos, neg = answers
    recipe = vectors.meta.get("recipe", {})
    limits = {key: float(recipe[key]) for key in ("threshold", "coherence_floor") if key in recipe}
    kept = list(filter_pairs(pos, neg, vectors.trait, **limits).kept)
    if most is not None and len(kept) > most:
        kept = [kept[i * len(kept) // most] for i in range(most)]
    rows = render_rows(model, pos, kept), render_rows(model, neg, kept)
    full = [i for i, pair in enumerate(zip(*rows, strict=True)) if all(r.answer[1] > r.answer[0] for r in pair)]
    questions = [int(pos.table["question_index"].iloc[kept[i]]) for i in full]
    return [rows[0][i] for i in full], [rows[1][i] for i in full], questions
