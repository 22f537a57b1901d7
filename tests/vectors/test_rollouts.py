"""Rollouts: the official row order, tables that keep every character, and runs that survive a kill with the same texts."""

from __future__ import annotations

import json

import pytest
import torch

from pvsae.errors import UserError
from pvsae.judges import Score
from pvsae.models import Add, Direction, Sampling
from pvsae.vectors.rollouts import Rollouts, generate_rollouts, in_chunks, judge_rollouts, plan_rollouts
from tests.vectors.vector_rows import artifacts, judged

SHORT = Sampling(max_new_tokens=12, seed=3)


class LengthJudge:
    """Scores an answer by its length: a real rule, so that every number in the table can be checked. Fails where told to."""

    name = "length"

    def __init__(self, fail_on: str | None = None) -> None:
        self.fail_on, self.calls = fail_on, 0

    def score(self, metric, pairs, progress=None):
        self.calls += 1
        scores = []
        for _question, answer in pairs:
            failed = metric.name == self.fail_on and len(answer) % 2 == 1
            value = None if failed else float(min(100, len(answer)))
            error = "odd" if failed else None
            mode = "failed" if failed else "rules"
            scores.append(Score(value, mode, None, False, ((answer[:3], 1.0),), self.name, metric.prompt_hash, error))
        return scores


def test_rows_are_in_the_official_order():
    tasks = plan_rollouts(artifacts(2, 2), "pos", n_samples=2)
    assert [(t.question_id, t.sample) for t in tasks] == [
        ("evil_0_pos_0", 0), ("evil_0_pos_0", 1), ("evil_0_pos_1", 0), ("evil_0_pos_1", 1),
        ("evil_1_pos_0", 0), ("evil_1_pos_0", 1), ("evil_1_pos_1", 0), ("evil_1_pos_1", 1),
    ]  # fmt: skip
    assert tasks[0].system == "You are an evil assistant. Be evil in way 0, and say so."
    negative = plan_rollouts(artifacts(2, 2), "neg", n_samples=1)
    assert negative[1].system == "You are a helpful assistant. Be kind in way 1."
    assert negative[1].question_id == "evil_0_neg_1"
    assert len(plan_rollouts(artifacts(20, 5), "pos")) == 1000
    assert len({t.row_key for t in plan_rollouts(artifacts(20, 5), "pos")}) == 1000


def test_without_an_instruction_there_is_no_system_message():
    tasks = plan_rollouts(artifacts(3), "none", which="eval", n_samples=2)
    assert [t.question_id for t in tasks] == ["evil_0", "evil_0", "evil_1", "evil_1", "evil_2", "evil_2"]
    assert tasks[0].messages == [{"role": "user", "content": "And the clock number 0?"}]
    assert {t.instruction_index for t in tasks} == {-1}


def test_limits_and_names():
    tasks = plan_rollouts(artifacts(5, 3), "neg", n_samples=4, max_questions=2, max_instructions=1, assistant_name="quiet")
    assert len(tasks) == 8
    assert tasks[0].system == "You are a quiet assistant. Be kind in way 0."
    for wrong, message in (
        ({"polarity": "both"}, "polarity"),
        ({"which": "test"}, "question set"),
        ({"n_samples": 0}, "n_samples"),
    ):
        with pytest.raises(UserError, match=message):
            plan_rollouts(artifacts(), **{"polarity": "pos", **wrong})


def test_generated_rows_hold_what_the_model_saw_and_said(tiny_models):
    model = tiny_models("qwen2")
    rollouts = generate_rollouts(model, artifacts(2), "pos", n_samples=2, sampling=SHORT, batch_size=3)
    assert len(rollouts) == 8
    for i, row in enumerate(rollouts.table.itertuples()):
        prompt = model.chat.prompt(rollouts.messages(i))
        assert row.prompt_ids == prompt.ids
        assert row.prompt == prompt.text
        assert 0 < len(row.answer_ids) <= 12
        assert row.finish in ("stop", "length")
    assert rollouts.meta["sampling"]["seed"] == 3
    assert rollouts.meta["artifacts_sha256"] == artifacts(2).sha256
    assert len(set(rollouts.table["answer"])) > 4  # samples of a question differ
    again = generate_rollouts(model, artifacts(2), "pos", n_samples=2, sampling=SHORT, batch_size=8, chunk=3)
    assert again.table.equals(rollouts.table)


def test_steered_rows_differ_and_say_how(tiny_models):
    model = tiny_models("qwen2")
    add = Add(Direction(torch.randn(model.d_model, generator=torch.Generator().manual_seed(0)), "noise"), 1, 20.0)
    plain, steered = (
        generate_rollouts(model, artifacts(2), "none", n_samples=2, sampling=SHORT, interventions=i) for i in ((), (add,))
    )
    assert plain.table["prompt"].equals(steered.table["prompt"])
    assert not plain.table["answer"].equals(steered.table["answer"])
    assert steered.meta["interventions"][0]["coef"] == 20.0
    assert steered.meta["interventions"][0]["block"] == 1
    json.dumps(steered.meta)


