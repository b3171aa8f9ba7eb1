"""What a data set holds: documents, bytes, tokens, lengths and drops, per source and in all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from olmo.corpus.documents import DROPPED, HELDOUT, TRAIN
from olmo.corpus.listing import read
from olmo.corpus.tokens import PARQUET
from olmo.runtime.log import log
from olmo.store.stage import Facts, Inputs, Output, stage

if TYPE_CHECKING:
    import polars

ALL = "in all"
CUT = "cut"  # documents that stay, and what was taken out of them


def batch(documents: list[Path], tokens: list[Path], summary: Path, text: Path) -> None:
    """What a data set holds, as a table for programs and one for people, which is told."""
    statistics(
        tables=[entry.object for entry in read(documents, "table")],
        tokens=[entry.object for entry in read(tokens, "index")],
        heldout=[entry.object for entry in read(tokens, "heldout-index")],
        summary=summary,
        text=text,
    )
    log.info(text.read_text(encoding="utf-8").rstrip())


@stage(version=1)
def statistics(
    tables: Inputs, tokens: Inputs, heldout: Inputs, summary: Output, text: Output
) -> Facts:
    """Count what the documents' tables and the token shards' tables hold.

    `summary` (parquet) has a row per file and split, and per file and reason of drops: documents,
    bytes (of text), tokens, bytes_per_token, and the shortest, median, 99th percentile and longest
    document in tokens; then the same for the whole, under the file "in all". The split "cut" tells
    how many documents lost lines that are duplicates, and so many bytes. `text` is the table as a
    person reads it.

    Raises ValueError where documents and token shards do not tell of the same documents.
    """
    import polars

    shards = [
        polars.scan_parquet(path).with_columns(split=polars.lit(split))
        for split, paths in ((TRAIN, tokens), (HELDOUT, heldout))
        for path in paths
    ]
    # Conversations may be left out when they are tokenized; documents are not.
    indexed = polars.concat([with_reason(shard) for shard in shards])
    left_out = indexed.filter(polars.col("reason").is_not_null())
    lengths = indexed.filter(polars.col("reason").is_null()).drop("reason")
    rows = polars.concat([polars.scan_parquet(path) for path in tables])
    lost = left_out.select("file", split=polars.lit(DROPPED), reason="reason")
    whole = {"file": polars.lit(ALL)}
    kept = polars.concat([count_kept(lengths), count_kept(lengths.with_columns(**whole))])
    dropped = polars.concat([rows.select("file", "split", "reason"), lost])
    drops = polars.concat([count_drops(dropped), count_drops(dropped.with_columns(**whole))])
    parts = [kept, drops]
    if "removed_bytes" in rows.collect_schema().names():
        parts += [count_cut(rows), count_cut(rows.with_columns(**whole))]
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
    text.write_text(as_text(frame), encoding="utf-8")
    return {"files": len(tables)} | {
        split: frame.filter(file=ALL, split=split)
        .select("documents", "bytes", "tokens")
        .row(0, named=True)
        for split in counted["split"]
    }


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


def with_reason(shard: polars.LazyFrame) -> polars.LazyFrame:
    """file, split, bytes, tokens and reason of a shard's table; of documents none is dropped."""
    import polars

    here = "reason" in shard.collect_schema().names()
    reason = polars.col("reason") if here else polars.lit(None, polars.String)
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

    from olmo.corpus.attributes import PARAGRAPH, REASONS

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


def as_text(frame: polars.DataFrame) -> str:
    """A table of aligned columns; numbers with thousands separated, nothing where nothing is."""

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
