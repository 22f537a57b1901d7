"""The sparse step beside dense autograd, and selection beside a sort of everything."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pvsae.errors import UserError
from pvsae.saes import dead as dying
from pvsae.saes import kernels
from pvsae.saes.grid import SINGLE
from pvsae.saes.kernels import eager
from pvsae.saes.parallel import ALONE
from pvsae.saes.step import Learner, StepConfig


def tokens(n: int = 96, d: int = 24, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator) / d**0.5
    return torch.randn(n, d, generator=generator) @ mix + 0.3


def learner(d: int = 24, f: int = 80, **options) -> Learner:
    made = Learner(d, f, StepConfig(**options), seed=1, product_dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    made.W_enc += 0.1 * torch.randn(f, d, generator=generator)
    made.b_enc += 0.05 * torch.randn(f, generator=generator)
    made.b_dec += 0.1 * torch.randn(d, generator=generator)
    return made


def dead_of(made: Learner) -> dying.Dead:
    return dying.find_later(made.silent_for, made.config.dead_after, dying.MOST_DEAD * made.aux_k, 96, ALONE)()


def dense_selection(made: Learner, x: Tensor, k: float) -> Tensor:
    """[batch, d_sae] activations by sorting everything; ties by position."""
    pre = ((x - made.b_dec) @ made.W_enc.T + made.b_enc).relu()
    n_keep = min(round(k * len(x)), int((pre > 0).sum()))
    order = pre.flatten().sort(descending=True, stable=True).indices[:n_keep]
    mask = torch.zeros(pre.numel(), dtype=torch.bool).index_fill_(0, order, True).view(pre.shape)
    return pre * mask


def as_dense(kept: kernels.Sparse, shape: torch.Size) -> Tensor:
    out = torch.zeros(shape)
    out[kept.token, kept.latent] = kept.value
    return out


@pytest.mark.parametrize("k", [0.5, 4, 8, 200])
@pytest.mark.parametrize("guess", [None, 0.0, 0.3, 1e9])
@pytest.mark.parametrize("block", [50, 2**21])
def test_selection_is_the_exact_top_whatever_was_guessed(k: float, guess: float | None, block: int, monkeypatch) -> None:
    monkeypatch.setattr(eager, "BLOCK_ELEMENTS", block)
    made, x = learner(), tokens()
    made.guess = guess
    kept, threshold = made.select(x, k)
    expected = dense_selection(made, x, k)
    assert len(kept.value) == int((expected > 0).sum())
    torch.testing.assert_close(as_dense(kept, expected.shape), expected, rtol=1e-5, atol=1e-6)
    assert threshold == kept.value.min()
    flat = kept.token * made.d_sae + kept.latent
    assert bool((flat.diff() > 0).all()), "sorted by token, then latent"


@pytest.mark.parametrize("guess", [None, 0.3])
def test_in_bf16_it_is_the_exact_top_of_what_bf16_gave(guess: float | None) -> None:
    made, x = learner(), tokens()
    made.product_dtype, made.guess = torch.bfloat16, guess
    kept, _ = made.select(x, 4)
    low = [t.bfloat16() for t in (made.b_enc, x - made.b_dec, made.W_enc.T)]
    pre = torch.addmm(*low).float().flatten()
    assert len(kept.value) == 4 * len(x)
    assert torch.equal(kept.value.sort().values, pre.sort().values[-4 * len(x) :])
    assert torch.equal(pre[kept.token * made.d_sae + kept.latent], kept.value)


def test_ties_are_kept_in_order_and_no_more_than_asked() -> None:
    made = Learner(4, 6, StepConfig(), product_dtype=torch.float32)
    made.W_enc.zero_()
    made.b_enc.fill_(1.0)
    kept, threshold = made.select(torch.zeros(5, 4), 2.2)
    assert threshold == 1.0
    assert (kept.token * 6 + kept.latent).tolist() == list(range(11))


def test_zeros_are_never_kept() -> None:
    made = Learner(4, 6, StepConfig(), product_dtype=torch.float32)
    made.b_enc.fill_(-100.0)
    kept, threshold = made.select(tokens(7, 4), 3)
    assert len(kept.value) == 0
    assert threshold == 0.0
    stats = made.step(tokens(7, 4), 3, 1e-3)
    assert stats.l0 == 0
    assert stats.fvu > 0


def dense_gradients(made: Learner, x: Tensor, k: float, dead: Tensor, low: float, some: slice) -> list[Tensor]:
    """Of the loss in the docstring of the module, by autograd through [batch, d_sae] matrices; the parallel component removed.

    The dead-latent loss is the mean over `some` of the tokens.
    """
    W_enc, W_dec, b_enc, b_dec = (p.clone().requires_grad_() for p in made.parameters())
    pre = (x - b_dec) @ W_enc.T + b_enc
    acts = pre.relu() * (dense_selection(made, x, k) > 0)
    error = acts @ W_dec + b_dec - x
    loss = error.pow(2).sum(1).mean()
    if len(dead):
        still = (x[some] - b_dec).detach() @ W_enc[dead].T + b_enc[dead]
        dead_acts = still.relu() * (still > low)
        loss = loss + made.config.aux_coef * (dead_acts @ W_dec[dead] + error[some].detach()).pow(2).sum(1).mean()
    loss.backward()
    along = (W_dec.grad * made.W_dec).sum(1, keepdim=True)
    return [W_enc.grad, W_dec.grad - along * made.W_dec, b_enc.grad, b_dec.grad]


@pytest.mark.parametrize("n_dead", [0, 7, 30])
def test_gradients_are_those_of_dense_autograd(n_dead: int) -> None:
    made, x = learner(aux_k=12), tokens()
    made.silent_for[:n_dead] = made.config.dead_after
    found = dead_of(made)
    dead = found.rows
    assert len(dead) == n_dead
    kept, _ = made.select(x, 6)
    every = 3 if n_dead == 30 else 1  # as many as there are times more dead latents than a token has
    some = slice(made.config.dead_after // 96 % every, None, every)
    few = (x - made.b_dec)[some]
    low = dying.threshold(few, 0, len(few), made.W_enc[dead], made.b_enc[dead], 12, SINGLE) if n_dead > 12 else 0.0
    assert (low > 0) == (n_dead > 12)
    ours, sums = made.gradients(x, kept, found)
    squared, variance, aux = sums.tolist()
    for mine, theirs in zip(ours.tensors(), dense_gradients(made, x, 6, dead, low, some), strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 1e-5
    assert squared == pytest.approx(float((as_dense(kept, (96, 80)) @ made.W_dec + made.b_dec - x).pow(2).sum()), rel=1e-5)
    assert variance == pytest.approx(float((x - x.mean(0)).pow(2).sum()), rel=1e-5)
    assert (aux > 0) == (n_dead > 0)


def test_many_dead_latents_are_worked_on_a_few_at_a_time() -> None:
    made, x = learner(aux_k=5), tokens()
    made.silent_for[:60] = made.config.dead_after
    kept, _ = made.select(x, 6)
    live = made.gradients(x, kept, dying.Dead(torch.zeros(0, dtype=torch.int64), 0, 0))[0].W_dec
    helped = made.gradients(x, kept, dead_of(made))[0].W_dec
    changed = (live != helped).any(1).nonzero()[:, 0]
    assert 0 < len(changed) <= dying.MOST_DEAD * 5
    made.silent_for += 96
    others = (made.gradients(x, kept, dead_of(made))[0].W_dec != live).any(1).nonzero()[:, 0]
    assert changed.tolist() != others.tolist()


def test_a_step_keeps_unit_rows_counts_silence_and_learns() -> None:
    made, x = learner(), tokens(512)
    first = made.step(x, 6, 3e-3)
    kept, _ = learner().select(x, 6)
    silent = torch.full((80,), 512)
    silent[kept.latent] = 0
    assert torch.equal(made.silent_for, silent)
    for _ in range(150):
        last = made.step(x, 6, 3e-3)
    assert last.l0 == 6
    assert last.fvu < 0.5 * first.fvu
    torch.testing.assert_close(made.W_dec.norm(dim=1), torch.ones(80))


def test_the_clip_bounds_the_gradient_that_adam_sees() -> None:
    free, clipped = learner(clip=None), learner(clip=0.01)
    stats = [made.step(tokens(), 6, 0.0) for made in (free, clipped)]
    assert stats[0].grad_norm == stats[1].grad_norm > 0.01
    ratio = 0.01 / stats[0].grad_norm
    for a, b in zip(free.parameters(), clipped.parameters(), strict=True):
        one, other = (made.optimiser.state[p]["exp_avg"] for made, p in ((free, a), (clipped, b)))
        torch.testing.assert_close(one * ratio, other, rtol=1e-4, atol=1e-9)


def test_the_running_threshold_has_no_bias_from_its_start() -> None:
    made, x = learner(), tokens(512)
    first = made.step(x, 6, 0.0)
    assert made.threshold == pytest.approx(first.threshold)
    for _ in range(5):
        made.step(x, 6, 0.0)
    assert made.threshold == pytest.approx(first.threshold, rel=1e-4)


def test_state_and_restore_go_on_bit_for_bit() -> None:
    import copy

    made = learner()
    for seed in range(3):
        made.step(tokens(seed=seed), 6, 1e-3)
    other = learner()
    other.restore(copy.deepcopy(made.state()))
    for seed in range(3, 6):
        a, b = made.step(tokens(seed=seed), 6, 1e-3), other.step(tokens(seed=seed), 6, 1e-3)
        assert a == b
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), other.parameters(), strict=True))


def test_kernels_are_chosen_by_device_and_wish() -> None:
    assert kernels.of(torch.device("cpu")) is eager
    assert kernels.of(torch.device("cpu"), "eager") is eager
    with pytest.raises(UserError, match="one of auto, eager, triton"):
        kernels.of(torch.device("cpu"), "fast")
    assert kernels.product_dtype(torch.device("cpu"), "float32") == torch.float32
    assert Learner(4, 6, StepConfig(product="bfloat16")).product_dtype == torch.bfloat16
    with pytest.raises(UserError, match="one of auto, float32, bfloat16, int8"):
        kernels.product_dtype(torch.device("cpu"), "float16")
    with pytest.raises(UserError, match="a CPU with int8 instructions"):
        kernels.product_dtype(torch.device("cuda"), "int8")
    from pvsae.saes.kernels import triton

    if not triton.available():
        with pytest.raises(UserError, match="no Triton kernels here"):
            learner(kernels="triton")


def test_sums_of_squares_of_millions_of_numbers_are_exact() -> None:
    made, x = learner(d=512, f=16), tokens(4096, 512)
    kept, _ = made.select(x, 2)
    _, sums = made.gradients(x, kept, dead_of(made))
    assert float(sums[1]) == pytest.approx(float((x.double() - x.double().mean(0)).square().sum()), rel=1e-6)


def test_a_batch_of_fewer_tokens_than_there_are_turns_of_dead_latents() -> None:
    made = learner(aux_k=2)
    made.silent_for[:60] = made.config.dead_after
    for n in (2, 3, 1):
        assert made.step(tokens(n), 4, 1e-3).n_dead > 0
