"""`pvsae gate`: fails where data would move a model too far along a persona vector; for CI jobs.

Knows: the options, exit codes, where output goes. Does not know: how anything is computed (stages/gate.py) or
written (reports/gate.py).

Exit codes: 0 all checks hold, 1 one does not, 2 wrong input, 3 the gate itself broke (1 is kept for data that is bad).
"""

from __future__ import annotations

import argparse
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pvsae.commands.configs import config_from
from pvsae.commands.screen import add_base, add_vectors, complete
from pvsae.errors import UserError

EXAMPLES = (
    "  pvsae gate --calibrate normal.jsonl --quantile 0.99 --trait evil --vectors runs/vectors --write-limits limits.json\n"
    "  pvsae gate data.jsonl --trait evil --vectors runs/vectors --limits limits.json --junit gate.xml\n"
    "  pvsae gate data.jsonl --trait evil --vectors runs/vectors --max-dp 6.5\n"
    "  pvsae gate data.jsonl --trait evil --vectors runs/vectors --max-dp 6.5 --write-baseline known.json\n"
    "  pvsae gate data.jsonl --trait evil --vectors runs/vectors --max-dp 6.5 --baseline known.json --github"
)


def add_parser(
    commands: Any,
    add: Callable[..., argparse.ArgumentParser],
    started: Callable[[Path], None],
    add_setup: Callable[..., None],
) -> None:
    """Adds the subcommand; `started` is told the run folder, for the message of an interruption."""
    parser = add(
        commands,
        "gate",
        lambda args: _apart(args, started),
        "fail where data would move a model too far along a vector",
        EXAMPLES,
    )
    parser.description = (
        "Checks every row's and every data set's projection difference against a limit. Exit code 1, with the rows to blame,\n"
        "where one lies above it; 0 where none does; 2 for wrong input; 3 where the gate itself broke.\n"
        "Rows that cannot be scored fail too.\n\n"
        "How to choose the limit: measure normal data with --calibrate; the limit is a quantile of its rows. Of any normal data\n"
        "a share 1 - quantile lies above it; --allow lets as many rows of the checked data pass, and --write-baseline accepts\n"
        "the rows that somebody has looked at. Otherwise one row above the limit fails.\n\n"
        "Without --out, every content of the data, every set of vectors and of options has a run folder of its own."
    )
    parser.add_argument("data", nargs="*", metavar="DATA", help="as for `pvsae screen`")
    add_setup(parser, vectors=False, out="runs/gate-NAME-HASH")
    add_vectors(parser)
    add_base(parser)
    group = parser.add_argument_group("what must hold (exactly one of the first three)")
    group.add_argument("--max-dp", type=float, metavar="X", help="highest dP of a row, in residual units")
    group.add_argument("--limits", metavar="FILE", help="limits that --write-limits wrote")
    group.add_argument("--calibrate", nargs="+", metavar="NORMAL", help="find the limit on normal data")
    group.add_argument("--quantile", type=float, metavar="Q", help="of the normal rows, with --calibrate (default: 0.99)")
    group.add_argument("--write-limits", metavar="FILE", help="keep what --calibrate found")
    group.add_argument("--max-data-dp", type=float, metavar="X", help="highest dP of a whole data set")
    group.add_argument("--allow", type=float, metavar="SHARE", help="share of rows that may lie above the limit (default: 0)")
    group.add_argument("--allow-unusable", action="store_true", help="do not fail on rows that cannot be scored")
    group.add_argument("--baseline", metavar="FILE", help="fail only on what is not in it, or worse than in it")
    group.add_argument("--write-baseline", metavar="FILE", help="accept what is found now; later runs give it as --baseline")
    group = parser.add_argument_group("how it is said")
    group.add_argument("--junit", metavar="FILE", help="write JUnit XML")
    group.add_argument("--github", action="store_true", help="print annotations for GitHub (on by itself in its workflows)")
    group.add_argument("--show", type=int, metavar="N", help="most rows to show a check (default: 50)")


def _apart(args: argparse.Namespace, started: Callable[[Path], None]) -> int:
    """The gate's exit code; 3 with the traceback for an error that nobody foresaw, which Python would end with 1."""
    try:
        return _run(args, started)
    except (UserError, BrokenPipeError):
        raise
    except Exception:
        traceback.print_exc()
        return 3


def _run(args: argparse.Namespace, started: Callable[[Path], None]) -> int:
    from pvsae.stages import gate, screen

    complete(args)
    if getattr(args, "show", 0) < 0:
        raise UserError(f"--show is {args.show}", "a number of rows, 0 for none")
    config = config_from(gate.GateConfig, args)
    if getattr(args, "dry_run", False):
        print(screen.plan(gate.screening(config)))
        return 0
    out = Path(getattr(args, "out", None) or Path("runs") / gate.folder_name(config))
    started(out)
    result = gate.run(config, out)
    from pvsae.reports import write_report
    from pvsae.reports.gate import as_text, github_lines, write_junit

    most = getattr(args, "show", 50)
    page = write_report(out, title="pvsae gate")
    if getattr(args, "junit", None):
        write_junit(result, args.junit, most)
    if getattr(args, "github", False) or os.environ.get("GITHUB_ACTIONS") == "true":
        print("\n".join(github_lines(result, most)))
    print(as_text(result, most))
    print(f"report: {page}")
    return 0 if result.passed else 1
