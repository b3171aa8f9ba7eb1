"""Commands in forks of a process that has imported them: the same calls, without time for imports.

Python processes that a command starts are forks too: torchrun, its ranks, and the toolkit's worker.
"""

import atexit
import contextlib
import importlib
import inspect
import json
import os
import pkgutil
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

PACKAGES = ("io", "store", "corpus", "data", "cluster", "train", "distributed", "checkpoint")
LIBRARIES = (
    "torch.distributed.run",
    "requests",
    "polars",
    "tokenizers",
    "fsspec",
    "yaml",
    "altair",
)


STORE = ("olmo.cli", "olmo.store.commands", "olmo.inspect.pull", "fsspec", "requests", "yaml")


def import_all(names: Sequence[str] = ()) -> None:
    """Import what commands import, in the process that will fork: a small one forks faster."""
    subprocess.Popen = ForkingPopen  # type: ignore[misc]
    if names and not set(names) - {"push", "pull", "gc"}:
        for name in STORE:
            importlib.import_module(name)
        return
    from torch.distributed.elastic.rendezvous import dynamic_rendezvous

    import olmo

    for name in LIBRARIES:
        importlib.import_module(name)
    # Names for its log, from the stack: a second at each start where so much is imported.
    dynamic_rendezvous.get_method_name = lambda depth=2: "?"
    for package in PACKAGES:
        importlib.import_module(f"olmo.{package}")
        for module in pkgutil.iter_modules([f"{olmo.__path__[0]}/{package}"]):
            if module.name not in ("dolma_worker", "__main__"):
                importlib.import_module(f"olmo.{package}.{module.name}")


def run(
    words: list[str], cwd: Path, environment: dict[str, str], output: Path, timeout_s: int = 300
) -> tuple[int, str]:
    """Run `python -m <words>` in a fork: (exit status, stdout and stderr)."""
    with output.open("wb") as file:
        pid = os.fork()
        if not pid:
            os.setsid()
            for number in (1, 2):
                os.dup2(file.fileno(), number)
            signal.alarm(timeout_s)
            become(words, cwd, environment)
        _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), output.read_text(errors="replace")


def become(words: Sequence[str], cwd: Path | None, environment: dict[str, str]) -> NoReturn:
    """Be `python -m <words>`, in a process that has just been forked."""
    code = 1
    try:
        atexit._clear()
        ForkingPopen.in_fork = True
        os.execv = execute
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as exec does
                usual = {signal.SIGINT: signal.default_int_handler}
                signal.signal(number, usual.get(number, signal.SIG_DFL))
        os.closerange(3, 1024)
        os.environ.clear()
        os.environ.update(environment)
        if cwd:
            os.chdir(cwd)
        begin_counting()
        sys.argv = list(words)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False, buffering=1, errors="backslashreplace")
        code = exit_code(lambda: runpy.run_module(words[0], run_name="__main__", alter_sys=True))
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def exit_code(main: Callable[[], Any]) -> int:
    """The exit status of `main`, whose errors are printed as Python prints them."""
    try:
        main()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def execute(python: str, words: Sequence[str]) -> NoReturn:
    """os.execv of `python -m`, which is all that is executed."""
    assert list(words[:2]) == [sys.executable, "-m"]
    become(words[2:], None, dict(os.environ))


@contextlib.contextmanager
def toolkit(python: Path) -> Iterator[None]:
    """Have the toolkit's worker forked from a process that has imported dolma."""
    with tempfile.TemporaryDirectory() as folder:
        ForkingPopen.toolkit = Path(folder, "socket")
        script = Path(__file__).parent / "warm_toolkit.py"
        command = [python, "-P", script, ForkingPopen.toolkit]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
            assert server.stdout and server.stdout.readline() == b"ready\n"
            try:
                yield
            finally:
                server.kill()
                ForkingPopen.toolkit = None


def stand_for(script: str, environment: dict[str, str]) -> NoReturn:
    """Be the parent's child while the server's fork works: end as it does."""
    os.closerange(3, 1024)
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(str(ForkingPopen.toolkit))
        given = {"script": script, "environment": environment, "cwd": os.getcwd()}
        socket.send_fds(server, [json.dumps(given).encode() + b"\n"], [0, 1, 2])
        os.closerange(0, 3)
        code = int(server.recv(100) or 1)
    if code < 0:
        os.kill(os.getpid(), -code)
    os._exit(code)


def begin_counting() -> None:
    """disk.c reads the environment when it is loaded; here, once more."""
    import ctypes

    if begin := getattr(ctypes.CDLL(None), "disk_begin", None):
        begin()


class ForkingPopen(subprocess.Popen):  # type: ignore[type-arg]
    """Popen that, in a fork, forks again where it would start the same Python with -m."""

    in_fork = False
    toolkit: Path | None = None  # the socket of warm_toolkit.py

    def _execute_child(self, args: Any, executable: Any, *rest: Any) -> None:
        start = super()._execute_child  # type: ignore[misc]
        given = inspect.signature(start).bind(args, executable, *rest).arguments
        words = [] if isinstance(args, (str, bytes)) else [os.fsdecode(word) for word in args]
        words = [word for word in words if word != "-u"]
        is_toolkit = words[1:2] == ["-P"] and ForkingPopen.toolkit
        if not self.in_fork or not (words[:2] == [sys.executable, "-m"] or is_toolkit):
            start(args, executable, *rest)
            return
        environment = dict(os.environ if given["env"] is None else given["env"])
        pid = os.fork()
        if not pid:
            try:
                if given["start_new_session"]:
                    os.setsid()
                elif given["process_group"] >= 0:
                    os.setpgid(0, given["process_group"])
                for number, source in enumerate(("p2cread", "c2pwrite", "errwrite")):
                    if given[source] not in (-1, number):
                        os.dup2(given[source], number)
                if given["preexec_fn"]:
                    given["preexec_fn"]()
            except BaseException:
                os._exit(127)
            if is_toolkit:
                stand_for(words[2], environment)
            become(words[2:], given["cwd"], environment)
        self.pid, self._child_created = pid, True
        ends = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(given[name] for name in ends))  # type: ignore[attr-defined]
