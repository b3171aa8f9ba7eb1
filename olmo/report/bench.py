"""A matrix of speeds as files for people and programs: Markdown, CSV, parquet, a heat map."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from olmo.bench.table import row


def bench(matrix: Path, out: Path) -> None:
    """Time the cells of a matrix that have no record yet, each in a process of its own.

    OUT gets records/, table.md, table.csv, table.parquet and heat.svg.
    """
    from olmo.bench.__main__ import bench as time_all

    records = time_all(matrix, out)
    write_parquet(records, out / "table.parquet")
    draw(records, out / "heat.svg")


def write_parquet(records: list[dict[str, Any]], path: Path) -> None:
    import polars

    rows = [row(record) for record in records]
    polars.DataFrame(rows, infer_schema_length=None).write_parquet(path)


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Tokens per second by colour and number; what cannot be had says so."""
    import altair

    cells = []
    for record in records:
        cell = record["cell"]
        speed = record.get("tokens_per_second")
        fp8 = "" if cell["fp8"] == "none" else f", fp8 {cell['fp8']}"
        cells.append(
            {
                "shape": cell["shape"],
                "kernel": f"{cell['attention']}, {cell['precision']}{fp8}",
                "step": f"{cell['compile']}, microbatch {cell['microbatch']}",
                "speed": speed,
                "says": f"{speed:,.0f}" if speed else record["status"],
            }
        )
    names = altair.Chart().encode(
        x=altair.X("step:N", sort=None, title=None, axis=altair.Axis(labelAngle=-40)),
        y=altair.Y("kernel:N", sort=None, title=None, axis=altair.Axis(labelLimit=300)),
    )
    colour = altair.Color("speed:Q", scale=altair.Scale(scheme="viridis"), title="tokens/s")
    speed, middle = altair.datum.speed, max((c["speed"] or 0.0 for c in cells), default=0.0) / 2
    ink = altair.condition(
        (speed > 0) & (speed < middle), altair.value("white"), altair.value("black")
    )
    rectangles = names.mark_rect().encode(color=colour)
    texts = names.mark_text(fontSize=10).encode(text="says:N", color=ink)
    size = {"width": 80 * count(cells, "step"), "height": 24 * count(cells, "kernel")}
    layers = altair.layer(rectangles, texts, data=altair.Data(values=cells)).properties(**size)
    chart = layers.facet(column=altair.Column("shape:N", title="tokens per second"))
    chart.resolve_scale(x="independent").save(path, format="svg")


def count(cells: list[dict[str, Any]], name: str) -> int:
    return len({cell[name] for cell in cells})
