"""Time a matrix: `python -m olmo.bench --matrix config/bench/tps.yaml --out bench-tps`.

Needs torch, numpy and omegaconf alone. Each cell, and each pair with a peer, leaves a record in
OUT/records, which is reused unless the code, torch, the device or the peer has changed. After each
record OUT/table.md and OUT/table.csv are written.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import olmo
from olmo.bench import pairs, table
from olmo.bench.cell import describe_machine
from olmo.bench.matrix import Cell, Pair, Section, load_section
from olmo.io import sealed
from olmo.runtime.log import log

Record = dict[str, Any]
# The code of a step: a change here invalidates every record.
CODE = ("model", "train", "precision", "bench/cell.py", "bench/timing.py")
PEER_CODE = (*CODE, "bench/peer.py", "bench/pairs.py")


class Task(NamedTuple):
    """A record to make."""

    name: str
    path: Path  # ends in a digest of the settings, the code and the machine
    limit_s: float
    kind: tuple[str, ...]  # tasks of one kind take about the same time
    time: Callable[[float], Record]
    """Makes the record within so many seconds."""


def run_matrix(
    matrix: Path,
    out: Path,
    peer: Sequence[str] = (),
    kind: str | None = None,
    draw_only: bool = False,
    budget_s: float | None = None,
    shape: Sequence[str] = (),
) -> tuple[list[Record], Section]:
    """Time what has no record yet. Returns all records in the matrix's order, and its section.

    Args:
        peer: NAME=WHERE, see pairs.find_peers.
        draw_only: time nothing; take the newest record of each cell, from any machine.
        budget_s: stop after so many seconds; the next run continues.
        shape: only these shapes of the matrix.
    """
    machine = describe_machine()
    section = load_section(matrix, kind or machine["kind"]).restricted_to(shape)
    command = " ".join(
        [f"python -m olmo.bench --matrix {matrix} --out {out}", *(f"--shape {s}" for s in shape)]
    )
    if draw_only:
        records = newest_records(section, out)
        write_tables(records, section, out, command)
    else:
        records = []
        for record, line in time_missing(section, out, machine, peer, budget_s):
            records.append(record)
            write_tables(records, section, out, command)
            log.info(line)
    log.info(f"{out}/table.md")
    return records, section


def write_tables(records: list[Record], section: Section, out: Path, command: str) -> None:
    sealed.write_atomic(out / "table.md", table.markdown(records, section, command))
    sealed.write_atomic(out / "table.csv", table.csv_text(records, section))


def time_missing(
    section: Section,
    out: Path,
    machine: Record,
    peer: Sequence[str],
    budget_s: float | None = None,
) -> Iterator[tuple[Record, str]]:
    """Each record, read or made now, with a line for the log."""
    end = time.monotonic() + (math.inf if budget_s is None else budget_s)
    cells = pairs.CellRunner(machine["kind"])
    tasks = list(list_tasks(section, out, machine, peer, cells))
    longest_s: dict[tuple[str, ...], float] = {}  # by kind of task
    skipped: list[str] = []
    try:
        for number, task in enumerate(tasks, 1):
            note = "; timed before"
            if (record := load_reusable_record(task)) is None:
                note, began = "", time.monotonic()
                if (left := end - began) <= longest_s.get(task.kind, 0.0):
                    skipped.append(task.name)
                    continue
                started = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
                record = {
                    "started": started,
                    **task.time(min(task.limit_s, left)),
                    **machine,
                    "load": os.getloadavg()[0],
                    "cores": os.cpu_count(),
                }
                sealed.write_atomic(task.path, json.dumps(record, indent=1))
                took_s = time.monotonic() - began
                longest_s[task.kind] = max(longest_s.get(task.kind, 0.0), took_s)
            result = table.summary_line(record)
            yield record, f"{number} of {len(tasks)}  {task.name}: {result}{note}"
    finally:
        cells.close()
    if skipped:
        names = ", ".join(skipped)
        log.info(
            f"the budget of {budget_s:g} s is over, not timed: {names}. Run the same command "
            "again to time them"
        )


def newest_records(section: Section, out: Path) -> list[Record]:
    """The newest record in OUT of each cell and pair. Raises ValueError where there is none."""
    newest: dict[str, Record] = {}
    records = [json.loads(path.read_text()) for path in (out / "records").glob("*.json")]
    for record in sorted(records, key=lambda record: str(record["started"])):
        cell, beside = Cell(**record["cell"]), record.get("beside")
        newest[Pair(cell, Cell(**beside)).name if beside else cell.name] = record
    names = [cell.name for cell in section.cells()] + [pair.name for pair in section.pairs()]
    if not (matching := [newest[name] for name in names if name in newest]):
        raise ValueError(
            f"expected records of this matrix in {out}/records, found {len(records)} others"
        )
    return matching


def list_tasks(
    section: Section, out: Path, machine: Record, peer: Sequence[str], cells: pairs.CellRunner
) -> Iterator[Task]:
    """The records of a section on this machine, in order."""

    def path(name: str, shape: str, *settings: Any) -> Path:
        measured = {"shape": section.model | section.shapes[shape], "warmup": section.warmup}
        key = json.dumps([*settings, measured, section.steps, machine], sort_keys=True)
        return out / "records" / f"{name}.{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"

    code = code_digest(CODE)
    for cell in section.cells():
        yield Task(
            cell.name,
            path(cell.name, cell.shape, asdict(cell), code),
            section.limit_s,
            (cell.shape, cell.compile),
            lambda limit_s, cell=cell: cells.time(section, cell, limit_s),  # type: ignore[misc]
        )
    if not (wanted := section.pairs()):
        return
    peers, code = pairs.find_peers(peer), code_digest(PEER_CODE)
    for pair in wanted:
        found = peers[pair.theirs.whose]
        versions = found if isinstance(found, str) else found.versions
        both = [asdict(pair.theirs), asdict(pair.ours)]
        yield Task(
            pair.name,
            path(pair.name, pair.theirs.shape, both, section.rounds, versions, code),
            2 * section.limit_s,
            ("pair", pair.theirs.shape, pair.theirs.compile),
            lambda limit_s, pair=pair, found=found: pairs.time_pair(  # type: ignore[misc]
                section, pair, found, machine["kind"], limit_s
            ),
        )


def load_reusable_record(task: Task) -> Record | None:
    """The record of a task; None if it is missing or another try may end otherwise."""
    if not task.path.exists():
        return None
    record: Record = json.loads(task.path.read_text())
    may_succeed = record["status"] == "failed" or (
        record["status"] == "too slow" and record["limit_s"] < task.limit_s
    )
    return None if may_succeed else record


def code_digest(parts: Sequence[str]) -> str:
    """The sha256 of these files and folders of the package."""
    root = Path(olmo.__file__).parent
    files = [
        file for part in parts for file in (sorted((root / part).rglob("*.py")) or [root / part])
    ]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--matrix", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=WHERE",
        help="ai2-olmo or transformers: a Python that has it, or a wheel or folder of its sources",
    )
    parser.add_argument("--kind", choices=("cpu", "cuda"), help="default: what the machine has")
    parser.add_argument(
        "--shape", action="append", default=[], help="only this shape; may be repeated"
    )
    parser.add_argument(
        "--budget-s", type=float, help="stop after so many seconds and list what was not timed"
    )
    parser.add_argument(
        "--draw-only", action="store_true", help="write the tables of the records in OUT"
    )
    try:
        run_matrix(**vars(parser.parse_args()))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"olmo.bench: {error}")


if __name__ == "__main__":
    main()
