"""A run that hangs is ended, with the stacks of all its processes in the log.

A collective waits for a process that is stopped, looping or gone without a word, and would wait
for ever. Each process therefore watches its own progress. When none has come for `hang_timeout`
seconds it says where each of its threads is and what the other processes of its machine are
doing, and ends; the launcher ends the rest. All processes stop making progress at about one
moment, since they wait for each other, and have the same limit, so each gets to speak.

A stopped process cannot; its state is told by its neighbours.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from olmo.distributed.world import World
from olmo.runtime.log import log

# From speaking to ending, in seconds: the others, which began to wait a little later, speak too
# before the launcher ends them.
LINGER_S = 3.0

_last = time.monotonic()


def progress() -> None:
    """Something has been done: a step, a batch of an evaluation."""
    global _last
    _last = time.monotonic()


class Watchdog:
    """Watches this process from `start` to `stop`; without a limit it does nothing."""

    def __init__(self, world: World, limit: float | None) -> None:
        """`limit`: seconds without progress."""
        self._world, self._limit = world, limit
        self._done, self._resting = threading.Event(), False
        self._others: list[tuple[int, str, int]] = []

    def start(self) -> None:
        """Begin to watch. Called by all processes."""
        if self._limit is None:
            return
        own = (self._world.rank, platform.node(), os.getpid())
        everyone = [own]
        if self._world.size > 1:
            everyone = [own] * self._world.size
            dist.all_gather_object(everyone, own)
        self._others = [o for o in everyone if o[1] == own[1] and o[0] != own[0]]
        progress()
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def stop(self) -> None:
        self._done.set()

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """A block that may take as long as the file system takes: nothing is said meanwhile."""
        self._resting = True
        try:
            yield
        finally:
            progress()
            self._resting = False

    def _watch(self) -> None:
        assert self._limit is not None
        tick = min(1.0, self._limit / 10)
        while not self._done.wait(tick):
            if self._resting:
                progress()
            # Where a library hangs and lets no thread of Python run, us neither, the
            # interpreter's own alarm is not set anew and speaks in our place (on stderr alone).
            faulthandler.dump_traceback_later(self._limit + LINGER_S, exit=True, file=2)
            if time.monotonic() - _last > self._limit:
                log.error(self._report())
                if not self._done.wait(LINGER_S):
                    os._exit(1)
        faulthandler.cancel_dump_traceback_later()

    def _report(self) -> str:
        rank = self._world.rank
        lines = [
            f"no progress for {time.monotonic() - _last:.0f} s (hang_timeout), so this process "
            f"(pid {os.getpid()} on {platform.node()}) ends. Its threads:",
            *stacks(),
            *(f"beside it, rank {r} (pid {pid}): {state(pid)}" for r, _, pid in self._others),
        ]
        return "\n".join(f"rank {rank}: {line}" for line in lines)


def stacks() -> list[str]:
    """Where each thread of this process is, the innermost call first."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().splitlines()


def state(pid: int) -> str:
    """What the kernel says of a process: "T (stopped)", "S (sleeping) in futex_wait_queue"."""
    if not sys.platform.startswith("linux"):
        return "unknown here"
    try:
        fields = dict(
            line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        )
    except OSError:
        return "gone"
    where = ""
    with contextlib.suppress(OSError):
        where = Path(f"/proc/{pid}/wchan").read_text().strip("0 ")
    return fields["State"].strip() + (f" in {where}" if where else "")
