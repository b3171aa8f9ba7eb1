"""What text a folder has: formats, fields, documents and bytes, by reading some or all of it."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from statistics import fmean

from olmo.corpus.documents import REASONS, hash_fraction, parse_document, size_in_utf8
from olmo.corpus.formats import (
    DocumentUnit,
    RowsSection,
    dump_document,
    needs_conversion,
    read_fields,
    read_lines,
    split_suffixes,
)
from olmo.corpus.source_table import GROUP, find_local_files
from olmo.io import gz
from olmo.io.patterns import match_files
from olmo.pipeline.source_files import local_files

# A folder of more bytes is read in part: this many files, spread evenly, and so much of each.
MAX_BYTES, MAX_FILES, MAX_FILE_BYTES = 256 << 20, 64, 4 << 20
TOKENIZER_BYTES = 4 << 20  # of the sample of text that is kept
# Fields with the text or the id, by their usual names; else the longest one.
TEXT_FIELDS = ("text", "content", "body", "raw_content", "document", "article")
ID_FIELDS = ("id", "doc_id", "uuid", "url", "key")
MAX_DOCUMENT_BYTES = 128 << 20  # of a text file that becomes one document
HELDOUT_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2)
MAX_NAME = 64  # letters of a field's name
NO_ID = ("no-id", "bad-id")


@dataclass
class Survey:
    """The text of a folder; estimates if only a part was read."""

    patterns: list[str]
    files: int
    sources: int
    left_out: Counter[str]  # suffix → files of other kinds
    rows: RowsSection
    is_whole: bool  # all was read
    documents: int = 0
    text_bytes: int = 0
    drops: Counter[str] = field(default_factory=Counter)  # reason → rows
    first_drops: dict[str, str] = field(default_factory=dict)  # reason → file:row
    # Of what was read: bytes of text by source, of all and, by share, of held-out documents.
    bytes_read: Counter[str] = field(default_factory=Counter)
    heldout: dict[float, Counter[str]] = field(
        default_factory=lambda: {share: Counter() for share in HELDOUT_SHARES}
    )
    sample: list[tuple[float, str]] = field(default_factory=list)  # (hash of the id, text)

    @property
    def training_sample(self) -> list[str]:
        """Texts of the sample that no share holds out, or all if there are none."""
        most = HELDOUT_SHARES[-1]
        found = [text for fraction, text in self.sample if fraction >= most]
        return found or [text for _, text in self.sample]

    def heldout_bytes(self, heldout_share: float) -> float:
        """The bytes of text that would be held out."""
        if not self.is_whole:
            return heldout_share * self.text_bytes
        return self.heldout[heldout_share].total() if heldout_share else 0

    def count_instances(self, heldout_share: float, instance_bytes: float) -> tuple[int, int]:
        """(training, held-out) instances: none has text of two sources."""
        pairs: list[tuple[float, float]]
        if self.is_whole:
            all_, held_out = self.bytes_read, self.heldout.get(heldout_share, Counter())
            pairs = [(total - held_out[name], held_out[name]) for name, total in all_.items()]
        else:
            total = self.text_bytes / self.sources
            pairs = [((1 - heldout_share) * total, heldout_share * total)] * self.sources
        return (
            sum(int(training // instance_bytes) for training, _ in pairs),
            sum(int(heldout // instance_bytes) for _, heldout in pairs),
        )


def survey(folder: str, recipe: Path) -> Survey:
    """Look at a folder's files, which are to be named by `recipe`.

    Raises:
        ValueError: there is no such folder, or no text in it; a file is damaged, empty or has a
            name that no recipe can have; the rows have no field that can be the text.
    """
    if not os.path.isdir(folder):
        found = "a file; name its folder" if os.path.exists(folder) else "nothing; correct the path"
        raise ValueError(f"{folder}: expected a folder of text, found {found}")
    folder = glob.escape(folder)
    names = match_files(os.path.join(folder, "**"))
    files = [name for name in names if split_suffixes(name)[0] is not None]
    left_out = Counter(Path(name).suffix or "no suffix" for name in set(names) - set(files))
    if not files:
        others = ", ".join(f"{count} {suffix}" for suffix, count in left_out.most_common(5))
        raise ValueError(
            f"{folder}: expected .txt, .md, .jsonl, .parquet, .csv or .tsv, or gz or zst of these; "
            f"found {others or 'no file'}; put text there, or convert what is there to text"
        )
    if odd := [name for name in files if not os.path.isfile(name)]:
        raise ValueError(f"{odd[0]}: expected a file, found a link to nothing; remove it")
    patterns = sorted({os.path.join(folder, "**", f"*{full_suffix(name)}") for name in files})
    rows = find_fields(files)
    if any(rows.takes_whole_files(f) and os.path.getsize(f) > MAX_DOCUMENT_BYTES for f in files):
        rows = replace(rows, one_document_per=DocumentUnit.line)
    sources = find_local_files(patterns, recipe, is_grouped=rows.takes_whole_files)
    if twice := [name for name, count in Counter(local_files(sources)).items() if count > 1]:
        raise ValueError(
            f"{twice[0]}: expected one pattern for it, found two of {', '.join(patterns)}; keep "
            "each kind of file in a folder of its own, a data set each"
        )
    is_whole = total_size(files) <= MAX_BYTES

    def read(rows: RowsSection) -> Survey:
        empty = Survey(patterns, len(files), len(sources), left_out, rows, is_whole)
        return read_documents(empty, files)

    result = read(rows)
    if not rows.one_document_per and any(result.drops[reason] for reason in NO_ID):
        # Gz JSON lines are taken as they are, unless the recipe says what a document is.
        result = read(replace(rows, one_document_per=DocumentUnit.row))
    if not result.text_bytes:
        place, reason = next((p, r) for r, p in result.first_drops.items())
        raise ValueError(f"{place}: expected a document, found {REASONS[reason]}, as in all others")
    return result


def read_documents(result: Survey, files: list[str]) -> Survey:
    """Count the documents of a folder's files, or of some, and estimate those of all."""
    read, read_bytes = files, 0
    if not result.is_whole:
        read = files[:: -(-len(files) // MAX_FILES)]
    kept = documents = 0
    for name in read:
        source = GROUP if result.rows.takes_whole_files(name) else name
        consumed = 0
        for number, line in enumerate(documents_of(name, result.rows), 1):
            identity, text, reason = parse_document(line)
            consumed += len(line)
            if reason is not None or identity is None or text is None:
                result.drops[reason or "no-id"] += 1
                result.first_drops.setdefault(reason or "no-id", f"{name}:{number}")
            else:
                documents += 1
                size, fraction = size_in_utf8(text), hash_fraction(identity)
                result.bytes_read[source] += size
                for share in HELDOUT_SHARES:
                    if fraction < share:
                        result.heldout[share][source] += size
                if kept < TOKENIZER_BYTES:
                    result.sample.append((fraction, text))
                    kept += size
            if not result.is_whole and consumed > MAX_FILE_BYTES:
                break
        if not consumed:
            raise ValueError(f"{name}: expected rows, found none; remove it from the folder")
        read_bytes += os.path.getsize(name) if result.is_whole else estimate_read(name, consumed)
    scale = 1.0 if result.is_whole else total_size(files) / max(read_bytes, 1)
    result.documents = round(documents * scale)
    result.text_bytes = round(result.bytes_read.total() * scale)
    return result


def total_size(files: list[str]) -> int:
    return sum(map(os.path.getsize, files))


def full_suffix(name: str) -> str:
    """A file's suffix as it is written, compression included.

    >>> full_suffix("a/b.c.jsonl.gz"), full_suffix("README.md")
    ('.jsonl.gz', '.md')
    """
    path = Path(name)
    _, compression = split_suffixes(name)
    inner = path.with_suffix("").suffix if compression else ""
    is_format = bool(inner) and split_suffixes(f"a{inner}")[0] is not None
    return (inner if is_format else "") + path.suffix


def documents_of(name: str, rows: RowsSection) -> Iterator[bytes]:
    """The lines of a file as documents, as the pipeline makes them."""
    if not needs_conversion(name, rows):
        with gz.reading(Path(name)) as lines:
            yield from lines
        return
    for number, line in enumerate(read_lines(Path(name), name, rows), 1):
        yield line if isinstance(line, bytes) else dump_document(line, name, number, rows)


def estimate_read(name: str, consumed: int) -> int:
    """How many of a file's bytes held `consumed` bytes of lines: all if it was read to its end."""
    size = os.path.getsize(name)
    kind, compression = split_suffixes(name)
    packed = 3 if compression or kind == ".parquet" else 1  # text shrinks to about a third
    return min(size, consumed // packed) if consumed > MAX_FILE_BYTES else size


def find_fields(files: list[str]) -> RowsSection:
    """The fields of the text and the id of the first file of each format that has fields."""
    first: dict[str, str] = {}
    for name in files:
        kind, _ = split_suffixes(name)
        if kind not in (None, ".txt") and os.path.getsize(name):
            first.setdefault(kind or "", name)
    found = {}
    for name in first.values():
        fields = sample_fields(name)
        check_header(name, fields)
        texts = [key for key in TEXT_FIELDS if key in fields] or sorted(
            fields, key=lambda key: -fields[key]
        )
        if not fields and split_suffixes(name)[0] == ".jsonl":
            raise ValueError(
                f"{name}: expected an object a line, found none in the first lines; write one a "
                "line, or remove the file from the folder"
            )
        if not texts or not fields[texts[0]]:
            raise ValueError(
                f"{name}: expected a field of text, found {', '.join(fields) or 'no row'}"
            )
        ids = [key for key in ID_FIELDS if key in fields]
        identity = ids[0] if ids and ids[0] != "id" else None
        found[name] = RowsSection(text_field=texts[0], id_field=identity)
    if not found:
        return RowsSection()
    (name, rows), *others = found.items()
    if wrong := next((other for other, section in others if section != rows), None):
        raise ValueError(
            f"{wrong}: expected the fields of {name} (text: {rows.text_field}), found "
            f"{found[wrong].text_field}; keep each kind in a folder of its own, a data set each"
        )
    return rows


def check_header(name: str, fields: Iterable[str]) -> None:
    """Raises ValueError if the first line of a csv file cannot be a header."""
    if split_suffixes(name)[0] not in (".csv", ".tsv"):
        return
    for key in fields:
        if len(key) > MAX_NAME or re.fullmatch(r"[\d.,+-]+", key):
            raise ValueError(
                f"{name}: expected a header, found {key[:MAX_NAME]!r}; add a first line with the "
                "names of the fields"
            )


def sample_fields(name: str) -> dict[str, float]:
    """Field → the mean length of its texts in the first rows; 0 if it has none."""
    lengths: dict[str, list[int]] = {}
    for row in islice(read_fields(Path(name), name), 200):
        for key, value in row.items():
            lengths.setdefault(key, []).append(len(value) if isinstance(value, str) else 0)
    return {key: fmean(found) for key, found in lengths.items()}
