"""Where metrics go: a line of JSON a step, a line for people, Weights & Biases."""

from __future__ import annotations

import contextlib
import gzip
import os
import secrets
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from olmo.config import TrainConfig
from olmo.io import sealed
from olmo.runtime.log import format_count, format_duration, is_shown_from_log, log
from olmo.runtime.numbers import from_json, to_json

METRICS = "metrics.jsonl"


class Sink(Protocol):
    """A destination of metrics, on rank 0."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write a step's metrics, by OLMo's names; steps come in order."""

    def close(self, exit_code: int) -> None:
        """The run has ended: 0 finished, 75 paused, 1 failed."""


class JsonLines:
    """<save_folder>/metrics.jsonl: {"step": 3, "train/CrossEntropyLoss": …} a step.

    Opened at `step`, it drops later lines and a torn one, which the resumed run writes again. Lines
    have no checksum, since other programs read them; readers skip a damaged one.
    """

    def __init__(self, folder: Path, step: float | None) -> None:
        path = folder / METRICS
        kept = b""
        if step is not None and path.exists():
            kept = b"".join(
                line
                for line in path.read_bytes().splitlines(True)
                if line.endswith(b"\n") and (row := parse_row(line)) and row["step"] <= step
            )
        if not path.exists() or path.read_bytes() != kept:
            sealed.write_atomic(path, kept.decode(), alone=True)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        # One write call a line: killed at any moment, the file has whole lines.
        os.write(self._file, (to_json({"step": step, **metrics}) + "\n").encode())

    def flush(self) -> None:
        """To the disk, before a checkpoint that has these steps."""
        os.fsync(self._file)

    def close(self, exit_code: int) -> None:
        os.close(self._file)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, in order; skips damaged ones with a warning."""
    lines = path.read_bytes().splitlines()
    rows = [row for line in lines if (row := parse_row(line))]
    if len(rows) < len(lines):
        log.warning(
            f"{path}: {len(lines) - len(rows)} of {len(lines)} lines are damaged and skipped"
        )
    return rows


def parse_row(line: bytes) -> dict[str, Any] | None:
    """A step's metrics; None for a line that is visibly damaged."""
    try:
        row: dict[str, Any] = from_json(line)
        numbers = all(
            type(value) is float or (type(value) is int and abs(value) < 2**63)
            for value in row.values()
        )
        return row if numbers and type(row["step"]) is int and 0 <= row["step"] < 2**31 else None
    except (ValueError, KeyError, AttributeError):
        return None


class Console:
    """A dense line every `interval` steps; in a terminal one line that moves, with a bar."""

    def __init__(self, interval: int, last_step: int, stream: TextIO | None = None) -> None:
        self._interval, self._last, self._out = interval, last_step, stream or sys.stdout
        if is_shown_from_log():
            self._out = open(os.devnull, "w")  # noqa: SIM115 - until this process ends
        self._moving = self._out.isatty()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        evaluated: dict[str, list[str]] = {}  # evaluator → its scores
        for name, value in metrics.items():
            if name.startswith("eval/"):
                label, _, score = name.rpartition("/")
                if score == "Perplexity" and f"{label}/BitsPerByte" in metrics:
                    continue  # it is exp(loss); a line of 80 columns has no room for all three
                evaluated.setdefault(label, []).append(f"{score} {value:.4f}")
        text = self._line(step, metrics)
        if self._moving:
            width = 20
            done = int(width * step / max(self._last, 1))
            bar = "█" * done + "░" * (width - done)
            self._out.write(f"\r\x1b[K{bar} {text}" + ("\n" if evaluated else ""))
        trained = "train/CrossEntropyLoss" in metrics
        due = trained and (step % self._interval == 0 or step == self._last)
        if due and not self._moving:
            self._out.write(text + "\n")
        if due:
            log.debug(text)
        for label, scores in evaluated.items():
            line = f"  step {step}: {label}: {', '.join(scores)}"
            self._out.write(line + "\n")
            log.debug(line)
        self._out.flush()

    def _line(self, step: int, metrics: Mapping[str, float]) -> str:
        parts = [f"step {step:>{len(str(self._last))}}/{self._last}"]
        if (loss := metrics.get("train/CrossEntropyLoss")) is not None:
            parts.append(f"loss {loss:.4f}")
        if (norm := metrics.get("optim/total_grad_norm")) is not None:
            parts.append(f"grad norm {norm:.2f}")
        if (rate := metrics.get("optim/learning_rate_group0")) is not None:
            parts.append(f"lr {rate:.2e}")
        if speed := metrics.get("throughput/device/tokens_per_second"):
            parts.append(f"{format_count(speed)} tokens/s/device")
        if mfu := metrics.get("throughput/device/mfu_palm"):
            parts.append(
                f"MFU {mfu:.1%} (PaLM), {metrics['throughput/device/mfu_causal']:.1%} (causal)"
            )
        if pace := metrics.get("throughput/device/batches_per_second"):
            parts.append(f"ETA {format_duration((self._last - step) / pace)}")
        return "  ".join(parts)

    def close(self, exit_code: int) -> None:
        if self._moving:
            self._out.write("\n")


