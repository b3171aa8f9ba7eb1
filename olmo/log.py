"""What a program tells: lines on stdout for people, one process speaking."""

from __future__ import annotations

import sys

_quiet = False


def speak(aloud: bool) -> None:
    """Let this process tell things, or hold its tongue (all ranks but the first do)."""
    global _quiet
    _quiet = not aloud


def tell(text: str) -> None:
    """One line about what happens and why."""
    if not _quiet:
        print(text, flush=True)


def warn(text: str) -> None:
    """One loud line about what is not as it should be, on stderr."""
    if not _quiet:
        print(f"WARNING: {text}", file=sys.stderr, flush=True)


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
