"""Folders as dictionary_learning writes them, of tiny shape."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.saes.small import D_MODEL, D_SAE


def make_arrays(kind: str, *, threshold: float = 0.4, k: int = 5, seed: int = 3, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """A state dict of one of its classes."""
    g = torch.Generator().manual_seed(seed)
    encoder = torch.randn(D_SAE, D_MODEL, generator=g)
    decoder = torch.randn(D_MODEL, D_SAE, generator=g)
    b_enc, b_dec = 0.1 * torch.randn(D_SAE, generator=g), 0.3 * torch.randn(D_MODEL, generator=g)
    linear = {"encoder.weight": encoder, "encoder.bias": b_enc, "decoder.weight": decoder}
    matrices = {"W_enc": encoder.T.contiguous(), "b_enc": b_enc, "W_dec": decoder.T.contiguous(), "b_dec": b_dec}
    counted = {"k": torch.tensor(k, dtype=torch.int), "threshold": torch.tensor(threshold)}
    made = {
        "BatchTopKSAE": {**linear, **counted, "b_dec": b_dec},
        "AutoEncoderTopK": {**linear, **counted, "b_dec": b_dec},
        "MatryoshkaBatchTopKSAE": {**matrices, **counted, "group_sizes": torch.tensor([D_SAE // 2, D_SAE // 2])},
        "AutoEncoder": {**linear, "bias": b_dec},
        "AutoEncoderNew": {**linear, "decoder.bias": b_dec},
        "JumpReluAutoEncoder": {**matrices, "threshold": torch.rand(D_SAE, generator=g)},
        "GatedAutoEncoder": {**linear, "decoder_bias": b_dec},
    }[kind]
    return {name: v.to(dtype) if v.is_floating_point() and v.ndim else v for name, v in made.items()}


def make_config(kind: str, *, k: int = 5, layer: int = 19, **buffer) -> dict:
    trainer = {
        "trainer_class": "BatchTopKTrainer", "dict_class": kind, "lr": 1e-4, "steps": 100, "activation_dim": D_MODEL,
        "dict_size": D_SAE, "k": k, "layer": layer, "lm_name": "Qwen/Qwen2.5-7B-Instruct", "device": "cuda",
        "submodule_name": f"resid_post_layer_{layer}", "norm_factor": 12.5,
    }  # fmt: skip
    return {"trainer": trainer, "buffer": {"d_submodule": D_MODEL, "io": "out", "ctx_len": 1024, **buffer}}


def write_folder(folder: Path, kind: str = "BatchTopKSAE", *, config: dict | None = None, **options) -> Path:
    """ae.pt and config.json in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(make_arrays(kind, **options), folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps(config or make_config(kind)))
    return folder
