"""A trait as text: what a user writes (`TraitSpec`), what extraction needs (`TraitArtifacts`), and the files both live in.

Knows: the official JSON format and its folder names, the built-in library, YAML specs, which fault to report and where.
Does not know: who wrote the texts (author.py can have an LLM do it), models, judges or the network.

A library of traits is a folder::

    extract/NAME.json    eval/NAME.json
    {"instruction": [{"pos": str, "neg": str} x5], "questions": [str x20], "eval_prompt": str, "description": str}

`description` may be absent. The folder names of the released data (`trait_data_extract`, `trait_data_eval`) and
`traits_extract`, `traits_eval` are understood too. The two files of a trait share everything but their questions.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pvsae.errors import UserError
from pvsae.runs import atomic_write_text
from pvsae.traits.checks import OFFICIAL_COUNTS, Counts, check, check_overlap, check_pairs, check_prompt, check_questions

BUILTIN_LIBRARY = Path(__file__).parent / "library"
BUILTIN_SPECS = Path(__file__).parent / "specs"
FOLDERS = {
    "extract": ("extract", "traits_extract", "trait_data_extract"),
    "eval": ("eval", "traits_eval", "trait_data_eval"),
}
KEYS = ("instruction", "questions", "eval_prompt")

# A trait's name is a file name and a column of the rollout table, so it must not be the name of another column.
_RESERVED = frozenset(
    {"answer", "answer_ids", "coherence", "coherence_score", "finish", "instruction_index", "polarity", "prompt", "prompt_ids"}
    | {"question", "question_id", "question_index", "sample", "system"}
)
# Written with a vowel but spoken with a consonant ("a useful", "a European"), and the other way round ("an honest").
_SPOKEN_CONSONANT = re.compile(r"(?:eu|ew|once|one(?![a-z])|one-|u[bcfgjkqrst][aeiou]|uni[cfloqstv]|y)")
_SPOKEN_VOWEL = re.compile(r"(?:hono|hones|hour|heir)")


def check_name(name: str) -> None:
    """Raise UserError unless `name` can be a trait's name: letters first, then letters, digits, `-` and `_`."""
    if not isinstance(name, str) or not re.fullmatch(r"[^\W\d_][\w-]*", name):
        raise UserError(
            f"{name!r} cannot be the name of a trait",
            "one adjective of letters, digits, '-' and '_' that begins with a letter, e.g. sycophantic or risk-averse",
            f"name: {re.sub(r'[^0-9a-z]+', '-', name.lower()).strip('-0123456789') or 'evil'}" if isinstance(name, str) else "",
        )
    if name.casefold() in _RESERVED or name.casefold().endswith("_score"):
        raise UserError(f"{name!r} cannot be the name of a trait", "a name that no other column of the rollout table has")


def article(word: str) -> str:
    """ "an" before a vowel sound, else "a": an evil, a useful, an honest."""
    plain = word.strip().lower()
    if _SPOKEN_CONSONANT.match(plain):
        return "a"
    return "an" if plain[:1] in set("aeiou") or _SPOKEN_VOWEL.match(plain) else "a"


def system_message(assistant_name: str, instruction: str) -> str:
    """System message of a rollout (paper, section 2.2): the assistant is named by the trait for pos, "helpful" for neg.

    >>> system_message("evil", "Wish them ill.")
    'You are an evil assistant. Wish them ill.'
    """
    return f"You are {article(assistant_name)} {assistant_name} assistant. {instruction}"


@dataclass(frozen=True)
class TraitSpec:
    """What a user writes down: the trait's adjective, and one or two sentences that say what it is."""

    name: str
    description: str

    def __post_init__(self) -> None:
        check_name(self.name)
        if not isinstance(self.description, str) or not self.description.strip():
            raise UserError(f"the trait {self.name!r} has no description", "one or two sentences that say what the trait is")


@dataclass(frozen=True)
class Pair:
    """A system instruction that elicits the trait, and its twin that suppresses it."""

    pos: str
    neg: str


