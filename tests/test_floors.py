"""The floors of the house: a module imports from its own floor or below, and importing the package is free."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "pvsae"
FLOORS = {
    "errors": 0, "runs": 0, "ledger": 0, "llm": 0, "replies": 0, "settings": 0, "sources": 0, "hf_datasets": 0, "parts": 0,
    "models": 1, "judges": 1, "traits": 1,
    "organism": 2, "vectors": 2, "saes": 2, "finetuning": 2, "screening": 2,
    "stages": 3, "reports": 4,
    "commands": 5, "demo": 5, "cli": 5, "__main__": 5,
}  # fmt: skip
# The package's own front door re-exports everything lazily.
ANYTHING = {"__init__"}


def part_of(module: str) -> str:
    """ "pvsae.models.chat" -> "models"."""
    return module.split(".")[1]


def imports_of(path: Path) -> set[str]:
    """Names of the package's modules that a file imports, at the top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {node.module} if node.module != "pvsae" else {f"pvsae.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("pvsae.")}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_imports_from_above(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own in ANYTHING:
        return
    wanted = {part_of(name) for name in imports_of(path)} & FLOORS.keys()
    above = sorted(part for part in wanted if FLOORS[part] > FLOORS[own])
    assert above == []
    if own != "organism":  # the embedded model is reached by its name alone, like any other
        assert "organism" not in wanted


def test_every_module_has_a_floor() -> None:
    names = {p.stem if p.is_file() else p.name for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert names - ANYTHING == FLOORS.keys()


def test_importing_the_package_and_its_parts_loads_nothing_heavy() -> None:
    parts = ", ".join(f"pvsae.{p.name}" for p in PACKAGE.iterdir() if (p / "__init__.py").exists())
    heavy = ("torch", "numpy", "pandas", "transformers", "transformer_lens", "matplotlib", "openai", "peft")
    code = f"import sys, pvsae, {parts}; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
