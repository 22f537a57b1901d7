"""Stage `sae_features`: what single features of a dictionary stand for, by everything that one pass over a text shows.

Knows: which dictionary, features and text, the run's files, how labels are asked for and done without, its tables and summary.
Does not know: how evidence is gathered (saes/gather.py), what a record holds (saes/cards.py), the page (reports/features.py).

A run folder::

    evidence/evidence.npz     counts, histograms and places of examples, as arrays
    cards/cards.jsonl         a record a feature: everything but its label
    labels.json               labels and their scores, where a language model was asked
    label_cache.sqlite        its replies
    neuronpedia/              the same features as Neuronpedia's importer reads them
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd
from tqdm.auto import tqdm

from pvsae import settings
from pvsae.errors import UserError
from pvsae.runs import RunDir, jsonable, read_json, write_json
from pvsae.stages.inputs import pin
from pvsae.stages.on_text import OnText, masks_of

if TYPE_CHECKING:
    from pvsae.models import ChatModel
    from pvsae.saes.corpus import CorpusConfig
    from pvsae.saes.dictionary import SAE
    from pvsae.saes.evidence import Context, Evidence
    from pvsae.saes.gather import Place
    from pvsae.saes.labels import Label, Material

COMMAND = "sae_features"
LABELLED_AT_ONCE = 256  # features whose passages are text at once: of one they take about 200 KB
RECORD, EXAMPLE_TOKEN = 3000, 15  # bytes of a feature's record without its examples, and of a token of an example in it


@dataclass(frozen=True, kw_only=True)
class SaeFeaturesConfig(OnText):
    """Evidence for which features, from what: the options of `OnText`, and

    Attributes:
        features: numbers of features; "live:N" stands for N at random of those that fire on the first tokens, "all" for all.
        held_out: read the samples of the dictionary's own text that training never saw, in place of those that it saw.
        window: tokens of an example.
        top: examples of highest activation.
        samples: firings in the even sample over all activations, from which quantiles and the passages for labels are taken.
        quiet: random passages, of which those where a feature is silent are used to score its label.
        n_quantiles: groups of the even sample.
        promoted, nearest: how many tokens, and features of the highest decoder cosine.
        label_model, label_url: language model that writes labels, and the base URL of its OpenAI-compatible server; None: none.
        label_price, max_cost: dollars per million tokens in and out, and the most to spend.
        label_train, label_test: passages that a label is made from, and scored on.
        checkpoint_every: seconds.
        page_features: most features on the page.
    """

    features: tuple[str, ...] = ("live:20",)
    tokens: int = 1_000_000
    held_out: bool = False
    window: int = 32
    top: int = 20
    samples: int = 100
    quiet: int = 500
    n_quantiles: int = 10
    promoted: int = 10
    nearest: int = 8
    label_model: str | None = None
    label_url: str | None = None
    label_price: tuple[float, float] | None = None
    max_cost: float | None = None
    label_train: int = 40
    label_test: int = 50
    checkpoint_every: float = 300.0
    page_features: int = 100

    # Labels may be asked for later.
    NOT_IDENTITY: ClassVar[frozenset[str]] = OnText.NOT_IDENTITY | {
        "checkpoint_every", "label_model", "label_url", "label_price", "max_cost", "page_features"
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive(
            "window", "top", "samples", "quiet", "n_quantiles", "promoted", "nearest", "label_train", "label_test"
        )
        if self.label_url and not self.label_model:
            raise UserError("a server for labels, but no model", "the name of a model that it serves", "--label-model NAME")
        if self.max_cost is not None and self.label_price is None:
            raise UserError("max_cost without a price of labels", "the price that costs are counted by", "--label-price IN OUT")
        self.asked_for()

    def asked_for(self) -> tuple[str, list[int]]:
        """("all", []), ("live", [n]) or ("list", features, ascending). UserError for words that are none of these."""
        words = [str(w) for w in self.features]
        if words == ["all"]:
            return "all", []
        kind, _, n = words[0].partition(":") if len(words) == 1 else ("", "", "")
        if kind == "live" and n.isdigit() and int(n) > 0:
            return "live", [int(n)]
        if not words or not all(w.isdigit() for w in words):
            raise UserError(f"features {' '.join(words)!r}", "numbers of features, or live:N, or all", "--features 12 4021")
        return "list", sorted({int(w) for w in words})


@dataclass(frozen=True)
class SaeFeaturesResult:
    """A row a feature, the main numbers, and the run's folder."""

    table: pd.DataFrame
    summary: dict[str, Any]
    path: Path


