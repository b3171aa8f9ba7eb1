"""A data set's shards travel in batches: one job for many files, a store entry for each.

A batch's job leaves a listing, data/<dataset>/<stage>/<batch>.tsv: for each shard and output, its
name, its path below data/<dataset> and what it is. The next stage reads the listing and takes the
bytes from the store by their digests, so that a path is for people and for other programs.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from olmo.corpus import source_table
from olmo.corpus.conversations import download_conversations, local_conversations
from olmo.corpus.documents import HELDOUT, MAX_LINE_BYTES, MAX_TEXT_BYTES, TEXT, TRAIN
from olmo.corpus.documents import documents as documents_stage
from olmo.corpus.dolma import Dolma, toolkit
from olmo.corpus.environments import interpreter
from olmo.corpus.fast import Fast
from olmo.corpus.questions import stdlib_questions
from olmo.corpus.sources import download, download_tokens, local_source, local_tokens
from olmo.corpus.statistics import statistics as statistics_stage
from olmo.corpus.stdlib import library_digest, stdlib
from olmo.corpus.tokens import AS_SPECIAL
from olmo.corpus.tokens import tokens as tokens_stage
from olmo.corpus.train_tokenizer import given_tokenizer, local_tokenizer, trained_tokenizer
from olmo.data.files import token_bytes
from olmo.data.order import global_indices, inverse
from olmo.data.order import read as read_order
from olmo.data.order import write as write_order
from olmo.io import foreign, sealed
from olmo.io.downloads import Progress, unseen
from olmo.io.progress import Arrivals, Count
from olmo.io.sealed import Damaged
from olmo.runtime import log
from olmo.store.lease import lease
from olmo.store.stage import Facts, Input, Output, Stage, here, stage
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
        Arrivals(here().root / "arriving" / name_of(listing.parent), total, finished) as told,
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
        log.warn(f"left out: {failure}")
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


def documents(
    sources: list[Path],
    listing: Path,
    keep_one_in: int = 1,
    offset: int = 0,
    heldout_share: float = 0.0,
    weights: tuple[str, ...] = (),
    max_text_bytes: int = MAX_TEXT_BYTES,
    allow: tuple[str, ...] = (),
    kind: str = TEXT,
    max_line_bytes: int = MAX_LINE_BYTES,
) -> None:
    """One line in N of each source of a batch, checked, the held-out ones split off.

    `weights` are pattern=weight; the first pattern that fits a source's name gives its weight.
    """
    entries = []
    for source in read(sources, "source"):
        names = {
            "documents": f"documents/{source.shard}.json.gz",
            "heldout": f"heldout/{source.shard}.json.gz",
            "table": f"documents/{source.shard}.parquet",
        }
        entries += run(
            listing,
            source.shard,
            documents_stage,
            names,
            source=source.object,
            name=Path(source.path).name,
            keep_one_in=keep_one_in,
            offset=offset,
            heldout_share=heldout_share,
            weight=weight_of(source.shard, weights),
            max_text_bytes=max_text_bytes,
            allow=tuple(allow),
            kind=kind,
            max_line_bytes=max_line_bytes,
        )
    write(listing, entries)


def weight_of(shard: str, weights: Iterable[str]) -> float:
    for given in weights:
        pattern, _, weight = given.partition("=")
        try:
            if fnmatchcase(shard, pattern):
                return float(weight)
        except ValueError:
            raise ValueError(f"weights: expected pattern=number, found {given!r}") from None
    return 1.0


def tokenizer(
    documents: list[Path],
    tokenizer: Path,
    eos_token_id: int,
    pad_token_id: int,
    train_vocab_size: int | None = None,
    file: Path | None = None,
    hub: str | None = None,
    sha256: str | None = None,
) -> None:
    """The data set's tokenizer: trained on its documents, a file, or one from the hub."""
    if train_vocab_size is not None:
        shards = [entry.object for entry in read(documents, "documents")]
        trained_tokenizer(documents=shards, tokenizer=tokenizer, vocab_size=train_vocab_size)
    elif file is not None:
        if sha256 is not None and (found := here().digest(file)) != sha256:
            raise ValueError(f"{file}: expected sha256 {sha256}, found {found}")
        local_tokenizer(source=file, tokenizer=tokenizer)
    else:
        given_tokenizer(name=f"hf://{hub}/tokenizer.json", tokenizer=tokenizer, sha256=sha256)


