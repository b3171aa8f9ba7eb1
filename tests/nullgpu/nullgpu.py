"""What the null GPU counted; imported by a program that runs on it (see conftest.py)."""

from __future__ import annotations

import ctypes
from typing import Any

# In the order of `enum Kind` in runtime.c, which says what each of them is.
KINDS = """
launch product triton sync h2d d2h d2d pageable memset malloc replay
""".split()  # noqa: SIM905 (it is a list of words)
_runtime = ctypes.CDLL(None)


class Counts:
    """What happened since this was made."""

    def __init__(self) -> None:
        self._before = totals()

    def now(self) -> dict[str, int]:
        return {kind: n - self._before[kind] for kind, n in totals().items()}


def totals() -> dict[str, int]:
    found = (ctypes.c_long * len(KINDS))()
    _runtime.nullgpu_counts(found)
    return dict(zip(KINDS, found, strict=True))


def log(path: str | None) -> None:
    """List every event in the file from now on; None ends the list."""
    _runtime.nullgpu_log(path.encode() if path else None)


def lag(launches: int) -> None:
    """The device is so many launches behind the host, until the host waits for it."""
    _runtime.nullgpu_lag(launches)


def compilations() -> dict[str, Any]:
    """Dynamo's graphs so far, why any of them was compiled again, and breaks."""
    from torch._dynamo.utils import counters, get_compilation_metrics

    reasons = [m.recompile_reason for m in get_compilation_metrics() if m.recompile_reason]
    breaks = counters["graph_break"]
    return {
        "graphs": counters["stats"]["unique_graphs"],
        "again": reasons,
        "breaks": list(breaks),
    }
