"""The engine `dolma`: `dolma tokens`, made deterministic, in an environment of its own.

The toolkit shuffles its output, and drops what it cannot read without an error. So it gets one file
of documents at a time, and its output is put back into the documents' order.
"""

from __future__ import annotations

import csv
import errno
import gzip
import json
import os
import re
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from subprocess import PIPE
from typing import TYPE_CHECKING, Any

from olmo.corpus import dolma_worker
from olmo.corpus.documents import MAX_BYTES_PER_BYTE
from olmo.corpus.engine import TokenizeJob, token_ranges
from olmo.corpus.environments import interpreter_path, pinned_version
from olmo.runtime.log import log
from olmo.runtime.process import describe_exit, supervised

if TYPE_CHECKING:
    import numpy as np
    import polars


def pinned_toolkit(requirements: Path) -> str:
    """The toolkit's versions, part of the key of what it makes: "dolma==… tokenizers==…"."""
    return " ".join(f"{n}=={pinned_version(requirements, n)}" for n in ("dolma", "tokenizers"))


class Dolma:
    """The toolkit in its own environment: one process for many files, started by the first request.

    Args:
        python: the interpreter of an environment made from envs/dolma.txt.
        toolkit: its versions, from `pinned_toolkit(requirements)`.
    """

    def __init__(self, python: Path, toolkit: str) -> None:
        self.python = python
        self.toolkit = toolkit
        self.process: Any = None

    def __enter__(self) -> Dolma:
        self.stack = ExitStack()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.process = None
        self.stack.close()

    def tokenize(self, job: TokenizeJob) -> tuple[polars.DataFrame, str]:
        """Write a file's tokens; the documents' ranges, and the toolkit's output."""
        import numpy as np

        with scratch_folder(job.tokens) as folder:
            os.symlink(os.path.realpath(job.documents), folder / "documents.gz")
            output = self.request(
                "tokens",
                time_limit_s=time_limit(job.text_bytes),
                folder=str(folder),
                documents="documents.gz",
                tokenizer=os.path.realpath(job.tokenizer),
                eos_token_id=job.eos_token_id,
                pad_token_id=job.pad_token_id,
                encode_special_tokens=job.special_as_text,
                dtype=job.dtype,
                # No more than the file needs: the toolkit allocates its output at full length.
                max_size=min(job.max_size, job.text_bytes * MAX_BYTES_PER_BYTE + job.count + 2),
            )
            return restore_order(folder / "parts", np.dtype(job.dtype), job.tokens), output

    def request(self, verb: str, time_limit_s: float, **arguments: Any) -> str:
        """Send a request to the toolkit; its output. See dolma_worker for verbs and arguments.

        Raises ValueError with the cause when it fails, ChildProcessError when it dies or exceeds
        the time limit, OSError when it dies or fails because the disk is full.
        """
        deadline = time.monotonic() + time_limit_s
        if self.process is None:
            self.start()
            versions = self.read_reply(deadline)
            found = " ".join(f"{name}=={version}" for name, version in versions.items())
            if found != self.toolkit:
                folder = self.python.parent.parent
                remedy = "Install the versions of envs/dolma.txt into it"
                if (folder / "made-from.json").exists():  # olmo.corpus.environments made it
                    remedy = (
                        f"Build it again: rm -r {folder} {folder.parent}/*.json, then run the same "
                        "command"
                    )
                raise ValueError(
                    f"expected {self.toolkit} in the environment of {self.python}, found {found}. "
                    + remedy
                )
        self.stderr.seek(0)
        self.stderr.truncate()
        try:
            self.process.stdin.write(json.dumps({"verb": verb, **arguments}).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self.exit_error() from None
        reply = self.read_reply(deadline)
        if reply.get("errno") in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(reply["errno"], reply["error"])
        if "error" in reply:
            raise ValueError(self.with_cause(f"the toolkit failed: {reply['error']}"))
        return self.last_messages()

    def start(self) -> None:
        self.stderr = tempfile.TemporaryFile("ab+")  # noqa: SIM115 (closed by the stack)
        self.stack.enter_context(self.stderr)
        hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")  # ours, not the toolkit's
        environment = {
            **{name: value for name, value in os.environ.items() if name not in hidden},
            "PYTHONUTF8": "1",
            "PYTHONNOUSERSITE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        command = [str(self.python), "-P", os.path.abspath(dolma_worker.__file__)]
        self.process = self.stack.enter_context(
            supervised(command, env=environment, stdin=PIPE, stdout=PIPE, stderr=self.stderr)
        )

    def read_reply(self, deadline: float) -> dict[str, Any]:
        """The worker's next line; raises ChildProcessError when it ends or the time is over."""
        line = b""
        while not line.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.process.stdout], [], [], left)[0]:
                raise ChildProcessError(self.with_cause("the toolkit exceeded its time limit"))
            block = os.read(self.process.stdout.fileno(), 1 << 16)
            if not block:
                raise self.exit_error()
            line += block
        reply: dict[str, Any] = json.loads(line)
        return reply

    def exit_error(self) -> OSError:
        """The error for a process that has ended. The next request starts a new one."""
        code = self.process.wait()
        self.process = None
        message = self.with_cause(f"the toolkit's process ended early ({describe_exit(code)})")
        # SIGBUS: it writes through memory maps, and the disk had no free block for a page.
        if code == -signal.SIGBUS:
            return OSError(errno.ENOSPC, message)
        return ChildProcessError(message)

    def with_cause(self, what: str) -> str:
        """A sentence with the toolkit's last error message; logs all its messages first."""
        if not (messages := self.last_messages()):
            return what
        log.error(messages)
        causes = [line.strip() for line in messages.splitlines() if re.search("rror|ismatch", line)]
        return f"{': '.join([what, *causes[-1:]])}; its output is above"

    def last_messages(self) -> str:
        """The last lines that the toolkit wrote to stderr, without its progress bars."""
        self.stderr.seek(0)
        text = self.stderr.read().decode(errors="replace")
        lines = [line for line in text.splitlines() if line.strip() and "/s]" not in line]
        return "\n".join(lines[-20:])


