"""Sources: where samples come from, read row by row, each row a text or a chat.

Knows: JSONL, plain text and Parquet files, corpora that installed packages offer, what a word on a command line stands for,
fields, roles and content hashes, and how to go on reading in the middle.
Does not know: how Hugging Face datasets are opened (hf_datasets.py), tokens, models, mixtures.

A source is looked at before any work: if none of its first rows can be used, that is an error that says why. After that, a bad
row is a `Bad` with its reason; whoever reads counts it and goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from pvsae import hf_datasets
from pvsae.errors import UserError
from pvsae.runs import sha256_of

ROLES = ("system", "user", "assistant")
ALIASES = {"human": "user", "gpt": "assistant"}  # the names of ShareGPT's files
TEXT_FIELDS, CHAT_FIELDS = ("text", "content"), ("messages", "conversation", "conversations")
# Entry points: functions that give rows, always the same ones, perhaps without end. One that offers several corpora takes what
# stands behind the colon of a name, and its attribute `names()` gives what may stand there, each with a line about it.
GROUP = "pvsae.corpora"
HEAD = 100  # rows that are looked at before the work starts

Messages = tuple[dict[str, str], ...]
Value = str | Messages


@dataclass(frozen=True)
class Bad:
    """A row that cannot be used, and why, in words that many rows share."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Source:
    """One source of texts or chats. Give one of `path`, `dataset` and `named`.

    Attributes:
        path: local file or pattern ("data/*.jsonl.gz"): .jsonl, .txt (both also .gz), .parquet; .json, .csv, .arrow and folders
            that `datasets` saved, or that hold a dataset's files as the Hub has them, are read by the package `datasets`.
        dataset, subset, split, revision: a Hugging Face dataset by name; pin `revision` where the content must not change. Of a
            folder, `split` says which one of it, and `subset` too where it is laid out as on the Hub.
        named: a corpus that an installed package offers (entry point group "pvsae.corpora"), NAME or NAME:PART; it may have no
            end, so `max_samples` is needed.
        streaming: read the dataset over the network as it is needed, in pieces that are tokenised once and kept, in place of
            downloading it first. Its samples are then shuffled within a piece and not over the whole.
        kind: "text" or "chat"; None finds out by the fields of the first row.
        field: the field that holds the text or the messages; None looks for text/content or messages/conversation(s).
        weight: share of the corpus's samples (not tokens) that comes from here, in relation to the other sources' weights.
        strip_system: probability with which a chat loses its system prompt, also one that the template writes by itself
            (the paper's dictionaries: 0.8).
        roles: names of roles in the file -> "system", "user" or "assistant"; human and gpt are known.
        separator: what stands between two documents of a .txt file.
        max_samples: use only the first so many good rows.
        repeat: start over when the source runs out, so that another one sets the end of the corpus.
    """

    path: str | None = None
    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    named: str | None = None
    streaming: bool = False
    kind: str | None = None
    field: str | None = None
    weight: float = 1.0
    strip_system: float = 0.0
    roles: Mapping[str, str] = dataclasses.field(default_factory=dict)
    separator: str = "\n\n"
    max_samples: int | None = None
    repeat: bool = False

    @property
    def name(self) -> str:
        """What to call it in messages and progress bars."""
        return self.dataset or self.named or Path(self.path or "?").name

    def check(self) -> None:
        """Raises UserError for values that cannot be right, without opening anything."""
        if [self.path, self.dataset, self.named].count(None) != 2:
            raise UserError(
                "a source has to have exactly one of path, dataset and named", "path: FILE, dataset: NAME or named: CORPUS"
            )
        if not 0 < self.weight < float("inf"):
            raise UserError(f"weight {self.weight} of source {self.name}", "a positive number")
        if not 0 <= self.strip_system <= 1:
            raise UserError(f"strip_system {self.strip_system} of source {self.name}", "a probability from 0 to 1")
        if self.kind not in (None, "text", "chat"):
            raise UserError(f"kind {self.kind!r} of source {self.name}", '"text", "chat", or nothing to find out')
        if self.max_samples is not None and self.max_samples < 1:
            raise UserError(f"max_samples {self.max_samples} of source {self.name}", "at least 1, or nothing for all")
        if self.named is not None and self.max_samples is None:
            raise UserError(f"source {self.named} without max_samples", "a number: a corpus of a package may have no end")
        if not self.separator:
            raise UserError(f"an empty separator of source {self.name}", r'text between documents, such as "\n\n"')
        wrong = sorted(set(self.roles.values()) - set(ROLES))
        if wrong:
            raise UserError(f"roles of source {self.name} lead to {', '.join(wrong)}", "one of " + ", ".join(ROLES))
        if self.streaming and self.dataset is None:
            raise UserError(
                f"source {self.name} is no dataset, and has streaming", "streaming for a dataset by name", "leave it out"
            )


