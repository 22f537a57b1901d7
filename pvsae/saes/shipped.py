"""The configs that come with the package: sae_configs/NAME.yaml, beside the package in a checkout, in it where it is installed.

Knows: where they lie, their names and first words. Does not know: what is in them; nothing heavy is imported for a list.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from pvsae import settings
from pvsae.errors import UserError

_PACKAGE = Path(settings.__file__).parent
FOLDER = next((f for f in (_PACKAGE / "sae_configs", _PACKAGE.parent / "sae_configs") if f.is_dir()), _PACKAGE / "sae_configs")


def names() -> list[str]:
    """Names of the shipped configs."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def find(name: str | Path) -> Path:
    """The file that a path or a shipped config's name leads to. UserError if there is none."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if str(name) in names():
        return FOLDER / f"{name}.yaml"
    near = difflib.get_close_matches(path.name.lower().removesuffix(".yaml"), names(), n=1)
    raise UserError(
        f"there is no config {str(name)!r}",
        "a YAML file, or one of " + ", ".join(names()),
        f"did you mean {near[0]}?" if near else "`pvsae sae list` says what each of these is",
    )


def about(name: str) -> str:
    """The line that a config says of itself."""
    return str(settings.read(find(name)).get("about", ""))
