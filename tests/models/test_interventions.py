"""The arithmetic of each intervention, and how it is written down and read back."""

import json
from dataclasses import dataclass, replace

import pytest
import torch

from pvsae.errors import UserError
from pvsae.models import (
    Ablate,
    Add,
    AddFeature,
    Cap,
    Clamp,
    Dictionary,
    Direction,
    Reconstruct,
    from_config,
    incremental,
    to_config,
)
from pvsae.models.hooks import check

CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class ReluDictionary:
    """A small dictionary: relu(x W_enc) with rows of W_dec that are not unit, so that mistakes of scale show.

    Residuals longer than `limit` are its outliers.
    """

    W_enc: torch.Tensor
    W_dec: torch.Tensor
    ref: str = "relu"
    limit: float = float("inf")

    def encode(self, x):
        return torch.relu(x @ self.W_enc)

    def outliers(self, x):
        return x.norm(dim=-1) > self.limit

    def __call__(self, x):
        return self.encode(x) @ self.W_dec


@pytest.fixture
def dictionary():
    g = torch.Generator().manual_seed(3)
    return ReluDictionary(torch.randn(6, 9, generator=g), 2 * torch.randn(9, 6, generator=g))


@pytest.fixture
def h():
    return torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def direction():
    return Direction(torch.tensor([3.0, 0.0, 4.0, 0.0, 0.0, 0.0]), "a/b.safetensors#7")


def apply(intervention, h):
    before = h.clone()
    out = intervention.edit(CPU, h.dtype)(h)
    assert torch.equal(h, before), "edits are out of place"
    assert out.dtype == h.dtype
    return out


def test_add(h, direction):
    torch.testing.assert_close(apply(Add(direction, 0, -2.0), h), h - 2 * direction.values)
    assert Add(direction, 0, 0.0).edit(CPU, torch.float32) is None


def test_ablate_leaves_nothing_along_the_direction(h, direction):
    out = apply(Ablate(direction, 0), h)
    torch.testing.assert_close(out @ direction.unit, torch.zeros(2, 5), atol=1e-6, rtol=0)
    other = torch.tensor([0.0, 1, 0, 0, 0, 0])
    torch.testing.assert_close(out @ other, h @ other)


@pytest.mark.parametrize(("side", "clamp"), [("above", {"max": 0.3}), ("below", {"min": 0.3})])
def test_cap_removes_only_what_is_beyond(h, direction, side, clamp):
    out = apply(Cap(direction, 0, 0.3, side), h)
    before = h @ direction.unit
    torch.testing.assert_close(out @ direction.unit, before.clamp(**clamp))
    within = before <= 0.3 if side == "above" else before >= 0.3
    assert within.any()
    assert not within.all()
    assert torch.equal(out[within], h[within]), "within the threshold, not a bit changes"


def test_features(h, dictionary):
    out = apply(AddFeature(dictionary, 4, 1.5, 0), h)
    torch.testing.assert_close(out, h + 1.5 * dictionary.W_dec[4])
    assert AddFeature(dictionary, 4, 0.0, 0).edit(CPU, torch.float32) is None
    out = apply(Clamp(dictionary, 4, 0.7, 0), h)
    torch.testing.assert_close(out, h + (0.7 - dictionary.encode(h)[..., 4:5]) * dictionary.W_dec[4])
    assert isinstance(dictionary, Dictionary)


def test_reconstruct(h, dictionary):
    torch.testing.assert_close(apply(Reconstruct(dictionary, 0), h), dictionary(h))


def test_outliers_keep_their_residual(h, dictionary):
    """Where a dictionary was not made for a token, its activations mean nothing and no edit is made of them."""
    limit = float(h.norm(dim=-1).median())
    picky = replace(dictionary, limit=limit)
    long = h.norm(dim=-1) > limit
    assert long.any()
    assert not long.all()
    for make in (lambda d: Reconstruct(d, 0), lambda d: Clamp(d, 4, 0.7, 0)):
        out = apply(make(picky), h)
        assert torch.equal(out[long], h[long])
        torch.testing.assert_close(out[~long], apply(make(dictionary), h)[~long])


def test_reconstruct_says_which_tokens_it_leaves_alone(dictionary):
    ids, index = torch.tensor([[5, 6, 7, 5], [9, 9, 5, 8]]), torch.tensor([[0, 1, 2, 3], [0, 0, 0, 1]])
    assert Reconstruct(dictionary, 0).applies(ids, index) is None
    assert Reconstruct(dictionary, 0, skip_ids=(5, 8)).applies(ids, index).int().tolist() == [[0, 1, 1, 0], [1, 1, 0, 0]]
    assert Reconstruct(dictionary, 0, 1).applies(ids, index).int().tolist() == [[0, 1, 1, 1], [0, 0, 0, 1]]
    assert Reconstruct(dictionary, 0, 2, (7,)).applies(ids, index).int().tolist() == [[0, 0, 0, 1], [0, 0, 0, 0]]


