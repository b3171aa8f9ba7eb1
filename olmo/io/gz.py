"""Gz files of JSON lines, the form in which text travels from sources to tokens.

Reading turns every way in which a gz file can be broken into one sentence, and a file counts as
read only when its last checksum has been compared. Writing leaves out the time and the name that
gzip usually adds, so that the same lines give the same bytes.
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

LEVEL = 1  # isal's level 1: near the size of gzip -3, at many times its speed
BUFFER_BYTES = 1 << 20
BLOCK_BYTES = 1 << 18  # what is decompressed at a time: it stays in the processor's cache
TAIL_BYTES = 1 << 12  # of a block: most often a line ends in it
MAGIC = file_types.GZIP
LINE_LIMIT_BYTES = (
    1 << 30
)  # bytes; documents.max_line_bytes is no more, so the pipeline writes none


@contextmanager
def reading(
    path: Path, name: str | None = None, longest: int | None = LINE_LIMIT_BYTES
) -> Iterator[BinaryIO]:
    """A gz file's decompressed bytes as a file whose iteration gives lines.

    A line of more than `longest` bytes, its end included, is longer than that here too, but what
    comes after another BLOCK of it is left out: it takes no more memory, whatever a few bytes of
    gzip hold. None: nothing is left out, for who reads no lines.

    Raises ValueError, naming the file by `name`, when it is empty, is not gzip (a web page, say),
    stops before its end, or does not match its own checksum. A cut shows only at the end: who
    stops reading early has not checked the file.
    """
    from isal import igzip
    from isal.igzip_lib import IsalError

    name = name or str(path)
    check_is_gzip(path, name)
    try:
        # Not igzip.open: a buffer asks for `closed` with every line, which is Python code there.
        with open(path, "rb") as file:
            decompressed = cast(io.RawIOBase, igzip._IGzipReader(file, BLOCK_BYTES))
            if longest is not None:
                decompressed = _Shortened(decompressed, longest)
            with io.BufferedReader(decompressed, BLOCK_BYTES) as lines:
                yield cast(BinaryIO, lines)
    except EOFError as error:
        check_trailing_bytes(path, name)
        raise ValueError(
            f"{name}: truncated: {path.stat().st_size:,} bytes of gzip end before their "
            "end-of-stream mark. Fetch the file again."
        ) from error
    except (gzip.BadGzipFile, IsalError) as error:  # type: ignore[misc]
        check_trailing_bytes(path, name)
        raise ValueError(
            f"{name}: corrupt: expected a gzip stream that matches its own checksum, found: "
            f"{error}. Fetch the file again."
        ) from error


class _Shortened(io.RawIOBase):
    """A stream without the rest of lines of which more than `longest` bytes went by already."""

    closed = False  # which the buffer asks for with every line: it must not be Python code

    def __init__(self, stream: io.RawIOBase, longest: int) -> None:
        self.stream, self.longest = stream, longest
        self.line = 0  # bytes so far of the line that we are in

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
    """Raises ValueError where whole gzip members are followed by what is none.

    Zeros are no fault: tapes and `tar` pad files with them, and gzip passes over them too.
    """
    end = 0  # of the last whole member
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
        f"{size - at:,} bytes of trailing garbage ({rest[:16]!r}…). Fetch the file again; if they "
        f"are there again, cut them off by `{command}`, and put that in its place"
    )


def check_is_gzip(path: Path, name: str) -> None:
    """Raises ValueError unless the file begins as gzip does, saying what it looks like instead."""
    with open(path, "rb") as file:
        start = file.read(512)
    if start.startswith(MAGIC):
        return
    found, command = file_types.detect_type(start)
    if "://" in name or not Path(name).exists():
        remedy = "Check its URL and fetch it again"
        if command:
            made = file_types.gz_command(urlparse(name).path.rpartition("/")[2] or "FILE", command)
            remedy = f"Download it, make gz of it by `{made}`, and name that in the recipe"
        raise ValueError(f"{name}: expected gzip, found {found}. {remedy}.")
    if not command and found.startswith("plain text"):
        command = f"{file_types.TEXT_TO_DOCUMENTS} {shlex.quote(name)}"
        remedy = f" Make a document of the whole file by `{command}`"
    else:
        remedy = f" Make one by `{file_types.gz_command(name, command)}`" if command else ""
    named = ", and name that in the recipe" if remedy and not name.endswith(".gz") else ""
    raise ValueError(
        f'{name}: expected a gz file of JSON lines with "id" and "text", found {found}.'
        f"{remedy}{named}"
    )


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A gz file to write lines to. Neither time nor name is stored: equal lines, equal bytes."""
    from isal import igzip

    # Buffered, because many small writes cost more than the compression itself.
    with (
        open(path, "wb") as file,
        igzip.IGzipFile("", "wb", LEVEL, fileobj=file, mtime=0) as compressed,
        io.BufferedWriter(cast(io.RawIOBase, compressed), BUFFER_BYTES) as lines,
    ):
        yield cast(BinaryIO, lines)


def conditions() -> dict[str, str]:
    """What the bytes that `writing` makes of equal lines depend on.

    isal compresses alike on every x86-64 processor from SSE4.2 (2008) on, and otherwise on ARM
    (bench/gz_bytes.py).
    """
    return {"machine": platform.machine()}


def verify_checksum(path: Path, name: str | None = None) -> int:
    """Reads a gz file to its end, so that its checksums are compared. Returns bytes of text."""
    size = 0
    with reading(path, name, longest=None) as file:
        while block := file.read(BUFFER_BYTES):
            size += len(block)
    return size
