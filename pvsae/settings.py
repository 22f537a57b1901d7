"""Settings: a YAML file and `key=value` words become a frozen dataclass, and every mistake is named with its place.

Knows: YAML, dotted paths, the types that fields of dataclasses are annotated with, which known key is nearest to an unknown.
Does not know: what any setting is for.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pvsae.errors import UserError

T = TypeVar("T")
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


# ----------------------------------------------------------------------------------------------------------------- read
def parse(text: str, where: str) -> dict[str, Any]:
    """A YAML document that is a mapping.

    Raises:
        UserError: it is not YAML, not a mapping, or gives a key twice (with the line).
    """
    import yaml

    class Strict(yaml.SafeLoader):
        """PyYAML takes the last one of two equal keys without a word."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen: set[Any] = set()
            for key_node, _ in node.value:
                key = getattr(key_node, "value", None)
                if isinstance(key, str) and key in seen:
                    raise yaml.MarkedYAMLError(problem=f"{key} is given twice", problem_mark=key_node.start_mark)
                seen.add(key if isinstance(key, str) else id(key_node))
            return super().construct_mapping(node, deep)

    try:
        values = yaml.load(text, Strict)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it cannot be read"
        raise UserError(f"{where} is not YAML{line}: {problem}", "a mapping of keys and values") from None
    if not isinstance(values, dict):
        raise UserError(f"{where} holds {_shown(values)}", "a mapping of keys and values")
    return values


def read(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. UserError as `parse`, and where there is no such file."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"{path} cannot be read: {reason}", "a YAML file", "check the path") from None
    return parse(text, str(path))


def override(values: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Values with `key=value` words applied; a key is a dotted path ("training.dictionaries.0.k"), a value is YAML.

    Raises:
        UserError: a word without "=", a path through something that has no keys, a position that a list does not have.
    """
    import copy

    out = copy.deepcopy(dict(values))
    for word in assignments:
        key, equals, text = word.partition("=")
        path = key.strip().split(".")
        if not equals or not all(path):
            raise UserError(f"{word!r}", "key=value, where a key is a dotted path such as training.tokens")
        value = parse(f"value: {text}", word)["value"]
        here: Any = out
        for i, part in enumerate(path):
            last, said = i == len(path) - 1, ".".join(path[:i])
            if isinstance(here, list):
                if not part.isdigit() or int(part) >= len(here):
                    raise UserError(
                        f"{word!r}: {said} is a list of {len(here)}", f"a position from 0 to {len(here) - 1}", f"{said}.0..."
                    )
                at: Any = int(part)
            elif isinstance(here, dict):
                at = part
                if not last and here.get(part) is None:
                    here[part] = {}
            else:
                raise UserError(f"{word!r}: {said} is {_shown(here)}, which has no keys", "the path of a key")
            if last:
                here[at] = value
            here = here[at]
    return out


# ---------------------------------------------------------------------------------------------------------------- build
def build(kind: type[T], values: Any, path: str = "") -> T:
    """An instance of a dataclass from plain values, checked field by field.

    Args:
        kind: a dataclass; its fields may be numbers, texts, booleans, mappings, tuples, other dataclasses, and None. A value that
            is an instance already is taken as it is.
        path: dotted path of the values, for messages.

    Raises:
        UserError: an unknown key (with the nearest known one), a value of another type, a missing key; each with its path. What
            the dataclass itself refuses, in __post_init__ or a method `check`, is said with the path too.
    """
    if isinstance(values, kind):
        return values
    if not isinstance(values, Mapping):
        raise UserError(f"{path or 'the config'} is {_shown(values)}", "a mapping of: " + ", ".join(_fields(kind)))
    check_keys(kind, values, path)
    hints = typing.get_type_hints(kind)
    given = {key: _value(hints[key], value, _join(path, key)) for key, value in values.items()}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in given:
            at = _join(path, field.name)
            raise UserError(f"{at} is missing", _expected(hints[field.name]), f"put it into the file, or add {at}=...")
    try:
        made = kind(**given)
        if hasattr(made, "check"):
            made.check()
    except UserError as error:
        if error.what.startswith("in "):  # said by a part of it already, with its path
            raise
        raise UserError(f"in {path or 'the config'}: {error.what}", error.expected, error.fix) from None
    return made


def check_keys(kind: type, values: Mapping[str, Any], path: str = "") -> None:
    """Raises UserError for a key that is no field of the dataclass, naming the one that was probably meant."""
    known = _fields(kind)
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.6)
            places = near or [p for p in _paths(kind) if p.rpartition(".")[2] == key]
            meant = " or ".join(_join(path, p) for p in places[:3])
            raise UserError(
                f"unknown key {_join(path, str(key))}",
                f"one of {', '.join(known)}",
                f"did you mean {meant}?" if meant else "",
            )


def plain(value: Any) -> Any:
    """A dataclass as values that YAML keeps and `build` takes again."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def dump(value: Any) -> str:
    """A dataclass as a YAML document."""
    import yaml

    return yaml.safe_dump(plain(value), sort_keys=False, allow_unicode=True, width=120)


# --------------------------------------------------------------------------------------------------------------- values
def _value(hint: Any, value: Any, path: str) -> Any:
    """A value as its annotation wants it. UserError if that cannot be."""
    whole = hint
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (hint,) = [a for a in arguments if a is not type(None)]
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return build(hint, value, path)
    if origin is tuple and isinstance(value, (list, tuple)):
        variadic = len(arguments) == 2 and arguments[1] is Ellipsis
        if variadic or len(value) == len(arguments):
            kinds = [arguments[0]] * len(value) if variadic else list(arguments)
            return tuple(_value(k, v, _join(path, str(i))) for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    elif isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return {_value(arguments[0], k, path): _value(arguments[1], v, _join(path, str(k))) for k, v in value.items()}
    elif (hint in (bool, str) and isinstance(value, hint)) or (hint in (int, float) and not isinstance(value, bool)):
        made = _number(hint, value) if hint in (int, float) else value
        if made is not None:
            return made
    raise UserError(f"{path} is {_shown(value)}", _expected(whole))


def _number(kind: type, value: Any) -> Any:
    """A number as int or float, None if it is none. YAML reads 1e-4 and 5e8 as texts, which people mean as numbers."""
    if isinstance(value, (str, int, float)):
        try:
            number = float(value)
        except ValueError:
            return None
        if kind is float:
            return number
        if number.is_integer():
            return value if isinstance(value, int) else int(number)
    return None


def _expected(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if a is type(None) else _expected(a) for a in arguments)
    if hint in _WORDS:
        return _WORDS[hint]
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return "a mapping of: " + ", ".join(_fields(hint))
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return f"a list, each of it {_expected(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)}: " + ", ".join(map(_expected, arguments))
    return "a mapping"


def _shown(value: Any) -> str:
    if value is None:
        return "empty"
    if isinstance(value, (dict, list)):
        return "a mapping" if isinstance(value, dict) else "a list"
    return repr(value)


def _fields(kind: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _paths(kind: Any, path: str = "") -> Iterator[str]:
    """Dotted paths of all keys of a dataclass and the ones in it (the first of a list)."""
    for name, hint in typing.get_type_hints(kind).items():
        yield _join(path, name)
        first = ".0" if typing.get_origin(hint) is tuple else ""
        for one in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(one):
                yield from _paths(one, _join(path, name) + first)


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
