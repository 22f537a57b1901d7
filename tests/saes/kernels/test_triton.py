"""The Triton kernels against dense products, on a GPU or in Triton's interpreter.

The interpreter has to be on before anything imports Triton, and other tests import libraries that do. So without a GPU this
file runs itself once more, in a process of its own where it is on.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from pvsae.saes.kernels import eager
from pvsae.saes.kernels import triton as kernels
from pvsae.saes.kernels.eager import Sparse
from pvsae.saes.kernels.triton.order import by_latent, by_token, from_flat, offsets

INSTALLED = importlib.util.find_spec("triton") is not None
here = pytest.mark.skipif(not kernels.available(), reason=f"see test_in_the_interpreter: {kernels.problem()}")
DEVICE = "cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.skipif(not INSTALLED, reason="Triton is not installed")
@pytest.mark.skipif(kernels.available(), reason="the kernels run in this process")
@pytest.mark.slow  # test_fused.py runs steps in it that use all kernels
def test_in_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_importing_the_package_does_not_import_triton() -> None:
    code = "import sys, pvsae, pvsae.saes, pvsae.saes.kernels.triton; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_without_triton_the_kernels_say_so() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from pvsae.saes.kernels import triton\n"
        "print(triton.available(), triton.problem())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("False Triton cannot be imported")


# ------------------------------------------------------------------------------------------------------------- references
def problem(batch: int, d_sae: int, d: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random x, W_enc and b_enc."""
    generator = torch.Generator().manual_seed(seed)
    x, W, b = (torch.randn(*shape, generator=generator) for shape in ((batch, d), (d_sae, d), (d_sae,)))
    return x.to(DEVICE), (W / d**0.5).to(DEVICE), (0.1 * b).to(DEVICE)


