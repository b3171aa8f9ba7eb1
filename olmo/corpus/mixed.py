"""Removes duplicates and overlaps from documents, as their attributes say, with `dolma mix`.

The toolkit rewrites every document, with its keys sorted. So its output decides which documents
stay, and has the text of those that were shortened; unchanged documents are copied byte for byte.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from olmo.corpus.dedupe import PARAGRAPH, QUALITY, REASONS, WHOLE, Spans, read_marks
from olmo.corpus.documents import DROPPED, PARQUET, TRAIN, parse_document, size_in_utf8
from olmo.corpus.dolma import Dolma, open_dolma, scratch_folder, time_limit
from olmo.corpus.duplicates import places
from olmo.corpus.listing import (
    read_listing,
    read_objects,
    run_shard,
    run_shards,
    write_listing,
)
from olmo.corpus.marks import marks
from olmo.corpus.overlaps import check_readable, locate_row
from olmo.corpus.quality import QualitySection
from olmo.io import gz
from olmo.runtime.log import log
from olmo.store.stage import Facts, Input, Output, Unhashed, stage

if TYPE_CHECKING:
    import polars

REMOVED = ("removed_paragraphs", "removed_bytes")
# What happens to a document: its new row, or the reason of its drop; bytes left; spans and bytes
# removed.
Change = tuple[int | None, str | None, int, int, int]


def batch(
    documents: Path,
    digests: list[Path],
    duplicates: list[Path],
    clusters: list[Path],
    listing: Path,
    requirements: Path,
    environment: Path | None = None,
    tags: tuple[Path, ...] = (),
    quality: QualitySection | None = None,
) -> None:
    """Remove what is marked from a batch's documents; its held-out documents stay.

    The listing has the same outputs as that of `olmo documents`. Otherwise as `olmo tokens`.

    Args:
        digests: the listing of `olmo digests`, for duplicates and overlaps
        duplicates: the listings of `olmo duplicates`, of all parts
        clusters: the listing of `olmo clusters`, for near duplicates
        tags: the listing of `olmo tags`, for a recipe with conditions on quality
        quality: the recipe's section of this name
    """
    keep = tuple(map(str, quality.conditions)) if quality else ()
    tables = {entry.shard: entry.object for entry in read_listing([documents], "table")}
    shards, given = read_listing([documents], "documents"), read_listing([*digests, *tags])
    names = ("shards", "document_repeats", "line_repeats")
    repeats = {name: read_objects(duplicates, name) for name in names}
    near = read_objects(clusters, "near")
    marked: dict[str, Path] = {}
    for entry in shards:
        of_shard = {one.output: one.object for one in given if one.shard == entry.shard}
        found = []
        if duplicates:
            found = run_shard(
                places,
                listing,
                entry.shard,
                {"places": "mixed/{}.places"},
                near=near,
                shard=entry.shard,
                **repeats,
            )
        [made] = run_shard(
            marks,
            listing,
            entry.shard,
            {"marks": "mixed/{}.marks.gz"},
            documents=entry.object,
            table=tables[entry.shard],
            overlaps=[path for name, path in of_shard.items() if name == "overlaps"],
            copies=[path for name, path in of_shard.items() if name == "copies"],
            places=[one.object for one in found],
            quality=of_shard.get("quality"),
        )
        marked[entry.shard] = made.object
    with open_dolma(requirements, environment) as dolma:
        entries = run_shards(
            mixed,
            listing,
            shards,
            {"mixed": "mixed/{}.json.gz", "mixed_table": "mixed/{}.parquet"},
            lambda entry: {
                "documents": entry.object,
                "table": tables[entry.shard],
                "attributes": marked[entry.shard],
            },
            {"mixed": "documents", "mixed_table": "table"},
            toolkit=dolma.toolkit,
            dolma=dolma,
            keep=keep,
        )
    write_listing(listing, [*entries, *read_listing([documents], "heldout")])


@stage(version=1, conditions=gz.conditions)
def mixed(
    documents: Input,
    table: Input,
    attributes: Input,
    mixed: Output,
    mixed_table: Output,
    toolkit: str,
    dolma: Unhashed[Dolma],
    keep: tuple[str, ...] = (),
) -> Facts:
    """Remove from one file of training documents what `attributes`, of the stage `marks`, marks.

    `mixed_table` is `table` with these documents dropped, for the reasons "quality: " with one of
    the conditions `keep`, overlap, duplicate, near-duplicate and duplicate-paragraph (no line is
    left), and two more columns: removed_paragraphs (how many
    spans of lines) and removed_bytes of each document.

    Raises ValueError where the toolkit's output does not agree with the attributes.
    """
    import polars

    before = polars.read_parquet(table)
    train = before.filter(polars.col("split") == TRAIN).sort("row")
    found = list(read_marks(attributes))
    if len(found) != train.height:
        raise ValueError(
            f"expected attributes of {train.height:,} documents, found {len(found):,}: make the "
            "attributes of these documents"
        )
    if not any(found):
        shutil.copyfile(documents, mixed)
        sizes = train["bytes"].to_list()
        changes: list[Change] = [(row, None, size, 0, 0) for row, size in enumerate(sizes, 1)]
    else:
        with scratch_folder(mixed) as folder:
            for name, path in {"documents": documents, "attributes/dedupe": attributes}.items():
                (folder / "in" / name).mkdir(parents=True)
                os.symlink(os.path.realpath(path), folder / "in" / name / "documents.gz")
            try:
                changes = rewrite(dolma, folder, documents, train, mixed, found, keep)
            except ValueError:
                check_readable(documents, partial(locate_row, train))
                raise
    after = apply_changes(before, changes)
    after.write_parquet(mixed_table, **PARQUET)
    kept = after.filter(polars.col("split") == TRAIN)
    reasons = Counter(change[1] for change in changes if change[1] is not None)
    return {
        "documents": kept.height,
        "text_bytes": kept["bytes"].sum(),
        "drops": dict(sorted(reasons.items())),
        "removed_paragraphs": after["removed_paragraphs"].sum(),
        "removed_bytes": after["removed_bytes"].sum(),
    }


def rewrite(
    dolma: Dolma,
    folder: Path,
    documents: Path,
    train: polars.DataFrame,
    mixed: Path,
    marks: list[dict[str, Spans]],
    keep: tuple[str, ...],
) -> list[Change]:
    """Let the toolkit apply the marks, in a scratch folder, and take over what it wrote."""
    toolkit_output = dolma.request(
        "mix",
        time_limit(int(train["bytes"].sum())),
        folder=str(folder),
        documents=["in/documents/documents.gz"],
        attributes=["dedupe"],
        exclude=list(WHOLE),
        cut=[PARAGRAPH],
    )
    rewritten = folder / "mixed" / "documents" / "documents.gz"
    if not rewritten.exists():
        log.info(toolkit_output)
        raise ValueError(
            "expected mixed documents from the toolkit, found none; its output is above"
        )
    places = [f"{file}:{line}" for file, line in train.select("file", "line").iter_rows()]
    return write_kept(documents, rewritten, mixed, marks, places, keep)


def write_kept(
    documents: Path,
    rewritten: Path,
    mixed: Path,
    marks: list[dict[str, Spans]],
    places: list[str],
    keep: tuple[str, ...],
) -> list[Change]:
    """Write the documents that stay to `mixed`; what happened to each, in order.

    `rewritten` is the toolkit's output, `places` has file:line of each document.

    Raises ValueError unless `rewritten` has every document that stays, in order, each with its own
    text or, where the attributes cut it, with a text of the right length.
    """
    changes: list[Change] = []
    row = 0
    with (
        gz.reading(documents) as lines,
        gz.reading(rewritten) as others,
        gz.writing(mixed) as output,
    ):
        for place, line, spans in zip(places, lines, marks, strict=True):
            identity, text, _ = parse_document(line)
            assert text is not None
            size = size_in_utf8(text)
            if reason := find_reason(spans, keep):
                changes.append((None, reason, size, 0, 0))
                continue
            cuts = spans.get(PARAGRAPH, [])
            removed = sum(min(int(end), len(text)) - int(start) for start, end, _ in cuts)
            other = next(others, b"")
            found, left, _ = parse_document(other)
            expected = len(text) - removed
            is_right = left is not None and (len(left) == expected if cuts else left == text)
            if found != identity or not is_right:
                raise ValueError(
                    f"{place} ({identity}): expected {expected:,} characters of its text from the "
                    f"toolkit, found {other[:200]!r}"
                )
            assert left is not None
            removed_bytes = size - size_in_utf8(left)
            if not left or left.isspace():
                changes.append((None, REASONS[PARAGRAPH], size, len(cuts), size))
                continue
            row += 1
            output.write(other if cuts else line)
            changes.append((row, None, size - removed_bytes, len(cuts), removed_bytes))
        if more := next(others, b""):
            raise ValueError(
                f"expected {row:,} documents from the toolkit, found one more: {more[:200]!r}"
            )
    return changes


def find_reason(spans: dict[str, Spans], keep: tuple[str, ...]) -> str | None:
    """Why a document is dropped, by its marks; None if it stays."""
    if QUALITY in spans:
        return f"{REASONS[QUALITY]}: {keep[int(spans[QUALITY][0][2])]}"
    return next((REASONS[kind] for kind in WHOLE if kind in spans), None)


def apply_changes(before: polars.DataFrame, changes: list[Change]) -> polars.DataFrame:
    """A documents' table after the changes of its training documents, given in their order."""
    import polars

    number = polars.UInt64
    rows = [(row, *change) for row, change in enumerate(changes, 1)]
    schema = {"row": number, "new": number, "why": polars.String, "left": number}
    schema |= {name: number for name in REMOVED}
    changed = polars.DataFrame(rows, schema, orient="row").with_columns(split=polars.lit(TRAIN))
    joined = before.join(changed, on=["split", "row"], how="left", maintain_order="left")
    is_dropped, is_train = polars.col("why").is_not_null(), polars.col("split") == TRAIN
    return joined.with_columns(
        split=polars.when(is_dropped).then(polars.lit(DROPPED)).otherwise("split"),
        row=polars.when(is_train).then("new").otherwise("row"),
        bytes=polars.when(is_train).then("left").otherwise("bytes"),
        reason=polars.when(is_dropped).then("why").otherwise("reason"),
    ).select(*before.columns, *(polars.col(name).fill_null(0) for name in REMOVED))
