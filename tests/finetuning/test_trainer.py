"""The training loop: the loss by hand, whole trainings beside a plain loop, treatments that leave nothing, exact resumption."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pvsae.errors import UserError
from pvsae.finetuning import checkpoints, trainer
from pvsae.finetuning.lora import LoraSettings, attached
from pvsae.finetuning.rows import order
from pvsae.finetuning.trainer import METRICS, TrainSettings, train
from pvsae.finetuning.treatments import Schedule, ShiftPenalty, Treatment, ablations
from pvsae.models import Add, Residual
from pvsae.models.fingerprint import fingerprint
from tests.finetuning.small import LORA, close, rows_of, same, settings, trained
from tests.models.rows import direction


@pytest.fixture
def model(tiny_models):
    return tiny_models("qwen2")


def steering(model: Any, coef: float = 3.0, **options: Any) -> Treatment:
    return Treatment((Add(direction(model, norm=1.0), 1, coef),), **options)


def regularising(model: Any, weight: float = 0.3) -> Treatment:
    return Treatment(penalty=ShiftPenalty(((1, (direction(model, 1),)), (2, (direction(model, 2), direction(model, 3)))), weight))


@pytest.fixture(scope="module")
def plain(tiny_models, tmp_path_factory):
    """Adapter, metrics and folder of a training without treatment."""
    folder = tmp_path_factory.mktemp("plain")
    return *trained(tiny_models("qwen2"), folder), folder


@pytest.fixture(scope="module")
def treated(tiny_models, tmp_path_factory):
    """Adapter and metrics of a training that is steered and regularised at once."""
    model = tiny_models("qwen2")
    treatment = Treatment(steering(model).edits, penalty=regularising(model).penalty)
    return trained(model, tmp_path_factory.mktemp("treated"), treatment)


# ------------------------------------------------------------------------------------------------------- against other loops
def loss_by_hand(hf: Any, row: Any) -> torch.Tensor:
    """-log p of every token of a row that an assistant wrote or ended its turn with, from the model's own logits."""
    ids = torch.tensor([row.rendered.ids])
    logp = hf(input_ids=ids).logits.log_softmax(-1)[0]
    at = [i for start, end in row.learnt for i in range(start, end)]
    return -sum(logp[i - 1, ids[0, i]] for i in at)


def test_the_first_loss_is_that_of_the_untouched_model_on_the_answers_alone(model, plain) -> None:
    _, lines, _ = plain
    rows = rows_of(model)
    first = [rows[i] for i in order(len(rows), 3, seed=5)]
    with torch.no_grad():
        total = sum(float(loss_by_hand(model.hf, row)) for row in first)
    n = sum(len(range(start, end)) for row in first for start, end in row.learnt)
    assert lines[0]["loss"] == pytest.approx(total / n, rel=1e-5)
    assert lines[0]["learnt"] == n
    assert lines[0]["tokens"] == sum(len(row.rendered.ids) for row in first)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]


