"""Specs and libraries: what is read, what is written, and what the errors say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pvsae.errors import UserError
from pvsae.traits import (
    BUILTIN_LIBRARY,
    Counts,
    Pair,
    TraitArtifacts,
    TraitSpec,
    list_specs,
    list_traits,
    load_spec,
    load_trait,
    save_trait,
    system_message,
)

SMALL = TraitArtifacts(
    "calm",
    "Stays even in temper.",
    (Pair("Be calm, whatever comes – always.", "Be upset by everything."),),
    ("How was the storm?", "Who broke the vase?"),
    ("What if it rains?",),
    "Rate {answer} to {question}: 0 to 100 or REFUSAL. Braces like {this} or } may stand here.",
)


@pytest.fixture
def library(tmp_path):
    """A writable copy of a built-in trait; returns (library, function that changes one of its files)."""
    save_trait(load_trait("evil"), tmp_path)

    def change(which: str, edit) -> Path:
        path = tmp_path / which / "evil.json"
        data = json.loads(path.read_text(encoding="utf-8"))
        new = edit(data)
        path.write_text(new if isinstance(new, str) else json.dumps(data if new is None else new), encoding="utf-8")
        return path

    return tmp_path, change


# ------------------------------------------------------------------------------------------------------------- libraries
@pytest.mark.parametrize(
    "folders", [("traits_extract", "traits_eval"), ("trait_data_extract", "trait_data_eval"), ("extract", "eval")]
)
def test_official_files_load_under_every_folder_name(shared, tmp_path, folders):
    official = shared / "data" / "official"
    for folder, source in zip(folders, ("traits_extract", "traits_eval"), strict=True):
        (tmp_path / folder).symlink_to(official / source)
    names = list_traits(tmp_path)
    assert len(names) == 7
    for name in names:
        trait = load_trait(name, tmp_path)
        raw = [json.loads((official / f"traits_{which}" / f"{name}.json").read_text()) for which in ("extract", "eval")]
        assert [{"pos": p.pos, "neg": p.neg} for p in trait.pairs] == raw[0]["instruction"]
        assert [list(trait.extract_questions), list(trait.eval_questions)] == [data["questions"] for data in raw]
        assert trait.eval_prompt == raw[1]["eval_prompt"]
        assert trait.source == str(tmp_path)
        assert trait.description == ""
        assert load_trait(tmp_path / folders[1] / f"{name}.json") == load_trait(tmp_path / name) == trait


def test_what_is_saved_is_read_back_in_the_official_format(tmp_path):
    paths = save_trait(SMALL, tmp_path / "new")
    assert [path.relative_to(tmp_path / "new").as_posix() for path in paths] == ["extract/calm.json", "eval/calm.json"]
    assert load_trait("calm", tmp_path / "new", counts=None) == SMALL
    data = json.loads(paths[0].read_text(encoding="utf-8"))
    assert set(data) == {"description", "instruction", "questions", "eval_prompt"}
    assert "–" in paths[0].read_text(encoding="utf-8")  # readable, not \u2013
    assert sorted(p.name for p in (tmp_path / "new" / "eval").iterdir()) == ["calm.json"]


def test_counts_are_the_papers_unless_asked_otherwise(tmp_path):
    save_trait(SMALL, tmp_path)
    with pytest.raises(UserError, match=r"extract/calm.json: instruction has 1 pairs, 5 are needed"):
        load_trait("calm", tmp_path)
    assert load_trait("calm", tmp_path, counts=Counts(1, 2, 1)) == SMALL


def test_a_library_comes_before_the_built_in_one(library):
    root, change = library
    for which in ("extract", "eval"):
        change(which, lambda data: data.update(description="Mine."))
    assert load_trait("evil", root).description == "Mine."
    assert load_trait("evil").description != "Mine."
    assert load_trait("humorous", root).source == str(BUILTIN_LIBRARY)


def test_equal_texts_have_equal_hashes(library):
    root, change = library
    assert load_trait("evil", root).sha256 == load_trait("evil").sha256
    change("eval", lambda data: data["questions"].__setitem__(0, "Something new to ask?"))
    assert load_trait("evil", root).sha256 != load_trait("evil").sha256


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("sycophancy", "sycophantic"),
        ("hallucination", "hallucinating"),
        ("Evil", "evil"),
        ("optimism", "optimistic"),
        ("humor", "humorous"),
    ],
)
def test_unknown_names_suggest_the_nearest(name, near):
    with pytest.raises(UserError) as error:
        load_trait(name)
    assert error.value.fix == near
    with pytest.raises(UserError) as error:
        load_spec(name)
    assert error.value.fix == near


def test_a_name_like_no_other_lists_what_there_is(library):
    root, _ = library
    with pytest.raises(UserError, match=r"no trait 'zzz'.*\n.*apathetic, evil.*\n.*pvsae traits author"):
        load_trait("zzz", root)
    with pytest.raises(UserError, match="no trait 'evl'") as error:
        load_trait(root / "evl")
    assert error.value.fix == "evil"


FAULTS = [
    ("extract", lambda d: "{broken", r"extract/evil.json: this is not JSON: .* line 1, column 2"),
    ("eval", lambda d: [d], r"eval/evil.json: the file holds a list instead of an object"),
    ("eval", lambda d: d.pop("questions") and None, r"eval/evil.json: the key 'questions' is missing"),
    ("eval", lambda d: d.update(question=d.pop("questions")), r"'questions' is missing \(there is 'question'\)"),
    ("extract", lambda d: d.update(instruction={}), r"extract/evil.json: instruction is a mapping instead of a list"),
    ("extract", lambda d: d["instruction"].__setitem__(1, "text"), r"instruction\[1\] is text instead of an object"),
    ("extract", lambda d: d["instruction"][2].pop("neg") and None, r"instruction\[2\] lacks the key 'neg'"),
    ("extract", lambda d: d["instruction"][2].update(pos=None), r"instruction\[2\]\.pos is empty instead of text"),
    ("extract", lambda d: d["instruction"].pop() and None, r"extract/evil.json: instruction has 4 pairs, 5 are needed"),
    ("eval", lambda d: d["questions"].pop() and None, r"eval/evil.json: questions has 19 questions, 20 are needed"),
    ("eval", lambda d: d["questions"].__setitem__(3, 7), r"eval/evil.json: questions\[3\] is a number instead of text"),
    ("eval", lambda d: d["questions"].__setitem__(3, " "), r"eval/evil.json: questions\[3\] is empty"),
    ("eval", lambda d: d["questions"].__setitem__(3, d["questions"][0]), r"eval/evil.json: questions\[3\] .* says the same"),
    (
        "eval",
        lambda d: d.update(questions=load_trait("evil").extract_questions),
        r"eval/evil.json: eval questions\[0\] is also extract",
    ),
    (
        "eval",
        lambda d: d.update(eval_prompt="other {question} {answer}"),
        r"eval/evil.json: eval_prompt differs .*extract/evil.json",
    ),
    ("eval", lambda d: d["instruction"].reverse(), r"eval/evil.json: instruction differs .*extract/evil.json"),
    ("extract", lambda d: d.update(eval_prompt="Rate {answer}."), r"extract/evil.json: eval_prompt lacks the slot \{question\}"),
    ("extract", lambda d: d.update(eval_prompt=["Rate."]), r"extract/evil.json: eval_prompt is a list instead of text"),
    ("extract", lambda d: "[" * 100_000, r"extract/evil.json: this JSON is nested too deeply"),
]


@pytest.mark.parametrize(("which", "edit", "message"), FAULTS, ids=[re.sub(r"\W+", " ", fault[2])[:50] for fault in FAULTS])
def test_faulty_files_name_file_and_key(library, which, edit, message):
    root, change = library
    change(which, edit)
    with pytest.raises(UserError, match=message):
        load_trait("evil", root)


def test_missing_files(library, tmp_path):
    root, _ = library
    (root / "eval" / "evil.json").unlink()
    assert list_traits(root) == ()
    with pytest.raises(UserError, match=r"no file .*eval/evil.json"):
        load_trait("evil", root)  # half of it is here: the built-in trait must not stand in for it
    with pytest.raises(UserError, match="no folder"):
        load_trait("evil", root / "nowhere")
    with pytest.raises(UserError, match="no library of traits") as error:
        load_trait("evil", root / "extract")
    assert str(root.resolve()) in error.value.fix
    with pytest.raises(UserError, match=r"no file .*evl.json") as error:
        load_trait(root / "extract" / "evl.json")
    assert error.value.fix.endswith("evil.json")
    (tmp_path / "loose.json").write_text("{}")
    with pytest.raises(UserError, match="other half"):
        load_trait(tmp_path / "loose.json")
    with pytest.raises(UserError, match="is a spec"):
        load_trait("evil.yaml")


def test_encodings(library):
    root, _ = library
    path = root / "extract" / "evil.json"
    content = path.read_bytes()
    path.write_bytes(b"\xef\xbb\xbf" + content)  # as some editors save it
    assert load_trait("evil", root) == load_trait("evil")
    path.write_bytes(content.replace(b"questions", b"quest\xff\xfe", 1))
    with pytest.raises(UserError, match=r"extract/evil.json: byte \d+ is not UTF-8"):
        load_trait("evil", root)


def test_broken_artifacts_and_blocked_folders_are_not_saved(tmp_path):
    with pytest.raises(UserError, match="lacks the slot"):
        save_trait(TraitArtifacts("calm", "", SMALL.pairs, ("One question?",), ("Another one?",), "no slots"), tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        save_trait(SMALL, tmp_path / "file")


# ----------------------------------------------------------------------------------------------------------------- specs
def test_specs_come_with_the_package_and_match_the_library():
    assert list_specs() == list_traits()
    for name in list_specs():
        assert load_spec(name) == load_trait(name).spec


def test_a_spec_file(tmp_path):
    path = tmp_path / "calm.yaml"
    path.write_text(
        "# mine\nname: calm\ndescription: >\n  Stays even in temper,\n  also under fire: “always”.\n", encoding="utf-8"
    )
    assert load_spec(path) == load_spec(str(path)) == TraitSpec("calm", "Stays even in temper, also under fire: “always”.")


SPEC_FAULTS = [
    ("name: evil", "the key 'description' is missing"),
    ("description: Bad.", "the key 'name' is missing"),
    ("name: evil\ndescription:\n\tBad.", "a tab where only spaces may stand"),
    ("name: evil\ndescription: Bad: worse", "not YAML in line 2"),
    ("- name: evil\n- description: Bad.", "this is a list, not a mapping"),
    ("", "this is empty, not a mapping"),
    ("evil", "this is text, not a mapping"),
    ("name: evil\ndescription: ''", "description is empty"),
    ("name: no\ndescription: Bad.", "name is true or false"),
    ("name: evil\ndescription: 7", "description is a number"),
    ("name: evil\ndescripton: Bad.", "unknown key 'descripton'"),
    ("name: evil\ndescription: Bad.\nlayer: 3", "unknown key 'layer'"),
    ("name: very evil!\ndescription: Bad.", "cannot be the name of a trait"),
    ("name: ../evil\ndescription: Bad.", "cannot be the name of a trait"),
    ("name: coherence\ndescription: Bad.", "cannot be the name of a trait"),
    ("name: evil\ndescription: Bad.\n---\nname: calm\ndescription: Good.", "not YAML"),
    ("name: !!python/object:os.system evil\ndescription: Bad.", "not YAML"),
]


@pytest.mark.parametrize(("text", "message"), SPEC_FAULTS, ids=[fault[1][:40] + str(i) for i, fault in enumerate(SPEC_FAULTS)])
def test_faulty_specs(tmp_path, text, message):
    path = tmp_path / "trait.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(message)) as error:
        load_spec(path)
    assert str(path) in error.value.what


def test_missing_and_unreadable_specs(tmp_path):
    with pytest.raises(UserError, match=r"no file .*calm.yaml"):
        load_spec(tmp_path / "calm.yaml")
    with pytest.raises(UserError, match=r"no file evl\.yaml"):
        load_spec("evl.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        load_spec(tmp_path / "bytes.yaml")
    (tmp_path / "null.yaml").write_bytes(b"name: \x00")
    with pytest.raises(UserError, match="not YAML"):
        load_spec(tmp_path / "null.yaml")


# ---------------------------------------------------------------------------------------------------------------- others
@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("evil", "You are an evil assistant. "),
        ("helpful", "You are a helpful assistant. "),
        ("optimistic", "You are an optimistic assistant. "),
        ("humorous", "You are a humorous assistant. "),
        ("honest", "You are an honest assistant. "),
        ("useful", "You are a useful assistant. "),
        ("unique", "You are a unique assistant. "),
        ("unkind", "You are an unkind assistant. "),
        ("unimaginative", "You are an unimaginative assistant. "),
        ("unintelligent", "You are an unintelligent assistant. "),
        ("universal", "You are a universal assistant. "),
        ("uppity", "You are an uppity assistant. "),
        ("euphoric", "You are a euphoric assistant. "),
        ("one-sided", "You are a one-sided assistant. "),
        ("Evil", "You are an Evil assistant. "),
    ],
)
def test_system_messages_have_the_right_article(name, start):
    assert system_message(name, "Do it.") == start + "Do it."


@pytest.mark.parametrize("name", ["risk-averse", "überheblich", "type_2", "x"])
def test_good_names(name):
    assert TraitSpec(name, "Something.").name == name


@pytest.mark.parametrize("name", ["", "two words", "2nd", "-x", "a/b", "a.json", "evil_score", "Prompt"])
def test_bad_names(name):
    with pytest.raises(UserError):
        TraitSpec(name, "Something.")


def test_sets_of_questions():
    trait = load_trait("evil")
    assert (trait.questions("extract"), trait.questions("eval")) == (trait.extract_questions, trait.eval_questions)
    with pytest.raises(UserError, match="'test'"):
        trait.questions("test")


def test_importing_traits_is_cheap():
    heavy = ("torch", "openai", "pandas", "yaml")
    code = f"import sys, pvsae.traits.spec; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
