"""A server that forks the toolkit's worker: `python warm_toolkit.py SOCKET`, of its environment.

A client sends {"script", "environment", "cwd"} in a line, with its stdin, stdout and stderr; then
numbers of signals, a byte each. It receives the exit code of the script. If the client ends first,
the script is killed. warm_commands.py serves commands in the same way.
"""

import contextlib
import ctypes
import json
import os
import runpy
import select
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

Run = Callable[[dict[str, Any]], None]  # in a fork that has the client's streams


def main(path: str) -> None:
    with tempfile.TemporaryDirectory() as folder:  # see dolma_worker
        Path(folder, "tokenizers/punkt").mkdir(parents=True)
        os.environ["NLTK_DATA"] = folder
        import dolma.cli.tokenizer
        import dolma.tokenizer  # noqa: F401

    serve(path, run)


def serve(path: str, run: Run) -> None:
    """Fork for every client, until this process is killed."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen(16)
    print("ready", flush=True)
    while True:
        client, _ = server.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            keep(client, run)
            os._exit(0)
        client.close()


def keep(client: socket.socket, run: Run) -> None:
    """Run what one client wants, until either ends."""
    message, streams, _, _ = socket.recv_fds(client, 1 << 20, 3)
    while not message.endswith(b"\n"):
        message += client.recv(1 << 20)
    pid = os.fork()
    if not pid:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        os.closerange(3, 1024)
        run(json.loads(message))
    for stream in streams:
        os.close(stream)
    script, sent = os.pidfd_open(pid), b"any"
    while sent and script not in select.select([script, client], [], [])[0]:
        sent = client.recv(1)
        os.kill(pid, sent[0] if sent else signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if sent:
        with contextlib.suppress(OSError):  # the client was killed meanwhile
            client.sendall(str(os.waitstatus_to_exitcode(status)).encode())


def run(given: dict[str, Any]) -> None:
    code = 1
    try:
        os.environ.clear()
        os.environ.update(given["environment"])
        os.chdir(given["cwd"])
        if begin := getattr(ctypes.CDLL(None), "disk_begin", None):
            begin()
        sys.argv = [given["script"]]
        sys.stdin = os.fdopen(0, closefd=False)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False, buffering=1)
        runpy.run_path(given["script"], run_name="__main__")
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1])
