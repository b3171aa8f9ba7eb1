"""Statistics of a data set: documents, bytes, tokens, lengths and drops, per source and in all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from olmo.corpus.documents import DROPPED, HELDOUT, PARQUET, TRAIN
from olmo.corpus.listing import read_objects
from olmo.runtime.log import log
from olmo.store.stage import Facts, Inputs, Output, stage

if TYPE_CHECKING:
    import polars

ALL = "in all"
CUT = "cut"  # documents that stay, but without some of their lines
COLUMNS = (
    "file",
    "split",
    "reason",
    "documents",
    "bytes",
    "tokens",
    "bytes_per_token",
    "shortest",
    "median",
    "p99",
    "longest",
)


def batch(documents: list[Path], tokens: list[Path], summary: Path, text: Path) -> None:
    """Write the statistics of a data set, as a parquet table and as text, which is logged.

    Args:
        summary: parquet table to write
        text: text file to write
    """
    statistics(
        tables=read_objects(documents, "table"),
        tokens=read_objects(tokens, "index"),
        heldout=read_objects(tokens, "heldout-index"),
        summary=summary,
        text=text,
    )
    log.info(text.read_text(encoding="utf-8").rstrip())


@stage(version=1)
def statistics(
    tables: Inputs, tokens: Inputs, heldout: Inputs, summary: Output, text: Output
) -> Facts:
    """Count the rows of the documents' tables and of the token shards' tables.

    `summary` (parquet) has a row per file and split, and per file and reason of drops: documents,
    bytes (of text), tokens, bytes_per_token, and the shortest, median, 99th percentile and longest
    document in tokens; then the same for all files together, under the file "in all". The split
    "cut" has how many documents lost duplicate lines, and how many bytes. `text` is the same table,
    aligned.

    Raises ValueError where the documents' tables and the token shards have other documents.
    """
    import polars

    shards = [
        polars.scan_parquet(path).with_columns(split=polars.lit(split))
        for split, paths in ((TRAIN, tokens), (HELDOUT, heldout))
        for path in paths
    ]
    # The stage `instructions` may drop conversations; `tokens` drops no document.
    indexed = polars.concat([add_reason(shard) for shard in shards])
    left_out = indexed.filter(polars.col("reason").is_not_null())
    lengths = indexed.filter(polars.col("reason").is_null()).drop("reason")
    rows = polars.concat([polars.scan_parquet(path) for path in tables])
    lost = left_out.select("file", split=polars.lit(DROPPED), reason="reason")
    dropped = polars.concat([rows.select("file", "split", "reason"), lost])
    has_cuts = "removed_bytes" in rows.collect_schema().names()
    parts = []
    for change in ({}, {"file": polars.lit(ALL)}):
        parts += [count_kept(lengths.with_columns(**change))]
        parts += [count_drops(dropped.with_columns(**change))]
        parts += [count_cut(rows.with_columns(**change))] if has_cuts else []
    found = polars.concat(parts, how="diagonal").sort(
        polars.col("file") == ALL, "file", "split", "reason", descending=[False, False, True, False]
    )
    frame = found.select(COLUMNS).collect()

    expected = rows.filter(polars.col("split") != DROPPED).select(polars.len()).collect().item()
    expected -= left_out.select(polars.len()).collect().item()
    counted = frame.filter(polars.col("file") == ALL, polars.col("split").is_in([TRAIN, HELDOUT]))
    if counted["documents"].sum() != expected:
        raise ValueError(
            f"expected {expected:,} documents in the token shards, as the documents' tables have, "
            f"found {counted['documents'].sum():,}: make statistics of all shards of one data set"
        )
    frame.write_parquet(summary, **PARQUET)
    text.write_text(format_columns(frame), encoding="utf-8")
    return {"files": len(tables)} | {
        split: frame.filter(file=ALL, split=split)
        .select("documents", "bytes", "tokens")
        .row(0, named=True)
        for split in counted["split"]
    }


def add_reason(shard: polars.LazyFrame) -> polars.LazyFrame:
    """The file, split, bytes, tokens and reason of a shard's table; null without that column."""
    import polars

    has_reason = "reason" in shard.collect_schema().names()
    reason = polars.col("reason") if has_reason else polars.lit(None, polars.String)
    tokens = polars.col("end") - polars.col("start")
    return shard.select("file", "split", "bytes", tokens=tokens, reason=reason)


def count_kept(lengths: polars.LazyFrame) -> polars.LazyFrame:
    import polars

    tokens = polars.col("tokens")
    return lengths.group_by("file", "split").agg(
        documents=polars.len().cast(polars.UInt64),
        bytes=polars.col("bytes").sum(),
        tokens=tokens.sum(),
        bytes_per_token=polars.col("bytes").sum() / tokens.sum(),
        shortest=tokens.min(),
        median=tokens.quantile(0.5, "lower").cast(polars.UInt64),
        p99=tokens.quantile(0.99, "lower").cast(polars.UInt64),
        longest=tokens.max(),
        reason=polars.lit(None, polars.String),
    )


def count_drops(rows: polars.LazyFrame) -> polars.LazyFrame:
    import polars

    return (
        rows.filter(polars.col("split") == DROPPED)
        .group_by("file", "split", "reason")
        .agg(documents=polars.len().cast(polars.UInt64))
    )


def count_cut(rows: polars.LazyFrame) -> polars.LazyFrame:
    import polars

    from olmo.corpus.dedupe import PARAGRAPH, REASONS

    return (
        rows.filter(polars.col("split") == TRAIN, polars.col("removed_paragraphs") > 0)
        .group_by("file")
        .agg(
            documents=polars.len().cast(polars.UInt64),
            bytes=polars.col("removed_bytes").sum(),
            split=polars.lit(CUT),
            reason=polars.lit(REASONS[PARAGRAPH]),
        )
    )


def format_columns(frame: polars.DataFrame) -> str:
    """A table with aligned columns and thousands separators; null is blank."""

    def cell(value: object) -> str:
        if value is None:
            return ""
        if isinstance(value, float):
            return f"{value:.2f}"
        return f"{value:,}" if isinstance(value, int) else str(value)

    table = [[name.replace("_", " ") for name in frame.columns]]
    table += [[cell(value) for value in row] for row in frame.rows()]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    numbers = [dtype.is_numeric() for dtype in frame.dtypes]
    lines = [
        "  ".join(
            word.rjust(width) if number else word.ljust(width)
            for word, width, number in zip(row, widths, numbers, strict=True)
        ).rstrip()
        for row in table
    ]
    return "\n".join(lines) + "\n"
