"""`olmo runs`: every run of the project, what it is doing, and how far it came."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from olmo.config import list_shown_runs, read_project_config
from olmo.io.sealed import Damaged
from olmo.report.series import HELDOUT, HELDOUT_ANSWERS, HELDOUT_BITS, LOSS, SPEED
from olmo.runtime.log import format_count, format_duration
from olmo.runtime.process import CAUSE_FILE, PAUSED_FILE
from olmo.store.lease import LEASE_TIMEOUT_S, held_names
from olmo.store.record import Record, parse_record
from olmo.store.stage import current_store
from olmo.train.sinks import parse_row

TAIL_BYTES = 1 << 16  # of metrics.jsonl, in which its last rows are
# Column → whether its values are numbers, aligned to the right.
COLUMNS = {
    "run": False,
    "state": False,
    "step": True,
    "loss": True,
    "held-out": True,
    "bits/byte": True,
    "tokens/s": True,
    "age": True,
    "size": True,
    "trained": True,
    "cost": True,
}
ORDER = ("running", "failed", "paused", "stopped", "done", "not begun")


@dataclass(frozen=True)
class RunState:
    """A run as its folder shows it; None for what is not known."""

    name: str
    state: str  # one of ORDER
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    heldout_loss: float | None = None
    heldout_bits: float | None = None  # a byte
    tokens_per_s: float | None = None  # of a device
    last_change: float | None = None  # seconds since the epoch
    bytes: int | None = None
    seconds: float | None = None  # of the training, when it is done
    cost: str = ""  # likewise, if config/config.yaml has a price

    def cells(self, now: float) -> list[str]:
        """The run as a row of the table."""
        step = "" if self.step is None else f"{self.step:,}"
        step += f"/{self.steps:,}" if self.steps and step else ""
        return [
            self.name,
            self.state,
            step,
            "" if self.loss is None else f"{self.loss:.3f}",
            "" if self.heldout_loss is None else f"{self.heldout_loss:.3f}",
            "" if self.heldout_bits is None else f"{self.heldout_bits:.3f}",
            "" if self.tokens_per_s is None else format_count(self.tokens_per_s),
            "" if self.last_change is None else format_age(now - self.last_change),
            "" if self.bytes is None else f"{format_count(self.bytes)}B",
            "" if self.seconds is None else format_duration(self.seconds),
            self.cost,
        ]


def runs() -> None:
    """List the runs: state, step, losses, speed, age, size, time and cost.

    A run is `running` where a process of any machine holds its lease. `age` is the time since its
    last step. `held-out` is a loss in nats per token; `bits/byte` is its text's, which can be
    compared with that of another tokenizer. `size` is that of its checkpoints. `cost` is that of
    the training by `price` of config/config.yaml. A ladder's runs are listed once they begin.

    Example:
        olmo runs
    """
    names = list_shown_runs()
    made = [path.name for path in sorted(Path("checkpoints").glob("*")) if path.is_dir()]
    held = held_names(current_store().root / "leases")
    price = read_project_config().get("price") or {}
    found = [find_state(name, held, price) for name in dict.fromkeys([*names, *made])]
    found.sort(key=lambda run: (ORDER.index(run.state), -(run.last_change or 0)))
    print(format_table([run.cells(time.time()) for run in found]))


def find_state(name: str, held: Sequence[str], price: dict[str, Any]) -> RunState:
    """The state of a run, from its final checkpoint, or from the folder it is trained in."""
    folder = Path("checkpoints", name)
    attempt, final = folder / "run", folder / "final"
    if (record_path := final / "record.json").exists():
        try:
            records: list[Any] = training_records(folder)
        except Damaged:
            records = [{"facts": {}}]
        record, seconds = records[-1], [one.get("run", {}).get("wall_s") for one in records]
        facts = record["facts"]
        last = last_metrics(final / "metrics.jsonl")
        losses = facts.get("heldout_loss", {}).get("heldout", {})
        heldout = losses.get("last")
        return RunState(
            name,
            "done",
            facts.get("steps"),
            facts.get("steps"),
            learned_loss(last),
            None if heldout is None else float(heldout),
            last.get(HELDOUT_BITS),
            last.get(SPEED),
            record_path.stat().st_mtime,
            folder_bytes(folder),
            None if None in seconds else sum(seconds),
            format_cost(records, price),
        )
    metrics = attempt / "metrics.jsonl"
    if not attempt.exists():
        return RunState(name, "not begun")
    last = last_metrics(metrics)
    return RunState(
        name,
        unfinished_state(attempt, held),
        last.get("step"),
        planned_steps(attempt),
        learned_loss(last),
        last.get(HELDOUT_ANSWERS, last.get(HELDOUT)),
        last.get(HELDOUT_BITS),
        last.get(SPEED),
        metrics.stat().st_mtime if metrics.exists() else attempt.stat().st_mtime,
        folder_bytes(folder),
    )


def training_records(folder: Path) -> list[Record]:
    """The records of a finished run: those of the links that it is cut into, and the last one."""
    links = [path for path in folder.glob("step-*/record.json") if path.parent.name[5:].isdigit()]
    links.sort(key=lambda path: int(path.parent.name[5:]))
    paths = [*links, folder / "final/record.json"]
    return [parse_record(path.read_bytes(), path) for path in paths]


def format_cost(records: Sequence[Any], price: dict[str, Any]) -> str:
    """What a training cost, by its GPU-hours and measured energy; "" if that is not known."""
    gpu_hours = energy = 0.0
    for record in records:
        conditions, run = record.get("conditions", {}), record.get("run", {})
        on_gpu = "NVIDIA" in str(conditions.get("device"))
        gpu_hours += run.get("wall_s", 0) / 3600 * conditions.get("processes", 1) * on_gpu
        energy += (run.get("machine_energy_j") or 0) / 3.6e6
    money = gpu_hours * (price.get("gpu_hour") or 0) + energy * (price.get("kwh") or 0)
    return f"{money:.2f} {price.get('currency', 'USD')}" if money else ""


def learned_loss(last: dict[str, Any]) -> float | None:
    """The last training loss; None of a tuned run, since it counts the questions' tokens."""
    return None if HELDOUT_ANSWERS in last else last.get(LOSS)


