"""Theirs and ours in turns, A B A B, each in a process of its own; the ratio of every round.

Pairwise ratios are quoted, since what else a machine does falls on both sides of a round alike.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from olmo.bench import side
from olmo.bench.cell import speeds
from olmo.bench.matrix import PEERS, Cell, Pair, Section, as_plain
from olmo.data.order import available_memory
from olmo.runtime.process import describe_exit, supervised

PYTHON = "OLMO_PEER_PYTHON"  # names a Python that has the peers
REMEDY = {
    "ai2-olmo": f"name a Python that has it with --peer ai2-olmo=PYTHON or {PYTHON}=PYTHON, or its "
    "wheel or sources with --peer ai2-olmo=WHEEL (pip download --no-deps ai2-olmo)",
    "transformers": "pip install transformers, or name a Python that has it with --peer "
    f"transformers=PYTHON or {PYTHON}=PYTHON",
}
# Losses of the first step, from the same weights on the same ids, may differ by so much of them.
SAME_LOSS = {"fp32": 1e-4, "amp_bf16": 1e-2, "amp_fp16": 1e-2}


@dataclass(frozen=True)
class Peer:
    """Where a peer runs."""

    name: str
    python: str
    path: str  # of its sources, where that Python does not have it installed
    versions: dict[str, str]  # of what its speed depends on


@dataclass
class Ended(Exception):
    """A side that stopped before its last turn."""

    status: str
    why: str


def find(given: Sequence[str]) -> dict[str, Peer | str]:
    """Each peer, or why there is none. `given` are words NAME=WHERE: a Python, a wheel, a folder.

    Raises:
        ValueError: what was given is not that peer.
    """
    where = dict(word.split("=", 1) for word in given if "=" in word)
    if len(where) < len(given) or (where.keys() - PEERS.keys()):
        raise ValueError(
            f"--peer: expected NAME=WHERE, NAME one of {', '.join(PEERS)}; found {' '.join(given)}"
        )
    found: dict[str, Peer | str] = {}
    for name in PEERS:
        if name in where:
            found[name] = peer_at(name, where[name])
            continue
        found[name] = f"no {name} here: {REMEDY[name]}"
        for python in filter(None, (os.environ.get(PYTHON), sys.executable)):
            with contextlib.suppress(ValueError):
                found[name] = peer_at(name, python)
                break
    return found


def peer_at(name: str, where: str) -> Peer:
    path = Path(where)
    if path.is_dir() or path.suffix == ".whl":
        here = versions_in(sys.executable)
        if name == "ai2-olmo":
            return Peer(name, sys.executable, str(path.resolve()), here | {name: ai2_version(path)})
        return Peer(name, sys.executable, str(path.resolve()), here)
    has = versions_in(where)
    if name not in has:
        raise ValueError(f"--peer {name}: {where} has no {name}; {REMEDY[name]}")
    return Peer(name, where, "", has)


def versions_in(python: str) -> dict[str, str]:
    """Versions of what is installed there, of the packages that a peer's speed depends on."""
    program = (
        "import importlib.metadata as m, json, platform, sys\n"
        "names = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        "found = {n: names[n] for n in sys.argv[1:] if n in names}\n"
        "print(json.dumps(found | {'python': platform.python_version()}))"
    )
    command = [python, "-c", program, *PEERS, "torch", "flash-attn"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=120, env=bare())
        found: dict[str, str] = json.loads(ran.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"expected a Python at {python}: {error}") from error
    return found


def ai2_version(path: Path) -> str:
    """Of AI2's sources: a folder or a wheel with olmo/version.py."""
    try:
        if path.is_dir():
            return str(runpy.run_path(str(path / "olmo/version.py"))["VERSION"])
        with zipfile.ZipFile(path) as wheel:
            namespace: dict[str, Any] = {}
            exec(wheel.read("olmo/version.py"), namespace)
            return str(namespace["VERSION"])
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"--peer ai2-olmo: {path} has no olmo/version.py of AI2's ({error}); "
            f"{REMEDY['ai2-olmo']}"
        ) from error


def bare() -> dict[str, str]:
    """The environment without what would bring our modules along."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


class Side:
    """A process that trains when it is asked to."""

    def __init__(self, who: str, process: subprocess.Popen[str], said: Path) -> None:
        self.who, self.process, self.said = who, process, said

    def ask(self, line: str) -> dict[str, Any]:
        """Its answer to a line.

        Raises:
            Ended: it has none, or one that says why not.
        """
        answer = self.answer(line)
        if "why" in answer:
            raise Ended(answer["status"], f"{self.who}: {answer['why']}")
        return answer

    def answer(self, line: str) -> dict[str, Any]:
        """Its answer to a line, whatever that is.

        Raises:
            Ended: the process ended.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            print(line, file=self.process.stdin, flush=True)
        text = self.process.stdout.readline()
        if not text:
            code = self.process.wait()
            if code == -9:
                raise Ended("out of memory", f"{self.who}: the kernel ended the process")
            last = (self.said.read_text().strip().splitlines() or [""])[-1]
            raise Ended("failed", f"{self.who}: {describe_exit(code)}: {last}")
        answer: dict[str, Any] = json.loads(text)
        return answer


@contextlib.contextmanager
def side_of(who: str, command: Sequence[str], folder: Path) -> Iterator[Side]:
    said = folder / who
    with (
        said.open("w") as errors,
        supervised(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=bare() if who != "ours" else None,
        ) as process,
    ):
        yield Side(who, process, said)


@contextlib.contextmanager
def within(limit_s: float, *sides: Side) -> Iterator[threading.Event]:
    """End these processes when the limit is over; whether that was so."""
    late = threading.Event()

    def end() -> None:
        late.set()
        for one in sides:
            one.process.kill()

    clock = threading.Timer(limit_s, end)
    clock.start()
    try:
        yield late
    finally:
        clock.cancel()


