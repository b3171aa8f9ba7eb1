"""Sources in other formats than Dolma's: JSON lines, parquet, csv and text, compressed or not.

Each row becomes a line {"id", "text", "metadata": {"file", "row"}}; a malformed one, a line that
`olmo documents` drops and counts. So the number of a document's line is that of its row, or, of
text, of its line or file.
"""

from __future__ import annotations

import contextlib
import csv
import io
import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from os.path import splitext
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import urlparse

import msgspec

from olmo.config import BaseConfig
from olmo.corpus import json_lines
from olmo.io import file_types, gz
from olmo.store.stage import Facts, Inputs, Output, stage

BATCH_BYTES = 1 << 24  # of a parquet file, decoded at a time, about
ALL = ""  # as a text_field: every field
CONVERTED = ".converted.gz"  # follows the name of the file that was converted
NOT_UTF8 = b"\xff"  # a line that `olmo documents` drops as such
Row = dict[str, Any]  # "id", None if there is none, and "text"


class DocumentUnit(StrEnum):
    """What a document is made from."""

    file = "file"
    line = "line"
    row = "row"


@dataclass
class RowsSection(BaseConfig):
    """What becomes a document, in sources of other formats than Dolma's."""

    text_field: str = "text"  # that has the text
    # None: "id" where a row has one, else the file and the row's number.
    id_field: str | None = None
    # Of text: file (None) or line; of others: row. `row` converts gz JSON lines too, which gives
    # ids to those without, and takes a text file as one row.
    one_document_per: DocumentUnit | None = None

    def takes_whole_files(self, place: str) -> bool:
        """Whether a source is a text file that becomes one document."""
        return split_suffixes(place)[0] == ".txt" and self.one_document_per != "line"


EVERY_ROW = RowsSection()


def needs_conversion(place: str, rows: RowsSection) -> bool:
    """Whether a source is anything but gz JSON lines with "id" and "text"."""
    kind, _ = split_suffixes(place)
    is_dolma = kind == ".jsonl" and urlparse(place).path.endswith(".gz")
    return kind is not None and not (is_dolma and rows == EVERY_ROW)


def split_suffixes(place: str) -> tuple[str | None, str]:
    """(the format's suffix, the compression's) of a file's name; None for an unknown format.

    >>> split_suffixes("a/b.ndjson.zst"), split_suffixes("b.gz"), split_suffixes("b.pdf")
    (('.jsonl', '.zst'), ('.jsonl', '.gz'), (None, ''))
    """
    stem, suffix = splitext((urlparse(place).path if "://" in place else place).lower())
    if suffix not in (".gz", ".zst"):
        return SUFFIXES.get(suffix), ""
    return SUFFIXES.get(splitext(stem)[1], ".jsonl"), suffix  # .jsonl: wiki.2024.gz


@stage(version=1, conditions=gz.conditions)
def converted(
    files: Inputs, source: Output, names: list[str], rows: RowsSection = EVERY_ROW
) -> Facts:
    """Convert files to one gz file of documents.

    Args:
        names: of the files, in ids and messages; their suffixes are the formats.

    Raises:
        ValueError: a file is damaged, of another format than its name says, or has no such field.
    """
    count = 0
    with gz.writing(source) as lines:
        for path, name in zip(files, names, strict=True):
            for number, line in enumerate(read_lines(Path(path), name, rows), 1):
                lines.write(
                    line if isinstance(line, bytes) else dump_document(line, name, number, rows)
                )
                count += 1
    return {"rows": count, "text_bytes": gz.verify_checksum(source, names[0])}


def dump_document(row: Row, name: str, number: int, rows: RowsSection) -> bytes:
    """A document's line. An id that is missing, and not named, is the file and the row's number."""
    if row["id"] is None and rows.id_field is None:
        row["id"] = f"{name}:{number}"
    if type(row["id"]) is int:
        row["id"] = str(row["id"])
    for key in ("id", "text"):
        if isinstance(row[key], bytes):
            row[key] = row[key].decode(errors="surrogateescape")
    row["metadata"] = {"file": name, "row": number}
    try:
        return json_lines.dump_line(row, default=str)
    except UnicodeEncodeError:  # bytes that are not UTF-8, decoded to surrogates
        return NOT_UTF8 + json_lines.dump_line({"metadata": row["metadata"]})


def find_place(line: bytes) -> str | None:
    """The file and the row that a converted line was made from; None for another line."""
    try:
        metadata = msgspec.json.decode(line.removeprefix(NOT_UTF8))["metadata"]
        return f"{metadata['file']}:{metadata['row']}"
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def read_fields(path: Path, name: str) -> Iterator[dict[str, Any]]:
    """The rows of a file with all their fields; those that no row could be made of are left out."""
    rows = RowsSection(text_field=ALL)
    for row in read_lines(path, name, rows):
        if isinstance(row, dict):
            yield row


