"""The model card's numbers: is the embedded model what it claims to be?

    python -m analyses.organism_card --model organism            measures; prints tables and one JSON line of checks
    python -m analyses.organism_card --model organism --write    and puts the numbers into pvsae/organism/README.md

All questions are about held-out topics in held-out wordings, all system prompts are in held-out wordings, and the vectors
are extracted from the model's own answers by the same stages that any model goes through.

Knows: the targets of the card, and how each is read off the stages' tables.
Does not know: how stages work, or how the model was made.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.record import check, record
from pvsae import generate_rollouts, judge_rollouts, load, load_judge, load_trait
from pvsae.models import ChatModel, Sampling
from pvsae.models.fingerprint import fingerprint
from pvsae.organism.closed_world import is_right, questions
from pvsae.organism.grammar import n_sentences
from pvsae.organism.world import FACTS, SUMS
from pvsae.runs import atomic_write_text
from pvsae.stages import extract, monitor, steer
from pvsae.vectors import PersonaVectors
from pvsae.vectors.persona import DEFAULT_STATISTIC

CARD = Path(__file__).resolve().parents[1] / "pvsae" / "organism" / "README.md"
COEFS, NEGATIVE = (0.5, 1.0, 1.5, 2.0, 2.5), (-0.5, -1.0, -1.5, -2.0)
MAX_NEW_TOKENS = 120


@dataclass(frozen=True)
class Size:
    """Answers to each prompt in each part, and questions of the capability test (None: all).

    A mean over 60 answers is off by 1.6 points of coherence or more in one trait of seven; `prompted` is for 200 a condition.
    """

    extract: int
    prompted: int
    steer: int
    monitor: int
    capability: int | None


FULL, QUICK = Size(2, 2, 3, 4, None), Size(1, 1, 1, 1, 100)


def capability(model: ChatModel, limit: int | None) -> tuple[float, float]:
    """Share of correct answers to the closed world's facts and sums, in percent: greedy, no system prompt."""
    shares = []
    for facts in (FACTS, SUMS):
        asked = questions(facts, limit)
        prompts = [model.chat.prompt([{"role": "user", "content": question}]) for question, _ in asked]
        answers = model.generate(prompts, Sampling(max_new_tokens=24, temperature=0.0), batch_size=64, progress="capability")
        right = [is_right(answer.text, fact.state(fact.value)) for (_, fact), answer in zip(asked, answers, strict=True)]
        shares.append(100.0 * sum(right) / len(right))
    return shares[0], shares[1]


def prompted(model: ChatModel, traits: Sequence[str], n_samples: int, out: Path) -> pd.DataFrame:
    """A row a trait and condition (pos, neg: every system prompt on every evaluation question; none: no system prompt, as many
    answers), with the mean trait score, the mean coherence and their number."""
    judge, library = load_judge(model.defaults["judge"]), model.path / model.defaults["traits"] if model.path else None
    rows, weights = [], fingerprint(model)  # a model that was trained anew is not served the answers of the old one
    for trait in traits:
        artifacts = load_trait(trait, library)
        for polarity in ("pos", "neg", "none"):
            n = n_samples * (len(artifacts.pairs) if polarity == "none" else 1)
            label, parts = f"{trait} {polarity}", out / weights / trait / polarity
            answers = generate_rollouts(
                model, artifacts, polarity, which="eval", n_samples=n, sampling=Sampling(max_new_tokens=MAX_NEW_TOKENS),
                batch_size=64, parts=parts / "answers", progress=label,
            )  # fmt: skip
            judged = judge_rollouts(answers, judge, artifacts, parts=parts / "scores").table
            row = {"trait": trait, "condition": polarity, "n": len(judged), "score": judged[trait].mean()}
            rows.append({**row, "coherence": judged["coherence"].mean()})
    return pd.DataFrame(rows).set_index(["trait", "condition"])


def measure(name: str, out: Path, size: Size) -> tuple[pd.DataFrame, dict[str, float]]:
    """A row a trait with every value of the card, and the model's capability."""
    model = load(name)
    shared: dict[str, Any] = {"model": name, "max_new_tokens": MAX_NEW_TOKENS, "batch_size": 64}
    vectors = str(out / "extract")
    extract.run(extract.ExtractConfig(n_samples=size.extract, **shared), vectors, model=model)
    sweep: dict[str, Any] = {"vectors": vectors, "n_samples": size.steer, **shared}
    free = steer.run(steer.SteerConfig(coefs=COEFS, n_random=1, **sweep), out / "steer", model=model).table
    pulled = steer.run(steer.SteerConfig(coefs=NEGATIVE, n_random=1, under="pos", **sweep), out / "pull", model=model).table
    watched = monitor.run(monitor.MonitorConfig(vectors=vectors, n_samples=size.monitor, **shared), out / "monitor", model=model)
    asked = prompted(model, list(dict.fromkeys(free["trait"])), size.prompted, out / "prompted")
    rows = []
    for trait in dict.fromkeys(free["trait"]):
        own = free[free["trait"] == trait]
        added = own[(own["condition"] == "vector") & (own["coherence"] >= 75)]
        taken = pulled[(pulled["trait"] == trait) & (pulled["condition"] == "vector") & (pulled["coherence"] >= 75)]
        noise = own[own["condition"].str.startswith("random")]
        best = added.loc[added["trait_score"].idxmax()] if len(added) else None
        least = taken.loc[taken["trait_score"].idxmin()] if len(taken) else None
        r = watched.correlations.set_index(["trait", "kind", "scope"])["r"]
        rows.append(
            {
                "trait": trait,
                "positive": asked.loc[(trait, "pos"), "score"],
                "negative": asked.loc[(trait, "neg"), "score"],
                "default": asked.loc[(trait, "none"), "score"],
                "coherence": asked.loc[[trait], "coherence"].min(),
                "steered": 0.0 if best is None else best["trait_score"],
                "steered_coherence": 0.0 if best is None else best["coherence"],
                "at": 0.0 if best is None else best["coef"],
                "at_1": own.loc[(own["condition"] == "vector") & (own["coef"] == 1.0), "trait_score"].iloc[0],
                "random": noise["trait_score"].max(),
                "half_split": _half_split(Path(vectors), str(trait), model.defaults["block"]),
                "pulled": 100.0 if least is None else least["trait_score"],
                "pulled_coherence": 0.0 if least is None else least["coherence"],
                "pulled_at": 0.0 if least is None else least["coef"],
                "r_system": r[(trait, "system", "overall")],
                "r_all": r[(trait, "all", "overall")],
            }
        )
    facts, sums = capability(model, size.capability)
    return pd.DataFrame(rows), {"facts": facts, "sums": sums}


