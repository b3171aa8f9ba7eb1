"""What text a folder has: formats, fields, documents and bytes, by reading some or all of it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from statistics import fmean

from olmo.corpus.documents import is_held_out, parse_document, size_in_utf8
from olmo.corpus.formats import RowsSection, dump_document, read_lines, split_suffixes
from olmo.io.patterns import match_files

# A folder of more bytes is read in part: this many files, spread evenly, and so much of each.
MAX_BYTES, MAX_FILES, MAX_FILE_BYTES = 256 << 20, 64, 4 << 20
TOKENIZER_BYTES = 4 << 20  # of the sample of text that is kept
# Fields with the text or the id, by their usual names; else the longest one.
TEXT_FIELDS = ("text", "content", "body", "raw_content", "document", "article")
ID_FIELDS = ("id", "doc_id", "uuid", "url", "key")


@dataclass
class Survey:
    """The text of a folder; estimates if only a part was read."""

    patterns: list[str]
    files: int
    left_out: Counter[str]  # suffix → files of other kinds
    rows: RowsSection
    is_whole: bool  # all was read
    documents: int = 0
    text_bytes: int = 0
    drops: Counter[str] = field(default_factory=Counter)  # reason → rows
    # Of what was read: hashes decide which documents are held out.
    sizes: list[tuple[str, int]] = field(default_factory=list)  # (id, bytes of text)
    sample: list[str] = field(default_factory=list)

    def heldout_bytes(self, share: float) -> float:
        """The bytes of text that would be held out."""
        if not self.is_whole:
            return share * self.text_bytes
        return sum(size for identity, size in self.sizes if is_held_out(identity, share))


def survey(folder: str) -> Survey:
    """Look at a folder's files.

    Raises:
        ValueError: there is no such folder, or no text in it; a file is damaged; the rows have no
            field that can be the text.
    """
    if not os.path.isdir(folder):
        found = "a file" if os.path.exists(folder) else "nothing"
        raise ValueError(f"{folder}: expected a folder of text, found {found}")
    names = match_files(os.path.join(folder, "**"))
    kinds = {name: split_suffixes(name)[0] for name in names}
    files = [name for name in names if kinds[name] is not None]
    left_out = Counter(Path(name).suffix or "no suffix" for name in names if kinds[name] is None)
    if not files:
        others = ", ".join(f"{count} {suffix}" for suffix, count in left_out.most_common(5))
        raise ValueError(
            f"{folder}: expected .txt, .md, .jsonl, .parquet, .csv or .tsv, or gz or zst of these; "
            f"found {others or 'no file'}"
        )
    patterns = sorted({os.path.join(folder, "**", f"*{full_suffix(name)}") for name in files})
    total = sum(map(os.path.getsize, files))
    is_whole = total <= MAX_BYTES
    result = Survey(patterns, len(files), left_out, find_fields(files), is_whole)
    read, read_bytes = files, total
    if not is_whole:
        read, read_bytes = files[:: -(-len(files) // MAX_FILES)], 0
    kept = 0
    for name in read:
        consumed = 0
        for line in documents_of(name, result.rows):
            identity, text, reason = parse_document(line)
            consumed += len(line)
            if reason is not None or identity is None or text is None:
                result.drops[reason or "no-id"] += 1
            else:
                size = size_in_utf8(text)
                result.sizes.append((identity, size))
                if kept < TOKENIZER_BYTES:
                    result.sample.append(text)
                    kept += size
            if not is_whole and consumed > MAX_FILE_BYTES:
                break
        if not is_whole:
            read_bytes += estimate_read(name, consumed)
    scale = total / max(read_bytes, 1)
    result.documents = round(len(result.sizes) * scale)
    result.text_bytes = round(sum(size for _, size in result.sizes) * scale)
    if not result.text_bytes:
        raise ValueError(f"{folder}: expected text, found no document: {dict(result.drops)}")
    return result


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
        if kind not in (None, ".txt"):
            first.setdefault(kind or "", name)
    found = {}
    for name in first.values():
        fields = sample_fields(name)
        texts = [key for key in TEXT_FIELDS if key in fields] or sorted(
            fields, key=lambda key: -fields[key]
        )
        if not texts or not fields[texts[0]]:
            raise ValueError(
                f"{name}: expected a field of text, found {', '.join(fields) or 'none'}"
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


def sample_fields(name: str) -> dict[str, float]:
    """Field → the mean length of its texts in the first rows; 0 if it has none."""
    from olmo.corpus.formats import read_fields

    lengths: dict[str, list[int]] = {}
    for row in islice(read_fields(Path(name), name), 200):
        for key, value in row.items():
            lengths.setdefault(key, []).append(len(value) if isinstance(value, str) else 0)
    return {key: fmean(found) for key, found in lengths.items()}
