"""Draw the results of bench/gpu/run.sh, on any machine: a page of tables, and a CSV of the cells.

python bench/gpu/draw.py OUT.tar docs/benchmarks/h200
"""

from __future__ import annotations

import argparse
import json
import tarfile
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from olmo.bench import table
from olmo.bench.matrix import NONE, Cell, Section

Record = dict[str, Any]
Rows = list[dict[str, str]]
PASSED = {True: "yes", False: "NO", None: "not available"}


def format_page(folder: Path) -> str:
    """The page of a folder of records (see run.py)."""
    about = json.loads((folder / "about.json").read_text())
    peers = [record for record in read_records(folder, "peer") if "beside" in record]
    tables = {
        "Tokens per second": cell_rows(folder, about["kind"]),
        "Beside ai2-olmo, in turns": [table.pair_row(record) for record in peers],
        "8 bits beside bfloat16": fp8_rows(folder),
        **profile_tables(folder),
        "What the device can do": ceiling_rows(folder),
        "What it computes": smoke_rows(folder),
        "A run killed and resumed": train_rows(folder),
    }
    lines = [f"# {about['device']}", "", *format_head(about), ""]
    for title, rows in tables.items():
        lines += [f"## {title}", "", *table.markdown_table(rows), ""] if rows else []
    lines += table.list_failures([*cell_records(folder), *peers])[1:]  # after one empty line
    return "\n".join(lines).rstrip() + "\n"


def format_head(about: Record) -> list[str]:
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


def read_records(folder: Path, *parts: str) -> list[Record]:
    """The records of these parts, oldest first within a part."""
    records: list[Record] = []
    for part in parts:
        paths = [*folder.glob(f"{part}/*.json"), *folder.glob(f"{part}/records/*.json")]
        found = [json.loads(path.read_text()) for path in sorted(paths, key=lambda path: path.name)]
        records += sorted(found, key=lambda record: record.get("started", ""))
    return records


def cell_records(folder: Path) -> list[Record]:
    return [r for r in read_records(folder, "first", "fp8", "rest") if "cell" in r]


def format_record(record: Record) -> str:
    """A record of a program on one line, for the log."""
    if record.get("what") == "product":
        fp8 = record["fp8_tflops"]
        rates = f"{record['bf16_tflops']:.3g} TFLOP/s, in 8 bits "
        return f"{record['name']}: {rates}{f'{fp8:.3g}' if fp8 else 'none'}"
    if record.get("what") == "copy":
        return f"copy: {record['tb_per_s']:.3g} TB/s"
    if "families" in record:
        return f"{record['ms']:.2f} ms a step"
    if "passed" in record:
        detail = record.get("why") or record.get("error", record.get("largest_gap"))
        return f"{record['what']}: {PASSED[record['passed']]}{f' ({detail})' if detail else ''}"
    return f"{record['what']}: {record['steps']} steps, exit {record['exit']}"


def one_line(text: object, width: int) -> str:
    return " ".join(str(text or "").split())[:width]


def cell_rows(folder: Path, kind: str) -> Rows:
    """Each cell once, by shape, the fastest first."""
    cells = {Cell(**record["cell"]): record for record in cell_records(folder)}
    shapes = list(dict.fromkeys(cell.shape for cell in cells))
    matrix: Any = OmegaConf.to_container(OmegaConf.load(Path(__file__).with_name("matrix.yaml")))
    predicted = matrix[kind].get("predicted", {})
    rows = []
    for cell, record in sorted(
        cells.items(), key=lambda item: (shapes.index(item[0].shape), -table.ranking_speed(item[1]))
    ):
        row = {"shape": cell.shape, "setting": table.format_settings(record)}
        row |= table.result_columns(record)
        if cell.name in predicted:
            row["predicted"] = f"{predicted[cell.name]:,.0f}"
        if record["status"] == "ok":
            row["first step s"] = f"{record['first_step_s']:.1f}"
        rows.append(row)
    return rows


def fp8_rows(folder: Path) -> Rows:
    """Each cell in 8 bits beside the same cell without."""
    cells = {Cell(**r["cell"]): r for r in cell_records(folder) if r["status"] == "ok"}
    rows = []
    for cell, fp8 in cells.items():
        plain = cells.get(replace(cell, fp8=NONE))
        if cell.fp8 == NONE or plain is None:
            continue
        ratio = fp8["tokens_per_second"] / plain["tokens_per_second"]
        row = {"shape": cell.shape, "setting": table.format_settings(fp8)}
        row |= {"times as fast": f"{ratio:.3f}", "loss": ""}
        if len(fp8["losses"]) == len(plain["losses"]) >= 40:
            a, b = (sum(r["losses"][-10:]) / 10 for r in (fp8, plain))
            row["loss"] = f"{a - b:+.4f} of {b:.4f} after {len(fp8['losses'])} steps"
        rows.append(row)
    return rows


def profile_tables(folder: Path) -> dict[str, Rows]:
    tables: dict[str, Rows] = {}
    for record in read_records(folder, "profile"):
        families = sorted(record["families"].items(), key=lambda item: -item[1]["ms"])
        tables[f"Where a step of {Cell(**record['cell']).name} goes"] = [
            {
                "kernels": name,
                "ms": f"{family['ms']:.2f}",
                "share": f"{family['ms'] / max(record['ms'], 1e-9):.1%}",
                "calls": str(family["calls"]),
            }
            for name, family in families
        ]
        tables["The longest kernels of a step"] = [
            {"kernel": k["kernel"][:90], "ms": f"{k['ms']:.3f}", "calls": str(k["calls"])}
            for k in record["longest"]
        ]
    return tables


def ceiling_rows(folder: Path) -> Rows:
    rows = []
    for record in read_records(folder, "ceiling"):
        if record["what"] == "copy":
            name, rate = f"copy, {record['bytes'] / 1e9:.1f} GB", f"{record['tb_per_s']:.3g} TB/s"
            fp8 = None
        else:
            name = f"{record['name']} ({record['m']} × {record['n']} × {record['k']})"
            rate, fp8 = f"{record['bf16_tflops']:.3g}", record["fp8_tflops"]
        row = {"product": name, "bfloat16 TFLOP/s": rate}
        rows.append(row | {"8 bits TFLOP/s": f"{fp8:.3g}" if fp8 else ""})
    return rows


def smoke_rows(folder: Path) -> Rows:
    rows = []
    for record in read_records(folder, "smoke"):
        error = record.get("error")
        found = "" if error is None else f"{error:.2e} (at most {record['limit']:g})"
        found = found or one_line(record.get("why"), 110)
        row = {"check": record["what"], "as it should": PASSED[record["passed"]]}
        rows.append(row | {"largest error, or why not": found})
    return rows


def train_rows(folder: Path) -> Rows:
    rows = []
    for record in read_records(folder, "train"):
        if "equal" in record:
            result = f"{record['equal']} losses equal, the largest gap {record['largest_gap']}"
        else:
            result = f"exit {record['exit']}, {record['seconds']} s, "
            result += f"last loss {record.get('last_loss')}"
        rows.append({"run": record["what"], "steps": str(record["steps"]), "result": result})
    return rows


def cells_csv(folder: Path) -> str:
    empty = Section.new(model={}, shapes={}, groups=[])
    records = read_records(folder, "first", "peer", "fp8", "rest")
    return table.csv_text([record for record in records if "cell" in record], empty)


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
        (options.out / "README.md").write_text(format_page(folder))
        (options.out / "cells.csv").write_text(cells_csv(folder))
    print(options.out / "README.md")


if __name__ == "__main__":
    main()
