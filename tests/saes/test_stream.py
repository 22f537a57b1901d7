"""Activation stream: right tokens, right activations, the same bits after any stop, and nothing held out in training."""

from __future__ import annotations

import contextlib
import io
import json
from itertools import islice

import numpy as np
import pytest
import torch

from pvsae.errors import UserError
from pvsae.models import Rendered, Residual
from pvsae.models.fingerprint import fingerprint
from pvsae.saes.stream import ActivationStream, StreamConfig
from pvsae.sources import Source
from tests.conftest import save_tiny
from tests.saes.corpora import open_corpus, text, write_chats, write_jsonl, write_texts

SMALL = {"batch_tokens": 256, "window": 3, "buffer_tokens": 1024, "calibration_tokens": 500, "dtype": "float32"}


@pytest.fixture(scope="module")
def model(tiny_models):
    return tiny_models("qwen2")


@pytest.fixture(scope="module")
def corpus(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    texts = Source(path=write_texts(folder / "a.jsonl", 160), weight=0.7)
    chats = Source(path=write_chats(folder / "c.jsonl", 60, system="Be brief."), weight=0.3, strip_system=0.5, repeat=True)
    return open_corpus(model, folder, texts, chats, held_out=0.15, drop_first=2)


def stream(model, corpus, blocks=(1, 2), **options):
    return ActivationStream(model, corpus, blocks, StreamConfig(**{**SMALL, **options}))


def expected(model, rows, block):
    """Residuals of the wanted tokens by `ChatModel.capture`, rows in their order."""
    rows = list(rows)
    chats = [Rendered(tuple(row.ids.tolist()), len(row.ids), (len(row.ids),) * 2, (), "") for row in rows]
    (read,) = model.capture(chats, [Residual(block)]).values()
    return torch.cat([r[torch.from_numpy(row.keep)] for r, row in zip(read, rows, strict=True)])


def by_size(x):
    """Tokens in an order that does not depend on how they were shuffled."""
    return x[x.double().sum(1).argsort()]


def equal(a, b) -> bool:
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in zip(a, b, strict=True)
    )


# -------------------------------------------------------------------------------------------------------------- activations
def test_every_wanted_token_comes_once_with_the_activations_that_capture_reads(model, corpus) -> None:
    some = stream(model, corpus, outlier_multiple=None)
    batches = list(some.batches(1))
    for block in (1, 2):
        found = by_size(torch.cat([b[block] for b in batches]))
        wanted = by_size(expected(model, corpus.rows(), block))
        assert found.shape == wanted.shape
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    assert some.counts == {"harvested": len(batches), "outliers": 0, "drawn": len(batches)}


def test_the_blocks_of_a_batch_hold_the_same_tokens(model, corpus) -> None:
    batch = next(stream(model, corpus, (0, 3)).batches(64))
    table = {tuple(x): y for x, y in zip(expected(model, corpus.rows(), 0).round(decimals=2).tolist(),
                                         expected(model, corpus.rows(), 3), strict=True)}  # fmt: skip
    hits = [
        (table[key], y) for x, y in zip(batch[0], batch[3], strict=True) if (key := tuple(x.round(decimals=2).tolist())) in table
    ]
    assert len(hits) > 40  # the others fall on another side of a rounding
    assert all(torch.allclose(a, b, rtol=1e-2, atol=1e-2) for a, b in hits)


def test_batches_are_bf16_unless_asked_otherwise(model, corpus) -> None:
    whole, half = (next(stream(model, corpus, dtype=d).batches(64)) for d in ("float32", "bfloat16"))
    assert {x.dtype for x in half.values()} == {torch.bfloat16}
    assert all(x.shape == (64, model.d_model) for x in half.values())
    assert all(torch.equal(whole[b].bfloat16(), half[b]) for b in whole)


def test_batches_mix_many_rows(model, corpus) -> None:
    first = next(stream(model, corpus, outlier_multiple=None).batches(128))[1]
    in_order = expected(model, islice(corpus.rows(), 8), 1)
    near = (torch.cdist(first, in_order).min(1).values < 1e-2).sum()
    assert near < 100


def test_the_last_incomplete_batch_is_left_out_and_sizes_may_change(model, corpus) -> None:
    some = stream(model, corpus)
    first = list(islice(some.batches(100), 3))
    rest = list(some.batches(64))
    assert [len(b[1]) for b in first + rest] == [100] * 3 + [64] * len(rest)
    assert len(some.buffer) < 64
    assert list(some.batches(64)) == []


