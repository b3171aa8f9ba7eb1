"""The type of a file by its first bytes, and the command that converts it to gz."""

from __future__ import annotations

import codecs
import shlex
from pathlib import Path

GZIP = b"\x1f\x8b"
ZSTD = b"\x28\xb5\x2f\xfd"
BOM = b"\xef\xbb\xbf"
POLARS_TO_JSON_LINES = (
    "uv run python -c 'import polars, sys; polars.{}(sys.argv[1]).write_ndjson(sys.stdout)'"
)
ARRAY_TO_JSON_LINES = (
    "python3 -c 'import json, sys; "
    '[print(json.dumps(row)) for row in json.load(open(sys.argv[1], encoding="utf-8"))]\''
)

# First bytes, name, and the command that writes the text of a file (its last argument) to stdout.
SIGNATURES = (
    (ZSTD, "zstd", "zstd -dc"),
    (b"BZh", "bzip2", "bzip2 -dc"),
    (b"\xfd7zXZ\0", "xz", "xz -dc"),
    (b"\x04\x22\x4d\x18", "lz4", "lz4 -dc"),
    (b"\x1f\x9d", "compress (.Z)", "gzip -dc"),
    (b"PK\x03\x04", "a zip archive", "unzip -p"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "7z e -so"),
    (b"PAR1", "parquet", POLARS_TO_JSON_LINES.format("read_parquet")),
    (b"ARROW1", "Arrow's IPC format", POLARS_TO_JSON_LINES.format("read_ipc")),
    (BOM, "text that begins with a byte order mark (UTF-8)", "tail -c +4"),
    (b"\xff\xfe\0\0", "UTF-32 text", "iconv -f UTF-32 -t UTF-8"),
    (b"\xff\xfe", "UTF-16 text", "iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "UTF-16 text", "iconv -f UTF-16 -t UTF-8"),
    (b"{\0", "UTF-16 text", "iconv -f UTF-16LE -t UTF-8"),
    (b"\0{", "UTF-16 text", "iconv -f UTF-16BE -t UTF-8"),
    (b"\x93NUMPY", "a numpy file", ""),
    (b"SQLite format 3", "an SQLite database", ""),
    (b"%PDF", "PDF", ""),
)
ARCHIVE_SUFFIXES = (
    ".zst",
    ".bz2",
    ".xz",
    ".lz4",
    ".Z",
    ".zip",
    ".7z",
    ".tar",
    ".parquet",
    ".arrow",
)
LFS_START = b"version https://git-lfs.github.com/"
HTML_STARTS = (b"<!doctype", b"<html", b"<?xml", b"<head")


def detect_type(start: bytes) -> tuple[str, str]:
    """The type of a file by its first 512 bytes, and the command that writes its text to stdout.

    The file's name is to be appended to the command; "" if there is no command.
    """
    for magic, kind, command in SIGNATURES:
        if start.startswith(magic):
            return kind, command
    if start[257:262] == b"ustar":
        return "a tar archive", "tar -xOf"
    if start.startswith(GZIP):
        return "gzip", "gzip -dc"
    text = start.lstrip()
    if not start:
        return "an empty file", ""
    if text.lower().startswith(HTML_STARTS):
        return f"a web page, most likely a server's error message ({start[:60]!r}…)", ""
    if start.startswith(LFS_START):
        return "a Git LFS pointer, no data: `git lfs pull` fetches that", ""
    if text.startswith(b"{"):
        return "JSON lines that are not compressed", "cat"
    if text.startswith(b"["):
        return "a JSON array", ARRAY_TO_JSON_LINES
    try:
        letters = codecs.getincrementaldecoder("utf-8")().decode(text)  # the last one may be cut
        plain = not any(letter < " " and letter not in "\t\n\r\f" for letter in letters)
    except UnicodeDecodeError:
        plain = False
    return f"{'plain text' if plain else 'something else'} ({start[:16]!r}…)", ""


def has_signature(start: bytes) -> bool:
    """Whether a file's first bytes are those of an archive, a binary format or UTF-16."""
    magic = tuple(magic for magic, _, _ in SIGNATURES)
    return start.startswith((*magic, LFS_START)) or start[257:262] == b"ustar"


def read_text(path: Path, name: str) -> str:
    """The text of a small file: UTF-8 without a byte order mark.

    Raises:
        ValueError: it is of another type; with the command that converts it.
    """
    content = path.read_bytes()
    try:
        if not content.startswith(BOM):
            return content.decode()
    except UnicodeDecodeError:
        pass
    found, command = detect_type(content[:512])
    remedy = f"; convert it with `{command} {shlex.quote(name)}`" if command else ""
    raise ValueError(f"{name}: expected text in UTF-8, found {found}{remedy}")


def format_gz_conversion(name: str, command: str) -> str:
    """A command line that converts the file `name` to gz; `command` writes its text to stdout.

    A file with the suffix .gz is first renamed to <name>.orig.
    """
    path, quoted = Path(name), shlex.quote(name)
    if path.suffix == ".gz":
        kept = shlex.quote(f"{name}.orig")
        return f"mv {quoted} {kept} && {command} {kept} | gzip > {quoted}"
    stem = str(path.with_suffix("")) if path.suffix in ARCHIVE_SUFFIXES else name
    return f"{command} {quoted} | gzip > {shlex.quote(f'{stem}.gz')}"


def explain_non_json(line: bytes) -> str:
    """Why a line of a gz file is no JSON, and the command that repairs the file; "" if unknown."""
    unpacked = "gzip -dc FILE"
    if line.startswith(BOM):
        command = f"{unpacked} | LC_ALL=C sed 's/^\\xef\\xbb\\xbf//' | gzip > MENDED.gz"
        return f"it begins with a byte order mark; remove it: `{command}`"
    kind, command = detect_type(line[:512])
    if kind.startswith("UTF-"):
        return f"it is {kind}: `{unpacked} | {command} | gzip > MENDED.gz`"
    if kind == "a tar archive":
        return f"it is {kind} within gzip: `tar -xzOf FILE | gzip > MENDED.gz`"
    return "it is gzip within gzip: `gzip -dc FILE > MENDED.gz`" if kind == "gzip" else ""
