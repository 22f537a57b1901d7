"""Extraction: the numbers of the plain reference, exactly the right pairs, and clear ends where there is nothing to extract."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from pvsae.errors import UserError
from pvsae.vectors.extraction import REASONS, extract, filter_pairs, render_rows
from pvsae.vectors.formats import write_official
from pvsae.vectors.persona import STATISTICS, PersonaVectors
from pvsae.vectors.reference import reference_vectors
from pvsae.vectors.rollouts import Rollouts
from tests.conftest import make_tokenizer
from tests.vectors.vector_rows import judged

TINY = {
    "vocab_size": 320, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def more_models(tmp_path_factory):
    """Two further architectures: Gemma 2 scales its embeddings and norms after each sublayer, both attend in sliding windows."""
    from transformers import AutoModelForCausalLM, Gemma2Config, MistralConfig

    from pvsae.models import load

    configs = {
        "gemma2": Gemma2Config(**TINY, head_dim=12, sliding_window=16, query_pre_attn_scalar=12),
        "mistral": MistralConfig(**TINY, head_dim=12, sliding_window=16),
    }
    made = {}
    for name, config in configs.items():
        folder = tmp_path_factory.mktemp("vectors") / name
        torch.manual_seed(3)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        made[name] = load(folder, device="cpu")
    return made


@pytest.fixture(params=["qwen2", "qwen3", "llama", "gemma2", "mistral", "stories260k"])
def any_model(request, tiny_models, more_models):
    return more_models[request.param] if request.param in more_models else tiny_models(request.param)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Largest relative error of a row: |ours - theirs| / |theirs|."""
    return ((ours.double() - theirs.double()).norm(dim=1) / theirs.double().norm(dim=1)).max()


def test_vectors_equal_the_plain_reference(any_model):
    pos, neg = judged(any_model, "pos"), judged(any_model, "neg")
    vectors = extract(any_model, pos, neg, batch_tokens=600)
    rows = range(len(pos))
    reference = reference_vectors(any_model, render_rows(any_model, pos, rows), render_rows(any_model, neg, rows))
    for statistic in STATISTICS:
        assert vectors.of(statistic).shape == (any_model.n_blocks, any_model.d_model)
        assert relative(vectors.of(statistic), reference.blocks(statistic)) < 1e-5, statistic
        # Every block but the last is a row of Hugging Face's own output; the last of those stands after the final norm.
        assert relative(vectors.of(statistic)[:-1], reference.hidden[statistic][1:-1]) < 1e-5
        assert relative(vectors.of(statistic)[-1:], reference.hidden[statistic][-1:]) > 1e-2


def test_batches_do_not_matter_and_every_row_counts_once(tiny_models):
    model = tiny_models("qwen2")
    pos, neg = judged(model, "pos"), judged(model, "neg")
    one, many = (extract(model, pos, neg, batch_tokens=n) for n in (1, 100000))
    for statistic in STATISTICS:
        assert relative(one.of(statistic), many.of(statistic)) < 1e-5
    counts = many.meta["counts"]
    assert (counts["pairs"], counts["kept"], counts["questions"]) == (16, 16, 4)


@pytest.mark.parametrize("arch", ["qwen2", "qwen3", "llama", "stories260k"])
def test_sharing_prompts_changes_nothing_but_the_work(tiny_models, monkeypatch, arch):
    model = tiny_models(arch)
    pos, neg = (judged(model, p, n_samples=5) for p in ("pos", "neg"))
    tokens = {True: 0, False: 0}
    sharing = True
    real = type(model).forward

    def counting(self, batch, **options):
        tokens[sharing] += int(batch.positions.all.sum())
        return real(self, batch, **options)

    monkeypatch.setattr(type(model), "forward", counting)
    shared_prompts = extract(model, pos, neg, batch_tokens=300)
    sharing = False
    whole = extract(model, pos, neg, share_prompts=False)
    for statistic in STATISTICS:
        assert relative(shared_prompts.of(statistic), whole.of(statistic)) < 1e-5, statistic
    lengths = [(len(p), len(a)) for r in (pos, neg) for p, a in zip(r.table["prompt_ids"], r.table["answer_ids"], strict=True)]
    assert tokens[False] == sum(p + a for p, a in lengths)
    assert tokens[True] == sum(p for p, _ in lengths) // 5 + sum(a for _, a in lengths)  # each prompt has five samples


