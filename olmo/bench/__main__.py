"""Time a matrix: `python -m olmo.bench --matrix config/bench/tps.yaml --out bench-tps`.

Needs torch, numpy and omegaconf alone. Each cell, and each pair with a peer, leaves a record in
OUT/records; what has one is not timed again, unless the code, torch, the device or the peer is
another. After each a table is drawn: OUT/table.md and OUT/table.csv.
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
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import olmo
from olmo.bench import pairs, table
from olmo.bench.cell import surroundings
from olmo.bench.matrix import Cell, Pair, Section, as_plain, load
from olmo.runtime.log import log

# What a step is made of: a change here makes every record old.
CODE = ("model", "train", "precision", "bench/cell.py", "bench/side.py")
PEERS_CODE = (*CODE, "bench/peer.py", "bench/pairs.py")


class Task(NamedTuple):
    """A record that is wanted."""

    name: str
    path: Path  # what it is measured with is in the file's name
    limit_s: float
    kind: tuple[str, ...]  # tasks of one kind take about as long as each other
    time: Callable[[float], dict[str, Any]]
    """Its record, within so many seconds."""


def bench(
    matrix: Path,
    out: Path,
    peer: Sequence[str] = (),
    kind: str | None = None,
    draw_only: bool = False,
    budget_s: float | None = None,
) -> tuple[list[dict[str, Any]], Section]:
    """Time what has no record yet; each record in the matrix's order, and the matrix's section.

    Args:
        peer: words NAME=WHERE, see pairs.find.
        draw_only: time nothing, and take the newest record of each cell, of whatever machine.
        budget_s: end within so many seconds; what no longer fits is left for the next time.
    """
    here = surroundings()
    section = load(matrix, kind or here["kind"])
    command = f"python -m olmo.bench --matrix {matrix} --out {out}"
    if draw_only:
        records = newest(section, out)
        draw(records, section, out, command)
    else:
        records = []
        for record, line in timed(section, out, here, peer, budget_s):
            records.append(record)
            draw(records, section, out, command)
            log.info(line)
    log.info(f"{out}/table.md")
    return records, section


def draw(records: list[dict[str, Any]], section: Section, out: Path, command: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "table.md", table.markdown(records, section, command))
    write_whole(out / "table.csv", table.csv_text(records, section))


def timed(
    section: Section,
    out: Path,
    here: dict[str, Any],
    peer: Sequence[str],
    budget_s: float | None = None,
) -> Iterator[tuple[dict[str, Any], str]]:
    """The records that are there, and those that had to be made; each with a line about it."""
    end = time.monotonic() + (math.inf if budget_s is None else budget_s)
    cells = pairs.Cells(here["kind"])
    wanted = list(tasks(section, out, here, peer, cells))
    took: dict[tuple[str, ...], float] = {}  # the longest of a kind
    skipped: list[str] = []
    try:
        for number, task in enumerate(wanted, 1):
            before = "; timed before"
            if (record := kept(task)) is None:
                before, began = "", time.monotonic()
                if (left := end - began) <= took.get(task.kind, 0.0):
                    skipped.append(task.name)
                    continue
                started = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
                record = {"started": started} | task.time(min(task.limit_s, left)) | here
                record |= {"load": os.getloadavg()[0], "cores": os.cpu_count()}
                write(task.path, record)
                took[task.kind] = max(took.get(task.kind, 0.0), time.monotonic() - began)
            result = table.result(record)
            yield record, f"{number} of {len(wanted)}  {task.name}: {result}{before}"
    finally:
        cells.close()
    if skipped:
        names = ", ".join(skipped)
        log.info(
            f"not timed, {budget_s:g} s are over: {names}. The same command goes on with these"
        )


def newest(section: Section, out: Path) -> list[dict[str, Any]]:
    """The newest record in OUT of each cell and pair.

    Raises:
        ValueError: there is none.
    """
    found: dict[str, dict[str, Any]] = {}
    every = [json.loads(path.read_text()) for path in (out / "records").glob("*.json")]
    for record in sorted(every, key=lambda record: str(record["started"])):
        cell, beside = Cell(**record["cell"]), record.get("beside")
        name = Pair(cell, Cell(**beside)).name if beside else cell.name
        found[name] = record
    names = [cell.name for cell in section.cells()] + [pair.name for pair in section.pairs()]
    if not (records := [found[name] for name in names if name in found]):
        raise ValueError(f"expected records of this matrix in {out}/records, found {len(every)}")
    return records


def tasks(
    section: Section, out: Path, here: dict[str, Any], peer: Sequence[str], cells: pairs.Cells
) -> Iterator[Task]:
    """What is wanted of a section on this machine."""

    def path(name: str, shape: str, *with_what: Any) -> Path:
        measured = {"shape": section.model | section.shapes[shape], "warmup": section.warmup}
        text = json.dumps([*with_what, measured, section.steps, here], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        return out / "records" / f"{name}.{digest}.json"

    ours = code(CODE)
    for cell in section.cells():
        yield Task(
            cell.name,
            path(cell.name, cell.shape, as_plain(cell), ours),
            section.limit_s,
            (cell.shape, cell.compile),
            lambda limit_s, cell=cell: cells.time(section, cell, limit_s),  # type: ignore[misc]
        )
    wanted = section.pairs()
    found, theirs = (pairs.find(peer), code(PEERS_CODE)) if wanted else ({}, "")
    for pair in wanted:
        where = found[pair.theirs.whose]
        has = where if isinstance(where, str) else where.versions
        both = [as_plain(pair.theirs), as_plain(pair.ours)]
        yield Task(
            pair.name,
            path(pair.name, pair.theirs.shape, both, section.rounds, has, theirs),
            2 * section.limit_s,
            ("pair", pair.theirs.shape, pair.theirs.compile),
            lambda limit_s, pair=pair, where=where: pairs.time_pair(  # type: ignore[misc]
                section, pair, where, here["kind"], limit_s
            ),
        )


def kept(task: Task) -> dict[str, Any] | None:
    """The record that is there, unless trying again may end otherwise."""
    if not task.path.exists():
        return None
    record: dict[str, Any] = json.loads(task.path.read_text())
    if record["status"] == "failed":
        return None
    if record["status"] == "too slow" and record["limit_s"] < task.limit_s:
        return None
    return record


def code(parts: Sequence[str]) -> str:
    """A digest of these files and folders."""
    root = Path(olmo.__file__).parent
    files = [
        file for part in parts for file in (sorted((root / part).rglob("*.py")) or [root / part])
    ]
    joined = b"\0".join(file.read_bytes() for file in files)
    return hashlib.sha256(joined).hexdigest()


def write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(record, indent=1))


def write_whole(path: Path, text: str) -> None:
    """Whole or not at all."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(text)
    draft.replace(path)


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
    parser.add_argument("--kind", choices=("cpu", "cuda"), help="as the machine has, by default")
    parser.add_argument(
        "--budget-s", type=float, help="end within so many seconds; what no longer fits is told"
    )
    parser.add_argument(
        "--draw-only", action="store_true", help="the tables of the records there, from anywhere"
    )
    try:
        bench(**vars(parser.parse_args()))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"olmo.bench: {error}")


if __name__ == "__main__":
    main()
