"""Estimates of what a data set will have, by what the beginnings of some sources have.

What a beginning has is found by the stages' own code: `converted` and `documents`. The range is the
95 % t interval of a ratio estimate over sources (Cochran, Sampling Techniques, 1977, chapter 6):
what the spread between sources explains. It does not cover a file whose later part differs from its
beginning, nor what deduplication and filters take away.
"""

from __future__ import annotations

import json
import textwrap
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from math import sqrt
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, cast

from olmo.config.strict import hashed_fields
from olmo.corpus.beginnings import read_decompressed
from olmo.corpus.documents import (
    EVERY_LINE,
    REASONS,
    DocumentsSection,
    documents,
    parse_document,
)
from olmo.corpus.formats import EVERY_ROW, RowsSection, converted, needs_conversion, split_suffixes
from olmo.io import gz
from olmo.runtime.log import format_bytes, format_count, log
from olmo.store.stage import Facts, Input, Inputs, Output, stage

TOKENIZED_BYTES = 1 << 20  # of a beginning's text
Count = Callable[[list[str]], int]  # texts → their tokens, without those that end documents
Measured = dict[str, float]  # an amount's name → what the source is expected to give of it
AMOUNTS = ("documents", "text_bytes", "tokens", "source_bytes", "documents_bytes")
CONFIDENCE = 0.95
ONE_SOURCE_FACTOR = 2.0  # the range, assumed, where one source shows no spread
NOTE = (
    "Ranges: 95 % t intervals over the sampled sources; of a group with one, a factor of "
    f"{ONE_SOURCE_FACTOR:g} is assumed. Only the beginning of a file is read: if its later part "
    "differs, the truth may be outside. Documents are counted before deduplication and filters."
)
NO_TOKENIZER = "Tokens: no tokenizer is here yet, so `olmo plan` takes a fixed rate."


@dataclass(frozen=True)
class Group:
    """Sources whose names begin alike, in all."""

    name: str
    sources: int
    bytes: int
    taken_bytes: float  # each source's times its weight in the recipe


@dataclass(frozen=True)
class Sampled:
    """A source whose beginning is measured."""

    name: str  # of the file, with the suffix
    group: str
    bytes: int
    weight: float = 1.0
    files: int = 1  # text files that it is made of


@dataclass(frozen=True)
class Estimate:
    """An amount: likely between `low` and `high`."""

    low: float
    expected: float
    high: float

    def __add__(self, other: Estimate) -> Estimate:
        """The sum of two that are independent: the widths add as standard errors do."""
        expected = self.expected + other.expected
        below = sqrt((self.expected - self.low) ** 2 + (other.expected - other.low) ** 2)
        above = sqrt((self.high - self.expected) ** 2 + (other.high - other.expected) ** 2)
        return Estimate(max(0.0, expected - below), expected, expected + above)


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


