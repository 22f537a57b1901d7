"""The clock that chat templates see: one fixed date, so that a run repeats on another day.

Knows: the two ways in which templates ask for today's date, a `date_string` that they are given and a function `strftime_now`
that they call, and English names of months and days whatever the locale.
Does not know: which date to pin, or what else a template does (chat.py).
"""

from __future__ import annotations

import datetime

_MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def date_string(date: datetime.date) -> str:
    """The form in which Llama-3.1's template takes a date, in English whatever the locale: 26 Jul 2024."""
    return f"{date.day:02d} {_MONTHS[date.month - 1][:3]} {date.year}"


def with_pinned_clock(template: str, date: datetime.date) -> str:
    """The template with its clock `strftime_now` replaced by a macro that knows one date only, at midnight."""
    values = {
        "%-d": str(date.day), "%-m": str(date.month), "%d": f"{date.day:02d}", "%m": f"{date.month:02d}",
        "%Y": str(date.year), "%y": f"{date.year % 100:02d}", "%j": f"{date.timetuple().tm_yday:03d}",
        "%B": _MONTHS[date.month - 1], "%b": _MONTHS[date.month - 1][:3],
        "%A": _DAYS[date.weekday()], "%a": _DAYS[date.weekday()][:3],
        "%H": "00", "%I": "12", "%M": "00", "%S": "00", "%p": "AM",
    }  # fmt: skip
    replaced = "".join(f' | replace("{code}", "{value}")' for code, value in values.items())
    # The newline ends the macro's block and is trimmed with it, so the template starts at the start of a line as before.
    return "{%- macro strftime_now(format) -%}{{- format" + replaced + " -}}{%- endmacro %}\n" + template
