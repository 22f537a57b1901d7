"""A page as a real browser shows it: headless Chromium, in a frame of a phone's width (its windows are not that narrow)."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path
from typing import NamedTuple

import pytest

_LOOK = """
onload = () => {
  const images = [...document.images];
  parent.document.title = JSON.stringify([document.documentElement.scrollWidth, innerWidth, images.length,
    images.filter(i => !i.complete || !i.naturalWidth).length]);
}
"""


PHONE = 390  # pixels


class Opened(NamedTuple):
    """What the browser says of a page.

    content, window: widths in pixels. images: how many, broken: those that show nothing. console: what was written to it.
    """

    content: int
    window: int
    images: int
    broken: int
    console: list[str]


def opened(page: Path, folder: Path) -> Opened:
    """Opens a page; `folder` takes the browser's files. Skips where there is no Chromium."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / "probe.html"
    html = page.read_text(encoding="utf-8")
    assert "</body>" in html
    framed = html.replace("</body>", f"<script>{_LOOK}</script></body>")
    frame = f'<iframe srcdoc="{escape(framed)}" style="width: {PHONE}px; height: 844px; border: 0"></iframe>'
    probe.write_text(f"<!doctype html><meta charset=utf-8><title></title><body>{frame}</body>", encoding="utf-8")
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=800,900",
         f"--user-data-dir={folder / 'profile'}", "--dump-dom", probe.as_uri()],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title, done.stdout[:500]
    return Opened(*json.loads(unescape(title[1])), [line for line in done.stderr.splitlines() if "CONSOLE" in line])


def assert_fine(page: Path, folder: Path, *, images: int) -> None:
    """No message on the console, every image shown, nothing wider than the window."""
    seen = opened(page, folder)
    assert not seen.console
    assert seen.window == PHONE
    assert seen.broken == 0
    assert seen.images >= images
    assert seen.content <= seen.window


def page_of(*figures: Path, folder: Path) -> Path:
    """A page that shows figures, to be opened."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = [
        f'<img style="max-width: 100%" src="data:image/png;base64,{base64.b64encode(f.read_bytes()).decode()}">' for f in figures
    ]
    page = folder / "figures.html"
    page.write_text(f"<!doctype html><title>figures</title><body>{''.join(shown)}</body>", encoding="utf-8")
    return page