@stage(version=1, conditions=gz.conditions)
def sample(
    heads: Inputs,
    estimates: Output,
    text: Output,
    sampled: list[dict[str, Any]],
    groups: list[dict[str, Any]],
    tokenizer: Input | None = None,
    rows: RowsSection = EVERY_ROW,
    config: DocumentsSection = EVERY_LINE,
) -> Facts:
    """Measure beginnings, and estimate what the groups of sources and all of them will have.

    `estimates` (JSON): `groups` and `total`, each with sources, sampled, bytes, read (bytes) and
    low, expected, high of each of AMOUNTS (tokens: null without a tokenizer); and the recipe's
    section on documents. `text` is a table of it.

    Args:
        heads: the beginnings of the sources in `sampled`.
        sampled: fields of Sampled.
        groups: fields of Group.
    """
    count_tokens = open_tokenizer(tokenizer) if tokenizer else None
    measured: dict[str, list[tuple[Sampled, Measured, int]]] = defaultdict(list)
    for number, (head, fields) in enumerate(zip(heads, sampled, strict=True)):
        log.debug(f"{number} of {len(heads)} sources")
        one = Sampled(**fields)
        size, files = one.bytes, one.files
        found = measure(head, one.name, size, files, one.weight, rows, config, count_tokens)
        measured[one.group].append((one, found, head.stat().st_size))
    made = []
    for group in (Group(**fields) for fields in groups):
        if not (known := measured[group.name]):
            raise ValueError(
                f"{group.name}: expected a source that can be read, found none of "
                f"{group.sources:,}; correct their URLs, or remove them from the sources"
            )
        read = sum(size for _, _, size in known)
        row: dict[str, Any] = {"group": group.name, "sources": group.sources}
        row |= {"sampled": len(known), "bytes": group.bytes, "read": read}
        for amount in AMOUNTS:
            row[amount] = None
            if all(amount in found for _, found, _ in known):
                pairs = [(found[amount], weigh(one, amount)) for one, found, _ in known]
                total = group.bytes if amount == "source_bytes" else group.taken_bytes
                row[amount] = asdict(estimate(pairs, total, read / group.bytes))
        made.append(row)
    total_row: dict[str, Any] = {"group": "in all"}
    for key in ("sources", "sampled", "bytes", "read"):
        total_row[key] = sum(row[key] for row in made)
    for amount in AMOUNTS:
        parts = [Estimate(**row[amount]) for row in made if row[amount]]
        total_row[amount] = asdict(sum(parts[1:], parts[0])) if parts else None
    content = {"groups": made, "total": total_row, "documents": hashed_fields(config)}
    estimates.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    text.write_text(format_sample(made, total_row), encoding="utf-8")
    return {key: total_row[key] for key in ("sources", "sampled", "bytes", "read")}


def weigh(one: Sampled, amount: str) -> float:
    """The bytes that an amount of a source is in proportion to."""
    return one.bytes * (1.0 if amount == "source_bytes" else one.weight)


def estimate(pairs: list[tuple[float, float]], total: float, share_read: float) -> Estimate:
    """An amount of a group by (amount, bytes) of some of its sources, in proportion to bytes.

    Args:
        total: bytes of the whole group.
        share_read: the share of these that was read. Of what was read, nothing is uncertain.
    """
    from scipy.stats import t

    count, size = len(pairs), sum(size for _, size in pairs)
    rate = sum(amount for amount, _ in pairs) / size
    expected = rate * total
    if share_read >= 1:
        return Estimate(expected, expected, expected)
    if count == 1:
        return Estimate(expected / ONE_SOURCE_FACTOR, expected, expected * ONE_SOURCE_FACTOR)
    residuals = [amount - rate * size for amount, size in pairs]
    variance = sum(residual**2 for residual in residuals) / (count - 1) * (1 - share_read)
    error = sqrt(variance / count) / (size / count) * total
    half = float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) * error
    return Estimate(max(0.0, expected - half), expected, expected + half)


def format_sample(groups: list[dict[str, Any]], total: dict[str, Any]) -> str:
    """The estimates as an aligned table, and what they mean."""

    def cell(found: dict[str, float] | None, form: Any) -> str:
        if found is None:
            return "?"
        low, expected, high = (form(int(found[key])) for key in ("low", "expected", "high"))
        return expected if low == high else f"{expected} ({low} to {high})"

    rows = [["group", "sources", "read", "size", "documents", "text", "tokens"]]
    for row in [*groups, total] if len(groups) > 1 else [total]:
        rows.append(
            [
                row["group"],
                f"{row['sampled']:,} of {row['sources']:,}",
                format_bytes(row["read"]),
                format_bytes(row["bytes"]),
                cell(row["documents"], format_count),
                cell(row["text_bytes"], format_bytes),
                cell(row["tokens"], format_count),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    notes = textwrap.wrap(NOTE, 100) + [NO_TOKENIZER] * (total["tokens"] is None)
    return "\n".join([*lines, *notes]) + "\n"
