"""A data set's shards travel in batches: one job for many files, a store entry for each.

A batch's job leaves a listing, data/<dataset>/<stage>/<batch>.tsv: for each shard and output, its
name, its path below data/<dataset> and what it is. The next stage reads the listing and takes the
bytes from the store by their digests, so that a path is for people and for other programs.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olmo.io import foreign, sealed
from olmo.io.sealed import Damaged
from olmo.store.stage import Stage, here
from olmo.store.store import Record

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


def read(listings: Iterable[Path], output: str | None = None) -> list[Entry]:
    """The entries of one output, or of all, over several listings, in order.

    Raises:
        Damaged: a listing is not as it was written.
    """
    entries = []
    for listing in listings:
        try:
            header, *rows = sealed.load_table(listing.read_bytes(), listing)
        except Damaged as error:
            raise Damaged(f"{error}; run snakemake again, which makes it anew") from None
        if tuple(header) != HEADER:
            raise ValueError(f"{listing}: expected the columns {HEADER}, found {header!r}")
        for shard, name, path, digest, size in rows:
            foreign.part(shard, str(listing))
            foreign.digest(digest, str(listing))
            if output in (None, name):
                entries.append(Entry(shard, name, path, digest, int(size)))
    return entries


def write(listing: Path, entries: Iterable[Entry]) -> None:
    """Write a listing, whole or not at all."""
    rows = [HEADER, *((e.shard, e.output, e.path, e.sha256, str(e.bytes)) for e in entries)]
    sealed.write(listing, sealed.dump_table(rows), alone=True)


def run(
    listing: Path, shard: str, stage: Stage, names: dict[str, str], **kwargs: Any
) -> list[Entry]:
    """Run one shard's stage. `names`: output → its path below data/<dataset>."""
    dataset = listing.parent.parent
    record: Record = stage(**kwargs, **{name: dataset / path for name, path in names.items()})
    return [
        Entry(shard, name, path, record["outputs"][name]["sha256"], record["outputs"][name]["size"])
        for name, path in names.items()
    ]
