"""Mixed: documents without what their attributes say is there already, by `dolma mix`.

The toolkit writes every document anew, with its keys sorted. So its word is taken for which
documents stay and for the text of those that were shortened; one that stays as it was is written
byte for byte.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from olmo.corpus.attributes import DUPLICATE, OVERLAP, PARAGRAPH, REASONS, Spans, read
from olmo.corpus.documents import DROPPED, TRAIN, parse, size_in_utf8
from olmo.corpus.dolma import Dolma, scratch_beside, time_limit
from olmo.corpus.tokens import PARQUET
from olmo.io import gz
from olmo.runtime.log import log
from olmo.store.stage import Facts, Free, Input, Output, stage

if TYPE_CHECKING:
    import polars

REMOVED = ("removed_paragraphs", "removed_bytes")
# What becomes of a document: its new row, or why it goes; bytes; spans and bytes removed.
Change = tuple[int | None, str | None, int, int, int]


@stage(version=1, conditions=gz.conditions)
def mixed(
    documents: Input,
    table: Input,
    attributes: Input,
    mixed: Output,
    mixed_table: Output,
    toolkit: str,
    dolma: Free[Dolma],
) -> Facts:
    """Take out of one file of training documents what `attributes` (of that stage) tells.

    `mixed_table` is `table` with these documents dropped, for the reasons overlap, duplicate and
    duplicate-paragraph (no line is left), and two more columns: removed_paragraphs (how many
    spans of lines) and removed_bytes of each document.

    Raises ValueError where what the toolkit gives is not what the attributes say.
    """
    import polars

    before = polars.read_parquet(table)
    train = before.filter(polars.col("split") == TRAIN).sort("row")
    told = list(read(attributes))
    if len(told) != train.height:
        raise ValueError(
            f"expected attributes of {train.height:,} documents, found {len(told):,}: make the "
            "attributes of these documents"
        )
    if not any(told):
        shutil.copyfile(documents, mixed)
        sizes = train["bytes"].to_list()
        changes: list[Change] = [(row, None, size, 0, 0) for row, size in enumerate(sizes, 1)]
    else:
        with scratch_beside(mixed) as folder:
            for name, path in {"documents": documents, "attributes/dedupe": attributes}.items():
                (folder / "in" / name).mkdir(parents=True)
                os.symlink(os.path.realpath(path), folder / "in" / name / "documents.gz")
            said = dolma.ask(
                "mix",
                time_limit(int(train["bytes"].sum())),
                folder=str(folder),
                documents=["in/documents/documents.gz"],
                attributes=["dedupe"],
                exclude=[OVERLAP, DUPLICATE],
                cut=[PARAGRAPH],
            )
            made = folder / "mixed" / "documents" / "documents.gz"
            if not made.exists():
                log.info(said)
                raise ValueError("the toolkit mixed no documents; what it said stands above")
            places = [f"{file}:{line}" for file, line in train.select("file", "line").iter_rows()]
            changes = checked(documents, made, mixed, told, places)
    after = with_changes(before, changes)
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


def checked(
    documents: Path, made: Path, mixed: Path, told: list[dict[str, Spans]], places: list[str]
) -> list[Change]:
    """Write what stays, and tell what becomes of each document, which came from file:line.

    Raises ValueError unless `made` has every document that stays, in order, each with its own
    text or, of what the attributes cut, with what is left of it.
    """
    changes: list[Change] = []
    stay = 0
    with gz.reading(documents) as lines, gz.reading(made) as others, gz.writing(mixed) as output:
        for number, (line, spans) in enumerate(zip(lines, told, strict=True), 1):
            identity, text, _ = parse(line)
            assert text is not None
            size = size_in_utf8(text)
            if reason := next((REASONS[k] for k in (OVERLAP, DUPLICATE) if k in spans), None):
                changes.append((None, reason, size, 0, 0))
                continue
            cuts = spans.get(PARAGRAPH, [])
            gone = sum(min(int(end), len(text)) - int(start) for start, end, _ in cuts)
            other = next(others, b"")
            found, left, _ = parse(other)
            wanted = len(text) - gone
            right = left is not None and (len(left) == wanted if cuts else left == text)
            if found != identity or not right:
                raise ValueError(
                    f"{places[number - 1]} ({identity}): expected {wanted:,} characters of its "
                    f"text from the toolkit, found {other[:200]!r}"
                )
            assert left is not None
            less = size - size_in_utf8(left)
            if not left or left.isspace():
                changes.append((None, REASONS[PARAGRAPH], size, len(cuts), size))
                continue
            stay += 1
            output.write(other if cuts else line)
            changes.append((stay, None, size - less, len(cuts), less))
        if more := next(others, b""):
            raise ValueError(f"expected {stay:,} documents from the toolkit, then {more[:200]!r}")
    return changes


def with_changes(before: polars.DataFrame, changes: list[Change]) -> polars.DataFrame:
    """A documents' table after what `checked` tells of its training documents, in their order."""
    import polars

    number = polars.UInt64
    rows = [(row, *change) for row, change in enumerate(changes, 1)]
    schema = {"row": number, "new": number, "why": polars.String, "left": number}
    schema |= {name: number for name in REMOVED}
    changed = polars.DataFrame(rows, schema, orient="row").with_columns(split=polars.lit(TRAIN))
    joined = before.join(changed, on=["split", "row"], how="left", maintain_order="left")
    goes, train = polars.col("why").is_not_null(), polars.col("split") == TRAIN
    return joined.with_columns(
        split=polars.when(goes).then(polars.lit(DROPPED)).otherwise("split"),
        row=polars.when(train).then("new").otherwise("row"),
        bytes=polars.when(train).then("left").otherwise("bytes"),
        reason=polars.when(goes).then("why").otherwise("reason"),
    ).select(*before.columns, *(polars.col(name).fill_null(0) for name in REMOVED))