def dense(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """[B, F] relu of the pre-activations."""
    return torch.relu(x.double() @ W.double().T + b.double()).float()


def top(acts: torch.Tensor, n: int) -> torch.Tensor:
    """Flat indices of the n largest that are positive, ties going to the lowest; ascending."""
    order = acts.reshape(-1).sort(descending=True, stable=True)
    return order.indices[:n][order.values[:n] > 0].sort().values


@pytest.fixture
def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pools with no more room than is asked for, so that small problems overflow."""
    from pvsae.saes.kernels.triton import encode, joint

    monkeypatch.setattr(encode, "LEAST_ROOM", 1)
    monkeypatch.setattr(joint, "LEAST_ROOM", 1)


def small_tiles():
    """Tiles that make several programs, with rests at every end, of shapes that the interpreter can bear."""
    return kernels.Tiles(tokens=16, latents=32, inner=16, group=2)


def kept_pairs(batch: int, d_sae: int, n: int, seed: int = 0) -> Sparse:
    """n random pairs; latents beyond two thirds are never kept, nor is token 1."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(batch, d_sae, generator=generator)
    scores[:, 2 * d_sae // 3 :] = 0
    scores[1:2] = 0
    flat = scores.reshape(-1).topk(n).indices
    kept = from_flat(flat, torch.rand(n, generator=generator) + 0.1, d_sae)
    return Sparse(*(part.to(DEVICE) for part in kept))


def matrix_of(kept: Sparse, batch: int, d_sae: int, value: torch.Tensor | None = None) -> torch.Tensor:
    """The kept pairs as a dense [B, F] matrix."""
    full = torch.zeros(batch, d_sae, device=DEVICE)
    full[kept.token, kept.latent] = kept.value if value is None else value
    return full


def is_selection(kept: Sparse, threshold: torch.Tensor, acts: torch.Tensor, n: int) -> None:
    """Asserts that `kept` is the top n of `acts` [B, F]."""
    flat = kept.token * acts.shape[1] + kept.latent
    expected = top(acts, n)
    assert flat.tolist() == expected.tolist()
    torch.testing.assert_close(kept.value, acts.reshape(-1)[expected], **CLOSE)
    assert kept.value.dtype == torch.float32
    assert float(threshold) == (float(kept.value.min()) if len(flat) else 0.0)


# --------------------------------------------------------------------------------------------------------------- encoder
@here
@pytest.mark.parametrize(("batch", "d_sae", "d"), [(1, 1, 1), (37, 73, 19), (16, 64, 48), (33, 31, 70)])
def test_encode_select_is_the_exact_top(batch: int, d_sae: int, d: int) -> None:
    x, W, b = problem(batch, d_sae, d)
    acts = dense(x, W, b)
    n = max(1, min(4 * batch, acts.numel() // 4))
    guess = float(acts.reshape(-1).topk(n).values[-1])
    is_selection(*kernels.encode_select(x, W, b, n, guess, tiles=small_tiles()), acts, n)


@here
@pytest.mark.parametrize("guess", [None, -3.0, 0.1, 1.0, 1e30, float("nan"), torch.tensor(0.0), torch.tensor(1.0)])
def test_the_guess_changes_nothing(guess: float | torch.Tensor | None, little_room: None) -> None:
    x, W, b = problem(20, 50, 24, seed=1)
    acts = dense(x, W, b)
    guess = guess.to(DEVICE) if isinstance(guess, torch.Tensor) else guess
    # Room for 240 of about 500 positive ones: a low guess overflows, a high one lets too few through.
    is_selection(*kernels.encode_select(x, W, b, 60, guess, tiles=small_tiles()), acts, 60)


@here
@pytest.mark.parametrize("n", [0, 1, 499, 500, 10_000])
def test_more_wanted_than_there_are(n: int, little_room: None) -> None:
    x, W, b = problem(10, 50, 24, seed=2)
    acts = dense(x, W, b)
    for guess in (None, 0.7):
        is_selection(*kernels.encode_select(x, W, b, n, guess, tiles=small_tiles()), acts, n)


@here
def test_nothing_is_positive() -> None:
    x, W, b = problem(20, 70, 16)
    kept, threshold = kernels.encode_select(x, W, b - 100, 50, 0.5, tiles=small_tiles())
    assert len(kept.token) == len(kept.latent) == len(kept.value) == 0
    assert float(threshold) == 0.0


@here
def test_zeros_are_never_kept() -> None:
    x, W, b = problem(20, 70, 16)
    x[3:] = 0
    b[:] = 0
    acts = dense(x, W, b)
    for guess in (None, -1.0):
        is_selection(*kernels.encode_select(x, W, b, 1400, guess, tiles=small_tiles()), acts, 1400)


@here
@pytest.mark.parametrize(("n", "guess"), [(1, 9.0), (1, 0.0), (30, None), (150, 1.0), (150, 3.0), (400, 2.0)])
def test_ties_go_to_the_lowest_indices(n: int, guess: float | None, little_room: None) -> None:
    """Small integers make exact ties by the hundred, more of one value than there is room for among them."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-1, 2, (30, 4), generator=generator).float().to(DEVICE)
    W = torch.randint(-1, 2, (40, 4), generator=generator).float().to(DEVICE)
    b = torch.zeros(40, device=DEVICE)
    is_selection(*kernels.encode_select(x, W, b, n, guess, room=1.0, tiles=small_tiles()), dense(x, W, b), n)


@here
@pytest.mark.parametrize(("n", "guess"), [(1, None), (1100, 2.0), (3000, 4.0), (3500, None)])
def test_everything_is_equal(n: int, guess: float | None, little_room: None) -> None:
    """More flat indices than there are bins: the room is found in two steps."""
    x, W, b = torch.ones(70, 3, device=DEVICE), torch.ones(50, 3, device=DEVICE), torch.zeros(50, device=DEVICE)
    is_selection(*kernels.encode_select(x, W, b, n, guess, room=1.0), dense(x, W, b), n)


@here
def test_a_bf16_product_is_summed_in_fp32() -> None:
    x, W, b = problem(33, 100, 40, seed=4)
    x, W = x.bfloat16(), W.bfloat16()
    acts = dense(x, W, b)
    is_selection(*kernels.encode_select(x, W, b, 150, 0.8, tiles=small_tiles()), acts, 150)
    # x is rounded as the weights are.
    is_selection(*kernels.encode_select(x.float(), W, b, 150, 0.8, tiles=small_tiles()), acts, 150)


@here
def test_the_tiles_that_are_used_by_default() -> None:
    x, W, b = problem(130, 300, 70, seed=5)
    is_selection(*kernels.encode_select(x, W, b, 500, 1.5), dense(x, W, b), 500)
    x, W = x.bfloat16(), W.bfloat16()
    is_selection(*kernels.encode_select(x, W, b, 500, 1.5), dense(x, W, b), 500)


@here
def test_rows_with_a_stride_and_matrices_that_are_views() -> None:
    x, W, b = problem(33, 65, 20, seed=6)
    wide = torch.randn(65, 30, device=DEVICE)
    wide[:, :20] = W
    for weights in (wide[:, :20], W.T.contiguous().T):
        is_selection(*kernels.encode_select(x, weights, b, 100, 0.8, tiles=small_tiles()), dense(x, W, b), 100)


@here
def test_it_repeats_to_the_bit() -> None:
    x, W, b = problem(40, 90, 24, seed=7)
    first, second = (kernels.encode_select(x, W, b, 300, guess, tiles=small_tiles())[0] for guess in (0.6, None))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@here
@pytest.mark.parametrize("low", [-1.0, 0.0, 0.8, 100.0])
def test_survivors(low: float) -> None:
    x, W, b = problem(37, 53, 19, seed=8)
    acts = dense(x, W, b).reshape(-1)
    for expected in (1, 10_000):
        flat, value = kernels.survivors(x, W, b, low, expected=expected, tiles=small_tiles())
        assert flat.tolist() == (acts > max(low, 0)).nonzero()[:, 0].tolist()
        torch.testing.assert_close(value, acts[flat], **CLOSE)


@here
@pytest.mark.parametrize(("low", "room", "fits"), [(1.0, 400, True), (1e9, 400, False), (0.0, 100, False)])
def test_joint_selection_of_a_process_with_others_that_have_nothing(low: float, room: int, fits: bool, little_room: None) -> None:
    x, W, b = problem(20, 50, 24, seed=1)
    acts = dense(x, W, b)
    summed = []
    found = kernels.encode_select_joint(
        x, W, b, 60, torch.tensor(low, device=DEVICE), sum_=summed.extend, places=lambda at: 3 * at + 2**33,
        here=lambda at: (at - 2**33) // 3, n_places=2**34, room=room,
    )  # fmt: skip
    assert (found is not None) == fits
    if found is not None:
        is_selection(*found, acts, 60)
    assert {len(counts) for counts in summed} == {2, 2048}, "counts are what goes to others"


@here
def test_shapes_that_do_not_fit_are_refused() -> None:
    x, W, b = problem(4, 6, 3)
    for wrong in ((x[:, :2], W, b), (x, W, b[:3]), (x[0], W, b), (x[:0], W, b)):
        with pytest.raises(ValueError, match="x \\["):
            kernels.encode_select(*wrong, 2, 0.1)


@here
@pytest.mark.parametrize(("n", "distinct"), [(1, 1), (1, 10**6), (77, 3), (2999, 10**6), (3000, 3)])
def test_radix_selection(n: int, distinct: int) -> None:
    from pvsae.saes.kernels.triton.select import Pool, largest

    generator = torch.Generator().manual_seed(n)
    n_flat = 2**33 + 5  # more than 32 bits, as a large batch and a wide dictionary have
    flat = (torch.randint(0, n_flat // 3000, (3000,), generator=generator) + torch.arange(3000) * (n_flat // 3000)).to(DEVICE)
    flat = flat[torch.randperm(3000, generator=generator).to(DEVICE)]
    value = torch.exp(20 * (torch.randint(0, distinct, (3000,), generator=generator) / distinct - 0.5)).to(DEVICE)
    # Places beyond the count hold what must not be taken.
    pool = Pool(
        torch.cat([value, value.new_full((99,), 1e30)]), torch.cat([flat, flat[:99]]), torch.tensor([3000], device=DEVICE)
    )
    found = largest(pool, n, n_flat)
    order = flat.sort()
    expected = order.indices[value[order.indices].sort(descending=True, stable=True).indices[:n]]
    assert found.flat.sort().values.tolist() == flat[expected].sort().values.tolist()
    assert sorted(found.value.tolist()) == sorted(value[expected].tolist())
    assert float(found.threshold) == float(value[expected].min())


# -------------------------------------------------------------------------------------------------------------- products
SHAPES = [(1, 3, 1, 1), (7, 20, 5, 9), (16, 64, 32, 100), (9, 21, 600, 60)]


@here
@pytest.mark.parametrize(("batch", "d_sae", "d", "n"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_and_value_grads(batch: int, d_sae: int, d: int, n: int, dtype: torch.dtype) -> None:
    kept = kept_pairs(batch, d_sae, n)
    W, G = torch.randn(d_sae, d, device=DEVICE).to(dtype), torch.randn(batch, d, device=DEVICE)
    out = kernels.decode(kept, W, batch)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, matrix_of(kept, batch, d_sae) @ W.float(), rtol=1e-5, atol=1e-4)
    grads = kernels.value_grads(kept, G, W)
    expected = (G.double() @ W.double().T)[kept.token, kept.latent].float()
    torch.testing.assert_close(grads, expected, rtol=1e-5, atol=1e-4)


@here
@pytest.mark.parametrize(("batch", "d_sae", "d", "n"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_grads(batch: int, d_sae: int, d: int, n: int, dtype: torch.dtype) -> None:
    kept = kept_pairs(batch, d_sae, n)
    G, X = torch.randn(batch, d, device=DEVICE), torch.randn(batch, d, device=DEVICE).to(dtype)
    c = torch.randn(n, device=DEVICE)
    at = by_latent(kept, d_sae)
    dec, enc, bias, along = kernels.both_weight_grads(at, kept.value, G, c, X)
    torch.testing.assert_close(dec, matrix_of(kept, batch, d_sae).T @ G, **CLOSE)
    torch.testing.assert_close(enc, matrix_of(kept, batch, d_sae, c).T @ X.float(), **CLOSE)
    torch.testing.assert_close(bias, matrix_of(kept, batch, d_sae, c).sum(0), **CLOSE)
    torch.testing.assert_close(along, matrix_of(kept, batch, d_sae, c * kept.value).sum(0), **CLOSE)
    assert torch.equal(kernels.weight_grads(at, kept.value, G), dec)
    assert torch.equal(kernels.weight_grads(at, c, X), enc)
    empty = torch.bincount(kept.latent, minlength=d_sae) == 0
    assert bool(empty.any())
    assert not bool(dec[empty].any() | enc[empty].any() | bias[empty].any())


@here
def test_products_of_nothing() -> None:
    kept = from_flat(torch.zeros(0, dtype=torch.int64, device=DEVICE), torch.zeros(0, device=DEVICE), 6)
    W, G = torch.ones(6, 5, device=DEVICE), torch.ones(4, 5, device=DEVICE)
    assert torch.equal(kernels.decode(kept, W, 4), torch.zeros(4, 5, device=DEVICE))
    assert kernels.value_grads(kept, G, W).shape == (0,)
    dec, enc, bias, _ = kernels.both_weight_grads(by_latent(kept, 6), kept.value, G, kept.value, G)
    assert not bool(dec.any() | enc.any())
    assert not bool(bias.any())


@here
def test_gradients_are_those_of_autograd() -> None:
    """A whole step's gradients, through selection, against a dense autoencoder with the same pairs kept."""
    batch, d_sae, d, n = 24, 80, 20, 96
    x, W_enc, b_enc = problem(batch, d_sae, d, seed=9)
    W_dec = torch.nn.functional.normalize(torch.randn(d_sae, d, device=DEVICE), dim=1)
    kept, _ = kernels.encode_select(x, W_enc, b_enc, n, 1.0, tiles=small_tiles())
    G = 2 / batch * (kernels.decode(kept, W_dec, batch) - x)
    c = kernels.value_grads(kept, G, W_dec)
    found = kernels.both_weight_grads(by_latent(kept, d_sae), kept.value, G, c, x)[:3]

    leaves = [t.clone().requires_grad_() for t in (W_dec, W_enc, b_enc)]
    mask = matrix_of(kept, batch, d_sae) > 0
    acts = torch.relu(x @ leaves[1].T + leaves[2]) * mask
    ((acts @ leaves[0] - x).pow(2).sum() / batch).backward()
    for ours, leaf in zip(found, leaves, strict=True):
        torch.testing.assert_close(ours, leaf.grad, **CLOSE)


def test_offsets_of_both_orders() -> None:
    kept = from_flat(torch.tensor([7, 1, 12, 3]), torch.tensor([1.0, 2.0, 3.0, 4.0]), 5)
    assert kept.token.tolist() == [0, 0, 1, 2]
    assert kept.latent.tolist() == [1, 3, 2, 2]
    assert kept.value.tolist() == [2.0, 4.0, 1.0, 3.0]
    assert by_token(kept, 4).tolist() == [0, 2, 3, 4, 4]
    at = by_latent(kept, 5)
    assert at.token.tolist() == [0, 1, 2, 0]
    assert at.order.tolist() == [0, 2, 3, 1]
    assert at.start.tolist() == [0, 0, 1, 3, 4, 4]
    assert offsets(kept.token[:0], 2).tolist() == [0, 0, 0]
    for ours, eagers in zip(at, eager.by_latent(kept, 5), strict=True):
        assert torch.equal(ours, eagers)


# ------------------------------------------------------------------------------------------------------------------ Adam
@here
@pytest.mark.parametrize("shape", [(1,), (37,), (5, 3), (3000,)])
def test_plain_adam_is_torchs(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    param = torch.randn(shape, generator=generator).to(DEVICE)
    theirs = param.clone().requires_grad_()
    optimiser = torch.optim.Adam([theirs], lr=1e-2, betas=(0.9, 0.99), eps=1e-8)
    mean, square = torch.zeros_like(param), torch.zeros_like(param)
    copy = torch.empty_like(param, dtype=torch.bfloat16)
    for step in range(1, 6):
        grad = torch.randn(shape, generator=generator).to(DEVICE)
        theirs.grad = 0.5 * grad
        optimiser.step()
        options = {"step": step, "lr": 1e-2, "betas": (0.9, 0.99), "copy": copy}
        kernels.adam_(param, grad, mean, square, scale=0.5 if step % 2 else torch.tensor(0.5, device=DEVICE), **options)
    torch.testing.assert_close(param, theirs.detach(), **CLOSE)
    torch.testing.assert_close(square, optimiser.state[theirs]["exp_avg_sq"], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(copy.float(), param, rtol=2**-7, atol=0)  # the interpreter truncates, a GPU rounds


@here
@pytest.mark.parametrize("shape", [(1, 2), (9, 5), (4, 33), (3, 600)])
def test_adam_on_unit_rows(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    param = torch.nn.functional.normalize(torch.randn(shape, generator=generator), dim=1).to(DEVICE)
    theirs = param.clone().requires_grad_()
    optimiser = torch.optim.Adam([theirs], lr=1e-2, eps=1e-8)
    mean, square = torch.zeros_like(param), torch.zeros_like(param)
    copy = torch.empty_like(param, dtype=torch.bfloat16)
    for step in range(1, 5):
        grad = torch.randn(shape, generator=generator).to(DEVICE)
        before = grad.clone()
        with torch.no_grad():
            theirs.grad = 3.0 * (grad - (grad * theirs).sum(1, keepdim=True) * theirs)
            optimiser.step()
            theirs /= theirs.norm(dim=1, keepdim=True)
        kernels.adam_(param, grad, mean, square, step=step, lr=1e-2, scale=3.0, unit_rows=True, copy=copy)
        assert torch.equal(grad, before)
        # Adam divides by the gradient's size: what rounding leaves of a projection moves parameters of tiny gradients alone.
        torch.testing.assert_close(param, theirs.detach(), rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(param.norm(dim=1), torch.ones(len(param), device=DEVICE), **CLOSE)
    torch.testing.assert_close(copy.float(), param, rtol=2**-7, atol=0)  # the interpreter truncates, a GPU rounds


@here
def test_a_zero_row_stays_finite() -> None:
    param, mean, square = torch.zeros(2, 4, device=DEVICE), torch.zeros(2, 4, device=DEVICE), torch.zeros(2, 4, device=DEVICE)
    grad = torch.zeros(2, 4, device=DEVICE)
    grad[1] = torch.arange(4.0) + 1
    kernels.adam_(param, grad, mean, square, step=1, lr=0.1, unit_rows=True)
    assert not bool(param[0].any())
    torch.testing.assert_close(param[1], torch.full((4,), -0.5, device=DEVICE), **CLOSE)


@here
def test_adam_refuses_what_it_would_get_wrong() -> None:
    param, other = torch.zeros(4, 3, device=DEVICE), torch.zeros(3, 4, device=DEVICE)
    with pytest.raises(ValueError, match="contiguous"):
        kernels.adam_(param, other.T, param.clone(), param.clone(), step=1, lr=0.1)
    with pytest.raises(ValueError, match="fp32"):
        kernels.adam_(param.bfloat16(), param, param.clone(), param.clone(), step=1, lr=0.1)