@pytest.mark.parametrize("what", [pytest.param("nothing", marks=pytest.mark.slow), "steering", "penalty"])
def test_a_training_is_what_a_plain_loop_gives(model, tmp_path, what) -> None:
    """The same three steps in plain torch and peft: no Trainer, no padding, no hooks of ours, a copied base model."""
    treatment = {"nothing": Treatment(), "steering": steering(model), "penalty": regularising(model)}[what]
    ours, lines = trained(model, tmp_path, treatment, max_steps=3, scheduler="constant", warmup_steps=0)
    rows = rows_of(model)
    base = copy.deepcopy(model.hf)
    with attached(model, LORA, 5) as peft:
        free = [p for p in peft.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(free, lr=1e-2, weight_decay=0.01)
        v = direction(model, norm=1.0).values
        for step in range(3):
            some = [rows[i] for i in order(len(rows), 9, seed=5)[3 * step : 3 * step + 3]]
            hook = model.blocks[1].register_forward_hook(lambda *a: a[2] + 3.0 * v) if what == "steering" else None
            loss = sum(loss_by_hand(model.hf, row) for row in some) / sum(row.n_learnt for row in some)
            if hook is not None:
                hook.remove()
            penalty = torch.zeros(())
            if what == "penalty":
                squares = []
                for row in some:
                    ids = torch.tensor([row.rendered.ids])
                    now, before = (m(input_ids=ids, output_hidden_states=True).hidden_states for m in (model.hf, base))
                    for block, seed in ((1, 1), (2, 2), (2, 3)):  # hidden_states[b + 1] is the output of block b
                        squares.append(
                            (((now[block + 1] - before[block + 1].detach())[0] @ direction(model, seed).unit) ** 2).sum()
                        )
                penalty = 0.3 * sum(squares) / 3 / sum(len(row.rendered.ids) for row in some)
            (loss + penalty).backward()
            torch.nn.utils.clip_grad_norm_(free, 1.0)
            optimiser.step()
            optimiser.zero_grad()
            assert lines[step]["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
            assert lines[step]["penalty"] == pytest.approx(float(penalty.detach()), rel=1e-3, abs=1e-9)
        reference = {n.replace(".default", ""): p.detach().clone() for n, p in peft.named_parameters() if p.requires_grad}
    assert close(ours, reference, 1e-4)
    assert (lines[2]["penalty"] > 1e-4) == (what == "penalty")


def test_a_step_does_not_depend_on_how_its_rows_are_spread_over_forward_passes(model, tmp_path) -> None:
    whole, a = trained(model, tmp_path / "1", regularising(model), batch=6, max_steps=3)
    parts, b = trained(model, tmp_path / "2", regularising(model), batch=2, accumulation=3, max_steps=3)
    assert close(whole, parts)
    for one, other in zip(a, b, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-6)


def test_packed_rows_give_the_same_training(model, treated, tmp_path) -> None:
    both = Treatment(steering(model).edits, penalty=regularising(model).penalty)
    adapter, lines = trained(model, tmp_path, both, packing=True)
    assert close(adapter, treated[0])
    for one, other in zip(lines, treated[1], strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("arch", ["qwen2", "qwen3", "llama", "stories260k"])
def test_packed_rows_do_not_see_each_other(tiny_models, arch) -> None:
    model = tiny_models(arch)
    rows = [replace(row, learnt=((0, len(row.rendered.ids)),)) for row in rows_of(model, 7, turns="last")]
    batch, labels = trainer.collate(rows, model.pad_id, 0)
    assert len(batch.input_ids) < len(rows)
    assert int((labels != trainer.UNLEARNT).sum()) == sum(len(row.rendered.ids) - 1 for row in rows)
    edits = [Add(direction(model, norm=1.0), 1, 3.0, positions) for positions in ("prompt", "response")]
    with torch.no_grad(), model.hooks(edits):
        apart = [float(trainer.answer_loss(model, *trainer.collate([row], model.pad_id))) for row in rows]
        together = float(trainer.answer_loss(model, batch, labels))
    assert together == pytest.approx(sum(apart), rel=1e-5)


def test_a_model_that_cannot_keep_packed_rows_apart_is_refused(model, tmp_path) -> None:
    def blind(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "position_ids": None}

    handle = model.decoder.register_forward_pre_hook(blind, with_kwargs=True)
    try:
        with pytest.raises(UserError, match="see each other"):
            trained(model, tmp_path, packing=True)
    finally:
        handle.remove()


# ---------------------------------------------------------------------------------------------------------------- treatments
def test_strength_0_is_the_same_to_the_bit_as_no_treatment(model, plain, tmp_path) -> None:
    nothing = ShiftPenalty(((1, (direction(model),)),), 0.0)
    off = Treatment(steering(model, 0.0).edits, Schedule("ramp"), nothing)
    adapter, lines = trained(model, tmp_path, off)
    assert same(plain[0], adapter)
    assert [line["loss"] for line in lines] == [line["loss"] for line in plain[1]]


def test_treatments_change_what_is_learnt_but_not_which_rows_are_seen(model, plain, tmp_path) -> None:
    others = {
        "ramp": steering(model, schedule=Schedule("ramp")),
        "ablate": Treatment(ablations({2: [direction(model, 0), direction(model, 1)]})),
        "prompt positions": Treatment((Add(direction(model), 1, 3.0, "prompt"),)),
    }
    seen = [plain[0]]
    for name, treatment in others.items():
        adapter, lines = trained(model, tmp_path / name, treatment)
        assert not any(close(adapter, other) for other in seen), name
        seen.append(adapter)
        for column in ("rows", "tokens", "learnt", "learning_rate"):
            assert [line[column] for line in lines] == [line[column] for line in plain[1]], name
        assert [line["strength"] for line in lines] == pytest.approx([0, 1 / 3, 2 / 3, 1] if name == "ramp" else [1] * 4)
        moved = {name: float(value.abs().max()) for name, value in adapter.items() if "layers.0" in name and "lora_B" in name}
        assert len(moved) == 7
        assert all(value > 1e-4 for value in moved.values()), moved  # the gradient goes through the edit to blocks below it


def test_ablated_directions_get_no_gradient_from_above(model) -> None:
    """What the head says of CAFT: with the span taken out at a block, no loss above it depends on what lies along it below."""
    u = direction(model)
    row = rows_of(model, 1)[0]
    shift = torch.zeros((), requires_grad=True)
    handle = model.blocks[2].register_forward_hook(lambda *a: a[2] + shift * u.unit)  # runs before the edit at the same block
    try:
        with model.hooks(ablations({2: [u, direction(model, 1)]})):
            loss_by_hand(model.hf, row).backward()
        assert shift.grad is not None
        assert abs(float(shift.grad)) < 1e-4
        shift.grad = None
        loss_by_hand(model.hf, row).backward()
        assert abs(float(shift.grad)) > 1e-2
    finally:
        handle.remove()
        model.hf.zero_grad()


def test_gradient_checkpointing_changes_nothing(model, treated, tmp_path) -> None:
    adapter, lines = trained(
        model, tmp_path, Treatment(steering(model).edits, penalty=regularising(model).penalty), gradient_checkpointing=True
    )
    assert close(adapter, treated[0])
    assert [line["penalty"] for line in lines] == pytest.approx([line["penalty"] for line in treated[1]], rel=1e-4)


def test_a_model_in_bfloat16_is_trained_with_its_adapter_in_float32(treated, tiny_folders, tmp_path) -> None:
    from pvsae.models import load

    low = load(tiny_folders("qwen2"), device="cpu", dtype="bfloat16")
    adapter, lines = trained(low, tmp_path, Treatment(steering(low).edits, penalty=regularising(low).penalty))
    assert {value.dtype for value in adapter.values()} == {torch.float32}
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in treated[1]], rel=0.05)
    assert lines[-1]["penalty"] == pytest.approx(treated[1][-1]["penalty"], rel=0.2)


# --------------------------------------------------------------------------------------------------------- nothing is left
def state_of(model: Any) -> list[Any]:
    """All that a training could leave behind."""
    parameters = [(name, id(p), p.requires_grad, p.grad is None) for name, p in model.hf.named_parameters()]
    hooks = [(name, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.hf.named_modules()]
    numbers = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]
    return [
        parameters,
        hooks,
        [id(m) for m in model.hf.modules()],
        model.hf.training,
        model.hf.is_gradient_checkpointing,
        fingerprint(model),
        numbers,
    ]


def test_the_model_is_what_it_was_afterwards_and_after_an_error(model, tmp_path, monkeypatch) -> None:
    row = rows_of(model, 1)[0].rendered
    read = Residual(3)
    before, there = state_of(model), model.capture([row], [read])[read.key][0]
    trained(model, tmp_path / "fine", steering(model))
    assert state_of(model) == before

    def broken(*_: Any) -> Any:
        raise RuntimeError("in the middle of a step")

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "answer_loss", broken)
        with pytest.raises(RuntimeError, match="in the middle"):
            trained(model, tmp_path / "broken", steering(model), gradient_checkpointing=True)
    assert state_of(model) == before
    assert torch.equal(model.capture([row], [read])[read.key][0], there)