def test_bf16_residuals_stay_bf16(direction, dictionary):
    h = torch.randn(1, 3, 6).bfloat16()
    for item in (Add(direction, 0), Ablate(direction, 0), Cap(direction, 0, 0.0), AddFeature(dictionary, 1, 1.0, 0)):
        assert apply(item, h).dtype == torch.bfloat16


def test_directions_are_equal_by_content(direction):
    same = Direction(direction.values.double(), "elsewhere")
    other = Direction(direction.values + 1e-6, direction.ref)
    assert same == direction
    assert hash(same) == hash(direction)
    assert other != direction
    assert direction.norm == 5.0
    torch.testing.assert_close(direction.unit.norm(), torch.tensor(1.0))
    raw = torch.ones(4)
    kept = Direction(raw)
    raw += 1
    assert kept.values.tolist() == [1.0] * 4, "a direction does not change with the tensor that it was made of"
    with pytest.raises(UserError, match="shape"):
        Direction(torch.ones(2, 3))


def test_incremental_steps_sum_to_each_blocks_vector():
    vectors = torch.randn(5, 6)
    steps = incremental(vectors, coef=2.0, positions="response")
    assert [s.block for s in steps] == list(range(5))
    assert {(s.coef, s.positions) for s in steps} == {(2.0, "response")}
    torch.testing.assert_close(torch.stack([s.direction.values for s in steps]).cumsum(0), vectors)


def test_configs_survive_json(direction, dictionary):
    items = [
        Add(direction, 2, -1.5, "response"),
        Ablate(direction, 1),
        Cap(direction, 0, 0.25, "below", "prompt"),
        AddFeature(dictionary, 3, 2.0, 1),
        Clamp(dictionary, 3, 0.0, 1, "response"),
        Reconstruct(dictionary, 2, 8, (0, 2)),
    ]
    for item in items:
        config = json.loads(json.dumps(to_config(item)))
        assert config["block"] == item.block
        assert config["positions"] == item.positions
        assert from_config(config, {direction.ref: direction}.__getitem__, {"relu": dictionary}.__getitem__) == item
    written = to_config(items[0])
    assert written["type"] == "add"
    assert written["direction"]["sha256"] == direction.sha256
    assert written["direction"]["norm"] == 5.0


def test_configs_that_do_not_fit_are_refused(direction):
    config = to_config(Add(direction, 2))
    with pytest.raises(UserError, match="sha256"):
        from_config(config, lambda ref: Direction(direction.values * 2, ref))
    with pytest.raises(UserError, match="one of add, ablate"):
        from_config({**config, "type": "multiply"}, lambda ref: direction)
    with pytest.raises(UserError, match="colour"):
        from_config({**config, "colour": 1}, lambda ref: direction)
    with pytest.raises(UserError, match="resolve_dictionary"):
        from_config({"type": "clamp", "dictionary": {"ref": "x"}, "index": 0, "value": 1.0, "block": 0}, lambda ref: direction)


def test_what_cannot_be_applied_is_said(direction, dictionary):
    wrong = {
        "NaN": [Add(Direction(torch.tensor([float("nan")] * 6)), 0), Ablate(Direction(torch.tensor([float("inf")] * 6)), 0)],
        "zero": [Ablate(Direction(torch.zeros(6)), 0), Cap(Direction(torch.zeros(6)), 0, 1.0)],
        "coef is nan": [Add(direction, 0, float("nan"))],
        "sideways": [Cap(direction, 0, 1.0, "sideways")],
        "feature 9": [AddFeature(dictionary, 9, 1.0, 0)],
        "skip_first is -1": [Reconstruct(dictionary, 0, -1)],
        "block 3": [Add(direction, 3), Ablate(direction, -1), Add(direction, 3.0)],
        "positions 'prompts'": [Add(direction, 0, positions="prompts")],
        "d_model 4": [Add(Direction(torch.ones(4)), 0)],
    }
    for message, items in wrong.items():
        for item in items:
            with pytest.raises(UserError, match=message if item.block == 0 or item.block == 3 else "block"):
                check([item], [], n_blocks=3, d_model=6)
    check([Add(Direction(torch.zeros(6)), 0, 1.0), Add(direction, 2)], [], n_blocks=3, d_model=6)
