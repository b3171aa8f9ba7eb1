"""Sources: gz files from elsewhere, each one here whole and checked, or named with the reason."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from olmo.config import BaseConfig
from olmo.config.strict import check_range
from olmo.corpus.source_table import COLUMNS
from olmo.io import downloads, file_kinds, gz
from olmo.runtime.log import log
from olmo.runtime.urls import public
from olmo.store.stage import Facts, Free, Input, Output, Work, here, stage
from olmo.store.store import sha256 as digest_of

MOST_LIST = 256 * 2**20  # bytes of a list of URLs


@dataclass
class SourcesSection(BaseConfig):
    """Where text comes from; exactly one of the first five is given."""

    stdlib: int | None = None  # the running Python's standard library, in so many files
    stdlib_questions: int | None = None  # its documentation as conversations, likewise
    files: list[str] = field(default_factory=list)  # local gz files of Dolma's schema; globs
    table: str | None = None  # a TSV: url, bytes, sha256, licence
    url_list: str | None = None  # a URL of a text file of URLs, as Dolma publishes them
    # Where else the files are, tried in this order: "https://a.org/x/=https://b.org/y/".
    mirrors: list[str] = field(default_factory=list)
    allow_missing: bool = False  # go on without the files that cannot be had

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("stdlib", "stdlib_questions"):
            check_range(f"sources.{name}", getattr(self, name), 1, 100)
        kinds = ("stdlib", "stdlib_questions", "files", "table", "url_list")
        given = [name for name in kinds if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(
                f"sources: expected one of {', '.join(kinds)}; found "
                + (" and ".join(given) or "none")
            )
        if wrong := [mirror for mirror in self.mirrors if mirror.count("=") != 1]:
            raise ValueError(f"sources.mirrors: expected beginning=beginning, found {wrong[0]!r}")


@stage(version=1)
def source_list(url: str, table: Output, licence: str = "") -> Facts:
    """Make the table of a data set's sources from a published list of URLs, one a line.

    A tab-separated table: url, bytes (as the servers tell), sha256 (not known yet), licence.
    Says how much there is to download.
    """
    part = table.with_name("part")
    listed = table.with_name("listed")
    downloads.fetch(url, listed, part, most=MOST_LIST)
    text = file_kinds.text_of(listed, url)
    shutil.rmtree(part)
    listed.unlink()
    urls = [line.strip() for line in text.splitlines() if line.strip()]
    for number, one in enumerate(urls, 1):
        local = "://" not in one or one.lower().startswith("file:")  # somebody else's list
        if local or any(letter.isspace() for letter in one):
            raise ValueError(f"{url}: expected a URL a line, found in line {number}: {one[:80]!r}")
        if public(one) != one:  # the table that is made of it is kept, and sent with the store
            raise ValueError(
                f"{url}, line {number}: expected a URL without user, password and signature, found "
                f"credentials in the URL of {public(one)}; save the list as a table of your own "
                "(sources: {table: …}), which stays here"
            )
    if not urls:
        raise ValueError(f"{url}: expected a list of URLs, found an empty file")
    found = downloads.sizes(urls)
    known = [size for size in found if size is not None]
    unknown = f", and {len(urls) - len(known)} files of unknown size" * (len(known) < len(urls))
    log.info(f"{len(urls):,} files, {sum(known):,} bytes ({sum(known) / 1e9:,.1f} GB){unknown}")
    rows = [
        COLUMNS,
        *(
            (one, "" if n is None else str(n), "", licence)
            for one, n in zip(urls, found, strict=True)
        ),
    ]
    table.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    return {"url": url, "files": len(urls), "bytes": sum(known), "unknown": len(urls) - len(known)}


@stage(version=1)
def download(
    url: str,
    source: Output,
    part: Work,
    sha256: str | None = None,
    bytes: Free[int | None] = None,
    mirrors: Free[tuple[str, ...]] = (),
    progress: Free[downloads.Progress] = downloads.unseen,
) -> Facts:
    """Fetch one gz file and check it: its length, its own checksum to the end, its sha256.

    Where the sha256 is not known the one of this first download is recorded: it is the digest of
    the output. Where it is known and the store has it, nothing is fetched. What arrived before an
    attempt was cut off is used. Where `url` fails the mirrors are tried, in their order.
    """
    known = here().object_path(sha256) if sha256 else None
    if known is not None and known.exists() and digest_of(known) == sha256:
        shutil.copyfile(known, source)
        text_bytes = check(source, url, bytes, sha256)
        return {"url": url, "sha256": sha256, "text_bytes": text_bytes, "received": 0}

    def whole(place: str) -> int:
        return check(source, place, bytes, sha256)

    found = fetched(url, mirrors, source, part, whole, progress, bytes)
    return {"url": url, **found, "text_bytes": found.pop("checked")}


@stage(version=1)
def download_tokens(
    url: str,
    tokens: Output,
    part: Work,
    dtype: str = "uint16",
    mirrors: Free[tuple[str, ...]] = (),
    progress: Free[downloads.Progress] = downloads.unseen,
) -> Facts:
    """Fetch a file of tokens that somebody else made: raw little-endian `dtype`, no header.

    As `download` does for text. What can be checked without a checksum is: the length is that of
    whole tokens, and it is no web page, no gzip and no numpy file with a header.
    """

    def whole(place: str) -> int:
        return check_raw(tokens, place, dtype)

    found = fetched(url, mirrors, tokens, part, whole, progress)
    return {"url": url, **found, "dtype": dtype, "tokens": found.pop("checked")}


def fetched(
    url: str,
    mirrors: tuple[str, ...],
    path: Path,
    part: Path,
    check: Callable[[str], int],
    progress: downloads.Progress,
    bytes: int | None = None,
) -> dict[str, Any]:
    """Fetch from the first of `url` and its mirrors whose file passes `check`; facts of it.

    Where its `bytes` are known, no more of them are taken.
    """
    failures = []
    for number, place in enumerate((url, *mirrors)):
        try:
            facts = downloads.fetch(place, path, part / str(number), progress, bytes)
            try:
                checked = check(place)
            except ValueError:
                if not facts.get("resumed"):
                    raise
                facts = downloads.fetch(
                    place, path, part / str(number), progress, bytes
                )  # of one piece
                checked = check(place)
        except downloads.TooLong as error:
            failures.append(other_size(place, error.most, error.found))
            continue
        except ValueError as error:
            failures.append(str(error))
            continue
        shutil.rmtree(part, ignore_errors=True)
        return {"from": place, "sha256": digest_of(path), "checked": checked, **facts}
    raise ValueError("; then ".join(failures))


@stage(version=1)
def local_source(file: Input, source: Output, sha256: str | None = None) -> Facts:
    """Take a gz file of this machine, checked as a download is."""
    shutil.copyfile(file, source)
    return {"text_bytes": check(source, str(file), None, sha256)}


@stage(version=1)
def local_tokens(file: Input, tokens: Output, dtype: str = "uint16") -> Facts:
    """Take a file of tokens of this machine, checked as a download is."""
    shutil.copyfile(file, tokens)
    return {"dtype": dtype, "tokens": check_raw(tokens, str(file), dtype)}


def check(source: Path, name: str, bytes: int | None, sha256: str | None) -> int:
    """Raises ValueError unless a gz file is whole and what the table says; bytes of its text."""
    gz.refuse_other_content(source, name)
    check_known(source, name, bytes, sha256)
    text_bytes = gz.check(source, name)
    if text_bytes == 0:
        raise ValueError(f"{name}: expected lines, found an empty source. Take it from the list")
    return text_bytes


def check_known(path: Path, name: str, bytes: int | None, sha256: str | None) -> None:
    """Raises ValueError unless a file has the length and the sha256 that the table says."""
    if bytes is not None and (size := path.stat().st_size) != bytes:
        raise ValueError(other_size(name, bytes, size))
    if sha256 is not None and (found := digest_of(path)) != sha256:
        raise ValueError(
            f"{name}: expected sha256 {sha256} by the source table, found {found}. If the file "
            "was changed on purpose, correct the table"
        )


def other_size(name: str, bytes: int, found: int) -> str:
    return (
        f"{name}: expected {bytes:,} bytes by the source table, found {found:,}. If the file was "
        "changed on purpose, correct the table"
    )


def check_raw(path: Path, name: str, dtype: str) -> int:
    """Raises ValueError unless a file can be raw tokens; how many there are."""
    from olmo.data import raw  # numpy is only for who has tokens
    from olmo.data.files import TokenFile, bytes_per_token

    width = bytes_per_token(dtype)
    with open(path, "rb") as file:
        raw.check_is_raw(name, file.read(64), dtype)
    size = path.stat().st_size
    if size == 0 or size % width:
        raise ValueError(f"{name}: expected tokens of {width} bytes each, found {size:,} bytes")
    start = TokenFile(path, dtype).read(0, 1 << 16)
    wider = raw.guess_wider_dtype(start, 1 << 8 * width)  # the vocabulary is the trainer's to know
    if wider is not None and wider[1]:
        raise ValueError(f"{name}: expected {dtype}, found {wider[0]}; set data.memmap_dtype to it")
    return size // width