def tokens(
    documents: list[Path],
    tokenizer: Path,
    listing: Path,
    eos_token_id: int,
    pad_token_id: int,
    requirements: Path,
    environment: Path | None = None,
    engine: str = "dolma",
    audit_share: float = 0.01,
    special_tokens: str = AS_SPECIAL,
) -> None:
    """Token shards of a batch's documents and held-out documents, by one process of the toolkit.

    `environment` is what `olmo environment` made of `requirements`; without it, the toolkit is
    that of the `python` on PATH (`--sdm conda`).
    """
    python = interpreter(environment) if environment else Path(shutil.which("python") or "python")
    tables = {entry.shard: entry.object for entry in read(documents, "table")}
    parts = {
        TRAIN: ("documents", {"tokens": "tokens/{}.npy", "index": "tokens/{}.parquet"}),
        HELDOUT: ("heldout", {"tokens": "heldout/{}.npy", "index": "heldout/{}.parquet"}),
    }
    entries = []
    # The toolkit starts when the first shard is not in the store.
    with Dolma(python, toolkit(requirements)) as dolma:
        chosen = Fast(dolma, audit_share) if engine == "fast" else dolma
        for split, (output, paths) in parts.items():
            for entry in read(documents, output):
                made = run(
                    listing,
                    entry.shard,
                    tokens_stage,
                    {name: path.format(entry.shard) for name, path in paths.items()},
                    documents=entry.object,
                    table=tables[entry.shard],
                    tokenizer=tokenizer,
                    eos_token_id=eos_token_id,
                    pad_token_id=pad_token_id,
                    toolkit=chosen.toolkit,
                    engine=chosen,
                    split=split,
                    special_tokens=special_tokens,
                )
                # The listing tells the held-out shards from the others by the output's name.
                prefix = "" if split == TRAIN else "heldout-"
                entries += [replace(file, output=prefix + file.output) for file in made]
    write(listing, entries)


def statistics(documents: list[Path], tokens: list[Path], summary: Path, text: Path) -> None:
    """What a data set holds, as a table for programs and one for people, which is told."""
    statistics_stage(
        tables=[entry.object for entry in read(documents, "table")],
        tokens=[entry.object for entry in read(tokens, "index")],
        heldout=[entry.object for entry in read(tokens, "heldout-index")],
        summary=summary,
        text=text,
    )
    log.tell(text.read_text(encoding="utf-8").rstrip())


def order(
    tokens: list[Path],
    order: Path,
    sequence_length: int,
    seed: int,
    dtype: str = "uint16",
    epoch: int = 0,
) -> None:
    """The order in which a run sees its instances: a shuffle that depends on their number.

    `epoch` is that in which the run begins; the trainer makes the orders of later ones.
    """
    width = token_bytes(dtype)
    sizes = [entry.bytes for entry in read(tokens, "tokens")]
    instances = sum(size // (width * sequence_length) for size in sizes)
    if instances == 0:
        raise ValueError(
            f"expected at least one instance of {sequence_length} tokens, found {sum(sizes)} "
            f"bytes in {len(sizes)} shards, none as long as that; give more documents (a smaller "
            "documents.keep_one_in), or a smaller model.max_sequence_length"
        )
    global_order(order=order, instances=instances, seed=seed, epoch=epoch)
    # OLMo's README maps it with mode="r+", which reads it only. Its owner may; should anything be
    # written into it, its time is no more the store's, and what is wrong with it is found on use.
    with suppress(PermissionError):  # another user's
        order.chmod(0o644)


@stage(version=1)
def global_order(order: Output, instances: int, seed: int, epoch: int = 0) -> Facts:
    """global_indices.npy of one epoch, without what depends on the world size."""
    write_order(global_indices(instances, seed, epoch), order)
    return {"instances": instances}


@stage(version=1)
def positions(order: Input, positions: Output) -> Facts:
    """The inverse of an order: for each instance its position, raw uint32, as the order is."""
    found = inverse(read_order(order))
    write_order(found, positions)
    return {"instances": len(found)}
