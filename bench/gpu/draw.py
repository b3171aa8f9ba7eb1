"""Draw what bench/gpu/run.sh found, anywhere: a page of tables, and a CSV of the cells.

python bench/gpu/draw.py OUT.tar docs/benchmarks/h200
"""

from __future__ import annotations

import argparse
import json
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from olmo.bench import table
from olmo.bench.matrix import Cell, Pair

Record = dict[str, Any]
PASSED = {True: "yes", False: "NO", None: "not available"}


def page(folder: Path) -> str:
    """The page of a folder of records (see run.py)."""
    about = json.loads((folder / "about.json").read_text())
    lines = [f"# {about['device']}", "", *origin(about), ""]
    for draw in (cells, beside, eight_bits, profiled, ceiling, smoke, trained):
        lines += draw(folder)
    return "\n".join(lines).rstrip() + "\n"


def origin(about: Record) -> list[str]:
    parts = ", ".join(
        f"{name} {p['seconds']:.0f} s ({p['how']})" for name, p in about["parts"].items()
    )
    commit = about["commit"] or f"code {about['code'][:12]}"
    return [
        f"torch {about['torch']}, CUDA {about['cuda']}, Python {about['python']}, {about['cores']} "
        f"cores; {about['started'][:10]}; commit {commit[:12]}.",
        "",
        f"`{about['command']}`: {parts}.",
    ]


def records(folder: Path, *parts: str) -> list[Record]:
    """Of these parts, oldest first."""
    return [
        json.loads(path.read_text())
        for part in parts
        for path in sorted(
            [*folder.glob(f"{part}/*.json"), *folder.glob(f"{part}/records/*.json")],
            key=lambda path: (json.loads(path.read_text()).get("started", ""), path.name),
        )
    ]


def in_words(record: Record) -> str:
    """A record of a program's, on a line."""
    if record.get("what") == "product":
        eight = record["fp8_tflops"]
        rates = f"{record['bf16_tflops']:.3g} TFLOP/s, in 8 bits "
        return f"{record['name']}: {rates}{f'{eight:.3g}' if eight else 'none'}"
    if record.get("what") == "copy":
        return f"copy: {record['tb_per_s']:.3g} TB/s"
    if "families" in record:
        return f"{record['ms']:.2f} ms a step"
    if "passed" in record:
        told = record.get("why") or record.get("error", record.get("largest_gap"))
        return f"{record['what']}: {PASSED[record['passed']]}{f' ({told})' if told else ''}"
    return f"{record['what']}: {record['steps']} steps, exit {record['exit']}"


def section(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"## {title}", "", *table.table_of(head, rows), ""] if rows else []


def cells(folder: Path) -> list[str]:
    """Each cell once, the fastest of a shape first."""
    found = {
        Cell(**record["cell"]).name: record
        for record in records(folder, "first", "fp8", "rest")
        if "cell" in record
    }
    shapes = dict.fromkeys(record["cell"]["shape"] for record in found.values())
    kind = json.loads((folder / "about.json").read_text())["kind"]
    whole: Any = OmegaConf.to_container(OmegaConf.load(Path(__file__).with_name("matrix.yaml")))
    predicted = whole[kind].get("predicted", {})
    rows = []
    for shape in shapes:
        mine = [record for record in found.values() if record["cell"]["shape"] == shape]
        rows += [cell_row(r, predicted) for r in sorted(mine, key=lambda r: -table.rate(r))]
    head = ("shape", "setting", "tokens/s", "predicted", "MFU", "peak MiB", "J/token",
            "first step s", "loss")  # fmt: skip
    return section("Tokens per second", head, rows)


def cell_row(record: Record, predicted: dict[str, float]) -> list[str]:
    start = [record["cell"]["shape"], table.in_words(record)]
    expected = predicted.get(Cell(**record["cell"]).name)
    if record["status"] != "ok":
        why = " ".join(str(record["why"]).split())[:100]
        return [*start, f"{record['status']}: {why}", *[""] * 6]
    joules = record["joules_per_token"]
    return [
        *start,
        table.speed(record),
        f"{expected:,.0f}" if expected else "",
        table.mfu(record),
        table.mebibytes(record),
        "" if joules is None else f"{joules:.2g}",
        f"{record['first_step_s']:.1f}",
        f"{record['last_loss']:.3f}",
    ]


