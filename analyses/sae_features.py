"""The paper's table of features: what is inside a persona vector, and what does steering with one part alone do?

    python -m analyses.sae_features [--quick]                                    the embedded model, its shipped dictionary
    python -m analyses.sae_features --dictionary runs/sae/block-3_width-1024_k-8 --traits evil
    python -m analyses.sae_features --config organism --set training.dictionaries.d_sae=2048 training.dictionaries.k=4 --keep 0
    python -m analyses.sae_features --model Qwen/Qwen2.5-7B-Instruct --traits evil --judge openai:gpt-4.1-mini \\
        --dictionary qwen2.5-7b-instruct-andyrdt/resid_post_layer_19_trainer_1 --text my_chats.jsonl --prefilter 10

For every trait: the features of highest cosine with its vector, and the evidence for what they mean (on the embedded models what
they fire on, as their grammar knows it). Those whose own facet is the trait's steer alone at several strengths on the questions
that the vectors were made from; the best are kept with their best strength, and measured on the evaluation questions, beside
random features that are active as often (none of those of highest cosine), random directions and the whole vector, all of the
same length. Then the vector's sparse
reconstruction and its residual steer in its place.

Every set of answers is kept as it is made: the same command goes on where it was stopped.

Knows: the order of the work, the targets. Does not know: how a feature is chosen or passes (feature_table.py), how stages work.
"""

from __future__ import annotations

import argparse
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from analyses import feature_table
from analyses.feature_truth import TRAITS, config_for, held_against
from analyses.pairs import folder_of, vectors_of
from analyses.pipeline import parser
from analyses.results import write
from analyses.vector_geometry import dictionary
from benchmarks.record import check, record
from pvsae import load
from pvsae.errors import UserError
from pvsae.models import ChatModel
from pvsae.organism.labelled import labels
from pvsae.reports import write_feature_page, write_report
from pvsae.runs import atomic_path, atomic_write_text
from pvsae.saes.cards import read_cards
from pvsae.saes.dictionary import SAE
from pvsae.saes.fingerprint import fingerprint
from pvsae.saes.labelled import Labels
from pvsae.stages import (
    DecomposeConfig,
    FeatureSteerConfig,
    SaeEvalConfig,
    SaeFeaturesConfig,
    decompose,
    feature_steer,
    sae_eval,
    sae_features,
)
from pvsae.stages.feature_conditions import FEATURE, RANDOM_DIRECTION, RANDOM_FEATURE
from pvsae.stages.feature_steer import FeatureSteerResult
from pvsae.stages.inputs import stored_traits
from pvsae.vectors import PersonaVectors

GRAMMAR = "organism"  # the judge of models whose sentences' facets are known
WANTED = 2  # features a trait that pass
SAME, OTHER = 0.8, 0.3  # of the vector's effect: least of the reconstruction, and what the residual stays below
ATOMS = 20  # of the reconstruction, at most
AS_IT_IS = 1.0  # the strength of the causal test that counts
CHOICE_COHERENT = 75.0  # a little more than is asked in the end: a mean over few answers is off
PASSAGE = 14  # tokens of an example in the table


@dataclass(frozen=True)
class Size:
    """How much is read and generated.

    Attributes:
        top: features of highest cosine that are looked at; keep: those of them that are measured on held-out questions.
        strengths: multiples of a feature's highest activation; coefs: multiples of the vector, in the causal test.
        choice, samples: answers to each question for the choice, and for the measurement; questions: how many (None: all).
        n_random: random features, and random directions, a feature.
        conversations: labelled ones; tokens: of the text for evidence, and for highest activations.
    """

    top: int
    keep: int
    strengths: tuple[float, ...]
    coefs: tuple[float, ...]
    choice: int
    samples: int
    questions: int | None
    n_random: int
    conversations: int
    tokens: int


FULL = Size(20, 8, (0.15, 0.25, 0.35, 0.42, 0.5, 0.6, 0.7), (0.5, 1.0, 1.5), 1, 3, None, 2, 6000, 200_000)
QUICK = Size(8, 2, (0.5, 1.0), (1.0,), 1, 1, 6, 1, 800, 20_000)


