"""Snakemake and its jobs as forks: `python warm_commands.py FOLDER` serves FOLDER/snakemake, /olmo.

Each stands for the command: it asks this process, which has imported what commands import, for a
fork, and has its streams, its signals and its exit code.
"""

import gc
import glob
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import warm
import warm_toolkit

MODULES = {"snakemake": "snakemake", "olmo": "olmo.cli"}
IMPORTED = (
    "snakemake.cli",
    "snakemake.report.html_reporter",
    "snakemake_logger_plugin_olmo",
    "olmo.cluster.slurm_plugin",
    "olmo.pipeline.forecast",
    "olmo.pipeline.parts",
    "olmo.pipeline.sampling",
    "olmo.pipeline.train",
)
COMMAND = """\
#!{python} -IS
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect("{folder}/socket")
words = ["{module}", *sys.argv[1:]]
given = {{"words": words, "environment": dict(os.environ), "cwd": os.getcwd()}}
socket.send_fds(server, [json.dumps(given).encode() + b"\\n"], [0, 1, 2])
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
    signal.signal(number, lambda number, frame: server.send(bytes([number])))
code = int(server.recv(100) or 1)
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""


@contextmanager
def served(folder: Path) -> Iterator[None]:
    """For the block, the commands are in the folder."""
    for name, module in MODULES.items():
        text = COMMAND.format(python=sys.executable, folder=folder, module=module)
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "path").write_text(f'PATH="{folder}:$PATH"\n')
    command = [sys.executable, __file__, folder]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}  # as a project's
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as server:
        assert server.stdout and server.stdout.readline() == b"ready\n"
        try:
            yield
        finally:
            server.kill()


def run(given: dict[str, Any]) -> None:
    environment = given["environment"]
    os.setsid()
    if environment.get("PYTHONPATH") != os.environ.get("PYTHONPATH"):  # other code
        os.chdir(given["cwd"])
        os.execve(sys.executable, [sys.executable, "-m", *given["words"]], environment)
    warm.become(given["words"], given["cwd"], environment)


def main(folder: str) -> None:
    from olmo.runtime.process import die_with_parent

    die_with_parent()
    warm.import_all()
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # else each collection in a fork would go through all of that
    with ExitStack() as stack:
        if toolkits := glob.glob(f"{Path(__file__).parents[1]}/environments/dolma-*/bin/python"):
            stack.enter_context(warm.toolkit(max(toolkits, key=os.path.getmtime)))
        warm_toolkit.serve(f"{folder}/socket", run)


if __name__ == "__main__":
    main(sys.argv[1])
