"""A talk with a model whose vectors and features can be turned up and down between turns, every token read on each of them.

Knows: dials (a persona vector or a feature, with its unit), the turns so far, what a turn reads, the JSON of a session.
Does not know: terminals and commands (commands/chat.py), where vectors and features come from (inputs.py, handles.py).

Strengths have the units of `pvsae steer`: multiples of the raw vector, multiples of a feature's highest activation. At each turn
the whole talk so far is read by the model under the dials as they stand then. Readings are taken behind the edits: a token's
projection on a vector that is turned up holds what was added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pvsae.errors import UserError
from pvsae.runs import write_json

if TYPE_CHECKING:
    from pvsae.models import Capture, ChatModel, Direction, Intervention, Rendered, Sampling
    from pvsae.stages.handles import Feature

VECTOR, FEATURE = "vector", "feature"


@dataclass(frozen=True, eq=False)
class Dial:
    """Something to turn.

    Attributes:
        name: what it is called in a talk.
        block: where it acts and is read.
        of: the direction (a persona vector, raw), or the feature.
        unit: of its strength, in words.
        source: where the vector, or the feature and its highest activation, come from.
        step: what one turn up adds.
    """

    name: str
    block: int
    of: Direction | Feature
    unit: str
    source: str
    step: float = 0.5

    @property
    def kind(self) -> str:
        from pvsae.stages.handles import Feature

        return FEATURE if isinstance(self.of, Feature) else VECTOR

    @property
    def scale(self) -> float:
        """What a reading is large against: a feature's highest activation, a vector's length (the distance of its two means)."""
        from pvsae.stages.handles import Feature

        return self.of.maximum if isinstance(self.of, Feature) else self.of.norm

    def edits(self, strength: float, positions: str) -> tuple[Intervention, ...]:
        from pvsae.models import Add
        from pvsae.stages.handles import Feature

        if strength == 0:
            return ()
        if isinstance(self.of, Feature):
            return self.of.edits("add", self.of.raw(strength, "max"), positions)
        return (Add(self.of, self.block, strength, positions),)

    def capture(self) -> Capture:
        """Reads every token: the projection on the unit vector, or the feature's activation."""
        from pvsae.models import FeatureActs, Projection
        from pvsae.stages.handles import Feature

        if isinstance(self.of, Feature):
            return FeatureActs(self.of.sae, self.block, "all", (self.of.index,))
        return Projection((self.of,), self.block)


@dataclass(frozen=True)
class Token:
    """A token of a turn: its text, whose it is ("user", "assistant" or "template"), and its reading on every dial."""

    text: str
    role: str
    readings: dict[str, float]


@dataclass(frozen=True)
class Turn:
    """One question and its answer.

    Attributes:
        strengths: dials that were not at 0.
        tokens: from the question on, with readings.
        finish: "stop" or "length".
    """

    user: str
    assistant: str
    strengths: dict[str, float]
    tokens: list[Token]
    finish: str


