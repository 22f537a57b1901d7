"""`pvsae chat`: a talk in the terminal, with vectors and features to turn up and down.

Knows: the commands, how a turn looks in a terminal (coloured text) and elsewhere (plain columns).
Does not know: what a dial does (stages/talk.py). Lines come from standard input, so that a file of them is a script.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TextIO

from pvsae.errors import UserError

if TYPE_CHECKING:
    from pvsae.stages.talk import Dial, Talk, Token, Turn

HELP = """\
  /list               the dials, where they stand and what their units are
  /up NAME [BY]       turn a dial up (by 0.5)
  /down NAME [BY]     turn it down
  /set NAME X         turn it to X
  /off [NAME]         turn it off; without a name, all of them
  /show [NAME ...]    whose readings are shown after a turn (all, none, or names)
  /system [TEXT]      begin anew under a system prompt; without text, under none
  /reset              begin anew; the dials stay
  /save FILE          the session as JSON
  /help, /quit
Anything else is said to the model. The first letters of a name are enough."""
RED, BLUE = (213, 94, 0), (0, 114, 178)


def add(commands: Any, add_command: Callable[..., argparse.ArgumentParser]) -> None:
    """Puts `chat` on the command line."""
    chat = add_command(
        commands, "chat", run, "talk to a model with vectors and features to turn up and down, and see every token's projection",
        "  pvsae chat --vectors runs/vectors --traits evil sycophantic\n"
        "  pvsae chat --feature runs/sae/block-3_width-1024_k-8:17,40 --activity runs/sae_eval\n"
        "  pvsae chat --model Qwen/Qwen2.5-7B-Instruct --vectors runs/qwen --block 19 --save talk.json",
    )  # fmt: skip
    group = chat.add_argument_group("what to talk to")
    group.add_argument("--model", help="a named model, a local folder or a hub id (default: organism)")
    group.add_argument("--adapter", help="folder or id of a PEFT adapter")
    group.add_argument("--dtype", help="float32, bfloat16, float16 or auto")
    group.add_argument("--device", help="cpu, cuda, cuda:1, mps or auto")
    group.add_argument("--chat", choices=("auto", "plain"), help="plain: a model without a chat template gets bare text")
    group.add_argument("--system", metavar="TEXT", help="system prompt")
    group = chat.add_argument_group("what to turn")
    group.add_argument("--vectors", help="run folder of `pvsae extract`, a .safetensors file, or an official .pt file")
    group.add_argument("--traits", nargs="+", metavar="TRAIT", help="whose vectors (default: all in the run folder)")
    group.add_argument("--statistic", choices=("response_avg_diff", "prompt_avg_diff", "prompt_last_diff"), help="which vector")
    group.add_argument("--layers", help="run folder of `pvsae layers`, whose blocks are used")
    group.add_argument("--block", type=int, metavar="B", help="block, counted from 0 (default: of layers, the model, the SAE)")
    group.add_argument("--feature", nargs="+", dest="features", metavar="SAE:INDEX", help="features of dictionaries")
    group.add_argument("--activity", nargs="+", metavar="RUN", help="run folders of `pvsae sae eval`, for highest activations")
    group.add_argument("--activity-tokens", type=int, metavar="N", help="tokens to measure them on otherwise (default: 20000)")
    group.add_argument("--other-model", action="store_true", help="take a dictionary of another model of the same width")
    group.add_argument("--positions", choices=("response", "prompt", "all"), help="tokens that are steered (default: all)")
    group = chat.add_argument_group("how answers are made")
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer (default: the model's, or 1000)")
    group.add_argument("--temperature", type=float, help="(default: 1)")
    group.add_argument("--top-p", type=float, help="(default: 1)")
    group.add_argument("--seed", type=int, help="(default: 0)")
    group.add_argument("--save", metavar="FILE", help="write the session there as JSON, after every turn")


def run(args: argparse.Namespace) -> None:
    """Opens model and dials, then reads lines until /quit or their end."""
    from pvsae.stages.inputs import Setup, open_model
    from pvsae.stages.talk import Talk, dials_of_features, dials_of_vectors
    from pvsae.vectors.persona import DEFAULT_STATISTIC

    given = vars(args)
    names = ("model", "adapter", "dtype", "device", "chat", "max_new_tokens", "temperature", "top_p", "seed")
    setup = Setup(**{name: given[name] for name in names if name in given})
    model = open_model(setup)
    dials: list[Dial] = []
    block = given.get("block")
    if "vectors" in given:
        statistic = given.get("statistic", DEFAULT_STATISTIC)
        dials += dials_of_vectors(given["vectors"], given.get("traits", ()), model, block, given.get("layers"), statistic)
    if "features" in given:
        tokens = given.get("activity_tokens", 20_000)
        other_model = given.get("other_model", False)
        dials += dials_of_features(given["features"], model, block, given.get("activity", ()), tokens, other_model=other_model)
    by_name = {dial.name: dial for dial in dials}
    if len(by_name) < len(dials):
        raise UserError("two dials of one name", "a name each", "give the vectors of a trait once")
    talk = Talk(model, by_name, setup.sampling(model), given.get("system"), given.get("positions", "all"))
    Repl(talk, sys.stdin, sys.stdout, given.get("save")).run()


class Repl:
    """Reads lines, does what they say, and prints."""

    def __init__(self, talk: Talk, lines: TextIO, out: TextIO, save: str | None = None) -> None:
        self.talk, self.lines, self.out, self.autosave = talk, lines, out, save
        self.shown: list[str] = list(talk.dials)
        self.colour = out.isatty() and not os.environ.get("NO_COLOR")

    def run(self) -> None:
        """Until /quit or the end of the lines. What a line does wrong is said, and the talk goes on."""
        self._print(f"{self.talk.model.name}. /help shows the commands.")
        if self.talk.dials:
            self._list()
        for line in self._read():
            if line.strip() in ("/quit", "/exit", "/q"):
                return
            try:
                if line.startswith("/"):
                    self._command(*line.split(maxsplit=1))
                elif line.strip():
                    self._turn(line.strip())
            except UserError as error:
                self._print(f"! {error}")

    def _read(self) -> Iterator[str]:
        """Lines as text that has a UTF-8 form: bytes that are none become replacement signs, which tokenizers can read."""
        if isinstance(self.lines, io.TextIOWrapper):
            self.lines.reconfigure(errors="replace")
        for line in self._lines():
            yield line.encode("utf-8", "replace").decode("utf-8")

    def _lines(self) -> Iterator[str]:
        if not self.lines.isatty():
            yield from (line.rstrip("\n") for line in self.lines)
            return
        import contextlib

        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (line editing and history for input)
        while True:
            try:
                yield input("> ")
            except EOFError:
                self._print("")
                return

    def _print(self, text: str) -> None:
        print(text, file=self.out, flush=True)

    # -------------------------------------------------------------------------------------------------------- commands
    def _command(self, name: str, rest: str = "") -> None:
        words = rest.split()
        if name in ("/up", "/down", "/set"):
            dial, amount = self._dial_and_number(name, words)
            now = self.talk.strengths[dial.name]
            sign = -1 if name == "/down" else 1
            self.talk.set(dial.name, amount if name == "/set" else now + sign * amount)
            self._print(f"{dial.name}: {self.talk.strengths[dial.name]:g}")
        elif name == "/off" and words:
            for word in words:
                self._print(f"{self.talk.set(word, 0.0).name}: 0")
        elif name == "/off":
            self.talk.off()
            self._print("all dials: 0")
        elif name == "/list":
            self._list()
        elif name == "/show":
            everything = not words or words == ["all"]
            self.shown = list(self.talk.dials) if everything else [self.talk.find(w).name for w in words if w != "none"]
            self._print("shown: " + (", ".join(self.shown) or "none"))
        elif name == "/reset":
            self.talk = self.talk.begin_anew()
            self._print("begun anew")
        elif name == "/system":
            self.talk = self.talk.begin_anew()
            self.talk.system = rest or None
            self._print("begun anew " + (f"under: {rest}" if rest else "without a system prompt"))
        elif name == "/save":
            target = rest or self.autosave
            if not target:
                raise UserError("/save without a file", "/save FILE")
            self._print(f"saved: {self.talk.save(target)}")
        elif name == "/help":
            self._print(HELP)
        else:
            raise UserError(f"no command {name}", "one that /help shows")

    def _dial_and_number(self, name: str, words: list[str]) -> tuple[Dial, float]:
        needed = (2,) if name == "/set" else (1, 2)
        if len(words) not in needed:
            raise UserError(f"{name} {' '.join(words)}".strip(), f"{name} NAME {'X' if name == '/set' else '[BY]'}")
        dial = self.talk.find(words[0])
        try:
            return dial, float(words[1]) if len(words) > 1 else dial.step
        except ValueError:
            raise UserError(f"{words[1]!r} is no number", f"{name} {dial.name} 1.5") from None

    def _list(self) -> None:
        if not self.talk.dials:
            self._print("no dials: start with --vectors or --feature")
        width = max((len(name) for name in self.talk.dials), default=0)
        for name, dial in self.talk.dials.items():
            where = f"{dial.kind:8} block {dial.block}  {dial.unit}  ({dial.source})"
            self._print(f"{name:{width}}  {self.talk.strengths[name]:+.2f}  {where}")

    # ------------------------------------------------------------------------------------------------------------ turns
    def _turn(self, text: str) -> None:
        turn = self.talk.say(text)
        self._print(turn.assistant if turn.assistant else "(nothing was said)")
        if turn.finish == "length":
            self._print("(cut off at the longest answer)")
        if self.shown:
            dials = [self.talk.dials[name] for name in self.shown]
            self._print(coloured(turn, dials) if self.colour else columns(turn, dials))
        if self.autosave:
            self.talk.save(self.autosave)


def columns(turn: Turn, dials: list[Dial]) -> str:
    """A line a token: whose it is, its text, and its reading on each dial."""
    width = max([len("token"), *(len(repr(token.text)) for token in turn.tokens)])
    sizes = {dial.name: max(9, len(dial.name)) for dial in dials}
    lines = [f"{'role':9}  {'token':{width}}" + "".join(f"  {name:>{size}}" for name, size in sizes.items())]
    for token in turn.tokens:
        numbers = "".join(f"  {token.readings[name]:{size}.3f}" for name, size in sizes.items())
        lines.append(f"{token.role:9}  {token.text!r:{width}}{numbers}")
    return "\n".join(lines)


def coloured(turn: Turn, dials: list[Dial]) -> str:
    """The turn's text once a dial, each token on its colour: red above and blue below the middle of the turn for a vector, at
    full strength one vector's length away; for a feature from nothing at 0 to red at its highest activation."""
    lines = []
    for dial in dials:
        values = [token.readings[dial.name] for token in turn.tokens]
        middle = 0.0 if dial.kind == "feature" else sorted(values)[len(values) // 2]
        lines.append(f"{dial.name}: {min(values):.2f} to {max(values):.2f}, mean {sum(values) / len(values):.2f}")
        shades = [(value - middle) / dial.scale for value in values]
        lines.append("".join(_painted(token, shade) for token, shade in zip(turn.tokens, shades, strict=True)))
    return "\n".join(lines)


def _painted(token: Token, shade: float) -> str:
    """A token on a background between white and RED (shade 1) or BLUE (shade -1), the colour kept within each line."""
    shade = max(-1.0, min(1.0, shade))
    hue = RED if shade > 0 else BLUE
    red, green, blue = (round(255 + (c - 255) * abs(shade)) for c in hue)
    paint = f"\x1b[48;2;{red};{green};{blue}m\x1b[38;2;0;0;0m"
    return "\n".join(f"{paint}{part}\x1b[0m" if part else "" for part in token.text.split("\n"))
