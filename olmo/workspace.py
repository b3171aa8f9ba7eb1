"""The folder in which snakemake runs: one at a time in it, and what to do when it is done."""

import fcntl
import json
import os
import sys
import time
from pathlib import Path
from typing import IO

from olmo.log import FAILED
from olmo.pipeline import Plan, recipe_path

STARTED = time.time()
_lock: list[IO[str]] = []  # held for as long as this process lives


def alone(folder: Path = Path(".snakemake")) -> None:
    """Refuse to run where another snakemake runs; one that was killed leaves nothing behind.

    Two of them in one folder would delete each other's outputs. (Snakemake's own lock is a file
    that outlives a killed process; this one is the kernel's. Stages do not need either: the store
    has leases.)
    """
    folder.mkdir(exist_ok=True)
    lock = (folder / "running").open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        sys.exit(
            f"another snakemake (pid {lock.read().strip()}) runs in {os.getcwd()}; wait for it, "
            "or use another folder with the same store (OLMO_STORE)"
        )
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    _lock.append(lock)


def next_steps(plan: Plan) -> str:
    """What a user may want to do with the checkpoints that this process finished."""
    lines = []
    for run in plan.pipeline.runs:
        final = Path("checkpoints") / run / "final"
        record = final / "record.json"
        if not record.exists() or record.lstat().st_mtime < STARTED - 1:
            continue
        facts = json.loads(record.read_text())["facts"]
        losses = facts.get("heldout_loss", {})
        fell = "".join(
            f"  {label}: held-out loss {loss['first']:.3f} → {loss['last']:.3f} nats\n"
            for label, loss in losses.items()
        )
        lines.append(
            f"\n{final} is ready: {facts.get('steps'):,} steps, {facts.get('tokens'):,} tokens.\n"
            f"{fell}"
            f"  Look at the losses:        {final}/loss.svg\n"
            f"  How it was made:           olmo store trace {final}\n"
            f"  Evaluate it:               snakemake --cores 2 eval/{run}\n"
            f"  For transformers:          snakemake --cores 2 hf/{run}\n"
            f"  Change one thing:          edit {plan.run(run).train} or "
            f"{recipe_path(plan.dataset(run))}, and run the same again"
        )
    return "\n".join(lines)


def failures(logs: Path = Path("logs")) -> str:
    """What this process's jobs failed of, together: some of it scrolled by long ago."""
    lines = []
    for path in sorted(logs.rglob("*.log")):
        if path.stat().st_mtime < STARTED - 1:
            continue
        said = "\n" + path.read_text(encoding="utf-8")
        _, failed, last = said.rpartition(f"\n{FAILED}")
        if failed and not last.startswith(SystemExit.__name__):  # one that was told to stop
            lines.append(f"{path}:\n  " + last.rstrip().replace("\n", "\n  "))
    return "\n".join(["", f"What failed ({len(lines)}):", *lines]) if lines else ""
