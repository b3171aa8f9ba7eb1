"""Batches of sources and of token files that arrive: several at once, each checked, none lost."""

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from olmo.corpus import source_table
from olmo.corpus.conversations import download_conversations, local_conversations
from olmo.corpus.listing import Entry, read, run, write
from olmo.corpus.questions import stdlib_questions
from olmo.corpus.sources import download, download_tokens, local_source, local_tokens
from olmo.corpus.stdlib import library_digest, stdlib
from olmo.io import foreign
from olmo.io.downloads import Progress, unseen
from olmo.io.progress import Count, DownloadProgress
from olmo.runtime.log import log
from olmo.store.lease import lease
from olmo.store.stage import here
from olmo.store.store import Record


@dataclass(frozen=True)
class Asked:
    """A file that a batch asks for: its name, its place and the places to try if that fails."""

    name: str
    place: str
    mirrors: tuple[str, ...] = ()
    bytes: int | None = None
    sha256: str | None = None

    @property
    def remote(self) -> bool:
        return "://" in self.place


def asked(words: list[str], table: Path | None = None) -> list[Asked]:
    """Files given as name=place or name=place#mirror#mirror, and what a table knows of them."""
    known = {source.place: source for source in source_table.read(table)} if table else {}
    found = []
    for word in words:
        name, _, places = word.partition("=")
        place, *mirrors = map(source_table.unquoted, places.split("#"))
        foreign.part(name, "--sources")
        row = known.get(place)
        size, digest = (row.bytes, row.sha256) if row else (None, None)
        found.append(Asked(name, place, tuple(mirrors), size, digest))
    return found


def arrivals(
    listing: Path,
    files: list[Asked],
    get: Callable[[Asked, Progress], list[Entry]],
    parallel: int,
    allow_missing: bool,
    table: Path | None = None,
) -> list[Entry]:
    """The entries of every file of a batch; those over the net come `parallel` at once.

    The others come although one fails. What failed is told at the end, and is an error unless
    missing files are allowed: then they are left out. `table` is that of the whole data set.
    """
    whole = source_table.read(table) if table else files
    sizes = [file.bytes for file in whole]

    def finished() -> Count:
        others = [path for path in listing.parent.glob("[0-9]*.tsv") if path != listing and table]
        rows = read(others)
        return Count(len(rows), sum(entry.bytes for entry in rows))

    def fetch(file: Asked) -> list[Entry]:
        try:
            return get(file, told.add)
        finally:
            told.finish()

    entries: list[Entry] = []
    failures: list[str] = []
    total = Count(len(whole), None if None in sizes else sum(size or 0 for size in sizes))
    with (
        DownloadProgress(
            here().root / "arriving" / name_of(listing.parent), total, finished
        ) as told,
        ThreadPoolExecutor(parallel) as pool,
    ):
        coming = {file: pool.submit(fetch, file) for file in files if file.remote}
        for file in files:
            try:
                entries += coming[file].result() if file in coming else get(file, unseen)
            except ValueError as error:
                failures.append(str(error))
    if failures and not allow_missing:
        reasons = list(dict.fromkeys(failures))  # each once
        apart = " " if len(reasons) == 1 else "\n  "
        raise ValueError(apart.join([f"{len(failures)} of {len(files)} sources:", *reasons]))
    for failure in failures:
        log.warning(f"left out: {failure}")
    return entries


def sources(
    listing: Path,
    sources: list[str],
    table: Path | None = None,
    parallel: int = 4,
    allow_missing: bool = False,
    conversations: bool = False,
) -> None:
    """Get a batch of sources, each given as name=place, or name=place#mirror#mirror.

    So many at once come over the net; the others come although one fails. What failed is told at
    the end, and fails the batch unless missing files are allowed: then they are left out. What
    the table knows of a file must agree with it; what it does not know is written into it.
    Documents come as gz files; `conversations` also as plain JSON lines and parquet.
    """
    local = local_conversations if conversations else local_source
    remote = download_conversations if conversations else download

    def get(file: Asked, progress: Progress) -> list[Entry]:
        names = {"source": f"sources/{file.name}.json.gz"}
        kind, _, which = file.place.partition(":")
        if kind in LIBRARY and not file.remote:
            number, _, shards = which.partition("/")
            return [standard_library(listing, kind, file.name, int(number), int(shards))]
        if not file.remote:
            place = Path(file.place)
            return run(listing, file.name, local, names, file=place, sha256=file.sha256)
        known = {"bytes": file.bytes, "sha256": file.sha256, "mirrors": file.mirrors}
        return run(listing, file.name, remote, names, url=file.place, progress=progress, **known)

    files = asked(sources, table)
    entries = arrivals(listing, files, get, parallel, allow_missing, table)
    if table is not None and not conversations:  # else what is kept is not what was sent
        places = {file.name: file.place for file in files}
        found = {places[entry.shard]: (entry.bytes, entry.sha256) for entry in entries}
        with lease(here().root / "leases", f"table-{name_of(table)}"):
            source_table.complete(table, found)
    write(listing, entries)


def name_of(path: Path) -> str:
    """A name in the store for what only this path is about."""
    return hashlib.sha256(os.path.abspath(path).encode()).hexdigest()[:32]


def given_tokens(
    listing: Path,
    sources: list[str],
    dtype: str = "uint16",
    parallel: int = 4,
    allow_missing: bool = False,
) -> None:
    """Get a batch of token files that somebody else made; otherwise as `olmo sources`."""

    def get(file: Asked, progress: Progress) -> list[Entry]:
        names = {"tokens": f"tokens/{file.name}.npy"}
        if not file.remote:
            return run(listing, file.name, local_tokens, names, file=Path(file.place), dtype=dtype)
        return run(
            listing,
            file.name,
            download_tokens,
            names,
            url=file.place,
            mirrors=file.mirrors,
            dtype=dtype,
            progress=progress,
        )

    write(listing, arrivals(listing, asked(sources), get, parallel, allow_missing))


# What the standard library is taken as, by how a place begins: the stage, and its files' names.
LIBRARY = {"stdlib": (stdlib, "stdlib"), "stdlib-questions": (stdlib_questions, "questions")}


def standard_library(listing: Path, kind: str, name: str, number: int, shards: int) -> Entry:
    """One file of the standard library's; all of them are one action, run once."""
    record = whole_library(listing.parent.parent / "stdlib", kind, shards)
    file = f"{LIBRARY[kind][1]}-{number:02d}.json.gz"
    made = record["outputs"]["folder"]["files"][file]
    return Entry(name, "source", f"stdlib/{file}", made["sha256"], made["size"])


@cache
def whole_library(folder: Path, kind: str, shards: int) -> Record:
    made: Record = LIBRARY[kind][0](folder=folder, shards=shards, library=library_digest())
    return made
