"""The folder in which snakemake runs: one at a time in it, and what to do when it is done."""

import atexit
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from olmo.config import read_yaml
from olmo.pipeline.plan import Plan, recipe_path
from olmo.pipeline.terminal import at_the_end, brief
from olmo.runtime.log import FAILED
from olmo.store.lease import PATIENCE_S, lease
from olmo.store.store import Store, parse

STARTED = time.time()
STOPPED = (SystemExit.__name__, KeyboardInterrupt.__name__)  # what was told to stop did not fail
_held = ExitStack()  # for as long as this process lives


def prepare(config: str) -> None:
    """What comes before snakemake reads its config, of which it says less where it is none.

    Of two keys that are the same it would take one.
    """
    brief()
    if not Path(config).is_file():
        raise ValueError(f"expected {config} in {Path.cwd()}; cd to the project's folder")
    read_yaml(config)


def alone(store: str, folder: Path = Path(".snakemake")) -> None:
    """Refuse to run where another snakemake runs, on this machine or on another that shares it, or
    where there is no writing to the store.

    Two of them in one folder would delete each other's outputs. (Snakemake's own lock is a file
    that outlives a killed process; a lease does not, and needs no lock of a network file system.
    Stages do not need either: the store has leases.)
    """

    def name(holder: dict[str, Any]) -> str:
        return f"pid {holder['pid']} on {holder['host']}"

    def refuse(holder: dict[str, Any]) -> None:
        sys.exit(
            f"another snakemake ({name(holder)}) runs in {os.getcwd()}; wait for it, or use "
            "another folder with the same store (OLMO_STORE)"
        )

    def look(holder: dict[str, Any]) -> None:
        if holder["host"] != socket.gethostname():
            print(
                f"a snakemake ({name(holder)}) was here; within {PATIENCE_S:.0f} s it is known "
                "whether it still runs",
                file=sys.stderr,
            )

    try:
        Store(Path(store)).make()
        _held.enter_context(lease(folder / "leases", "running", look, refuse))
    except ValueError as refused:
        sys.exit(str(refused))
    atexit.register(_held.close)


def surround_jobs(store: str) -> None:
    """What the jobs of this snakemake inherit."""
    # A scheduler's warning that a job's time is up soon is for what the job runs.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    os.environ["OLMO_STORE"] = store
    os.environ["OLMO_SUPERVISOR"] = str(os.getpid())  # what a job starts ends with this process
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def next_steps(plan: Plan) -> str:
    """What a user may want to do with the checkpoints that this process finished."""
    lines = []
    for run in plan.pipeline.runs:
        final = Path("checkpoints") / run / "final"
        record = final / "record.json"
        if not record.exists() or record.lstat().st_mtime < STARTED - 1:
            continue
        facts = parse(record.read_bytes(), record)["facts"]
        losses = facts.get("heldout_loss", {})
        fell = "".join(
            "  {}: held-out loss {:.3f} → {:.3f} nats\n".format(
                label, float(loss["first"]), float(loss["last"])
            )
            for label, loss in losses.items()
        )
        lines.append(
            f"\n{final} is ready: {facts.get('steps'):,} steps, {facts.get('tokens'):,} tokens.\n"
            f"{fell}"
            f"  Look at the losses:        {final}/loss.svg\n"
            f"  How it was made:           uv run olmo store trace {final}\n"
            f"  Evaluate it:               uv run snakemake --cores 2 eval/{run}\n"
            f"  For transformers:          uv run snakemake --cores 2 hf/{run}\n"
            f"  Change one thing:          edit {plan.run(run).train} or "
            f"{recipe_path(plan.dataset(run))}, and run the same again"
        )
    return "\n".join(lines)


def last_words(logs: Path = Path("logs")) -> Iterator[tuple[Path, str]]:
    """What each job of this process that did not come to its end said last."""
    for path in sorted(logs.rglob("*.log")):
        if path.stat().st_mtime < STARTED - 1:
            continue
        said = "\n" + path.read_text(encoding="utf-8", errors="replace")
        _, failed, last = said.rpartition(f"\n{FAILED}")
        if failed:
            yield path, last.rstrip()


def failures(logs: Path = Path("logs")) -> str:
    """What this process's jobs failed of, together: some of it scrolled by long ago."""
    lines = [
        f"{path}:\n  " + last.replace("\n", "\n  ")
        for path, last in last_words(logs)
        if not last.startswith(STOPPED)
    ]
    return "\n".join(["", f"What failed ({len(lines)}):", *lines]) if lines else ""


def tell_failures() -> None:
    """The same, or why there is nothing to tell, when all that snakemake says has been said."""
    stopped = any(True for _ in last_words())
    at_the_end(
        failures()
        or ("\nInterrupted" if stopped else "\nA job was killed (`dmesg` tells if memory ran out)")
        + ": the same command carries on"
    )