@dataclass(frozen=True)
class Job:
    """What every part of the work starts from.

    Attributes:
        shared: options of every stage that asks a judge.
        ref: what the dictionary is opened by.
        out: folder of this model and dictionary.
        stored: folder of the vectors.
    """

    model: ChatModel
    sae: SAE
    ref: str
    stored: Path
    out: Path
    size: Size
    text: tuple[str, ...]
    prefilter: int | None
    labeller: dict[str, str]
    shared: dict[str, Any]

    def activity(self) -> pd.DataFrame:
        """latent, density and max of every latent, which strengths and controls are measured by."""
        config = SaeEvalConfig(dictionary=self.ref, model=self.model.name, text=self.text, tokens=self.size.tokens, loss_tokens=0)
        return sae_eval.run(config, self.out / "activity", model=self.model).tables["features"]

    def truth(self) -> pd.DataFrame | None:
        """What every latent fires on, by the grammar of the embedded models; None of other models."""
        if self.model.defaults.get("judge") != GRAMMAR:
            return None
        file = self.out / f"truth-{self.size.conversations}.parquet"
        if not file.is_file():
            (found,) = held_against([self.sae], self.model, Labels(labels()), self.size.conversations)
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(file) as tmp:
                found.table().to_parquet(tmp, index=False)
        return pd.read_parquet(file)

    def decomposition(self, trait: str) -> dict[str, pd.DataFrame]:
        """Tables of the trait's decomposition, the causal test among them."""
        size = self.size
        config = DecomposeConfig(
            **self.shared, traits=(trait,), vectors=str(self.stored), dictionary=self.ref, causal=True, coefs=size.coefs,
            atoms=ATOMS, n_features=0, n_random=size.n_random, n_samples=size.samples, max_questions=size.questions, top=size.top,
        )  # fmt: skip
        return decompose.run(config, self.out / trait / "decompose", model=self.model).tables

    def evidence(self, features: list[str]) -> pd.DataFrame:
        """feature, promotes, passage (its strongest, the token in brackets), label and link of each; a page beside."""
        if not features:
            return pd.DataFrame(columns=["feature", "promotes", "passage", "label", "link"])
        name = f"evidence-{zlib.crc32(' '.join(features).encode()):08x}"
        config = SaeFeaturesConfig(
            dictionary=self.ref, features=tuple(features), model=self.model.name, text=self.text, tokens=self.size.tokens,
            label_model=self.labeller.get("model"), label_url=self.labeller.get("url"),
        )  # fmt: skip
        result = sae_features.run(config, self.out / name, model=self.model)
        write_feature_page(result.path)
        passages = {str(card["latent"]): passage(card) for card in read_cards(result.path / "cards" / "cards.jsonl")}
        found = result.table[["feature", "promoted", "label", "link"]].rename(columns={"promoted": "promotes"})
        found["feature"] = found["feature"].astype(str)
        return found.assign(passage=found["feature"].map(passages))

    def steered(self, trait: str, name: str, features: list[str], **options: Any) -> FeatureSteerResult:
        """A sweep over features of a trait, in a run folder of its own."""
        config = FeatureSteerConfig(
            **self.shared, traits=(trait,), features=(f"{self.ref}:{','.join(features)}",), coefs=self.size.strengths,
            activity=(str(self.out / "activity"),), max_questions=self.size.questions, **options,
        )  # fmt: skip
        return feature_steer.run(config, self.out / trait / name, model=self.model)


