"""Processes that do not outlive whoever asked for them.

kill -9 of snakemake, of a stage or of one rank must leave nothing running. Three threads of
life do it, each for the case that the others cannot see:

- `die_with_supervisor`: a stage watches the snakemake that started it, through the shell
  in between;
- `supervised`: what a stage starts lives in a process group of its own, next to a warden that
  reads from a pipe only the stage holds open. However the stage ends, the pipe closes and the
  warden kills the group;
- `die_with_parent`: a process whose parent we do not write (a rank under torchrun) asks the
  kernel to be killed with it.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

SUPERVISOR_ENV = "OLMO_SUPERVISOR"  # the pid of the snakemake for which a stage runs
GRACE_S = 5.0  # from a polite SIGTERM to the end of the whole group

# What a paused training run exits with: sysexits' EX_TEMPFAIL, "try again and it goes on".
EXIT_PAUSED = 75
STOP_FILE = "stop"  # a file in a run's folder: save and leave. It is gone when that is done
PAUSED_FILE = "paused.json"  # a file there: at which step and why a run has saved and left
# In the environment of a trainer that the pipeline started: its launcher reads the marker, and
# torchrun is to see no failure in a pause, or it would start the processes again.
LAUNCHED_ENV = "OLMO_LAUNCHED"
CAUSE_FILE = (
    "cause.json"  # a file there: what a run failed of, and whether another start would, too
)
FINISHED_FILE = "finished.json"  # a file there of a run that came to its end
SEGMENTS_FILE = "segments.jsonl"  # a file there: from which step on it was trained on what


class Paused(ChildProcessError):
    """A run was asked to stop before its end, has saved, and goes on when it is asked for again."""


def die_with_parent() -> None:
    """The kernel kills this process when its parent ends (Linux; elsewhere a thread looks)."""
    parent = os.getppid()
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the kernel knew
            os.kill(os.getpid(), signal.SIGKILL)
    else:
        _exit_when(lambda: os.getppid() != parent)


def die_with_supervisor() -> None:
    """End this process at once when the snakemake named in $OLMO_SUPERVISOR ends.

    Nothing is cleaned up on purpose: an end at any moment is what the store is built for.
    """
    pid = int(os.environ.get(SUPERVISOR_ENV, 0))
    if not pid or pid == os.getpid():
        return
    if not hasattr(os, "pidfd_open"):
        _exit_when(lambda: not is_alive(pid))
        return
    try:
        supervisor = os.pidfd_open(pid)
    except ProcessLookupError:
        sys.exit(f"the snakemake that asked for this (pid {pid}) is gone")

    def wait() -> None:
        select.select([supervisor], [], [])  # a pidfd is readable once its process has ended
        os._exit(128 + signal.SIGKILL)

    threading.Thread(target=wait, daemon=True, name="supervisor").start()


def is_alive(pid: int) -> bool:
    """Whether a process of this number exists on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def supervised(argv: Sequence[str], **popen: Any) -> Iterator[subprocess.Popen[Any]]:
    """Run `argv` in a process group that ends, whole, no later than we do.

    On leaving the block a process that still runs gets SIGTERM, `GRACE_S` to follow it, then
    the group is killed, grandchildren too.
    """
    read, write = os.pipe()  # we hold the only writing end; exec closes it in every child
    warden = subprocess.Popen(
        ["sh", "-c", "cat >/dev/null; kill -KILL 0"], stdin=read, process_group=0
    )
    os.close(read)
    process = None
    try:
        process = subprocess.Popen(argv, process_group=warden.pid, **popen)
        yield process
    finally:
        if process is not None and process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
        os.close(write)
        warden.wait()
        if process is not None:
            process.wait()


def describe_exit(code: int) -> str:
    """An exit status in words: "exit status 2", "killed by SIGKILL"."""
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def _exit_when(ended: Any) -> None:
    def poll() -> None:
        while not ended():
            time.sleep(1)
        os._exit(128 + signal.SIGKILL)

    threading.Thread(target=poll, daemon=True, name="supervisor").start()