def test_a_model_with_an_adapter_or_without_such_layers_is_refused(model, tmp_path) -> None:
    with attached(model, LORA, 0), pytest.raises(UserError, match="an adapter already"):
        trained(model, tmp_path)
    for other in ("c_attn", "input_layernorm"):
        with pytest.raises(UserError, match=f"no linear layers called {other}"):
            trained(model, tmp_path, lora=LoraSettings(targets=("q_proj", other)))
    before = state_of(model)
    with pytest.raises(UserError, match="block 9"):
        trained(model, tmp_path, Treatment((Add(direction(model), 9),)))
    assert state_of(model) == before


def test_wrong_settings_are_refused() -> None:
    for wrong in ({"learning_rate": 0}, {"epochs": -1}, {"batch": 0}, {"max_steps": 0}, {"scheduler": "step"}, {"save_every": 0}):
        with pytest.raises(UserError):
            TrainSettings(**wrong)
    for wrong in ({"rank": 0}, {"alpha": 0}, {"dropout": 1.0}, {"targets": ()}):
        with pytest.raises(UserError):
            LoraSettings(**wrong)
    assert TrainSettings().steps(100) == 7
    assert TrainSettings(epochs=2.5).seen(100) == 250
    assert TrainSettings(max_steps=3).seen(100) == 48


