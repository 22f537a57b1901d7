from __future__ import annotations

import pytest
import torch

from pvsae.errors import UserError
from pvsae.models.batch import TokenBatch
from pvsae.screening.reading import captures_of, read

from .chats import chats, plainly, probes


@pytest.mark.parametrize("batch_tokens", [1, 60, 4096])
def test_readings_are_those_of_one_row_a_pass_with_all_hidden_states(tiny_model, batch_tokens) -> None:
    some = probes(tiny_model.d_model)
    rows = [tiny_model.chat.conversation(c["messages"]) for c in chats(6)]
    found = read(tiny_model, rows, some, batch_tokens)
    for i, row in enumerate(rows):
        for j, probe in enumerate(some):
            wanted = torch.tensor(plainly(tiny_model, row, probe), dtype=torch.float64)
            got = torch.stack([found.proj[i, j], found.last[i, j], found.cos[i, j]]).double()
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_no_hidden_state_leaves_the_hook_and_no_block_above_is_run(tiny_models) -> None:
    model = tiny_models("qwen2")
    some = probes(model.d_model)
    captures = captures_of(some)
    assert [c.block for c in captures] == [1, 2]
    rows = [model.chat.conversation(c["messages"]) for c in chats(3)]
    batch = TokenBatch.build(rows)
    ran = []
    handles = [block.register_forward_hook(lambda *_, b=b: ran.append(b)) for b, block in enumerate(model.blocks)]
    try:
        with torch.no_grad(), model.hooks((), list(captures)) as session:
            model.forward(batch, logits=None)
            taken = session.take()
    finally:
        for handle in handles:
            handle.remove()
    assert {tuple(v.shape) for (v,) in taken.values()} == {(3, 5)}  # two projections, twice, and a length
    # a result that were a view would keep the whole residual alive
    assert all(v.untyped_storage().nbytes() == 3 * 5 * 4 for (v,) in taken.values())
    assert 3 not in ran


def test_a_direction_that_does_not_fit_is_refused(tiny_models) -> None:
    model = tiny_models("qwen2")
    rows = [model.chat.conversation(c["messages"]) for c in chats(1)]
    with pytest.raises(UserError, match="d_model"):
        read(model, rows, probes(model.d_model + 1), 100)
    with pytest.raises(UserError, match="block"):
        read(model, rows, probes(model.d_model, blocks=(9,)), 100)


def test_columns_have_own_names_or_those_of_the_released_code() -> None:
    probe = probes(4)[1]
    assert probe.column("dp") == "evil_dp_block2"
    assert probe.column("cos_sim", "Qwen2.5-7B-Instruct") == "Qwen2.5-7B-Instruct_evil_response_avg_diff_cos_sim_layer3"