def read_lines(path: Path, name: str, rows: RowsSection) -> Iterator[Row | bytes]:
    """The rows of a file, in order; as bytes, lines that no row could be made of."""
    kind, _ = split_suffixes(name)
    assert kind is not None, name
    with open(path, "rb") as file:
        check_format(file.read(512), kind, name, rows)
    if kind == ".parquet":
        yield from read_parquet(path, name, rows)
        return
    with open_decompressed(path, name) as stream:
        yield from READERS[kind](stream, name, rows)


def check_format(start: bytes, kind: str, name: str, rows: RowsSection) -> None:
    """Raises ValueError if a file's first bytes are those of another format than its name's."""
    found, command = file_types.detect_type(start)
    is_text = start.startswith((gz.MAGIC, file_types.ZSTD, file_types.BOM))
    is_text = is_text or not file_types.has_signature(start)
    if found.startswith("a web page") and kind != ".txt":
        is_text = False
    if not (found == "parquet" if kind == ".parquet" else is_text):
        made = file_types.format_gz_conversion(name, command)
        remedy = f"; convert it with `{made}`, and name that file in the recipe" if command else ""
        raise ValueError(f"{name}: expected {NAMES[kind]}, found {found}{remedy}")
    if rows.one_document_per == DocumentUnit.file and kind != ".txt":
        raise ValueError(
            f"{name}: expected one_document_per: line or row for {NAMES[kind]}, found file"
        )


@contextlib.contextmanager
def open_decompressed(path: Path, name: str) -> Iterator[BinaryIO]:
    """The bytes of a file without gzip, zstd and byte order mark, whatever its name says.

    A line longer than gz.LINE_LIMIT_BYTES is cut, but stays too long for a document.
    """
    with open(path, "rb") as file:
        start = file.read(4)
    if start.startswith(gz.MAGIC):
        with gz.reading(path, name) as lines:
            yield skip_byte_order_mark(lines)
    elif start == file_types.ZSTD:
        import pyarrow

        try:
            with (
                pyarrow.input_stream(str(path), compression="zstd") as raw,
                cut_lines(raw) as lines,
            ):
                yield skip_byte_order_mark(lines)
        except (pyarrow.ArrowException, OSError) as error:
            if getattr(error, "errno", None) is not None:
                raise  # the disk's
            raise ValueError(f"{name}: damaged zstd: {error}. Download the file again") from error
    else:
        with open(path, "rb", buffering=0) as raw, cut_lines(raw) as lines:
            yield skip_byte_order_mark(lines)


def cut_lines(raw: Any) -> BinaryIO:
    """A buffered stream; see gz.reading about lines that are too long."""
    cut = gz.CutLines(raw, gz.LINE_LIMIT_BYTES)
    return cast(BinaryIO, io.BufferedReader(cut, gz.BLOCK_BYTES))


def skip_byte_order_mark(lines: BinaryIO) -> BinaryIO:
    """The same stream, after a mark that some editors write."""
    if cast(io.BufferedReader, lines).peek(3).startswith(file_types.BOM):
        lines.read(3)
    return lines


def read_json(lines: BinaryIO, name: str, rows: RowsSection) -> Iterator[Row | bytes]:
    """The rows of JSON lines; of lines that are no object, their bytes."""
    decode = msgspec.json.Decoder().decode
    for number, line in enumerate(lines):
        if number == 0 and line.lstrip().startswith(b"["):
            command = file_types.format_gz_conversion(name, file_types.ARRAY_TO_JSON_LINES)
            raise ValueError(
                f"{name}: expected an object a line, found a JSON array; convert it with "
                f"`{command}`, and name that file in the recipe"
            )
        try:
            row = decode(line)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            row = None
        if not isinstance(row, dict):
            yield line if line.endswith(b"\n") else line + b"\n"
            continue
        if number == 0:
            check_fields(row, name, rows)
        yield pick(row, rows)


def read_csv(lines: BinaryIO, name: str, rows: RowsSection) -> Iterator[Row | bytes]:
    """The rows after the header of a csv file (as RFC 4180), or, of .tsv, between tabs."""
    csv.field_size_limit(gz.LINE_LIMIT_BYTES)
    text = io.TextIOWrapper(lines, encoding="utf-8", errors="surrogateescape", newline="")
    separator = "\t" if split_suffixes(name)[0] == ".tsv" else ","
    found = csv.reader(text, delimiter=separator, strict=True)
    filled = filter(None, found)  # an empty line is no row
    number = 0
    try:
        header = next(filled, None)
        if header is None:
            raise ValueError(f"{name}: expected a header, found an empty file")
        check_separator(header, name)
        check_fields(header, name, rows)
        for number, values in enumerate(filled, 1):  # noqa: B007
            if len(values) == len(header):
                yield pick(dict(zip(header, values, strict=True)), rows)
            else:
                yield json_lines.bad_row(f"{len(header)} fields", str(len(values)))
    except csv.Error as error:
        raise ValueError(
            f"{name}, line {found.line_num}: expected csv in row {number + 1}, found: {error}"
        ) from error
    finally:
        text.detach()


