"""What a dry run prints: the jobs of each rule, their files, and why they run."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

NAMED = 3  # files of a list that are named; the others are counted
# Reasons whose files are those of the job itself, or of jobs that are printed, too.
WITHOUT_FILES = ("Missing output files", "Input files updated by another job")


@dataclass(frozen=True)
class PlannedJob:
    """A job that would run."""

    rule: str
    outputs: Sequence[str]
    reason: str  # as snakemake tells it


def format_planned(jobs: Iterable[PlannedJob]) -> str:
    """The jobs by rule and reason, in snakemake's order; full details with --verbose."""
    groups: dict[tuple[str, str], list[str]] = {}
    for job in jobs:
        groups.setdefault((job.rule, shorten_reason(job.reason)), []).extend(job.outputs)
    lines = []
    for (rule, reason), outputs in groups.items():
        lines += [f"{rule:<12} {format_files(outputs)}", f"{'':<12} {reason}"]
    return "\n".join([*lines, "A dry run: nothing was made. --verbose prints each job."])


def format_files(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are.

    >>> format_files(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more:,} more" if more > 0 else "")


def shorten_reason(reason: str) -> str:
    """Snakemake's reason, without files that are named elsewhere.

    >>> shorten_reason("Missing output files: a; Updated input files: b, c, d, e")
    'missing output files; updated input files: b, c, d and 1 more'
    """
    parts = []
    for part in " ".join(reason.split()).split("; "):
        what, colon, files = part.partition(": ")
        named = f": {format_files(files.split(', '))}" if colon else ""
        parts.append(what[:1].lower() + what[1:] + named * (what not in WITHOUT_FILES))
    return "; ".join(parts)