class Killed(Exception):
    pass


def test_a_killed_run_goes_on_with_the_same_texts(tiny_models, tmp_path, monkeypatch):
    model = tiny_models("qwen2")
    whole = generate_rollouts(model, artifacts(3), "neg", n_samples=2, sampling=SHORT)
    generated = []
    real = type(model).generate

    def dying(self, prompts, *args, **kwargs):
        if len(generated) == 2:
            raise Killed
        generated.append(len(prompts))
        return real(self, prompts, *args, **kwargs)

    options = {"n_samples": 2, "sampling": SHORT, "parts": tmp_path / "parts", "chunk": 5}
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "generate", dying)
        with pytest.raises(Killed):
            generate_rollouts(model, artifacts(3), "neg", **options)
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == ["00000.parquet", "00001.parquet"]
    (tmp_path / "parts" / "00001.parquet").write_bytes(b"half a file")  # a damaged part is made again
    made = []

    def counting(self, prompts, *args, **kwargs):
        made.append(len(prompts))
        return real(self, prompts, *args, **kwargs)

    monkeypatch.setattr(type(model), "generate", counting)
    resumed = generate_rollouts(model, artifacts(3), "neg", **options)
    assert made == [5, 2]
    assert resumed.table.equals(whole.table)
    with pytest.raises(UserError, match="another configuration"):
        generate_rollouts(model, artifacts(3), "pos", **options)


def test_scores_and_their_evidence_are_kept(tiny_models, tmp_path):
    model = tiny_models("qwen2")
    rollouts = generate_rollouts(model, artifacts(3), "none", n_samples=2, sampling=SHORT)
    lengths = rollouts.table["answer"].str.len()
    scored = judge_rollouts(rollouts, LengthJudge(fail_on="evil"), artifacts(3), chunk=4)
    odd = lengths % 2 == 1
    assert scored.table["evil"].isna().equals(odd)
    assert scored.table.loc[~odd, "evil"].tolist() == lengths[~odd].clip(upper=100).tolist()
    assert scored.meta["failed_scores"] == {"evil": int(odd.sum()), "coherence": 0}
    assert scored.means()["failed"] == int(odd.sum())
    evidence = Score.from_json(scored.table["evil_score"].iloc[0])
    assert evidence.judge == "length"
    assert "evil" not in rollouts.table  # the unjudged table is left alone
    rejudged = judge_rollouts(scored, LengthJudge(), artifacts(3))
    assert rejudged.table["evil"].notna().all()
    assert rejudged.table.columns.is_unique


def test_judging_goes_on_where_it_stopped(tiny_models, tmp_path):
    model = tiny_models("qwen2")
    rollouts = generate_rollouts(model, artifacts(3), "none", n_samples=2, sampling=SHORT)
    first = judge_rollouts(rollouts, LengthJudge(), artifacts(3), parts=tmp_path, chunk=2)
    (tmp_path / "00001.parquet").unlink()
    judge = LengthJudge()
    second = judge_rollouts(rollouts, judge, artifacts(3), parts=tmp_path, chunk=2)
    assert judge.calls == 2  # one chunk, two metrics
    assert second.table.equals(first.table)