def ended(error: Ended, late: bool, limit_s: float) -> dict[str, Any]:
    """What a record says of a process that stopped."""
    if late:
        why = f"it took longer than {limit_s:.3g} s"
        return {"status": "too slow", "why": why, "limit_s": limit_s}
    return {"status": error.status, "why": error.why}


class Cells:
    """Times cells, one after the other: on a GPU in one process, for as long as it lives; on a CPU
    each in its own, since the memory that a process takes is never less than it once was."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._open = contextlib.ExitStack()
        self._side: Side | None = None

    def time(self, section: Section, cell: Cell, limit_s: float) -> dict[str, Any]:
        """The record of a cell, however it ends."""
        if self._side is None:
            folder = Path(self._open.enter_context(tempfile.TemporaryDirectory()))
            command = [sys.executable, "-m", "olmo.bench.cell"]
            self._side = self._open.enter_context(side_of("ours", command, folder))
        request = {"section": section.asdict(), "cell": as_plain(cell)}
        record: dict[str, Any] = {"cell": as_plain(cell)}
        with within(limit_s, self._side) as late:
            try:
                record |= self._side.answer(json.dumps(request))
            except Ended as error:
                record |= ended(error, late.is_set(), limit_s)
        if self._kind == "cpu" or record["status"] not in ("ok", "unavailable"):
            self.close()
        return record

    def close(self) -> None:
        self._open.close()
        self._side = None


def time_pair(
    section: Section, pair: Pair, peer: Peer | str, kind: str, limit_s: float
) -> dict[str, Any]:
    """The record of a pair, however it ends."""
    record: dict[str, Any] = {"cell": as_plain(pair.theirs), "beside": as_plain(pair.ours)}
    if isinstance(peer, str):
        return record | {"status": "unavailable", "why": peer}
    with (
        tempfile.TemporaryDirectory() as folder,
        both(peer, Path(folder)) as sides,
        within(limit_s, *sides) as late,
    ):
        try:
            return record | {"status": "ok"} | take_turns(section, pair, peer, kind, *sides)
        except Ended as error:
            return record | ended(error, late.is_set(), limit_s)


@contextlib.contextmanager
def both(peer: Peer, folder: Path) -> Iterator[tuple[Side, Side]]:
    script = Path(side.__file__).with_name("peer.py")
    with (
        side_of(peer.name, [peer.python, "-W", "ignore", str(script)], folder) as theirs,
        side_of("ours", [sys.executable, "-m", "olmo.bench.cell", "--turns"], folder) as ours,
    ):
        yield theirs, ours


def take_turns(
    section: Section, pair: Pair, peer: Peer, kind: str, theirs: Side, ours: Side
) -> dict[str, Any]:
    """What each side took, and the ratios.

    Raises:
        Ended: a side that stopped, or two that do not compute the same.
    """
    machine = {
        "kind": kind,
        "threads": torch.get_num_threads(),
        # Both are there at once.
        "memory_bytes": section.memory_bytes or (available_memory() or 0) // 2 or None,
    }
    cell = pair.theirs
    settings = section.settings(cell) | {"model": section.train_config(pair.ours).model.asdict()}
    mode = {"eager": None}.get(cell.compile, cell.compile)
    asked = {"whose": peer.name, "path": peer.path, "attention": cell.attention, "compile": mode}
    ready = theirs.ask(json.dumps(machine | asked | {"train": settings}))
    of_ours = {"section": section.asdict(), "cell": as_plain(pair.ours)}
    facts = ours.ask(json.dumps(machine | of_ours))
    first = [one.ask(str(section.warmup)) for one in (theirs, ours)]
    a, b = (turn["losses"][0] for turn in first)
    if not math.isclose(a, b, rel_tol=SAME_LOSS.get(cell.precision, 1e-2)):
        raise Ended("failed", f"not the same model: first losses {a:.6f} and {b:.6f}")
    steps = math.ceil(section.steps / section.rounds)
    turns = [[one.ask(str(steps)) for one in (theirs, ours)] for _ in range(section.rounds)]

    def ratios(cost: Any) -> list[float]:
        return [cost(theirs) / cost(ours) for theirs, ours in turns]

    of_time = ratios(lambda turn: sum(turn["seconds"]))
    of_cpu = ratios(lambda turn: turn["cpu"])
    theirs_all, ours_all = (summary(facts, first[i], [turn[i] for turn in turns]) for i in range(2))
    ours_all["attention_used"] = facts["attention_used"]
    return theirs_all | {
        "peer": peer.versions | {"torch": ready["torch"], "python": ready["python"]},
        "ours": ours_all,
        "ratios": of_time,
        "ratio": statistics.median(of_time),
        "ratio_low": min(of_time),
        "ratio_high": max(of_time),
        "ratio_cpu": statistics.median(of_cpu),
        "parameters": facts["parameters"],
    }


def summary(
    facts: Mapping[str, Any], first: Mapping[str, Any], turns: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """One side's turns as a record has them."""
    seconds = [one for turn in turns for one in turn["seconds"]]
    return {
        "seconds": seconds,
        "tokens_per_cpu_second": len(seconds)
        * facts["tokens_per_step"]
        / sum(turn["cpu"] for turn in turns),
        "peak_memory_bytes": statistics.median(turn["peak_memory_bytes"] for turn in turns),
        "joules_per_token": None,
        "first_step_s": first["seconds"][0],
        "first_loss": first["losses"][0],
        "last_loss": turns[-1]["losses"][-1],
        **speeds(facts, seconds),
    }
