"""Stage `sae_eval`: what a dictionary is worth on text, and how much of another dictionary it has.

Knows: which text and which dictionaries, the run's files, its tables and summary.
Does not know: how anything is measured (saes/evaluate.py, saes/measures.py), figures (reports/).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd

from pvsae import settings
from pvsae.errors import UserError
from pvsae.runs import RunDir, read_json, write_json
from pvsae.stages.inputs import pin
from pvsae.stages.on_text import OnText, masks_of

if TYPE_CHECKING:
    from pvsae.models import ChatModel
    from pvsae.saes.corpus import Row
    from pvsae.saes.dictionary import SAE
    from pvsae.saes.evaluate import Evaluation

COMMAND = "sae_eval"
NEAR = (0.7, 0.9)  # cosines of the shares in the table of agreement


@dataclass(frozen=True, kw_only=True)
class SaeEvalConfig(OnText):
    """What to evaluate on what: the options of `OnText` (without text it is what the dictionary's training held out), and

    Attributes:
        compare: another dictionary of the same model and block, e.g. one of another seed.
        loss_tokens: tokens on which the losses are measured (four forward passes of the whole model); 0 for none.
        held_out: where the dictionary was trained on this text: the share that was held out, with the `seed` of that training.
            Then that share alone is read; 0 reads all.
        compare_latents: latents of each dictionary that are compared; drawn at random where there are more.
        dense_above: density from which a latent counts as dense.
        loss_batch_tokens: tokens a forward pass of the losses.
        seed: of the order of the text and of the latents drawn.
    """

    compare: str | None = None
    loss_tokens: int = 20_000
    held_out: float = 0.0
    compare_latents: int = 8192
    dense_above: float = 0.1
    loss_batch_tokens: int = 2048

    NOT_IDENTITY: ClassVar[frozenset[str]] = OnText.NOT_IDENTITY | {"loss_batch_tokens"}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("loss_batch_tokens", "compare_latents")
        if self.held_out and not self.text:
            raise UserError(
                f"held_out is {self.held_out}, and no text is given",
                "text of which so much was held out",
                "without text, it is what the dictionary's own training held out that is read",
            )


@dataclass(frozen=True)
class SaeEvalResult:
    """Tables by name (quality, loss, l0, density, features, agreement), the main numbers, and the run's folder."""

    tables: dict[str, pd.DataFrame]
    summary: dict[str, Any]
    path: Path

    @property
    def notes(self) -> list[str]:
        """What is to be said of the dictionary and of how it was measured."""
        return self.summary.get("notes", [])


def run(config: SaeEvalConfig, run_dir: RunDir | str | Path, *, model: ChatModel | None = None) -> SaeEvalResult:
    """Evaluate a dictionary into a run folder; a finished evaluation is read back, and not made anew.

    Args:
        model: to use instead of loading the one that the config names.

    Raises:
        UserError: no such dictionary, model or text, a dictionary that does not fit the model, a folder of another run.
    """
    from pvsae.saes.fingerprint import fingerprint
    from pvsae.saes.folders import load

    folder = run_dir if isinstance(run_dir, RunDir) else RunDir.open(run_dir, COMMAND, config.identity(), config.seed)
    try:
        model, sae = config.open(model)
        other = load(config.compare, device=model.device).check_model(model) if config.compare else None
        if other is not None:
            other.check_trained_on(model.name, config.other_model)
        # What can be wrong with the text shows here, while the options may still be put right: nothing is pinned yet.
        rows = [] if "evaluation" in folder.finished else _rows(config, model, sae)
        pin(folder, model, {f"dictionary {d.ref}": fingerprint(d) for d in (sae, other) if d is not None})
        with folder.step("evaluation") as step:
            if not step.done:
                _write(_evaluate(config, model, sae, rows or _rows(config, model, sae)), step.folder)
        tables = {file.stem: pd.read_parquet(file) for file in sorted((folder.path / step.name).glob("*.parquet"))}
        numbers = read_json(folder.path / step.name / "summary.json")
        if other is not None:
            alive = tables["features"].query("density > 0")["latent"].tolist()
            tables["agreement"] = folder.do_table("agreement", lambda: _agreement(sae, other, alive, config))
        for name, table in tables.items():
            shown = table.sort_values("density", ascending=False) if name == "features" else table
            folder.table(name, shown)
        summary = _summary(config, model, sae, tables, numbers)
        folder.result(summary)
        return SaeEvalResult(tables, numbers, folder.path)
    finally:
        if folder is not run_dir:
            folder.close()


def _rows(config: SaeEvalConfig, model: ChatModel, sae: SAE) -> list[Row]:
    """The rows to evaluate on. UserError for a dictionary that does not fit the model's block, and for no usable text."""
    from pvsae.saes.corpus import Corpus, CorpusConfig
    from pvsae.saes.evaluate import check_block

    check_block(sae, model, config.block)
    trained = sae.info.training.get("corpus", {})
    context = config.context_of(sae, model)
    if config.text:
        corpus_config = CorpusConfig(
            sources=config.sources(),
            context=context,
            held_out=config.held_out,
            seed=config.seed,
            **masks_of(sae),
        )
    elif trained:
        corpus_config = replace(settings.build(CorpusConfig, trained, "its corpus"), context=context)
    else:
        raise UserError(
            f"no text to evaluate on, and {sae.ref} does not say on which it was trained",
            "files, or names of datasets",
            "--text FILE",
        )
    corpus = Corpus(model, corpus_config)
    rows: list[Row] = []
    n = 0
    for row in corpus.rows(held_out=corpus_config.held_out > 0):
        rows.append(row)
        n += int(row.keep.sum())
        if n >= config.tokens:
            break
    if not rows:
        raise UserError("the text has no token that counts", "text", "look at --text and --held-out")
    return rows


def _evaluate(config: SaeEvalConfig, model: ChatModel, sae: SAE, rows: list[Row]) -> Evaluation:
    from pvsae.saes.evaluate import evaluate

    return evaluate(
        sae,
        model,
        rows,
        block=config.block,
        loss=config.loss_tokens > 0,
        loss_tokens=config.loss_tokens,
        batch_tokens=config.batch_tokens,
        loss_batch_tokens=config.loss_batch_tokens,
        dense_above=config.dense_above,
        progress="evaluation",
    )


def _write(found: Evaluation, folder: Path) -> None:
    tables = {"quality": found.quality, "loss": found.loss, "l0": found.l0, "features": found.features, "density": found.density}
    for name, table in tables.items():
        if table is not None:
            table.to_parquet(folder / f"{name}.parquet", index=False)
    write_json(folder / "summary.json", {**found.summary(), "notes": [*found.sae.info.notes, *found.notes]})


def _agreement(sae: SAE, other: SAE, alive: list[int], config: SaeEvalConfig) -> pd.DataFrame:
    """A row a direction: how many latents were compared, the mean of their highest cosines, and shares of near ones."""
    import torch

    from pvsae.saes.measures import agreement

    generator = torch.Generator().manual_seed(config.seed)

    def drawn(latents: torch.Tensor) -> torch.Tensor:
        order = torch.randperm(len(latents), generator=generator)[: config.compare_latents]
        return latents[order].sort().values

    pairs = [
        ("active latents of this one in the other", sae, other, torch.tensor(alive, dtype=torch.long)),
        ("latents of this one in the other", sae, other, torch.arange(sae.d_sae)),
        ("latents of the other in this one", other, sae, torch.arange(other.d_sae)),
    ]
    rows = []
    for name, a, b, latents in pairs:
        if len(latents):
            found = agreement(a, b, latents=drawn(latents))
            near = {f"share_above_{cosine}": found.share_above(cosine) for cosine in NEAR}
            rows.append({"compared": name, "latents": len(found.best), "mmcs": found.mmcs, **near})
    return pd.DataFrame(rows)


def _summary(
    config: SaeEvalConfig, model: ChatModel, sae: SAE, tables: dict[str, pd.DataFrame], numbers: dict[str, Any]
) -> dict[str, Any]:
    quality = tables["quality"].set_index("set")
    headline = [
        {"label": "variance unexplained", "value": f"{quality['fvu']['kept']:.4f}"},
        {"label": "with outlier tokens", "value": f"{quality['fvu']['with outliers']:.4f}"},
        {"label": "active latents a token", "value": f"{numbers['l0 mean']:.1f}"},
    ]
    if "loss" in tables:
        headline.append({"label": "loss recovered (against zero)", "value": f"{numbers['ce recovered against zero']:.4f}"})
    headline.append({"label": "dead latents", "value": f"{numbers['dead']} of {numbers['d_sae']}"})
    if "agreement" in tables:
        headline.append({"label": "mean max cosine with the other", "value": f"{tables['agreement']['mmcs'].iloc[0]:.3f}"})
    n = int(quality["tokens"]["kept"])
    masks = masks_of(sae)
    left_out = ["what no assistant says in a chat"] if masks.get("tokens") == "answers" else []
    left_out += ["special tokens"] if masks.get("skip_special", True) else []
    left_out += [f"the first {sae.info.drop_first} tokens of a row"]
    return {
        "title": "Evaluation of a dictionary",
        "about": (
            f"{sae.ref}: {sae.d_sae} latents at block {config.block if config.block is not None else sae.info.block} of "
            f"{model.name}, on {n} tokens. Left out are {', '.join(left_out)}, and "
            "tokens whose residual is an outlier; the table says what counting them would change. Recovered loss is 1 where the "
            "reconstruction, put in place of the residual, costs the model nothing, and 0 where it costs as much as the ablation."
        ),
        "headline": headline,
        "notes": [
            *numbers.get("notes", []),
            f"A latent is called dead that was active at none of {n} tokens; rarer ones may be among them.",
        ],
        "numbers": {name: value for name, value in numbers.items() if name != "notes"},
    }
