"""Processes that share tokens and latents do what one process with the joint batch and the whole dictionary does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pvsae.errors import UserError
from pvsae.saes import checkpoint, kernels
from pvsae.saes.folders import load
from pvsae.saes.grid import SINGLE, Grid, grid_of, kth_smallest
from pvsae.saes.parallel import ALONE, Group
from pvsae.saes.step import Learner, StepConfig
from pvsae.saes.trainer import TrainConfig, calibrated_threshold, train
from tests.saes.processes import halves, together
from tests.saes.test_trainer import Made, config

BATCH, D, F, K, STEPS = 48, 12, 40, 3.5, 8
SHAPES = {"2x2": 2, "1x4": 4, "4x1": 1}  # data x width -> width
# Latents die within the steps, more of them than are worked on at once, and the gradient is clipped.
SHORT_LIVED = StepConfig(dead_after=100, aux_k=2, clip=0.5)


def tokens(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, D, generator=generator) + 0.5


def made(grid: Grid, step: StepConfig | None = None) -> Learner:
    """A small dictionary, or this process' shard of it, half of whose latents seldom fire."""
    learner = Learner(D, F, step or StepConfig(), seed=1, product_dtype=torch.float32, grid=grid)
    learner.b_enc -= (torch.arange(F) % 2 * 3.0)[latents(grid)]
    return learner


def latents(grid: Grid) -> slice:
    n = F // grid.width.size
    return slice(grid.width.rank * n, (grid.width.rank + 1) * n)


def mine(grid: Grid, x: Tensor) -> Tensor:
    n = len(x) // grid.data.size
    return x[grid.data.rank * n : (grid.data.rank + 1) * n]


def ties(grid: Grid) -> Learner:
    """Weights of small whole numbers: most pre-activations equal many others, to the bit however they are summed."""
    learner = made(grid)
    whole = torch.randint(-1, 2, (F, D), generator=torch.Generator().manual_seed(3)).float()
    learner.W_enc.copy_(whole[latents(grid)])
    learner.b_enc.zero_()
    return learner


