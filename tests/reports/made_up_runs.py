"""Run folders of every stage with made-up numbers in them, for figures and pages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from pvsae.runs import RunDir

TRAITS = ("evil", "sycophantic", "hallucinating")


def make_runs(root: Path) -> Path:
    """extract, layers, steer and monitor below `root`, each finished."""
    rng = np.random.default_rng(0)
    config = {"model": "made-up", "traits": list(TRAITS)}
    with RunDir.open(root / "extract", "extract", config) as run:
        run.table(
            "extraction",
            pd.DataFrame(
                {
                    "trait": TRAITS, "pairs": 100, "kept": [97, 88, 60], "pos_score": [95.0, 88, 71], "neg_score": [1.0, 4, 12],
                    "failed_scores": [0, 3, 0],
                }
            ),
        )  # fmt: skip
        blocks = [
            {"trait": t, "block": b, "norm": 1.0 + b, "half_split_cosine": 1 - 0.3 / (1 + b + i)}
            for i, t in enumerate(TRAITS)
            for b in range(6)
        ]
        run.table("blocks", pd.DataFrame(blocks))
        run.result(
            {
                "title": "Extraction",
                "failures": [{"what": "scores that the judge did not give", "n": 3}, {"what": "nothing", "n": 0}],
                "prompts": [{"label": "evil", "text": "<|im_start|>system\nBe <b>evil</b> & sly.<|im_end|>"}],
            }
        )
    with RunDir.open(root / "layers", "layers", config) as run:
        rows = [
            {"trait": t, "block": b, "coef": c, "trait_score": 90 * np.exp(-((b - 3) ** 2) / 4) * c / 2, "coherence": 98 - 9 * c,
             "chosen": b == 3 and c == 2.0}
            for t in TRAITS for b in range(6) for c in (1.0, 2.0)
        ]  # fmt: skip
        run.table("layers", pd.DataFrame(rows))
        run.result({"title": "Choice of the block", "blocks": dict.fromkeys(TRAITS, 3)})
    with RunDir.open(root / "steer", "steer", config) as run:
        rows = []
        for trait in TRAITS:
            cells = [("unsteered", "-", 0.0, 2.0), ("prompt pos", "-", 0.0, 93.0), ("prompt neg", "-", 0.0, 1.0)]
            cells += [("vector", "3", c, min(97.0, 40 * c)) for c in (0.5, 1.0, 2.0)]
            cells += [("sign flip", "3", -c, 1.0) for c in (0.5, 1.0, 2.0)]
            cells += [(f"random {k}", "3", c, 3.0 + k) for k in range(2) for c in (0.5, 1.0, 2.0)]
            rows += [
                {"trait": trait, "condition": n, "block": b, "coef": c, "unit": "raw", "trait_score": s, "trait_low": s - 4,
                 "trait_high": s + 4, "coherence": 99 - 8 * c, "n": 20}
                for n, b, c, s in cells
            ]  # fmt: skip
        run.table("steering", pd.DataFrame(rows))
        run.result({"title": "Steering", "headline": [{"label": "evil", "value": "2 to 80"}]})
    with RunDir.open(root / "monitor", "monitor", config) as run:
        points = [
            {"trait": t, "kind": "system", "level": level, "projection": level + rng.normal(), "trait_score": 12.0 * level}
            for t in TRAITS for level in range(8) for _ in range(10)
        ]  # fmt: skip
        points += [
            {"trait": t, "kind": "many-shot", "level": n, "projection": n / 3 + rng.normal(), "trait_score": 4.0 * n}
            for t in TRAITS for n in (0, 5, 10, 15, 20) for _ in range(10)
        ]  # fmt: skip
        run.table("points", pd.DataFrame(points))
        run.table(
            "correlations",
            pd.DataFrame(
                [{"trait": t, "kind": "all", "scope": s, "r": r} for t in TRAITS for s, r in (("overall", 0.9), ("within", 0.3))]
            ),
        )
        tokens = ["<|im_start|>", "user", "\n", "Who", " are", " <you>", "?", "\n", "Nobody", " kind", "."]
        roles = ["template"] * 3 + ["user"] * 4 + ["template"] + ["assistant"] * 3
        trace = [
            {"conversation": "conversation", "trait": t, "index": i, "role": role, "token": token, "projection": i * 0.3 - j}
            for j, t in enumerate(TRAITS) for i, (token, role) in enumerate(zip(tokens, roles, strict=True))
        ]  # fmt: skip
        run.table("trace", pd.DataFrame(trace))
        run.result({"title": "Monitoring"})
    return root