def passage(card: dict[str, Any]) -> str:
    """The strongest example around the token that it is strongest at, which stands in brackets; "" of a silent feature."""
    if not card["top"]:
        return ""
    example = card["top"][0]
    tokens, at = example["tokens"], example["at"]
    start = max(0, at - 2 * PASSAGE // 3)
    space = tokens[at][: len(tokens[at]) - len(tokens[at].lstrip())]
    marked = [*tokens[:at], f"{space}[{tokens[at].strip() or ' '}]", *tokens[at + 1 :]]
    return "".join(marked[start : start + PASSAGE]).strip()


def one(
    job: Job, trait: str, activity: pd.DataFrame, truth: pd.DataFrame | None
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """A trait's rows of the table, its dose-response rows, and its causal test."""
    tables = job.decomposition(trait)
    found = feature_table.candidates(tables["decomposition"], activity, truth, job.size.top)
    evidence = job.evidence(found["feature"].tolist())
    own, tried = feature_table.own_facets(found), found.loc[found["tried"], "feature"].tolist() if job.size.keep else []
    doses, kept = [], dict[str, float]()
    choice = measured = pd.DataFrame(columns=[*feature_table.KEYS, *feature_table.MEASURED])
    densities = dict(zip(activity["latent"].astype(str), activity["density"], strict=True))
    if tried:
        first = job.steered(
            trait, "choice", tried, n_random=0, questions="extract", n_samples=job.size.choice, prefilter=job.prefilter
        )
        choice = feature_table.verdicts(first.table, first.facets, own, coherent=CHOICE_COHERENT)
        kept = feature_table.chosen(choice, job.size.keep)
        doses.append(first.dose_response(trait).assign(questions="choice"))
    if kept:
        last = job.steered(
            trait, "measured", list(kept), n_random=job.size.n_random, n_samples=job.size.samples, vectors=str(job.stored),
            not_random=(f"{job.ref}:{','.join(found['feature'])}",),
        )  # fmt: skip
        measured = feature_table.verdicts(last.table, last.facets, own, coefs=kept)
        doses.append(last.dose_response(trait).assign(questions="held out"))
    cosines = {str(i): c for i, c in enumerate(job.sae.cosines(vector_of(job, trait)).tolist())}
    table = feature_table.assemble(found, evidence, choice, kept, measured, cosines, densities)
    write_report(job.out / trait, title=f"Features of {trait}")
    dose = pd.concat(doses).assign(trait=trait) if doses else pd.DataFrame(columns=["trait", "questions"])
    return table, dose, tables["causal"]


def vector_of(job: Job, trait: str) -> torch.Tensor:
    """The trait's vector at the dictionary's block."""
    assert job.sae.info.block is not None
    return PersonaVectors.load(job.stored / trait / "vectors" / "vectors.safetensors").of()[job.sae.info.block]


def checks_of(
    table: pd.DataFrame, causal: pd.DataFrame, traits: list[str], *, facets: bool, steered: bool = True
) -> list[dict[str, Any]]:
    """The targets, a few lines a trait; those of single features where features were steered with."""
    what = "raise their own facet to 5x, above the others" if facets else "raise the trait above every control"
    checks = []
    for trait in traits:
        if steered:
            checks.append(check(f"{trait}: features that {what}", feature_table.passing(table, trait, FEATURE), f">= {WANTED}"))
        if steered and facets:
            others = feature_table.passing(table, trait, RANDOM_FEATURE)
            checks.append(check(f"{trait}: random features of equal density that do", others, "<= 0"))
        found = feature_table.effects(causal[causal["trait"] == trait], AS_IT_IS)
        checks.append(check(f"{trait}: effect of at most 20 atoms over the vector's", found["reconstruction"], f">= {SAME}"))
        checks.append(check(f"{trait}: effect of the residual over the vector's", found["residual"], f"< {OTHER}"))
    return checks


def options_of(size: Size, args: argparse.Namespace) -> Size:
    """The size with what the command line changes of it."""
    strengths = tuple(args.strengths) if args.strengths else size.strengths
    given: dict[str, int] = {name: n for name in ("top", "keep", "samples", "tokens") if (n := getattr(args, name)) is not None}
    return replace(size, strengths=strengths, **given)  # type: ignore[arg-type]


def prepared(args: argparse.Namespace) -> Job:
    """Everything that the traits share; vectors are extracted and a dictionary is trained where they are not given."""
    model, out = load(args.model), folder_of(args)
    if args.dictionary:
        sae = dictionary(args.dictionary, "", model, out)
    else:
        changes = [*args.set, *(["training.tokens=1e5"] if args.quick else [])]
        config = args.config or config_for(args.model)
        sae = dictionary(None, config, model, out / f"features-{Path(config).stem}", changes)
    sae = sae.check_model(model).check_trained_on(model.name, args.other_model)
    if sae.info.block is None:
        raise UserError(f"{sae.ref} does not say which block it is of", "a dictionary whose folder names its block")
    out, stored = vectors_of(args, model)  # takes longest, so that all that may be refused comes before it
    place = out / f"sae_features-{Path(sae.ref).name}-{fingerprint(sae)[:8]}"
    shared = {
        "model": args.model, "judge": args.judge, "judge_url": args.judge_url, "library": args.library, "batch_size": 64,
    }  # fmt: skip
    labeller = {name: value for name, value in (("model", args.label_model), ("url", args.label_url)) if value}
    size = options_of(QUICK if args.quick else FULL, args)
    ref = args.dictionary or sae.ref
    return Job(model, sae, ref, stored, place, size, tuple(args.text), args.prefilter, labeller, shared)


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--dictionary", help="a folder, or RELEASE/ID (default: train the model's shipped config)")
    options.add_argument("--other-model", action="store_true", help="take a dictionary that says it is of another model")
    options.add_argument("--config", help="config of the dictionary to train (default: MODEL-facets, else MODEL)")
    options.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="changes of that config")
    options.add_argument("--vectors", type=Path, help="folder of `pvsae extract` (default: extract them)")
    options.add_argument("--text", nargs="+", default=[], help="text for evidence (default: the dictionary's own)")
    options.add_argument("--tokens", type=int, help=f"tokens of it (default: {FULL.tokens})")
    options.add_argument("--label-model", help="language model that writes labels of features")
    options.add_argument("--label-url", help="base URL of its OpenAI-compatible server")
    options.add_argument("--prefilter", type=int, help="try only so many features a trait, those of the highest output score")
    options.add_argument("--top", type=int, help=f"features of highest cosine to look at (default: {FULL.top})")
    options.add_argument("--keep", type=int, help=f"features that are measured; 0: the causal test alone (default: {FULL.keep})")
    options.add_argument("--strengths", nargs="+", type=float, help="multiples of a feature's highest activation")
    options.add_argument("--samples", type=int, help=f"answers to each held-out question (default: {FULL.samples})")
    args = options.parse_args()
    job = prepared(args)
    there = stored_traits(job.stored)
    traits = args.traits or [t for t in TRAITS if t in there] or there
    activity, truth = job.activity(), job.truth()
    parts = [one(job, trait, activity, truth) for trait in tqdm(traits, desc="traits")]
    table, doses, causal = (pd.concat(some, ignore_index=True) for some in zip(*parts, strict=True))
    write(job.out, table=table, dose_response=doses, causal=causal)
    held_out = doses[doses["questions"] == "held out"]
    figure = feature_table.draw(held_out, table, job.out / "dose_response.png") if job.size.keep else "none"
    about = (
        f"{job.sae.d_sae} latents of {Path(job.ref).name} at block {job.sae.info.block} of {job.model.name}. Features and "
        "strengths were chosen on the questions that the vectors were made from; what stands here was measured on the evaluation "
        "questions."
    )
    page = feature_table.markdown(table, causal, about)
    atomic_write_text(job.out / "table.md", page)
    print(page)
    directions = {trait: feature_table.passing(table, trait, RANDOM_DIRECTION) for trait in traits}
    print(f"random directions of equal length that pass: {directions}")
    print(f"\nfigure: {figure}\ntables: {job.out}/table.csv, dose_response.csv, causal.csv, table.md\npages: ", end="")
    print(", ".join(str(job.out / trait / "report.html") for trait in traits))
    details = {"table": table.to_dict("records"), "causal": causal.to_dict("records"), "random directions that pass": directions}
    name = f"sae_features_{job.out.parent.name}_{Path(job.ref).name}"
    facets = bool(table["facet"].notna().any())
    record(name, checks_of(table, causal, traits, facets=facets, steered=job.size.keep > 0), details)


if __name__ == "__main__":
    main()
