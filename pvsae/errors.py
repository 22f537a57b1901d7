"""The one exception that a user is meant to read.

Knows: how to say what was wrong, what was expected and what to do about it.
Does not know: exit codes or terminals (cli.py turns a UserError into one message and exit code 2).
"""

from __future__ import annotations


class UserError(Exception):
    """Bad input or a bad environment, found before (or instead of) long work.

    Args:
        what: what was wrong, with the offending value.
        expected: what would have been right.
        fix: what to do now.
    """

    def __init__(self, what: str, expected: str = "", fix: str = "") -> None:
        self.what, self.expected, self.fix = what, expected, fix
        lines = [what]
        if expected:
            lines.append(f"  expected: {expected}")
        if fix:
            lines.append(f"  try:      {fix}")
        super().__init__("\n".join(lines))
