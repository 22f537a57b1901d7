"""A step by Triton's kernels beside the eager one, on a GPU or in Triton's interpreter; see kernels/test_triton.py."""

from __future__ import annotations

import importlib.util
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pvsae.saes import later
from pvsae.saes.grid import SINGLE, Grid, grid_of
from pvsae.saes.kernels import triton as kernels
from pvsae.saes.parallel import Group
from pvsae.saes.step import Learner, StepConfig
from tests.saes.processes import together

INSTALLED = importlib.util.find_spec("triton") is not None
here = pytest.mark.skipif(not kernels.available(), reason=f"see test_in_the_interpreter: {kernels.problem()}")
DEVICE = "cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"
BATCH, D, F, K = 14, 6, 18, 2.5
# Some latents die within a few steps, more of them than reconstruct a token, and the gradient is clipped.
STEP = {"dead_after": BATCH, "aux_k": 2, "clip": 0.5}


@pytest.mark.skipif(not INSTALLED, reason="Triton is not installed")
@pytest.mark.skipif(kernels.available(), reason="the kernels run in this process")
@pytest.mark.parametrize("which", ["not processes", pytest.param("processes", marks=pytest.mark.slow)])
def test_in_the_interpreter(which: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", which],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def tokens(seed: int) -> Tensor:
    return torch.randn(BATCH, D, generator=torch.Generator().manual_seed(seed)).to(DEVICE) + 0.5


def learner(kind: str, grid: Grid = SINGLE, dtype: torch.dtype = torch.float32, **options: Any) -> Learner:
    config = StepConfig(kernels=kind, **{**STEP, **options})
    made = Learner(D, F, config, seed=1, product_dtype=dtype, device=DEVICE, grid=grid)
    start = grid.width.rank * made.d_sae
    made.b_enc -= (torch.arange(F, device=DEVICE) % 2 * 3.0)[start : start + made.d_sae]
    return made


def same_parameters(a: Learner, b: Learner) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=2e-5)
    assert torch.equal(a.silent_for, b.silent_for)


def same_stats(a: Any, b: Any) -> None:
    torch.testing.assert_close(torch.tensor(list(vars(a).values())), torch.tensor(list(vars(b).values())), rtol=1e-4, atol=1e-5)


@here
def test_steps_are_those_of_the_eager_path() -> None:
    eager, fused = learner("eager"), learner("triton")
    seen = []
    for seed in range(4):
        a, b = (made.step(tokens(seed), K, 1e-2) for made in (eager, fused))
        same_stats(a, b)
        seen.append(a)
    assert seen[-1].n_dead > 2
    assert seen[-1].aux_loss > 0
    assert min(s.grad_norm for s in seen) > 0.5
    same_parameters(eager, fused)
    assert eager.threshold == pytest.approx(fused.threshold, rel=1e-5)


