"""Gz files of JSON lines, the format of text from sources to tokens.

Reading reports every kind of broken gz file in one sentence, and compares the checksum at the end.
Writing omits gzip's time and name, so equal lines give equal bytes.
"""

from __future__ import annotations

import gzip
import io
import os
import platform
import shlex
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import urlparse

from olmo.io import file_types

LEVEL = 1  # of isal: near the size of gzip -3, at many times its speed
BUFFER_BYTES = 1 << 20
BLOCK_BYTES = 1 << 18  # decompressed at a time; fits the processor's cache
TAIL_BYTES = 1 << 12  # the end of a block, in which usually a line ends
MAGIC = file_types.GZIP
LINE_LIMIT_BYTES = (
    1 << 30
)  # documents.max_line_bytes is at most this, so the pipeline writes no longer line


@contextmanager
def reading(
    path: Path, name: str | None = None, longest: int | None = LINE_LIMIT_BYTES
) -> Iterator[BinaryIO]:
    """The decompressed bytes of a gz file, as a binary file that iterates over lines.

    Args:
        name: of the file in errors.
        longest: a line of more bytes, with its newline, is cut, but stays longer than this: it
            costs no more memory, however many bytes it has. None: no line is cut.

    Raises:
        ValueError: the file is empty, not gzip, truncated, or does not match its checksum. The
            last two are detected at the end of the file only.
    """
    from isal import igzip
    from isal.igzip_lib import IsalError

    name = name or str(path)
    check_is_gzip(path, name)
    try:
        # Not igzip.open: BufferedReader reads `closed` for every line, there a Python property.
        with open(path, "rb") as file:
            decompressed = cast(io.RawIOBase, igzip._IGzipReader(file, BLOCK_BYTES))
            if longest is not None:
                decompressed = CutLines(decompressed, longest)
            with io.BufferedReader(decompressed, BLOCK_BYTES) as lines:
                yield cast(BinaryIO, lines)
    except EOFError as error:
        check_trailing_bytes(path, name)
        raise ValueError(
            f"{name}: truncated: {path.stat().st_size:,} bytes of gzip end before their "
            "end-of-stream mark. Download the file again."
        ) from error
    except (gzip.BadGzipFile, IsalError) as error:  # type: ignore[misc]
        check_trailing_bytes(path, name)
        raise ValueError(
            f"{name}: corrupt: expected a gzip stream that matches its own checksum, found: "
            f"{error}. Download the file again."
        ) from error


def read_beginning(path: Path, name: str) -> Iterator[bytes]:
    """The decompressed bytes of the first bytes of a gz file, as far as they go.

    Not by `reading`, which loses the last block of a file without an end.

    Raises:
        ValueError: these bytes are not gzip.
    """
    check_is_gzip(path, name)
    member, is_new = zlib.decompressobj(wbits=31), True
    with open(path, "rb") as file:
        while block := file.read(1 << 14):
            while block := block.lstrip(b"\0") if is_new else block:  # zeros between members
                try:
                    yield member.decompress(block)
                except zlib.error as error:
                    raise ValueError(
                        f"{name}: corrupt: expected a gzip stream, found: {error}. Download the "
                        "file again."
                    ) from error
                block, is_new = member.unused_data, member.eof
                if is_new:
                    member = zlib.decompressobj(wbits=31)


class CutLines(io.RawIOBase):
    """A stream that cuts lines after more than `longest` bytes."""

    closed = False  # read by the buffer for every line: an attribute is faster than a property

    def __init__(self, stream: io.RawIOBase, longest: int) -> None:
        self.stream, self.longest = stream, longest
        self.line = 0  # bytes so far of the present line

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while count := self.stream.readinto(buffer) or 0:
            end = bytes(buffer[max(count - TAIL_BYTES, 0) : count])
            if self.line <= self.longest and (last := end.rfind(b"\n")) >= 0:
                self.line = len(end) - last - 1
                return count
            block = bytes(buffer[:count])
            left_out = block.find(b"\n") if self.line > self.longest else 0
            if left_out < 0:
                continue
            buffer[: count - left_out] = block[left_out:]
            last = block.rfind(b"\n")
            self.line = count - last - 1 if last >= 0 else self.line + count
            return count - left_out
        return 0


