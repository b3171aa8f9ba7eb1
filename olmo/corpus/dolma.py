"""The engine `dolma`: `dolma tokens`, held still, in an environment of its own.

The toolkit shuffles what it writes and loses what it cannot read without an error. So each file
of documents is given to it alone, and what comes out is put back into the documents' order.
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
from contextlib import ExitStack
from pathlib import Path
from subprocess import PIPE
from typing import TYPE_CHECKING, Any

from olmo.corpus import dolma_worker
from olmo.corpus.documents import MAX_BYTES_PER_BYTE
from olmo.corpus.engine import Job
from olmo.corpus.environments import interpreter, version
from olmo.runtime.log import log
from olmo.runtime.process import describe_exit, supervised

if TYPE_CHECKING:
    import numpy as np
    import polars


def toolkit(requirements: Path) -> str:
    """The toolkit's versions, for the identity of what it makes: "dolma==… tokenizers==…"."""
    return " ".join(f"{name}=={version(requirements, name)}" for name in ("dolma", "tokenizers"))


class Dolma:
    """The toolkit in its own environment: one process for many files, started when one needs it.

    Args:
        python: the interpreter of an environment made from envs/dolma.txt.
        toolkit: the versions that it holds, by `toolkit(requirements)`.
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

    def tokenize(self, job: Job) -> tuple[polars.DataFrame, str]:
        """Write a file's tokens; each document's row, id and range, and what the toolkit said."""
        import numpy as np

        with scratch_beside(job.tokens) as folder:
            os.symlink(os.path.realpath(job.documents), folder / "documents.gz")
            said = self.ask(
                "tokens",
                time_limit_s=time_limit(job.text_bytes),
                folder=str(folder),
                documents="documents.gz",
                tokenizer=os.path.realpath(job.tokenizer),
                eos_token_id=job.eos_token_id,
                pad_token_id=job.pad_token_id,
                encode_special_tokens=job.special_as_text,
                dtype=job.dtype,
                # Room for the file, no more: the toolkit lays out its output at full length.
                max_size=min(job.max_size, job.text_bytes * MAX_BYTES_PER_BYTE + job.count + 2),
            )
            return gather(folder / "parts", np.dtype(job.dtype), job.tokens), said

    def ask(self, verb: str, time_limit_s: float, **request: Any) -> str:
        """Have the toolkit do something; what it said. See dolma_worker for verbs and requests.

        Raises ValueError with what it said when it fails, ChildProcessError when it dies, OSError
        when it dies or fails of a full disk.
        """
        deadline = time.monotonic() + time_limit_s
        if self.process is None:
            self.start()
            versions = self.answer(deadline)
            found = " ".join(f"{name}=={version}" for name, version in versions.items())
            if found != self.toolkit:
                folder = self.python.parent.parent
                remedy = "Give it the versions of envs/dolma.txt"
                if (folder / "made-from.json").exists():  # olmo.corpus.environments made it
                    remedy = (
                        f"Build it again: rm -r {folder} {folder.parent}/*.json, then run the same "
                        "command"
                    )
                raise ValueError(
                    f"expected {self.toolkit} in the environment of {self.python}, found {found}. "
                    + remedy
                )
        self.said.seek(0)
        self.said.truncate()
        try:
            self.process.stdin.write(json.dumps({"verb": verb, **request}).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self.death() from None
        answer = self.answer(deadline)
        if answer.get("errno") in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(answer["errno"], answer["error"])
        if "error" in answer:
            raise ValueError(self.above(f"the toolkit failed: {answer['error']}"))
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
                raise ChildProcessError(self.above("the toolkit did not end in time"))
            block = os.read(self.process.stdout.fileno(), 1 << 16)
            if not block:
                raise self.death()
            line += block
        answer: dict[str, Any] = json.loads(line)
        return answer

    def death(self) -> OSError:
        """What to raise when the toolkit's process has ended. The next request starts another."""
        code = self.process.wait()
        self.process = None
        said = self.above(f"the toolkit's process ended early ({describe_exit(code)})")
        if code == -signal.SIGBUS:  # its files are mapped into memory, and there was no page left
            return OSError(errno.ENOSPC, said)
        return ChildProcessError(said)

    def above(self, what: str) -> str:
        """A sentence with the cause, if the toolkit named one; all that it said is told before."""
        if not (tail := self.tail()):
            return what
        log.error(tail)
        causes = [line.strip() for line in tail.splitlines() if re.search(r"rror|ismatch", line)]
        return f"{': '.join([what, *causes[-1:]])}; what it said stands above"

    def tail(self) -> str:
        """The last lines that the toolkit said, without its progress bars."""
        self.said.seek(0)
        text = self.said.read().decode(errors="replace")
        lines = [line for line in text.splitlines() if line.strip() and "/s]" not in line]
        return "\n".join(lines[-20:])


def started(requirements: Path, environment: Path | None) -> Dolma:
    """The toolkit in its environment, or of the `python` on PATH (`--sdm conda`)."""
    python = interpreter(environment) if environment else Path(shutil.which("python") or "python")
    return Dolma(python, toolkit(requirements))


def time_limit(text_bytes: int) -> float:
    """Seconds after which the toolkit hangs rather than works: a hundredth of its usual speed."""
    return 600 + text_bytes / 5_000


class scratch_beside:
    """A folder for the toolkit's files beside an output, gone when the block ends."""

    def __init__(self, output: Path) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=".dolma-", dir=output.parent))

    def __enter__(self) -> Path:
        return self.folder

    def __exit__(self, *_: Any) -> None:
        shutil.rmtree(self.folder)


def gather(parts: Path, dtype: np.dtype, tokens: Path) -> polars.DataFrame:
    """Write the documents' tokens in the order of their lines; their new ranges, ids and lines.

    The toolkit's parts: raw tokens in .npy; start, end, id, source, line in .csv.gz, both in the
    order into which it shuffled them.

    Raises ValueError when a part's tokens and its table do not fit.
    """
    import numpy as np
    import polars

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
            continue  # no document came through: the toolkit leaves a file of zeros
        if end != len(array):
            raise ValueError(
                f"{path.name}: expected {end:,} tokens by the toolkit's own table, found "
                f"{len(array):,}"
            )
        arrays.append(array)
    rows.sort()
    lengths = np.array([end - start for *_, start, end in rows], np.uint64)
    ends = np.cumsum(lengths, dtype=np.uint64)
    with open(tokens, "wb") as output:
        for _, _, part, start, end in rows:
            output.write(arrays[part][start:end].tobytes())
    return polars.DataFrame(
        {
            "row": [row[0] for row in rows],
            "id": [row[1] for row in rows],
            "start": ends - lengths,
            "end": ends,
        },
        schema=dict(row=polars.UInt64, id=polars.String, start=polars.UInt64, end=polars.UInt64),
    )