def run(
    config: SaeFeaturesConfig, run_dir: RunDir | str | Path, *, model: ChatModel | None = None, progress: bool = True
) -> SaeFeaturesResult:
    """Gather evidence into a run folder, going on where an earlier start stopped; what is finished is read back.

    Where no server is named, or none answers, there are no labels, and the summary says so; a later start asks for them.

    Args:
        model: to use instead of loading the one that the config names.

    Raises:
        UserError: no such dictionary, model, feature or text, a dictionary that does not fit the model, a folder of another run.
    """
    from pvsae.saes.cards import cards, read_cards, write_cards
    from pvsae.saes.gather import rows_again

    folder = run_dir if isinstance(run_dir, RunDir) else RunDir.open(run_dir, COMMAND, config.identity(), config.seed)
    try:
        place, notes = _place(config, folder, model, progress)
        evidence = _evidence(config, folder, place, progress)
        rows: dict[int, Context] | None = None
        with folder.step("cards") as step:
            if not step.done:
                rows = rows_again(place, evidence.rows_needed())
                made = cards(
                    place.model, place.sae, evidence, rows, n_tokens=config.promoted, n_nearest=config.nearest,
                    n_quantiles=config.n_quantiles, progress=progress,
                )  # fmt: skip
                write_cards(step.folder / "cards.jsonl", made)
        labels, said, costs = _labels(config, folder, place, evidence, rows, progress)
        known = {int(row["latent"]): row for row in labels.get("labels", [])}
        table = _table(read_cards(folder.path / "cards" / "cards.jsonl"), known)
        folder.table("features", table)
        _export(folder, place, known, labels.get("model"), evidence.rows)
        summary = _summary(config, place, evidence, table, [*notes, *said], labels, costs)
        folder.result(summary)
        return SaeFeaturesResult(table, summary, folder.path)
    finally:
        if folder is not run_dir:
            folder.close()


def plan(config: SaeFeaturesConfig) -> str:
    """What `run` would take, for people to read. Weights are not read, and nobody is asked.

    Raises: UserError for a dictionary or features that do not exist.
    """
    from pvsae.llm import ChatClient
    from pvsae.saes.evidence import Evidence
    from pvsae.saes.folders import load
    from pvsae.saes.labels import requests_at_most

    sae = load(config.dictionary)
    n = _count(config, sae)
    each = Evidence.bytes_a_feature(config.window, config.top, config.samples)
    record = RECORD + EXAMPLE_TOKEN * config.window * (config.top + config.samples)
    weights = 2 * sae.W_dec.numel() * sae.W_dec.element_size()
    lines = [
        f"dictionary  {sae.ref}: {sae.d_sae:,} features of {sae.d_model}, {_size(weights)} of weights",
        f"features    {n:,} ({' '.join(map(str, config.features[:8]))}{' ...' if len(config.features) > 8 else ''})",
        f"text        {config.tokens:,} tokens in one pass",
        f"memory      at most {_size(n * each)} for the evidence ({each:,} bytes a feature: {config.top} top examples, "
        f"{config.samples} sampled ones, a histogram), as much on disk for a checkpoint",
        f"disk        about {_size(n * record)} for the records ({record:,} bytes a feature), and some more, compressed, for "
        "Neuronpedia",
    ]
    if config.label_model is None:
        lines.append("labels      none: no --label-model was named")
    else:
        with ChatClient(config.label_url, config.label_model, price=config.label_price) as client:
            estimate = client.estimate(requests_at_most(1, config.label_train, config.label_test, config.window))
        cost = "" if estimate["cost"] is None else f", {n * estimate['cost']:,.2f} dollars"
        lines.append(
            f"labels      {config.label_model}: at most {n * estimate['calls']:,} calls, about "
            f"{n * estimate['tokens_in']:,} tokens in, at most {n * estimate['tokens_out']:,} out{cost}"
        )
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------------------------- parts
def _place(config: SaeFeaturesConfig, folder: RunDir, model: ChatModel | None, progress: bool) -> tuple[Place, list[str]]:
    """What is read, the dictionary's outlier filter complete."""
    from pvsae.saes.corpus import Corpus
    from pvsae.saes.evaluate import check_block
    from pvsae.saes.fingerprint import fingerprint
    from pvsae.saes.gather import Place, median_norm

    model, sae = config.open(model)
    _count(config, sae)
    block = check_block(sae, model, config.block)
    corpus_config, held_out = _corpus(config, model, sae)
    corpus = Corpus(model, corpus_config, progress=progress)
    pin(folder, model, {f"dictionary {sae.ref}": fingerprint(sae)})
    place, notes = Place(model, sae, block, corpus, held_out), list(sae.info.notes)
    if sae.info.outliers is not None and sae.info.outliers.median_norm is None:
        median = folder.do_json("median", lambda: median_norm(place, batch_tokens=config.batch_tokens))
        notes.append(f"The outlier filter's median norm, {median:.4g}, was measured on the first tokens of this text.")
        place = place._replace(sae=sae.calibrated(median))
    return place, notes


