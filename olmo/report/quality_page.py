"""The page of a data set's quality: a histogram of each tag, and documents next to a limit."""

from __future__ import annotations

import math
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olmo.corpus.documents import parse_document
from olmo.corpus.listing import Entry, read_listing
from olmo.corpus.quality import COMPARISONS, Condition, Measure, QualitySection, list_measures
from olmo.io import gz, sealed
from olmo.report.html import hide_paths, render
from olmo.runtime.log import format_bytes

if TYPE_CHECKING:
    import polars

BINS = 40
EXCERPT = 400  # characters
SKEW = 20.0  # the largest value in means, from which the axis is logarithmic
KEPT, DROPPED = "kept", "dropped"


def quality(
    documents: list[Path], tags: list[Path], page: Path, config: QualitySection, examples: int = 3
) -> None:
    """Write a page about the quality of a data set: histograms of tags, and what is dropped.

    Args:
        tags: the listings of `olmo tags`, in the order of the documents
        page: file to write
        examples: documents on either side of a condition
    """
    import polars

    files = read_listing(documents, "documents")
    found = read_listing(tags, "values")
    if not found or [entry.shard for entry in found] != [entry.shard for entry in files]:
        raise ValueError(
            f"{page}: expected tags of the {len(files):,} files of documents, found those of "
            f"{len(found):,}; run the same command again"
        )
    values = polars.concat(
        polars.scan_parquet(entry.object).with_row_index("row").with_columns(file=polars.lit(n))
        for n, entry in enumerate(found)
    )
    dropped = dict(values.group_by("dropped").len().collect().rows())
    total = sum(dropped.values())
    rows = [
        {
            "condition": str(condition),
            "dropped": dropped.get(n, 0),
            "fails": values.filter(~holds(condition)).select(polars.len()).collect().item(),
            "examples": find_examples(values, condition, files, examples),
        }
        for n, condition in enumerate(config.conditions)
    ]
    charts = draw_tags(values, config)
    context = {
        "name": hide_paths(page.parent.name),
        "total": total,
        "kept": dropped.get(None, 0),
        "conditions": rows,
        "charts": [{k: chart[k] for k in ("title", "description")} for chart in charts],
    }
    text = render("quality.html", context, {"charts": charts})
    sealed.write_atomic(page, text)
    print(f"{page}: {format_bytes(len(text.encode()))}")


def holds(condition: Condition) -> polars.Expr:
    """Whether a condition holds, of each document; one without a value stays."""
    import polars

    value: Any = polars.col(str(condition.measure))
    kept: polars.Expr = COMPARISONS[condition.comparison](value, float(condition.limit))  # type: ignore[assignment]
    return kept.fill_null(True)


def find_examples(
    values: polars.LazyFrame, condition: Condition, files: list[Entry], count: int
) -> dict[str, list[dict[str, Any]]]:
    """The documents nearest to a condition's limit, of those that it drops and of those it keeps.

    Each has its value, id, file and the beginning of its text.
    """
    import polars

    name, made = str(condition.measure), {}
    for side, chosen in ((DROPPED, ~holds(condition)), (KEPT, holds(condition))):
        nearest = (
            values.filter(chosen, polars.col(name).is_not_null())
            .select(
                "file", "row", value=name, far=(polars.col(name) - float(condition.limit)).abs()
            )
            .sort("far", "file", "row")
            .head(count)
            .collect()
        )
        made[side] = [
            {"value": value, "file": hide_paths(files[file].shard)}
            | read_document(files[file].object, row)
            for file, row, value, _ in nearest.iter_rows()
        ]
    return made


def read_document(path: Path, row: int) -> dict[str, str]:
    """The id and the beginning of a document of a file, for anyone to see."""
    with gz.reading(path) as lines:
        identity, text, _ = parse_document(next(islice(lines, row, None)))
    text = text or ""
    return {
        "id": hide_paths(identity),
        "text": hide_paths(text[:EXCERPT]) + "…" * (len(text) > EXCERPT),
    }


