"""The log files of running jobs, read as they grow: how far a job is, what it made and found.

A job on another machine writes its log to the same folder, so its progress is shown, too.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from olmo.runtime.log import FAILED

# Lines by olmo.store.stage, olmo.corpus.listing, olmo.io.progress and olmo.train.sinks.
RESULT = re.compile(r"^(\w+): (made|found in the store) \((\w+)…\)(?:: (.*))?$")
RUNS = re.compile(
    r"^(\w+): runs(?: again| for the first time|, because it differs from \S+ in (.*))"
)
PROGRESS = re.compile(r"^(?:step +)?([\d,]+)(?:/| of )([\d,]+)\b")
DETAIL = re.compile(r"^(?:saved |store: .* is being made by)")  # in the log only
HASH = re.compile(r"\b(?=[0-9]*[a-f])(?=[a-f]*[0-9])[0-9a-f]{8,}\b…?")


@dataclass
class JobLog:
    """The log of one job.

    Args:
        path: the log file, which may not exist yet, or be that of an earlier job.
        since: when the job began, in seconds since the epoch: an older file is not its log.
    """

    path: Path
    since: float
    progress: str = ""  # the last line that tells how far the job is
    reasons: list[str] = field(default_factory=list)  # why its stages run again
    results: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)
    is_introduced: bool = False  # whether its name was shown before its lines
    _offset: int = 0
    failure: str = ""  # its last line, if the job failed or was stopped

    def read(self) -> list[str]:
        """Take in new lines; those that a user wants to see, without hashes."""
        return [hide_hashes(line) for line in self._new_lines() if self._is_for_users(line)]

    def _new_lines(self) -> Iterator[str]:
        try:
            found = self.path.stat()
            if found.st_mtime < self.since - 0.05:  # the clock of file times is a coarse one
                return
            self._offset = self._offset if self._offset <= found.st_size else 0
            with self.path.open("rb") as file:
                file.seek(self._offset)
                whole, _, _ = file.read().rpartition(b"\n")
        except OSError:
            return
        if whole:
            self._offset += len(whole) + 1
            yield from whole.decode(errors="replace").split("\n")

    def _is_for_users(self, line: str) -> bool:
        if self.failure or line.startswith((FAILED, "Traceback ")):
            self.failure = line or self.failure  # snakemake's end tells it
        elif found := RESULT.match(line):
            stage, origin, key, counts = found.groups(default="")
            self.results[stage, key] = origin, counts
        elif found := RUNS.match(line):
            self.reasons += [f"{found[1]}: {found[2]}"] if found[2] else []
        elif PROGRESS.match(line):
            self.progress = re.sub("^step +", "step ", line)
        else:
            return bool(line.strip()) and not DETAIL.match(line)
        return False

    @property
    def fraction(self) -> float:
        """How much of the job is done, as far as its log tells."""
        return progress_fraction(self.progress)


def progress_fraction(line: str) -> float:
    """3 of 4 is 0.75.

    >>> progress_fraction("step  12/240  loss 7.1"), progress_fraction("3 of 4 shards")
    (0.05, 0.75)
    """
    found = PROGRESS.match(line)
    done, total = (int(n.replace(",", "")) for n in found.groups()) if found else (0, 1)
    return min(done / max(total, 1), 1.0)


def sum_counts(results: list[str]) -> Counter[str]:
    """What several results count, in sum.

    >>> sum_counts(["2 documents, 1,000 tokens", "1 documents"])
    Counter({'tokens': 1000, 'documents': 3})
    """
    total: Counter[str] = Counter()
    for counts in results:
        for number, unit in re.findall(r"(\d[\d,]*) (\w+)", counts):
            total[unit] += int(number.replace(",", ""))
    return total


def hide_hashes(line: str) -> str:
    """A line without digests.

    >>> hide_hashes("differs from 9fc45dd04ac6… in x")
    'differs from … in x'
    """
    return HASH.sub("…", line)
