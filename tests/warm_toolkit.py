"""A server that forks the toolkit's worker: `python warm_toolkit.py SOCKET`, of its environment.

A client sends {"script", "environment", "cwd"} with its stdin, stdout and stderr, and receives the
exit code of the script. If the client ends first, the script is killed.
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
from pathlib import Path


def serve(path: str) -> None:
    with tempfile.TemporaryDirectory() as folder:  # see dolma_worker
        Path(folder, "tokenizers/punkt").mkdir(parents=True)
        os.environ["NLTK_DATA"] = folder
        import dolma.cli.tokenizer
        import dolma.tokenizer  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen(16)
    print("ready", flush=True)
    while True:
        client, _ = server.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            keep(client)
            os._exit(0)
        client.close()


def keep(client: socket.socket) -> None:
    """Run one client's script, until either ends."""
    message, streams, _, _ = socket.recv_fds(client, 1 << 20, 3)
    given = json.loads(message)
    pid = os.fork()
    if not pid:
        run(given["script"], given["environment"], given["cwd"], streams)
    for stream in streams:
        os.close(stream)
    script = os.pidfd_open(pid)
    ready, _, _ = select.select([script, client], [], [])
    if script not in ready:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if script in ready:
        with contextlib.suppress(OSError):  # the client was killed meanwhile
            client.sendall(str(os.waitstatus_to_exitcode(status)).encode())


def run(script: str, environment: dict[str, str], cwd: str, streams: list[int]) -> None:
    code = 1
    try:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        os.closerange(3, 1024)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(cwd)
        ctypes.CDLL(None).disk_begin()
        sys.argv = [script]
        sys.stdin = os.fdopen(0, closefd=False)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False, buffering=1)
        runpy.run_path(script, run_name="__main__")
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1])