@here
@pytest.mark.parametrize(("first", "second"), [("eager", "triton"), ("triton", "eager")])
def test_one_goes_on_where_the_other_stopped(first: str, second: str) -> None:
    whole, begun, resumed = learner("eager"), learner(first), learner(second)
    for seed in range(2):
        whole.step(tokens(seed), K, 1e-2)
        begun.step(tokens(seed), K, 1e-2)
    file = io.BytesIO()
    torch.save(begun.state(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert layout(state) == layout(whole.state())
    resumed.restore(state)
    same_stats(whole.step(tokens(2), K, 1e-2), resumed.step(tokens(2), K, 1e-2))
    same_parameters(whole, resumed)
    assert layout(resumed.state()) == layout(whole.state())
    assert [float(s["step"]) for s in resumed.state()["optimiser"]["state"].values()] == [3.0] * 4


def layout(value: Any) -> Any:
    """Keys, types and shapes of a state."""
    if isinstance(value, dict):
        return {key: layout(item) for key, item in value.items()}
    if isinstance(value, list):
        return [layout(item) for item in value]
    return (value.dtype, value.shape) if isinstance(value, Tensor) else type(value)


class Watch(TorchDispatchMode):
    """Notes operations for which a host would wait for a GPU, or copy to it from memory that is not pinned."""

    WAITS = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "bincount",
        "unique",
        "is_nonzero",
        "equal",
        "scalar_tensor",
        "lift_fresh",
    )

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masked = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if masked or name.startswith(self.WAITS):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@here
def test_the_host_waits_for_nothing_but_what_it_reads_later(monkeypatch) -> None:
    reads = []

    def counted(numbers: Tensor) -> Any:
        read = later_read(numbers)
        return lambda: (reads.append(tuple(numbers.shape)), read())[1]

    later_read = later.read_later
    for module in ("dead", "step", "kernels.triton.encode"):
        monkeypatch.setattr(f"pvsae.saes.{module}.read_later", counted)
    made = learner("triton", aux_k=5)
    for seed in range(2):
        made.step(tokens(seed), K, 1e-2)
    reads.clear()
    with Watch() as watch:
        read = made.begin(tokens(9), K, 1e-2)
    assert watch.seen == []
    assert reads == [(1,), (1, 2)], "how many passed the bound, and how many are dead"
    stats = read()
    assert stats.aux_loss > 0
    assert 5 < stats.n_dead <= 20, "they pass through the threshold, and all of them are worked on"
    with Watch() as watch:
        learner("eager").step(tokens(9), K, 1e-2)
    assert watch.seen, "the eager path does wait"


@here
def test_the_copy_of_the_encoder_is_kept_up_to_date() -> None:
    made = learner("triton", dtype=torch.bfloat16)
    assert made.fused is not None
    made.step(tokens(0), K, 0.1)
    copy = made.fused._weight()
    assert copy is made.fused._weight()
    assert copy.dtype == torch.bfloat16
    torch.testing.assert_close(copy.float(), made.W_enc, rtol=2**-7, atol=0)  # the interpreter truncates, a GPU rounds
    made.W_enc += 1
    assert torch.equal(made.fused._weight(), made.W_enc.bfloat16())
    other = learner("triton", dtype=torch.bfloat16)
    other.restore(made.state())
    assert torch.equal(other.fused._weight(), made.W_enc.bfloat16())


@here
def test_a_training_by_kernels_says_where_a_loss_was_not_finite(tmp_path: Path, monkeypatch) -> None:
    """Statistics of a step are read one step later, so that the device need not be waited for."""
    from pvsae.errors import UserError
    from pvsae.saes.trainer import DictionaryConfig, TrainConfig, train
    from tests.saes.test_trainer import Made

    class Broken(Made):
        def tokens(self, n: int, seed: int, block: int) -> Tensor:
            return super().tokens(n, seed, block) * (float("nan") if seed == 3 else 1)

    one = DictionaryConfig(block=1, d_sae=8, k=2)
    config = TrainConfig(dictionaries=(one,), tokens=80, batch=8, calibration_tokens=64, step=StepConfig(kernels="triton"))
    with pytest.raises(UserError, match="loss of block-1_width-8_k-2 is nan at step 3"):
        train(Broken(), config, tmp_path, progress=False)


# ------------------------------------------------------------------------------------------------------------- processes
SEEDS, RATES = (0, 1, 2, 2, 7), (1e-2, 1e-2, 0.0, 1e-2, 1e-2)  # the fourth step's threshold is the third's


def _work(group: Group, folder: str) -> None:
    for name, width in (("1x2", 2), ("2x1", 1)):
        grid = grid_of(group, width)
        n = BATCH // grid.data.size
        made = learner("triton", grid)
        stats, found_fast = [], []
        for i, (seed, rate) in enumerate(zip(SEEDS, RATES, strict=True)):
            if i == 4:
                made.guess = 1e9  # nothing passes
            stats.append(made.step(tokens(seed)[grid.data.rank * n : (grid.data.rank + 1) * n], K, rate))
            found_fast.append(isinstance(made.guess, Tensor))
        assert found_fast[0] is found_fast[4] is False, "without a good guess the numbers go to the host"
        assert found_fast[3], "with one they stay on the device"
        found = {"stats": [list(vars(s).values()) for s in stats], "parameters": made.parameters(), "silent": made.silent_for}
        torch.save(found, f"{folder}/{name}-{group.rank}.pt")


@here
def test_processes_that_share_tokens_or_latents(tmp_path: Path) -> None:
    together(_work, 2, str(tmp_path))
    eager = learner("eager")
    stats = [list(vars(eager.step(tokens(s), K, rate)).values()) for s, rate in zip(SEEDS, RATES, strict=True)]
    for name in ("1x2", "2x1"):
        found = [torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1)]
        for each in found:
            torch.testing.assert_close(torch.tensor(each["stats"]), torch.tensor(stats), rtol=1e-4, atol=1e-5)
        shards = found if name == "1x2" else found[:1]
        for i, whole in enumerate(eager.parameters()):
            ours = found[0]["parameters"][i] if i == 3 else torch.cat([shard["parameters"][i] for shard in shards])
            torch.testing.assert_close(ours, whole, rtol=1e-5, atol=2e-5)
        assert torch.equal(torch.cat([shard["silent"] for shard in shards]), eager.silent_for)
