"""The stage around the evaluation: its files, going on after a stop, its page."""

from __future__ import annotations

import json
from dataclasses import replace

import pandas as pd
import pytest
import torch

from pvsae.errors import UserError
from pvsae.reports import draw, write_report
from pvsae.reports.figures import l0_figure
from pvsae.saes.dictionary import SAE
from pvsae.saes.fingerprint import fingerprint
from pvsae.saes.folders import load, save
from pvsae.stages import sae_eval
from pvsae.stages.sae_eval import SaeEvalConfig, run
from tests.browser import assert_fine
from tests.saes.small import make_sae

TEXTS = (
    "The ferry leaves the harbour at nine and comes back before dark, whatever the weather is like out there.",
    "Nobody knows why the old clock in the kitchen stopped, but everybody has a theory about it.",
    "What is the tallest mountain that you have heard of, and how would one climb it in winter?",
)


@pytest.fixture
def made(tmp_path, tiny_models, monkeypatch):
    """Two dictionaries of the tiny model, a text file and the config that evaluates one on it."""
    monkeypatch.setenv("PVSAE_CACHE", str(tmp_path / "cache"))
    model = tiny_models("qwen2")
    for seed in (0, 1):
        sae = make_sae(seed, d_model=model.d_model, d_sae=96, threshold=1.0)
        save(sae.with_info(outliers=None, context_size=32, drop_first=2, model="qwen2"), tmp_path / f"sae{seed}")
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{t} {i}"}) + "\n" for i in range(8) for t in TEXTS))
    config = SaeEvalConfig(
        dictionary=str(tmp_path / "sae0"), compare=str(tmp_path / "sae1"), text=(str(text),), tokens=200, loss_tokens=60
    )
    return model, config


def test_tables_figures_and_page(made, tmp_path):
    model, config = made
    result = run(config, tmp_path / "run", model=model)
    assert set(result.tables) == {"quality", "loss", "l0", "density", "features", "agreement"}
    tables = tmp_path / "run" / "tables"
    quality = pd.read_csv(tables / "quality.csv").set_index("set")
    assert quality["tokens"]["kept"] >= 200
    assert quality["tokens"]["all tokens"] > quality["tokens"]["kept"], "the first two tokens of each row do not count"
    assert list(pd.read_csv(tables / "loss.csv")["variant"]) == ["original", "spliced", "zero", "mean"]
    densities = pd.read_csv(tables / "features.csv")["density"]
    assert len(densities) == 96
    assert densities.is_monotonic_decreasing
    agreement = result.tables["agreement"]
    assert agreement["mmcs"].between(0.1, 0.9).all()
    assert agreement["latents"].iloc[0] == (densities > 0).sum()
    assert [p.stem for p in draw(tmp_path / "run")] == ["quality", "loss", "l0", "density"]
    page = write_report(tmp_path / "run").read_text()
    for said in ("variance unexplained", "loss recovered", "dead latents", "mean max cosine", "called dead"):
        assert said in page
    assert page.count("data:image/png") == 4
    numbers = json.loads((tmp_path / "run" / "result.json").read_text())["numbers"]
    assert numbers["d_sae"] == 96
    assert numbers["fvu kept"] == quality["fvu"]["kept"]


def test_the_figure_of_l0_has_bins_of_one_width_and_loses_no_token():
    for top in (3, 59, 60, 61, 137, 4000):
        table = pd.DataFrame({"l0": range(top + 1), "tokens": 2})
        (ax,) = l0_figure(table).axes
        widths = {bar.get_width() for bar in ax.patches}
        assert len(widths) == 1
        assert len(ax.patches) <= 60
        assert sum(bar.get_height() for bar in ax.patches) == pytest.approx(1)


def test_the_same_dictionary_agrees_with_itself_and_losses_can_be_left_out(made, tmp_path):
    model, config = made
    result = run(replace(config, compare=config.dictionary, loss_tokens=0), tmp_path / "run", model=model)
    assert (result.tables["agreement"]["mmcs"] > 0.999).all()
    assert "loss" not in result.tables
    assert [p.stem for p in draw(tmp_path / "run")] == ["quality", "l0", "density"]
    write_report(tmp_path / "run")


