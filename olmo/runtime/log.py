"""What a program tells: lines for people, one process speaking, and a copy in a log file."""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress
from typing import TextIO

from olmo.runtime.urls import public

# The log file of a stage, also for what it starts: `olmo <stage> --log FILE` sets it.
LOG = "OLMO_LOG"
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

_quiet = False


def speak(aloud: bool) -> None:
    """Let this process tell things, or hold its tongue (all ranks but the first do)."""
    global _quiet
    _quiet = not aloud


def tell(text: str) -> None:
    """One line about what happens and why."""
    if not _quiet:
        line(text, sys.stdout)
        keep(text)


def warn(text: str) -> None:
    """One loud line about what is not as it should be, on stderr."""
    if not _quiet:
        say(f"WARNING: {text}")


def say(text: str) -> None:
    """One line on stderr, from any process."""
    line(text, sys.stderr)
    keep(text)


def line(text: str, stream: TextIO) -> None:
    """Write a line in one piece: `print` writes its end apart, and another thread in between."""
    stream.write(f"{public(text)}\n")
    stream.flush()


def keep(text: str) -> None:
    """One line for the log file alone: what is on the terminal already."""
    if path := os.environ.get(LOG):
        with suppress(OSError), open(path, "a", encoding="utf-8") as file:  # a full disk
            file.write(public(text) + "\n")


def reason(error: Exception) -> str:
    """An error in a sentence: what the system says of a file comes with what can be done.

    >>> reason(FileNotFoundError(2, "No such file or directory", "/proc/x"))
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


def duration(seconds: float) -> str:
    """3725 seconds are 1:02:05.

    >>> duration(3725), duration(5)
    ('1:02:05', '0:05')
    """
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def count(n: float) -> str:
    """A number at a glance.

    >>> count(950), count(21_460), count(3_100_000), count(7e9)
    ('950', '21.5k', '3.1M', '7B')
    """
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= limit:
            return f"{n / limit:.3g}{unit}"
    return f"{n:.3g}"
