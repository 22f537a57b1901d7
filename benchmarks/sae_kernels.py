"""A dictionary's training step on a GPU: Triton's kernels beside the eager path, part by part, and whole steps beside SAELens.

    python -m benchmarks.sae_kernels [--quick] [--tiles] [--check]

Random weights and activations of one shape (d 3584, F 131072, k 64, B 4096; smaller with --quick). Both paths do each part on
the same numbers and take turns; what counts is the median over the turns of the ratio of their times within a turn. Before
that, their results are compared. --tiles also times the encoder with other shapes of its tiles.

Whole steps are those of a training: the loss, all gradients, the optimiser, threshold and dead counting, on batches that change.
Ours takes turns with one other trainer at a time (three dictionaries of this size do not fit a GPU): the eager path, SAELens in
fp32, SAELens in bf16 autocast; then with a tenth of the latents dead. Tokens a second are the median of our turns beside SAELens
in fp32, no latent dead.

Without a CUDA GPU, or without Triton, nothing is run: every check says "not measured", and nothing passes or fails. --check runs
all of it on a tiny shape, in Triton's interpreter where there is no GPU (TRITON_INTERPRET=1): results are compared, times mean
nothing, and nothing is recorded.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.generation import ratio, take_turns
from benchmarks.peers import PEERS, Recipe, Trainee
from benchmarks.record import check, record
from benchmarks.sae_training import DEAD_SHARE, batches
from pvsae.errors import UserError
from pvsae.saes.kernels import eager
from pvsae.saes.kernels import triton as kernels

MARGIN = 0.9  # of the last step's threshold, from which both paths collect
PARTS = ("encode_select", "decode", "value_grads", "weight_grads", "adam")
OTHERS = ("eager", "saelens", "saelens_bf16")
TARGETS = {"eager": ">= 1.0", "saelens": ">= 4.0", "saelens_bf16": ">= 4.0"}
STEPS = 5  # in a turn of whole steps, each on a batch of its own
TOKENS_PER_SECOND = ">= 150000"  # on an H100, at the full shape
SPEED_OF = "saelens.live"  # the race whose median is the speed: one named beforehand, where the best of several would be luck
AGREES = ("selection", "decode", "value_grads", "weight_grads", "adam")


@dataclass(frozen=True)
class Shape:
    """Of the problem: width of the residual, latents, kept a token, tokens."""

    d: int
    latents: int
    k: int
    batch: int


FULL, QUICK, TINY = Shape(3584, 131072, 64, 4096), Shape(896, 16384, 32, 2048), Shape(8, 24, 2, 16)


class Problem:
    """The tensors of one shape, and each part of a step both ways."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        torch.manual_seed(0)
        self.shape, self.n_keep = shape, shape.k * shape.batch
        self.W_dec = torch.nn.functional.normalize(torch.randn(shape.latents, shape.d, device=device), dim=1)
        self.W_enc, self.b_enc = self.W_dec.clone(), torch.zeros(shape.latents, device=device)
        self.x = torch.randn(shape.batch, shape.d, device=device)
        # What a step keeps between calls: bf16 copies, and the last threshold.
        self.x16, self.W16 = self.x.bfloat16(), self.W_enc.bfloat16()
        self.kept, threshold = kernels.encode_select(self.x16, self.W16, self.b_enc, self.n_keep)
        self.threshold = float(threshold)
        self.grad = 2 / shape.batch * (eager.decode(self.kept, self.W_dec, shape.batch) - self.x)
        self.of_value = eager.dots(self.kept.token, self.kept.latent, self.grad, self.W_dec)
        self.mean, self.square = torch.zeros_like(self.W_dec), torch.zeros_like(self.W_dec)
        self.optimiser = torch.optim.Adam([self.W_dec], lr=1e-4, fused=True)

    def ways(self, part: str) -> dict[str, Callable[[], Any]]:
        """The part by both paths: {"eager", "triton"}."""
        return {way: getattr(self, f"_{part}_{way}") for way in ("eager", "triton")}

    def _encode_select_eager(self) -> eager.Sparse:
        index, value = eager.survivors(self.x16, self.W16, self.b_enc, MARGIN * self.threshold)
        threshold = eager.kth_largest(value, self.n_keep)
        ties = self.n_keep - int((value > threshold).sum())
        return eager.keep_largest(index, value, threshold, ties, self.shape.latents)

    def _encode_select_triton(self, **options: Any) -> eager.Sparse:
        guess = self.threshold
        return kernels.encode_select(self.x16, self.W16, self.b_enc, self.n_keep, guess, slack=MARGIN, **options)[0]

    def _decode_eager(self) -> Tensor:
        return eager.decode(self.kept, self.W_dec, self.shape.batch)

    def _decode_triton(self) -> Tensor:
        return kernels.decode(self.kept, self.W_dec, self.shape.batch)

    def _value_grads_eager(self) -> Tensor:
        return eager.dots(self.kept.token, self.kept.latent, self.grad, self.W_dec)

    def _value_grads_triton(self) -> Tensor:
        return kernels.value_grads(self.kept, self.grad, self.W_dec)

    def _weight_grads_eager(self) -> tuple[Tensor, ...]:
        at = eager.by_latent(self.kept, self.shape.latents)
        dec = eager.weight_grads(at, self.kept.value[at.order], self.grad)
        enc = eager.weight_grads(at, self.of_value[at.order], self.x)
        bias, along = (
            torch.bincount(self.kept.latent, weights, minlength=self.shape.latents).float()
            for weights in (self.of_value, self.of_value * self.kept.value)
        )
        return dec, enc, bias, along

    def _weight_grads_triton(self) -> tuple[Tensor, ...]:
        at = kernels.by_latent(self.kept, self.shape.latents)
        return kernels.both_weight_grads(at, self.kept.value, self.grad, self.of_value, self.x)

    def _adam_eager(self) -> Tensor:
        """The decoder's step: projection, Adam, renormalisation, with torch's fused Adam."""
        grad = self.some_grad()
        self.W_dec.grad = grad - (grad * self.W_dec).sum(1, keepdim=True) * self.W_dec
        self.optimiser.step()
        self.W_dec.grad = None
        return self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True))

    def _adam_triton(self) -> Tensor:
        kernels.adam_(self.W_dec, self.some_grad(), self.mean, self.square, step=1, lr=1e-4, unit_rows=True)
        return self.W_dec

    def some_grad(self) -> Tensor:
        """Some tensor of the decoder's shape that costs nothing to make."""
        return self.W_enc


