"""Small dictionaries that the tests of this folder share."""

from __future__ import annotations

import pytest
import torch

from pvsae.saes.dictionary import SAE, OutlierFilter, SAEInfo

D_MODEL, D_SAE = 12, 40


def make_sae(seed: int = 0, *, d_model: int = D_MODEL, d_sae: int = D_SAE, dtype=torch.float32, **options) -> SAE:
    """Random arrays with one row a latent; about a third of the latents are active on unit normal residuals."""
    g = torch.Generator().manual_seed(seed)
    decoder = torch.randn(d_sae, d_model, generator=g)
    decoder /= decoder.norm(dim=1, keepdim=True)
    encoder = decoder + 0.3 * torch.randn(d_sae, d_model, generator=g)
    info = SAEInfo(
        model="tiny",
        block=1,
        k=12.0,
        outliers=OutlierFilter(10.0, d_model**0.5),
        chat={"template": "chatml"},
        drop_first=2,
        prepend_bos=False,
        context_size=64,
        dataset="a/b",
        training={"tokens": 1000, "lr": 1e-4},
    )
    settings = {"threshold": 0.2 + 0.2 * torch.rand(d_sae, generator=g), "info": info, **options}
    return SAE(
        encoder.to(dtype).T,
        0.1 * torch.randn(d_sae, generator=g),
        decoder.to(dtype),
        0.3 * torch.randn(d_model, generator=g),
        **settings,
    )


def residuals(*shape: int, seed: int = 1, d_model: int = D_MODEL) -> torch.Tensor:
    return torch.randn(*shape, d_model, generator=torch.Generator().manual_seed(seed))


def need_sae_lens():
    """The package sae_lens, or a skip that says why."""
    return pytest.importorskip("sae_lens", reason="sae-lens is not installed (pip install 'pvsae[sae]')")
