"""A dictionary of the tiny model whose latents are active: thresholds from residuals that the model really has."""

from __future__ import annotations

from pathlib import Path

import torch

from pvsae.models import Residual
from pvsae.saes.dictionary import SAE, SAEInfo
from pvsae.saes.folders import load, save


def save_sae(model, folder: Path, *, block: int | None = 1, d_sae: int = 60, seed: int = 0) -> Path:
    """Saves a dictionary with rows of different lengths; latent `d_sae - 1` is never active."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(d_sae, model.d_model, generator=g)
    rows = rows / rows.norm(dim=1, keepdim=True) * (0.5 + torch.rand(d_sae, 1, generator=g))
    read = Residual(1)
    prompts = [model.chat.prompt([{"role": "user", "content": text}]) for text in ("What is a ferry?", "Why has it stopped?")]
    x = torch.cat(model.capture(prompts, [read])[read.key])
    pre = x @ rows.T
    thresholds = pre.quantile(torch.linspace(0.5, 0.95, d_sae)[:, None].flatten(), dim=0).diagonal().clamp(min=1e-3)
    thresholds[-1] = 1e6
    sae = SAE(
        rows.T, torch.zeros(d_sae), rows, torch.zeros(model.d_model), thresholds,
        info=SAEInfo(model=Path(model.name).name, block=block, drop_first=1), ref="tiny sae",
    )  # fmt: skip
    return save(sae, folder)


def open_sae(folder: Path) -> SAE:
    return load(folder).in_memory()
