"""Beginnings of sources: fetched, checked and decompressed as far as they go."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlparse

from olmo.corpus.formats import open_decompressed
from olmo.corpus.sources import DIRECT, Transfer, check_against_table, wrong_size
from olmo.io import file_types, gz
from olmo.io.beginnings import fetch_beginning
from olmo.runtime.urls import stash_secrets
from olmo.store.stage import Facts, Output, Unhashed, stage

MAX_BYTES = 2 << 20  # that are read of a source
MAX_TEXT_BYTES = 1 << 30  # that a beginning may expand to
SMALL_BLOCK_BYTES = 1 << 12  # at the end of a cut zstd stream the last block is lost


@stage(version=1)
def beginning(
    url: str,
    head: Output,
    max_bytes: int = MAX_BYTES,
    sha256: Unhashed[str | None] = None,
    transfer: Unhashed[Transfer] = DIRECT,
) -> Facts:
    """Download the first `max_bytes` bytes of a source, and check them as far as they go.

    If `url` fails, the mirrors are tried in order. Facts: size (of the whole file), received.

    Raises:
        ValueError: no place gives the file, or another one than the source table says.
    """
    failures = []
    for place in stash_secrets((url, *transfer.mirrors)):
        try:
            found = fetch_beginning(place, max_bytes, transfer.progress)
            size = transfer.bytes if found.size is None else found.size
            if size is None:
                raise ValueError(
                    f"{place}: expected the file's size from the server, found none; write it into "
                    "a source table (sources: {table: …}), as the column bytes"
                )
            if transfer.bytes not in (None, size):
                raise ValueError(wrong_size(place, transfer.bytes or 0, size))
            head.write_bytes(found.content)
            check_beginning(head, place, size)
            if len(found.content) == size:
                check_against_table(head, place, size, sha256)
        except ValueError as error:
            failures.append(str(error))
            continue
        return {"url": url, "from": place, "size": size, "received": len(found.content)}
    raise ValueError("; then ".join(failures))


def check_beginning(head: Path, name: str, size: int) -> None:
    """Raises ValueError unless a beginning is sound, of a file with so many bytes in all."""
    with open(head, "rb") as start:
        found, _ = file_types.detect_type(start.read(512))
    if found == "an empty file" or found.startswith("a web page"):
        raise ValueError(f"{name}: expected data, found {found}")
    if (urlparse(name).path if "://" in name else name).endswith(".gz"):
        gz.check_is_gzip(head, name)
    for _ in read_decompressed(head, name, is_whole=head.stat().st_size == size):
        pass


def read_decompressed(head: Path, name: str, is_whole: bool) -> Iterator[bytes]:
    """The bytes of a file, or of its beginning as far as they can be decompressed.

    Raises:
        ValueError: it is damaged, or expands to more than MAX_TEXT_BYTES.
    """
    size = 0
    for block in read_whole(head, name) if is_whole else read_cut(head, name):
        size += len(block)
        if size > MAX_TEXT_BYTES:
            raise ValueError(
                f"{name}: expected {MAX_TEXT_BYTES:,} bytes of text at most from its first "
                f"{head.stat().st_size:,} bytes, found more; remove it from the sources"
            )
        yield block


def read_whole(path: Path, name: str) -> Iterator[bytes]:
    with open_decompressed(path, name) as stream:
        while block := stream.read(gz.BLOCK_BYTES):
            yield block


def read_cut(head: Path, name: str) -> Iterator[bytes]:
    """The decompressed bytes of a file without its end."""
    with open(head, "rb") as file:
        start = file.read(4)
        if start.startswith(gz.MAGIC):
            yield from gz.read_beginning(head, name)
        elif start == file_types.ZSTD:
            import pyarrow

            try:
                with pyarrow.input_stream(str(head), compression="zstd") as stream:
                    while block := stream.read(SMALL_BLOCK_BYTES):
                        yield block
            except OSError as error:
                if "Truncated" not in str(error):
                    raise ValueError(
                        f"{name}: damaged zstd: {error}. Download the file again"
                    ) from error
        else:
            yield start
            while block := file.read(gz.BLOCK_BYTES):
                yield block
