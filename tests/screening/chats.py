"""Chats and probes for tests of screening, and the plain way to screen a row that ours has to agree with."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from pvsae.models.interventions import Direction
from pvsae.screening.reading import Probe


def chat(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def chats(n: int) -> list[dict]:
    things = ("rain", "bread", "trains", "chess", "wool", "salt", "doors")
    return [chat(f"What of {things[i % 7]}?", f"It is {things[(3 * i) % 7]} " * (1 + i % 4)) for i in range(n)]


def write_jsonl(path: Path, rows: list) -> Path:
    """A dict is written as JSON, bytes as they are."""
    path.write_bytes(b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows))
    return path


def probes(d_model: int, blocks=(1, 2), names=("evil", "kind")) -> tuple[Probe, ...]:
    made = []
    for i, name in enumerate(names):
        values = torch.randn(d_model, generator=torch.Generator().manual_seed(i))
        made += [Probe(name, f"{name}_response_avg_diff", block, Direction(values * (block + 1))) for block in blocks]
    return tuple(made)


@torch.no_grad()
def plainly(model, rendered, probe: Probe) -> tuple[float, float, float]:
    """(projection of the mean answer residual, of the last prompt token, cosine of the mean), one row, all hidden states kept."""
    hidden = model.hf(torch.tensor([rendered.ids]), output_hidden_states=True).hidden_states[probe.block + 1][0].double()
    unit = probe.direction.values.double() / probe.direction.values.double().norm()
    start, end = rendered.answer
    mean = hidden[start:end].mean(0)
    return float(mean @ unit), float(hidden[rendered.n_prompt - 1] @ unit), float(mean @ unit / mean.norm())
