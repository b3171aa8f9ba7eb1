"""Download progress: one line for all jobs that download files of a data set."""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from olmo.runtime.log import format_count, format_duration, log

REPORT_INTERVAL_S = 5.0
STALE_AFTER_S = 60.0  # a job whose status is older has been killed


class Totals(NamedTuple):
    """A number of files, and of bytes, or None if that is not known."""

    files: int
    bytes: int | None


class DownloadProgress:
    """Counts the bytes that this job receives, and logs the progress of the data set.

    The jobs of a data set run in parallel, on several machines too. Each writes its status to
    `folder`, as <job>.json; the job that finds that nothing was logged for a while logs for all.

    Args:
        folder: shared by the jobs of this data set's downloads.
        total: the files and bytes of the data set.
        finished: returns what the jobs that have ended downloaded; called for every line.
    """

    def __init__(self, folder: Path, total: Totals, finished: Callable[[], Totals]) -> None:
        self.folder, self.total, self.finished = folder, total, finished
        self.status = folder / f"{uuid.uuid4().hex[:12]}.json"
        self.files = self.bytes = 0
        self.started = time.monotonic()
        self.written = 0.0  # when the status was written
        self.lock = threading.Lock()

    def __enter__(self) -> DownloadProgress:
        return self

    def __exit__(self, *_: object) -> None:
        """Log a last time; `finished` counts this job's files from now on."""
        if self.bytes:
            self.report()
            self.status.unlink(missing_ok=True)

    def add_bytes(self, received: int) -> None:
        """Count received bytes."""
        with self.lock:
            self.bytes += received
            if time.monotonic() - self.written >= REPORT_INTERVAL_S:
                self.write_status()
                if self.claim_report():
                    self.report()

    def add_file(self) -> None:
        """Count a file that is complete, or has failed."""
        with self.lock:
            self.files += 1

    def write_status(self) -> None:
        """Write [files, bytes, bytes per second] of this job."""
        self.written = time.monotonic()
        rate = self.bytes / max(self.written - self.started, 1e-3)
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self.status.with_suffix(".draft")
        draft.write_text(json.dumps([self.files, self.bytes, rate]))
        os.replace(draft, self.status)

    def claim_report(self) -> bool:
        """Take the turn to log, unless a job took it within REPORT_INTERVAL_S; whether it did."""
        reported = self.folder / "reported"
        try:
            if time.time() - reported.stat().st_mtime < REPORT_INTERVAL_S:
                return False
        except FileNotFoundError:
            pass
        reported.touch()
        return True

    def report(self) -> None:
        """Log the progress of all jobs in one line."""
        self.write_status()
        files, bytes = self.finished()
        received, rate = bytes or 0, 0.0
        for status in self.folder.glob("*.json"):
            try:
                if time.time() - status.stat().st_mtime > STALE_AFTER_S:
                    status.unlink()
                    continue
                job_files, job_bytes, job_rate = json.loads(status.read_text())
            except (FileNotFoundError, ValueError, TypeError):  # its job has just ended; damaged
                continue
            files, received, rate = files + job_files, received + job_bytes, rate + job_rate
        of = left = ""
        if self.total.bytes is not None:
            of = f" of {format_count(self.total.bytes)}B"
            left = (
                f", {format_duration(max(self.total.bytes - received, 0) / max(rate, 1e-3))} left"
            )
        log.info(
            f"{files:,} of {self.total.files:,} files, {format_count(received)}B{of}, "
            f"{format_count(rate)}B/s{left * (files < self.total.files)}"
        )
