"""The command line: help without heavy imports, one clear message and exit code 2 for every wrong input."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pvsae.cli import build_parser, main
from pvsae.errors import UserError
from pvsae.traits import Pair, TraitArtifacts, load_trait, save_trait
from pvsae.vectors import PersonaVectors
from tests.plugin import make_plugin
from tests.saes.corpora import write_texts

COMMANDS = [
    "demo", "traits list", "traits show", "traits author", "extract", "layers", "steer", "monitor", "decompose", "report",
    "finetune", "capability", "drift", "screen", "gate", "specific", "sae train", "sae eval", "sae list", "sae features", "chat",
    "data",
]  # fmt: skip


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pvsae", *arguments], capture_output=True, text=True)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_examples_that_parse(name: str, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*name.split(), "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    examples = text.split("examples:\n")[1].replace("\\\n", " ").splitlines()
    examples = [line.split("   ")[0].strip() for line in (e.strip() for e in examples) if line]
    assert examples
    for example in examples:
        example = re.sub(r"^torchrun( --\S+ \S+)* -m ", "", example)
        assert example.startswith(f"pvsae {name}")
        build_parser().parse_args(example.split()[1:])


def test_help_takes_less_than_a_second_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom pvsae.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'numpy', 'pandas', 'transformers', 'matplotlib', 'openai') if m in sys.modules])"
    )
    times = []
    for _ in range(3):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        times.append(time.perf_counter() - started)
    assert done.stdout.splitlines()[-1] == "[]"
    assert min(times) < 1.0


def test_the_installed_command_and_the_module_are_the_same() -> None:
    script = Path(sys.executable).with_name("pvsae")
    by_script = subprocess.run([str(script), "--version"], capture_output=True, text=True, check=True)
    assert by_script.stdout == command("--version").stdout == "pvsae 0.1.0\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_folders):
    """A folder with a model, a library of one trait, vectors of that model and of another, and broken files."""
    root = tmp_path_factory.mktemp("cli")
    shutil.copytree(tiny_folders("qwen2"), root / "model")
    words = [f"thing {i}" for i in range(40)]
    save_trait(
        TraitArtifacts(
            "evil",
            "It is evil.",
            tuple(Pair(f"Be evil, way {i}.", f"Be merry, way {i}.") for i in range(5)),
            tuple(f"What about {w}?" for w in words[:20]),
            tuple(f"What about {w}?" for w in words[20:]),
            "How evil? {question} {answer} 0-100 or REFUSAL.",
        ),
        root / "library",
    )
    generator = torch.Generator().manual_seed(0)
    PersonaVectors("evil", {"response_avg_diff": torch.randn(4, 48, generator=generator)}).save(root / "good.safetensors")
    PersonaVectors("evil", {"response_avg_diff": torch.randn(4, 32, generator=generator)}).save(root / "narrow.safetensors")
    shutil.copytree(root / "library", root / "broken")
    (root / "broken" / "extract" / "evil.json").write_text('{"instruction": [,]}')
    (root / "broken.json").write_text("{")
    (root / "file").write_text("a regular file")
    write_texts(root / "texts.jsonl", 150)
    (root / "sae.yaml").write_text(
        f"""
