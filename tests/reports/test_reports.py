"""Figures and the page from run folders with made-up numbers."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from made_up_runs import TRAITS, make_runs

from pvsae.errors import UserError
from pvsae.reports import draw, write_report
from pvsae.reports.figures import monitoring_figure, steering_figure
from pvsae.runs import RunDir
from tests.browser import assert_fine


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return make_runs(tmp_path_factory.mktemp("made-up"))


def curve(ax, label: str) -> tuple[np.ndarray, np.ndarray]:
    (line,) = [line for line in ax.get_lines() if line.get_label() == label]
    return np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)


def test_the_steering_curve_goes_through_flip_unsteered_and_vector(runs) -> None:
    table = pd.read_csv(runs / "steer" / "tables" / "steering.csv")
    axes = steering_figure(table).axes
    assert [ax.get_title(loc="left") for ax in axes] == list(TRAITS)
    assert axes[0].get_title(loc="right") == "block 3"
    x, y = curve(axes[0], "persona vector")
    assert x.tolist() == [-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0]
    assert y.tolist() == [1.0, 1.0, 1.0, 2.0, 20.0, 40.0, 80.0]
    x, y = curve(axes[0], "random direction")
    assert y.tolist() == [2.0, 3.0, 3.0, 3.0]
    assert curve(axes[0], "eliciting prompt, no vector")[1].tolist() == [93.0, 93.0]


def test_the_monitoring_figure_shows_every_point_and_both_correlations(runs) -> None:
    tables = [pd.read_csv(runs / "monitor" / "tables" / f"{name}.csv") for name in ("points", "correlations")]
    axes = monitoring_figure(*tables).axes
    assert sum(len(c.get_offsets()) for c in axes[0].collections) == 8 * 10 + 5 * 10
    assert axes[0].get_title(loc="right") == "r = 0.90, within = 0.30"


@pytest.mark.parametrize(
    ("stage", "names"),
    [("extract", ["extraction"]), ("layers", ["layers"]), ("steer", ["steering"]), ("monitor", ["monitoring", "trace"])],
)
def test_every_stage_has_its_figures_and_drawing_repeats(runs, stage, names) -> None:
    paths = draw(runs / stage)
    assert [p.stem for p in paths] == names
    first = [p.read_bytes() for p in paths]
    assert all(data.startswith(b"\x89PNG") and len(data) > 10_000 for data in first)
    assert [p.read_bytes() for p in draw(runs / stage)] == first


class Page(HTMLParser):
    """Collects what a test asks about: tags, their attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_stands_alone_and_escapes_what_it_shows(runs) -> None:
    path = write_report(runs)
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe")]
    assert all(a["src"].startswith("data:image/png;base64,") for tag, a in page.tags if tag == "img")
    assert len([1 for tag, _ in page.tags if tag == "img"]) == 5
    assert not re.search(r"https?://", html)
    assert "Be <b>evil</b> & sly." in page.text
    assert " <you>" in page.text
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    order = [a["id"] for tag, a in page.tags if tag == "section"]
    assert order == ["extract", "layers", "steer", "monitor"]


def test_the_page_says_what_failed_and_what_is_unfinished(runs, tmp_path) -> None:
    text = Page(write_report(runs, tmp_path / "a.html").read_text()).text
    assert "scores that the judge did not give: 3" in text
    assert "nothing: 0" not in text
    assert "not finished" not in text
    RunDir.open(tmp_path / "half" / "steer", "steer", {"model": "m"}).close()
    assert "not finished" in Page(write_report(tmp_path / "half").read_text()).text


def test_the_page_shows_what_servers_were_asked(tmp_path) -> None:
    row = {"server": "judge <openai:m>", "calls": 12345, "cached": 6, "failed": 1, "retries": 0, "tokens_in": 7, "tokens_out": 8}
    said = {
        "paid": [{**row, "cost": 0.123456}, {**row, "cost": None}],
        "free": [],
        "unknown": None,
    }
    for name, rows in said.items():
        with RunDir.open(tmp_path / name / "steer", "steer", {"model": "m"}) as run:
            run.result({"title": "Steering", **({} if rows is None else {"costs": rows})})
        said[name] = " ".join(Page(write_report(tmp_path / name).read_text()).text.split())
    assert "".join(("judge <openai:m>", "12,345", "6", "1", "0", "7", "8", "0.1235")) in said["paid"]
    assert "no price given" in said["paid"]
    assert [("No server was asked" in said[name]) for name in said] == [False, True, False]
    assert [("What servers were asked" in said[name]) for name in said] == [True, False, False]


def test_folders_without_runs_are_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no run folder"):
        write_report(tmp_path)
    RunDir.open(tmp_path / "run", "bake", {}).close()
    with pytest.raises(UserError, match="has no figure"):
        draw(tmp_path / "run")


@pytest.mark.slow
def test_the_page_in_a_browser(runs, tmp_path) -> None:
    assert_fine(write_report(runs), tmp_path, images=5)