def test_sliding_windows_are_not_cut_into_prompt_and_answer(more_models, monkeypatch):
    from pvsae.vectors import sharing

    def fail(*_):
        raise AssertionError("a cached prompt was asked for")

    monkeypatch.setattr(sharing, "_read_prompts", fail)
    model = more_models["gemma2"]
    pos, neg = (judged(model, p, n_samples=5) for p in ("pos", "neg"))
    assert extract(model, pos, neg).meta["counts"]["kept"] == 40


def test_only_kept_rows_enter(tiny_models):
    model = tiny_models("llama")
    pos, neg = judged(model, "pos"), judged(model, "neg")
    keep = [1, 4, 5, 10]
    pos.table["evil"] = [90.0 if i in keep else 20.0 for i in range(len(pos))]
    vectors = extract(model, pos, neg)
    some = reference_vectors(model, render_rows(model, pos, keep), render_rows(model, neg, keep))
    assert relative(vectors.of(), some.blocks("response_avg_diff")) < 1e-5
    assert vectors.meta["counts"]["kept"] == 4
    assert vectors.meta["counts"]["dropped"]["pos_trait_low"] == 12


def test_diagnostics_match_a_direct_computation(tiny_models):
    model = tiny_models("qwen2")
    pos, neg = judged(model, "pos", n_samples=5), judged(model, "neg", n_samples=5)
    vectors = extract(model, pos, neg)
    numbers = vectors.diagnostics["prompt_last_diff"]
    block = 2
    sides = []
    for rollouts in (pos, neg):
        rows = render_rows(model, rollouts, range(len(rollouts)))
        with torch.no_grad():
            states = [
                model.hf(torch.tensor([r.ids]), output_hidden_states=True).hidden_states[block + 1][0, r.last_prompt]
                for r in rows
            ]
        sides.append(torch.stack(states).double())
    unit = vectors.of("prompt_last_diff")[block].double()
    unit = unit / unit.norm()
    assert numbers["pos_projection"][block] == pytest.approx(float(sides[0].mean(0) @ unit), rel=1e-4)
    assert numbers["neg_projection"][block] == pytest.approx(float(sides[1].mean(0) @ unit), rel=1e-4)
    gap = numbers["pos_projection"][block] - numbers["neg_projection"][block]
    assert numbers["norm"][block] == pytest.approx(gap, rel=1e-5)
    assert numbers["row_norm"][block] == pytest.approx(float(torch.cat(sides).norm(dim=1).mean()), rel=1e-4)
    assert numbers["norm_low"][block] <= numbers["norm"][block] * 1.01
    assert numbers["norm_high"][block] > numbers["norm_low"][block]
    for name in ("half_split_cosine", "half_split_cosine_questions", "cosine_low", "cosine_low_questions"):
        assert all(-1 <= v <= 1 for v in numbers[name]), name
    json.dumps(vectors.meta, allow_nan=False)  # the whole story is plain JSON


def test_the_file_keeps_everything(tiny_models, tmp_path):
    model = tiny_models("qwen2")
    vectors = extract(model, judged(model, "pos"), judged(model, "neg"))
    loaded = PersonaVectors.load(vectors.save(tmp_path / "evil.safetensors")).check_model(model)
    assert loaded.meta["counts"] == vectors.meta["counts"]
    assert loaded.diagnostics == vectors.diagnostics
    assert loaded.meta["model"]["d_model"] == model.d_model
    assert loaded.meta["model"]["model_type"] == "qwen2"
    assert set(loaded.meta["versions"]) >= {"pvsae", "torch", "transformers", "python"}


