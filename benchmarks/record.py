"""What a benchmark or an analysis leaves behind: a result file with date, versions and machine, and one JSON line.

Knows: how checks are written, printed and stored in benchmarks/results/.
Does not know: what is measured.
"""

from __future__ import annotations

import json
import math
import operator
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pvsae.runs import environment, jsonable, write_json

RESULTS = Path(__file__).parent / "results"
COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "==": operator.eq,
}


def check(name: str, value: float, target: str) -> dict[str, Any]:
    """One figure that can be checked: {"name", "value", "target", "ok"}.

    Args:
        name: stable from run to run.
        value: as measured in this run; NaN is never ok.
        target: a comparison and a number, such as ">= 80".
    """
    sign, _, number = target.partition(" ")
    value = float(value)
    ok = not math.isnan(value) and COMPARE[sign](value, float(number))
    return {"name": name, "value": _rounded(value), "target": target, "ok": bool(ok)}


def record(name: str, checks: Sequence[Mapping[str, Any]], details: Mapping[str, Any] | None = None) -> Path:
    """Writes benchmarks/results/{name}.json and prints {"checks": [...]} as one line, which should be the last of the run.

    A run with --quick on its command line goes to {name}-quick.json, so that it does not replace the full one.

    Returns: the file.
    """
    found = jsonable([dict(c) for c in checks])
    path = RESULTS / f"{name}{'-quick' if '--quick' in sys.argv else ''}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"name": name, "checks": found, "details": details or {}, "machine": machine(), **_environment()})
    print(json.dumps({"checks": found}, ensure_ascii=False), flush=True)
    return path


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, memory, accelerators, and torch's threads if torch is in use."""
    found: dict[str, Any] = {"processor": _processor(), "cores": _cores(), "memory_gib": _memory_gib(), "load": _load()}
    torch = sys.modules.get("torch")
    if torch is not None:
        found["torch_threads"] = torch.get_num_threads()
        found["accelerators"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return found


def _environment() -> dict[str, Any]:
    found = environment()
    root = Path(__file__).resolve().parents[1]
    # Results are shared: what was run, not where somebody keeps it.
    found["argv"] = [
        a.removeprefix(f"{root}/") if a.startswith(str(root)) else Path(a).name if "/" in a else a for a in found["argv"]
    ]
    found["platform"] = f"{platform.system()} {platform.machine()}"
    return {"date": found.pop("started"), "environment": found}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _load() -> list[float] | None:
    """How busy the machine is (1, 5, 15 minutes): timings of a busy machine say little."""
    return [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _rounded(value: float) -> float:
    """Four significant figures at least: enough to compare, short enough to read."""
    return value if not math.isfinite(value) or value == 0 else round(value, max(0, 3 - math.floor(math.log10(abs(value)))))