@dataclass(frozen=True)
class TraitArtifacts:
    """All texts of a trait.

    Attributes:
        name: the adjective, also file name and column name.
        description: what the trait is; "" where the file does not say (official files do not).
        pairs: instruction pairs, 5 in the paper.
        extract_questions: asked to make the vector, 20 in the paper.
        eval_questions: asked to test it; none of them is in the other set.
        eval_prompt: scoring prompt with the slots `{question}` and `{answer}`, answered by 0-100 or REFUSAL.
        source: where the texts were read; no part of equality.
    """

    name: str
    description: str
    pairs: tuple[Pair, ...]
    extract_questions: tuple[str, ...]
    eval_questions: tuple[str, ...]
    eval_prompt: str
    source: str = field(default="", compare=False)

    @property
    def spec(self) -> TraitSpec:
        """Name and description. UserError where there is no description."""
        return TraitSpec(self.name, self.description)

    @property
    def sha256(self) -> str:
        """Hash of the content, for the record of a run: equal texts, equal hash, wherever they were read."""
        content = {key: value for key, value in asdict(self).items() if key != "source"}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def questions(self, which: str) -> tuple[str, ...]:
        """The questions of one set, "extract" or "eval"."""
        if which not in FOLDERS:
            raise UserError(f"no set of questions is called {which!r}", "extract or eval")
        return self.extract_questions if which == "extract" else self.eval_questions


# ------------------------------------------------------------------------------------------------------------ libraries
def list_traits(library: str | Path | None = None) -> tuple[str, ...]:
    """Names of the traits that a library has both files of, sorted; None is the built-in library."""
    root = BUILTIN_LIBRARY if library is None else Path(library)
    return tuple(sorted(_names(root, "extract") & _names(root, "eval")))


def load_trait(
    name_or_path: str | Path, library: str | Path | None = None, *, counts: Counts | None = OFFICIAL_COUNTS
) -> TraitArtifacts:
    """Read the artifacts of a trait.

    Args:
        name_or_path: a name, looked up in `library` and then in the built-in library; or a path: one of the trait's two JSON
            files, or LIBRARY/NAME.
        library: folder with extract/ and eval/ (or the official folder names).
        counts: the counts that the files must have; None takes any.

    Raises:
        UserError: unknown name (with the nearest known one), missing file, wrong JSON, missing key or slot, wrong counts, a text
            twice, a question in both sets, or two files that do not belong together. The message names file and key.
    """
    text = os.fspath(name_or_path)
    if isinstance(name_or_path, Path) or text != os.path.basename(text) or text.endswith((".json", ".yaml", ".yml")):
        return _load_path(Path(text), counts)
    check_name(text)
    if library is not None:
        root = _existing_library(Path(library))
        if text in _names(root, "extract") | _names(root, "eval"):
            return _load_from(root, text, counts)
    if text in list_traits():
        return _load_from(BUILTIN_LIBRARY, text, counts)
    known = sorted({*list_traits(), *(list_traits(library) if library is not None else ())})
    where = "the built-in library" if library is None else f"{library} or the built-in library"
    raise _unknown(
        f"no trait {text!r} in {where}", text, known, "write its name and description to a YAML file: pvsae traits author"
    )


def save_trait(artifacts: TraitArtifacts, folder: str | Path) -> tuple[Path, Path]:
    """Write `folder`/extract/NAME.json and `folder`/eval/NAME.json in the official format; returns the two paths.

    Raises:
        UserError: the artifacts are structurally broken, or the folder cannot be written.
    """
    check_name(artifacts.name)
    if problems := check(artifacts, counts=None, quality=False):
        raise UserError(
            f"the trait {artifacts.name!r} is not fit to be saved: {_listed(problems)}", "artifacts that can be read back"
        )
    paths = (Path(folder) / "extract" / f"{artifacts.name}.json", Path(folder) / "eval" / f"{artifacts.name}.json")
    for path, questions in zip(paths, (artifacts.extract_questions, artifacts.eval_questions), strict=True):
        content = {
            **({"description": artifacts.description} if artifacts.description else {}),
            "instruction": [asdict(pair) for pair in artifacts.pairs],
            "questions": list(questions),
            "eval_prompt": artifacts.eval_prompt,
        }
        atomic_write_text(path, json.dumps(content, indent=4, ensure_ascii=False) + "\n")
    return paths


# ---------------------------------------------------------------------------------------------------------------- specs
def list_specs() -> tuple[str, ...]:
    """Names of the specs that come with the package, sorted."""
    return tuple(sorted(path.stem for path in BUILTIN_SPECS.glob("*.yaml")))


