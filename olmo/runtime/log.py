"""The logger: what happens on stdout, what is wrong on stderr, and both in a stage's log file."""

from __future__ import annotations

import errno
import logging
import os
import sys
from contextlib import suppress

from olmo.runtime.urls import redact

# The log file of a stage, also for what it starts: `olmo <stage> --log FILE` sets it.
LOG_ENV = "OLMO_LOG"
FAILED = "failed: "  # begins the last words in the log of a command that failed
REMEDIES = {
    errno.ENOENT: ", and none can be made there; name another place",
    errno.ENOSPC: ": the disk is full; make room, then run the same command again",
    errno.EDQUOT: ": the quota is full; make room, then run the same command again",
    errno.EIO: ": the disk, or its file system, fails; mend it, then run the same command again",
    errno.EROFS: "; name a place that can be written",
    errno.EACCES: "; name another place, or let this user use it",
    errno.EPERM: "; name another place, or let this user use it",
}


class _Lines(logging.Handler):
    """A line in one piece for each message: info on stdout, warnings and errors on stderr, and all
    in the log file; debug messages there alone. Credentials in URLs are masked."""

    def emit(self, record: logging.LogRecord) -> None:
        text = redact(record.getMessage())
        if record.levelno >= logging.INFO:
            stream = sys.stdout if record.levelno == logging.INFO else sys.stderr
            mark = "WARNING: " if record.levelno == logging.WARNING else ""
            text = f"{mark}{text}"
            # `print` writes the line's end apart, and another process may write in between.
            stream.write(f"{text}\n")
            stream.flush()
        if path := os.environ.get(LOG_ENV):
            with suppress(OSError), open(path, "a", encoding="utf-8") as file:  # a full disk
                file.write(f"{text}\n")


log = logging.getLogger("olmo")
log.setLevel(logging.DEBUG)
log.propagate = False
log.handlers[:] = [_Lines()]


def log_on_rank0_only(is_rank0: bool) -> None:
    """Leave what all ranks would say alike to rank 0; errors, and the log file, are for any."""
    either = (logging.DEBUG, logging.ERROR)
    log.filters[:] = [] if is_rank0 else [lambda record: record.levelno in either]


def describe_error(error: Exception) -> str:
    """An error in a sentence; the system's own errors with the file and the remedy.

    >>> describe_error(FileNotFoundError(2, "No such file or directory", "/proc/x"))
    '/proc/x: No such file or directory, and none can be made there; name another place'
    """
    if not isinstance(error, OSError):
        return str(error)
    number, said = error.errno or 0, str(error)
    if not number:  # as polars gives it
        number = next((n for n in REMEDIES if f"(os error {n})" in said), 0)
    if error.filename is not None and error.filename2 is None:
        place = error.filename
        place = "an open file" if isinstance(place, int) else os.fsdecode(place)
        said = f"{place}: {error.strerror}"
    elif number not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
        return said  # it is in words already
    return f"{said}{REMEDIES.get(number, '')}"


def format_duration(seconds: float) -> str:
    """3725 seconds are 1:02:05.

    >>> format_duration(3725), format_duration(5)
    ('1:02:05', '0:05')
    """
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def format_count(n: float) -> str:
    """A number at a glance.

    >>> format_count(950), format_count(21_460), format_count(3_100_000), format_count(7e9)
    ('950', '21.5k', '3.1M', '7B')
    """
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= limit:
            return f"{n / limit:.3g}{unit}"
    return f"{n:.3g}"
