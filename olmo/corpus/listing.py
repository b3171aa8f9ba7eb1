"""Listings: which shards of a data set a batch's job made, and what each of them is.

One job runs a stage for every shard of its batch, each with a store entry of its own. It leaves a
listing, data/<dataset>/<stage>/<batch>.tsv, with a row for each shard and output: its name, its
path below data/<dataset>, its sha256 and size. The next stage reads the listing and takes the
bytes from the store by their sha256; the paths are for people and for other programs.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from olmo.io import sealed, untrusted
from olmo.io.sealed import Damaged
from olmo.runtime.log import log
from olmo.store.stage import Stage, current_store

FETCHED = "file"  # the output of a downloaded file that was then converted
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
        return current_store().object_path(self.sha256)


def read_listing(listings: Iterable[Path], output: str | None = None) -> list[Entry]:
    """The entries of one output, or of all, over several listings, in order.

    Raises:
        Damaged: a listing does not match its own checksum.
    """
    entries = []
    for listing in listings:
        try:
            header, *rows = sealed.load_table(listing.read_bytes(), listing)
        except Damaged as error:
            raise Damaged(f"{error}; run snakemake again to make it again") from None
        if tuple(header) != HEADER:
            raise ValueError(f"{listing}: expected the columns {HEADER}, found {header!r}")
        for shard, name, path, digest, size in rows:
            untrusted.check_part(shard, str(listing))
            untrusted.check_digest(digest, str(listing))
            if output in (None, name):
                entries.append(Entry(shard, name, path, digest, int(size)))
    return entries


def read_objects(listings: Iterable[Path], output: str, skip_empty: bool = False) -> list[Path]:
    """The files, in the store, of one output; of several listings, in order."""
    entries = read_listing(listings, output)
    return [entry.object for entry in entries if entry.bytes or not skip_empty]


def as_arrived(entries: Iterable[Entry]) -> dict[str, Entry]:
    """Shard → its file as it was downloaded, before a conversion."""
    ordered = sorted(entries, key=lambda entry: entry.output == FETCHED)
    return {entry.shard: entry for entry in ordered}


def write_listing(listing: Path, entries: Iterable[Entry]) -> None:
    """Write a listing atomically."""
    rows = [HEADER, *((e.shard, e.output, e.path, e.sha256, str(e.bytes)) for e in entries)]
    sealed.write_atomic(listing, sealed.dump_table(rows), alone=True)


def run_shard(
    stage: Stage, listing: Path, shard: str, outputs: Mapping[str, str], /, **arguments: Any
) -> list[Entry]:
    """Run a stage for one shard; the entries of its outputs.

    `outputs`: output → its path below data/<dataset>, in which {} is the shard's name.
    """
    dataset = listing.parent.parent
    paths = {name: path.format(shard) for name, path in outputs.items()}
    record = stage(**arguments, **{name: dataset / path for name, path in paths.items()})
    files = record["outputs"]
    return [
        Entry(shard, name, path, files[name]["sha256"], files[name]["size"])
        for name, path in paths.items()
    ]


def run_shards(
    stage: Stage,
    listing: Path,
    entries: Iterable[Entry],
    outputs: Mapping[str, str],
    inputs: Callable[[Entry], Mapping[str, Any]],
    listed_as: Mapping[str, str] | None = None,
    /,
    **arguments: Any,
) -> list[Entry]:
    """Run a stage for the shard of each entry; the entries of all outputs.

    `outputs` as for `run_shard`; `inputs` returns the arguments that depend on the shard;
    `listed_as`: output → its name in the listing, where that is another one.
    """
    names, entries, made = listed_as or {}, list(entries), []
    for number, entry in enumerate(entries):
        log.debug(f"{number} of {len(entries)} shards")
        files = run_shard(stage, listing, entry.shard, outputs, **inputs(entry), **arguments)
        made += [replace(file, output=names.get(file.output, file.output)) for file in files]
    return made
