"""`olmo bench`: time a matrix of settings, and write its results as parquet and as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from olmo.bench.matrix import COMPILE_MODES, Section
from olmo.bench.table import format_extras, ranking_speed, record_row
from olmo.runtime.log import format_bytes


def bench(
    matrix: Path,
    out: Path,
    peer: list[str] | None = None,
    kind: str | None = None,
    draw_only: bool = False,
) -> None:
    """Time the cells of a matrix that have no record yet, each in a process of its own.

    OUT gets records/, table.md, table.csv, table.parquet, best.svg and heat.svg. best.svg says what
    to use on this machine: all settings, the fastest first.

    Args:
        matrix: YAML file with the cells: config/bench/tps.yaml
        out: folder for records, tables and picture
        peer: NAME=WHERE, a Python, a wheel or a folder with ai2-olmo or transformers, to compare
            with; $OLMO_PEER_PYTHON does the same
        kind: cpu or cuda, by default what the machine has
        draw_only: write the files from existing records, of any machine

    Example:
        olmo bench --matrix config/bench/tps.yaml --out bench/here
    """
    from olmo.bench.__main__ import run_matrix

    records, section = run_matrix(matrix, out, peer or (), kind, draw_only)
    write_parquet(records, section, out / "table.parquet")
    draw_heat_map(records, out / "heat.svg")
    draw_ranking(records, out / "best.svg")


def write_parquet(records: list[dict[str, Any]], section: Section, path: Path) -> None:
    """Write one row for each cell."""
    import polars

    rows = [record_row(record, section) for record in records]
    polars.DataFrame(rows, infer_schema_length=None).write_parquet(path)


def draw_ranking(records: list[dict[str, Any]], path: Path) -> None:
    """For each shape bars of all settings, the fastest first and named in the title.

    Below them are those without a speed, by status; table.md has the reasons.
    """
    import altair

    unit = speed_unit(records)
    by_shape: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_shape.setdefault(record["cell"]["shape"], []).append(ranking_row(record))
    charts = []
    for shape, rows in by_shape.items():
        rows.sort(key=lambda row: -row["speed"])
        best = max(rows, key=lambda row: row["speed"] * row["is_ours"])
        for row in rows:
            row["rank"] = "the fastest" if row is best else "others" if row["speed"] else "no speed"
        title = altair.TitleParams(
            f"{shape}: use {best['setting']}" if best["speed"] else f"{shape}: nothing ran",
            subtitle=f"{records[0]['device']}; {unit}; {best['memory']}",
            anchor="start",
        )
        base = altair.Chart(altair.Data(values=rows)).encode(
            y=altair.Y("setting:N", sort=None, axis=altair.Axis(title=None, labelLimit=600)),
        )
        color = altair.Color(
            "rank:N",
            scale=altair.Scale(
                domain=["the fastest", "others", "no speed"],
                range=["#0b57d0", "#9db8dd", "#e8e8e8"],
            ),
            legend=None,
        )
        bars = base.mark_bar().encode(x=altair.X("speed:Q", title=unit), color=color)
        texts = base.mark_text(align="left", dx=4).encode(x="speed:Q", text="text:N")
        charts.append((bars + texts).properties(title=title, width=520, height={"step": 22}))
    figure = altair.vconcat(*charts).configure_view(stroke=None)
    figure.save(path, format="svg")


def ranking_row(record: dict[str, Any]) -> dict[str, Any]:
    """A bar: its setting in words, its speed, and the text at its end."""
    cell, speed = record["cell"], ranking_speed(record)
    used = record.get("attention_used", cell["attention"])
    owner = [] if cell["whose"] == "ours" else [f"{cell['whose']}:"]
    compiled = "eager" if cell["compile"] == "eager" else f"compile {cell['compile']}"
    words = [used, compiled, f"microbatch {cell['microbatch']}", cell["precision"]]
    peak = record.get("peak_memory_bytes")
    memory = f"{format_bytes(peak)} of memory at the peak" if peak else "memory not measured"
    text = f"{speed:,.0f}, {format_bytes(peak or 0)}" if speed else f"{record['status']}: table.md"
    setting = " ".join([*owner, ", ".join([*words, *format_extras(record)])])
    is_ours = cell["whose"] == "ours"
    return {
        "setting": setting,
        "speed": speed,
        "text": text,
        "memory": memory,
        "is_ours": is_ours,
    }


def speed_unit(records: list[dict[str, Any]]) -> str:
    return "tokens per CPU-second" if records[0]["kind"] == "cpu" else "tokens per second"


def draw_heat_map(records: list[dict[str, Any]], path: Path) -> None:
    """One heat map for each shape: tokens per second, or the reason why a cell has none.

    On a CPU per second of CPU time, which other processes of the machine do not affect.
    """
    import altair

    by_shape: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_shape.setdefault(record["cell"]["shape"], []).append(heat_map_cell(record))
    charts = []
    for shape, cells in by_shape.items():
        fastest = max(cell["speed"] for cell in cells)
        for cell in cells:
            cell["share"] = cell["speed"] / fastest if cell["speed"] else None
        charts.append(build_chart(f"{shape}: {speed_unit(records)}", cells))
    figure = altair.vconcat(*charts).configure_view(stroke=None).configure_axis(domain=False)
    figure.save(path, format="svg")


def heat_map_cell(record: dict[str, Any]) -> dict[str, Any]:
    """The data of one cell: its row, column, colour and text."""
    cell, speed = record["cell"], ranking_speed(record)
    owner = "" if cell["whose"] == "ours" else f"{cell['whose']}: "
    kernel = [cell["attention"], cell["precision"], *format_extras(record)]
    text = f"{speed:,.0f}" if speed else record["status"]
    if "ratio" in record:
        ratio = record["ratio_cpu" if record["kind"] == "cpu" else "ratio"]
        text += f" (ours × {ratio:.2f})"
    return {
        "kernel": owner + ", ".join(kernel),
        "step": f"{cell['compile']}, microbatch {cell['microbatch']}",
        "column": (COMPILE_MODES.index(cell["compile"]), cell["microbatch"]),
        "speed": speed,
        "text": text,
    }


def build_chart(title: str, cells: list[dict[str, Any]]) -> Any:
    """Rows: kernels; columns: compile mode and microbatch; colour: share of the fastest speed."""
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
    base = altair.Chart(altair.Data(values=cells)).encode(
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
    layers = base.mark_rect(stroke="white", strokeWidth=2, color="#e8e8e8")
    layers += (
        base.mark_rect(stroke="white", strokeWidth=2)
        .encode(color=share)
        .transform_filter(altair.datum.share > 0)
    )
    layers += base.mark_text(fontSize=11).encode(text="text:N", color=ink)
    why = "white: not in the matrix; grey: not possible here, with the reason in table.md"
    heading = altair.TitleParams(title, subtitle=why, anchor="start")
    width, height = 150 * len(set(columns)), 26 * len({cell["kernel"] for cell in cells})
    return layers.properties(title=heading, width=width, height=height)
