"""Reasons to stop before the end: a signal, a file, the time limit. The loop saves and leaves."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from types import FrameType

from olmo.runtime.process import STOP_FILE


class StopRequest:
    """Remembers the first reason to stop early; asking costs no more than a look at a folder."""

    def __init__(self, folder: Path, time_limit: float | None = None) -> None:
        """`folder`: where a file called `stop` is a request; `time_limit`: seconds from now."""
        self._file = folder / STOP_FILE
        self._deadline = None if time_limit is None else time.monotonic() + time_limit
        self._signal: str | None = None

    def listen(self, *signals: signal.Signals) -> None:
        """Take these (a scheduler's, torchrun's) as a wish to stop. Main thread only."""
        for number in signals:
            signal.signal(number, self._heard)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number).name

    def reason(self, look: bool) -> str | None:
        """Why to stop, or None. One process has to `look` for the file, not all."""
        if self._signal is not None:
            return self._signal
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return "the time limit"
        if look and self._file.exists():
            return self._file.read_text().strip() or f"the file {self._file}"
        return None

    def met(self) -> None:
        """It has been done as asked: the next start is not to stop."""
        self._file.unlink(missing_ok=True)