def test_a_finished_evaluation_is_read_back(made, tmp_path, monkeypatch):
    model, config = made
    first = run(config, tmp_path / "run", model=model)

    def again(*args):
        raise AssertionError("evaluated twice")

    monkeypatch.setattr(sae_eval, "_evaluate", again)
    second = run(replace(config, batch_tokens=64), tmp_path / "run", model=model)
    for name, table in first.tables.items():
        pd.testing.assert_frame_equal(table, second.tables[name])
    with pytest.raises(UserError, match="tokens"):
        run(replace(config, tokens=300), tmp_path / "run", model=model)


def test_another_dictionary_under_the_same_name_is_refused(made, tmp_path):
    model, config = made
    run(config, tmp_path / "run", model=model)
    sae = make_sae(5, d_model=model.d_model, d_sae=96).with_info(outliers=None, model="qwen2")
    save(sae, config.dictionary)
    with pytest.raises(UserError, match="changed since"):
        run(config, tmp_path / "run", model=model)


def test_other_weights_of_the_model_are_refused(made, tmp_path, tiny_folders):
    """Before and after the evaluation is finished."""
    from pvsae.models import load as load_model

    _, config = made
    model = load_model(tiny_folders("qwen2"), device="cpu")
    first = run(config, tmp_path / "run", model=model)
    again = run(config, tmp_path / "run", model=load_model(tiny_folders("qwen2"), device="cpu"))
    pd.testing.assert_frame_equal(first.tables["quality"], again.tables["quality"])
    with torch.no_grad():
        model.blocks[1].mlp.down_proj.weight.mul_(1.01)
    with pytest.raises(UserError, match=r"the weights of the model .* changed since the run in .* began"):
        run(config, tmp_path / "run", model=model)
    (tmp_path / "run" / "evaluation" / "summary.json").unlink()  # then it would be made anew, with the other weights
    with pytest.raises(UserError, match="weights of the model"):
        run(config, tmp_path / "run", model=model)


