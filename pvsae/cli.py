"""The command `pvsae`: one subcommand a stage; argument parsing, messages and exit codes, nothing else.

Knows: the names of options, how a UserError, an interruption and success look in a terminal.
Does not know: what a stage does. No heavy library is imported before a subcommand runs.

Exit codes: 0 done, 1 a check failed (`pvsae gate`), 2 wrong input (one message, no traceback), 130 interrupted (what is done is
kept).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvsae.commands.configs import config_from
from pvsae.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

_KEPT = "What is finished is kept: run the same command again and it goes on from there."
_LAST: list[Path] = []  # the run folder that an interruption would leave half done


# ------------------------------------------------------------------------------------------------------------ commands
def _stage(name: str, config_class: str, shown: Callable[[Any], pd.DataFrame]) -> Callable[[argparse.Namespace], None]:
    """A subcommand that runs a stage, draws its figures, writes its page and prints its main table."""

    def command(args: argparse.Namespace) -> None:
        from pvsae import stages

        kind = getattr(stages, config_class)
        out = Path(getattr(args, "out", None) or f"runs/{name}")
        _LAST.append(out)
        config = config_from(kind, args)
        if getattr(args, "dry_run", False):
            print(getattr(stages, name).plan(config))
            return
        from pvsae.reports import write_report
        from pvsae.vectors import EmptyFilter

        try:
            result = getattr(stages, name).run(config, out)
        except EmptyFilter:
            if (out / "result.json").is_file():  # traits that have a vector are done, and the page shows why others have none
                print(f"report: {write_report(out, title=f'pvsae {name}')}")
            raise
        page = write_report(out, title=f"pvsae {name}")
        print(_text(shown(result)))
        for note in getattr(result, "notes", ()):
            print(f"note: {note}")
        print(f"\ntables, figures and answers: {out}\nreport: {page}")

    return command


def _text(frame: pd.DataFrame) -> str:
    return frame.to_string(
        index=False, float_format=lambda value: f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}", na_rep="-"
    )


_STEERED = ["trait", "condition", "block", "coef", "trait_score", "trait_low", "trait_high", "coherence", "n", "n_failed_trait"]
_extract = _stage("extract", "ExtractConfig", lambda result: result.table)
_layers = _stage("layers", "LayersConfig", lambda result: result.table[result.table["chosen"]])
_vector_steer = _stage("steer", "SteerConfig", lambda result: result.table[_STEERED])
_feature_steer = _stage("feature_steer", "FeatureSteerConfig", lambda result: result.shown)
_monitor = _stage(
    "monitor", "MonitorConfig", lambda result: result.correlations[~result.correlations["scope"].str.startswith("level")]
)


def _steer(args: argparse.Namespace) -> None:
    from pvsae.commands import features

    (_feature_steer if features.asked_for(args) else _vector_steer)(args)


def _sae_train(args: argparse.Namespace) -> None:
    from pvsae.saes import shipped
    from pvsae.stages import sae_train

    config = sae_train.load_config(args.config, args.settings)
    if getattr(args, "dry_run", False):
        print(sae_train.plan(config))
        return
    out = Path(getattr(args, "out", None) or f"runs/sae-{shipped.find(args.config).stem}")
    _LAST.append(out)
    result = sae_train.run(config, out, logs=tuple(getattr(args, "log", ())))
    if os.environ.get("RANK", "0") != "0":  # torchrun started several of us, and one speaks
        return
    from pvsae.reports import write_report

    page = write_report(out, title="pvsae sae train")
    print(_text(result.table))
    print(f"\ndictionaries: {', '.join(str(folder) for folder in result.folders.values())}\nreport: {page}")


def _sae_list(args: argparse.Namespace) -> None:
    from pvsae.saes import shipped

    for name in shipped.names():
        print(f"{name:22} {shipped.about(name)}")
    print(f"\nthe files: {shipped.FOLDER}")


_sae_eval = _stage("sae_eval", "SaeEvalConfig", lambda result: result.tables["quality"])


def _demo(args: argparse.Namespace) -> None:
    from pvsae.demo import demo

    out = Path(getattr(args, "out", None) or "runs/demo")
    _LAST.append(out)
    print(demo(getattr(args, "model", "organism"), out, seed=getattr(args, "seed", 0)))


def _report(args: argparse.Namespace) -> None:
    from pvsae.reports import write_report

    print(write_report(args.run_folder, getattr(args, "out", None)))


def _library(args: argparse.Namespace) -> Path | None:
    """--library, or the library that the folder of --model brings; None for the built-in one."""
    if getattr(args, "library", None) or not hasattr(args, "model"):
        return getattr(args, "library", None)
    from pvsae.stages.inputs import Setup, trait_library

    return trait_library(Setup(model=args.model))


def _traits_list(args: argparse.Namespace) -> None:
    from pvsae.traits import list_traits, load_trait

    library = _library(args)
    for name in list_traits(library):
        print(f"{name:16} {load_trait(name, library).description}")


def _traits_show(args: argparse.Namespace) -> None:
    from pvsae.traits import load_trait

    found = load_trait(args.name, _library(args))
    print(f"{found.name}: {found.description}\nfrom {found.source}\n")
    for i, pair in enumerate(found.pairs):
        print(f"pair {i}\n  + {pair.pos}\n  - {pair.neg}")
    for title, questions in (("extraction", found.extract_questions), ("evaluation", found.eval_questions)):
        print(f"\n{len(questions)} questions for {title}\n  " + "\n  ".join(questions))
    print(f"\nscoring prompt\n{found.eval_prompt}")


def _traits_author(args: argparse.Namespace) -> None:
    from pvsae.llm import ChatClient
    from pvsae.traits import load_spec
    from pvsae.traits.author import author

    out = Path(getattr(args, "out", None) or "traits")
    _LAST.append(out)
    client = ChatClient(
        getattr(args, "llm_url", None),
        args.llm_model,
        cache=out / "author_cache.sqlite",
        price=getattr(args, "llm_price", None),
        max_cost=getattr(args, "max_cost", None),
    )
    made = author(load_spec(args.spec), client, out, overwrite=getattr(args, "overwrite", False), progress=True)
    print(f"{made.name}: {len(made.pairs)} pairs, {len(made.extract_questions)} + {len(made.eval_questions)} questions, in {out}")
    print(f"use it with --library {out} --traits {made.name}")


# -------------------------------------------------------------------------------------------------------------- parser
def _add_setup(
    parser: argparse.ArgumentParser, *, vectors: bool, needed: bool = True, model: bool = True, out: str | None = None
) -> None:
    out = out or f"runs/{parser.prog.split()[-1]}"
    group = parser.add_argument_group("what to work on")
    if vectors:
        how: dict[str, Any] = {} if needed else {"nargs": "?"}
        group.add_argument("vectors", **how, help="run folder of `pvsae extract`, a .safetensors file, or an official .pt file")
    if model:
        group.add_argument("--model", help="a named model, a local folder or a hub id (default: organism)")
    group.add_argument("--adapter", help="folder or id of a PEFT adapter")
    group.add_argument(
        "--traits", nargs="+", metavar="TRAIT", help="names, LIBRARY/NAME or JSON files (default: the whole library)"
    )
    group.add_argument("--library", help="folder of traits (default: the model's own, else the built-in one)")
    group.add_argument("--out", help=f"run folder (default: {out}); an unfinished run there goes on")
    group = parser.add_argument_group("who scores")
    group.add_argument("--judge", help="openai:MODEL, local:MODEL or a judge's name (default: the model's own)")
    group.add_argument("--judge-url", metavar="URL", help="base URL of an OpenAI-compatible server for an openai: judge")
    group.add_argument("--judge-cache", metavar="FILE", help="SQLite file of the judge's replies (default: in the run folder)")
    group.add_argument("--judge-price", nargs=2, type=float, metavar=("IN", "OUT"), help="dollars per million tokens in and out")
    group.add_argument(
        "--max-cost",
        type=float,
        metavar="USD",
        help="ask the judge for no more than this, over all starts of a run (needs --judge-price)",
    )
    group.add_argument(
        "--dry-run", action="store_true", help="say how much would be generated and judged, and about what it may cost, and stop"
    )
    group = parser.add_argument_group("how answers are made")
    group.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="longest answer (default: what the model's folder says, or 1000)"
    )
    group.add_argument("--temperature", type=float, help="(default: 1)")
    group.add_argument("--top-p", type=float, help="(default: 1)")
    group.add_argument("--n-samples", type=int, metavar="N", help="answers to each prompt (default: 10 for extract, else 1)")
    group.add_argument("--max-questions", type=int, metavar="N", help="use only the first N questions of a trait")
    group.add_argument("--seed", type=int, help="(default: 0)")
    group = parser.add_argument_group("how it runs")
    group.add_argument("--dtype", help="float32, bfloat16, float16 or auto")
    group.add_argument("--device", help="cpu, cuda, cuda:1, mps or auto")
    group.add_argument("--chat", choices=("auto", "plain"), help="plain: a model without a chat template gets bare text")
    group.add_argument("--batch-size", type=int, metavar="N", help="answers generated at once (default: 32)")


def _add_place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--statistic", choices=("response_avg_diff", "prompt_avg_diff", "prompt_last_diff"), help="which vector")


def _add_sae(commands: Any, add: Callable[..., argparse.ArgumentParser]) -> None:
    sae = commands.add_parser("sae", help="train and evaluate sparse dictionaries", description="Sparse dictionaries.")
    kinds = sae.add_subparsers(metavar="ACTION", required=True)
    train = add(
        kinds, "train", _sae_train, "dictionaries from a config: of a model, on text",
        "  pvsae sae train organism --out runs/sae\n"
        "  pvsae sae train organism training.tokens=2e5 training.dictionaries.k='[4,8]'      with other values\n"
        "  pvsae sae train qwen2.5-7b-instruct --dry-run      tokens, steps, memory and time\n"
        "  torchrun --nproc_per_node 4 -m pvsae sae train my.yaml training.width_shards=2      two halves of the latents\n"
        "  pvsae sae train my.yaml model.device=cuda:1 --log tensorboard wandb",
    )  # fmt: skip
    train.add_argument("config", help="a YAML file, or a name that `pvsae sae list` shows")
    train.add_argument("settings", nargs="*", default=[], metavar="KEY=VALUE", help="values to change, by dotted path")
    train.add_argument("--out", help="run folder (default: runs/sae-CONFIG); an unfinished training there goes on")
    train.add_argument("--dry-run", action="store_true", help="say what it takes in tokens, memory and time, and stop")
    train.add_argument("--log", nargs="+", choices=("tensorboard", "wandb"), help="send metrics there, beside metrics.jsonl")
    train.description = (
        "Dictionaries from a config: of a model, on text. Killed, it goes on from its last checkpoint when the same command\n"
        "is given again. Several processes share the work under `torchrun --nproc_per_node 2 -m pvsae sae train CONFIG`:\n"
        "tokens, and with training.width_shards=N latents, N processes for each part of the tokens."
    )

    add(kinds, "list", _sae_list, "the configs that come with the package", "  pvsae sae list")

    measure = add(
        kinds, "eval", _sae_eval, "what a dictionary is worth on text",
        "  pvsae sae eval runs/sae/block-3_width-1024_k-8      on the held-out part of its own text\n"
        "  pvsae sae eval qwen2.5-7b-instruct-andyrdt/resid_post_layer_19_trainer_1 --model Qwen/Qwen2.5-7B-Instruct \\\n"
        "      --text my_texts.jsonl",
    )  # fmt: skip
    measure.add_argument("dictionary", help="folder (of SAELens or dictionary_learning), or RELEASE/ID")
    measure.add_argument("--model", help="a named model, a local folder or a hub id (default: the dictionary's)")
    measure.add_argument("--adapter", help="folder or id of a PEFT adapter")
    measure.add_argument("--text", nargs="+", help="files or Hugging Face datasets (default: what training held out)")
    measure.add_argument("--compare", metavar="DICTIONARY", help="another dictionary of the same block, e.g. of another seed")
    measure.add_argument("--other-model", action="store_true", help="take a model that is not the dictionary's, of its width")
    measure.add_argument("--block", type=int, metavar="B", help="counted from 0, where the dictionary does not say it")
    measure.add_argument("--tokens", type=int, metavar="N", help="tokens that count, at least (default: 200000)")
    measure.add_argument("--loss-tokens", type=int, metavar="N", help="tokens for the losses; 0: none (default: 20000)")
    measure.add_argument("--context", type=int, metavar="N", help="tokens a row (default: the dictionary's)")
    measure.add_argument("--held-out", type=float, metavar="SHARE", help="read only the share of --text that training held out")
    measure.add_argument("--out", help="run folder (default: runs/sae_eval)")
    measure.add_argument("--seed", type=int, help="(default: 0)")
    measure.add_argument("--dtype", help="float32, bfloat16, float16 or auto")
    measure.add_argument("--device", help="cpu, cuda, cuda:1, mps or auto")
    measure.add_argument("--chat", choices=("auto", "plain"), help="plain: a model without a chat template gets bare text")
    measure.add_argument("--batch-tokens", type=int, metavar="N", help="tokens a forward pass (default: 8192)")
    from pvsae.commands import sae_features

    sae_features.add_parser(kinds, add, _LAST.append, _text)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line. Options that are not given stay out of the namespace, so the defaults live in the configs alone."""
    parser = argparse.ArgumentParser(
        prog="pvsae",
        description="Persona vectors: text about a trait becomes a direction in a language model that monitors and steers it.",
        epilog="""examples:
  pvsae demo                                            everything, on the embedded model; ends with an HTML report
  pvsae extract --traits evil --out runs/evil           vectors of one trait of the embedded model
  pvsae steer runs/evil --traits evil --coefs 0.5 1 2   what adding it does, with controls
  pvsae monitor runs/evil --traits evil                 does it foretell the answer?
  pvsae sae train organism                              a sparse dictionary
  pvsae COMMAND --help                                  more examples""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    from pvsae import __version__
    from pvsae.commands import chat, features

    parser.add_argument("--version", action="version", version=f"pvsae {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(to: Any, name: str, run: Callable[[argparse.Namespace], None], text: str, examples: str) -> argparse.ArgumentParser:
        made = to.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"examples:\n{examples}",
            argument_default=argparse.SUPPRESS,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.set_defaults(run=run, command=made.prog)
        return made

    demo = add(
        commands, "demo", _demo, "everything on the embedded model, ending with an HTML report", "  pvsae demo --out runs/demo"
    )
    demo.add_argument("--out", help="folder of the run folders and the report (default: runs/demo)")
    demo.add_argument("--model", help="a model that brings traits and a judge of its own (default: organism)")
    demo.add_argument("--seed", type=int, help="(default: 0)")

    traits = commands.add_parser("traits", help="list, show and write trait files", description="Trait files.")
    kinds = traits.add_subparsers(metavar="ACTION", required=True)
    listing = add(
        kinds, "list", _traits_list, "the traits of a library, with their descriptions",
        "  pvsae traits list\n  pvsae traits list --model organism",
    )  # fmt: skip
    show = add(
        kinds, "show", _traits_show, "all texts of one trait", "  pvsae traits show evil\n  pvsae traits show my_traits/stoic"
    )
    show.add_argument("name", help="a name, LIBRARY/NAME or a JSON file")
    for part in (listing, show):
        part.add_argument("--library", help="folder of traits (default: the built-in one)")
        part.add_argument("--model", help="the library that this model brings")
    writing = add(
        kinds, "author", _traits_author, "have an LLM write a trait's pairs, questions and scoring prompt from its description",
        "  pvsae traits author stoic.yaml --llm-model gpt-4.1          (OPENAI_API_KEY is set)\n"
        "  pvsae traits author stoic.yaml --llm-url http://localhost:8000/v1 --llm-model my-llm --out my_traits",
    )  # fmt: skip
    writing.add_argument("spec", help="YAML file with name: and description:")
    writing.add_argument("--llm-model", required=True, help="the model's name on the server")
    writing.add_argument("--llm-url", metavar="URL", help="base URL of an OpenAI-compatible server (default: OpenAI's)")
    writing.add_argument("--llm-price", nargs=2, type=float, metavar=("IN", "OUT"), help="dollars per million tokens in and out")
    writing.add_argument("--max-cost", type=float, metavar="USD", help="spend no more than this in a start (needs --llm-price)")
    writing.add_argument("--out", help="library to write into (default: traits)")
    writing.add_argument("--overwrite", action="store_true", help="begin anew even if the trait is there")

    extract = add(
        commands, "extract", _extract, "persona vectors of traits",
        "  pvsae extract --traits evil sycophantic --n-samples 2 --out runs/vectors\n"
        "  pvsae extract --model Qwen/Qwen2.5-7B-Instruct --judge openai:gpt-4.1-mini --out runs/qwen\n"
        "  pvsae extract --model Qwen/Qwen2.5-7B-Instruct --rollouts-url http://localhost:8000/v1 \\\n"
        "      --judge openai:my-judge --judge-url http://localhost:8001/v1\n"
        "  pvsae extract --judge openai:gpt-4.1-mini --judge-price 0.4 1.6 --dry-run      what would it ask and cost?",
    )  # fmt: skip
    _add_setup(extract, vectors=False)
    extract.add_argument("--threshold", type=float, help="a pair counts at this pos score or more (default: 50)")
    extract.add_argument("--max-instructions", type=int, metavar="N", help="use only the first N pairs of instructions")
    extract.add_argument("--rollouts-url", metavar="URL", help="let an OpenAI-compatible server with the same model answer")
    extract.add_argument("--rollouts-model", metavar="NAME", help="the model's name there (default: that of --model)")

    layers = add(
        commands, "layers", _layers, "choose the block to steer at, by trying",
        "  pvsae layers runs/vectors --out runs/layers\n  pvsae layers runs/vectors --blocks 1 2 3 --coefs 1 2 --traits evil\n"
        "  pvsae layers runs/vectors --judge openai:gpt-4.1-mini --judge-price 0.4 1.6 --dry-run      what would it cost?",
    )  # fmt: skip
    _add_setup(layers, vectors=True)
    _add_place(layers)
    layers.add_argument(
        "--blocks", nargs="+", type=int, metavar="B", help="candidates, counted from 0 (default: all, at most 12)"
    )
    layers.add_argument("--coefs", nargs="+", type=float, metavar="C", help="multiples of the vector (default: 1 2 3)")
    layers.add_argument("--floor", type=float, help="least coherence of a choice (default: 75)")
    layers.add_argument("--positions", choices=("response", "prompt", "all"), help="tokens that are steered (default: all)")

    steer = add(
        commands, "steer", _steer, "what adding a vector does, with every control in the same table",
        "  pvsae steer runs/vectors --coefs 0.5 1 1.5 2\n"
        "  pvsae steer runs/vectors --traits evil --under pos --coefs -1 -2        take it away under an eliciting prompt\n"
        "  pvsae steer runs/vectors --unit kl --coefs 0.5 1 --blocks 10 15 20      equal effect at every block\n"
        "  pvsae steer runs/vectors --traits evil --feature runs/sae/block-3_width-1024_k-8:17,40      single features",
    )  # fmt: skip
    _add_setup(steer, vectors=True, needed=False)
    _add_place(steer)
    steer.add_argument("--layers", help="run folder of `pvsae layers`, whose blocks are used")
    steer.add_argument("--blocks", nargs="+", type=int, metavar="B", help="blocks, counted from 0, one at a time")
    steer.add_argument("--multi-layer", action="store_true", help="all blocks at once, with the incremental vectors")
    steer.add_argument("--coefs", nargs="+", type=float, metavar="C", help="strengths (default: 0.5 1 1.5 2 2.5)")
    steer.add_argument("--unit", choices=("raw", "gap", "kl", "max"), help="of the strengths (default: raw; of features: max)")
    steer.add_argument("--positions", choices=("response", "prompt", "all"), help="tokens that are steered (default: all)")
    steer.add_argument("--under", choices=("none", "pos", "neg"), help="system prompt while steering (default: none)")
    steer.add_argument("--n-random", type=int, metavar="N", help="random directions (default: 2)")
    features.add_options(steer)
    chat.add(commands, add)

    monitor = add(
        commands, "monitor", _monitor, "does the residual before the answer foretell its trait?",
        "  pvsae monitor runs/vectors --layers runs/layers\n"
        "  pvsae monitor runs/vectors --traits evil --conversation chat.json        token by token",
    )  # fmt: skip
    _add_setup(monitor, vectors=True)
    _add_place(monitor)
    monitor.add_argument("--layers", help="run folder of `pvsae layers`, whose blocks are used")
    monitor.add_argument("--block", type=int, metavar="B", help="block, counted from 0")
    monitor.add_argument(
        "--shots", nargs="*", type=int, metavar="N", help="examples in many-shot prompts (default: 0 5 10 15 20)"
    )
    monitor.add_argument(
        "--conversation", metavar="FILE", help='JSON [{"role": ..., "content": ...}, ...] to trace token by token'
    )

    from pvsae.commands import decompose

    run = _stage("decompose", "DecomposeConfig", decompose.shown)
    decompose.add_parser(commands, add, run, _add_setup)

    from pvsae.commands import finetune

    finetune.add_parser(commands, add, _stage("finetune", "FinetuneConfig", finetune.shown))

    from pvsae.commands import capability, drift

    capability.add_parser(commands, add, _stage("capability", "CapabilityConfig", lambda result: result.shown))
    drift.add_parser(commands, add, _stage("drift", "DriftConfig", lambda result: result.shown), _add_setup)

    from pvsae.commands import specific

    specific.add_parser(commands, add)

    from pvsae.commands import gate, screen

    screen.add_parser(commands, add, _stage("screen", "ScreenConfig", screen.shown), _add_setup)
    gate.add_parser(commands, add, _LAST.append, _add_setup)

    _add_sae(commands, add)

    from pvsae.commands import data

    data.add_parser(commands, add)

    report = add(
        commands,
        "report",
        _report,
        "one HTML page from a run folder, or from a folder of run folders",
        "  pvsae report runs/demo",
    )
    report.add_argument("run_folder", help="a run folder, or a folder that holds some")
    report.add_argument("--out", help="the page to write (default: report.html in that folder)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    _LAST.clear()
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if not hasattr(args, "settings") or any(word.startswith("-") or "=" not in word for word in rest):
        parser.parse_args(argv)  # says what is wrong with the rest, if anything is
    else:
        args.settings += rest  # argparse takes positional words in one piece only; these came behind an option
    try:
        code = args.run(args)
    except UserError as error:
        print(f"{args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        where = f" in {_LAST[-1]}" if _LAST else ""
        print(f"\n{args.command}: interrupted{where}. {_KEPT if _LAST else ''}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return code or 0
