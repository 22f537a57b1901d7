"""`pvsae chat` on the embedded model, as a script on standard input: dials, readings, colours, the saved session."""

from __future__ import annotations

import io
import json
import sys

import pytest
import torch

from pvsae.cli import main
from pvsae.commands.chat import Repl, coloured, columns
from pvsae.errors import UserError
from pvsae.models import Direction, FeatureActs, Projection, Sampling, load
from pvsae.saes.dictionary import SAE, SAEInfo
from pvsae.saes.folders import save
from pvsae.stages.handles import Feature
from pvsae.stages.talk import Dial, Talk
from pvsae.vectors import PersonaVectors

BLOCK, N = 3, 6


@pytest.fixture(scope="module")
def model():
    return load("organism")


@pytest.fixture(scope="module")
def dials(model) -> dict[str, Dial]:
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(8, model.d_model, generator=g)
    rows /= rows.norm(dim=1, keepdim=True)
    info = SAEInfo(model="organism", block=BLOCK)
    sae = SAE(rows.T, torch.zeros(8), rows, torch.zeros(model.d_model), info=info)
    vector = Direction(20 * torch.randn(model.d_model, generator=g) / model.d_model**0.5, "evil")
    made = [
        Dial("evil", BLOCK, vector, "multiples of the vector", "a test"),
        Dial("5", BLOCK, Feature("5", sae, 5, BLOCK, maximum=30.0, density=0.5), "multiples of the highest activation", "a test"),
    ]
    return {dial.name: dial for dial in made}


@pytest.fixture
def talk(model, dials) -> Talk:
    return Talk(model, dials, Sampling(max_new_tokens=N, seed=1))


def script(talk: Talk, *lines: str, **options) -> str:
    out = io.StringIO()
    Repl(talk, io.StringIO("\n".join(lines) + "\n"), out, **options).run()
    return out.getvalue()


def test_a_turn_is_the_generation_under_the_dials_and_its_readings_are_captures(talk, model, dials) -> None:
    talk.set("evil", 1.5)
    talk.set("5", -0.5)
    turn = talk.say("How do I learn chess?")
    edits = [*dials["evil"].edits(1.5, "all"), *dials["5"].edits(-0.5, "all")]
    assert (edits[0].coef, edits[1].strength) == (1.5, -15.0)
    prompt = model.chat.prompt([{"role": "user", "content": "How do I learn chess?"}])
    (answer,) = model.generate([prompt], talk.sampling, row_keys=["turn 0"], interventions=edits)
    assert turn.assistant == answer.text
    row = model.chat.with_answer_ids(prompt, answer.ids)
    reads = [Projection((dials["evil"].of,), BLOCK), FeatureActs(dials["5"].of.sae, BLOCK, "all", (5,))]
    read = model.capture([row], reads, edits)
    start = row.span("user")[0]
    for name, capture in zip(("evil", "5"), reads, strict=True):
        expected = read[capture.key][0][start:, 0].tolist()
        assert [token.readings[name] for token in turn.tokens] == pytest.approx(expected)
    assert "".join(t.text for t in turn.tokens if t.role == "user") == "How do I learn chess?"
    assert "".join(t.text for t in turn.tokens if t.role == "assistant") == model.chat.decode(row.ids[slice(*row.answer)])


def test_dials_at_0_leave_the_talk_as_it_is(model, dials) -> None:
    sampling = Sampling(max_new_tokens=N, seed=1)
    with_dials, without = Talk(model, dials, sampling), Talk(model, {}, sampling)
    for question in ("How do I learn chess?", "And cooking?"):
        assert with_dials.say(question).assistant == without.say(question).assistant
    with_dials.set("evil", 3.0)
    assert with_dials.say("And the violin?").assistant != without.say("And the violin?").assistant


def test_a_scripted_session(talk, tmp_path) -> None:
    said = script(
        talk, "/list", "/up evil", "/up ev 0.25", "How do I learn chess?", "/down evil 1", "/set 5 1.5", "/show 5",
        "And cooking?", "/off 5", "/show none", "Why?", "/off", f"/save {tmp_path}/talk.json", "/quit", "never read",
    )  # fmt: skip
    assert "evil: 0.75" in said
    assert "evil: -0.25" in said
    assert "5: 1.5" in said
    assert "\x1b[" not in said, "no colours outside of a terminal"
    assert said.count("role       token") == 2
    assert "never read" not in [turn.user for turn in talk.turns]
    stored = json.loads((tmp_path / "talk.json").read_text())
    assert [turn["user"] for turn in stored["turns"]] == ["How do I learn chess?", "And cooking?", "Why?"]
    assert [turn["strengths"] for turn in stored["turns"]] == [{"evil": 0.75}, {"evil": -0.25, "5": 1.5}, {"evil": -0.25}]
    assert [turn["assistant"] for turn in stored["turns"]] == [turn.assistant for turn in talk.turns]
    assert stored["dials"][1]["unit"] == "multiples of the highest activation"
    assert all(set(token["readings"]) == {"evil", "5"} for turn in stored["turns"] for token in turn["tokens"])


def test_what_a_line_does_wrong_is_said_and_the_talk_goes_on(talk) -> None:
    said = script(talk, "/bogus", "/set evil", "/set evil much", "/up nobody", "/save", "/set evil inf", "/set evil 2", "/help")
    for message in ("no command /bogus", "NAME X", "'much' is no number", "no dial 'nobody'", "/save FILE", "strength inf"):
        assert message in said
    assert "evil: 2" in said
    assert "first letters of a name" in said