def test_official_ends_fill_the_two_rows_that_are_no_block(tiny_models, tmp_path, recwarn):
    model = tiny_models("qwen3")
    pos, neg = judged(model, "pos"), judged(model, "neg")
    paths = write_official(extract(model, pos, neg, official_ends=True), tmp_path)
    assert not [w for w in recwarn if "no block's residual" in str(w.message)]
    rows = range(len(pos))
    reference = reference_vectors(model, render_rows(model, pos, rows), render_rows(model, neg, rows))
    for path, statistic in zip(paths, STATISTICS, strict=True):
        written = torch.load(path, weights_only=True)
        hidden = reference.hidden[statistic]
        assert written.shape == (model.n_blocks + 1, model.d_model)
        error = (written.double() - hidden).norm(dim=1) / hidden.norm(dim=1).clamp_min(1e-9)
        # The last prompt token is the same token in every row, so its embedding cancels to nothing.
        assert error[1:].max() < 1e-5
        assert (written[0].double() - hidden[0]).abs().max() < 1e-6


def test_rows_of_another_tokenizer_are_rendered_from_their_messages(tiny_models):
    model = tiny_models("qwen2")
    pos, neg = judged(model, "pos"), judged(model, "neg")
    ours = extract(model, pos, neg)
    foreign = [
        replace(r, meta={**r.meta, "tokenizer": "another"}, table=r.table.assign(prompt_ids=[(5, 6)] * len(r)))
        for r in (pos, neg)
    ]
    assert relative(extract(model, *foreign).of(), ours.of()) < 1e-5
    for r in foreign:
        r.table["prompt_ids"], r.table["answer_ids"] = None, None
    assert relative(extract(model, *foreign).of(), ours.of()) < 1e-5


def test_official_tables_give_the_same_vectors(tiny_models, tmp_path):
    model = tiny_models("qwen2")
    pos, neg = judged(model, "pos"), judged(model, "neg")
    tables = [Rollouts.from_official_csv(r.to_official_csv(tmp_path / f"{i}.csv")) for i, r in enumerate((pos, neg))]
    assert relative(extract(model, *tables).of(), extract(model, pos, neg).of()) < 1e-5


# ------------------------------------------------------------------------------------------------------------ the filter
def scores(pos_trait, neg_trait, pos_coherence=95.0, neg_coherence=95.0):
    import pandas as pd

    def table(trait, coherence):
        n = len(pos_trait)
        frame = pd.DataFrame({"question": [f"q{i}" for i in range(n)], "answer": ["a"] * n, "evil": trait})
        frame["coherence"] = coherence
        return Rollouts(frame, {"trait": "evil"})

    return table(pos_trait, pos_coherence), table(neg_trait, neg_coherence)


def test_the_filter_at_its_edges():
    nan = float("nan")
    pos, neg = scores(
        [50.0, 49.9, 80.0, 80.0, 80.0, 80.0, nan, 80.0, 20.0],
        [49.9, 10.0, 50.0, 10.0, 10.0, 10.0, 10.0, nan, 90.0],
        [50.0, 90.0, 90.0, 49.9, 90.0, nan, 90.0, 90.0, 10.0],
        [50.0, 90.0, 90.0, 90.0, 49.9, 90.0, 90.0, 90.0, 10.0],
    )
    pairs = filter_pairs(pos, neg)
    assert pairs.kept == (0,)
    assert pairs.dropped == {
        "missing_score": 3, "pos_trait_low": 2, "neg_trait_high": 1, "pos_incoherent": 1, "neg_incoherent": 1, "empty_answer": 0,
    }  # fmt: skip
    assert sum(pairs.dropped.values()) + len(pairs.kept) == pairs.n_pairs == 9
    assert set(pairs.dropped) == set(REASONS)


