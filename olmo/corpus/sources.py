"""Sources: gz files and token files, downloaded or local, each checked to its last byte."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from olmo.config.strict import check_one_set, check_range
from olmo.corpus.formats import RowsSection
from olmo.corpus.source_table import COLUMNS
from olmo.corpus.stdlib import MAX_SHARDS
from olmo.io import downloads, file_types, gz, http_client
from olmo.io.sealed import hash_file
from olmo.runtime.log import format_number, log
from olmo.runtime.urls import redact, stash_secrets
from olmo.store.stage import Facts, Input, Output, Unhashed, Work, current_store, stage

MAX_URL_LIST_BYTES = 256 * 2**20

# Sources that are generated: the section's field → the prefix of their places, which are not files.
GENERATED = {"stdlib": "stdlib", "stdlib_questions": "stdlib-questions"}
KINDS = (*GENERATED, "files", "table", "url_list")  # exactly one of these fields is set


@dataclass
class SourcesSection(RowsSection):
    """Where text comes from; exactly one of the five `KINDS` must be set."""

    stdlib: int | None = None  # the running Python's standard library, in this many files
    stdlib_questions: int | None = None  # its documentation as conversations, likewise
    # Local files; globs: JSON lines, parquet, csv, tsv, text (olmo.corpus.formats), or gz or zst of
    # these. Gz JSON lines with "id" and "text" (Dolma's schema) are taken as they are.
    files: list[str] = field(default_factory=list)
    table: str | None = None  # a TSV: url, bytes, sha256, licence
    url_list: str | None = None  # a URL of a text file of URLs, as Dolma publishes them
    # Of all files of the list, as published with it: what `olmo plan` knows before the download.
    total_bytes: int | None = None
    # Other places of the files, tried in this order: "https://a.org/x/=https://b.org/y/".
    mirrors: list[str] = field(default_factory=list)
    allow_missing: bool = False  # continue without the files that are not available

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in GENERATED:
            check_range(f"sources.{name}", getattr(self, name), 1, MAX_SHARDS)
        check_range("sources.total_bytes", self.total_bytes, 1)
        check_one_set("sources", self, KINDS)
        if wrong := [mirror for mirror in self.mirrors if mirror.count("=") != 1]:
            raise ValueError(f"sources.mirrors: expected beginning=beginning, found {wrong[0]!r}")

    @property
    def rows(self) -> RowsSection:
        return RowsSection(self.text_field, self.id_field, self.one_document_per)

    def mirrors_of(self, place: str) -> tuple[str, ...]:
        """The other places of a file."""
        pairs = (mirror.split("=") for mirror in self.mirrors)
        return tuple(b + place.removeprefix(a) for a, b in pairs if place.startswith(a))


@stage(version=1)
def source_list(url: str, table: Output, licence: str = "") -> Facts:
    """Make the table of a data set's sources from a published list of URLs, one a line.

    A tab-separated table: url, bytes (from the servers), sha256 (not known yet), licence. Logs how
    much there is to download.

    Args:
        table: table to write
        licence: of the files
    """
    part = table.with_name("part")
    listed = table.with_name("listed")
    downloads.fetch(url, listed, part, max_bytes=MAX_URL_LIST_BYTES)
    text = file_types.read_text(listed, url)
    shutil.rmtree(part)
    listed.unlink()
    urls = [line.strip() for line in text.splitlines() if line.strip()]
    for number, one in enumerate(urls, 1):
        # The list comes from elsewhere, so it must not name files of this machine.
        is_local = "://" not in one or one.lower().startswith("file:")
        if is_local or any(letter.isspace() for letter in one):
            raise ValueError(f"{url}: expected a URL a line, found in line {number}: {one[:80]!r}")
        if redact(one) != one:  # the table is kept in the store, and shared with it
            raise ValueError(
                f"{url}, line {number}: expected a URL without user, password and signature, found "
                f"credentials in the URL of {redact(one)}; save the list as a table of your own "
                "(sources: {table: …}), which is not shared"
            )
    if not urls:
        raise ValueError(f"{url}: expected a list of URLs, found an empty file")
    found = http_client.request_sizes(urls)
    known = [size for size in found if size is not None]
    unknown = len(urls) - len(known)
    rest = f", and {format_number(unknown, 'file')} of unknown size" * (unknown > 0)
    total = f"{sum(known):,} bytes ({sum(known) / 1e9:,.1f} GB)"
    log.info(f"{format_number(len(urls), 'file')}, {total}{rest}")
    rows = [COLUMNS]
    for one, size in zip(urls, found, strict=True):
        rows.append((one, "" if size is None else str(size), "", licence))
    table.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    return {"url": url, "files": len(urls), "bytes": sum(known), "unknown": len(urls) - len(known)}


@dataclass(frozen=True)
class Transfer:
    """How a file is downloaded, which does not change its bytes."""

    mirrors: tuple[str, ...] = ()  # other places of the file, tried in this order
    bytes: int | None = None  # its size, if known: a download ends as soon as it exceeds it
    progress: downloads.Progress = downloads.ignore_progress
    licence: str = ""  # of its content, by the source table; for people

    def licence_facts(self) -> Facts:
        return {"licence": self.licence} if self.licence else {}


DIRECT = Transfer()


@stage(version=1)
def download(
    url: str,
    source: Output,
    part: Work,
    sha256: str | None = None,
    transfer: Unhashed[Transfer] = DIRECT,
) -> Facts:
    """Download one gz file and check it: its length, its own checksum to the end, its sha256.

    Without a known sha256, the record has that of this first download: it is the digest of the
    output. With one that the store has, nothing is downloaded. An interrupted download resumes. If
    `url` fails, the mirrors are tried in order.
    """
    known = current_store().object_path(sha256) if sha256 else None
    if known is not None and known.exists() and hash_file(known) == sha256:
        shutil.copyfile(known, source)
        text_bytes = check_source(source, url, transfer.bytes, sha256)
        found = {"sha256": sha256, "text_bytes": text_bytes, "received": 0}
        return {"url": url, **found, **transfer.licence_facts()}

    def check(place: str) -> int:
        return check_source(source, place, transfer.bytes, sha256)

    found = fetch_any(url, transfer, source, part, check)
    return {"url": url, **found, "text_bytes": found.pop("checked")}


@stage(version=1)
def download_tokens(
    url: str,
    tokens: Output,
    part: Work,
    dtype: str = "uint16",
    transfer: Unhashed[Transfer] = DIRECT,
) -> Facts:
    """Download a file of tokens made elsewhere: raw little-endian `dtype`, no header.

    Otherwise as `download`. There is no checksum to compare; the length must be a multiple of the
    token size, and the contents no web page, no gzip and no numpy file with a header.
    """

    def check(place: str) -> int:
        return check_token_file(tokens, place, dtype)

    found = fetch_any(url, transfer, tokens, part, check)
    return {"url": url, **found, "dtype": dtype, "tokens": found.pop("checked")}


def fetch_any(
    url: str, transfer: Transfer, path: Path, part: Path, check: Callable[[str], int]
) -> dict[str, Any]:
    """Download from the first of `url` and its mirrors whose file passes `check`; facts of it."""
    failures = []
    for number, place in enumerate(stash_secrets((url, *transfer.mirrors))):
        fetch = partial(
            downloads.fetch, place, path, part / str(number), transfer.progress, transfer.bytes
        )
        try:
            facts = fetch()
            try:
                checked = check(place)
            except ValueError:
                if not facts.get("resumed"):
                    raise
                facts = fetch()  # once more from the start: the file may have changed in between
                checked = check(place)
        except downloads.TooLarge as error:
            failures.append(wrong_size(place, error.max_bytes, error.found))
            continue
        except ValueError as error:
            failures.append(str(error))
            continue
        shutil.rmtree(part, ignore_errors=True)
        facts |= transfer.licence_facts()
        return {"from": place, "sha256": hash_file(path), "checked": checked, **facts}
    raise ValueError("; then ".join(failures))


@stage(version=1)
def fetched(
    url: str,
    file: Output,
    part: Work,
    sha256: str | None = None,
    transfer: Unhashed[Transfer] = DIRECT,
) -> Facts:
    """Download one file of any format, which is to be converted; otherwise as `download`."""

    def check(place: str) -> int:
        with open(file, "rb") as start:
            found, _ = file_types.detect_type(start.read(512))
        if found == "an empty file" or found.startswith("a web page"):
            raise ValueError(f"{place}: expected data, found {found}")
        check_against_table(file, place, transfer.bytes, sha256)
        return file.stat().st_size

    found = fetch_any(url, transfer, file, part, check)
    return {"url": url, **found, "bytes": found.pop("checked")}


@stage(version=1)
def local_source(file: Input, source: Output, sha256: str | None = None) -> Facts:
    """Copy a local gz file, checked as a download is."""
    shutil.copyfile(file, source)
    return {"text_bytes": check_source(source, str(file), None, sha256)}


@stage(version=1)
def local_tokens(file: Input, tokens: Output, dtype: str = "uint16") -> Facts:
    """Copy a local file of tokens, checked as a download is."""
    shutil.copyfile(file, tokens)
    return {"dtype": dtype, "tokens": check_token_file(tokens, str(file), dtype)}


def check_source(source: Path, name: str, bytes: int | None, sha256: str | None) -> int:
    """The bytes of text in a gz file.

    Raises ValueError unless the file is complete and agrees with the table.
    """
    gz.check_is_gzip(source, name)
    check_against_table(source, name, bytes, sha256)
    text_bytes = gz.verify_checksum(source, name)
    if text_bytes == 0:
        raise ValueError(f"{name}: expected lines, found an empty source. Remove it from the list")
    return text_bytes


def check_against_table(path: Path, name: str, bytes: int | None, sha256: str | None) -> None:
    """Raises ValueError unless a file has the length and the sha256 that the table says."""
    if bytes is not None and (size := path.stat().st_size) != bytes:
        raise ValueError(wrong_size(name, bytes, size))
    if sha256 is not None and (found := hash_file(path)) != sha256:
        raise ValueError(
            f"{name}: expected sha256 {sha256} by the source table, found {found}. If the file "
            "was changed on purpose, correct the table"
        )


def wrong_size(name: str, bytes: int, found: int) -> str:
    return (
        f"{name}: expected {bytes:,} bytes by the source table, found {found:,}. If the file was "
        "changed on purpose, correct the table"
    )


def check_token_file(path: Path, name: str, dtype: str) -> int:
    """The number of tokens in a file. Raises ValueError unless it can be raw tokens."""
    # Here, since text needs no numpy.
    from olmo.data import raw
    from olmo.data.files import ArrayFile, token_itemsize

    width = token_itemsize(dtype)
    with open(path, "rb") as file:
        raw.check_is_raw(name, file.read(64), dtype)
    size = path.stat().st_size
    if size == 0 or size % width:
        raise ValueError(f"{name}: expected tokens of {width} bytes each, found {size:,} bytes")
    start = ArrayFile(path, dtype).read(0, 1 << 16)
    wider = raw.guess_wider_dtype(start, 1 << 8 * width)  # the vocabulary is not known here
    if wider is not None and wider[1]:
        raise ValueError(f"{name}: expected {dtype}, found {wider[0]}; set data.memmap_dtype to it")
    return size // width
