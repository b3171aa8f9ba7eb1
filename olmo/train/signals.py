"""Reasons to stop before the end: a signal, the time limit. The loop saves and leaves."""

from __future__ import annotations

import signal
import time
from types import FrameType

# What a paused run exits with: sysexits' EX_TEMPFAIL, "try again and it goes on". Under torchrun
# the launcher's own exit code hides it.
PAUSED = 75


class StopRequest:
    """Remembers the first reason to stop early; asking costs nothing."""

    def __init__(self, time_limit: float | None = None) -> None:
        """`time_limit`: seconds from now."""
        self._deadline = None if time_limit is None else time.monotonic() + time_limit
        self._signal: str | None = None

    def listen(self) -> None:
        """Take SIGTERM (a scheduler's, torchrun's) as a wish to stop. Main thread only."""
        signal.signal(signal.SIGTERM, self._heard)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number).name

    @property
    def reason(self) -> str | None:
        if self._signal is not None:
            return self._signal
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return "the time limit"
        return None