class WeightsAndBiases:
    """Every wandb.log_interval-th step and all evaluations. A resumed run continues in the same
    wandb run, whose id is in <save_folder>/wandb/id."""

    def __init__(self, cfg: TrainConfig, resumed: bool) -> None:
        import wandb

        assert cfg.wandb is not None
        settings = cfg.wandb
        folder = Path(cfg.save_folder) / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        self._interval = settings.log_interval
        id = folder / "id"
        if not (resumed and id.is_file()):
            id.write_text(secrets.token_hex(4))
        # wandb reads WANDB_MODE and its other variables itself.
        self._run: Any = wandb.init(
            dir=str(folder),
            id=id.read_text(),
            resume="allow",
            project=settings.project,
            entity=settings.entity,
            group=settings.group,
            name=settings.name,
            tags=settings.tags,
            config=cfg.asdict_for_saving(exclude=["wandb"]),
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        if is_logged(step, metrics, self._interval):
            self._run.log(dict(metrics), step=step)

    def close(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)


class Trackio:
    """Every trackio.log_interval-th step and all evaluations, to Trackio (TRACKIO_SERVER_URL)."""

    def __init__(self, cfg: TrainConfig, resumed: bool) -> None:
        import trackio

        assert cfg.trackio is not None
        self._interval = cfg.trackio.log_interval
        self._run: Any = trackio.init(
            project=cfg.trackio.project,
            name=cfg.trackio.name or cfg.run_name,
            config=cfg.asdict_for_saving(exclude=["trackio"]),
            resume="allow" if resumed else "never",
            embed=False,
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        if is_logged(step, metrics, self._interval):
            self._run.log(dict(metrics), step=step)

    def close(self, exit_code: int) -> None:
        self._run.finish()


class Tensorboard:
    """Every tensorboard.log_interval-th step and all evaluations, as event files.

    Opened at `step`, later steps of an earlier attempt are hidden, as the resumed run writes them.
    """

    def __init__(self, cfg: TrainConfig, step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        assert cfg.tensorboard is not None
        self._interval = cfg.tensorboard.log_interval
        purge = None if step is None else step + 1
        self._writer = SummaryWriter(str(Path(cfg.save_folder) / "tensorboard"), purge_step=purge)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        if is_logged(step, metrics, self._interval):
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)

    def close(self, exit_code: int) -> None:
        self._writer.close()


def is_logged(step: int, metrics: Mapping[str, float], interval: int) -> bool:
    """Whether a tracker is told of a step: every `interval`-th, and all evaluations."""
    return step % interval == 0 or any(name.startswith("eval/") for name in metrics)


class DataIndices:
    """<save_folder>/data-indices/rank{r}.tsv.gz: a step, then the instances of this process.

    Opened at `step`, it keeps the lines up to there. Rank 0 cuts the files of ranks beyond `size`
    too (an earlier, larger world), and all files where save_data_indices is false.
    """

    def __init__(self, cfg: TrainConfig, rank: int, size: int, step: int | None) -> None:
        self._file: gzip.GzipFile | None = None
        if cfg.dry_run:
            return
        path = Path(cfg.save_folder) / "data-indices" / f"rank{rank}.tsv.gz"
        stay = size if cfg.save_data_indices else 0
        for other in path.parent.glob("rank*.tsv.gz") if rank == 0 else ():
            if int(other.name.removeprefix("rank").removesuffix(".tsv.gz")) >= stay:
                self._open(other, step)
                self.close()
                self._file = None
        if cfg.save_data_indices:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._open(path, step)

    def _open(self, path: Path, step: int | None) -> None:
        kept = list(lines_upto(path, step)) if step is not None and path.exists() else []
        partial = path.with_suffix(".partial")
        # Without a name and time in the gzip header: equal lines are equal bytes.
        self._raw = open(partial, "wb")  # noqa: SIM115 - closed by close()
        self._file = gzip.GzipFile("", "wb", fileobj=self._raw, mtime=0)
        self._file.writelines(kept)
        self.flush()
        partial.replace(path)

    def write(self, step: int, indices: Iterable[int]) -> None:
        if self._file is not None:
            row = "\t".join(map(str, indices))
            self._file.write(f"{step}\t{row}\n".encode())

    def flush(self) -> None:
        """Write all rows so far to the file, complete and readable."""
        if self._file is not None:
            self._file.flush()
            self._raw.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._raw.close()


def lines_upto(path: Path, step: int) -> Iterator[bytes]:
    """Whole lines up to a step, of a file that may be torn."""
    with contextlib.suppress(EOFError, zlib.error, gzip.BadGzipFile), gzip.open(path) as stream:
        for line in stream:
            if not line.endswith(b"\n") or int(line.split(b"\t")[0]) > step:
                return
            yield line