def disagreement(problem: Problem) -> dict[str, float]:
    """How far the paths are from each other: share of pairs kept by one alone, else largest difference over largest value."""
    few = torch.arange(0, problem.shape.batch, max(1, problem.shape.batch // 256), device=problem.x.device)
    x, n = problem.x16[few], problem.shape.k * len(few)
    kept, _ = kernels.encode_select(x, problem.W16, problem.b_enc, n, problem.threshold)
    # The eager path rounds pre-activations to the product's dtype, so the selection is compared with an fp32 product.
    pre = (x.float() @ problem.W16.float().T + problem.b_enc).flatten()
    ours = kept.token * problem.shape.latents + kept.latent
    alone = (~torch.isin(ours, pre.topk(n).indices)).sum() + (ours.diff() <= 0).sum() + abs(len(ours) - n)
    found = {"selection": float(alone) / n}
    for part in ("decode", "value_grads", "weight_grads"):
        theirs, mine = (_tuple(way()) for way in problem.ways(part).values())
        found[part] = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(theirs, mine, strict=True))
    found["adam"] = _adam_disagreement(problem.x.device, problem.shape)
    return found


def _adam_disagreement(device: torch.device, shape: Shape) -> float:
    """On rows of the same start, five steps."""
    start = torch.nn.functional.normalize(torch.randn(min(512, shape.latents), shape.d, device=device), dim=1)
    ours, theirs = start.clone(), start.clone().requires_grad_()
    mean, square = torch.zeros_like(start), torch.zeros_like(start)
    optimiser = torch.optim.Adam([theirs], lr=1e-3)
    for step in range(1, 6):
        grad = torch.randn_like(start)
        with torch.no_grad():
            theirs.grad = grad - (grad * theirs).sum(1, keepdim=True) * theirs
            optimiser.step()
            theirs /= theirs.norm(dim=1, keepdim=True)
        kernels.adam_(ours, grad, mean, square, step=step, lr=1e-3, unit_rows=True)
    return float((ours - theirs.detach()).abs().max() / theirs.detach().abs().max())


def _tuple(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _counting(run: Callable[[], Any], tokens: int) -> int:
    run()
    return tokens


def peak_gib(run: Callable[[], Any]) -> float:
    """Memory that a call needs beyond what is there before it; NaN without a GPU."""
    if not torch.cuda.is_available():
        return math.nan
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def measure(shape: Shape, rounds: int, tiles: bool) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Checks and details."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    problem = Problem(shape, device)
    checks = [check(f"sae_kernels.disagreement.{k}", v, "<= 0.001") for k, v in disagreement(problem).items()]
    name = torch.cuda.get_device_name() if device.type == "cuda" else "Triton's interpreter"
    details: dict[str, Any] = {"shape": asdict(shape), "rounds": rounds, "device": name, "parts": {}, "steps": {}}
    for part in PARTS:
        ways = problem.ways(part)
        times = take_turns({n: partial(_counting, run, shape.batch) for n, run in ways.items()}, rounds, device)
        checks.append(check(f"sae_kernels.{part}.speed_over_eager", ratio(times, "eager", "triton"), ">= 1.0"))
        details["parts"][part] = {
            way: {"median_ms": 1000 * statistics.median(t["seconds"]), "peak_gib": peak_gib(ways[way]), **t}
            for way, t in times.items()
        }
        medians = {way: found["median_ms"] for way, found in details["parts"][part].items()}
        print(f"{part:14} " + "  ".join(f"{way} {ms:9.3f} ms" for way, ms in medians.items()))
    if tiles:
        details["tiles"] = _tile_shapes(problem, rounds, device)
    del problem, ways
    for other in OTHERS:
        for kind, share in (("live", 0.0), ("dead", DEAD_SHARE)):
            times, peaks = race(shape, other, rounds, device, share)
            over = ratio(times, other, "triton")
            speed = {
                way: statistics.median(n / s for n, s in zip(found["tokens"], found["seconds"], strict=True))
                for way, found in times.items()
            }
            details["steps"][f"{other}.{kind}"] = {"tokens_per_second": speed, "peak_gib": peaks, "ratio": over, **times}
            print(f"step, {kind:5} " + "  ".join(f"{way} {n:12,.0f} tokens/s" for way, n in speed.items()))
            if kind == "live":
                checks.append(check(f"sae_kernels.step.speed_over_{other}", over, TARGETS[other]))
    if shape == FULL:
        speed = details["steps"][SPEED_OF]["tokens_per_second"]["triton"]
        checks.append(check("sae_kernels.step.tokens_per_second", speed, TOKENS_PER_SECOND))
    return checks, details


def race(
    shape: Shape, other: str, rounds: int, device: torch.device, dead_share: float
) -> tuple[dict[str, dict[str, list[float]]], dict[str, float]]:
    """Whole steps of ours and of another trainer in turns: seconds and tokens of each turn, and the memory of a step in GiB."""
    gc.collect()  # what was there before is large
    if device.type == "cuda":
        torch.cuda.empty_cache()
    data = [batches(shape.d, shape.batch, seed).to(device) for seed in range(1 if shape == TINY else STEPS)]
    recipe = Recipe(shape.d, shape.latents, shape.k, shape.batch, device=device.type)
    dead = torch.arange(shape.latents, device=device) < round(dead_share * shape.latents)
    ways = {"triton": PEERS["pvsae"](replace(recipe, kernels="triton"), data[0])}
    ways[other] = PEERS["pvsae"](replace(recipe, kernels="eager"), data[0]) if other == "eager" else PEERS[other](recipe, data[0])

    def turn(trainee: Trainee) -> int:
        for x in data:
            if dead_share:
                trainee.mark_dead(dead)
            trainee.step(x)
        return len(data) * shape.batch

    times = take_turns({name: partial(turn, trainee) for name, trainee in ways.items()}, rounds, device)
    return times, {name: peak_gib(partial(trainee.step, data[0])) for name, trainee in ways.items()}


def _tile_shapes(problem: Problem, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Milliseconds of the encoder for other tiles; those that the device cannot hold say why."""
    rows = []
    for tokens, latents, warps in ((128, 256, 8), (128, 128, 4), (128, 128, 8), (256, 128, 8), (64, 256, 4)):
        for inner, stages in ((64, 3), (64, 4), (32, 4), (128, 2)):
            tile = kernels.Tiles(tokens, latents, inner, warps, stages)
            run = partial(problem._encode_select_triton, tiles=tile)
            try:
                times = take_turns({"encode": partial(_counting, run, 1)}, rounds, device)
                rows.append({**asdict(tile), "median_ms": 1000 * statistics.median(times["encode"]["seconds"])})
            except Exception as error:  # too much shared memory, as a rule; whatever it is, the next one may do
                rows.append({**asdict(tile), "error": str(error).splitlines()[0] if str(error) else type(error).__name__})
            print(rows[-1])
    return rows


def not_measured() -> list[dict[str, Any]]:
    """The same checks, without values."""
    names = [(f"sae_kernels.disagreement.{part}", "<= 0.001") for part in AGREES]
    names += [(f"sae_kernels.{part}.speed_over_eager", ">= 1.0") for part in PARTS]
    names += [(f"sae_kernels.step.speed_over_{other}", TARGETS[other]) for other in OTHERS]
    names += [("sae_kernels.step.tokens_per_second", TOKENS_PER_SECOND)]
    return [{"name": name, "value": "not measured", "target": target, "ok": None} for name, target in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller shape and fewer turns")
    parser.add_argument("--tiles", action="store_true", help="also time the encoder with other tiles")
    parser.add_argument("--check", action="store_true", help="run all of it on a tiny shape; nothing is timed in earnest")
    args = parser.parse_args()
    if args.check:
        if kernels.problem():
            sys.exit(f"The kernels cannot run here: {kernels.problem()}. TRITON_INTERPRET=1 makes them.")
        checks, _ = measure(TINY, 1, args.tiles)
        wrong = [c for c in checks if "disagreement" in c["name"] and not c["ok"]]
        sys.exit(f"results differ: {wrong}" if wrong else 0)
    reason = kernels.problem() or (None if torch.cuda.is_available() else "there is no CUDA device, only Triton's interpreter")
    if reason:
        print(f"Not measured: {reason}. The kernels' arithmetic is tested in tests/saes/kernels/test_triton.py.")
        record("sae_kernels", not_measured(), {"device": f"not measured: {reason}"})
        return
    checks, details = measure(QUICK if args.quick else FULL, 5 if args.quick else 11, args.tiles)
    record("sae_kernels", checks, details)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
