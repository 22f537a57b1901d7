"""The Triton kernels of a dictionary's training step beside the eager path, part by part, on a GPU.

    python -m benchmarks.sae_kernels [--quick] [--tiles]

Random weights and activations of one shape (d 3584, F 131072, k 64, B 4096; smaller with --quick). Both paths do each part on
the same numbers and take turns; what counts is the median over the turns of the ratio of their times within a turn. Before
that, their results are compared. --tiles also times the encoder with other shapes of its tiles.

Without a CUDA GPU, or without Triton, nothing is run: every check says "not measured", and nothing passes or fails.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.generation import ratio, take_turns
from benchmarks.record import check, record
from pvsae.saes.kernels import eager
from pvsae.saes.kernels import triton as kernels

MARGIN = 0.9  # of the last step's threshold, from which both paths collect
FASTER = ("encode_select", "decode", "value_grads", "weight_grads", "adam", "step")
AGREES = ("selection", "decode", "value_grads", "weight_grads", "adam")


@dataclass(frozen=True)
class Shape:
    """Of the problem: width of the residual, latents, kept a token, tokens."""

    d: int
    latents: int
    k: int
    batch: int


FULL, QUICK = Shape(3584, 131072, 64, 4096), Shape(896, 16384, 32, 2048)


class Problem:
    """The tensors of one shape, and each part of a step both ways."""

    def __init__(self, shape: Shape) -> None:
        torch.manual_seed(0)
        device = torch.device("cuda")
        self.shape, self.n_keep = shape, shape.k * shape.batch
        self.W_dec = torch.nn.functional.normalize(torch.randn(shape.latents, shape.d, device=device), dim=1)
        self.W_enc, self.b_enc = self.W_dec.clone(), torch.zeros(shape.latents, device=device)
        self.x = torch.randn(shape.batch, shape.d, device=device)
        # What a step keeps between calls: bf16 copies, and the last threshold.
        self.x16, self.W16 = self.x.bfloat16(), self.W_enc.bfloat16()
        self.kept, threshold = kernels.encode_select(self.x16, self.W16, self.b_enc, self.n_keep)
        self.threshold = float(threshold)
        self.grad = 2 / shape.batch * (eager.decode(self.kept, self.W_dec, shape.batch) - self.x)
        self.of_value = eager.value_grads(self.kept, self.grad, self.W_dec)
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
        return eager.value_grads(self.kept, self.grad, self.W_dec)

    def _value_grads_triton(self) -> Tensor:
        return kernels.value_grads(self.kept, self.grad, self.W_dec)

    def _weight_grads_eager(self) -> tuple[Tensor, ...]:
        at = eager.by_latent(self.kept, self.shape.latents)
        dec = eager.weight_grads(at, self.kept.value, self.grad)
        enc = eager.weight_grads(at, self.of_value, self.x)
        return dec, enc, torch.bincount(self.kept.latent, self.of_value, minlength=self.shape.latents).float()

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

    def _step_eager(self) -> None:
        for part in FASTER[:-1]:
            self.ways(part)["eager"]()

    def _step_triton(self) -> None:
        for part in FASTER[:-1]:
            self.ways(part)["triton"]()


def disagreement(problem: Problem) -> dict[str, float]:
    """How far the paths are from each other: share of pairs kept by one alone, else largest difference over largest value."""
    few = torch.arange(0, problem.shape.batch, max(1, problem.shape.batch // 256), device="cuda")
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
    found["adam"] = _adam_disagreement()
    return found


def _adam_disagreement() -> float:
    """On rows of the same start, five steps."""
    start = torch.nn.functional.normalize(torch.randn(512, 3584, device="cuda"), dim=1)
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
    """Memory that a call needs beyond what is there before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def measure(shape: Shape, rounds: int, tiles: bool) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Checks and details."""
    problem, device = Problem(shape), torch.device("cuda")
    checks = [check(f"sae_kernels.disagreement.{k}", v, "<= 0.001") for k, v in disagreement(problem).items()]
    details: dict[str, Any] = {"shape": asdict(shape), "rounds": rounds, "device": torch.cuda.get_device_name(), "parts": {}}
    for part in FASTER:
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
    return checks, details


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
    names += [(f"sae_kernels.{part}.speed_over_eager", ">= 1.0") for part in FASTER]
    return [{"name": name, "value": "not measured", "target": target, "ok": None} for name, target in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller shape and fewer turns")
    parser.add_argument("--tiles", action="store_true", help="also time the encoder with other tiles")
    args = parser.parse_args()
    reason = kernels.problem() or (None if torch.cuda.is_available() else "there is no CUDA device, only Triton's interpreter")
    if reason:
        print(f"Not measured: {reason}. The kernels' arithmetic is tested in tests/saes/kernels/test_triton.py.")
        record("sae_kernels", not_measured(), {"device": f"not measured: {reason}"})
        return
    checks, details = measure(QUICK if args.quick else FULL, 5 if args.quick else 11, args.tiles)
    record("sae_kernels", checks, details)


if __name__ == "__main__":
    main()