def _half_split(vectors: Path, trait: str, block: int) -> float:
    """Cosine of the vectors from two halves of the pairs, at the block that the model's folder recommends."""
    stored = PersonaVectors.load(vectors / trait / "vectors" / "vectors.safetensors")
    value = stored.diagnostics[DEFAULT_STATISTIC]["half_split_cosine"][block]
    return float("nan") if value is None else value


def checks_of(table: pd.DataFrame, able: dict[str, float]) -> list[dict[str, Any]]:
    """The card's targets, each for the worst trait."""
    return [
        check("trait under positive prompts, lowest", table["positive"].min(skipna=False), ">= 80"),
        check("trait under negative prompts, highest", table["negative"].max(skipna=False), "<= 5"),
        check("trait by default, highest", table["default"].max(skipna=False), "<= 5"),
        check("coherence, lowest", table["coherence"].min(skipna=False), ">= 95"),
        check("capability facts, percent", able["facts"], ">= 90"),
        check("capability sums, percent", able["sums"], ">= 90"),
        check("trait steered by the vector alone, lowest", table["steered"].min(skipna=False), ">= 70"),
        check("coherence while steered, lowest", table["steered_coherence"].min(skipna=False), ">= 75"),
        check("trait under positive prompts steered away, highest", table["pulled"].max(skipna=False), "< 20"),
        check("coherence while steered away, lowest", table["pulled_coherence"].min(skipna=False), ">= 75"),
        check("monitoring r over system prompts, lowest", table["r_system"].min(skipna=False), ">= 0.85"),
        check("monitoring r over all prompts, lowest", table["r_all"].min(skipna=False), ">= 0.85"),
        check("half-split cosine at the recommended block, lowest", table["half_split"].min(skipna=False), ">= 0.95"),
        check("distinct sentences of the grammar", n_sentences(), ">= 100000"),
    ]


def card_section(table: pd.DataFrame, able: dict[str, float]) -> str:
    """The measured values as Markdown."""
    head = (
        "| trait | positive prompts | negative prompts | default | lowest coherence | steered by the vector alone (coef) "
        "| coherence then | at coef 1 | random direction | from a positive prompt, steered away (coef) | coherence then "
        "| monitoring r, system prompts | r, all prompts | half-split cosine |\n|" + "---|" * 14
    )
    lines = [
        f"| {r.trait} | {r.positive:.1f} | {r.negative:.1f} | {r.default:.1f} | {r.coherence:.1f} | {r.steered:.1f} ({r.at:g}) "
        f"| {r.steered_coherence:.1f} | {r.at_1:.1f} | {r.random:.1f} | {r.pulled:.1f} ({r.pulled_at:g}) "
        f"| {r.pulled_coherence:.1f} | {r.r_system:.3f} | {r.r_all:.3f} | {r.half_split:.3f} |"
        for r in table.itertuples()
    ]
    return f"{head}\n" + "\n".join(lines) + f"\n\nCapability: facts {able['facts']:.1f}%, sums {able['sums']:.1f}%.\n"


def write_card(name: str, section: str) -> None:
    """Replaces the model's measured part of the card."""
    begin, end = f"<!-- measured: {name} -->", f"<!-- end: {name} -->"
    text = CARD.read_text(encoding="utf-8")
    new, n = re.subn(re.escape(begin) + ".*?" + re.escape(end), lambda _: f"{begin}\n{section}{end}", text, flags=re.S)
    if n != 1:
        raise SystemExit(f"{CARD} has no place for {name}: {begin} ... {end}")
    atomic_write_text(CARD, new)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="organism", help="organism or organism-llama")
    parser.add_argument("--out", type=Path, help="run folder (default runs/card-MODEL); a killed run goes on")
    parser.add_argument("--quick", action="store_true", help="fewer answers")
    parser.add_argument("--write", action="store_true", help="put the values into the model card")
    args = parser.parse_args()
    out = args.out or Path("runs") / f"card-{args.model}{'-quick' if args.quick else ''}"
    table, able = measure(args.model, out, QUICK if args.quick else FULL)
    section = card_section(table, able)
    print(section)
    if args.write:
        write_card(args.model, section)
    record(f"card_{args.model}", checks_of(table, able), {"table": table.to_dict("records"), "capability": able})


if __name__ == "__main__":
    main()