def load_spec(name_or_path: str | Path) -> TraitSpec:
    """Read a trait's name and description from a YAML file, or from the package by name.

    Raises:
        UserError: missing file, unreadable YAML (with its line), not a mapping, a missing, unknown, empty or non-text key.
    """
    path = Path(name_or_path)
    if not path.is_file():
        if path.suffix in (".yaml", ".yml") or path.name != os.fspath(name_or_path):
            raise UserError(
                f"no file {path}",
                "a YAML file with the keys name and description",
                f"one of the examples: {_joined(list_specs())}",
            )
        if path.name not in list_specs():
            raise _unknown(f"no spec {path.name!r} comes with pvsae, and no such file exists", path.name, list_specs(), "")
        path = BUILTIN_SPECS / f"{path.name}.yaml"
    data = _read_yaml(path)
    shape = "name: evil\n            description: One or two sentences that say what the trait is."
    if not isinstance(data, dict):
        raise UserError(f"{path}: this is {_kind(data)}, not a mapping", "the two keys name and description", shape)
    for key in data:
        if key not in ("name", "description"):
            near = difflib.get_close_matches(str(key), ["name", "description"], n=1)
            raise UserError(f"{path}: unknown key {key!r}", "the keys name and description only", f"{near[0]}:" if near else "")
    for key in ("name", "description"):
        if key not in data:
            raise UserError(f"{path}: the key {key!r} is missing", "the two keys name and description", shape)
        if not isinstance(data[key], str):
            raise UserError(
                f"{path}: {key} is {_kind(data[key])}: {data[key]!r}",
                "text (YAML reads bare yes, no, null, numbers and dates as something else)",
                f"put it in quotation marks, {key}: '...'",
            )
        if not data[key].strip():
            raise UserError(f"{path}: {key} is empty", "text", shape)
    try:
        return TraitSpec(data["name"].strip(), " ".join(data["description"].split()))
    except UserError as error:
        raise UserError(f"{path}: {error.what}", error.expected, error.fix) from error


def _read_yaml(path: Path) -> Any:
    import yaml

    text = _read_text(path)
    try:
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" in line {mark.line + 1}" if mark else ""
        tab = mark is not None and any("\t" in bad for bad in text.splitlines()[mark.line : mark.line + 1])
        raise UserError(
            f"{path}: this is not YAML{line}: {'a tab where only spaces may stand' if tab else error.problem}",
            "name: WORD and description: TEXT, one below the other",
            "indent with spaces" if tab else "put a text that holds ': ' or '#' in quotation marks",
        ) from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: this is not YAML: {error}", "text with the keys name and description") from error


# -------------------------------------------------------------------------------------------------------------- reading
def _load_path(path: Path, counts: Counts | None) -> TraitArtifacts:
    if path.suffix in (".yaml", ".yml"):
        raise UserError(
            f"{path} is a spec: it describes a trait, and has no instructions or questions",
            "the name of a trait, or one of its two JSON files",
            f"pvsae traits author {path} writes them",
        )
    if path.suffix != ".json":  # LIBRARY/NAME
        root = _existing_library(path.parent)
        if path.name not in _names(root, "extract") | _names(root, "eval"):
            raise _unknown(f"no trait {path.name!r} in {root}", path.name, list_traits(root), "")
        return _load_from(root, path.name, counts)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.json")], n=1)
        raise UserError(f"no file {path}", "a trait's JSON file", str(path.with_name(near[0])) if near else "")
    folder = path.parent.resolve()
    for names in FOLDERS.values():
        if folder.name in names:
            return _load_from(folder.parent, path.stem, counts)
    raise UserError(
        f"{path} does not lie in a folder of extraction or evaluation files, so its other half cannot be found",
        "LIBRARY/extract/NAME.json and LIBRARY/eval/NAME.json",
        "move the two files into such folders",
    )


def _load_from(root: Path, name: str, counts: Counts | None) -> TraitArtifacts:
    check_name(name)
    paths = {which: _find(root, which, name) for which in FOLDERS}
    extract, evaluation = (_read_trait_file(paths[which]) for which in ("extract", "eval"))
    wanted = counts or Counts(0, 0, 0)
    problems = [
        *(f"{paths['extract']}: {p}" for p in check_pairs(extract["pairs"], wanted.pairs, quality=False)),
        *(f"{paths['extract']}: {p}" for p in check_questions(extract["questions"], wanted.extract, quality=False)),
        *(f"{paths['eval']}: {p}" for p in check_questions(evaluation["questions"], wanted.eval, quality=False)),
        *(f"{paths['extract']}: {p}" for p in check_prompt(extract["eval_prompt"], quality=False)),
    ]
    problems = problems or [
        *(f"{paths['eval']}: {p}" for p in check_overlap(extract["questions"], evaluation["questions"], quality=False)),
        *(
            f"{paths['eval']}: {key} differs from {key} in {paths['extract']}"
            for key, part in (("instruction", "pairs"), ("eval_prompt", "eval_prompt"), ("description", "description"))
            if extract[part] != evaluation[part] and (key != "description" or (extract[part] and evaluation[part]))
        ),
    ]
    if problems:
        raise UserError(
            _listed(problems),
            f"{wanted.pairs or 'some'} pairs, {wanted.extract or 'some'} questions and a scoring prompt with {{question}} and "
            "{answer}; both files alike but for their questions, none of which is in both",
            "correct the file, or have it written anew: pvsae traits author",
        )
    return TraitArtifacts(
        name,
        extract["description"] or evaluation["description"],
        extract["pairs"],
        extract["questions"],
        evaluation["questions"],
        extract["eval_prompt"],
        source=str(root),
    )