class Reader:
    """An opened source: checked, with its kind and field known. `rows` reads it from a place, `place` says where it stands."""

    def __init__(self, source: Source) -> None:
        """Opens and checks a source.

        Raises: UserError for a missing or unreadable file or dataset, or where none of the first rows can be used.
        """
        source.check()
        self.source = source
        self._data: Any = None
        self._files: list[Path] = []
        self._named: Named | None = None
        if source.dataset is not None:
            self._data = hf_datasets.load_named(source)
        elif source.named is not None:
            self._named = _find_named(source.named)
        else:
            self._files = _files(source)
            if self._suffix not in (".jsonl", ".txt", ".parquet"):
                self._data = hf_datasets.load_local(self._files, self._suffix, source)
        self.kind, self.field = self._find_field()

    @property
    def content(self) -> str:
        """Hash of what the source holds: of the files' bytes (and the split of a saved dataset), of a dataset's name, subset,
        split, revision and length, or of a named corpus' name and first rows."""
        if self._files:
            parts: list[Any] = [
                sha256_of(f) for at in self._files for f in (sorted(at.rglob("*")) if at.is_dir() else [at]) if f.is_file()
            ]
            parts += [self.source.split] if self._files[0].is_dir() else []
            parts += [] if self.source.subset is None else [self.source.subset]
        elif self._named is not None:
            parts = [self._named.point.value, *self._named.part, list(islice(self._raw({"row": 0}), HEAD))]
        else:
            s = self.source
            parts = [s.dataset, s.subset, s.split, s.revision, None if s.streaming else len(self._data)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def rows(self, place: Mapping[str, Any] | None = None) -> Iterator[Value | Bad]:
        """The rows from a place on (that `place` gave), or from the start."""
        return (row if isinstance(row, Bad) else self._value(row) for row in self._raw(place or {"row": 0}))

    @property
    def files(self) -> tuple[Path, ...]:
        """The local files behind the source, in the order in which they are read; none where it is something else."""
        return tuple(self._files)

    def raw_rows(self) -> Iterator[Any]:
        """The rows from the start as their source holds them; Bad where a line cannot be parsed."""
        return self._raw({"row": 0})

    def value(self, row: Any) -> Value | Bad:
        """What a row of `raw_rows` holds; a line of a JSONL file may also be given as its bytes."""
        found = parsed_line(row) if isinstance(row, bytes) else row
        return found if isinstance(found, Bad) else self._value(found)

    def place(self, row: int) -> dict[str, Any]:
        """Where reading stands after `row` rows; for a streamed dataset, at the row that `rows` gave last."""
        return {"row": row, "source": self._data.state_dict()} if self.source.streaming else {"row": row}

    # ------------------------------------------------------------------------------------------------------------- rows
    @property
    def _suffix(self) -> str:
        first = self._files[0]
        return "" if first.is_dir() else Path(first.name.removesuffix(".gz")).suffix

    def _raw(self, place: Mapping[str, Any]) -> Iterator[Any]:
        """Rows as mappings (a document of a .txt file as text), or Bad where a line cannot be parsed."""
        if self.source.streaming:
            if "source" in place:
                self._data.load_state_dict(place["source"])
            return iter(self._data)
        if self._named is not None:
            return islice(self._named.rows(), place["row"], None)
        if self._data is not None:
            return iter(self._data.select(range(place["row"], len(self._data))) if place["row"] else self._data)
        separator = self.source.separator
        how = {".jsonl": _jsonl, ".parquet": _parquet, ".txt": lambda file: _documents(file, separator)}[self._suffix]
        return islice((row for file in self._files for row in how(file)), place["row"], None)

    def _find_field(self) -> tuple[str, str]:
        """Kind and field, and the check of the first rows."""
        source = self.source
        head = list(islice(self._raw({"row": 0}), HEAD))
        kind, name = source.kind, source.field
        if head and all(isinstance(row, str) for row in head):
            if kind == "chat":
                raise UserError(f"chats from the text file {source.name}", "a .jsonl file with messages", "set kind: text")
            kind, name = "text", ""
        else:
            rows = [row for row in head if isinstance(row, Mapping)]
            present = sorted({str(key) for row in rows for key in row})
            if name is None:
                known = {"text": TEXT_FIELDS, "chat": CHAT_FIELDS}
                wanted = known[kind] if kind else CHAT_FIELDS + TEXT_FIELDS
                name = next((f for f in wanted if f in present), None)
            if rows and (name is None or name not in present):
                raise UserError(
                    f"source {source.name} has no field {source.field or 'of texts or messages'}; it has: {', '.join(present)}",
                    'a field "text" with text, or "messages" with [{"role": ..., "content": ...}, ...]',
                    "name the right one with field: in a config, with --field at the command line",
                )
            if kind is None and rows:
                first = next(row[name] for row in rows if name in row)
                kind = "text" if isinstance(first, str) else "chat"
        self.kind, self.field = kind or "text", name or ""
        values = [row if isinstance(row, Bad) else self._value(row) for row in head]
        if all(isinstance(v, Bad) for v in values):
            why = next((v.reason for v in values if isinstance(v, Bad)), "it is empty")
            raise UserError(
                f"none of the first {len(values)} rows of source {source.name} can be used: {why}",
                "texts, or messages with the roles " + ", ".join(ROLES),
                "rename roles with roles: {their name: user}" if "role" in why else "look at the file's first rows",
            )
        return self.kind, self.field

    def _value(self, row: Any) -> Value | Bad:
        if isinstance(row, str):
            return _text(row)
        if not isinstance(row, Mapping):
            return Bad("a row that is not an object with fields")
        found = row.get(self.field)
        if found is None:
            return Bad(f"no field {self.field}")
        if self.kind == "chat":
            return self._messages(found)
        if not isinstance(found, str):
            return Bad(f"field {self.field} is not a text")
        return _text(found)

    def _messages(self, found: Any) -> Messages | Bad:
        if isinstance(found, str) or not isinstance(found, Sequence) or not len(found):
            return Bad(f"field {self.field} is not a list of messages")
        messages = []
        for message in found:
            if not isinstance(message, Mapping):
                return Bad("a message that is not an object with role and content")
            role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
            if not isinstance(role, str) or not isinstance(content, str):
                return Bad("a message without role or content")
            if isinstance(content := _encodable(content), Bad):
                return content
            role = self.source.roles.get(role) or ALIASES.get(role, role)
            if role not in ROLES:
                return Bad(f"unknown role {role!r}")
            messages.append({"role": role, "content": content})
        return tuple(messages)


def _text(found: str) -> str | Bad:
    return _encodable(found) if found.strip() else Bad("an empty text")


def _encodable(text: str) -> str | Bad:
    """A text that has a UTF-8 form. JSON may escape half of a surrogate pair (text that was cut there), and tokenizers crash."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return Bad("half of a surrogate pair, which is no character")
    return text


def content_key(value: Value) -> int:
    """64 bits that depend on a sample's text, or on its messages with their roles, alone: wherever it stands, the same."""
    text = value if isinstance(value, str) else json.dumps([[m["role"], m["content"]] for m in value])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def source_of(
    text: str, max_samples: int | None = None, *, split: str | None = None, subset: str | None = None, field: str | None = None
) -> Source:
    """What a word stands for: a file or pattern where there is such a file or it looks like one, a corpus that a package offers
    (NAME or NAME:PART), else a dataset's name.

    Args:
        split, subset: of datasets, by name or in a folder; None is the split train, and the only subset. Others have neither.
        field: that holds the texts or messages; None looks for it.
    """
    path = Path(text).expanduser()
    of_dataset: dict[str, Any] = {"split": split or "train", "subset": subset}
    if path.is_dir():
        return Source(path=str(path), max_samples=max_samples, field=field, **of_dataset)
    if path.exists():
        return Source(path=str(path), max_samples=max_samples, field=field)
    if text.partition(":")[0] in known_corpora():
        return Source(named=text, max_samples=max_samples, field=field)
    # Datasets are called OWNER/NAME, and their names may have dots.
    of_data = Path(path.name.removesuffix(".gz")).suffix in (".jsonl", ".json", ".txt", ".parquet", ".csv", ".arrow")
    like_a_dataset = text.count("/") == 1 or not path.suffix
    looks_like_a_path = of_data or any(c in text for c in "*?[") or text.startswith((".", "/", "~")) or not like_a_dataset
    if looks_like_a_path:
        return Source(path=str(path), max_samples=max_samples, field=field)
    return Source(dataset=text, max_samples=max_samples, field=field, **of_dataset)


def check_of_datasets(sources: Sequence[Source], split: str | None, subset: str | None) -> None:
    """UserError where a split or a subset is asked for, and none of the sources can have one."""
    given = " and ".join(f"{name} {value!r}" for name, value in (("split", split), ("subset", subset)) if value is not None)
    if given and not any(s.dataset is not None or (s.path is not None and Path(s.path).is_dir()) for s in sources):
        raise UserError(
            f"{given} of {', '.join(s.name for s in sources)}, where no dataset is",
            "the name of a dataset, or a folder with one",
            "leave it out: files and corpora have no splits and no subsets",
        )


# -------------------------------------------------------------------------------------------------------------------- named
def known_corpora() -> dict[str, EntryPoint]:
    """Names of corpora that installed packages offer."""
    return {point.name: point for point in entry_points(group=GROUP)}


class Named(NamedTuple):
    """A corpus of a package: the function that gives its rows, and the part of the name behind the colon, if there is one."""

    point: EntryPoint
    part: tuple[str, ...]

    def rows(self) -> Iterator[Any]:
        """The rows, from the first. UserError where the corpus has no such part."""
        return iter(_loaded(self.point)(*self.part))


def parts_of(point: EntryPoint) -> dict[str, str]:
    """What may stand behind the colon of a corpus' name, with a line about each; nothing where it takes no colon."""
    names = getattr(_loaded(point), "names", None)
    return dict(names()) if names is not None else {}


def _loaded(point: EntryPoint) -> Any:
    try:
        return point.load()
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"corpus {point.name} cannot be loaded: {error}",
            f"{point.value} in an installed package",
            "install the package again",
        ) from error


