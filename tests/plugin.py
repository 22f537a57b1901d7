"""A third party's package, made in a folder: it registers the tests' byte judge under the name "bytes"."""

from __future__ import annotations

from pathlib import Path


def make_plugin(folder: Path) -> list[str]:
    """Writes the package's metadata into `folder`; gives the entries for PYTHONPATH that make it installed."""
    info = folder / "bytejudge-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bytejudge\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[pvsae.judges]\nbytes = byte_judge:ByteJudge\n")
    return [str(folder), str(Path(__file__).parent / "stages")]