def test_a_place_that_is_no_file_and_bytes_that_are_no_text_do_not_end_the_talk(talk, tmp_path) -> None:
    said = script(
        talk, "How do I learn chess?", "/save /", "/save .", "/save ..", f"/save {tmp_path}", "half \ud800 a pair", "/list"
    )
    assert said.count("is a folder") == 4
    assert len(talk.turns) == 2, "the talk is still there"
    for errors in ("strict", "surrogateescape"):
        lines = io.TextIOWrapper(io.BytesIO(b"\xff\xfe bad\n/list\n"), encoding="utf-8", errors=errors)
        Repl(talk, lines, io.StringIO()).run()
    assert len(talk.turns) == 4
    assert talk.turns[-1].user == "\ufffd\ufffd bad"
    talk.save(tmp_path / "talk.json")


def test_anew_under_a_system_prompt_keeps_the_dials(talk) -> None:
    out = io.StringIO()
    repl = Repl(talk, io.StringIO("/set evil 1\nHow do I learn chess?\n/system Be brief.\nHow do I learn chess?\n/reset\n"), out)
    repl.run()
    assert repl.talk.turns == []
    assert repl.talk.system == "Be brief."
    assert repl.talk.strengths["evil"] == 1.0
    assert repl.talk.messages == [{"role": "system", "content": "Be brief."}]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colours_in_a_terminal_and_none_where_they_are_not_wanted(talk, dials, monkeypatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = Terminal()
    Repl(talk, io.StringIO("How do I learn chess?\n"), out).run()
    turn = talk.turns[0]
    assert coloured(turn, list(dials.values())) in out.getvalue()
    assert "\x1b[48;2;" in out.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    out = Terminal()
    Repl(talk.begin_anew(), io.StringIO("How do I learn chess?\n"), out).run()
    assert columns(turn, list(dials.values())) in out.getvalue()
    assert "\x1b[" not in out.getvalue()


def test_a_features_colour_is_full_at_its_highest_activation_and_none_at_0(talk, dials) -> None:
    from dataclasses import replace

    turn = talk.say("How do I learn chess?")
    readings = (0.0, 30.0, 90.0)
    some = [replace(token, text="x", readings={"5": v}) for token, v in zip(turn.tokens[:3], readings, strict=True)]
    painted = coloured(replace(turn, tokens=some), [dials["5"]]).splitlines()[1]
    shades = [part.split("m")[0] for part in painted.split("\x1b[48;2;")[1:]]
    assert shades == ["255;255;255", "213;94;0", "213;94;0"]


def test_a_dial_of_another_model_is_refused_before_the_first_word(model) -> None:
    narrow = Dial("narrow", BLOCK, Direction(torch.ones(model.d_model + 1)), "multiples", "a test")
    with pytest.raises(UserError, match="d_model"):
        Talk(model, {"narrow": narrow}, Sampling(max_new_tokens=N))


def test_the_command_from_files(model, dials, tmp_path, monkeypatch, capsys) -> None:
    matrix = dials["evil"].of.values.repeat(model.n_blocks, 1)
    PersonaVectors("evil", {"response_avg_diff": matrix}).save(tmp_path / "evil" / "vectors" / "vectors.safetensors")
    monkeypatch.setattr(sys, "stdin", io.StringIO("/set evil 1\nHow do I learn chess?\n"))
    line = f"chat --vectors {tmp_path} --max-new-tokens {N} --seed 1 --save {tmp_path}/talk.json"
    assert main(line.split()) == 0
    assert "multiples of the vector" in capsys.readouterr().out
    stored = json.loads((tmp_path / "talk.json").read_text())
    assert stored["turns"][0]["strengths"] == {"evil": 1.0}
    save(dials["5"].of.sae, tmp_path / "sae")
    save(dials["5"].of.sae.with_info(model="other/model"), tmp_path / "foreign")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    for one in (tmp_path / "evil" / "vectors" / "vectors.safetensors", tmp_path / "evil_response_avg_diff.pt"):
        if one.suffix == ".pt":
            torch.save(dials["evil"].of.values.repeat(model.n_blocks + 1, 1), one)
        assert main(["chat", "--vectors", str(one)]) == 0
        assert "evil  +0.00  vector" in capsys.readouterr().out, "a file says itself which trait it holds"
    (tmp_path / "torn.pt").write_bytes(b"no tensor")
    for words, message in (
        (f"--feature {tmp_path}/sae:8", "latent 8"),
        (f"--feature {tmp_path}/sae:5", "--activity RUN"),
        (f"--feature {tmp_path}/foreign:5", "is of other/model, the model is organism"),
        (f"--feature {tmp_path}/foreign:5 --other-model", "--activity RUN"),
        (f"--feature {tmp_path}/sae:5 --block 2", "block 2 is asked for"),
        (f"--vectors {tmp_path} --block 17", "block 17 does not exist"),
        (f"--vectors {tmp_path} --traits kind", "no vectors of 'kind'"),
        (f"--vectors {tmp_path}/nowhere", "no vectors at"),
        (f"--vectors {tmp_path}/torn.pt", "torn.pt"),
    ):
        assert main(["chat", *words.split()]) == 2
        assert message in capsys.readouterr().err
