"""Optimiser steps of BatchTopK trainers, ours beside SAELens and dictionary_learning, in one run.

    python -m benchmarks.sae_training [--quick] [--peers saelens dictionary_learning]

Every trainer takes the same batch in turn, with its dead-latent loss, its threshold and its dead counting on: the loss, all
gradients, the optimiser, whatever its step does. A turn's ratio is between times within that turn; what counts is the median over
the turns. Then the same with a tenth of the latents dead. Peak memory is that of a process of its own that makes the trainer and
runs a few steps, less what the process had before. The data are random with a decaying spectrum; no time depends on their values,
but for how well a threshold can be guessed from the last step, for which a decaying spectrum is the harder case.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import PEERS, Recipe
from benchmarks.record import check, record
from pvsae.errors import UserError

# name: d_model, d_sae, k, batch, turns, target over SAELens
SHAPES = {
    "d256": (256, 4096, 32, 2048, 15, 8.0),
    "d512": (512, 8192, 32, 4096, 7, 10.0),
    "d896": (896, 16384, 64, 4096, 5, 15.0),
}
QUICK = {"d128": (128, 1024, 16, 1024, 5, 4.0)}
DEAD_SHARE = 0.1


def batches(d_model: int, n: int, seed: int) -> Tensor:
    """[n d_model] with a spectrum that decays to a twentieth, in a random basis."""
    basis = torch.linalg.qr(torch.randn(d_model, d_model, generator=torch.Generator().manual_seed(1)))[0]
    x = torch.randn(n, d_model, generator=torch.Generator().manual_seed(seed)) * torch.linspace(2, 0.1, d_model)
    return x @ basis


def turns(shape: tuple[int, int, int, int, int, float], peers: list[str], dead_share: float) -> dict[str, list[float]]:
    """Seconds of a step of each trainer, a number a turn, after one turn to warm up."""
    d_model, d_sae, k, batch, n_turns, _ = shape
    recipe = Recipe(d_model, d_sae, k, batch)
    trainees = {name: PEERS[name](recipe, batches(d_model, batch, 0)) for name in peers}
    dead = torch.arange(d_sae) < round(dead_share * d_sae)
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    for turn in range(n_turns + 1):
        x = batches(d_model, batch, turn + 1)
        for name in peers[turn % len(peers) :] + peers[: turn % len(peers)]:
            if dead_share:
                trainees[name].mark_dead(dead)
            start = time.perf_counter()
            trainees[name].step(x)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def peak_memory(peer: str, shape: tuple[int, int, int, int, int, float]) -> float:
    """MiB that a trainer's process takes for three steps, beyond what it had when the data were there."""
    command = [sys.executable, "-m", "benchmarks.sae_training", "--memory-of", peer, *map(str, shape[:4])]
    made = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(made.stdout.strip().splitlines()[-1]))


def _memory_of(peer: str, d_model: int, d_sae: int, k: int, batch: int) -> None:
    small = Recipe(32, 64, 4, 64)  # imports and first allocations are not what is measured
    PEERS[peer](small, batches(32, 64, 0)).step(batches(32, 64, 1))
    x = batches(d_model, batch, 0)
    before = _kib("VmHWM")
    trainee = PEERS[peer](Recipe(d_model, d_sae, k, batch), x)
    for _ in range(3):
        trainee.step(x)
    print(json.dumps((_kib("VmHWM") - before) / 1024))


def _kib(name: str) -> int:
    """VmHWM: most memory that this process has had. Not ru_maxrss, in which the process that started it counts."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name + ":"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small shape, few turns")
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), help="only these")
    parser.add_argument(
        "--peers", nargs="+", choices=["saelens", "dictionary_learning"], default=["saelens", "dictionary_learning"]
    )
    parser.add_argument("--memory-of", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        peer, *numbers = options.memory_of
        _memory_of(peer, *map(int, numbers))
        return
    peers = ["pvsae", *options.peers]
    checks: list[dict[str, Any]] = []
    details: dict[str, Any] = {"threads": torch.get_num_threads(), "dead_share": DEAD_SHARE}
    for name, shape in (QUICK if options.quick else SHAPES).items():
        if options.shapes and name not in options.shapes:
            continue
        found = {"live": turns(shape, peers, 0.0), "dead": turns(shape, peers, DEAD_SHARE)}
        memory = {peer: peak_memory(peer, shape) for peer in peers}
        ratios = {
            (kind, peer): statistics.median(a / b for a, b in zip(seconds[peer], seconds["pvsae"], strict=True))
            for kind, seconds in found.items()
            for peer in options.peers
        }
        if "saelens" in peers:
            checks += [
                check(f"{name}.speed_over_saelens", ratios["live", "saelens"], f">= {shape[5]:g}"),
                check(f"{name}.speed_over_saelens_with_dead", ratios["dead", "saelens"], f">= {ratios['live', 'saelens']:.4g}"),
                check(f"{name}.memory_over_saelens", memory["pvsae"] / memory["saelens"], "<= 1"),
            ]
        if "dictionary_learning" in peers:
            checks.append(check(f"{name}.speed_over_dictionary_learning", ratios["live", "dictionary_learning"], "> 1"))
        details[name] = {
            "d_model": shape[0], "d_sae": shape[1], "k": shape[2], "batch": shape[3], "peak_mib": memory,
            "ratios": {f"{kind}.{peer}": value for (kind, peer), value in ratios.items()},
            "tokens_per_second": {
                kind: {peer: shape[3] / statistics.median(s) for peer, s in seconds.items()} for kind, seconds in found.items()
            },
            "seconds": found,
        }  # fmt: skip
        print(f"{name}: {details[name]['tokens_per_second']}, peak MiB {memory}", flush=True)
    record("sae_training", checks, details)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
