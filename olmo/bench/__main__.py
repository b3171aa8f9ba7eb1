"""Time a matrix: `python -m olmo.bench --matrix config/bench/tps.yaml --out bench-tps`.

Needs torch, numpy and omegaconf alone. Each cell is a process of its own and leaves a record in
OUT/records; those that are there are not timed again, unless the code, torch or the device is
another. Then a table: OUT/table.md and OUT/table.csv.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import olmo
from olmo.bench import table
from olmo.bench.cell import surroundings
from olmo.bench.matrix import Cell, Section, as_plain, load
from olmo.log import tell
from olmo.process import describe_exit, supervised

# What a step is made of: a change here makes every record old.
CODE = ("model", "train", "precision", "bench/cell.py")


def bench(matrix: Path, out: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Time what has no record yet; every cell's record, in the matrix's order."""
    here = surroundings()
    section = load(matrix, kind or here["kind"])
    cells = section.cells()
    records = []
    for number, cell in enumerate(cells, 1):
        path = record_path(out, section, cell, here)
        if not path.exists():
            record = timed_alone(section, cell)
            write(path, record | here)
        record = json.loads(path.read_text())
        records.append(record)
        tell(f"{number} of {len(cells)}  {cell.name}: {table.result(record)}")
    for suffix, text in {"md": table.markdown, "csv": table.csv_text}.items():
        (out / f"table.{suffix}").write_text(text(records, section))
    tell(f"{out}/table.md")
    return records


def record_path(out: Path, section: Section, cell: Cell, here: dict[str, Any]) -> Path:
    """Where a cell's record is: what it was measured with is in the name."""
    measured = {"shape": section.model | section.shapes[cell.shape], "warmup": section.warmup}
    with_what = [as_plain(cell), measured, section.steps, here, code()]
    text = json.dumps(with_what, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return out / "records" / f"{cell.name}.{digest}.json"


def code() -> str:
    root = Path(olmo.__file__).parent
    files = [
        file for part in CODE for file in (sorted((root / part).rglob("*.py")) or [root / part])
    ]
    joined = b"\0".join(file.read_bytes() for file in files)
    return hashlib.sha256(joined).hexdigest()


def timed_alone(section: Section, cell: Cell) -> dict[str, Any]:
    """The record of a cell, from a process of its own, however that ends."""
    import tempfile

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
                return failed | {"why": f"it took longer than limit_s={section.limit_s:g}"}
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
    parser.add_argument("--kind", choices=("cpu", "cuda"), help="as the machine has, by default")
    arguments = parser.parse_args()
    try:
        bench(arguments.matrix, arguments.out, arguments.kind)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"olmo.bench: {error}")


if __name__ == "__main__":
    main()
