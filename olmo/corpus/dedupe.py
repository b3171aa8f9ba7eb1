"""What a recipe drops as a duplicate or an overlap, and how marks on documents name it.

Each file of documents is digested on its own (`digests`), the digests of all files are compared by
ranges of hashes (`duplicates`), and the result goes back to each file as marks (`marks`), which
`mixed` applies. Overlaps with evaluation sets are found by `dolma dedupe`, with a filter that is
built once (`overlaps`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from olmo.config import BaseConfig
from olmo.config.strict import UNHASHED, check_range
from olmo.corpus.documents import TRAIN
from olmo.io import gz

if TYPE_CHECKING:
    import polars

# Attribute names, as the toolkit's taggers have them.
OVERLAP, DUPLICATE, NEAR = "dedupe__overlap", "dedupe__duplicate", "dedupe__near"
QUALITY = "quality__dropped"  # its value is the number of the condition that does not hold
PARAGRAPH = "dedupe__paragraph"
# What a mark means; PARAGRAPH is for lines, the others for whole documents, the first one counts.
REASONS = {QUALITY: "quality", OVERLAP: "overlap", DUPLICATE: "duplicate"}
REASONS[NEAR] = "near-duplicate"
WHOLE = tuple(REASONS)
REASONS[PARAGRAPH] = "duplicate-paragraph"
Spans = list[list[float]]  # start, end (characters), share
MAX_PARTS = 4096


@dataclass
class NearSection(BaseConfig):
    """Drops documents that share most n-grams of words with an earlier one, by MinHash.

    Two documents with the share s of their n-grams in common (Jaccard) are found with a chance of
    1 - (1 - s^rows)^bands; half of those with s = (1 / bands)^(1 / rows), 0.72 by default. The
    first of all that are connected in this way stays.
    """

    ngram: int = 5  # words, of letters and digits, in lower case
    bands: int = 14  # more find more
    rows: int = 8  # hashes of a band; more find fewer

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, most in (("ngram", 100), ("bands", 255), ("rows", 255)):
            check_range(f"dedupe.near.{name}", getattr(self, name), 1, most)


@dataclass
class DedupeSection(BaseConfig):
    """Drops training documents, and lines of them, that occur earlier; the first one stays."""

    exact: bool = False  # documents with the text of an earlier one, or of a held-out one
    paragraphs: bool = False  # lines of any length that an earlier document has
    near: NearSection | None = None
    # Jobs that compare the digests, each those of a range of hashes. The result is the same.
    parts: int = field(default=1, metadata=UNHASHED)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.exact or self.paragraphs or self.near):
            raise ValueError(
                "dedupe: expected exact or paragraphs to be true, or near, found none of them"
            )
        if self.near and self.paragraphs:
            raise ValueError(
                "dedupe: expected near or paragraphs, found both; lines of near duplicates would "
                "count as seen and be lost; remove one of the two"
            )
        check_range("dedupe.parts", self.parts, 1, MAX_PARTS)


@dataclass
class DecontaminateSection(BaseConfig):
    """Drops training documents that share n-grams with evaluation sets."""

    against: list[str] = field(default_factory=list)  # local gz files of documents; globs
    heldout: bool = True  # also against the data set's own held-out documents
    ngram: int = 13  # words
    overlap: float = 0.0  # the smallest share of a line's n-grams that counts; 0: one n-gram

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.against or self.heldout):
            raise ValueError("decontaminate: expected against or heldout: true, found neither")
        if self.ngram < 1 or not 0 <= self.overlap <= 1:
            raise ValueError(
                "decontaminate: expected ngram of at least 1 and overlap from 0 to 1, found "
                f"{self.ngram} and {self.overlap}"
            )


def read_train_rows(table: Path) -> polars.DataFrame:
    """A documents' table, its training documents only, in the order of their file."""
    import polars

    return polars.read_parquet(table).filter(polars.col("split") == TRAIN).sort("row")


def write_marks(path: Path, ids: list[str], found: list[dict[str, Spans]]) -> None:
    """Write the marks of a file's documents, a JSON line each: {"id", "attributes"}."""
    with gz.writing(path) as output:
        for identity, spans in zip(ids, found, strict=True):
            output.write(json.dumps({"id": identity, "attributes": spans}).encode() + b"\n")


def read_marks(path: Path) -> Iterator[dict[str, Spans]]:
    """The marks of a file's documents, in order."""
    with gz.reading(path) as lines:
        for line in lines:
            yield json.loads(line)["attributes"]