def _corpus(config: SaeFeaturesConfig, model: ChatModel, sae: SAE) -> tuple[CorpusConfig, bool]:
    """The text, which ends where it ends, and whether to read what training held out."""
    from pvsae.saes.corpus import CorpusConfig

    context = config.context_of(sae, model)
    if config.text:
        if config.held_out:
            raise UserError("held_out with a text of your own", "the dictionary's own text", "leave out --text or --held-out")
        own: dict[str, Any] = {"sources": config.sources(), "context": context, "seed": config.seed, **masks_of(sae)}
        return CorpusConfig(held_out=0.0, fit="split", **own), False
    if "corpus" not in sae.info.training:
        raise UserError(
            f"no text, and {sae.ref} does not say on which it was trained", "files, or names of datasets", "--text FILE"
        )
    recorded = settings.build(CorpusConfig, sae.info.training["corpus"], "its corpus")
    # Read again, a sample would be a second document of the same text.
    sources = tuple(replace(source, repeat=False) for source in recorded.sources)
    return replace(recorded, sources=sources, context=context, repeat=False), config.held_out


def _count(config: SaeFeaturesConfig, sae: SAE) -> int:
    """How many features. UserError for ones that the dictionary does not have."""
    kind, values = config.asked_for()
    if kind == "list" and values[-1] >= sae.d_sae:
        raise UserError(f"feature {values[-1]} of {sae.ref}", f"0 to {sae.d_sae - 1}")
    return {"all": sae.d_sae, "live": values[0] if values else 0, "list": len(values)}[kind]


def _evidence(config: SaeFeaturesConfig, folder: RunDir, place: Place, progress: bool) -> Evidence:
    import numpy as np

    from pvsae.saes.evidence import Evidence
    from pvsae.saes.gather import gather, live_latents

    kind, values = config.asked_for()
    if kind == "live":
        values = folder.do_json("latents", lambda: live_latents(place, values[0], config.seed, batch_tokens=config.batch_tokens))
    latents = list(range(place.sae.d_sae)) if kind == "all" else values
    empty = Evidence(latents, window=config.window, top=config.top, samples=config.samples, quiet=config.quiet, seed=config.seed)
    with folder.step("evidence") as step:
        if not step.done:
            checkpoint = folder.parts("evidence") / "state.npz"
            gather(
                place, empty, config.tokens, batch_tokens=config.batch_tokens, checkpoint=checkpoint,
                every=config.checkpoint_every, progress=progress,
            )  # fmt: skip
            np.savez(step.folder / "evidence.npz", **empty.state())  # type: ignore[arg-type]
            return empty
    with np.load(step.folder / "evidence.npz") as saved:
        empty.restore(saved)
    return empty


def _labels(
    config: SaeFeaturesConfig,
    folder: RunDir,
    place: Place,
    evidence: Evidence,
    rows: dict[int, Context] | None,
    progress: bool,
) -> tuple[dict[str, Any], list[str], list[dict[str, Any]]]:
    """Labels as plain values (those of an earlier start where nobody is asked now), what has to be said of them, and costs."""
    from pvsae.llm import ChatClient
    from pvsae.saes.cards import passage
    from pvsae.saes.gather import rows_again
    from pvsae.saes.labels import label_features, material
    from pvsae.saes.pieces import Pieces

    file = folder.path / "labels.json"
    before = read_json(file) if file.is_file() else {}
    if config.label_model is None:
        return before, [] if before else ["No labels: no language model was named (--label-model, --label-url)."], []
    texts = rows_again(place, evidence.rows_needed()) if rows is None else rows
    pieces = Pieces(place.model.tokenizer)

    def materials(slots: range) -> list[Material]:
        return [
            material(
                evidence, slot, evidence.examples(slot, evidence.sample, texts), lambda e: passage(e, texts, pieces),
                n_quantiles=config.n_quantiles, train=config.label_train, test=config.label_test,
            )
            for slot in slots
        ]  # fmt: skip

    n = len(evidence.latents)
    several = n > LABELLED_AT_ONCE
    made: list[Label] = []
    with ChatClient(
        config.label_url, config.label_model, cache=folder.path / "label_cache.sqlite",
        ledger=folder.path / "label_ledger.sqlite", price=config.label_price, max_cost=config.max_cost,
    ) as client:  # fmt: skip
        try:
            for start in tqdm(range(0, n, LABELLED_AT_ONCE), desc="labels", disable=not (progress and several)):
                some = materials(range(start, min(n, start + LABELLED_AT_ONCE)))
                made += label_features(some, client, seed=config.seed, progress="labels" if progress and not several else None)
        except UserError as error:
            return before, [f"No labels: {error.what}. Run the same command again when the server is there."], []
        costs = [{"server": f"labels by {client.model}", **client.ledger}]
    labels = {"model": config.label_model, "labels": [_plain(label) for label in made]}
    write_json(file, labels)
    missing = [label for label in made if label.problem and label.train]
    unanswered = sum(s.unanswered for label in made for s in (label.detection, label.fuzzing) if s)
    said = []
    if missing:
        said.append(
            f"{len(missing)} features have no label: {missing[0].problem} (the first reason). The same command asks again."
        )
    if unanswered:
        said.append(f"{unanswered} passages have no answer that could be read; they are in no score.")
    return labels, said, costs


