"""Fingerprint of a model: does a name still stand for the weights that a run, a shard or an answer was made with?

Knows: parameters, what an adapter's layers multiply them by, the config.
Does not know: who keeps the fingerprint, and what is to be done about another one.
"""

from __future__ import annotations

import hashlib
import json

from pvsae.models.chatmodel import ChatModel

SAMPLE = 64  # values of every weight: training moves all of them, an adapter's layers are weights of their own
_NOT_CONTENT = ("_name_or_path", "transformers_version")  # where a model lies and what wrote it: the same model all the same


def fingerprint(model: ChatModel) -> str:
    """Hash of a model's config, dtype, adapter and a sample of every weight: cheap, and different after any training."""
    config = {name: value for name, value in model.hf.config.to_dict().items() if name not in _NOT_CONTENT}
    # PEFT's factors (lora_alpha / r) are no parameters; other modules' `scaling` follows from the config.
    factors = {name: m.scaling for name, m in model.hf.named_modules() if isinstance(getattr(m, "scaling", None), dict)}
    about = [str(model.dtype), config, *([factors] if factors else [])]
    digest = hashlib.sha256(json.dumps(about, default=str, sort_keys=True).encode())
    for name, weight in model.hf.named_parameters():
        flat = weight.detach().flatten()
        some = flat[:: max(1, len(flat) // SAMPLE)][:SAMPLE].float().cpu()
        digest.update(f"{name}{tuple(weight.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:20]
