"""The int8 screen loses nothing that the threshold lets pass, whatever the activations look like."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pvsae.saes.kernels import eager, screen
from pvsae.saes.step import Learner, StepConfig

pytestmark = pytest.mark.skipif(not screen.available(), reason="this CPU has no fast int8 product")


def activations(kind: str, n: int = 1100, d: int = 96) -> Tensor:
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(3))
    if kind == "decaying":
        x *= torch.linspace(3, 0.05, d)
    if kind == "massive dimensions":
        x[:, 7] *= 60
        x[:, 50] += 200
    if kind == "massive tokens":
        x[::300] *= 50
    if kind == "spikes":
        x[torch.arange(n), torch.arange(n) * 7 % d] *= 30
    return x


def weights(x: Tensor, f: int) -> tuple[Tensor, Tensor]:
    """Rows like those that are learnt on x: larger where x varies more, of several lengths."""
    generator = torch.Generator().manual_seed(4)
    W = torch.nn.functional.normalize(torch.randn(f, x.shape[1], generator=generator) * x.std(0), dim=1)
    W[::3] = torch.nn.functional.normalize(torch.randn(len(W[::3]), x.shape[1], generator=generator), dim=1)
    return W * (0.3 + torch.rand(f, 1, generator=generator)), 0.3 * torch.randn(f, generator=generator)


@pytest.mark.parametrize("kind", ["plain", "decaying", "massive dimensions", "massive tokens", "spikes"])
@pytest.mark.parametrize("f", [640, 1021])
def test_the_same_pairs_pass_as_in_fp32(kind: str, f: int) -> None:
    x = activations(kind)
    W, b = weights(x, f)
    pre = (x @ W.T + b).flatten()
    low = float(pre.kthvalue(pre.numel() - 8 * len(x)).values)
    index, value = eager.survivors(x, W, b, low)
    found = screen.survivors(x, W, b, low)
    ours, theirs = (dict(zip(i.tolist(), v.tolist(), strict=True)) for i, v in ((found.flat, found.value), (index, value)))
    assert found.flat.tolist() == sorted(ours)
    for one, other in ((ours, theirs), (theirs, ours)):  # the order of a sum decides at the threshold itself
        assert all(
            v == pytest.approx(other[i], rel=1e-4, abs=1e-4 * low) if i in other else v < low * 1.0001 for i, v in one.items()
        )
    assert len(ours) <= found.n_screened
    assert kind == "spikes" or found.n_screened < 3 * len(ours)


@pytest.mark.parametrize("spike", [5.0, 15.0, 30.0])
def test_small_elements_along_a_latent_count_beside_a_large_one(spike: float) -> None:
    """Rounded to the nearest, all of them would be 0 together."""
    generator = torch.Generator().manual_seed(0)
    d, n = 256, 1024
    used = torch.rand(d, d, generator=generator) < 0.75
    W = torch.nn.functional.normalize((torch.randint(0, 2, (d, d), generator=generator) * 2 - 1.0) * used, dim=1)
    latent = torch.randint(0, d, (n,), generator=generator)
    x = 0.1 * W[latent].sign() * (0.95 + 0.1 * torch.rand(n, d, generator=generator))
    x[torch.arange(n), (~used[latent]).int().argmax(1)] += spike
    found = screen.survivors(x, W, torch.zeros(d), 1.2)
    expected = eager.survivors(x, W, torch.zeros(d), 1.2)[0]
    assert len(expected) >= n
    assert torch.equal(found.flat, expected)


def test_the_margin_is_what_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    x = activations("plain")
    W, b = weights(x, 1021)
    monkeypatch.setattr(screen, "SIGMAS", -1.0)
    assert len(screen.survivors(x, W, b, 2.0).flat) < len(eager.survivors(x, W, b, 2.0)[0])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_are_not_hidden(bad: float) -> None:
    x = activations("plain")
    x[5, 3] = bad
    W, b = weights(x, 64)
    learner = Learner(96, 64, StepConfig(), product_dtype=torch.int8)
    learner.guess = 0.5
    assert not torch.isfinite(torch.tensor(learner.step(x, 4, 1e-3).loss))
    assert len(screen.survivors(x, W, b, 0.5).flat) > 0


def test_steps_with_the_screen_are_those_without_it() -> None:
    x = activations("decaying", 2048)
    exact, screened = (Learner(96, 512, StepConfig(), product_dtype=dtype) for dtype in (torch.float32, torch.int8))
    for part in x.split(512):
        a, b = (vars(made.step(part, 8, 1e-3)) for made in (exact, screened))
        assert b == pytest.approx(a, rel=1e-5)
    assert screened.rest == 0, "it was used"
    for p, q in zip(exact.parameters(), screened.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_a_screen_that_lets_too_much_pass_rests_and_its_rest_is_part_of_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Learner(96, 512, StepConfig(), product_dtype=torch.int8)
    x = activations("plain")
    made.step(x, 8, 1e-3)
    made.step(x, 8, 1e-3)
    assert made.rest == 0
    monkeypatch.setattr(screen, "SIGMAS", 100.0)
    made.step(x, 8, 1e-3)
    assert made.rest > 0
    other = Learner(96, 512, StepConfig(), product_dtype=torch.int8)
    other.restore(made.state())
    assert (other.rest, other.change, other.guess) == (made.rest, made.change, made.guess)


def test_a_screen_that_lets_too_much_pass_gives_up_before_it_computes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    x = activations("plain")
    W, b = weights(x, 640)
    n = screen.survivors(x, W, b, 1.0).n_screened
    monkeypatch.setattr(eager, "dots", lambda *_: pytest.fail("computed"))
    assert screen.survivors(x, W, b, 1.0, most=n - 1) is None


@pytest.mark.parametrize(("n", "d", "f"), [(1, 6, 18), (3, 5, 7), (2, 1, 1), (1, 896, 64)])
def test_small_and_crooked_shapes(n: int, d: int, f: int) -> None:
    x = activations("plain", n, d)
    W, b = weights(activations("plain", 50, d), f)
    for low in (0.3, 1e9):
        assert torch.equal(screen.survivors(x, W, b, low).flat, eager.survivors(x, W, b, low)[0])