def test_the_threshold_is_one_of_the_trait_only():
    pos, neg = scores([65.0, 75.0, 75.0], [10.0, 10.0, 35.0], 55.0, 55.0)
    assert filter_pairs(pos, neg).kept == (0, 1, 2)
    assert filter_pairs(pos, neg, threshold=70).kept == (1,)
    assert filter_pairs(pos, neg, coherence_floor=60).kept == ()


def test_the_filter_is_the_same_as_a_plain_mask():
    rng = np.random.default_rng(0)
    columns = [np.where(rng.random(500) < 0.1, np.nan, rng.uniform(0, 100, 500)) for _ in range(4)]
    pos, neg = scores(columns[0], columns[1], columns[2], columns[3])
    mask = (columns[0] >= 50) & (columns[1] < 50) & (columns[2] >= 50) & (columns[3] >= 50)
    assert filter_pairs(pos, neg).kept == tuple(np.flatnonzero(mask))


def test_tables_that_do_not_pair_are_refused():
    pos, neg = scores([80.0, 80.0], [10.0, 10.0])
    with pytest.raises(UserError, match="2 pos rows and 1 neg rows"):
        filter_pairs(pos, Rollouts(neg.table.iloc[:1], neg.meta))
    with pytest.raises(UserError, match="2 pairs ask different questions"):
        filter_pairs(pos, Rollouts(neg.table.iloc[::-1].reset_index(drop=True), neg.meta))
    with pytest.raises(UserError, match="judge them first"):
        filter_pairs(pos, Rollouts(neg.table.drop(columns="coherence"), neg.meta))


# ------------------------------------------------------------------------------------------------------------- bad input
def test_an_empty_filter_result_says_what_was_lost_and_what_to_do(tiny_models):
    model = tiny_models("qwen2")
    pos, neg = judged(model, "pos"), judged(model, "neg")
    pos.table["evil"] = 30.0
    with pytest.raises(UserError, match=r"16 pairs, 0 kept, dropped: 16 pos_trait_low") as error:
        extract(model, pos, neg)
    assert "stronger" in error.value.fix
    pos.table["evil"] = float("nan")
    with pytest.raises(UserError, match="16 missing_score") as error:
        extract(model, pos, neg)
    assert "judge" in error.value.fix


def test_empty_answers_are_dropped_and_counted(tiny_models):
    model = tiny_models("qwen2")
    pos, neg = judged(model, "pos"), judged(model, "neg")
    pos.table.loc[3, "answer"] = ""
    pos.table["answer_ids"] = [() if i == 3 else ids for i, ids in enumerate(pos.table["answer_ids"])]
    # Text that is there while its ids are not: only rendering shows it.
    neg.table["answer_ids"] = [() if i == 5 else ids for i, ids in enumerate(neg.table["answer_ids"])]
    vectors = extract(model, pos, neg)
    assert vectors.meta["counts"]["kept"] == 14
    assert vectors.meta["counts"]["dropped"]["empty_answer"] == 2
    assert bool(torch.isfinite(vectors.of()).all())


def test_nan_activations_end_in_one_clear_error(tiny_folders):
    from pvsae.models import load

    model = load(tiny_folders("qwen2"), device="cpu")
    pos, neg = judged(model, "pos"), judged(model, "neg")
    with torch.no_grad():
        model.blocks[2].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"(?s)NaN or infinite.*block 2"):
        extract(model, pos, neg)


def test_one_pair_gives_vectors_but_no_intervals(tiny_models):
    model = tiny_models("qwen2")
    pos, neg = (judged(model, p, n_questions=1, n_samples=1) for p in ("pos", "neg"))
    pos.table["evil"] = [90.0] + [0.0] * (len(pos) - 1)
    vectors = extract(model, pos, neg)
    assert vectors.meta["counts"]["kept"] == 1
    assert vectors.diagnostics["response_avg_diff"]["half_split_cosine"] == [None] * model.n_blocks
    assert all(v > 0 for v in vectors.diagnostics["response_avg_diff"]["norm"])
