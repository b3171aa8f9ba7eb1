"""The logger: info on stdout, warnings and errors on stderr, everything in a stage's log file."""

from __future__ import annotations

import errno
import logging
import os
import sys
from contextlib import suppress

from olmo.runtime.urls import redact

# The log file of a stage and its child processes; set by `olmo <stage> --log FILE`.
LOG_ENV = "OLMO_LOG"
# Set for the jobs of a snakemake whose logger plugin shows what they write to their log files: the
# terminal is the plugin's alone (olmo.pipeline.screen).
SHOWN_ENV = "OLMO_LOG_IS_SHOWN"
FAILED = "failed: "  # begins the last line in the log of a failed command
# What such a line begins with where a signal ended the command, which is no failure.
STOPPED = (SystemExit.__name__, KeyboardInterrupt.__name__)
REMEDIES = {
    errno.ENOENT: ", and none can be made there; name another place",
    errno.ENOSPC: ": the disk is full; make room, then run the same command again",
    errno.EDQUOT: ": the quota is full; make room, then run the same command again",
    errno.EIO: ": the disk, or its file system, fails; repair it, then run the same command again",
    errno.EROFS: "; name a place that can be written",
    errno.ENOTDIR: "; name another place",
    errno.EEXIST: "; name another place",
    errno.EISDIR: "; name another place",
    errno.EACCES: "; name another place, or let this user use it",
    errno.EPERM: "; name another place, or let this user use it",
}
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


def is_shown_from_log() -> bool:
    """Whether snakemake's logger plugin shows what this process writes to its log file."""
    return bool(os.environ.get(SHOWN_ENV)) and LOG_ENV in os.environ


class _Lines(logging.Handler):
    """Writes each message as one line: info to stdout, warnings and errors to stderr, all of them
    and debug messages to the log file. Credentials in URLs are removed."""

    def emit(self, record: logging.LogRecord) -> None:
        text = redact(record.getMessage())
        if record.levelno == logging.WARNING:
            text = f"WARNING: {text}"
        if record.levelno >= logging.INFO and not is_shown_from_log():
            stream = sys.stdout if record.levelno == logging.INFO else sys.stderr
            # One write: `print` writes the newline apart, and other processes write in between.
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
    """Drop info and warnings on other ranks than 0; debug messages and errors stay."""
    either = (logging.DEBUG, logging.ERROR)
    log.filters[:] = [] if is_rank0 else [lambda record: record.levelno in either]


def describe_error(error: Exception) -> str:
    """An error as one sentence; an OSError with its file and a remedy.

    >>> describe_error(FileNotFoundError(2, "No such file or directory", "/proc/x"))
    '/proc/x: No such file or directory, and none can be made there; name another place'
    """
    number, message = find_disk_errno(error), str(error)
    if isinstance(error, OSError) and error.filename is not None and error.filename2 is None:
        number, place = error.errno or 0, error.filename
        place = "an open file" if isinstance(place, int) else os.fsdecode(place)
        message = f"{place}: {error.strerror}"
    elif isinstance(error, ValueError):
        return message
    return f"{message}{REMEDIES.get(number, '')}"


def find_disk_errno(error: Exception) -> int:
    """The errno of an error that means a full or failing disk, of any class; 0 for another.

    polars, safetensors and tokenizers raise classes of their own, with the reason in the message.

    >>> find_disk_errno(RuntimeError("IO error: No space left on device (os error 28)"))
    28
    """
    number = error.errno if isinstance(error, OSError) else None
    given = (n for n in DISK_ERRORS if os.strerror(n) in str(error))
    return number if number in DISK_ERRORS else next(given, 0)


def format_duration(seconds: float) -> str:
    """3725 seconds are 1:02:05.

    >>> format_duration(3725), format_duration(5)
    ('1:02:05', '0:05')
    """
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def format_bytes(n: float) -> str:
    """A number of bytes with three digits and a unit of powers of ten.

    >>> format_bytes(950), format_bytes(74.6e9), format_bytes(5.4e12)
    ('950 B', '74.6 GB', '5.4 TB')
    """
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n >= limit:
            return f"{n / limit:.3g} {unit}"
    return f"{n:.0f} B"


def format_number(n: int, noun: str) -> str:
    """How many there are of what a regular noun names.

    >>> format_number(1, "file"), format_number(2_000, "file")
    ('1 file', '2,000 files')
    """
    return f"{n:,} {noun}{'s' * (n != 1)}"


def format_count(n: float) -> str:
    """A number with three digits and a unit.

    >>> format_count(950), format_count(21_460), format_count(3_100_000), format_count(7e9)
    ('950', '21.5k', '3.1M', '7B')
    """
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= limit:
            return f"{n / limit:.3g}{unit}"
    return f"{n:.3g}"