model: {{name: {root}/model, device: cpu}}
corpus: {{sources: [{{path: {root}/texts.jsonl}}], context: 64, held_out: 0.2, repeat: true}}
stream: {{batch_tokens: 256, buffer_tokens: 2048, calibration_tokens: 512}}
training: {{dictionaries: {{block: 2, d_sae: 64, k: 4}}, tokens: 1280, batch: 128, log_every: 5, calibration_tokens: 500}}
"""
    )
    (root / "noise.safetensors").write_bytes(b"\x00" * 64)
    nan = root / "nan"
    shutil.copytree(root / "model", nan)
    from safetensors.torch import load_file, save_file

    weights = load_file(nan / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][:] = float("nan")
    save_file(weights, nan / "model.safetensors", metadata={"format": "pt"})
    return root


# {p}: the folder above, {out}: a new run folder
QUICK = "--max-questions 2 --max-new-tokens 3 --traits evil --library {p}/library --out {out}"
TINY = "--model {p}/model --judge organism"
EXTRACT, GOOD = f"extract {TINY}", "{p}/good.safetensors"
STEER, MONITOR, LAYERS = (f"{stage} {GOOD} {TINY} {QUICK}" for stage in ("steer", "monitor", "layers"))
SAE = "sae train {p}/sae.yaml"
NOBODY = "http://127.0.0.1:9/v1"
CASES = {
    "missing model": (f"extract --model {{p}}/nowhere --judge organism {QUICK}", "nowhere"),
    "no judge": (f"extract --model {{p}}/model {QUICK}", "no judge for"),
    "unknown judge": (f"extract --model {{p}}/model --judge oracle {QUICK}", "unknown judge 'oracle'"),
    "missing trait file": (f"{EXTRACT} --traits {{p}}/library/extract/sad.json --out {{out}}", "sad.json"),
    "unknown trait": (f"{EXTRACT} --library {{p}}/library --traits evli --out {{out}}", "evil"),
    "wrong JSON": (f"{EXTRACT} --library {{p}}/broken --traits evil --out {{out}}", "not JSON"),
    "empty filter result": (f"{EXTRACT} --n-samples 1 {QUICK}", "passes the filter"),
    "unreachable judge": (f"extract --model {{p}}/model --judge openai:m --judge-url {NOBODY} {QUICK}", "127.0.0.1:9"),
    "unreachable rollouts": (f"{EXTRACT} --rollouts-url {NOBODY} {QUICK}", "127.0.0.1:9"),
    "cost without price": (f"extract --model {{p}}/model --judge openai:m --max-cost 1 {QUICK}", "without prices"),
    "NaN activations": (f"monitor {GOOD} --model {{p}}/nan --judge organism --shots 0 --block 2 {QUICK}", "not finite"),
    "unknown block": (f"{STEER} --blocks 4", "block 4 does not exist"),
    "unknown block to read": (f"{MONITOR} --block -1", "block -1"),
    "unknown block to try": (f"{LAYERS} --blocks 9", "block 9"),
    "nothing to steer with": (f"steer {TINY} {QUICK}", "nothing to steer with"),
    "options of features": (f"{STEER} --together", "--together without --feature"),
    "options of vectors": (f"{STEER} --multi-layer --feature {{p}}/sae:1", "--multi-layer with --feature"),
    "missing dictionary of a feature": (f"steer {TINY} {QUICK} --feature {{p}}/sae:1", "there is no dictionary"),
    "mismatched d_model": (f"steer {{p}}/narrow.safetensors {TINY} {QUICK}", "d_model=32"),
    "noise as vectors": (f"steer {{p}}/noise.safetensors {TINY} {QUICK}", "noise.safetensors"),
    "missing vectors": (f"steer {{p}}/none {TINY} {QUICK}", "no vectors at"),
    "missing conversation": (f"{MONITOR} --conversation {{p}}/none.json", "not found"),
    "broken conversation": (f"{MONITOR} --conversation {{p}}/broken.json", "line 1"),
    "a file where a folder should be": (f"{EXTRACT} --library {{p}}/library --out {{p}}/file/run", "cannot write"),
    "read-only file system": (f"{EXTRACT} --library {{p}}/library --out /proc/pvsae-run", "cannot write"),
    "a folder of something else": (f"{EXTRACT} --library {{p}}/library --out {{p}}/library", "not a run folder"),
    "report of nothing": ("report {p}/nowhere", "no such folder"),
    "unknown config": ("sae train organsim --out {out}", "did you mean organism?"),
    "unknown key": ("sae train organism trainig.tokens=5 --out {out}", "did you mean training?"),
    "a wrong type behind an option": ("sae train organism --out {out} training.batch=many", "training.batch is 'many'"),
    "config without a model": ("sae train stories260k --out {out}", "model.name is missing"),
    "training on a missing model": ("sae train organism model.name={p}/nowhere --out {out}", "nowhere"),
    "training on missing text": (f"{SAE} corpus.sources.0.path={{p}}/no.jsonl --out {{out}}", "no.jsonl"),
    "training on an unknown corpus": (
        f"{SAE} corpus.sources.0.path=null corpus.sources.0.named=org corpus.sources.0.max_samples=5 --out {{out}}",
        "'org'",
    ),
    "training of an unknown block": (f"{SAE} training.dictionaries.block=9 --out {{out}}", "block 9"),
    "plan of an unknown block": (f"{SAE} training.dictionaries.block=9 --dry-run", "0 to 3"),
    "training in a folder of something else": (f"{SAE} --out {{p}}/library", "not a run folder"),
    "evaluation of nothing": ("sae eval {p}/nowhere --text {p}/texts.jsonl --out {out}", "nowhere"),
    "author from nothing": ("traits author {p}/none.yaml --llm-model m --out {out}", "none.yaml"),
    "author without a server": (f"traits author {{p}}/stoic.yaml --llm-model m --llm-url {NOBODY} --out {{out}}", "127.0.0.1:9"),
}


@pytest.mark.parametrize("case", CASES)
def test_wrong_input_is_one_message_and_exit_code_2(case: str, place: Path, tmp_path: Path, capsys) -> None:
    (place / "stoic.yaml").write_text("name: stoic\ndescription: Bears everything without complaint.\n")
    line, message = CASES[case]
    code = main(line.format(p=place, out=tmp_path / "run").split())
    err = capsys.readouterr().err
    said = [part for part in err.splitlines() if part.startswith("pvsae ")]
    assert code == 2, err
    assert len(said) == 1, err
    assert message in err
    assert "Traceback" not in err


def test_no_traceback_in_a_process_of_its_own(place: Path, tmp_path: Path) -> None:
    done = command(*f"steer {{p}}/narrow.safetensors {TINY} {QUICK}".format(p=place, out=tmp_path / "run").split())
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_run_with_other_options_is_refused_with_their_names(place: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    for entry in make_plugin(tmp_path / "plugin"):
        monkeypatch.syspath_prepend(entry)
    line = f"extract --model {place}/model --judge bytes --traits evil --library {place}/library --max-new-tokens 3 --n-samples 1"
    out = ["--out", str(tmp_path / "run"), "--max-questions", "4"]
    assert main([*line.split(), *out, "--judge", "oracle"]) == 2, "a slip, which may be put right under the same folder"
    assert main([*line.split(), *out]) == 0
    assert "evil" in capsys.readouterr().out
    assert main([*line.split(), *out, "--seed", "1"]) == 2
    err = capsys.readouterr().err
    assert "differs in: config.seed, seed" in err
    assert (tmp_path / "run" / "report.html").is_file()


def test_the_page_is_written_even_if_a_trait_has_no_vector(place: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    for entry in make_plugin(tmp_path / "plugin"):
        monkeypatch.syspath_prepend(entry)
    from byte_judge import BlindJudge

    monkeypatch.setattr("pvsae.stages.extract.open_judge", lambda *_: BlindJudge("sad"))
    shutil.copytree(place / "library", tmp_path / "library")
    save_trait(replace(load_trait("evil", place / "library"), name="sad"), tmp_path / "library")
    line = f"extract --model {place}/model --library {tmp_path}/library --max-new-tokens 3 --n-samples 1 --max-questions 4"
    assert main([*line.split(), "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr()
    assert "no vector for sad" in said.err
    assert str(tmp_path / "run" / "report.html") in said.out
    page = (tmp_path / "run" / "report.html").read_text()
    assert "passes the filter" in page
    assert "not finished" not in page


def test_dry_run_counts_and_touches_nothing(place: Path, tmp_path: Path, capsys) -> None:
    line = f"extract --model {place}/model --judge openai:m --judge-price 1 2 --traits evil --library {place}/library --dry-run"
    assert main([*line.split(), "--n-samples", "3", "--out", str(tmp_path / "run")]) == 0
    text = capsys.readouterr().out
    assert "evil: 600 answers of at most 1000 tokens" in text
    assert "1200 scores" in text
    assert "dollars" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("stage", "answers"),
    [
        ("layers", 20 * (1 + 4 * 3)),  # four blocks, three strengths, and once without steering
        ("steer", 20 * (3 + (2 + 2) * 5)),  # three prompts; vector, flip and two random directions at five strengths
        ("monitor", 20 * 8),  # eight prompts, and no examples beside a vector file for more
    ],
)
def test_dry_run_of_the_other_stages_loads_no_model(place: Path, tmp_path: Path, capsys, monkeypatch, stage, answers) -> None:
    monkeypatch.setattr("pvsae.models.load", None)
    line = f"{stage} {place}/good.safetensors --model {place}/model --judge openai:m --judge-price 1 2 --traits evil --dry-run"
    assert main([*line.split(), "--library", str(place / "library"), "--out", str(tmp_path / "run")]) == 0
    text = capsys.readouterr().out
    assert f"evil: {answers} answers of at most 1000 tokens" in text
    assert f"openai:m: {2 * answers} scores" in text
    assert "dollars" in text
    assert not (tmp_path / "run").exists()
    assert main([*line.replace("good", "gone").split(), "--library", str(place / "library")]) == 2


@pytest.mark.parametrize("words", [["layers", "--blocks", "1", "99"], ["steer", "--blocks", "99"], ["monitor", "--block", "99"]])
def test_dry_run_refuses_blocks_that_do_not_exist(place: Path, tmp_path: Path, capsys, words: list[str]) -> None:
    stage, *options = words
    line = f"{stage} {place}/good.safetensors --model {place}/model --judge openai:m --traits evil --dry-run"
    assert main([*line.split(), *options, "--library", str(place / "library"), "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "block 99 does not exist" in said
    assert "from 0 to 3" in said


def test_a_dictionary_from_config_to_evaluation(place: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("PVSAE_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "run"
    words = ["training.dictionaries.k=[2,4]", "--out", str(run), "training.tokens=640"]  # before and behind an option
    assert main(["sae", "train", str(place / "sae.yaml"), *words]) == 0
    said = capsys.readouterr().out
    assert f"report: {run / 'report.html'}" in said
    assert "block-2_width-64_k-2" in said
    assert json.loads((run / "result.json").read_text())["dictionaries"][1]["tokens"] == 640
    assert main(["sae", "train", str(run / "config.yaml"), "--out", str(run)]) == 0, "the saved config is the same training"
    folder = str(run / "block-2_width-64_k-4")
    assert main(["sae", "eval", folder, "--tokens", "500", "--loss-tokens", "200", "--out", str(tmp_path / "eval")]) == 0
    assert "with outliers" in capsys.readouterr().out
    page = tmp_path / "both.html"
    assert main(["report", str(tmp_path), "--out", str(page)]) == 0
    assert all(title in page.read_text() for title in ("Training of dictionaries", "Evaluation of a dictionary"))


def test_dry_run_of_a_training_loads_no_weights(place: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("pvsae.models.load", None)
    monkeypatch.setattr("pvsae.saes.corpus.Corpus", None)
    assert main(["sae", "train", str(place / "sae.yaml"), "--dry-run", "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "tokens    1,280 in 10 steps of 128" in said
    assert "shuffle buffer 197 KB" in said
    assert "time      at least" in said
    assert not (tmp_path / "run").exists()


def test_each_config_has_a_run_folder_of_its_own(monkeypatch, capsys) -> None:
    """Names of models have dots in them."""
    from pvsae.saes import shipped

    opened: list[str] = []

    def run(config: object, out: Path, **_: object) -> None:
        opened.append(str(out))
        raise UserError("not now", "later")

    monkeypatch.setattr("pvsae.stages.sae_train.run", run)
    for name in shipped.names():
        assert main(["sae", "train", name, *(["model.name=x"] if name == "stories260k" else [])]) == 2
    assert opened == [f"runs/sae-{name}" for name in shipped.names()]
    assert main(["sae", "train", "qwen2.5-7b-instrct"]) == 2
    assert "did you mean qwen2.5-7b-instruct?" in capsys.readouterr().err


def test_shipped_configs_are_listed_without_torch() -> None:
    code = "import sys\nfrom pvsae.cli import main\nmain(['sae', 'list'])\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[-1] == "False"
    assert [line.split()[0] for line in lines[:9]] == [
        "llama-3.1-8b-instruct", "llama-3.2-1b-instruct", "organism", "organism-facets", "organism-llama",
        "qwen2.5-0.5b-instruct", "qwen2.5-7b-instruct", "qwen3-1.7b", "stories260k",
    ]  # fmt: skip


@pytest.mark.parametrize("rest", [["training.tokens=5", "--fast"], ["fast"], ["--out", "x", "training.tokens"]])
def test_words_that_are_no_setting_are_refused(rest: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["sae", "train", "organism", "--dry-run", *rest])
    assert stop.value.code == 2
    assert "pvsae: error: unrecognized" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["report", "x", "--out", "y", "a=b"])


def test_traits_are_listed_and_shown(place: Path, capsys) -> None:
    assert main(["traits", "list"]) == 0
    assert "evil" in capsys.readouterr().out
    assert main(["traits", "show", "evil", "--library", str(place / "library")]) == 0
    text = capsys.readouterr().out
    assert "Be evil, way 4." in text
    assert "20 questions for evaluation" in text


def test_a_closed_pipe_is_no_traceback() -> None:
    shell = f"{sys.executable} -m pvsae traits show evil | head -n 1"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    assert "Traceback" not in done.stderr
    assert done.stdout.startswith("evil")


def test_official_vectors_steer_as_they_are(place: Path, tmp_path: Path, capsys) -> None:
    """A .pt file of the released code: row L is the output of block L - 1, and the last row, after the final norm, is refused."""
    torch.save(torch.randn(5, 48, generator=torch.Generator().manual_seed(1)), tmp_path / "evil_response_avg_diff.pt")
    line = (
        f"steer {tmp_path}/evil_response_avg_diff.pt --model {place}/model --judge organism --traits evil --library "
        f"{place}/library --max-questions 2 --max-new-tokens 3 --coefs 1 --n-random 1 --out {tmp_path}/run --blocks"
    )
    assert main([*line.split(), "3"]) == 2
    assert "final norm" in capsys.readouterr().err
    assert main([*line.split(), "2"]) == 0
    summary = json.loads((tmp_path / "run" / "result.json").read_text())
    assert summary["title"] == "Steering"
