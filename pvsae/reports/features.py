"""One self-contained page of features: what fires them, what they promote, what stands near them, what they are said to be.

Knows: the records and labels in a run folder of `sae_features`, and a Jinja template; histograms are drawn as SVG in the page.
Does not know: models, how anything was measured. The page loads nothing and has no script.
"""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import jinja2

from pvsae.errors import UserError
from pvsae.runs import RunDir, atomic_write_text, now, read_json

WIDTH, HEIGHT = 320, 64  # of a histogram, in its own units
TOP, A_QUANTILE = 8, 2  # examples on the page; the records have all of them
BREAK = "↵"  # shown for a line break, so that an example stays one paragraph


def write_feature_page(folder: str | Path, out: str | Path | None = None, *, most: int = 100) -> Path:
    """Write features.html into a run folder of `pvsae sae features` (or to `out`), and give its path.

    Args:
        most: features on the page; of the others it says how many there are.

    Raises: UserError where the folder is no such run, or the run is not finished.
    """
    run = RunDir.read(folder)
    records = run.path / "cards" / "cards.jsonl"
    if run.command != "sae_features" or not records.is_file():
        raise UserError(f"{folder} holds no evidence for features", "a finished run of `pvsae sae features`")
    result = read_json(run.path / "result.json", "the run's result")
    labels_file = run.path / "labels.json"
    labels = {row["latent"]: row for row in read_json(labels_file)["labels"]} if labels_file.is_file() else {}
    with records.open(encoding="utf-8") as lines:
        shown = [_section(json.loads(line), labels) for line in islice(lines, most)]
        left = sum(1 for _ in lines)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("features.html.jinja").render(
        result=result, features=shown, left=left, made=now(), on_page={f["latent"] for f in shown}
    )
    out = Path(out) if out is not None else run.path / "features.html"
    atomic_write_text(out, page)
    return out


def _section(card: dict[str, Any], labels: dict[int, Any]) -> dict[str, Any]:
    """A feature as the template shows it."""
    label = labels.get(card["latent"])
    highest = card["max"] or 1.0
    return {
        **card,
        "label": label,
        "scores": _scores(label) if label else [],
        "density": f"{card['density']:.3%}" if card["density"] >= 1e-4 else f"{card['density']:.1e}",
        "strongest": _most_common_peak(card["top"]),
        "bars": _bars(card["histogram"]),
        "top": [_example(e, highest) for e in card["top"][:TOP]],
        "quantiles": [{**q, "examples": [_example(e, highest) for e in q["examples"][:A_QUANTILE]]} for q in card["quantiles"]],
        "more": max(0, len(card["top"]) - TOP),
    }


def _scores(label: dict[str, Any]) -> list[dict[str, str]]:
    out = []
    for name in ("detection", "fuzzing"):
        score = label.get(name)
        if score is None:
            continue
        accuracy = score.get("balanced_accuracy")
        text = "not scored" if accuracy is None else f"{accuracy:.2f}"
        counts = f"right: {score['hits']} of {score['yes']} yes, {score['rejections']} of {score['no']} no"
        if score["unanswered"]:
            counts += f"; {score['unanswered']} unanswered"
        out.append({"name": name, "value": text, "counts": counts})
    return out


def _most_common_peak(top: list[dict[str, Any]]) -> str:
    """The word in which the top examples peak most often."""
    peaks = [_word(e["tokens"], e["at"]) for e in top]
    return max(dict.fromkeys(peaks), key=peaks.count) if peaks else ""


def _word(tokens: list[str], at: int) -> str:
    """The word that a token is a part of: tokens are joined as long as letters meet."""
    first, last = at, at
    while first > 0 and tokens[first][:1].isalnum() and tokens[first - 1][-1:].isalnum():
        first -= 1
    while last + 1 < len(tokens) and tokens[last][-1:].isalnum() and tokens[last + 1][:1].isalnum():
        last += 1
    return "".join(tokens[first : last + 1]).strip() or ("space" if "\n" not in tokens[at] else BREAK)


def _example(example: dict[str, Any], highest: float) -> dict[str, Any]:
    """Tokens with how strongly each is coloured, from 0 to 1."""
    tokens = []
    for i, (token, value) in enumerate(zip(example["tokens"], example["values"], strict=True)):
        text = token.replace("\r", "").replace("\n", BREAK).replace("\t", " ")
        word = text.lstrip(" ")
        lead = text[: len(text) - len(word)] if word else ""  # a space in front of a word is not coloured
        strength = min(1.0, value / highest)
        # Even the weakest can be told from silence.
        alpha = f"{0.15 + 0.75 * strength:.2f}" if value > 0 else ""
        tokens.append({"lead": lead, "text": word or text, "value": value, "alpha": alpha, "peak": i == example["at"]})
    return {"value": f"{example['value']:.3g}", "tokens": tokens}


def _bars(histogram: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Bars of a histogram, in the SVG's units."""
    if not histogram:
        return []
    width, tallest = WIDTH / len(histogram), max(b["n"] for b in histogram)
    return [
        {
            "x": round(i * width, 2), "y": round(HEIGHT - HEIGHT * b["n"] / tallest, 2), "w": round(max(width - 1, 0.5), 2),
            "h": round(HEIGHT * b["n"] / tallest, 2), "title": f"{b['low']:.3g} to {b['high']:.3g}: {b['n']:,}",
        }
        for i, b in enumerate(histogram)
    ]  # fmt: skip