def unfinished_state(attempt: Path, held: Sequence[str]) -> str:
    """Whether a run without a final checkpoint is trained now, or why not."""
    key = attempt.resolve().parent.name
    if key in held and is_touched(key):
        return "running"
    if (attempt / CAUSE_FILE).exists():
        return "failed"
    return "paused" if (attempt / PAUSED_FILE).exists() else "stopped"


def is_touched(key: str) -> bool:
    """Whether a holder, on this machine or another, has touched its lease lately."""
    leases = (current_store().root / "leases").glob(f"{key}.*")
    return any(time.time() - path.stat().st_mtime < LEASE_TIMEOUT_S for path in leases)


def planned_steps(attempt: Path) -> int | None:
    """`max_duration` of a run, if that is a number of steps."""
    given = attempt / "given.yaml"
    found = yaml.safe_load(given.read_text(encoding="utf-8")) if given.exists() else {}
    duration = found.get("max_duration") if isinstance(found, dict) else None
    return duration if isinstance(duration, int) else None


def last_metrics(path: Path) -> dict[str, Any]:
    """The last value of each metric, in a file's last rows and its last evaluation; {} if none."""
    if not path.exists() or not (size := path.stat().st_size):
        return {}
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        lines = content[max(0, size - TAIL_BYTES) :].splitlines()  # the first may be cut
        evaluation = content.rfind(b'"eval/')
        if 0 <= evaluation < size - TAIL_BYTES:
            start = content.rfind(b"\n", 0, evaluation) + 1
            lines.insert(0, content[start : content.find(b"\n", evaluation)])
    values: dict[str, Any] = {}
    for line in lines:
        values |= parse_row(line) or {}  # the last may still be written
    return values


def folder_bytes(folder: Path) -> int:
    """The size of all files below a folder, through links, each file once."""
    sizes = {}
    for path, _, names in os.walk(folder, followlinks=True):
        for name in names:
            try:
                found = os.stat(os.path.join(path, name))
            except FileNotFoundError:  # removed meanwhile, or a dangling link
                continue
            sizes[found.st_dev, found.st_ino] = found.st_size
    return sum(sizes.values())


def format_age(seconds: float) -> str:
    """A time in its largest unit.

    >>> format_age(59), format_age(7200), format_age(3 * 86400)
    ('59 s', '2 h', '3 days')
    """
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"


def format_table(rows: list[list[str]]) -> str:
    """Rows under COLUMNS; columns without a value are left out."""
    table = [list(COLUMNS), *rows]
    shown = [i for i, _ in enumerate(COLUMNS) if i < 2 or any(row[i] for row in rows)]
    widths = {i: max(len(row[i]) for row in table) for i in shown}
    to_right = list(COLUMNS.values())
    lines = [
        "  ".join(
            row[i].rjust(widths[i]) if to_right[i] else row[i].ljust(widths[i]) for i in shown
        )
        for row in table
    ]
    return "\n".join(line.rstrip() for line in lines)
