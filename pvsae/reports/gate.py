"""What a gate says to machines and people: JUnit XML, annotations of GitHub's workflows, and text for a terminal.

Knows: the checks and offending rows of a gate. Does not know: how they were found, exit codes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from pvsae.runs import atomic_write_text

if TYPE_CHECKING:
    from pvsae.stages.gate import Check, GateResult


def write_junit(result: GateResult, path: str | Path, most: int = 50) -> None:
    """One test suite a data set, one test case a check; the rows to blame (at most so many) stand in the failure."""
    root = ElementTree.Element("testsuites", name="pvsae gate")
    suites: dict[str, list[Check]] = {}
    for check in result.checks:
        suites.setdefault(check.data, []).append(check)
    root.set("tests", str(len(result.checks)))
    root.set("failures", str(sum(not c.passed for c in result.checks)))
    for name, checks in suites.items():
        failures = str(sum(not c.passed for c in checks))
        suite = ElementTree.SubElement(
            root, "testsuite", name=_clean(name), tests=str(len(checks)), failures=failures, errors="0"
        )
        for check in checks:
            case = ElementTree.SubElement(suite, "testcase", classname=_clean(f"pvsae.gate.{name}"), name=_clean(check.name))
            if check.passed:
                ElementTree.SubElement(case, "system-out").text = _clean(check.message)
            else:
                failure = ElementTree.SubElement(case, "failure", message=_clean(check.message), type="gate")
                failure.text = _clean("\n".join(_lines(result, check, most)))
    ElementTree.indent(root)
    atomic_write_text(path, ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n")


def github_lines(result: GateResult, most: int = 50) -> list[str]:
    """Commands of GitHub's workflows: an error for each row to blame (at most so many a check), and for each failed check."""
    out = []
    for check in result.checks:
        if check.passed:
            continue
        out.append(f"::error title={_property(f'pvsae gate, {check.data}')}::{_message(f'{check.name}: {check.message}')}")
        for row in result.offending.iloc[list(check.rows[:most])].to_dict("records"):
            what = f"{row['vector']} dP {row['dp']:.2f}" if row["vector"] else "not usable"
            where = f"file={_property(_relative(row['file']))},line={row['line']},title={_property(f'pvsae gate: {what}')}"
            said = f"{row['why']}: {row['excerpt']}"
            out.append(f"::error {where}::{_message(said)}")
    return out


def as_text(result: GateResult, most: int = 50) -> str:
    """The verdict, every check, and the rows to blame."""
    out = [f"note: {note}" for note in result.notes]
    for check in result.checks:
        out.append(f"{'ok  ' if check.passed else 'FAIL'}  {check.data}: {check.name}: {check.message}")
        if not check.passed:
            out += [f"      {line}" for line in _lines(result, check, most)]
    if result.checks:
        failed = sum(not c.passed for c in result.checks)
        out.append(f"gate: {failed} of {len(result.checks)} checks failed" if failed else "gate: passed")
    return "\n".join(out)


def _lines(result: GateResult, check: Check, most: int) -> list[str]:
    out = []
    for row in result.offending.iloc[list(check.rows[:most])].to_dict("records"):
        number = f"dP {row['dp']:.3f}" if row["vector"] else row["why"]
        out.append(f"{_relative(row['file'])}:{row['line']}: {number}: {row['excerpt']}")
    left = len(check.rows) - most
    return [*out, f"... and {left} more (tables/offending.csv)"] if left > 0 else out


def _relative(file: str) -> str:
    """A path as a CI system knows it: from the folder that the job runs in."""
    path = Path(file).resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else file


def _property(text: str) -> str:
    return _message(text).replace(":", "%3A").replace(",", "%2C")


def _message(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _clean(text: str) -> str:
    """Without characters that XML 1.0 cannot hold."""
    return "".join(
        c if c in "\t\n\r" or " " <= c <= "\ud7ff" or "\ue000" <= c <= "\ufffd" or c > "\uffff" else "\ufffd" for c in text
    )
