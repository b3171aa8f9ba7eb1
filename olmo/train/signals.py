"""Reasons to save and exit early: a signal, the file `stop`, the time limit."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from types import FrameType

from olmo.runtime.process import STOP_FILE


class StopRequest:
    """Whether to stop early. Asking costs one `stat` at most.

    Args:
        folder: the run's, where a file named `stop` is a request.
        time_limit: in seconds from now.
    """

    def __init__(self, folder: Path, time_limit: float | None = None) -> None:
        self._file = folder / STOP_FILE
        self._deadline = None if time_limit is None else time.monotonic() + time_limit
        self._signal: str | None = None

    def listen(self, *signals: signal.Signals) -> None:
        """Treat these signals (a scheduler's, torchrun's) as a request. Main thread only."""
        for number in signals:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number).name

    def reason(self, look: bool) -> str | None:
        """Why to stop, or None. `look` for the file on one process only."""
        if self._signal is not None:
            return self._signal
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return "the time limit"
        if look and self._file.exists():
            return self._file.read_text().strip() or f"the file {self._file}"
        return None

    def clear(self) -> None:
        """Remove the file, so that the next start does not stop."""
        self._file.unlink(missing_ok=True)
