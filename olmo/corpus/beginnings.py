"""Beginnings of sources: fetched, and measured, for an estimate of the whole (olmo.corpus.sample).

What a beginning has is found by the stages' own code: `converted` and `documents`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO, cast
from urllib.parse import urlparse

from olmo.corpus.documents import REASONS, DocumentsSection, documents, parse_document
from olmo.corpus.formats import (
    RowsSection,
    converted,
    needs_conversion,
    open_decompressed,
    split_suffixes,
)
from olmo.corpus.sources import DIRECT, Transfer, check_against_table, wrong_size
from olmo.io import file_types, gz
from olmo.io.beginnings import fetch_beginning
from olmo.runtime.log import log
from olmo.runtime.urls import stash_secrets
from olmo.store.stage import Facts, Output, Unhashed, stage

MAX_BYTES = 2 << 20  # that are read of a source
MAX_TEXT_BYTES = 1 << 30  # that a beginning may expand to
SMALL_BLOCK_BYTES = 1 << 12  # at the end of a cut zstd stream the last block is lost
TOKENIZED_BYTES = 1 << 20  # of a beginning's text
Count = Callable[[list[str]], int]  # texts → their tokens, without those that end documents
Measured = dict[
    str, float
]  # an amount's name → how much of it the whole source is expected to give


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


def write_whole_rows(head: Path, name: str, is_whole: bool, rows: RowsSection, cut: Path) -> float:
    """Write a beginning's complete rows, decompressed; the share of its text that they are.

    Raises:
        ValueError: it is damaged, or has no complete row.
    """
    kind, size, end, quotes = split_suffixes(name)[0], 0, 0, 0
    with open(cut, "wb") as file:
        for block in read_decompressed(head, name, is_whole):
            file.write(block)
            size += len(block)
    if is_whole:
        return 1.0
    with open(cut, "rb+") as file:
        if rows.takes_whole_files(name):
            file.seek(max(0, size - 4))
            last = file.read()
            end = size - len(last) + len(last.decode(errors="ignore").encode())
        else:
            at = 0
            for line in cast(BinaryIO, file):
                at += len(line)
                quotes += line.count(b'"') if kind in (".csv", ".tsv") else 0
                if line.endswith(b"\n") and quotes % 2 == 0:  # not within a quoted field
                    end = at
        if end == 0:
            raise ValueError(
                f"{name}: expected a complete row in its first {head.stat().st_size:,} bytes, "
                "found none: it cannot be sampled; `olmo plan` without a sample takes fixed rates"
            )
        file.truncate(end)
    return end / size


def measure(
    head: Path,
    name: str,
    size: int,
    files: int,
    weight: float,
    rows: RowsSection,
    config: DocumentsSection,
    count_tokens: Count | None,
) -> Measured:
    """What a source is expected to give, by its beginning: exactly, if that is all of it.

    documents, text_bytes (UTF-8) and tokens are those of training documents; source_bytes is what
    the stage `documents` reads, documents_bytes what it writes for training. `lines` were read.

    Args:
        size: bytes of the source.
        files: text files that the source is made of.
        weight: how often the recipe takes the source's documents.

    Raises:
        ValueError: the beginning is damaged, or has no document's row.
    """
    import polars

    read = head.stat().st_size
    is_whole = read == size
    everything = replace(config, keep_one_in=1, offset=0, heldout_share=0.0, allow=list(REASONS))
    with TemporaryDirectory() as folder:
        cut, source, kept, heldout, table = (Path(folder, part) for part in "csdht")
        share = write_whole_rows(head, name, is_whole, rows, cut)
        if needs_conversion(name, rows):
            converted.build(files=[cut], source=source, names=[name], rows=rows)
            source_bytes = source.stat().st_size
        else:
            with open(cut, "rb") as text, gz.writing(source) as lines:
                lines.writelines(text)
            source_bytes = round(read * share)
        made = documents.build(
            source=source,
            documents=kept,
            heldout=heldout,
            table=table,
            name=name,
            config=config if is_whole else everything,
            weight=weight if is_whole else 1.0,
        )
        train = polars.read_parquet(table).filter(split="train")
        found = {
            "documents": made["documents"],
            "text_bytes": int(train["bytes"].sum()),
            "documents_bytes": kept.stat().st_size,
        }
        if count_tokens is not None:
            per_byte = tokens_per_byte(kept, count_tokens)
            found["tokens"] = found["text_bytes"] * per_byte + found["documents"]
    if is_whole:
        return {**found, "source_bytes": source_bytes, "lines": made["lines"]}
    scale = size / (read * share)
    if forbidden := sorted(set(made["drops"]) - set(config.allow)):
        log.warning(
            f"{name}: of its first {made['lines']:,} lines, some are no documents, for reasons "
            f"that the recipe does not allow: {', '.join(forbidden)}; the stage documents will fail"
        )
    taken = scale * weight * (1 - config.heldout_share) / config.keep_one_in
    measured = {amount: number * taken for amount, number in found.items()}
    # A cut falls into a long row more often than into a short one: by the bytes of complete rows
    # alone there would be too many.
    measured["documents"] *= share
    if rows.takes_whole_files(name):
        measured["documents"] = found["documents"] * files * taken / scale
    return {**measured, "source_bytes": source_bytes * scale, "lines": made["lines"]}


def tokens_per_byte(path: Path, count_tokens: Count) -> float:
    """Tokens of a byte of text, by the first documents of a file."""
    texts, size = [], 0
    with gz.reading(path) as lines:
        for line in lines:
            _, text, _ = parse_document(line)
            texts.append((text or "").strip())
            size += len((text or "").encode())
            if size >= TOKENIZED_BYTES:
                break
    return count_tokens(texts) / size if size else 0.0


@cache
def open_tokenizer(path: Path) -> Count:
    """The counting function of a tokenizer.json."""
    import tokenizers

    try:
        model = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # its own have no class
        raise ValueError(f"{path}: expected a tokenizer.json, found: {error}") from error
    model.no_truncation()

    def count(texts: list[str]) -> int:
        return sum(len(found) for found in model.encode_batch_fast(texts, add_special_tokens=False))

    return count
