"""Treatments: what is done to a model while it is trained, and taken away afterwards (paper, section on preventative steering).

Knows: interventions and captures of the hook API, how strong they are at a step, spans of directions, one loss term.
Does not know: where directions come from, optimisers, rows.

- Preventative steering: `Treatment(edits)` with `Add`s (at one block, or `incremental` ones at every block) or an `AddFeature`.
  What the training data pushes towards is there already, so that the weights need not learn it.
- CAFT, concept ablation: `Treatment(ablations({block: directions}))`. Nothing along the directions reaches the blocks above, so
  that no gradient rewards its use.
- Projection regularisation: `Treatment(penalty=ShiftPenalty(...))`, a term of the loss.

`Treatment()` does nothing, and neither does one of strength 0: training is then the same to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pvsae.errors import UserError
from pvsae.models.captures import Projection, Read
from pvsae.models.interventions import Ablate, Add, AddFeature, Direction, Intervention, to_config

SCHEDULES = ("constant", "ramp", "warmup", "decay")
_SAME = 1e-4  # part of a direction that must lie outside of the span of those before it, or it adds nothing but noise


@dataclass(frozen=True)
class Schedule:
    """How strong a treatment is at each step, as a factor of its full strength.

    - "constant": 1.
    - "ramp": from 0 at the first step in a straight line to 1 at the last one.
    - "warmup": the same over the first `share` of all steps, 1 afterwards.
    - "decay": 1 at first, over the last `share` of all steps in a straight line to 0 at the last one.
    """

    kind: str = "constant"
    share: float = 0.5

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise UserError(f"schedule {self.kind!r}", "one of " + ", ".join(SCHEDULES))
        if not 0 < self.share <= 1:
            raise UserError(f"share {self.share} of a schedule", "more than 0 and at most 1")

    def factor(self, step: int, steps: int) -> float:
        """The factor at a step (counted from 0) of `steps`."""
        last = max(steps - 1, 1)
        if self.kind == "constant":
            return 1.0
        if self.kind == "ramp":
            return step / last
        width = max(self.share * last, 1.0)
        return min(1.0, (step if self.kind == "warmup" else last - step) / width)


@dataclass(frozen=True)
class ShiftPenalty:
    """A loss term on how far training moves residuals along directions (projection regularisation).

    With u a unit direction at a block, h_t the residual there at token t and h0_t what the model without the adapter has there on
    the same tokens,

        loss = cross-entropy + weight * mean over tokens t and directions u of (h_t.u - h0_t.u)^2.

    Tokens are all real ones of the step's rows, prompts too. Projections are in residual units, so `weight` is in nats per
    squared residual unit. The gradient goes through h_t alone.

    Attributes:
        directions: block -> directions there, whatever their lengths.
        weight: 0 leaves the term out.
    """

    directions: tuple[tuple[int, tuple[Direction, ...]], ...]
    weight: float

    @property
    def captures(self) -> tuple[Projection, ...]:
        """What has to be read of both models."""
        return tuple(Projection(directions, block) for block, directions in self.directions)

    def squares(self, tuned: Mapping[str, list[Read]], base: Mapping[str, list[Read]]) -> Float[Tensor, ""]:
        """Sum over tokens, and mean over directions, of the squared shift in one forward pass.

        Args:
            tuned, base: what `HookSession.take` gave after it: {capture.key: [one list of [tokens, n_directions]]}.
        """
        total: Tensor | None = None
        for capture in self.captures:
            now, before = (torch.cat(list(read[capture.key][-1])) for read in (tuned, base))
            part = (now - before.detach()).square().sum()
            total = part if total is None else total + part
        assert total is not None
        return total / sum(len(directions) for _, directions in self.directions)

    def problem(self) -> str | None:
        """Why this term cannot be used, or None."""
        if not self.directions or not all(directions for _, directions in self.directions):
            return "a penalty without directions"
        if not 0 <= self.weight < float("inf"):
            return f"a penalty of weight {self.weight}"
        return next((p for c in self.captures if (p := c.problem())), None)


@dataclass(frozen=True)
class Treatment:
    """What is done in every forward pass of a training.

    Attributes:
        edits: interventions at full strength. Under a schedule that is not constant they have to be additions.
        schedule: how strong they are when.
        penalty: a further loss term.
    """

    edits: tuple[Intervention, ...] = ()
    schedule: Schedule = Schedule()
    penalty: ShiftPenalty | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "edits", tuple(self.edits))
        fixed = [type(edit).__name__ for edit in self.edits if not isinstance(edit, (Add, AddFeature))]
        if fixed and self.schedule.kind != "constant":
            raise UserError(f"schedule {self.schedule.kind!r} of {fixed[0]}", "additions, whose strength is a number", "constant")
        problem = self.penalty.problem() if self.penalty is not None else None
        if problem is not None:
            raise UserError(problem, "directions of finite length, and a finite weight of 0 or more")

    @property
    def active_penalty(self) -> ShiftPenalty | None:
        """The penalty, if it has a weight."""
        return self.penalty if self.penalty is not None and self.penalty.weight > 0 else None

    def at(self, step: int, steps: int) -> tuple[Intervention, ...]:
        """The interventions of a step."""
        factor = self.schedule.factor(step, steps)
        return self.edits if factor == 1 else tuple(_scaled(edit, factor) for edit in self.edits)

    def describe(self) -> dict[str, Any]:
        """JSON of what was done, directions by name, hash and norm; for an adapter's metadata."""
        penalty = None
        if self.penalty is not None:
            shown = [
                {"block": block, "ref": d.ref, "sha256": d.sha256, "norm": d.norm}
                for block, ds in self.penalty.directions
                for d in ds
            ]
            penalty = {"weight": self.penalty.weight, "directions": shown}
        schedule = {"kind": self.schedule.kind, "share": self.schedule.share}
        return {"edits": [to_config(edit) for edit in self.edits], "schedule": schedule, "penalty": penalty}


def _scaled(edit: Intervention, factor: float) -> Intervention:
    if isinstance(edit, Add):
        return replace(edit, coef=factor * edit.coef)
    assert isinstance(edit, AddFeature)
    return replace(edit, strength=factor * edit.strength)


def ablations(directions: Mapping[int, Sequence[Direction]], positions: str = "all") -> tuple[Ablate, ...]:
    """Interventions that take everything in the span of the directions out of the residual, block by block (CAFT).

    One after the other, projections on directions that are not at right angles leave a part of the first ones behind; so an
    orthonormal basis of the span is ablated. Directions that are nearly in the span of those before them add nothing to it.

    Raises:
        UserError: a direction without length or with values that are not finite.
    """
    return tuple(Ablate(basis, block, positions) for block, some in directions.items() for basis in orthonormal(some))


def orthonormal(directions: Sequence[Direction]) -> tuple[Direction, ...]:
    """An orthonormal basis of the directions' span: Gram and Schmidt, twice, in fp64. Each keeps the name it came from."""
    basis: list[Tensor] = []
    out = []
    for direction in directions:
        problem = direction.problem(needs_length=True)
        if problem is not None:
            raise UserError(problem, "directions that point somewhere")
        rest = direction.values.double() / direction.values.double().norm()
        for _ in range(2):
            for unit in basis:
                rest = rest - (rest @ unit) * unit
        if float(rest.norm()) < _SAME:
            continue
        basis.append(rest / rest.norm())
        out.append(Direction(basis[-1].float(), direction.ref))
    return tuple(out)
