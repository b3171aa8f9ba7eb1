"""How the downloads of a data set get on: one line for all of them, whichever jobs they are in."""

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
STALE_AFTER_S = 60.0  # a job that left no word for so long is not there any more


class Totals(NamedTuple):
    """So many files and bytes; None: nobody knows how many bytes."""

    files: int
    bytes: int | None


class DownloadProgress:
    """Counts what arrives in this job and tells, every few seconds, how the whole set gets on.

    The jobs of a data set run side by side, on several machines too, and know of each other by
    `folder`: each leaves there the word <job>.json, and whoever finds that nothing has been told
    for a while tells it for all.

    Args:
        folder: of this data set's downloads.
        whole: what the data set holds.
        finished: what the jobs that have ended brought, asked for with every line.
    """

    def __init__(self, folder: Path, whole: Totals, finished: Callable[[], Totals]) -> None:
        self.folder, self.whole, self.finished = folder, whole, finished
        self.word = folder / f"{uuid.uuid4().hex[:12]}.json"
        self.files = self.bytes = 0
        self.began = time.monotonic()
        self.left_word = 0.0
        self.lock = threading.Lock()

    def __enter__(self) -> DownloadProgress:
        return self

    def __exit__(self, *_: object) -> None:
        """The last word: this job's files are in its listing from now on."""
        if self.bytes:
            self.report()
            self.word.unlink(missing_ok=True)

    def add(self, received: int) -> None:
        """So many bytes came over the net."""
        with self.lock:
            self.bytes += received
            if time.monotonic() - self.left_word >= REPORT_INTERVAL_S:
                self.leave_word()
                if self.nobody_reported():
                    self.report()

    def finish(self) -> None:
        """A file is here, or will not come."""
        with self.lock:
            self.files += 1

    def leave_word(self) -> None:
        self.left_word = time.monotonic()
        rate = self.bytes / max(self.left_word - self.began, 1e-3)
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self.word.with_suffix(".draft")
        draft.write_text(json.dumps([self.files, self.bytes, rate]))
        os.replace(draft, self.word)

    def nobody_reported(self) -> bool:
        """Whether this job is to report: no other has for a while."""
        reported = self.folder / "reported"
        try:
            if time.time() - reported.stat().st_mtime < REPORT_INTERVAL_S:
                return False
        except FileNotFoundError:
            pass
        reported.touch()
        return True

    def report(self) -> None:
        self.leave_word()
        files, bytes = self.finished()
        here, rate = bytes or 0, 0.0
        for word in self.folder.glob("*.json"):
            try:
                if time.time() - word.stat().st_mtime > STALE_AFTER_S:
                    word.unlink()
                    continue
                more, received, speed = json.loads(word.read_text())
            except (FileNotFoundError, ValueError, TypeError):  # its job has just ended; damaged
                continue
            files, here, rate = files + more, here + received, rate + speed
        of = left = ""
        if self.whole.bytes is not None:
            of = f" of {format_count(self.whole.bytes)}B"
            left = f", {format_duration(max(self.whole.bytes - here, 0) / max(rate, 1e-3))} left"
        log.info(
            f"{files:,} of {self.whole.files:,} files, {format_count(here)}B{of}, "
            f"{format_count(rate)}B/s{left * (files < self.whole.files)}"
        )