def draw_tags(values: polars.LazyFrame, config: QualitySection) -> list[dict[str, Any]]:
    """A chart for each tag that has values, those with conditions first."""
    import polars

    limits: dict[Measure, list[Condition]] = {}
    for condition in config.conditions:
        limits.setdefault(condition.measure, []).append(condition)
    measures = list(dict.fromkeys([*limits, *list_measures(config.taggers)]))
    names = [str(measure) for measure in measures]
    numbers = {
        kind: values.select(getattr(polars.col(name), kind)() for name in names).collect().row(0)
        for kind in ("min", "max", "mean", "count")
    }
    charts = []
    for n, (measure, name) in enumerate(zip(measures, names, strict=True)):
        low, high, mean, count = (column[n] for column in numbers.values())
        if not count:
            continue
        is_log = low >= 0 and high > SKEW * mean
        points = count_bins(values, name, low, high, is_log)
        conditions = limits.get(measure, [])
        marks = [float(c.limit) for c in conditions]
        description = f"{count:,} documents have it: from {low:.5g} to {high:.5g}, mean {mean:.5g}"
        if conditions:
            description += "; kept where " + " and ".join(
                f"{c.comparison} {c.limit}" for c in conditions
            )
        spec = histogram_spec(name, [one for one in marks if low <= one <= high], is_log)
        charts.append({"title": name, "description": description, "points": points, "spec": spec})
    return charts


def count_bins(
    values: polars.LazyFrame, name: str, low: float, high: float, is_log: bool
) -> list[dict[str, Any]]:
    """How many documents, kept and dropped, are in each of BINS bins: {start, end, documents, …}.

    The bins are equally wide, or with `is_log` in log(1 + value).
    """
    import polars

    scale = math.log1p if is_log else float
    back = math.expm1 if is_log else float
    first, width = scale(low), (scale(high) - scale(low)) / BINS or 1.0
    value = polars.col(name)
    place = ((value.log1p() if is_log else value) - first) / width
    counted = values.filter(value.is_not_null()).group_by(
        place.floor().clip(0, BINS - 1).cast(polars.Int32).alias("bin"),
        polars.col("dropped").is_not_null().alias("is_dropped"),
    )
    rows = counted.len().sort("bin", "is_dropped").collect().iter_rows()
    return [
        {
            "start": back(first + number * width),
            "end": back(first + (number + 1) * width),
            "documents": documents,
            "what": DROPPED if is_dropped else KEPT,
        }
        for number, is_dropped, documents in rows
    ]


def histogram_spec(title: str, limits: list[float], is_log: bool) -> dict[str, Any]:
    """Stacked bars of the data set "points", and a line at each limit."""
    import altair as alt

    scale = alt.Scale(type="symlog") if is_log else alt.Scale(zero=False, nice=False)
    bars = (
        alt.Chart(alt.NamedData("points"))
        .mark_bar()
        .encode(
            x=alt.X("start:Q", title=title.split("__")[-1].rstrip(")"), bin="binned", scale=scale),
            x2="end:Q",
            y=alt.Y("documents:Q", title="documents"),
            color=alt.Color(
                "what:N",
                title=None,
                scale=alt.Scale(domain=[KEPT, DROPPED]),
                legend=alt.Legend(orient="top", symbolType="square"),
            ),
            tooltip=["what:N", "documents:Q", "start:Q", "end:Q"],
        )
    )
    lines = (
        alt.Chart(alt.InlineData([{"limit": limit} for limit in limits]))
        .mark_rule(strokeDash=[4, 4], strokeWidth=2, color="#d73a49")
        .encode(x="limit:Q")
    )
    chart = alt.layer(bars, lines) if limits else alt.layer(bars)
    return chart.properties(width="container", height=200).to_dict(context={"pre_transform": False})