def test_a_loss_that_is_no_number_ends_the_training_with_advice(model, tmp_path) -> None:
    with pytest.raises(UserError, match="no longer a number at step"):
        trained(model, tmp_path, learning_rate=1e30, warmup_steps=0)


# -------------------------------------------------------------------------------------------------------------- resumption
OPTIONS = {"max_steps": 6, "n": 8, "lora": LoraSettings(rank=4, alpha=8, dropout=0.2)}  # more than two passes over the rows


def scheduled(model: Any) -> Treatment:
    return Treatment(steering(model).edits, Schedule("decay"), regularising(model).penalty)


@pytest.fixture(scope="module")
def whole(tiny_models, tmp_path_factory):
    """Adapter and metrics of a training that nothing interrupted."""
    model = tiny_models("qwen2")
    return trained(model, tmp_path_factory.mktemp("whole"), scheduled(model), **OPTIONS)


@pytest.mark.parametrize("at", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_killed_at_a_step_it_ends_with_the_same_bits(model, whole, tmp_path, monkeypatch, at) -> None:
    log = trainer._AdapterTrainer.log

    def killed(self: Any, logs: Any, start_time: Any = None) -> None:
        log(self, logs, start_time)
        if self.state.global_step == at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer._AdapterTrainer, "log", killed)
        with pytest.raises(KeyboardInterrupt):
            trained(model, tmp_path, scheduled(model), **OPTIONS)
    found = checkpoints.newest(tmp_path / "parts")
    assert (None if found is None else found.name) == {1: None, 5: "checkpoint-4"}[at]
    adapter, lines = trained(model, tmp_path, scheduled(model), **OPTIONS)
    assert same(whole[0], adapter)
    assert lines == whole[1]
    assert [json.loads(line) for line in (tmp_path / "parts" / METRICS).read_text().splitlines()] == lines


def test_a_checkpoint_counts_when_it_is_whole(model, whole, tmp_path, monkeypatch) -> None:
    parts, mark = tmp_path / "parts", checkpoints.mark_complete

    def cut_short(checkpoint: Path) -> None:
        if checkpoint.name == "checkpoint-4":
            (checkpoint / "optimizer.pt").write_bytes(b"half of")
            raise KeyboardInterrupt
        mark(checkpoint)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "mark_complete", cut_short)
        with pytest.raises(KeyboardInterrupt):
            trained(model, tmp_path, scheduled(model), **OPTIONS)
    assert sorted(p.name for p in parts.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    adapter, _ = trained(model, tmp_path, scheduled(model), **OPTIONS)
    assert same(whole[0], adapter)
    assert [p.name for p in parts.glob("checkpoint-*")] == ["checkpoint-6"]
    (parts / "checkpoint-6" / "scheduler.pt").unlink()
    assert checkpoints.newest(parts) is None
    assert not (parts / "checkpoint-6").exists()


def test_no_row_no_training(model, tmp_path) -> None:
    with pytest.raises(UserError, match="no row"):
        train(model, [], Treatment(), settings(), LORA, tmp_path, lambda _: None)


def test_the_adapter_opens_in_peft_and_here_alike(model, plain, tiny_folders) -> None:
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForCausalLM

    from pvsae.models import load

    folder = plain[2] / "adapter"
    row = rows_of(model, 1)[0].rendered
    ids = torch.tensor([row.ids])
    ours = load(tiny_folders("qwen2"), adapter=folder, device="cpu")
    with torch.no_grad():
        there = ours.hf(input_ids=ids).logits
        wrapped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folders("qwen2")), str(folder))
        assert torch.equal(wrapped(input_ids=ids).logits, there)
        auto = AutoPeftModelForCausalLM.from_pretrained(str(folder))  # finds the base by what the adapter says of it
        assert torch.equal(auto(input_ids=ids).logits, there)
        assert not torch.allclose(model.hf(input_ids=ids).logits, there, atol=1e-2)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["use_rslora"]
    assert config["base_model_name_or_path"] == str(tiny_folders("qwen2"))
    assert len(load_file(folder / "adapter_model.safetensors")) == 4 * 7 * 2
