"""What an installation holds: every module, and the configs of dictionaries, which lie beside the package in a checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from pvsae.saes import shipped

ROOT = Path(__file__).resolve().parents[1]


def test_the_list_of_packages_is_whole() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "pvsae").rglob("__init__.py")}
    assert set(listed) == there | {"pvsae.sae_configs"}


def test_a_checkout_has_its_configs_in_a_folder_of_their_own() -> None:
    assert shipped.FOLDER == ROOT / "sae_configs"
    assert shipped.names()


@pytest.mark.slow
def test_a_wheel_holds_every_file_of_the_package_and_the_configs(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", reason="setuptools is not installed")
    source = tmp_path / "source"
    for name in ("pvsae", "sae_configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    files = {
        p.relative_to(source).as_posix() for name in ("pvsae", "sae_configs") for p in (source / name).rglob("*") if p.is_file()
    }
    code = f"import setuptools.build_meta as b; b.build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == {name.replace("sae_configs/", "pvsae/sae_configs/") for name in files}
