"""Child processes that end with the process that started them.

kill -9 of snakemake, of a stage or of one rank must leave nothing running:

- `die_with_supervisor`: a stage watches the snakemake that started it through a shell;
- `supervised`: a stage's child runs in a process group together with a warden process, which reads
  from a pipe that the stage alone holds open. However the stage ends, the pipe closes, and the
  warden kills the group;
- `die_with_parent`: a process started by others (a rank, by torchrun or its launcher) asks the
  kernel to be killed when its parent ends.
"""

import contextlib
import ctypes
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

SUPERVISOR_ENV = "OLMO_SUPERVISOR"  # the pid of the snakemake that runs this stage
GRACE_S = 5.0  # from SIGTERM to SIGKILL

EXIT_PAUSED = 75  # exit code of a paused training run: sysexits' EX_TEMPFAIL, "try again later"
# Files in a run's folder:
STOP_FILE = "stop"  # a request to save and exit; removed when that is done
PAUSED_FILE = "paused.json"  # the run has saved and exited: at which step and why
CAUSE_FILE = "cause.json"  # why the run failed, and whether another start would fail too
FINISHED_FILE = "finished.json"  # the run is complete
SEGMENTS_FILE = "segments.jsonl"  # on what it was trained from which step on
# Set for a trainer that the pipeline started: its launcher reads PAUSED_FILE, and torchrun must
# not see a failure in a pause, or it would restart the processes.
LAUNCHED_ENV = "OLMO_LAUNCHED"


JOBS_ENV = "OLMO_JOBS"  # the file to which a dry run of snakemake writes its jobs for `olmo plan`


class Paused(ChildProcessError):
    """A run stopped before its end on request and has saved; the same command resumes it."""


def has_launcher() -> bool:
    """Whether torchrun or `olmo train` started this process, and waits for its end."""
    return "TORCHELASTIC_RUN_ID" in os.environ or LAUNCHED_ENV in os.environ


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends (Linux; elsewhere a thread polls)."""
    parent = os.getppid()
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the call
            os.kill(os.getpid(), signal.SIGKILL)
    else:
        _exit_when(lambda: os.getppid() != parent)


def die_with_supervisor() -> None:
    """Exit at once when the snakemake of $OLMO_SUPERVISOR ends.

    Without any cleanup: the store tolerates a kill at any moment.
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
        sys.exit(f"the snakemake that started this stage (pid {pid}) has ended")

    def wait() -> None:
        select.select([supervisor], [], [])  # a pidfd is readable once its process has ended
        os._exit(128 + signal.SIGKILL)

    threading.Thread(target=wait, daemon=True, name="supervisor").start()


def is_alive(pid: int) -> bool:
    """Whether a process with this id exists on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def supervised(argv: Sequence[str], **popen: Any) -> Iterator[subprocess.Popen[Any]]:
    """Run `argv` in a process group that ends no later than this process.

    At the end of the block a running process gets SIGTERM and `GRACE_S` to exit; then the group is
    killed, grandchildren included.
    """
    read, write = os.pipe()  # only we hold the write end: exec closes it in each child
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
    """An exit code as text: "exit status 2", "killed by SIGKILL"."""
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def _exit_when(ended: Any) -> None:
    def poll() -> None:
        while not ended():
            time.sleep(1)
        os._exit(128 + signal.SIGKILL)

    threading.Thread(target=poll, daemon=True, name="supervisor").start()


def own_peak_memory_bytes() -> int:
    """Peak resident memory of this process.

    Linux keeps ru_maxrss over an exec: a process starts with the peak of the one that forked it.
    VmHWM starts afresh.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024
    with contextlib.suppress(OSError, StopIteration), open("/proc/self/status") as status:
        peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    return peak