def open_dolma(requirements: Path, environment: Path | None) -> Dolma:
    """The toolkit in its environment, or with the `python` on PATH (`--sdm conda`)."""
    path = shutil.which("python") or "python"
    python = interpreter_path(environment) if environment else Path(path)
    return Dolma(python, pinned_toolkit(requirements))


def time_limit(text_bytes: int) -> float:
    """Seconds after which the toolkit must be hanging: a hundredth of its usual speed."""
    return 600 + text_bytes / 5_000


@contextmanager
def scratch_folder(output: Path) -> Iterator[Path]:
    """A temporary folder for the toolkit's files, on the disk of an output."""
    with tempfile.TemporaryDirectory(prefix=".dolma-", dir=output.parent) as folder:
        yield Path(folder)


def restore_order(parts: Path, dtype: np.dtype, tokens: Path) -> polars.DataFrame:
    """Write the documents' tokens in the order of their lines; the table of `token_ranges`.

    The toolkit's parts: raw tokens in .npy; start, end, id, source, line in .csv.gz, both in the
    order into which it shuffled them.

    Raises ValueError when a part's tokens and its table disagree.
    """
    import numpy as np

    csv.field_size_limit(sys.maxsize)
    arrays: list[np.ndarray] = []
    rows: list[tuple[int, str, int, int, int]] = []  # line, id, part, start, end
    for path in sorted(parts.glob("*.npy")):
        array = np.memmap(path, dtype, mode="r")
        end = 0
        with gzip.open(path.with_suffix(".csv.gz"), "rt", encoding="utf-8", newline="") as table:
            for first, last, identity, _, line in csv.reader(table):
                if int(first) != end or int(last) <= end:
                    raise ValueError(f"{path.name}: expected a document at {end}, found {first}")
                end = int(last)
                rows.append((int(line), identity, len(arrays), int(first), end))
        if end == 0:
            continue  # no documents: the toolkit leaves a file of zeros
        if end != len(array):
            raise ValueError(
                f"{path.name}: expected {end:,} tokens by the toolkit's own table, found "
                f"{len(array):,}"
            )
        arrays.append(array)
    rows.sort()
    with open(tokens, "wb") as output:
        for _, _, part, start, end in rows:
            output.write(arrays[part][start:end].tobytes())
    lines, ids, _, starts, ends = zip(*rows, strict=True) if rows else ((),) * 5
    lengths = [end - start for start, end in zip(starts, ends, strict=True)]
    return token_ranges(lines, ids, lengths)
