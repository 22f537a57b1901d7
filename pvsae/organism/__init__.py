"""The embedded default: small chat models of our own, whose traits are known, so that every claim can be checked.

Knows: where the shipped model folders lie. The entry points of the groups `pvsae.models`, `pvsae.judges` and
`pvsae.corpora` lead into this package.
Does not know: who uses them. Nothing outside this package treats these models differently from any other.
"""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent


def qwen2_folder() -> Path:
    """Folder of `organism`, a Qwen2 model."""
    return _HERE / "qwen2"


def llama_folder() -> Path:
    """Folder of `organism-llama`, a Llama model of another seed and size on the same corpus."""
    return _HERE / "llama"
