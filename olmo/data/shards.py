"""A data set's shards travel in batches: one job for many files, a store entry for each.

A batch's job leaves a listing, data/<dataset>/<stage>/<batch>.tsv: for each shard and output, its
name, its path below data/<dataset> and what it is. The next stage reads the listing and takes the
bytes from the store by their digests, so that a path is for people and for other programs.
"""

import os
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olmo.stage import Stage, here
from olmo.store import Record

HEADER = ("shard", "output", "path", "sha256", "bytes")


@dataclass(frozen=True)
class Entry:
    """One file of a listing."""

    shard: str
    output: str
    path: str
    sha256: str
    bytes: int

    @property
    def object(self) -> Path:
        """The file itself, in the store."""
        return here().object_path(self.sha256)


def read(listings: Iterable[Path], output: str) -> list[Entry]:
    """The entries of one output, over several listings, in order."""
    entries = []
    for listing in listings:
        header, *rows = listing.read_text().splitlines()
        if tuple(header.split("\t")) != HEADER:
            raise ValueError(f"{listing}: expected the columns {HEADER}, found {header!r}")
        for row in rows:
            shard, name, path, digest, size = row.split("\t")
            if name == output:
                entries.append(Entry(shard, name, path, digest, int(size)))
    return entries


def write(listing: Path, entries: Iterable[Entry]) -> None:
    """Write a listing, whole or not at all."""
    rows = [HEADER, *((e.shard, e.output, e.path, e.sha256, str(e.bytes)) for e in entries)]
    listing.parent.mkdir(parents=True, exist_ok=True)
    draft = listing.with_suffix(f".{uuid.uuid4().hex[:8]}")
    draft.write_text("".join("\t".join(row) + "\n" for row in rows))
    os.replace(draft, listing)


def run(listing: Path, shard: str, stage: Stage, names: dict[str, str], **kwargs: Any) -> list[Entry]:
    """Run one shard's stage. `names`: output → its path below data/<dataset>."""
    dataset = listing.parent.parent
    record: Record = stage(**kwargs, **{name: dataset / path for name, path in names.items()})
    return [
        Entry(shard, name, path, record["outputs"][name]["sha256"], record["outputs"][name]["size"])
        for name, path in names.items()
    ]