def _find_named(name: str) -> Named:
    name, colon, part = name.partition(":")
    known = known_corpora()
    if name not in known:
        raise UserError(
            f"no installed package offers a corpus {name!r}",
            "one of " + ", ".join(sorted(known)) if known else f"a package with an entry point in the group {GROUP}",
            "check the spelling, or install the package (again, where it was updated)",
        )
    parts = parts_of(known[name])
    if colon and not parts:
        raise UserError(f"corpus {name} has no parts, and {part!r} stands behind a colon", f"{name} alone")
    if parts and not part:
        raise UserError(f"corpus {name} has parts, and none is named", f"{name}:PART", f"such as {name}:{next(iter(parts))}")
    return Named(known[name], (part,) if colon else ())


# -------------------------------------------------------------------------------------------------------------------- files
def _files(source: Source) -> list[Path]:
    assert source.path is not None
    found = [Path(p) for p in sorted(glob.glob(source.path))] or [Path(source.path)]
    for file in found:
        if not file.exists():
            raise UserError(
                f"source not found: {source.path}", "an existing file, or a pattern that matches some", "check the path"
            )
    kinds = {Path(f.name.removesuffix(".gz")).suffix for f in found}
    if len(kinds) > 1:
        raise UserError(f"{source.path} matches files of several kinds: {', '.join(sorted(kinds))}", "one kind a source")
    return found