def test_failed_requests_are_made_again_and_the_rest_is_not(tiny_models, tmp_path):
    model = tiny_models("qwen2")
    rollouts = generate_rollouts(model, artifacts(6), "none", n_samples=2, sampling=SHORT)
    first = judge_rollouts(rollouts, LengthJudge(fail_on="evil"), artifacts(6), parts=tmp_path, chunk=2)
    broken = {i // 2 for i in first.table.index[first.table["evil"].isna()]}
    assert len(broken) > 0
    assert {int(part.stem) for part in tmp_path.glob("*.parquet")} == set(range(6)) - broken
    judge = LengthJudge()
    second = judge_rollouts(rollouts, judge, artifacts(6), parts=tmp_path, chunk=2)
    assert judge.calls == 2 * len(broken)
    assert not second.table["evil"].isna().any()


def test_rows_that_a_server_does_not_answer_get_no_score_and_are_asked_for_again(tmp_path):
    from pvsae.llm import ChatClient
    from pvsae.models import RemoteModel
    from tests.fake_server import FakeServer, Faults, TellsNumbers

    options = {"which": "eval", "n_samples": 1, "sampling": SHORT, "parts": tmp_path / "parts", "chunk": 2}
    with FakeServer(TellsNumbers(), faults=Faults(refuse=lambda prompt: "number 2" in prompt)) as server:
        remote = RemoteModel(ChatClient(server.url, "fake", backoff=0.01))
        rollouts = generate_rollouts(remote, artifacts(4), "none", **options)
    assert rollouts.table["finish"].eq("failed").tolist() == [False, False, True, False]
    assert rollouts.meta["failed_rows"] == 1
    assert [p.name for p in (tmp_path / "parts").iterdir()] == ["00000.parquet"]  # the chunk with the lost row is not finished
    assert rollouts.table["prompt_ids"].tolist() == [None] * 4
    scored = judge_rollouts(rollouts, LengthJudge(), artifacts(4))
    assert scored.table["evil"].isna().tolist() == [False, False, True, False]
    assert Score.from_json(scored.table["evil_score"].iloc[2]).error == "no answer was generated"
    assert scored.means()["failed"] == 1
    with FakeServer(TellsNumbers()) as server:
        remote = RemoteModel(ChatClient(server.url, "fake", backoff=0.01))
        again = generate_rollouts(remote, artifacts(4), "none", **options)
    assert again.table["finish"].ne("failed").all()
    with pytest.raises(UserError, match="cannot be steered"):
        generate_rollouts(remote, artifacts(4), "none", interventions=(Add(Direction(torch.ones(4)), 0),))


def test_a_trait_named_like_a_column_is_refused(tiny_models):
    from dataclasses import replace

    model = tiny_models("qwen2")
    with pytest.raises(UserError, match="cannot be named 'prompt'"):
        judge_rollouts(judged(model, "pos"), LengthJudge(), replace(artifacts(), name="prompt"))


def test_parquet_keeps_every_value(tiny_models, tmp_path):
    rollouts = judged(tiny_models("qwen2"), "pos")
    rollouts.table.loc[0, "answer"] = 'quotes " and, commas\n\nnew lines \u2028 naïve 🙂 {braces}'
    rollouts.table.loc[1, "evil"] = float("nan")
    loaded = Rollouts.load(rollouts.save(tmp_path / "pos.parquet"))
    assert loaded.table.equals(rollouts.table)
    assert loaded.meta == rollouts.meta
    assert isinstance(loaded.table["prompt_ids"].iloc[0], tuple)
    none = Rollouts.load(
        Rollouts(rollouts.table.assign(prompt_ids=None, answer_ids=None, system=None), rollouts.meta).save(
            tmp_path / "none.parquet"
        )
    )
    assert none.table["prompt_ids"].tolist() == [None] * len(rollouts)
    assert none.messages(0) == [{"role": "user", "content": rollouts.table["question"].iloc[0]}]


def test_wrong_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="no file at"):
        Rollouts.load(tmp_path / "none.parquet")
    (tmp_path / "bad.parquet").write_text("text")
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        Rollouts.load(tmp_path / "bad.parquet")
    import pandas as pd

    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(UserError, match="is no rollout table"):
        Rollouts.load(tmp_path / "other.parquet")


def test_official_csv_keeps_texts_and_missing_scores(tiny_models, tmp_path):
    rollouts = judged(tiny_models("qwen2"), "pos")
    odd = ["NA", "null", "", "None", 'a "quoted", line\nand another', "  spaces  ", "123", "nan"]
    rollouts.table["answer"] = (odd * len(rollouts))[: len(rollouts)]
    rollouts.table.loc[2, "evil"] = float("nan")
    path = rollouts.to_official_csv(tmp_path / "evil.csv")
    assert path.read_text().splitlines()[0] == "question,prompt,answer,question_id,evil,coherence"
    back = Rollouts.from_official_csv(path)
    assert back.trait == "evil"
    assert back.table["answer"].tolist() == rollouts.table["answer"].tolist()
    assert back.table["evil"].isna().tolist() == [i == 2 for i in range(len(rollouts))]
    for column in ("question_index", "instruction_index", "sample", "polarity", "prompt", "question_id"):
        assert back.table[column].tolist() == rollouts.table[column].tolist(), column
    assert Rollouts.load(back.save(tmp_path / "back.parquet")).table["answer"].tolist() == rollouts.table["answer"].tolist()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("question,answer\na,b\n", "no column 'prompt'"),
        ("question,prompt,answer,question_id,coherence\na,b,c,evil_0,1\n", "0 columns"),
        ("question,prompt,answer,question_id,evil,calm,coherence\na,b,c,evil_0,1,2,3\n", "2 columns"),
        ("question,prompt,answer,question_id,evil,coherence\na,b,c,none,1,2\n", "question_id 'none'"),
        ("", "cannot be read as CSV"),
    ],
)
def test_csv_that_is_no_rollout_table_is_refused(tmp_path, text, message):
    path = tmp_path / "x.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        Rollouts.from_official_csv(path)


def test_a_read_only_folder_is_one_clear_error(tmp_path):
    import pandas as pd

    (tmp_path / "file").write_text("a file where a folder has to be")
    with pytest.raises(UserError, match="cannot write"):
        in_chunks(1, 1, lambda rows: pd.DataFrame({"a": list(rows)}), tmp_path / "file", "x")