def _read_trait_file(path: Path) -> dict[str, Any]:
    """Keys and types of one file; what the texts say is checked by the caller."""
    expected = "the official format: instruction (pairs of pos and neg), questions (texts), eval_prompt (text)"
    try:
        data = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}: this is not JSON: {error.msg} in line {error.lineno}, column {error.colno}", expected, "correct that line"
        ) from error
    except RecursionError as error:
        raise UserError(f"{path}: this JSON is nested too deeply", expected) from error

    def demand(ok: bool, problem: str) -> None:
        if not ok:
            raise UserError(f"{path}: {problem}", expected)

    demand(isinstance(data, dict), f"the file holds {_kind(data)} instead of an object")
    for key in KEYS:
        near = difflib.get_close_matches(key, [k for k in data if k not in KEYS], n=1)
        demand(key in data, f"the key {key!r} is missing" + (f" (there is {near[0]!r})" if near else ""))
    for key in ("instruction", "questions"):
        demand(isinstance(data[key], list), f"{key} is {_kind(data[key])} instead of a list")
    for i, pair in enumerate(data["instruction"]):
        demand(isinstance(pair, dict), f"instruction[{i}] is {_kind(pair)} instead of an object with pos and neg")
        for side in ("pos", "neg"):
            demand(side in pair, f"instruction[{i}] lacks the key {side!r}")
            demand(isinstance(pair[side], str), f"instruction[{i}].{side} is {_kind(pair[side])} instead of text")
    for i, question in enumerate(data["questions"]):
        demand(isinstance(question, str), f"questions[{i}] is {_kind(question)} instead of text")
    for key in ("eval_prompt", "description"):
        demand(isinstance(data.get(key, ""), str), f"{key} is {_kind(data.get(key))} instead of text")
    return {
        "pairs": tuple(Pair(pair["pos"], pair["neg"]) for pair in data["instruction"]),
        "questions": tuple(data["questions"]),
        "eval_prompt": data["eval_prompt"],
        "description": data.get("description", ""),
    }


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8", "UTF-8 text", "save the file as UTF-8") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", "a readable file") from error


def _names(root: Path, which: str) -> set[str]:
    return {path.stem for folder in FOLDERS[which] for path in (root / folder).glob("*.json") if not path.name.startswith(".")}


def _find(root: Path, which: str, name: str) -> Path:
    for folder in FOLDERS[which]:
        if (path := root / folder / f"{name}.json").is_file():
            return path
    folder = next((folder for folder in FOLDERS[which] if (root / folder).is_dir()), which)
    raise UserError(
        f"no file {root / folder / name}.json",
        f"two files for the trait {name!r}, one for extraction and one for evaluation",
        "add the file, or have the trait written anew: pvsae traits author",
    )


def _existing_library(root: Path) -> Path:
    if not root.is_dir():
        raise UserError(f"no folder {root}", "a library of traits: a folder with extract/ and eval/ in it")
    if not any((root / folder).is_dir() for names in FOLDERS.values() for folder in names):
        above = any(root.resolve().name in names for names in FOLDERS.values())
        raise UserError(
            f"{root} is no library of traits",
            f"a folder that has {' or '.join(FOLDERS['extract'])} in it, and the same with eval",
            f"the folder above: {root.resolve().parent}" if above else "",
        )
    return root


def _unknown(what: str, name: str, known: Sequence[str], otherwise: str) -> UserError:
    folded: Mapping[str, str] = {k.casefold(): k for k in known}
    near = difflib.get_close_matches(name.casefold(), list(folded), n=1, cutoff=0.55)
    return UserError(what, f"one of {_joined(known)}" if known else "", folded[near[0]] if near else otherwise)


def _kind(value: Any) -> str:
    names = {
        dict: "a mapping",
        list: "a list",
        str: "text",
        bool: "true or false",
        type(None): "empty",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), f"of type {type(value).__name__}")


def _joined(names: Sequence[str]) -> str:
    return ", ".join(names)


def _listed(problems: Sequence[str], most: int = 8) -> str:
    more = [f"... and {len(problems) - most} more"] if len(problems) > most else []
    return "\n  ".join([*problems[:most], *more])
