"""Ingests batches of sources and of token files: several downloads at once, each file checked."""

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path

from olmo.corpus import source_table
from olmo.corpus.conversations import download_conversations, local_conversations
from olmo.corpus.formats import (
    CONVERTED,
    EVERY_ROW,
    RowsSection,
    converted,
    needs_conversion,
    split_suffixes,
)
from olmo.corpus.listing import FETCHED, Entry, as_arrived, read_listing, run_shard, write_listing
from olmo.corpus.questions import stdlib_questions
from olmo.corpus.source_table import Source
from olmo.corpus.sources import (
    Transfer,
    download,
    download_tokens,
    fetched,
    local_source,
    local_tokens,
)
from olmo.corpus.stdlib import library_digest, stdlib
from olmo.io import untrusted
from olmo.io.downloads import Progress, ignore_progress
from olmo.io.progress import DownloadProgress, Totals
from olmo.runtime.log import log
from olmo.store.lease import lease
from olmo.store.record import Record, output_files
from olmo.store.stage import Stage, current_store


def parse_sources(words: list[str], table: Path | None = None) -> list[Source]:
    """Parse name=place or name=place#mirror#mirror; sizes and sha256s come from the table."""
    known = {row.place: row for row in source_table.read_stashing_secrets(table)} if table else {}
    files = []
    for word in words:
        name, _, places = word.partition("=")
        place, *mirrors = map(source_table.unquote, places.split("#"))
        untrusted.check_part(name, "--sources")
        source = known.get(place, Source(name, place))
        files.append(replace(source, name=name, mirrors=tuple(mirrors)))
    return files


def ingest_files(
    listing: Path,
    files: list[Source],
    ingest: Callable[[Source, Progress], list[Entry]],
    parallel: int,
    allow_missing: bool,
    table: Path | None = None,
) -> list[Entry]:
    """The entries of every file of a batch; downloads `parallel` files at once.

    A file that fails does not stop the others. Failures are reported at the end: as an error, or,
    with `allow_missing`, as warnings. A full disk stops all. `table` is that of the whole data set.
    """
    dataset = source_table.read_stashing_secrets(table) if table else files
    sizes = [file.bytes for file in dataset]

    def count_finished() -> Totals:
        others = [path for path in listing.parent.glob("[0-9]*.tsv") if path != listing and table]
        files = as_arrived(read_listing(others)).values()
        return Totals(len(files), sum(entry.bytes for entry in files))

    def ingest_remote(file: Source) -> list[Entry]:
        try:
            return ingest(file, progress.add_bytes)
        finally:
            progress.add_file()

    entries: list[Entry] = []
    failures: list[str] = []
    total = Totals(len(dataset), None if None in sizes else sum(size or 0 for size in sizes))
    folder = current_store().root / "arriving" / path_key(listing.parent)
    with (
        DownloadProgress(folder, total, count_finished) as progress,
        ThreadPoolExecutor(parallel) as pool,
    ):
        downloads = {file: pool.submit(ingest_remote, file) for file in files if file.is_remote}
        for file in files:
            try:
                entries += (
                    downloads[file].result() if file in downloads else ingest(file, ignore_progress)
                )
            except ValueError as error:
                failures.append(str(error))
            except OSError:  # the disk's or the store's fault: other files would fail too
                pool.shutdown(cancel_futures=True)
                raise
    if failures and not allow_missing:
        reasons = list(dict.fromkeys(failures))  # each once
        separator = " " if len(reasons) == 1 else "\n  "
        raise ValueError(separator.join([f"{len(failures)} of {len(files)} sources:", *reasons]))
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
    rows: RowsSection = EVERY_ROW,
    files: list[str] | None = None,
) -> None:
    """Get a batch of sources, each given as name=place, or name=place#mirror#mirror.

    `parallel` files are downloaded at once; one that fails does not stop the others. Failures are
    reported at the end and fail the batch, unless missing files are allowed: then they are left
    out. Sizes and sha256s in the table are checked; missing ones are added to it. Documents of
    other formats than gz JSON lines are converted, by `rows`. `files`: the recipe's patterns, of
    which text files are grouped.

    Args:
        conversations: the files are conversations
        rows: the recipe's `sources`, how rows of other formats become documents
        files: the recipe's patterns, of which text files are grouped
    """
    copy = local_conversations if conversations else local_source
    remote = download_conversations if conversations else download
    outputs = {"source": "sources/{}.json.gz"}

    groups = {}
    if files:
        recipe = Path(f"config/data/{listing.parent.parent.name}.yaml")
        grouped = rows.takes_whole_files
        local = source_table.find_local_files(files, recipe, is_grouped=grouped)
        groups = {source.place: source.parts for source in local if source.parts}

    def convert(file: Source, progress: Progress) -> list[Entry]:
        names, arrived = list(groups.get(file.place, (file.place,))), []
        places = [Path(name) for name in names]
        if file.is_remote:
            place = {FETCHED: "sources/raw/{}"}
            fetch = {"url": file.place, "transfer": transfer(file, progress)}
            sha256 = unless_downloaded(fetched, file)
            arrived = run_shard(fetched, listing, file.name, place, sha256=sha256, **fetch)
            places = [arrived[0].object]
        made = {"files": places, "names": names, "rows": rows}
        suffix, _ = split_suffixes(names[0])
        to = {"source": f"sources/{{}}{suffix}{CONVERTED}"}
        return arrived + run_shard(converted, listing, file.name, to, **made)

    def ingest(file: Source, progress: Progress) -> list[Entry]:
        if file.place.startswith(source_table.GROUP) and file.place not in groups:
            raise ValueError(f"{file.name}: its text files changed meanwhile; run the same again")
        if not conversations and (file.place in groups or needs_conversion(file.place, rows)):
            return convert(file, progress)
        if file.is_remote:
            fetch = {"url": file.place, "transfer": transfer(file, progress)}
            sha256 = unless_downloaded(remote, file)
            return run_shard(remote, listing, file.name, outputs, sha256=sha256, **fetch)
        kind, _, shard = file.place.partition(":")
        if kind in STDLIB_STAGES:
            return [stdlib_entry(listing, kind, file.name, *map(int, shard.split("/")))]
        where = {"file": Path(file.place), "sha256": file.sha256}
        return run_shard(copy, listing, file.name, outputs, **where)

    batch = parse_sources(sources, table)
    entries = ingest_files(listing, batch, ingest, parallel, allow_missing, table)
    # Conversations may be converted, so that their size and sha256 are not those of the download.
    if table is not None and not conversations:
        places = {file.name: file.place for file in batch}
        arrived = as_arrived(entries).items()
        found = {places[shard]: (entry.bytes, entry.sha256) for shard, entry in arrived}
        with lease(current_store().root / "leases", f"table-{path_key(table)}"):
            source_table.complete_table(table, found)
    write_listing(listing, entries)


