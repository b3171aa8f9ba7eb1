"""A matrix of speeds as files for people and programs: Markdown, CSV, parquet, a heat map."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from olmo.bench.matrix import COMPILE_MODES, Section
from olmo.bench.table import format_extras, ranking_speed, record_row


def bench(
    matrix: Path,
    out: Path,
    peer: list[str] | None = None,
    kind: str | None = None,
    draw_only: bool = False,
) -> None:
    """Time the cells of a matrix that have no record yet, each in a process of its own.

    OUT gets records/, table.md, table.csv, table.parquet and heat.svg. --peer NAME=WHERE names a
    Python, a wheel or a folder with ai2-olmo or transformers, which ours is then timed beside;
    $OLMO_PEER_PYTHON does the same. --kind: cpu or cuda, by default what the machine has.
    --draw-only makes the files of the records that are there, from whatever machine.
    """
    from olmo.bench.__main__ import run_matrix

    records, section = run_matrix(matrix, out, peer or (), kind, draw_only)
    write_parquet(records, section, out / "table.parquet")
    draw(records, out / "heat.svg")


def write_parquet(records: list[dict[str, Any]], section: Section, path: Path) -> None:
    import polars

    rows = [record_row(record, section) for record in records]
    polars.DataFrame(rows, infer_schema_length=None).write_parquet(path)


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Speeds by colour and number, each shape by itself; what cannot be had says so.

    Tokens per second, on a CPU of its own time: a machine that others use as well is not measured.
    """
    import altair

    cells = [drawn(record) for record in records]
    for shape in {cell["shape"] for cell in cells}:
        mine = [cell for cell in cells if cell["shape"] == shape]
        most = max(cell["speed"] for cell in mine)
        for cell in mine:
            cell["share"] = cell["speed"] / most if cell["speed"] else None
    of_what = "CPU-second" if records[0]["kind"] == "cpu" else "second"
    charts = [
        chart_of(
            f"{shape}: tokens per {of_what}", [cell for cell in cells if cell["shape"] == shape]
        )
        for shape in dict.fromkeys(cell["shape"] for cell in cells)
    ]
    whole = altair.vconcat(*charts).configure_view(stroke=None).configure_axis(domain=False)
    whole.save(path, format="svg")


def drawn(record: dict[str, Any]) -> dict[str, Any]:
    cell, speed = record["cell"], ranking_speed(record)
    whose = "" if cell["whose"] == "ours" else f"{cell['whose']}: "
    kernel = [cell["attention"], cell["precision"], *format_extras(record)]
    says = f"{speed:,.0f}" if speed else record["status"]
    if "ratio" in record:
        ratio = record["ratio_cpu" if record["kind"] == "cpu" else "ratio"]
        says += f" (ours × {ratio:.2f})"
    return {
        "shape": cell["shape"],
        "kernel": whose + ", ".join(kernel),
        "step": f"{cell['compile']}, microbatch {cell['microbatch']}",
        "column": (COMPILE_MODES.index(cell["compile"]), cell["microbatch"]),
        "speed": speed,
        "says": says,
    }


def chart_of(title: str, cells: list[dict[str, Any]]) -> Any:
    """Kernels down, compile mode and microbatch across; the colour is the share of the fastest."""
    import altair

    axis: dict[str, Any] = {"title": None, "labelLimit": 400, "ticks": False}
    lines = altair.Axis(
        orient="top",
        labelAngle=0,
        labelPadding=18,
        labelExpr="split(datum.label, ', ')",
        **axis,
    )
    columns = [cell["step"] for cell in sorted(cells, key=lambda cell: cell["column"])]
    names = altair.Chart(altair.Data(values=cells)).encode(
        x=altair.X("step:N", sort=list(dict.fromkeys(columns)), axis=lines),
        y=altair.Y("kernel:N", sort=None, axis=altair.Axis(**axis)),
    )
    share = altair.Color(
        "share:Q",
        scale=altair.Scale(scheme="viridis", domain=[0, 1]),
        legend=altair.Legend(title="of the fastest", format=".0%"),
    )
    dark = (altair.datum.share > 0) & (altair.datum.share < 0.6)
    ink = altair.condition(dark, altair.value("white"), altair.value("#222222"))
    layers = names.mark_rect(stroke="white", strokeWidth=2, color="#e8e8e8")
    layers += (
        names.mark_rect(stroke="white", strokeWidth=2)
        .encode(color=share)
        .transform_filter(altair.datum.share > 0)
    )
    layers += names.mark_text(fontSize=11).encode(text="says:N", color=ink)
    heading = altair.TitleParams(title, anchor="start")
    size = {"width": 150 * count(cells, "step"), "height": 26 * count(cells, "kernel")}
    return layers.properties(title=heading, **size)


def count(cells: list[dict[str, Any]], name: str) -> int:
    return len({cell[name] for cell in cells})
