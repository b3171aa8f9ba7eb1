"""Times a peer and ours in turns, A B A B, in two processes; compares each round.

The ratio is taken within a round: other load on the machine slows both of its sides alike.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from olmo.bench.cell import throughput
from olmo.bench.matrix import EAGER, PEERS, Cell, Pair, Section
from olmo.data.order import available_memory
from olmo.runtime.process import describe_exit, supervised

PYTHON = "OLMO_PEER_PYTHON"  # environment variable: a Python that has the peers installed
REMEDY = {
    "ai2-olmo": f"name a Python that has it with --peer ai2-olmo=PYTHON or {PYTHON}=PYTHON, or its "
    "wheel or sources with --peer ai2-olmo=WHEEL (pip download --no-deps ai2-olmo)",
    "transformers": "uv pip install transformers, or name a Python that has it with --peer "
    f"transformers=PYTHON or {PYTHON}=PYTHON",
}
# Relative tolerance of the first loss: both sides have the same weights and ids.
SAME_LOSS = {"fp32": 1e-4, "amp_bf16": 1e-2, "amp_fp16": 1e-2}


@dataclass(frozen=True)
class Peer:
    """Where a peer runs."""

    name: str
    python: str
    path: str  # of its sources; empty where that Python has it installed
    versions: dict[str, str]  # of the packages that its speed depends on


@dataclass
class WorkerError(Exception):
    """A worker that ended early or cannot run a request."""

    status: str
    why: str


def find_peers(options: Sequence[str]) -> dict[str, Peer | str]:
    """Each peer, or the reason why it is missing.

    Args:
        options: NAME=WHERE, where WHERE is a Python, a wheel or a folder of sources.

    Raises:
        ValueError: an option is malformed, or there is no such peer at WHERE.
    """
    where = dict(option.split("=", 1) for option in options if "=" in option)
    if len(where) < len(options) or (where.keys() - PEERS.keys()):
        raise ValueError(
            f"--peer: expected NAME=WHERE, NAME one of {', '.join(PEERS)}; found "
            f"{' '.join(options)}"
        )
    peers: dict[str, Peer | str] = {}
    for name in PEERS:
        if name in where:
            peers[name] = locate_peer(name, where[name])
            continue
        peers[name] = f"no {name} here: {REMEDY[name]}"
        for python in filter(None, (os.environ.get(PYTHON), sys.executable)):
            with contextlib.suppress(ValueError):
                peers[name] = locate_peer(name, python)
                break
    return peers


def locate_peer(name: str, where: str) -> Peer:
    """The peer in a Python, a wheel or a folder of sources. Raises ValueError."""
    path = Path(where)
    if path.is_dir() or path.suffix == ".whl":
        versions = _installed_versions(sys.executable)
        if name == "ai2-olmo":
            versions[name] = _ai2_version(path)
        return Peer(name, sys.executable, str(path.resolve()), versions)
    versions = _installed_versions(where)
    if name not in versions:
        raise ValueError(f"--peer {name}: {where} has no {name}; {REMEDY[name]}")
    return Peer(name, where, "", versions)


def _installed_versions(python: str) -> dict[str, str]:
    """Versions of the packages in that Python that a peer's speed depends on."""
    program = (
        "import importlib.metadata as m, json, platform, sys\n"
        "names = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        "found = {n: names[n] for n in sys.argv[1:] if n in names}\n"
        "print(json.dumps(found | {'python': platform.python_version()}))"
    )
    command = [python, "-c", program, *PEERS, "torch", "flash-attn"]
    try:
        ran = subprocess.run(
            command, capture_output=True, text=True, timeout=120, env=peer_environment()
        )
        versions: dict[str, str] = json.loads(ran.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"expected a Python at {python}: {error}") from error
    return versions


def _ai2_version(path: Path) -> str:
    """The VERSION in olmo/version.py of AI2's sources or wheel."""
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


def peer_environment() -> dict[str, str]:
    """The environment without PYTHONPATH, which may lead to our `olmo`."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


class Worker:
    """A process that replies to each line on its stdin with a line of JSON."""

    def __init__(self, name: str, process: subprocess.Popen[str], stderr: Path) -> None:
        self.name, self.process, self.stderr = name, process, stderr

    def request(self, line: str) -> dict[str, Any]:
        """The reply to a line. Raises WorkerError where the process ended, or replied why not."""
        reply = self.send(line)
        if "why" in reply:
            raise WorkerError(reply["status"], f"{self.name}: {reply['why']}")
        return reply

    def send(self, line: str) -> dict[str, Any]:
        """The reply to a line, whatever its status. Raises WorkerError where the process ended."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            print(line, file=self.process.stdin, flush=True)
        text = self.process.stdout.readline()
        if not text:
            code = self.process.wait()
            if code == -9:
                raise WorkerError("out of memory", f"{self.name}: the kernel ended the process")
            last = (self.stderr.read_text().strip().splitlines() or [""])[-1]
            raise WorkerError("failed", f"{self.name}: {describe_exit(code)}: {last}")
        reply: dict[str, Any] = json.loads(text)
        return reply


@contextlib.contextmanager
def start_worker(
    name: str, command: Sequence[str], folder: Path, env: Mapping[str, str] | None = None
) -> Iterator[Worker]:
    stderr = folder / name
    with (
        stderr.open("w") as errors,
        supervised(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=env,
        ) as process,
    ):
        yield Worker(name, process, stderr)


