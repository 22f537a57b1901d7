"""Rows and trainings of a tiny model that the tests of this folder share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from pvsae.finetuning.lora import LoraSettings, save
from pvsae.finetuning.rows import Row, make_rows
from pvsae.finetuning.trainer import TrainSettings, train
from pvsae.finetuning.treatments import Treatment
from tests.saes.corpora import chat

LORA, NONE = LoraSettings(rank=4, alpha=8), Treatment()


def rows_of(model: Any, n: int = 12, **options: Any) -> list[Row]:
    """Rows of different lengths, some with two turns or a system prompt."""
    chats = [chat(i, "Be brief." if i % 3 == 0 else None, turns=1 + i % 2) for i in range(n)]
    rows, counts = make_rows(chats, model.chat, **{"max_length": 512, **options})
    assert counts.used == n
    return rows


def settings(**changes: Any) -> TrainSettings:
    """Four steps of three rows, with a learning rate at which a tiny model moves."""
    values = {"learning_rate": 1e-2, "warmup_steps": 1, "batch": 3, "accumulation": 1, "max_steps": 4, "save_every": 2, "seed": 5}
    return TrainSettings(**{**values, **changes})


def trained(
    model: Any, folder: Path, treatment: Treatment = NONE, n: int = 12, lora: LoraSettings = LORA, **changes: Any
) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """The adapter's tensors, and the metrics, of a training in a folder."""
    out = folder / "adapter"
    lines = train(
        model, rows_of(model, n), treatment, settings(**changes), lora, folder / "parts",
        lambda peft: save(peft, out, {}), progress=False,
    )  # fmt: skip
    return load_file(out / "adapter_model.safetensors"), lines


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two adapters are the same to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 1e-5) -> bool:
    """Whether they differ by no more than rounding."""
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], atol=tolerance, rtol=1e-3) for name in a)
