"""`dolma tokens` at work: the toolkit in an environment of its own, one process for many files."""

from __future__ import annotations

import json
import os
import select
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from subprocess import PIPE
from typing import Any

from olmo.data import dolma_worker
from olmo.environments import version
from olmo.process import describe_exit, supervised


def toolkit(requirements: Path) -> str:
    """The toolkit's versions, for the identity of what it makes: "dolma==… tokenizers==…"."""
    return " ".join(f"{name}=={version(requirements, name)}" for name in ("dolma", "tokenizers"))


class Dolma:
    """The toolkit in its own environment: one process for many files, started when one needs it.

    Args:
        python: the interpreter of an environment made from envs/dolma.txt.
    """

    def __init__(self, python: Path) -> None:
        self.python = python
        self.process: Any = None

    def __enter__(self) -> Dolma:
        self.stack = ExitStack()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.process = None
        self.stack.close()

    def __call__(self, toolkit: str, time_limit_s: float, **request: Any) -> str:
        """Tokenize one file; returns what the toolkit said. See dolma_worker for the request.

        Raises ValueError with what it said when it fails, ChildProcessError when it dies.
        """
        deadline = time.monotonic() + time_limit_s
        if self.process is None:
            self.start()
            versions = self.answer(deadline)
            found = " ".join(f"{name}=={version}" for name, version in versions.items())
            if found != toolkit:
                raise ValueError(
                    f"expected {toolkit} in the environment of {self.python}, found {found}. "
                    "Build the environment again from envs/dolma.txt"
                )
        self.said.seek(0)
        self.said.truncate()
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise ChildProcessError(self.death()) from None
        answer = self.answer(deadline)
        if "error" in answer:
            raise ValueError(f"the toolkit failed: {answer['error']}. It said:\n{self.tail()}")
        return self.tail()

    def start(self) -> None:
        self.said = tempfile.TemporaryFile("ab+")  # noqa: SIM115 (it lives as long as we do)
        self.stack.enter_context(self.said)
        hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")  # ours, not the toolkit's
        surroundings = {
            **{name: value for name, value in os.environ.items() if name not in hidden},
            "PYTHONUTF8": "1",
            "PYTHONNOUSERSITE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        command = [str(self.python), "-P", os.path.abspath(dolma_worker.__file__)]
        self.process = self.stack.enter_context(
            supervised(command, env=surroundings, stdin=PIPE, stdout=PIPE, stderr=self.said)
        )

    def answer(self, deadline: float) -> dict[str, Any]:
        """The worker's next line; raises ChildProcessError when it ends or the time is over."""
        line = b""
        while not line.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.process.stdout], [], [], left)[0]:
                raise ChildProcessError(f"the toolkit did not end in time. It said:\n{self.tail()}")
            block = os.read(self.process.stdout.fileno(), 1 << 16)
            if not block:
                raise ChildProcessError(self.death())
            line += block
        answer: dict[str, Any] = json.loads(line)
        return answer

    def death(self) -> str:
        end = describe_exit(self.process.wait())
        return f"the toolkit's process ended early ({end}). It said:\n{self.tail()}"

    def tail(self) -> str:
        """The last lines that the toolkit said, without its progress bars."""
        self.said.seek(0)
        text = self.said.read().decode(errors="replace")
        lines = [line for line in text.splitlines() if line.strip() and "/s]" not in line]
        return "\n".join(lines[-20:])