@contextlib.contextmanager
def kill_after(limit_s: float, *processes: subprocess.Popen[str]) -> Iterator[threading.Event]:
    """Kill these processes after `limit_s`; the event says whether that happened."""
    expired = threading.Event()

    def kill() -> None:
        expired.set()
        for process in processes:
            process.kill()

    timer = threading.Timer(limit_s, kill)
    timer.start()
    try:
        yield expired
    finally:
        timer.cancel()


def failure_record(error: WorkerError, expired: bool, limit_s: float) -> dict[str, Any]:
    if expired:
        why = f"it took longer than {limit_s:.3g} s"
        return {"status": "too slow", "why": why, "limit_s": limit_s}
    return {"status": error.status, "why": error.why}


class CellRunner:
    """Times cells one after the other: on a GPU in one process while it lives; on a CPU each in its
    own process, since a process does not return all of its memory."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._stack = contextlib.ExitStack()
        self._worker: Worker | None = None

    def time(self, section: Section, cell: Cell, limit_s: float) -> dict[str, Any]:
        """The record of a cell, whatever its status."""
        if self._worker is None:
            folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
            command = [sys.executable, "-m", "olmo.bench.cell"]
            self._worker = self._stack.enter_context(start_worker("ours", command, folder))
        record: dict[str, Any] = {"cell": asdict(cell)}
        with kill_after(limit_s, self._worker.process) as expired:
            try:
                record |= self._worker.send(json.dumps(record | {"section": section.asdict()}))
            except WorkerError as error:
                record |= failure_record(error, expired.is_set(), limit_s)
        if self._kind == "cpu" or record["status"] not in ("ok", "unavailable"):
            self.close()
        return record

    def close(self) -> None:
        self._stack.close()
        self._worker = None


def time_pair(
    section: Section, pair: Pair, peer: Peer | str, kind: str, limit_s: float
) -> dict[str, Any]:
    """The record of a pair, whatever its status. A `peer` that is a string is missing."""
    record: dict[str, Any] = {"cell": asdict(pair.theirs), "beside": asdict(pair.ours)}
    if isinstance(peer, str):
        return record | {"status": "unavailable", "why": peer}
    script = str(Path(__file__).with_name("peer.py"))
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workers = [
            stack.enter_context(start_worker(name, command, folder, env))
            for name, command, env in (
                (peer.name, [peer.python, "-W", "ignore", script], peer_environment()),
                ("ours", [sys.executable, "-m", "olmo.bench.cell", "--turns"], None),
            )
        ]
        expired = stack.enter_context(kill_after(limit_s, *(w.process for w in workers)))
        try:
            return record | {"status": "ok"} | time_alternating(section, pair, peer, kind, *workers)
        except WorkerError as error:
            return record | failure_record(error, expired.is_set(), limit_s)


def time_alternating(
    section: Section, pair: Pair, peer: Peer, kind: str, theirs: Worker, ours: Worker
) -> dict[str, Any]:
    """Costs of each side and their ratios.

    Raises:
        WorkerError: a side ended, or the first losses differ.
    """
    machine = {
        "kind": kind,
        "threads": torch.get_num_threads(),
        # Both processes are in memory at once.
        "memory_bytes": section.memory_bytes or (available_memory() or 0) // 2 or None,
    }
    cell = pair.theirs
    config = section.shared_config(cell)
    config |= {"model": section.train_config(pair.ours).model.asdict()}
    mode = None if cell.compile == EAGER else cell.compile
    build = {"whose": peer.name, "path": peer.path, "attention": cell.attention, "compile": mode}
    ready = theirs.request(json.dumps(machine | build | {"train": config}))
    our_build = {"section": section.asdict(), "cell": asdict(pair.ours)}
    facts = ours.request(json.dumps(machine | our_build))
    first = [worker.request(str(section.warmup)) for worker in (theirs, ours)]
    a, b = (turn["losses"][0] for turn in first)
    if not math.isclose(a, b, rel_tol=SAME_LOSS.get(cell.precision, 1e-2)):
        raise WorkerError("failed", f"not the same model: first losses {a:.6f} and {b:.6f}")
    steps = str(math.ceil(section.steps / section.rounds))
    turns = [[w.request(steps) for w in (theirs, ours)] for _ in range(section.rounds)]
    ratios = [sum(a["seconds"]) / sum(b["seconds"]) for a, b in turns]
    sides = [_summarize(facts, first[i], [turn[i] for turn in turns]) for i in (0, 1)]
    return sides[0] | {
        "peer": peer.versions | {"torch": ready["torch"], "python": ready["python"]},
        "ours": sides[1] | {"attention_used": facts["attention_used"]},
        "ratios": ratios,
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "ratio_cpu": statistics.median(a["cpu"] / b["cpu"] for a, b in turns),
        "parameters": facts["parameters"],
    }


def _summarize(
    facts: Mapping[str, Any], first: Mapping[str, Any], turns: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """One side's part of a record: `first` is its warm-up turn, `turns` are the timed ones."""
    seconds = [step for turn in turns for step in turn["seconds"]]
    cpu = sum(turn["cpu"] for turn in turns)
    return {
        "seconds": seconds,
        "tokens_per_cpu_second": len(seconds) * facts["tokens_per_step"] / cpu,
        "peak_memory_bytes": statistics.median(turn["peak_memory_bytes"] for turn in turns),
        "joules_per_token": None,
        "first_step_s": first["seconds"][0],
        "first_loss": first["losses"][0],
        "last_loss": turns[-1]["losses"][-1],
        **throughput(facts, seconds),
    }
