"""A watchdog: a run that hangs ends, with the stacks of all its processes in the log.

A collective operation waits without limit for a process that is stopped, in an endless loop, or
gone without closing its connection. So each process watches its own progress. After `hang_timeout`
seconds without any, it logs the stack of each of its threads and the state of the other processes
on its machine, and exits; the launcher then ends the rest. Processes wait for each other and have
the same limit, so all notice at nearly the same time, and each logs its own stacks.

A stopped process (SIGSTOP) cannot log; its neighbours report its state.
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

# Seconds between the report and the exit. The launcher ends all processes when the first one exits;
# those that noticed a little later need this time to log their own report.
LINGER_S = 3.0

_last_progress = time.monotonic()


def report_progress() -> None:
    """Call after each unit of work: a step, a batch of an evaluation."""
    global _last_progress
    _last_progress = time.monotonic()


class Watchdog:
    """Watches this process from `start` to `stop`. Without a limit it does nothing."""

    def __init__(self, world: World, limit: float | None) -> None:
        """`limit`: seconds without progress."""
        self._world, self._limit = world, limit
        self._stopped, self._is_paused = threading.Event(), False
        self._neighbours: list[tuple[int, str, int]] = []  # rank, host, pid

    def start(self) -> None:
        """Start watching. A collective call: all processes make it."""
        if self._limit is None:
            return
        own = (self._world.rank, platform.node(), os.getpid())
        everyone = [own]
        if self._world.size > 1:
            everyone = [own] * self._world.size
            dist.all_gather_object(everyone, own)
        self._neighbours = [o for o in everyone if o[1] == own[1] and o[0] != own[0]]
        report_progress()
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def stop(self) -> None:
        self._stopped.set()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """No limit inside this block: saving takes as long as the file system takes."""
        self._is_paused = True
        try:
            yield
        finally:
            report_progress()
            self._is_paused = False

    def _watch(self) -> None:
        assert self._limit is not None
        tick = min(1.0, self._limit / 10)
        while not self._stopped.wait(tick):
            if self._is_paused:
                report_progress()
            # A library that hangs while it holds the GIL stops this thread as well. Then this
            # timer, which runs without the GIL, is not reset: it dumps the stacks to stderr and
            # exits in our place.
            faulthandler.dump_traceback_later(self._limit + LINGER_S, exit=True, file=2)
            if time.monotonic() - _last_progress > self._limit:
                log.error(self._report())
                if not self._stopped.wait(LINGER_S):
                    os._exit(1)
        faulthandler.cancel_dump_traceback_later()

    def _report(self) -> str:
        rank = self._world.rank
        lines = [
            f"no progress for {time.monotonic() - _last_progress:.0f} s (hang_timeout), so this "
            f"process (pid {os.getpid()} on {platform.node()}) exits. Its threads:",
            *thread_stacks(),
            *(f"neighbour rank {r} (pid {pid}): {process_state(pid)}" for r, _, pid in
              self._neighbours),
        ]  # fmt: skip
        return "\n".join(f"rank {rank}: {line}" for line in lines)


def thread_stacks() -> list[str]:
    """Lines with the stack of each thread of this process, the innermost call first."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().splitlines()


def process_state(pid: int) -> str:
    """The kernel's state of a process: "T (stopped)", "S (sleeping) in futex_wait_queue"."""
    if not sys.platform.startswith("linux"):
        return "unknown on this platform"
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