@pytest.mark.parametrize(("array", "at"), [("W_enc", (5, 40)), ("W_dec", (50, 3)), ("threshold", (7,)), ("b_dec", (1,))])
def test_one_changed_number_makes_another_dictionary(made, tmp_path, array, at):
    model, config = made
    sae = load(config.dictionary)
    first = fingerprint(sae)
    assert fingerprint(load(config.dictionary)) == first
    run(config, tmp_path / "run", model=model)
    changed = {name: getattr(sae, name).clone() for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
    changed[array][at] += 0.001
    save(SAE(**changed, info=sae.info), config.dictionary)
    with pytest.raises(UserError, match="changed since"):
        run(config, tmp_path / "run", model=model)


def test_options_that_were_wrong_are_put_right_in_the_same_folder(made, tmp_path):
    model, config = made
    (tmp_path / "empty.txt").write_text("")
    for message, wrong in {
        "does not say on which it was trained": replace(config, text=()),
        "nowhere": replace(config, text=(str(tmp_path / "nowhere.txt"),)),
        "block 9": replace(config, block=9),
        "empty": replace(config, text=(str(tmp_path / "empty.txt"),)),
    }.items():
        with pytest.raises(UserError, match=message):
            run(wrong, tmp_path / "run", model=model)
    assert run(config, tmp_path / "run", model=model).summary["d_sae"] == 96


def test_held_out_text_alone(made, tmp_path):
    from pvsae.saes.corpus import Corpus, CorpusConfig
    from pvsae.sources import Source

    model, config = made
    result = run(replace(config, held_out=0.3, tokens=10**6), tmp_path / "run", model=model)
    corpus = Corpus(model, CorpusConfig(sources=(Source(path=config.text[0]),), context=32, drop_first=2, held_out=0.3))
    expected = sum(int(row.keep.sum()) for row in corpus.rows(held_out=True))
    assert result.tables["quality"].set_index("set")["tokens"]["with outliers"] == expected
    assert 0 < expected < sum(int(row.keep.sum()) for row in corpus.rows())


def test_tokens_are_those_that_the_dictionary_was_made_for(made, tmp_path):
    """Of answers alone, where it was trained on those; and the page says so."""
    model, config = made
    chats = tmp_path / "chats.jsonl"
    talk = [{"role": "user", "content": TEXTS[2]}, {"role": "assistant", "content": TEXTS[0]}]
    chats.write_text((json.dumps({"messages": talk}) + "\n") * 8)
    sae = load(config.dictionary)
    counted = {}
    for tokens, skip_special in (("all", True), ("answers", True), ("all", False)):
        trained = {"corpus": {"sources": [{"path": "gone"}], "tokens": tokens, "skip_special": skip_special}}
        save(sae.with_info(training=trained, drop_first=0, context_size=400), tmp_path / "own")
        own = replace(config, dictionary=str(tmp_path / "own"), compare=None, text=(str(chats),), loss_tokens=0, tokens=10**6)
        result = run(own, tmp_path / f"run-{tokens}-{skip_special}", model=model)
        counted[tokens, skip_special] = int(result.tables["quality"].set_index("set")["tokens"]["with outliers"])
        about = json.loads((result.path / "result.json").read_text())["about"]
        assert ("no assistant says" in about) == (tokens == "answers")
        assert ("special tokens" in about) == skip_special
    (row,) = {model.chat.conversation(talk)}
    assert counted["answers", True] == 8 * (row.answer[1] - row.answer[0])
    assert counted["all", False] == 8 * len(row.ids)
    assert counted["answers", True] < counted["all", True] < counted["all", False]


def test_the_model_that_it_was_trained_with_is_loaded(made, tmp_path, monkeypatch):
    """With its adapter and chat mode, unless another one is named."""
    model, config = made
    asked = []
    monkeypatch.setattr("pvsae.models.load", lambda name, **options: asked.append((name, options)) or model)
    trained = {"model": {"name": "base", "adapter": "lora", "chat": "plain"}}
    save(load(config.dictionary).with_info(model="base+lora", training=trained), config.dictionary)
    config = replace(config, other_model=True)  # whatever is asked for, the tiny model comes
    run(config, tmp_path / "a")
    run(replace(config, model="other"), tmp_path / "b")
    run(replace(config, adapter="own", chat="auto"), tmp_path / "c")
    assert [(name, options["adapter"], options["chat"]) for name, options in asked] == [
        ("base", "lora", "plain"), ("other", None, "auto"), ("base", "own", "plain"),
    ]  # fmt: skip


def test_what_cannot_be_evaluated_is_said(made, tmp_path):
    model, config = made
    with pytest.raises(UserError, match="tokens is 0"):
        replace(config, tokens=0)
    with pytest.raises(UserError, match=r"held_out is 0.1, and no text is given"):
        replace(config, text=(), held_out=0.1)
    save(make_sae(), tmp_path / "small")
    other = save(load(config.dictionary).with_info(model="other/model"), tmp_path / "other")
    for name, (message, wrong) in enumerate(
        {
            "d_model 12": replace(config, dictionary=str(tmp_path / "small")),
            "there is no dictionary": replace(config, dictionary=str(tmp_path / "nowhere")),
            "block 9": replace(config, block=9),
            "nowhere": replace(config, text=(str(tmp_path / "nowhere.txt"),)),
            "d_model": replace(config, compare=str(tmp_path / "small")),
            "block 2 is asked for": replace(config, block=2),
            "is of other/model, the model is": replace(config, dictionary=str(other)),
            "other is of other/model": replace(config, compare=str(other)),
        }.items()
    ):
        with pytest.raises(UserError, match=message):
            run(wrong, tmp_path / f"run{name}", model=model)
    assert torch.is_grad_enabled()
    meant = run(replace(config, dictionary=str(other), other_model=True, loss_tokens=0), tmp_path / "meant", model=model)
    assert any("Two models" in note for note in meant.summary["notes"])


@pytest.mark.slow
def test_the_page_in_a_browser(made, tmp_path):
    model, config = made
    run(config, tmp_path / "run", model=model)
    assert_fine(write_report(tmp_path / "run"), tmp_path / "browser", images=4)