@dataclass
class Talk:
    """A session.

    Attributes:
        dials: by name, in the order in which they are shown.
        strengths: of every dial.
        positions: tokens at which dials act.
        system: system prompt, or None.
    """

    model: ChatModel
    dials: dict[str, Dial]
    sampling: Sampling
    system: str | None = None
    positions: str = "all"
    turns: list[Turn] = field(default_factory=list)
    strengths: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        self.strengths = dict.fromkeys(self.dials, 0.0)
        for dial in self.dials.values():  # refuses another d_model or block before the first word
            with self.model.hooks(dial.edits(1.0, self.positions), [dial.capture()]):
                pass

    def find(self, name: str) -> Dial:
        """The dial of that name, or the one whose name begins so. UserError where none or several do."""
        if name in self.dials:
            return self.dials[name]
        near = [known for known in self.dials if known.startswith(name)] if name else []
        if len(near) != 1:
            raise UserError(f"no dial {name!r}", "one of " + (", ".join(near or self.dials) or "none: start with --feature"))
        return self.dials[near[0]]

    def set(self, name: str, strength: float) -> Dial:
        """Turns a dial to a strength. UserError for one that is not finite."""
        if not abs(strength) < float("inf"):
            raise UserError(f"strength {strength}", "a finite number")
        dial = self.find(name)
        self.strengths[dial.name] = strength
        return dial

    def off(self) -> None:
        """All dials to 0."""
        self.strengths = dict.fromkeys(self.dials, 0.0)

    @property
    def edits(self) -> tuple[Intervention, ...]:
        """What the dials do to the model as they stand, in their order."""
        return tuple(e for name, dial in self.dials.items() for e in dial.edits(self.strengths[name], self.positions))

    @property
    def messages(self) -> list[dict[str, str]]:
        out = [] if self.system is None else [{"role": "system", "content": self.system}]
        for turn in self.turns:
            out += [{"role": "user", "content": turn.user}, {"role": "assistant", "content": turn.assistant}]
        return out

    def say(self, text: str) -> Turn:
        """The model's answer, and what every token of question and answer reads on every dial.

        The same talk under the same seed and dials repeats to the token.

        Raises: UserError where the talk has become longer than the model's context; the turn is then not kept.
        """
        prompt = self.model.chat.prompt([*self.messages, {"role": "user", "content": text}])
        (answer,) = self.model.generate([prompt], self.sampling, row_keys=[f"turn {len(self.turns)}"], interventions=self.edits)
        whole = self.model.chat.with_answer_ids(prompt, answer.ids)
        used = {name: strength for name, strength in self.strengths.items() if strength}
        turn = Turn(text, answer.text, used, self._tokens(whole), answer.finish)
        self.turns.append(turn)
        return turn

    def _tokens(self, row: Rendered) -> list[Token]:
        start = next((start for role, start, _ in reversed(row.spans) if role == "user"), 0)
        read: dict[str, list[float]] = {}
        # One capture at a time: two dials may read the same thing under one key.
        for name, dial in self.dials.items():
            capture = dial.capture()
            read[name] = self.model.capture([row], [capture], self.edits)[capture.key][0][:, 0].tolist()
        roles = ["template"] * len(row.ids)
        for role, first, last in (*row.spans, ("assistant", *row.answer)):
            roles[first:last] = [role] * (last - first)
        return [
            Token(self.model.chat.decode([row.ids[i]]), roles[i], {name: values[i] for name, values in read.items()})
            for i in range(start, len(row.ids))
        ]

    def save(self, path: str | Path) -> Path:
        """The whole session as JSON (atomic): model, sampling, dials with their units and sources, turns with readings."""
        from dataclasses import asdict

        dials = [
            {"name": d.name, "kind": d.kind, "block": d.block, "unit": d.unit, "scale": d.scale, "source": d.source}
            for d in self.dials.values()
        ]
        write_json(
            path,
            {
                "model": self.model.name, "system": self.system, "positions": self.positions, "sampling": asdict(self.sampling),
                "template_notes": list(self.model.chat.notes), "dials": dials, "turns": [asdict(turn) for turn in self.turns],
            },
        )  # fmt: skip
        return Path(path)

    def begin_anew(self, system: str | None = None) -> Talk:
        """The same model and dials, at the strengths where they stand, and nothing said yet."""
        out = replace(self, system=system if system is not None else self.system, turns=[])
        out.strengths = dict(self.strengths)
        return out


def dials_of_vectors(
    path: str, traits: Sequence[str], model: ChatModel, block: int | None, layers: str | None, statistic: str
) -> list[Dial]:
    """A dial a trait of a vector file or an extraction's run folder; every trait that is there where none is named.

    Raises: UserError as `open_vectors`, or no trait named and none to be found.
    """
    from pvsae.stages.inputs import check_blocks, chosen_block, known_traits, open_vectors

    out = []
    for name in known_traits(traits, path):
        where = check_blocks((block,), model)[0] if block is not None else chosen_block(name, model, layers)
        direction = open_vectors(path, name, model, statistic).direction(where, statistic)
        if not direction.norm > 0:
            raise UserError(f"{statistic} of {name!r} is zero at block {where}", "a vector that points somewhere")
        out.append(Dial(name, where, direction, "multiples of the vector", f"{path}, {statistic}"))
    return out


def dials_of_features(
    words: Sequence[str],
    model: ChatModel,
    block: int | None,
    runs: Sequence[str],
    tokens: int,
    *,
    other_model: bool = False,
) -> list[Dial]:
    """A dial a feature, its unit measured as `pvsae steer --feature` measures it.

    Raises: UserError as `open_features`; a dictionary that brings no text to measure on and of which no run in `runs` is; a
        feature that is active nowhere.
    """
    from pvsae.stages.counts import count
    from pvsae.stages.handles import open_features

    out, counted = [], {}
    for feature in open_features(words, model, block, other_model=other_model):
        key = feature.sae.ref
        if key not in counted:
            counted[key] = count(feature.sae, model, feature.block, runs, tokens)
        found = counted[key]
        if found is None:
            raise UserError(
                f"{key} brings no text on which the highest activations of its features could be measured",
                "the run folder of an evaluation",
                "pvsae sae eval, then --activity RUN",
            )
        measured = replace(feature, sae=found.sae, maximum=found.maximum(feature.index))
        source = f"{key}, latent {feature.index}; highest activation {measured.maximum:.4g} ({found.source})"
        source += "".join(f"; {note}" for note in feature.sae.info.notes)
        out.append(Dial(feature.name, feature.block, measured, "multiples of the highest activation", source))
    return out