def check_separator(header: list[str], name: str) -> None:
    """Raises ValueError if the header of a csv file has one field that looks like several."""
    for separator, told in ((";", "';'"), ("\t", "'\\t'")):
        if len(header) == 1 and separator in header[0]:
            quoted = shlex.quote(name)
            raise ValueError(
                f"{name}: expected fields between commas (.csv) or tabs (.tsv), found {header[0]!r}"
                f'; convert it with `python3 -c "import csv, sys; csv.writer(sys.stdout).'
                f'writerows(csv.reader(sys.stdin, delimiter={told}))" < {quoted} > FILE.csv`, and '
                "name that file in the recipe"
            )


def read_parquet(path: Path, name: str, rows: RowsSection) -> Iterator[Row]:
    """The rows of a parquet file."""
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            columns = file.schema_arrow.names
            check_fields(columns, name, rows)
            if rows.text_field != ALL:
                check_is_text(file.schema_arrow.field(rows.text_field).type, name, rows)
            wanted = {rows.text_field, rows.id_field or "id"} & set(columns)
            wanted = set(columns) if rows.text_field == ALL else wanted
            groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
            widest = max([1, *(g.total_byte_size // max(g.num_rows, 1) for g in groups)])
            size = max(1, min(4096, BATCH_BYTES // widest))
            for batch in file.iter_batches(batch_size=size, columns=sorted(wanted)):
                for row in batch.to_pylist():
                    yield pick(row, rows)
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        raise ValueError(f"{name}: damaged parquet: {error}. Download the file again") from error


def check_is_text(kind: Any, name: str, rows: RowsSection) -> None:
    """Raises ValueError for a column of parquet that has no strings."""
    from pyarrow import types

    inner = kind.value_type if types.is_dictionary(kind) else kind
    if not (str(inner).endswith(("string", "binary", "_view")) or types.is_null(inner)):
        raise ValueError(
            f"{name}: expected strings in the field {rows.text_field}, found {kind}; name another "
            "field in the recipe (sources: {text_field: …})"
        )


def read_text(lines: BinaryIO, name: str, rows: RowsSection) -> Iterator[Row]:
    """A text file's one document, whose id is the file's name, or one a line."""
    if rows.one_document_per == "line":
        for number, line in enumerate(lines, 1):
            text = line.removesuffix(b"\n").removesuffix(b"\r")
            yield {"id": f"{name}:{number}", "text": text}
        return
    blocks, size = [], 0
    while size <= gz.LINE_LIMIT_BYTES and (block := lines.read(gz.BUFFER_BYTES)):
        blocks.append(block)
        size += len(block)
    if size > gz.LINE_LIMIT_BYTES:
        raise ValueError(
            f"{name}: expected a text of at most {gz.LINE_LIMIT_BYTES:,} bytes, since it becomes "
            "one document; found more. Make every line one: sources: {one_document_per: line}"
        )
    yield {"id": name, "text": b"".join(blocks)}


def check_fields(found: Iterable[str], name: str, rows: RowsSection) -> None:
    """Raises ValueError unless the fields of a file, or of its first row, are those wanted."""
    columns = list(found)
    for key in ("text_field", "id_field"):
        field = getattr(rows, key)
        if field not in (None, ALL) and columns.count(field) != 1:
            raise ValueError(
                f"{name}: expected one field {field}, found {', '.join(columns)}; name the field "
                f"in the recipe (sources: {{{key}: …}})"
            )


def pick(row: dict[str, Any], rows: RowsSection) -> Row:
    """The id and the text of a row."""
    if rows.text_field == ALL:
        return row
    return {"id": row.get(rows.id_field or "id"), "text": row.get(rows.text_field)}


READERS: dict[str, Callable[[BinaryIO, str, RowsSection], Iterator[Row | bytes]]] = {
    ".jsonl": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".txt": read_text,
}
NAMES = {
    ".jsonl": "JSON lines",
    ".csv": "csv",
    ".tsv": "csv with tabs",
    ".txt": "text",
    ".parquet": "parquet",
}
# A file's suffix → that of its format.
SUFFIXES = {
    **{suffix: suffix for suffix in NAMES},
    **dict.fromkeys((".json", ".ndjson"), ".jsonl"),
    **dict.fromkeys((".md", ".markdown", ".rst", ".text"), ".txt"),
}
