"""Duplicates and overlaps: told for a whole data set, taken out batch by batch."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

from olmo.corpus.attributes import attributes as attributes_stage
from olmo.corpus.dolma import Dolma, toolkit
from olmo.corpus.environments import interpreter
from olmo.corpus.mixed import mixed as mixed_stage
from olmo.corpus.shards import Entry, read, run, write

MIXED = {"mixed": "mixed/{}.json.gz", "mixed_table": "mixed/{}.parquet"}


def attributes(
    documents: list[Path],
    listing: Path,
    requirements: Path,
    environment: Path | None = None,
    against: tuple[Path, ...] = (),
    heldout: bool = False,
    exact: bool = False,
    paragraphs: bool = False,
    ngram: int = 0,
    overlap: float = 0.0,
    false_positives: float = 1e-6,
) -> None:
    """Tell which documents of a data set are duplicates or overlap with files of `against`.

    With `heldout`, with the data set's own held-out documents too. Otherwise as `olmo tokens`.
    """
    shards = read(documents, "documents")
    held = [entry.object for entry in read(documents, "heldout")]
    if twice := [name for name, times in Counter(e.shard for e in shards).items() if times > 1]:
        raise ValueError(
            f"{twice[0]} is a source twice over, and all of the second would be a duplicate: take "
            "it out of the sources, or dedupe out of the recipe"
        )
    with started(requirements, environment) as dolma:
        record = attributes_stage(
            documents=[entry.object for entry in shards],
            tables=[entry.object for entry in read(documents, "table")],
            heldout=held if exact else [],
            against=[*against, *(held if heldout else [])],
            attributes=listing.parent / "dedupe",
            toolkit=dolma.toolkit,
            dolma=dolma,
            exact=exact,
            paragraphs=paragraphs,
            ngram=ngram,
            overlap=overlap,
            false_positives=false_positives,
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


def started(requirements: Path, environment: Path | None) -> Dolma:
    """The toolkit in its environment, or of the `python` on PATH (`--sdm conda`)."""
    python = interpreter(environment) if environment else Path(shutil.which("python") or "python")
    return Dolma(python, toolkit(requirements))