def check_trailing_bytes(path: Path, name: str) -> None:
    """Raises ValueError if complete gzip members are followed by other bytes.

    Zeros are allowed: tapes and `tar` pad files with them, and gzip skips them too.
    """
    end = 0  # of the last complete member
    with open(path, "rb") as file:
        while True:
            member = zlib.decompressobj(wbits=31)
            while not member.eof:
                block = member.unconsumed_tail or file.read(BLOCK_BYTES)
                try:
                    if not member.decompress(block, BUFFER_BYTES) and not block:
                        return
                except zlib.error:
                    return
            end = file.tell() - len(member.unused_data)
            file.seek(end)
            while (block := file.read(BLOCK_BYTES)) and not block.strip(b"\0"):
                pass
            rest = block.lstrip(b"\0")
            if not MAGIC.startswith(rest[:2]):
                break
            file.seek(-len(rest), os.SEEK_CUR)
        at, size = file.tell() - len(rest), path.stat().st_size
    file_here = "FILE.gz" if "://" in name or not Path(name).exists() else shlex.quote(name)
    command = f"head -c {end} {file_here} > MENDED.gz"
    raise ValueError(
        f"{name}: expected the end of the file or another gzip member at byte {at:,}, found "
        f"{size - at:,} bytes of trailing garbage ({rest[:16]!r}…). Download the file again; if "
        f"it still has them, cut them off with `{command}`, and replace the file by that"
    )


def check_is_gzip(path: Path, name: str) -> None:
    """Raises ValueError unless the file begins like gzip; the error names its actual type."""
    with open(path, "rb") as file:
        start = file.read(512)
    if start.startswith(MAGIC):
        return
    found, command = file_types.detect_type(start)
    if "://" in name or not Path(name).exists():
        remedy = "Check its URL and download it again"
        if command:
            made = file_types.format_gz_conversion(
                urlparse(name).path.rpartition("/")[2] or "FILE", command
            )
            remedy = (
                f"Download it, convert it to gz with `{made}`, and name that file in the recipe"
            )
        raise ValueError(f"{name}: expected gzip, found {found}. {remedy}.")
    named = ", and name that file in the recipe"
    if command:
        made = file_types.format_gz_conversion(name, command)
        remedy = f"Convert it with `{made}`{named * (not name.endswith('.gz'))}"
    elif found.startswith("plain text"):
        text = shlex.quote(f"{name.removesuffix('.gz')}.txt")
        remedy = f"Name it as text with `mv {shlex.quote(name)} {text}`{named}"
    else:
        remedy = "Replace the file, or remove it from the recipe"
    raise ValueError(
        f'{name}: expected a gz file of JSON lines with "id" and "text", found {found}. {remedy}'
    )


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A gz file to write lines to, without time and name: equal lines give equal bytes."""
    from isal import igzip

    # Buffered, because many small writes cost more than the compression itself.
    with (
        open(path, "wb") as file,
        igzip.IGzipFile("", "wb", LEVEL, fileobj=file, mtime=0) as compressed,
        io.BufferedWriter(cast(io.RawIOBase, compressed), BUFFER_BYTES) as lines,
    ):
        yield cast(BinaryIO, lines)


def conditions() -> dict[str, str]:
    """What the bytes of `writing` depend on besides the lines, for a stage's record.

    isal gave the same bytes on all x86-64 processors since SSE4.2 (2008), and other bytes on ARM
    (bench/gz_bytes.py). Twice a small file had other bytes on one machine; the cause is unknown
    (docs/lab.md, 2026-11-30).
    """
    return {"machine": platform.machine()}


def verify_checksum(path: Path, name: str | None = None) -> int:
    """Read a gz file to its end, which compares its checksums; the bytes of its text."""
    size = 0
    with reading(path, name, longest=None) as file:
        while block := file.read(BUFFER_BYTES):
            size += len(block)
    return size
