"""Time a matrix: `python -m olmo.bench --matrix config/bench/tps.yaml --out bench-tps`.

Needs torch, numpy and omegaconf alone. Each cell is a process of its own, each pair with a peer
two, and leaves a record in OUT/records; what has one is not timed again, unless the code, torch,
the device or the peer is another. Then a table: OUT/table.md and OUT/table.csv.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import olmo
from olmo.bench import pairs, table
from olmo.bench.cell import surroundings
from olmo.bench.matrix import Cell, Pair, Section, as_plain, load
from olmo.log import tell
from olmo.process import describe_exit, supervised

# What a step is made of: a change here makes every record old.
CODE = ("model", "train", "precision", "bench/cell.py", "bench/side.py")
PEERS_CODE = (*CODE, "bench/peer.py", "bench/pairs.py")


class Task(NamedTuple):
    """A record that is wanted."""

    name: str
    path: Path  # what it is measured with is in the file's name
    limit_s: float
    time: Callable[[], dict[str, Any]]


def bench(
    matrix: Path,
    out: Path,
    peer: Sequence[str] = (),
    kind: str | None = None,
    draw_only: bool = False,
) -> tuple[list[dict[str, Any]], Section]:
    """Time what has no record yet; each record in the matrix's order, and the matrix's section.

    Args:
        peer: words NAME=WHERE, see pairs.find.
        draw_only: time nothing, and take the newest record of each cell, of whatever machine.
    """
    here = surroundings()
    section = load(matrix, kind or here["kind"])
    records = newest(section, out) if draw_only else list(timed(section, out, here, peer))
    out.mkdir(parents=True, exist_ok=True)
    command = f"python -m olmo.bench --matrix {matrix} --out {out}"
    (out / "table.md").write_text(table.markdown(records, section, command))
    (out / "table.csv").write_text(table.csv_text(records, section))
    tell(f"{out}/table.md")
    return records, section


def timed(
    section: Section, out: Path, here: dict[str, Any], peer: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """The records that are there, and those that had to be made."""
    wanted = list(tasks(section, out, here, peer))
    for number, task in enumerate(wanted, 1):
        found = kept(task)
        record = found or {}
        if found is None:
            started = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
            record = {"started": started} | task.time() | here
            record |= {"load": os.getloadavg()[0], "cores": os.cpu_count()}
            write(task.path, record)
        before = "; timed before" if found else ""
        tell(f"{number} of {len(wanted)}  {task.name}: {table.result(record)}{before}")
        yield record


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


def tasks(section: Section, out: Path, here: dict[str, Any], peer: Sequence[str]) -> Iterator[Task]:
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
            lambda cell=cell: timed_alone(section, cell),  # type: ignore[misc]
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
            lambda pair=pair, where=where: pairs.time_pair(  # type: ignore[misc]
                section, pair, where, here["kind"]
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


def timed_alone(section: Section, cell: Cell) -> dict[str, Any]:
    """The record of a cell, from a process of its own, however that ends."""
    with tempfile.TemporaryDirectory() as folder:
        path, said = Path(folder, "record.json"), Path(folder, "said")
        request = json.dumps({"section": section.asdict(), "cell": as_plain(cell)})
        command = [sys.executable, "-m", "olmo.bench.cell", str(path)]
        failed = {"cell": as_plain(cell), "status": "failed"}
        with (
            said.open("w") as output,
            supervised(
                command, stdin=subprocess.PIPE, stdout=output, stderr=output, text=True
            ) as process,
        ):
            assert process.stdin is not None
            process.stdin.write(request)
            process.stdin.close()
            try:
                status = process.wait(section.limit_s)
            except subprocess.TimeoutExpired:
                why = f"it took longer than limit_s={section.limit_s:g}"
                return failed | {"status": "too slow", "why": why, "limit_s": section.limit_s}
        if path.exists():
            record: dict[str, Any] = json.loads(path.read_text())
            return record
        last = (said.read_text().strip().splitlines() or [""])[-1]
        if status == -9:
            return failed | {"status": "out of memory", "why": "the kernel ended the process"}
        return failed | {"why": f"{describe_exit(status)}: {last}"}


def write(path: Path, record: dict[str, Any]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(record, indent=1))
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
        "--draw-only", action="store_true", help="the tables of the records there, from anywhere"
    )
    try:
        bench(**vars(parser.parse_args()))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"olmo.bench: {error}")


if __name__ == "__main__":
    main()