def test_the_organism_streams_as_any_model(tmp_path) -> None:
    from pvsae.models import load

    organism = load("organism", device="cpu")
    corpus = open_corpus(organism, tmp_path, Source(path=write_chats(tmp_path / "c.jsonl", 12)), tokens="answers", held_out=0.0)
    block = organism.n_blocks // 2
    some = stream(organism, corpus, (block,), outlier_multiple=None)
    found = torch.cat([b[block] for b in some.batches(1)])
    torch.testing.assert_close(by_size(found), by_size(expected(organism, corpus.rows(), block)), rtol=1e-2, atol=1e-2)


# ------------------------------------------------------------------------------------------------------------- determinism
def test_the_seed_decides_the_batches(model, corpus) -> None:
    one, two, other = (list(stream(model, corpus, seed=s).batches(50)) for s in (0, 0, 1))
    assert equal(one, two)
    assert not equal(one, other)


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_restored_stream_gives_the_same_bits_wherever_it_stopped(model, corpus, tmp_path, shards, dtype) -> None:
    options = {"dtype": dtype, "shards": str(tmp_path / "s") if shards else None}
    through = stream(model, corpus, **options)
    whole = list(through.batches(60))
    first = stream(model, corpus, **options)
    batches = first.batches(60)
    assert len(whole) > 25
    for at in range(len(whole) + 1):
        if at in (0, 1, 8, 13, len(whole) - 1, len(whole)):
            state = first.state()
            fresh = stream(model, corpus, **options)
            fresh.restore(state)
            assert equal(list(fresh.batches(60)), whole[at:]), at
            assert fresh.counts["drawn"] == 60 * len(whole)
            assert fresh.outliers == through.outliers
        next(batches, None)


def test_a_state_survives_torch_save_and_what_happens_after_it(model, corpus) -> None:
    some = stream(model, corpus)
    batches = some.batches(60)
    list(islice(batches, 5))
    state = some.state()
    file = io.BytesIO()
    torch.save(state, file)
    wanted = list(batches)
    file.seek(0)
    plain = json.loads(json.dumps({key: value for key, value in state.items() if key != "buffer"}))
    for saved in (state, torch.load(file, weights_only=True), {**plain, "buffer": state["buffer"]}):
        some.restore(saved)
        assert equal(list(some.batches(60)), wanted)


def test_an_open_walk_goes_on_from_what_was_restored(model, corpus) -> None:
    some = stream(model, corpus)
    batches = some.batches(60)
    first = list(islice(batches, 4))
    state = some.state()
    wanted = list(islice(batches, 4))
    some.restore(state)
    assert equal(list(islice(batches, 4)), wanted)
    assert not equal(first, wanted)


class Queue:
    """Stands in for a CUDA stream and its events, on a machine without any: all work is done at once."""

    waited = 0

    def record_event(self) -> object:
        return object()

    def wait_event(self, event: object) -> None:
        assert event is not None
        self.waited += 1


def test_a_pass_that_is_computed_ahead_is_neither_lost_nor_given_twice(model, corpus, monkeypatch) -> None:
    main = Queue()
    monkeypatch.setattr(torch.cuda, "stream", lambda queue: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: main)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, queue: None)

    def ahead():
        some = stream(model, corpus)
        some._side = Queue()
        return some

    whole = list(stream(model, corpus).batches(60))
    first = ahead()
    batches = first.batches(60)
    n_ahead = 0
    for at in range(len(whole) + 1):
        if at % 5 == 0 or at == len(whole):
            n_ahead += first._ahead is not None
            state = first.state()
            for fresh in (ahead(), stream(model, corpus)):
                fresh.restore(state)
                assert equal(list(fresh.batches(60)), whole[at:]), at
        if at < len(whole):
            assert equal([next(batches)], whole[at : at + 1])
    assert n_ahead > 2
    assert main.waited > 3, "a pass is waited for before it is used"
    first = ahead()
    batches = first.batches(60)
    state, early = first.state(), list(islice(batches, 3))
    assert first._ahead is not None
    first.restore(state)
    assert equal(list(islice(batches, 3)), early), "what was computed ahead of another place is not taken"