def beside(folder: Path) -> list[str]:
    rows = []
    for record in records(folder, "peer"):
        if "beside" not in record:
            continue
        pair = Pair(Cell(**record["cell"]), Cell(**record["beside"]))
        if record["status"] != "ok":
            rows.append([pair.name, f"{record['status']}: {record['why']}"[:120], "", ""])
        else:
            ours = record["ours"]
            speeds = [table.speed(record), table.speed(ours), table.ratio(record)]
            rows.append([pair.name, *speeds])
    return section("Beside ai2-olmo, in turns", ("pair", "theirs", "ours", "ours/theirs"), rows)


def eight_bits(folder: Path) -> list[str]:
    """Native beside none, where all else is the same."""
    found = {
        Cell(**record["cell"]): record
        for record in records(folder, "first", "fp8", "rest")
        if record.get("status") == "ok" and "cell" in record
    }
    rows = []
    for cell, eight in found.items():
        plain = found.get(Cell(**{**vars(cell), "fp8": "none"}))
        if cell.fp8 == "none" or plain is None:
            continue
        gap = ""
        if len(eight["losses"]) == len(plain["losses"]) >= 40:
            ends = [sum(r["losses"][-10:]) / 10 for r in (eight, plain)]
            gap = f"{ends[0] - ends[1]:+.4f} of {ends[1]:.4f} after {len(eight['losses'])} steps"
        ratio = eight["tokens_per_second"] / plain["tokens_per_second"]
        rows.append([cell.shape, table.in_words(eight), f"{ratio:.3f}", gap])
    return section("8 bits beside bfloat16", ("shape", "setting", "times as fast", "loss"), rows)


def profiled(folder: Path) -> list[str]:
    lines: list[str] = []
    for record in records(folder, "profile"):
        families = sorted(record["families"].items(), key=lambda item: -item[1]["ms"])
        rows = [
            [name, f"{f['ms']:.2f}", f"{f['ms'] / max(record['ms'], 1e-9):.1%}", str(f["calls"])]
            for name, f in families
        ]
        title = f"Where a step of {Cell(**record['cell']).name} goes"
        lines += section(title, ("kernels", "ms", "share", "calls"), rows)
        rows = [[k["kernel"][:90], f"{k['ms']:.3f}", str(k["calls"])] for k in record["longest"]]
        lines += section("The longest kernels of a step", ("kernel", "ms", "calls"), rows)
    return lines


def ceiling(folder: Path) -> list[str]:
    rows = []
    for record in records(folder, "ceiling"):
        if record["what"] == "copy":
            rows.append(
                [f"copy, {record['bytes'] / 1e9:.1f} GB", f"{record['tb_per_s']:.3g} TB/s", ""]
            )
            continue
        sides = f"{record['name']} ({record['m']} × {record['n']} × {record['k']})"
        eight = record["fp8_tflops"]
        rows.append([sides, f"{record['bf16_tflops']:.3g}", f"{eight:.3g}" if eight else ""])
    head = ("product", "bfloat16 TFLOP/s", "8 bits TFLOP/s")
    return section("What the device can do", head, rows)


def smoke(folder: Path) -> list[str]:
    rows = []
    for record in records(folder, "smoke"):
        error = record.get("error")
        told = "" if error is None else f"{error:.2e} (at most {record['limit']:g})"
        why = " ".join(str(record.get("why") or "").split())[:110]
        rows.append([record["what"], PASSED[record["passed"]], told or why])
    return section("What it computes", ("check", "as it should", "largest error, or why not"), rows)


def trained(folder: Path) -> list[str]:
    rows = [list(trained_row(record)) for record in records(folder, "train")]
    return section("A run killed and resumed", ("run", "steps", "result"), rows)


def trained_row(record: Record) -> Iterator[str]:
    yield record["what"]
    yield str(record["steps"])
    if "equal" in record:
        yield f"{record['equal']} losses equal, the largest gap {record['largest_gap']}"
    else:
        last = record.get("last_loss")
        yield f"exit {record['exit']}, {record['seconds']} s, last loss {last}"


def csv_of(folder: Path) -> str:
    from olmo.bench.matrix import Section

    nothing = Section.new(model={}, shapes={}, groups=[])
    every = [r for r in records(folder, "first", "peer", "fp8", "rest") if "cell" in r]
    return table.csv_text(every, nothing)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tar", type=Path)
    parser.add_argument("out", type=Path, help="a folder: README.md and cells.csv")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        with tarfile.open(options.tar) as file:
            file.extractall(place, filter="data")
        folder = Path(place, "gpu")
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "README.md").write_text(page(folder))
        (options.out / "cells.csv").write_text(csv_of(folder))
    print(options.out / "README.md")


if __name__ == "__main__":
    main()