@contextlib.contextmanager
def _open(file: Path) -> Iterator[IO[bytes]]:
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as handle:
            yield handle  # type: ignore[misc]
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{file} cannot be unpacked: {error}", "a whole file that gzip wrote", "copy it again") from error


def _jsonl(file: Path) -> Iterator[Any]:
    with _open(file) as handle:
        yield from (parsed_line(line) for line in handle if line.strip())


def parsed_line(line: bytes) -> Any:
    """The row that a line of a JSONL file holds, or Bad."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):  # not JSON, not UTF-8, or brackets without end
        return Bad("a line that is not JSON")


def _documents(file: Path, separator: str) -> Iterator[str | Bad]:
    """Documents of a text file, of which no more than one and a block is in memory. Ends of line are read as \\n."""
    rest, cut = b"", separator.replace("\r\n", "\n").encode()
    with _open(file) as handle:
        while block := handle.read(1 << 20):
            while block.endswith(b"\r") and (more := handle.read(1)):
                block += more
            *whole, rest = (rest + block.replace(b"\r\n", b"\n")).split(cut)
            yield from (_decoded(d) for d in whole if d.strip())
    if rest.strip():
        yield _decoded(rest)


def _decoded(document: bytes) -> str | Bad:
    try:
        return document.decode().strip("\r\n")
    except UnicodeDecodeError:
        return Bad("a document that is not UTF-8")


def _parquet(file: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        opened = pq.ParquetFile(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{file} is not a Parquet file: {error}", "a file that a Parquet writer finished") from error
    for batch in opened.iter_batches(batch_size=1024):
        yield from batch.to_pylist()
