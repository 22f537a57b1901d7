"""`pvsae demo`: every stage in a row on a model that brings its own traits and judge, small enough for two cores.

Knows: which stages, in which order, with how few samples. Does not know: anything that a stage knows.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pvsae.models import ChatModel


def demo(name: str, out: str | Path, *, seed: int = 0) -> str:
    """Extract, choose blocks, steer, monitor, train and evaluate a dictionary, and write OUT/report.html; gives a few lines of
    text on what came out. The dictionary's config is the shipped one of the model's name; without one, that part is left out.

    Killed and started again, it goes on from where it was.
    """
    from pvsae.models import load
    from pvsae.reports import write_report
    from pvsae.saes import shipped
    from pvsae.stages import (
        ExtractConfig,
        LayersConfig,
        MonitorConfig,
        SteerConfig,
        extract,
        layers,
        monitor,
        steer,
    )

    out, started = Path(out), time.monotonic()
    model = load(name)
    shared: dict[str, Any] = {"model": name, "seed": seed, "batch_size": 64}
    vectors, chosen = str(out / "extract"), str(out / "layers")
    extracted = extract.run(ExtractConfig(n_samples=1, **shared), vectors, model=model)
    blocks = layers.run(LayersConfig(vectors=vectors, coefs=(1.0, 2.0), max_questions=10, **shared), chosen, model=model)
    steered = steer.run(
        SteerConfig(vectors=vectors, layers=chosen, coefs=(0.5, 1.0, 2.0), n_random=1, **shared),
        out / "steer",
        model=model,
    )
    monitored = monitor.run(
        MonitorConfig(vectors=vectors, layers=chosen, shots=(0, 5), max_questions=8, n_samples=3, **shared),
        out / "monitor",
        model=model,
    )
    dictionary = _dictionary(name, model, out, seed) if name in shipped.names() else ""
    page = write_report(out, title="Persona vectors: the demo")
    lines = [f"{'trait':14} {'block':>5} {'pairs kept':>11} {'unsteered':>10} {'steered':>8} {'random':>7} {'monitoring r':>13}"]
    r = monitored.correlations.set_index(["trait", "kind", "scope"])["r"]
    kept = extracted.table.set_index("trait")
    for trait, part in steered.table.groupby("trait", sort=False):
        best = part[(part["condition"] == "vector") & (part["coherence"] >= 75)]["trait_score"].max()
        plain = part.loc[part["condition"] == "unsteered", "trait_score"].iloc[0]
        random = part[part["condition"].str.startswith("random")]["trait_score"].max()
        pairs = f"{kept.loc[trait, 'kept']}/{kept.loc[trait, 'pairs']}"
        lines.append(
            f"{trait:14} {blocks.blocks[str(trait)]:>5} {pairs:>11} {plain:>10.0f} {best:>8.0f} {random:>7.0f} "
            f"{r.loc[(trait, 'all', 'overall')]:>13.2f}"
        )
    lines += ["", *filter(None, [dictionary]), f"{time.monotonic() - started:.0f} seconds this time. Open the report: {page}"]
    return "\n".join(lines)


def _dictionary(name: str, model: ChatModel, out: Path, seed: int) -> str:
    """Trains and evaluates the dictionary of the shipped config; a line on what came out."""
    from pvsae.stages import SaeEvalConfig, sae_eval, sae_train

    seeds = [f"{key}={seed}" for key in ("corpus.seed", "stream.seed", "training.dictionaries.seed")]
    trained = sae_train.run(sae_train.load_config(name, seeds), out / "sae_train", model=model)
    (folder,) = trained.folders.values()
    config = SaeEvalConfig(dictionary=str(folder), model=name, tokens=20_000, loss_tokens=10_000, seed=seed)
    found = sae_eval.run(config, out / "sae_eval", model=model)
    quality = found.tables["quality"].set_index("set")
    return (
        f"dictionary of {found.summary['d_sae']} latents: {1 - quality['fvu']['kept']:.1%} of the variance explained with "
        f"{found.summary['l0 mean']:.1f} active latents a token, {found.summary['dead']} dead, "
        f"{found.summary['ce recovered against zero']:.1%} of the model's loss recovered"
    )
