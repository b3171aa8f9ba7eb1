"""The metrics of a run as columns: what pages and terminals draw."""

from __future__ import annotations

import base64
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olmo.train.sinks import METRICS, parse_row, read_metrics

LOSS = "train/CrossEntropyLoss"
RATE = "optim/learning_rate_group0"
NORM = "optim/total_grad_norm"
SPEED = "throughput/device/tokens_per_second"
DATA_WAIT = "throughput/data_wait_share"
MEMORY = ("System/Peak GPU Memory (MB)", "System/Peak CPU Memory (MB)")
PACE = "throughput/device/batches_per_second"  # steps/s, without evaluation and saving
TRAINING = (LOSS, "train/ZLoss", RATE, NORM, SPEED, PACE, DATA_WAIT, *MEMORY)
# Whether more of an evaluation's metric is better cannot be known; these are losses.
LOSSES = ("CrossEntropyLoss", "CrossEntropyLossPerLabel")


@dataclass(frozen=True)
class Series:
    """One metric over the steps that have it, in order."""

    name: str
    steps: list[int]
    values: list[float]


def find_metrics(run: Path) -> list[Path]:
    """The files with a run's metrics, in order: of `final`, else of what was trained so far.

    Args:
        run: checkpoints/<run>.
    """
    if (final := run / "final" / METRICS).exists():
        return [final]
    links = [(int(link.name[5:]), link) for link in run.glob("step-*") if link.name[5:].isdigit()]
    files = [max(links)[1] / METRICS] if links else []
    return [path for path in (*files, run / "run" / METRICS) if path.exists()]


def read_rows(files: Iterable[Path]) -> list[dict[str, Any]]:
    """The metrics of each step in one row: of a metric that it has twice, the last."""
    rows: dict[int, dict[str, Any]] = {}
    for path in files:
        add_rows(rows, read_metrics(path))
    return [rows[step] for step in sorted(rows)]


def add_rows(rows: dict[int, dict[str, Any]], new: Iterable[dict[str, Any]]) -> None:
    for row in new:  # an evaluation may have a row of its own
        rows[row["step"]] = rows.get(row["step"], {}) | row


class MetricsFollower:
    """A run's metrics as they come: of each step what counts.

    A resumed run cuts the file back to its checkpoint and writes the later steps again. That is a
    new file, of which everything is read again.
    """

    def __init__(self, run: Path) -> None:
        self.run, self.version = run, ""  # changes with the metrics
        self._rows: dict[int, dict[str, Any]] = {}
        self._files: list[tuple[Path, int]] = []  # with their inodes
        self._read = 0  # bytes of the last file

    def update(self) -> bool:
        """Read what is new; whether there was something."""
        files = [(path, path.stat().st_ino) for path in find_metrics(self.run)]
        if files != self._files or (files and files[-1][0].stat().st_size < self._read):
            self._rows = {row["step"]: row for row in read_rows(p for p, _ in files[:-1])}
            self._files, self._read = files, 0
        new = self._read_rows(files[-1][0]) if files else []
        add_rows(self._rows, new)
        version = f"{files[-1][1]}-{self._read}" if files else ""
        is_new, self.version = version != self.version, version
        return is_new

    def _read_rows(self, path: Path) -> list[dict[str, Any]]:
        """The whole lines after those that were read; the last may still be written."""
        with path.open("rb") as file:
            file.seek(self._read)
            lines, _, _ = file.read().rpartition(b"\n")
        self._read += len(lines) + bool(lines)
        return [row for line in lines.split(b"\n") if (row := parse_row(line))]

    def series(self) -> dict[str, Series]:
        return collect_series([self._rows[step] for step in sorted(self._rows)])


def collect_series(rows: list[dict[str, Any]]) -> dict[str, Series]:
    """The metrics that are drawn: of training TRAINING, and all of evaluations."""
    found: dict[str, Series] = {}
    for row in rows:
        for name, value in row.items():
            if name in TRAINING or name.startswith("eval/"):
                series = found.setdefault(name, Series(name, [], []))
                series.steps.append(row["step"])
                series.values.append(float(value))
    return found


def pack(series: Series) -> dict[str, Any]:
    """A series for a page: exact values as base64 of little-endian floats of 4 or 8 bytes.

    Most metrics are computed in float32 and have the same value in 4 bytes.
    """
    doubles, floats = array("d", series.values), array("f", clip_to_float32(series.values))
    is_exact = all(a == b or a != a for a, b in zip(doubles, floats, strict=True))
    first = series.steps[0] if series.steps else 0
    is_contiguous = series.steps == list(range(first, first + len(series.steps)))
    return {
        "steps": first if is_contiguous else encode(array("i", series.steps)),
        "type": "f4" if is_exact else "f8",
        "values": encode(floats if is_exact else doubles),
    }


def clip_to_float32(values: list[float]) -> list[float]:
    """Values that `array("f")` takes: those beyond float32 become infinite, and are not exact."""
    most = 3.4028234e38
    return [value if not abs(value) > most else value * float("inf") for value in values]


def encode(numbers: array[Any]) -> str:
    return base64.b64encode(numbers.tobytes()).decode()


def thin(series: Series, buckets: int = 1000) -> Series:
    """At most two points of each bucket of steps, the lowest and the highest: no peak is lost."""
    n = len(series.steps)
    if n <= 2 * buckets:
        return series
    kept = {0, n - 1}
    for bucket in range(buckets):
        part = range(bucket * n // buckets, (bucket + 1) * n // buckets)
        finite = [i for i in part if series.values[i] == series.values[i]] or [part.start]
        kept |= {min(finite, key=series.values.__getitem__)}
        kept |= {max(finite, key=series.values.__getitem__)}
    chosen = sorted(kept)
    return Series(
        series.name, [series.steps[i] for i in chosen], [series.values[i] for i in chosen]
    )


def smooth(values: Iterable[float], weight: float = 0.9) -> list[float]:
    """An exponential moving average, without a bias to its start; NaN does not enter it."""
    total = norm = 0.0
    found = []
    for value in values:
        if value - value == 0:  # finite
            total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        found.append(total / norm if norm else value)
    return found


def metric_label(metric: str) -> str:
    """The legend entry of a metric: "training", or the name of the evaluation set."""
    kind, *name, _ = metric.split("/")
    return "training" if kind == "train" else "/".join(name)
