"""Whole trainings on made activations: schedules, several dictionaries, kills, the calibrated end."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pvsae.errors import UserError
from pvsae.saes.folders import load
from pvsae.saes.info import SAEInfo
from pvsae.saes.step import Learner, StepConfig
from pvsae.saes.trainer import DictionaryConfig, TrainConfig, calibrated_threshold, geometric_median, train

D = 16


class Made:
    """Sparse combinations of fixed directions, of norm about 7; the stream protocol over a counter."""

    scale: Mapping[int, float] = {1: 0.5, 3: 0.25}

    def __init__(self, batches: int = 10_000, kill_at: int | None = None) -> None:
        self.n, self.ends, self.kill_at = 0, batches, kill_at
        self.atoms = torch.nn.functional.normalize(torch.randn(48, D, generator=torch.Generator().manual_seed(0)), dim=1)

    def tokens(self, n: int, seed: int, block: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * seed + block)
        codes = torch.rand(n, 48, generator=generator) * (torch.rand(n, 48, generator=generator) < 0.08)
        return 6 * codes @ self.atoms + 2.0

    def batches(self, batch_size: int) -> Iterator[dict[int, Tensor]]:
        while self.n < self.ends:
            if self.n == self.kill_at:
                raise KeyboardInterrupt
            self.n += 1
            yield {b: self.tokens(batch_size, self.n, b) for b in self.scale}

    def held_out(self, n_tokens: int) -> dict[int, Tensor]:
        return {b: self.tokens(n_tokens, 10**6, b) for b in self.scale}

    def info(self, block: int) -> SAEInfo:
        return SAEInfo(model="made", block=block, prepend_bos=False)

    def state(self) -> dict[str, Any]:
        return {"n": self.n}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.n = state["n"]


def config(steps: int = 60, **options: Any) -> TrainConfig:
    given: dict[str, Any] = {
        "dictionaries": (DictionaryConfig(block=1, d_sae=64, k=4, lr=3e-3), DictionaryConfig(block=3, d_sae=40, k=3, lr=3e-3)),
        "tokens": steps * 128, "batch": 128, "warmup": 5, "calibration_tokens": 4096, "log_every": 5, "checkpoint_every": 20,
    }  # fmt: skip
    return TrainConfig(**{**given, **options})


@pytest.mark.parametrize("unit", ["element", "token"])
def test_two_dictionaries_are_trained_saved_and_calibrated(tmp_path: Path, unit: str) -> None:
    lines: list[dict[str, Any]] = []
    made = train(Made(), config(300, unit=unit), tmp_path, log=lines.append, progress=False)
    fresh = Made()
    for one, d in zip(made, config().dictionaries, strict=True):
        sae = load(tmp_path / d.name)
        assert sae.info.block == d.block
        assert sae.info.k == d.k
        x = fresh.tokens(8192, 77, d.block)  # raw, and seen neither in training nor in calibration
        acts = sae.encode(x)
        assert float((acts > 0).sum(1).float().mean()) == pytest.approx(d.k, rel=0.02)
        assert sae.info.training["scale"] == pytest.approx(Made.scale[d.block] / (4 if unit == "token" else 1))
        fvu = float((sae.decode(acts) - x).pow(2).sum() / (x - x.mean(0)).pow(2).sum())
        assert fvu == pytest.approx(one.last["fvu"], abs=0.05)
        assert fvu < 0.5
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(d.d_sae))
        torch.testing.assert_close(one.sae.encode(x), acts)
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert written == lines
    assert [line["step"] for line in written] == [s for s in range(5, 301, 5) for _ in range(2)]


@pytest.mark.parametrize(("steps", "product"), [(100, "auto"), (100, "bfloat16"), (2000, "auto")])
def test_l0_after_reloading_is_within_two_percent_of_k(tmp_path: Path, steps: int, product: str) -> None:
    one = DictionaryConfig(block=1, d_sae=64, k=4)
    options = {"dictionaries": (one,), "calibration_tokens": 16_384, "step": StepConfig(product=product)}
    train(Made(), config(steps, **options), tmp_path, progress=False)
    x = Made().tokens(16_384, 5 * 10**5, 1)
    assert float((load(tmp_path / one.name).encode(x) > 0).sum(1).float().mean()) == pytest.approx(4, rel=0.02)


@pytest.mark.parametrize("k", [4, 5, 7, 8, 10])
def test_the_final_threshold_is_exact_in_fp32_whatever_the_product(k: int) -> None:
    x = torch.randn(4096, 32, generator=torch.Generator().manual_seed(1))
    learner = Learner(32, 1024, StepConfig(), product_dtype=torch.bfloat16)
    threshold = calibrated_threshold(learner, x, k)
    pre = (x - learner.b_dec) @ learner.W_enc.T + learner.b_enc
    assert int((pre > threshold).sum()) == pytest.approx(k * 4096, abs=2), "products may be summed in another order"
    assert learner.product_dtype is torch.bfloat16


def test_learners_of_one_run_share_the_memory_of_gradients() -> None:
    def weights(together: bool) -> list[Tensor]:
        shared: list[Tensor] | None = [] if together else None
        made = [Learner(16, n, StepConfig(), memory=shared) for n in (40, 64, 24)]
        for seed in range(3):
            x = torch.randn(128, 16, generator=torch.Generator().manual_seed(seed))
            for learner in made:
                learner.step(x, 4, 1e-2)
        assert not together or [len(rows) for rows in shared or []] == [64, 64]
        return [p for learner in made for p in learner.parameters()]

    assert all(torch.equal(p, q) for p, q in zip(weights(True), weights(False), strict=True))


@pytest.mark.parametrize("kill_at", [7, 20, 33])
def test_killed_and_started_again_ends_with_the_same_bits(tmp_path: Path, kill_at: int) -> None:
    train(Made(), config(), tmp_path / "whole", progress=False)
    with pytest.raises(KeyboardInterrupt):
        train(Made(kill_at=kill_at), config(), tmp_path / "killed", progress=False)
    resumed = Made()
    train(resumed, config(), tmp_path / "killed", progress=False)
    assert resumed.n == 60
    for d in config().dictionaries:
        a, b = (load(tmp_path / name / d.name) for name in ("whole", "killed"))
        for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert (tmp_path / "whole" / "metrics.jsonl").read_text() == (tmp_path / "killed" / "metrics.jsonl").read_text()


def test_a_line_of_metrics_that_was_cut_short_is_written_again(tmp_path: Path) -> None:
    """A full disk, or a machine that lost its power."""
    train(Made(), config(), tmp_path / "whole", progress=False)
    with pytest.raises(KeyboardInterrupt):
        train(Made(kill_at=33), config(), tmp_path / "killed", progress=False)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-40])
    train(Made(), config(), tmp_path / "killed", progress=False)
    assert metrics.read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:2000]), "checkpoint.pt is damaged"),
        (lambda file: file.write_bytes(b""), "checkpoint.pt is damaged"),
        (lambda file: file.write_bytes(b"no checkpoint at all"), "checkpoint.pt is damaged"),
        (lambda file: torch.save({**torch.load(file, weights_only=True), "version": 0}, file), "another version of pvsae"),
        (lambda file: torch.save({"done": 20}, file), "its layout is older"),
        (lambda file: torch.save([1], file), "another version of pvsae"),
    ],
)
def test_a_checkpoint_that_cannot_be_gone_on_with_is_said(tmp_path: Path, harm: Any, said: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(Made(kill_at=33), config(), tmp_path, progress=False)
    harm(tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match=said) as error:
        train(Made(), config(), tmp_path, progress=False)
    assert "start anew" in str(error.value)


def test_thresholds_at_the_end_are_those_of_the_saved_dictionary(tmp_path: Path) -> None:
    for one in train(Made(), config(), tmp_path, progress=False):
        assert one.last["threshold"] == pytest.approx(float(one.sae.threshold[0]), rel=1e-5)
        assert one.last["running_threshold"] == pytest.approx(one.last["threshold"], rel=0.5)
        assert one.sae.info.notes == ()


def test_a_threshold_from_fewer_tokens_than_wanted_is_noted(tmp_path: Path) -> None:
    class Short(Made):
        def held_out(self, n_tokens: int) -> dict[int, Tensor]:
            return super().held_out(300)

    for one in train(Short(), config(20), tmp_path, progress=False):
        assert load(tmp_path / one.name).info.notes == ("its threshold was set on 300 held-out tokens, of 4,096 wanted",)


def test_dead_latents_are_left_out_where_that_is_asked_for(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "dictionaries": (DictionaryConfig(block=1, d_sae=512, k=1, lr=3e-3),), "step": StepConfig(dead_after=4000, aux_coef=0.0),
    }  # fmt: skip
    (whole,) = train(Made(), config(100, **options), tmp_path / "whole", progress=False)
    train(Made(), config(100, drop_dead=True, **options), tmp_path / "less", progress=False)
    less = load(tmp_path / "less" / whole.name)
    x = Made().tokens(8192, 77, 1)
    acts, fewer = whole.sae.encode(x), less.encode(x)
    n_dead = whole.last["n_dead"]
    assert 0 < 512 - less.d_sae <= n_dead + 5  # which were found before the last step
    assert less.info.notes == (f"{512 - less.d_sae} of 512 latents were dead at the end of training, and left out",)
    assert not whole.sae.info.notes
    kept = [i for i, row in enumerate(whole.sae.W_dec) if any(torch.equal(row, other) for other in less.W_dec)]
    assert len(kept) == less.d_sae
    torch.testing.assert_close(acts[:, kept], fewer)
    rest = acts.sum(0)
    rest[kept] = 0
    assert float(rest.sum()) < 0.01 * float(acts.sum())


def test_a_finished_training_is_not_run_again(tmp_path: Path) -> None:
    first = train(Made(), config(10), tmp_path, progress=False)
    untouched = Made(kill_at=0)
    again = train(untouched, config(10), tmp_path, progress=False)
    assert untouched.n == 0
    assert [t.last for t in again] == [t.last for t in first]
    (tmp_path / first[1].name / "cfg.json").unlink()  # killed between the two
    train(untouched, config(10), tmp_path, progress=False)
    assert untouched.n == 10, "the stream stands where the checkpoint says, and no step is run"
    assert load(tmp_path / first[1].name).d_sae == 40


def test_dictionaries_of_another_config_are_not_given_out_as_those_asked_for(tmp_path: Path) -> None:
    """Their folders have the same names: learning rate, tokens and the options of a step are in no name."""
    train(Made(), config(10), tmp_path, progress=False)
    hotter = tuple(replace(d, lr=1e-2) for d in config().dictionaries)
    for other, said in (
        (config(10, dictionaries=hotter), "dictionaries"),
        (config(20), "tokens"),
        (config(10, step=StepConfig(clip=None)), "step.clip"),
        (config(10, drop_dead=True), "drop_dead"),
    ):
        with pytest.raises(UserError, match=rf"block-1_width-64_k-4 was trained with another config; it differs in: {said}\n"):
            train(Made(kill_at=0), other, tmp_path, progress=False)
    train(Made(kill_at=0), config(10, log_every=1, checkpoint_every=3), tmp_path, progress=False)
    alone = config(10, dictionaries=config().dictionaries[1:])
    assert [one.name for one in train(Made(kill_at=0), alone, tmp_path, progress=False)] == ["block-3_width-40_k-3"]


def test_a_grid_of_learning_rates_is_trained_into_folders_of_their_own(tmp_path: Path) -> None:
    both = tuple(DictionaryConfig(block=1, d_sae=64, k=4, lr=lr) for lr in (1e-3, 3e-3))
    names = ["block-1_width-64_k-4_lr-0.001", "block-1_width-64_k-4_lr-0.003"]
    made = train(Made(), config(20, dictionaries=both), tmp_path, progress=False)
    assert [one.name for one in made] == [one.last["dictionary"] for one in made] == names
    again = train(Made(kill_at=0), config(20, dictionaries=both), tmp_path, progress=False)
    alone = train(Made(), config(20, dictionaries=both[1:]), tmp_path / "alone", progress=False)
    assert torch.equal(again[1].sae.W_dec, alone[0].sae.W_dec)
    assert not torch.equal(again[0].sae.W_dec, again[1].sae.W_dec)


def test_the_schedules() -> None:
    c = config(1000, warmup=100, decay=0.2, k_anneal=0.5, k_start=8)
    assert [c.lr_share(s) for s in (100, 500, 799)] == [1.0, 1.0, 1.0]
    assert 0 < c.lr_share(0) < 0.02
    assert c.lr_share(900) == pytest.approx(0.5)
    assert 0 < c.lr_share(999) < 0.01
    assert c.k_at(0, 4, 1000) == 32
    assert c.k_at(0, 4, 10) == 10
    assert c.k_at(250, 4, 1000) == pytest.approx(18)
    assert c.k_at(500, 4, 1000) == c.k_at(999, 4, 1000) == 4
    assert config(20, warmup=1000).lr_share(5) == 1.0, "a short run warms up for a tenth of its steps"


def test_annealed_k_is_what_the_steps_keep(tmp_path: Path) -> None:
    train(Made(), config(60, k_anneal=0.5, k_start=3), tmp_path, progress=False)
    l0 = {}
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        found = json.loads(line)
        l0.setdefault(found["dictionary"], []).append(found["l0"])
    for d in config().dictionaries:
        assert l0[d.name][0] > 2 * d.k
        assert l0[d.name][-1] == pytest.approx(d.k, abs=0.01)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"tokens": 100}, "one whole batch"), ({"batch": 0}, "batch is 0"), ({"dictionaries": ()}, "no dictionary"),
        ({"decay": 1.5}, "decay is 1.5"), ({"warmup": -5}, "warmup is -5"), ({"k_start": -3}, "k_start is -3"),
        ({"step": StepConfig(clip=-1.0)}, "step.clip is -1"), ({"step": StepConfig(clip=0.0)}, "null for no limit"),
        ({"step": StepConfig(dead_after=0)}, "step.dead_after is 0"), ({"step": StepConfig(aux_k=0)}, "step.aux_k is 0"),
        ({"step": StepConfig(betas=(0.9, 2.0))}, "step.betas is"), ({"step": StepConfig(threshold_decay=1.0)}, "less than 1"),
        ({"step": StepConfig(kernels="cuda")}, "one of auto, eager, triton"),
        ({"step": StepConfig(aux_coef=-1.0)}, "step.aux_coef"),
        ({"step": StepConfig(product="fp8")}, "step.product is fp8"), ({"step": StepConfig(eps=0.0)}, "step.eps is 0"),
        ({"dictionaries": (DictionaryConfig(block=1, d_sae=8, k=2),) * 2}, "are the same"),
    ],
)  # fmt: skip
def test_wrong_configs_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        config(**wrong)
    assert said in str(error.value)


def test_what_ends_a_training_early_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="activations ended after 512 tokens"):
        train(Made(batches=4), config(), tmp_path / "short", progress=False)
    train(Made(), config(40), tmp_path / "other", progress=False)
    for d in config().dictionaries:
        (tmp_path / "other" / d.name / "cfg.json").unlink()
    with pytest.raises(UserError, match=r"another training; it differs in: step, tokens"):
        train(Made(), config(60, step=StepConfig(clip=None)), tmp_path / "other", progress=False)

    class Broken(Made):
        def tokens(self, n: int, seed: int, block: int) -> Tensor:
            return super().tokens(n, seed, block) * (math.nan if seed == 3 else 1)

    with pytest.raises(UserError, match="loss of block-1_width-64_k-4 is nan at step 3"):
        train(Broken(), config(), tmp_path / "nan", progress=False)


def test_the_geometric_median_is_not_moved_by_outliers() -> None:
    x = torch.randn(500, 8, generator=torch.Generator().manual_seed(0)) + 3
    far = torch.cat([x, torch.full((40, 8), 1e4)])
    assert float((geometric_median(far) - 3).abs().max()) < 0.3
    assert float((far.mean(0) - 3).abs().max()) > 100