def _plain(label: Label) -> dict[str, Any]:
    out = jsonable(label)
    for name in ("detection", "fuzzing"):
        score = getattr(label, name)
        if score is not None:
            out[name]["balanced_accuracy"] = jsonable(score.balanced_accuracy)
    return out


def _export(folder: RunDir, place: Place, known: dict[int, Any], explainer: str | None, n_rows: int) -> None:
    from pvsae.saes.cards import read_cards
    from pvsae.saes.neuronpedia import Source, export, source_names

    info = place.sae.info
    name, source = source_names(info.neuronpedia, info.model, place.block, info.site)
    started = read_json(folder.path / "environment.json")[0]["started"]
    corpus = place.corpus.config
    dataset = ", ".join(s.name for s in corpus.sources)
    about = Source(name, source, info.hook_name, dataset, corpus.context, n_rows, started)
    export(folder.path / "neuronpedia", about, read_cards(folder.path / "cards" / "cards.jsonl"), known, explainer)


# ------------------------------------------------------------------------------------------------------------------- showing
def _table(cards: Any, known: dict[int, Any]) -> pd.DataFrame:
    rows = []
    for card in cards:
        label = known.get(card["latent"], {})
        scores = {name: (label.get(name) or {}).get("balanced_accuracy") for name in ("detection", "fuzzing")}
        near = card["nearest"][0] if card["nearest"] else {"latent": None, "cosine": math.nan}
        rows.append(
            {
                "feature": card["latent"],
                "label": label.get("text") or "",
                "detection": math.nan if scores["detection"] is None else scores["detection"],
                "fuzzing": math.nan if scores["fuzzing"] is None else scores["fuzzing"],
                "density": card["density"],
                "fired": card["fired"],
                "mean": math.nan if card["mean"] is None else card["mean"],
                "max": card["max"],
                "strongest_token": card["top"][0]["tokens"][card["top"][0]["at"]] if card["top"] else "",
                "promoted": " | ".join(t["token"] for t in card["promoted"][:5]),
                "demoted": " | ".join(t["token"] for t in card["demoted"][:5]),
                "nearest": near["latent"],
                "nearest_cosine": near["cosine"],
                "train": label.get("train"),
                "test": label.get("test"),
                "quiet": label.get("quiet"),
                "link": card["link"] or "",
            }
        )
    return pd.DataFrame(rows)


def _summary(
    config: SaeFeaturesConfig,
    place: Place,
    evidence: Evidence,
    table: pd.DataFrame,
    notes: list[str],
    labels: dict[str, Any],
    costs: list[dict[str, Any]],
) -> dict[str, Any]:
    silent = int((table["fired"] == 0).sum())
    labelled = table[table["label"] != ""]
    headline = [
        {"label": "features", "value": f"{len(table):,}"},
        {"label": "tokens", "value": f"{evidence.tokens:,}"},
        {"label": "never active here", "value": f"{silent:,}"},
        {"label": "median density", "value": f"{table['density'].median():.2e}"},
    ]
    if len(labelled):
        for name in ("detection", "fuzzing"):
            headline.append({"label": f"{name} of labels (0.5: guessing)", "value": f"{labelled[name].mean():.2f}"})
    if evidence.tokens < config.tokens * 0.9:
        notes = [*notes, f"The text ended after {evidence.tokens:,} tokens of the {config.tokens:,} that were asked for."]
    sources = ", ".join(s.name for s in place.corpus.config.sources)
    return {
        "title": "Evidence for features",
        "about": (
            f"{place.sae.ref}: features of block {place.block} of {place.model.name} on {evidence.tokens:,} tokens of {sources}"
            f"{' that training never saw' if place.held_out else ''}. Left out are special tokens, tokens whose residual is an "
            f"outlier, and of each row the first tokens: {place.corpus.config.drop_first}."
        ),
        "headline": headline,
        "notes": notes,
        "labels_by": labels.get("model"),
        "costs": costs,
    }


def _size(n: float) -> str:
    for unit in ("bytes", "KB", "MB"):
        if n < 1000:
            return f"{n:,.3g} {unit}"
        n /= 1000
    return f"{n:,.3g} GB"
