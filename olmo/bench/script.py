"""What the scripts in bench/ share: options, a line about the machine, rounds in turns, CPU time.

Imports the standard library alone, since some scripts measure their own memory.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any


def parse_options(doc: str | None, **options: Any) -> argparse.Namespace:
    """Command-line options, `--name` for each keyword; the first line of `doc` is the help.

    Args:
        options: a default value, a type (then the option is required), or the arguments of
            `add_argument`.
    """
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    for name, value in options.items():
        if isinstance(value, type):
            arguments: dict[str, Any] = {"type": value, "required": True}
        else:
            arguments = value if isinstance(value, dict) else {"default": value}
            if isinstance(arguments.get("default"), int | float | Path):
                arguments = {"type": type(arguments["default"]), **arguments}
        parser.add_argument(f"--{name.replace('_', '-')}", **arguments)
    return parser.parse_args()


def describe_run(*facts: object) -> str:
    """Day, machine, load, Python, and more facts, for the head of a result."""
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}"
    python = f"Python {platform.python_version()}"
    return ", ".join([f"{date.today()}", machine, python, *map(str, facts)])


def measure_interleaved(
    rounds: int, programs: Mapping[str, Callable[[], float]]
) -> dict[str, list[float]]:
    """The cost of each program in each round. A round runs every program once, so that other load
    on the machine slows all of them alike."""
    costs: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            costs[name].append(program())
    return costs


def medians(costs: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in costs.items()}


def ratios(costs: Sequence[float], others: Sequence[float]) -> list[float]:
    """Of two programs' costs in the same rounds, sorted."""
    return sorted(a / b for a, b in zip(costs, others, strict=True))


def cpu_time(who: int = resource.RUSAGE_SELF) -> float:
    """CPU seconds of this process so far, or with RUSAGE_CHILDREN of its ended children."""
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def process_cpu_time(pid: int) -> float:
    """CPU seconds so far of another process and its ended children (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def wait_for(process: subprocess.Popen[Any], output: Path | None = None) -> resource.struct_rusage:
    """Wait for a process; its resource usage. Exits where it failed, with the end of its output."""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        end = output.read_text()[-4000:] if output else ""
        sys.exit(f"{process.args!r} failed with exit status {process.returncode}\n{end}")
    return usage