def test_resuming_tokenises_nothing(model, corpus, monkeypatch) -> None:
    some = stream(model, corpus)
    list(islice(some.batches(60), 3))
    state = some.state()
    monkeypatch.setattr("pvsae.saes.tokenising.Tokeniser.encode", lambda *a: pytest.fail("tokenised again"))
    fresh = stream(model, corpus)
    fresh.restore(state)
    assert next(fresh.batches(60))[1].shape == (60, model.d_model)


def test_the_state_of_another_stream_is_refused(model, corpus, tiny_models) -> None:
    state = stream(model, corpus).state()
    with pytest.raises(UserError, match="differs in: blocks"):
        stream(model, corpus, (1, 3)).restore(state)
    with pytest.raises(UserError, match="batch_tokens, seed"):
        stream(model, corpus, batch_tokens=128, seed=4).restore(state)
    with pytest.raises(UserError, match="differs in: buffer_tokens, calibration_tokens, outlier_multiple"):
        stream(model, corpus, buffer_tokens=1500, calibration_tokens=77, outlier_multiple=3.0).restore(state)
    assert fingerprint(model) != fingerprint(tiny_models("llama"))


def _share(rank: int, folder: str, model_folder: str, port: int) -> None:
    """One of two processes that stream together: writes its batches and how many passes it ran itself."""
    from pathlib import Path

    from pvsae.models import load
    from pvsae.saes.parallel import Group

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = load(model_folder, device="cpu")
    corpus = open_corpus(model, Path(folder), Source(path=f"{folder}/a.jsonl"), held_out=0.1)
    for dtype in ("float32", "bfloat16"):
        some = ActivationStream(model, corpus, (1, 2), StreamConfig(**{**SMALL, "dtype": dtype}), group=Group(rank, 2))
        assert some.scale
        ran, real = [], some._harvest
        some._harvest = lambda rows, ran=ran, real=real: ran.append(len(rows)) or real(rows)
        batches = some.batches(60)
        first = list(islice(batches, 6))
        state = some.state()
        rest = list(batches)
        n = len(ran)
        some.restore(state)  # in the middle of a window, so that other passes fall to this process
        assert equal(list(some.batches(60)), rest)
        torch.save({"batches": first + rest, "ran": n}, f"{folder}/{dtype}-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_share_the_passes_and_get_the_batches_of_one(tiny_folders, tmp_path) -> None:
    import socket

    from pvsae.models import load

    write_texts(tmp_path / "a.jsonl", 120)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = str(tiny_folders("qwen2"))
    torch.multiprocessing.spawn(_share, (str(tmp_path), folder, port), nprocs=2)
    model = load(folder, device="cpu")
    corpus = open_corpus(model, tmp_path, Source(path=str(tmp_path / "a.jsonl")), held_out=0.1)
    for dtype in ("float32", "bfloat16"):
        alone = stream(model, corpus, dtype=dtype)
        assert alone.scale
        ran, real = [], alone._harvest
        alone._harvest = lambda rows, ran=ran, real=real: ran.append(len(rows)) or real(rows)
        wanted = list(alone.batches(60))
        shares = [torch.load(tmp_path / f"{dtype}-{rank}.pt") for rank in (0, 1)]
        for share in shares:
            assert len(share["batches"]) == len(wanted) > 10
            for a, b in zip(share["batches"], wanted, strict=True):
                assert all(torch.allclose(a[k].float(), b[k].float(), rtol=1e-2, atol=1e-3) for k in a)
        assert sum(share["ran"] for share in shares) == len(ran)
        assert equal(shares[0]["batches"], shares[1]["batches"])


# ------------------------------------------------------------------------------------------------------- what is held apart
def test_held_out_activations_are_never_in_training(model, corpus) -> None:
    some = stream(model, corpus, outlier_multiple=None)
    apart = some.held_out(10_000)[2]
    rows = list(corpus.rows(held_out=True))
    assert len(apart) == sum(int(r.keep.sum()) for r in rows)
    torch.testing.assert_close(by_size(apart), by_size(expected(model, rows, 2)), rtol=1e-3, atol=1e-3)
    numbers = [{r.ids.tobytes() for r in walk} for walk in (rows, corpus.rows())]
    assert not numbers[0] & numbers[1]


def test_held_out_is_the_same_at_every_call_and_leaves_the_stream_alone(model, corpus) -> None:
    some = stream(model, corpus)
    wanted = list(stream(model, corpus).batches(60))
    first = some.held_out(300)
    batches = some.batches(60)
    found = list(islice(batches, 5))
    second = some.held_out(300)
    found += list(batches)
    assert all(torch.equal(first[b], second[b]) and len(first[b]) == 300 for b in (1, 2))
    assert torch.equal(some.held_out(100)[1], first[1][:100])
    assert equal(found, wanted)


def test_without_a_held_out_share_the_error_says_so(model, tmp_path) -> None:
    corpus = open_corpus(model, tmp_path, Source(path=write_texts(tmp_path / "a.jsonl", 60)), held_out=0.0)
    some = stream(model, corpus)
    with pytest.raises(UserError, match="held_out is 0"):
        some.held_out(10)
    assert set(some.scale) == {1, 2}  # measured on training rows then


# -------------------------------------------------------------------------------------------------------- scale and outliers
def test_the_scale_gives_unit_mean_square(model, corpus) -> None:
    some = stream(model, corpus, calibration_tokens=100_000)
    held = some.held_out(100_000)
    for block, s in some.scale.items():
        assert float((s * held[block].double()).square().sum(1).mean()) == pytest.approx(model.d_model, rel=1e-5)


@pytest.fixture(scope="module")
def sinking(tmp_path_factory):
    """A model on which one token, Z, has a huge norm, and a corpus in which every fourth text ends with it."""
    from pvsae.models import load

    folder = tmp_path_factory.mktemp("sinking")
    model = load(save_tiny("qwen2", folder / "model"), device="cpu")
    (z,) = model.tokenizer("Z", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.hf.get_input_embeddings().weight[z] *= 2000
    path = write_jsonl(folder / "a.jsonl", [{"text": text(i, 2, 5) + (" Z" if i % 4 == 0 else "")} for i in range(400)])
    return model, open_corpus(model, folder, Source(path=path), context=64, held_out=0.2), z


def test_outliers_are_left_out_counted_and_kept_in_the_filter(sinking) -> None:
    model, corpus, z = sinking
    n = sum(int((row.ids[row.keep] == z).sum()) for row in corpus.rows())
    assert n > 50
    some = stream(model, corpus, (0, 2))
    kept = torch.cat([b[2] for b in some.batches(1)])
    assert some.counts["outliers"] == n
    assert len(kept) == some.counts["harvested"] - n
    for block, outliers in some.outliers.items():
        every = expected(model, corpus.rows(), block)
        assert int(outliers.outliers(every).sum()) == n  # the filter that is saved finds the same tokens
        assert outliers.multiple == 10.0
        assert outliers.median_norm == pytest.approx(float(every.norm(dim=1).median()), rel=0.05)
    assert not some.outliers[2].outliers(kept).any()
    assert some.info(2).outliers == some.outliers[2]


def test_an_outlier_at_one_block_is_left_out_for_all(sinking, monkeypatch) -> None:
    model, corpus, _ = sinking
    some = stream(model, corpus, (0, 2), outlier_multiple=10.0)
    assert some.scale  # measured before anything is planted
    real, planted_at = some._harvest, []
    inliers_before = {tuple(b[2][0].tolist()) for b in stream(model, corpus, (0, 2), outlier_multiple=10.0).batches(1)}

    def planted(rows):
        found = real(rows)
        found[0][5] *= 1e4
        planted_at.append(tuple(found[2][5].tolist()))
        return found

    monkeypatch.setattr(some, "_harvest", planted)
    batches = list(some.batches(1))
    assert not any(some.outliers[0].outliers(b[0]).any() for b in batches)
    usual = {at for at in planted_at if at in inliers_before}
    assert len(usual) > 5, "tokens that nothing but their residual at block 0 makes outliers"
    assert not usual & {tuple(b[2][0].tolist()) for b in batches}, "they are left out of block 2, too"


def test_held_out_comes_with_or_without_outliers_and_scale_is_measured_without(sinking) -> None:
    model, corpus, z = sinking
    some = stream(model, corpus, calibration_tokens=100_000)
    n = sum(int((row.ids[row.keep] == z).sum()) for row in corpus.rows(held_out=True))
    kept, every = some.held_out(100_000), some.held_out(100_000, outliers=True)
    assert n > 5
    assert len(every[1]) - len(kept[1]) == n
    assert float((some.scale[1] * kept[1].double()).square().sum(1).mean()) == pytest.approx(model.d_model, rel=1e-4)
    without = stream(model, corpus, outlier_multiple=None)
    assert without.outliers == {}
    assert len(without.held_out(100_000)[1]) == len(every[1])


def test_a_scale_from_fewer_tokens_than_wanted_is_noted(model, corpus) -> None:
    some = stream(model, corpus, calibration_tokens=50_000)
    assert 0 < some.calibration.tokens < 50_000
    assert some.info(1).notes == (
        f"its scale and the first median of norms were measured on {some.calibration.tokens:,} tokens, of 50,000 wanted",
    )
    assert stream(model, corpus).info(1).notes == ()


def test_the_running_median_follows(model, corpus) -> None:
    some = stream(model, corpus)
    before = some.outliers[1].median_norm
    assert before == some.calibration.median[1]
    list(some.batches(60))
    after = some.outliers[1].median_norm
    assert after != before
    every = expected(model, corpus.rows(), 1).norm(dim=1).median()
    assert after == pytest.approx(float(every), rel=0.05)


def test_activations_that_are_not_finite_are_an_error(model, corpus, monkeypatch) -> None:
    some = stream(model, corpus)
    monkeypatch.setattr(some, "_harvest", lambda rows: {b: torch.full((3, model.d_model), float("nan")) for b in (1, 2)})
    with pytest.raises(UserError, match="NaN or infinite activations at block 1"):
        next(some.batches(8))


# ------------------------------------------------------------------------------------------------------------------ shards
def test_shards_give_the_same_batches_without_the_model(model, corpus, tmp_path, monkeypatch) -> None:
    plain = list(stream(model, corpus).batches(60))
    kept = stream(model, corpus, shards=str(tmp_path / "s"))
    assert equal(list(kept.batches(60)), plain)
    again = stream(model, corpus, shards=str(tmp_path / "s"))
    assert again.scale  # the calibration still takes the model
    monkeypatch.setattr(again, "_harvest", lambda rows: pytest.fail("the model was run"))
    assert equal(list(again.batches(60)), plain)


@pytest.mark.parametrize("how", ["changed", "gone"])
def test_a_damaged_shard_is_filled_again_with_the_same_bits(model, corpus, tmp_path, how) -> None:
    folder = tmp_path / "s"
    plain = list(stream(model, corpus, shards=str(folder)).batches(60))
    file = folder / "activations-000002.safetensors"
    whole = file.read_bytes()
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    again = stream(model, corpus, shards=str(folder))
    assert again.scale
    ran = []
    real = again._harvest
    again._harvest = lambda rows: ran.append(len(rows)) or real(rows)
    assert equal(list(again.batches(60)), plain)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert len(ran) == len(manifest["shards"]["2"]["passes"])  # that window alone
    assert file.read_bytes() == whole


# ------------------------------------------------------------------------------------------------------------------ errors
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "float16"}, "float16"),
        ({"batch_tokens": 0}, "batch_tokens"),
        ({"buffer_tokens": 300}, "buffer_tokens 300"),
        ({"outlier_multiple": 0.5}, "outlier_multiple"),
        ({"outlier_multiple": float("inf")}, "outlier_multiple inf"),
        ({"seed": -1}, "seed"),
        ({"buffer_device": "gpu"}, "unknown device 'gpu'"),
        ({"buffer_device": "cuda:99"}, "device 'cuda:99' is not on this machine"),
    ],
)
def test_bad_options_are_errors(model, corpus, options, said) -> None:
    with pytest.raises(UserError, match=said):
        stream(model, corpus, **options)


def test_unknown_blocks_and_batches_that_do_not_fit_are_errors(model, corpus) -> None:
    with pytest.raises(UserError, match="block 4"):
        stream(model, corpus, (1, 4))
    with pytest.raises(UserError, match="batches of 900"):
        next(stream(model, corpus).batches(900))


def test_info_says_what_the_stream_was(model, corpus) -> None:
    info = stream(model, corpus).info(1)
    assert (info.block, info.drop_first, info.context_size, info.prepend_bos) == (1, 2, 32, False)
    assert info.dataset == "a.jsonl, c.jsonl"
    assert info.chat["strip_system"] == {"c.jsonl": 0.5}
    assert np.isfinite(info.outliers.median_norm)
    assert type(info).from_dict(json.loads(json.dumps(info.to_dict()))) == info