def kept(grid: Grid, which: str, k: float, guess: float | None) -> tuple[Tensor, Tensor, float]:
    """Joint places and values of what this process keeps, and the threshold."""
    learner = ties(grid) if which == "ties" else made(grid)
    learner.guess = guess
    x = tokens(5).round() if which == "ties" else tokens(5)
    found, threshold = learner.select(mine(grid, x), k)
    places = grid.places(found.token * learner.d_sae + found.latent, BATCH // grid.data.size, learner.d_sae)
    return places, found.value, threshold


SELECTIONS = [("ties", 0.1, None), ("ties", 2.7, 0.5), ("ties", 30, None), ("floats", 4, 1e9)]


def short(product: str = "float32", **options: Any) -> TrainConfig:
    return config(20, checkpoint_every=8, log_every=2, step=StepConfig(product=product), **options)


def _work(group: Group, folder: str) -> None:
    """One of four processes: everything that the tests below look at, in files."""
    out = Path(folder)
    for name, width in SHAPES.items():
        grid = grid_of(group, width)
        learner = made(grid, SHORT_LIVED)
        first = [p.clone() for p in learner.parameters()]
        stats = [learner.step(mine(grid, tokens(s)), K, 3e-2) for s in range(STEPS)]
        found = {
            "kept": [kept(grid, *how) for how in SELECTIONS],
            "first": first,
            "last": learner.parameters(),
            "silent_for": learner.silent_for,
            "stats": [list(vars(s).values()) for s in stats],
            "threshold": calibrated_threshold(learner, tokens(99), K),
            "place": (grid.data.rank, grid.width.rank),
        }
        torch.save(found, out / f"{name}-{group.rank}.pt")
    train(Made(), short(width_shards=2), out / "2x2", group=group, progress=False)
    pair = halves(group)
    if group.rank < 2:
        _killed_and_resumed(pair, out)
    else:
        trained = train(Made(), short(), out / "2x1", group=pair, progress=False)
        torch.save(trained[0].sae.W_dec, out / f"2x1-{pair.rank}.pt")
        train(Made(), short("auto", width_shards=2), out / "fastest", group=pair, progress=False)
    group.wait()


def _killed_and_resumed(pair: Group, out: Path) -> None:
    options = {"group": pair, "progress": False}
    train(Made(), short(width_shards=2), out / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        train(Made(kill_at=13), short(width_shards=2), out / "killed", **options)
    pair.wait()
    if pair.rank == 0:
        names = sorted(file.name for file in (out / "killed").glob("checkpoint*"))
        (out / "killed.json").write_text(json.dumps(names))
        torch.save(torch.load(out / "killed" / names[0], weights_only=True)["learners"], out / "shard.pt")
        for name in names:
            (out / "copied").mkdir(exist_ok=True)
            (out / "copied" / name).write_bytes((out / "killed" / name).read_bytes())
    pair.wait()
    resumed = Made()
    trained = train(resumed, short(width_shards=2), out / "killed", **options)
    assert resumed.n == 20
    assert trained[0].sae.d_sae == 64, "every process has the whole dictionary at the end"


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> Path:
    """What four processes left behind."""
    folder = tmp_path_factory.mktemp("four")
    together(_work, 4, str(folder))
    return folder


def parts(four: Path, name: str) -> list[dict]:
    return [torch.load(four / f"{name}-{rank}.pt", weights_only=True) for rank in range(4)]


def joined(found: list[dict], which: str) -> list[Tensor]:
    """W_enc, W_dec, b_enc, b_dec of the whole dictionary, after a look whether those that should be equal are."""
    for one in found:
        assert torch.equal(one[which][3], found[0][which][3]), "b_dec is everyone's"
        twin = next(other for other in found if other["place"][1] == one["place"][1])
        assert all(torch.equal(a, b) for a, b in zip(one[which], twin[which], strict=True)), "a column has the same latents"
    row = [one for one in found if one["place"][0] == 0]
    return [torch.cat([one[which][i] for one in row]) for i in range(3)] + [found[0][which][3]]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("which", range(len(SELECTIONS)))
def test_the_same_pairs_are_kept(four: Path, name: str, which: int) -> None:
    found = [one["kept"][which] for one in parts(four, name)]
    places, values, threshold = kept(SINGLE, *SELECTIONS[which])
    order = torch.cat([one[0] for one in found]).sort()
    assert torch.equal(order.values, places)
    torch.testing.assert_close(torch.cat([one[1] for one in found])[order.indices], values, rtol=1e-6, atol=0)
    assert [one[2] for one in found] == [pytest.approx(threshold, rel=1e-6)] * 4
    if SELECTIONS[which][0] == "ties":
        assert int((values == threshold).sum()) > 1, "there is something to decide"


@pytest.mark.parametrize("name", SHAPES)
def test_steps_are_those_of_one_process(four: Path, name: str) -> None:
    one = made(SINGLE, SHORT_LIVED)
    found = parts(four, name)
    assert all(torch.equal(a, b) for a, b in zip(joined(found, "first"), one.parameters(), strict=True)), "one seed, one start"
    stats = [list(vars(one.step(tokens(s), K, 3e-2)).values()) for s in range(STEPS)]
    last = torch.tensor(stats[-1])
    assert last[2] > 0, "some latents are dead"
    assert last[4] > 4 * 2, "and not all of them are worked on in a step"
    assert last[6] > 0.5, "and the gradient is clipped"
    for each in found:
        torch.testing.assert_close(torch.tensor(each["stats"]), torch.tensor(stats), rtol=1e-4, atol=1e-6)
        assert each["stats"] == found[0]["stats"], "every process says the same"
    for ours, theirs in zip(joined(found, "last"), one.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    row = [each["silent_for"] for each in found if each["place"][0] == 0]
    assert torch.equal(torch.cat(row), one.silent_for)
    assert [each["threshold"] for each in found] == [pytest.approx(calibrated_threshold(one, tokens(99), K), rel=1e-4)] * 4


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    train(Made(), short(), folder, progress=False)
    return folder


def curve(folder: Path) -> Tensor:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = ("loss", "fvu", "l0", "grad_norm", "n_dead")
    return torch.tensor([[line[name] for name in names] for line in lines])


@pytest.mark.parametrize(("name", "shards"), [("2x1", 1), ("2x2", 2), ("whole", 2)])
def test_a_training_has_the_loss_curve_of_one_process(four: Path, one: Path, name: str, shards: int) -> None:
    torch.testing.assert_close(curve(four / name), curve(one), rtol=1e-4, atol=0)
    for d in config().dictionaries:
        a, b = load(four / name / d.name), load(one / d.name)
        assert a.d_sae == d.d_sae
        for array in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"):
            torch.testing.assert_close(getattr(a, array), getattr(b, array), rtol=1e-2, atol=1e-3)
        assert a.info.training["config"]["width_shards"] == shards


def test_in_the_device_s_fastest_way_they_agree_to_its_precision(four: Path, one: Path) -> None:
    rough = kernels.product_dtype(torch.device("cpu")) is torch.bfloat16  # a product in int8 is exact where it counts
    torch.testing.assert_close(curve(four / "fastest")[:, :3], curve(one)[:, :3], rtol=0.02 if rough else 1e-4, atol=0)


def test_every_process_ends_with_the_same_dictionary(four: Path) -> None:
    first, second = (torch.load(four / f"2x1-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert torch.equal(first, second)


def test_killed_and_started_again_it_ends_with_the_same_bits(four: Path) -> None:
    assert json.loads((four / "killed.json").read_text()) == [
        "checkpoint.8.1of2.pt", "checkpoint.8.2of2.pt", "checkpoint.pt",
    ]  # fmt: skip
    assert torch.load(four / "shard.pt", weights_only=True)[0]["parameters"][0].shape == (32, 16), "half of the latents"
    for d in config().dictionaries:
        a, b = (load(four / name / d.name) for name in ("whole", "killed"))
        for array in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"):
            assert torch.equal(getattr(a, array), getattr(b, array)), array
    assert (four / "whole" / "metrics.jsonl").read_text() == (four / "killed" / "metrics.jsonl").read_text()


def test_a_checkpoint_is_gone_on_with_in_the_same_shards_only(four: Path, one: Path) -> None:
    with pytest.raises(UserError, match="has the latents in 2 shards, and this training has them in one piece") as error:
        train(Made(), short(), four / "copied", progress=False)
    assert "width_shards=2" in str(error.value)
    with pytest.raises(UserError, match="in one piece, and this training has them in 2 shards"):
        checkpoint.check(one, 2)
    row = Grid(width=Group(1, 2))
    state = checkpoint.load(four / "copied", row)
    assert state is not None
    assert state["done"] == 8
    (four / "copied" / "checkpoint.8.2of2.pt").unlink()
    with pytest.raises(UserError, match=r"needs checkpoint\.8\.2of2\.pt, which is missing"):
        checkpoint.load(four / "copied", row)
    checkpoint.remove(four / "copied")
    assert not list((four / "copied").glob("checkpoint*"))


@pytest.mark.parametrize(
    ("size", "options", "said"),
    [
        (1, {"width_shards": 2}, "width_shards is 2, and there is one process"),
        (3, {"width_shards": 2}, "width_shards is 2, and there are 3 processes"),
        (6, {"width_shards": 2}, "batches of 128 tokens on 6 processes, 2 for each part of the tokens"),
    ],
)
def test_processes_that_cannot_share_it_are_refused(tmp_path: Path, size: int, options: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        train(Made(), config(**options), tmp_path, group=Group(0, size), progress=False)
    assert not list(tmp_path.iterdir())


def test_latents_that_cannot_be_shared_are_refused() -> None:
    with pytest.raises(UserError, match="width_shards is 3, and block-1_width-64_k-4 has 64 latents"):
        config(width_shards=3)
    with pytest.raises(UserError, match="width_shards is 0"):
        config(width_shards=0)


@pytest.mark.parametrize("bits", [1, 11, 12, 31, 40])
@pytest.mark.parametrize("n", [1, 300])
def test_the_kth_smallest_key(bits: int, n: int) -> None:
    keys = torch.randint(0, 2 ** min(bits, 62), (n,), generator=torch.Generator().manual_seed(bits))
    for k in {1, n // 3 + 1, n}:
        found, left = kth_smallest(keys, k, bits, ALONE)
        wanted = int(keys.sort().values[k - 1])
        assert int(found) == wanted
        assert int(left) == k - int((keys < wanted).sum())


def test_shards_that_a_killed_run_left_do_not_spoil_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.3.1of2.pt").write_bytes(b"")
    checkpoint.save(tmp_path, 5, {"done": 5}, [{}], SINGLE)
    checkpoint.check(tmp_path, 1)
    state = checkpoint.load(tmp_path, SINGLE)
    assert state is not None
    assert state["done"] == 5
