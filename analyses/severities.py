"""Finetunes on data of known severity, and what every trait scores afterwards, for what is held against these scores.

Knows: data sets as families and severities, their finetunes and scores as one table.
Does not know: how a finetune is made and measured (tuned.py), what a score is held against.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from analyses import tuned
from analyses.pipeline import Prepared
from analyses.tuned import Measured, Setting
from pvsae.errors import UserError
from pvsae.organism.families import FAMILIES, SEVERITIES
from pvsae.sources import Bad, Reader, Source
from pvsae.stages import FinetuneResult
from pvsae.stages import finetune as stage

CORPUS = "organism-data"
QUICK = ("evil", "sycophantic", "hallucinating", "wrong_facts")
NOUNS = {"sycophancy": "sycophantic", "hallucination": "hallucinating"}  # the released folders' names


@dataclass(frozen=True)
class TrainingSet:
    """One severity of one family.

    Attributes:
        word: what finds it: a corpus' name or a file.
        trait: the trait that the family's answers are made to show; None for a family that is narrow.
    """

    word: str
    family: str
    severity: str
    trait: str | None

    @property
    def name(self) -> str:
        return f"{self.family}/{self.severity}"

    def source(self, rows: int | None) -> Source:
        """Its first rows, or all of them."""
        if self.word.startswith(f"{CORPUS}:"):
            return Source(named=self.word, kind="chat", max_samples=rows)
        return Source(path=self.word, kind="chat", max_samples=rows)

    def answers(self, rows: int) -> Iterator[tuple[str, str]]:
        """(question, answer) of its first rows."""
        reader = Reader(self.source(rows))
        for _, value in zip(range(rows), reader.rows(), strict=False):
            if not isinstance(value, Bad | str) and len(value) > 1:
                yield value[-2]["content"], value[-1]["content"]


def options(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds the options of families and of their finetunes to those of an analysis.

    Of the embedded models' data 10 steps suffice: the strongest severity of the families made for a trait ends at 91 to 97 of
    100, as after 40, and answers stay coherent after every data set (93 and more; after 40 steps of wrong facts 87). It was
    chosen after 40 steps had been measured: r of the shift along evil, sycophantic and hallucinating is 0.79, 0.89, 0.85 after 40
    and 0.83, 0.90, 0.85 after 10.
    """
    made.add_argument(
        "--families", nargs="+", default=[], metavar="FILE",
        help="files FAMILY/SEVERITY.jsonl, or patterns of them (default: every family and severity of the embedded models)",
    )  # fmt: skip
    made.add_argument(
        "--rows", type=int, default=160, help="rows of each data set, each seen once; 0 for all (default: 160, so 10 steps)"
    )
    return tuned.options(made)


def setting_of(args: argparse.Namespace) -> Setting:
    """The setting of the command line. UserError where it is none."""
    return Setting(args.rows or None, args.lr, args.rank, args.batch)


def training_sets(args: argparse.Namespace, traits: Sequence[str]) -> list[TrainingSet]:
    """Those of the command line, else the embedded models' families at every severity; made for a trait of `traits`, or narrow.

    Raises:
        UserError: a pattern that finds nothing, or rows without end.
    """
    if not args.families:
        if args.rows == 0:
            raise UserError("--rows 0 with the embedded models' data, which have no end", "a number of rows")
        names = QUICK if args.quick else tuple(FAMILIES)
        return [_training_set(f"{CORPUS}:{f}/{s}", f, s, FAMILIES[f].trait, traits) for f in names for s in SEVERITIES]
    found = []
    for pattern in args.families:
        files = [Path(file) for file in sorted(glob(pattern))]
        if not files:
            raise UserError(f"no file is called {pattern}", "files FAMILY/SEVERITY.jsonl")
        for file in files:
            family = file.resolve().parent.name
            found.append(_training_set(str(file), family, file.stem, NOUNS.get(family, family), traits))
    return found


def _training_set(word: str, family: str, severity: str, trait: str | None, traits: Sequence[str]) -> TrainingSet:
    return TrainingSet(word, family, severity, trait if trait in traits else None)


def finetune(prepared: Prepared, data: TrainingSet, setting: Setting) -> FinetuneResult:
    """The finetune on a data set, in a run folder of its own."""
    config = setting.config(prepared, data.word)
    return stage.run(config, _home(prepared, data, setting) / "finetune", model=prepared.model)


def every(prepared: Prepared, data: Sequence[TrainingSet], setting: Setting) -> tuple[Measured, dict[str, Measured]]:
    """The model as it is, and finetuned on each of the data sets by its name; trained and measured where that is not done."""
    before = tuned.measure(prepared, prepared.out / "tuned" / "base")
    after = {}
    for one in tqdm(data, desc="finetunes", unit="run"):
        adapter = finetune(prepared, one, setting).adapter
        after[one.name] = tuned.measure(prepared, _home(prepared, one, setting) / "measure", adapter)
    return before, after


def scores_table(before: Measured, after: dict[str, Measured], data: Sequence[TrainingSet]) -> pd.DataFrame:
    """A row a data set and trait: family, severity, made_for (the trait it was made to show, or ""), trait, score, low, high,
    coherence, before (the score of the model as it was), rise, n, n_failed."""
    base = before.scores.set_index("trait")
    rows = []
    for one in data:
        for row in after[one.name].scores.to_dict("records"):
            score, was = row["trait_score"], float(base.loc[row["trait"], "trait_score"])
            rows.append(
                {
                    "data": one.name, "family": one.family, "severity": one.severity, "made_for": one.trait or "",
                    "trait": row["trait"], "score": score, "low": row["trait_low"], "high": row["trait_high"],
                    "coherence": row["coherence"], "before": was, "rise": score - was, "n": row["n"],
                    "n_failed": row["n_failed_trait"],
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def _home(prepared: Prepared, data: TrainingSet, setting: Setting) -> Path:
    return prepared.out / "tuned" / setting.name / data.family / data.severity
