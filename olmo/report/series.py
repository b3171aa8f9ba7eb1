"""The metrics of a run as columns: what pages and terminals draw."""

from __future__ import annotations

import base64
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olmo.train.sinks import METRICS, parse_row, read_metrics

LOSS = "train/CrossEntropyLoss"
HELDOUT = "eval/heldout/CrossEntropyLoss"
HELDOUT_ANSWERS = f"{HELDOUT}PerLabel"  # of a run that is tuned on conversations
HELDOUT_BITS = "eval/heldout/BitsPerByte"  # comparable for other tokenizers, too
RATE = "optim/learning_rate_group0"
NORM = "optim/total_grad_norm"
SPEED = "throughput/device/tokens_per_second"
DATA_WAIT = "throughput/data_wait_share"
MEMORY = ("System/Peak GPU Memory (MB)", "System/Peak CPU Memory (MB)")
PACE = "throughput/device/batches_per_second"  # steps/s, without evaluation and saving
TRAINING = (LOSS, "train/ZLoss", RATE, NORM, SPEED, PACE, DATA_WAIT, *MEMORY)
# Whether more of an evaluation's metric is better cannot be known; these are losses.
LOSSES = ("CrossEntropyLoss", "CrossEntropyLossPerLabel", "BitsPerByte")


@dataclass(frozen=True)
class Series:
    """One metric over the steps that have it, in order."""

    name: str
    steps: list[int]
    values: list[float]

    def put(self, step: int, value: float) -> None:
        """Add a step, which is mostly the last; if it is there, its value is replaced."""
        at = bisect_left(self.steps, step)
        there = at < len(self.steps) and self.steps[at] == step
        self.steps[at : at + there], self.values[at : at + there] = [step], [value]


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


def read_series(files: Iterable[Path]) -> dict[str, Series]:
    """The metrics in files; of a step's metric that is there twice, the last."""
    return collect_series(row for path in files for row in read_metrics(path))


def collect_series(
    rows: Iterable[dict[str, Any]], found: dict[str, Series] | None = None
) -> dict[str, Series]:
    """The metrics that are drawn: of training TRAINING, and all of evaluations.

    Args:
        found: of earlier rows, to which these are added.
    """
    found = {} if found is None else found
    for row in rows:
        for name, value in row.items():
            if name in TRAINING or name.startswith("eval/"):
                found.setdefault(name, Series(name, [], [])).put(row["step"], float(value))
    return found


class MetricsFollower:
    """A run's metrics as they come: of each step what counts.

    A resumed run cuts the file back to its checkpoint and writes the later steps again. That is a
    new file, of which everything is read again.

    Args:
        find: the files that have the metrics now, in order.
    """

    def __init__(self, find: Callable[[], list[Path]]) -> None:
        self.find, self.version = find, ""  # changes with the metrics
        self.series: dict[str, Series] = {}
        self._files: list[tuple[Path, int]] = []  # with their inodes
        self._read = 0  # bytes of the last file

    def update(self) -> bool:
        """Read what is new; whether there was something."""
        files = [(path, path.stat().st_ino) for path in self.find()]
        if files != self._files or (files and files[-1][0].stat().st_size < self._read):
            self.series = read_series(path for path, _ in files[:-1])
            self._files, self._read = files, 0
        if files:
            collect_series(self._read_rows(files[-1][0]), self.series)
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
