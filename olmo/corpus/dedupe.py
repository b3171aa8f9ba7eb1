"""Duplicates and overlaps: told for a whole data set, taken out batch by batch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from olmo.config import BaseConfig
from olmo.corpus.attributes import attributes as attributes_stage
from olmo.corpus.dolma import started
from olmo.corpus.listing import Entry, read, run, write
from olmo.corpus.mixed import mixed as mixed_stage


@dataclass
class DedupeSection(BaseConfig):
    """Training documents, and lines of them, that are there already go; the first one stays."""

    exact: bool = False  # documents with the text of an earlier one, or of one held out
    paragraphs: bool = False  # lines, also short ones, that an earlier document has
    false_positives: float = 1e-6  # the share of what is new that may go as well

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.exact or self.paragraphs):
            raise ValueError("dedupe: expected exact or paragraphs to be true, found neither")
        if not 0 < self.false_positives < 1:
            raise ValueError(
                f"dedupe.false_positives: expected from 0 to 1, found {self.false_positives}"
            )


@dataclass
class DecontaminateSection(BaseConfig):
    """Training documents that share n-grams with evaluation sets go."""

    against: list[str] = field(default_factory=list)  # local gz files of documents; globs
    heldout: bool = True  # the data set's own held-out documents are one of them
    ngram: int = 13  # words
    overlap: float = 0.0  # the least share of a line's n-grams; 0: a single one is enough

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.against or self.heldout):
            raise ValueError("decontaminate: expected against or heldout: true, found neither")
        if self.ngram < 1 or not 0 <= self.overlap <= 1:
            raise ValueError(
                "decontaminate: expected ngram of at least 1 and overlap from 0 to 1, found "
                f"{self.ngram} and {self.overlap}"
            )


MIXED = {"mixed": "mixed/{}.json.gz", "mixed_table": "mixed/{}.parquet"}


def attributes(
    documents: list[Path],
    listing: Path,
    requirements: Path,
    environment: Path | None = None,
    against: tuple[Path, ...] = (),
    dedupe: DedupeSection | None = None,
    decontaminate: DecontaminateSection | None = None,
) -> None:
    """Tell which documents of a data set are duplicates or overlap with files of `against`.

    Otherwise as `olmo tokens`.
    """
    exact = dedupe is not None and dedupe.exact
    shards = read(documents, "documents")
    held = [entry.object for entry in read(documents, "heldout")]
    if twice := [name for name, times in Counter(e.shard for e in shards).items() if times > 1]:
        raise ValueError(
            f"{twice[0]} is a source twice over, and all of the second would be a duplicate: take "
            "it out of the sources, or dedupe out of the recipe"
        )
    given: dict[str, Any] = {"heldout": held if exact else [], "against": list(against)}
    if dedupe is not None:
        given |= {"exact": dedupe.exact, "paragraphs": dedupe.paragraphs}
        given |= {"false_positives": dedupe.false_positives}
    if decontaminate is not None:
        given |= {"ngram": decontaminate.ngram, "overlap": decontaminate.overlap}
        given["against"] += held if decontaminate.heldout else []
    with started(requirements, environment) as dolma:
        record = attributes_stage(
            documents=[entry.object for entry in shards],
            tables=[entry.object for entry in read(documents, "table")],
            attributes=listing.parent / "dedupe",
            toolkit=dolma.toolkit,
            dolma=dolma,
            **given,
        )
    entries = []
    for number, shard in enumerate(shards):
        file = f"{number:05d}.gz"
        made = record["outputs"]["attributes"]["files"][file]
        path = f"{listing.parent.name}/dedupe/{file}"
        entries.append(Entry(shard.shard, "attributes", path, made["sha256"], made["size"]))
    write(listing, entries)


def mixed(
    documents: Path,
    attributes: Path,
    listing: Path,
    requirements: Path,
    environment: Path | None = None,
) -> None:
    """Take out of a batch's documents what the attributes tell; its held-out ones stay as they are.

    The listing has what that of `olmo documents` has. Otherwise as `olmo tokens`.
    """
    known = {entry.shard: entry.object for entry in read([attributes], "attributes")}
    tables = {entry.shard: entry.object for entry in read([documents], "table")}
    entries = []
    with started(requirements, environment) as dolma:
        for entry in read([documents], "documents"):
            made = run(
                listing,
                entry.shard,
                mixed_stage,
                {name: path.format(entry.shard) for name, path in MIXED.items()},
                documents=entry.object,
                table=tables[entry.shard],
                attributes=known[entry.shard],
                toolkit=dolma.toolkit,
                dolma=dolma,
            )
            output = {"mixed": "documents", "mixed_table": "table"}
            entries += [replace(file, output=output[file.output]) for file in made]
    write(listing, [*entries, *read([documents], "heldout")])