def unless_downloaded(stage: Stage, file: Source) -> str | None:
    """The sha256 to ask for: None if the download that found it out is in the store.

    It was asked for without one, and the table has that since. With it the action is another one,
    which would copy and check the same bytes again.
    """
    record = current_store().lookup(stage.action(current_store(), url=file.place).key)
    known = [output["sha256"] for output in output_files(record)] if record else []
    return None if known == [file.sha256] else file.sha256


def transfer(file: Source, progress: Progress) -> Transfer:
    return Transfer(file.mirrors, file.bytes, progress, file.licence)


def path_key(path: Path) -> str:
    """A name, in the store, for something that belongs to this path."""
    return hashlib.sha256(os.path.abspath(path).encode()).hexdigest()[:32]


def given_tokens(
    listing: Path,
    sources: list[str],
    dtype: str = "uint16",
    parallel: int = 4,
    allow_missing: bool = False,
) -> None:
    """Get a batch of token files made elsewhere; otherwise as `olmo sources`."""
    outputs = {"tokens": "tokens/{}.npy"}

    def ingest(file: Source, progress: Progress) -> list[Entry]:
        if file.is_remote:
            fetch = {"url": file.place, "transfer": transfer(file, progress)}
            return run_shard(download_tokens, listing, file.name, outputs, dtype=dtype, **fetch)
        path = Path(file.place)
        return run_shard(local_tokens, listing, file.name, outputs, file=path, dtype=dtype)

    files = parse_sources(sources)
    write_listing(listing, ingest_files(listing, files, ingest, parallel, allow_missing))


# The stages that make sources from the standard library, by the place's prefix; their files' names.
STDLIB_STAGES = {"stdlib": (stdlib, "stdlib"), "stdlib-questions": (stdlib_questions, "questions")}


def stdlib_entry(listing: Path, kind: str, name: str, number: int, shards: int) -> Entry:
    """The entry of one file of the standard library's; one action makes all of them."""
    record = run_stdlib(listing.parent.parent / "stdlib", kind, shards)
    path = f"{STDLIB_STAGES[kind][1]}-{number:02d}.json.gz"
    file = record["outputs"]["folder"]["files"][path]
    return Entry(name, "source", f"stdlib/{path}", file["sha256"], file["size"])


@cache
def run_stdlib(folder: Path, kind: str, shards: int) -> Record:
    record: Record = STDLIB_STAGES[kind][0](folder=folder, shards=shards, library=library_digest())
    return record
