"""Text indexes: which documents can contain a text, for `olmo seen --text`.

A file of documents is divided into blocks of consecutive documents. For each block the index has a
row of 2**HASH_BITS bits, of which those are set that its sequences of GRAM_BYTES bytes hash to. A
block can contain a text only if the bits of all of the text's sequences are set; such blocks are
then read. So the index decides only how much is read, and never what is found.

The rows are stored as columns: a lookup reads B / 8 bytes for each sequence of a text.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olmo.corpus.listing import read_listing, run_shards, write_listing
from olmo.io import gz
from olmo.store.stage import Facts, Input, Output, stage

if TYPE_CHECKING:
    import msgspec
    import numpy as np

BLOCK_BYTES = 1 << 16  # of text
GRAM_BYTES = 6  # a shorter text is searched in all documents
HASH_BITS = 16  # 8 kB for a block
# A longer text is looked up by its beginning. Blocks of one long document overlap by as much.
PROBE_BYTES = 512
MULTIPLIER = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: Knuth's multiplicative hash


def batch(documents: list[Path], listing: Path) -> None:
    """Index the text of a batch's documents, training and held-out ones, for `olmo seen --text`."""
    entries = []
    for output, folder, prefix in (
        ("documents", "text_index", ""),
        ("heldout", "text_index/heldout", "heldout-"),
    ):
        files = {"grams": f"{folder}/{{}}.grams.npy", "blocks": f"{folder}/{{}}.blocks.npy"}
        entries += run_shards(
            text_index,
            listing,
            read_listing(documents, output),
            files,
            lambda entry: {"documents": entry.object},
            {name: prefix + name for name in files},
        )
    write_listing(listing, entries)


@stage(version=1)
def text_index(documents: Input, grams: Output, blocks: Output) -> Facts:
    """Index the text of one file of documents.

    `blocks` (npy) is int64 (B, 2): each block's first line in the file, from 0, and one past its
    last. `grams` (npy) is uint8 (2**HASH_BITS, B / 8 rounded up): bit b of row h, the highest bit
    of a byte first, tells whether block b has a sequence of GRAM_BYTES bytes with the hash h.
    """
    import numpy as np

    ranges, columns = [], []
    text_bytes, lines = 0, 0
    rows = np.zeros((8, 1 << HASH_BITS), np.uint8)
    for number, (first, end, text) in enumerate(split_blocks(documents)):
        if number and number % 8 == 0:
            columns.append(np.packbits(rows, axis=0)[0])
            rows[:] = 0
        rows[number % 8, hash_grams(text)] = 1
        ranges.append((first, end))
        text_bytes, lines = text_bytes + len(text), end
    if ranges:
        columns.append(np.packbits(rows, axis=0)[0])
    packed = np.stack(columns, 1) if columns else np.zeros((1 << HASH_BITS, 0), np.uint8)
    with open(grams, "wb") as file:  # np.save appends .npy to a path
        np.save(file, packed)
    with open(blocks, "wb") as file:
        np.save(file, np.array(ranges, np.int64).reshape(-1, 2))
    return {"documents": lines, "text_bytes": text_bytes, "blocks": len(ranges)}


def split_blocks(documents: Path) -> Iterator[tuple[int, int, bytes]]:
    """(first line, one past the last, text) of each block; a long document is several blocks."""
    first, number, parts, size = 0, -1, list[bytes](), 0
    for number, text in read_texts(documents):
        content = text.encode()
        if parts and size + len(content) > BLOCK_BYTES:
            yield first, number, b"\n".join(parts)
            parts, size = [], 0
        if len(content) > BLOCK_BYTES:
            for start in range(0, len(content), BLOCK_BYTES):
                yield number, number + 1, content[start : start + BLOCK_BYTES + PROBE_BYTES]
            continue
        if not parts:
            first = number
        parts.append(content)
        size += len(content)
    if parts:
        yield first, number + 1, b"\n".join(parts)


def hash_grams(text: bytes) -> np.ndarray:
    """The hash of each sequence of GRAM_BYTES bytes, in order: (len(text) - GRAM_BYTES + 1,)."""
    import numpy as np

    size = max(len(text) - GRAM_BYTES + 1, 0)
    # Eight bytes from each position on, of which the last are shifted out.
    grams = np.ndarray((size,), "<u8", text + bytes(8 - GRAM_BYTES), strides=(1,))
    shift = np.uint64(8 * (8 - GRAM_BYTES))
    return ((grams << shift) * np.uint64(MULTIPLIER)) >> np.uint64(64 - HASH_BITS)


def find_lines(text: str, grams: Path, blocks: Path) -> np.ndarray | None:
    """The lines, from 0 and in order, whose documents can contain a text; None: all of them."""
    import numpy as np

    if not len(hashes := np.unique(hash_grams(text.encode()[:PROBE_BYTES]))):
        return None
    found = np.bitwise_and.reduce(np.load(grams, mmap_mode="r")[hashes], axis=0)
    ranges = np.load(blocks)
    chosen = ranges[np.unpackbits(found, count=len(ranges)).astype(bool)]
    lines = [np.arange(first, end) for first, end in chosen]
    return np.unique(np.concatenate(lines)) if lines else np.zeros(0, np.int64)


def find_texts(
    documents: Path, text: str, lines: np.ndarray | None = None
) -> Iterator[tuple[int, str, list[int]]]:
    """(line from 0, its text, where in it) of each document that contains a text.

    Args:
        lines: in order, the only ones to read; None: all.
    """
    for number, whole in read_texts(documents, lines):
        places, start = [], whole.find(text)
        while start >= 0:
            places.append(start)
            start = whole.find(text, start + 1)
        if places:
            yield number, whole, places


def read_texts(documents: Path, lines: np.ndarray | None = None) -> Iterator[tuple[int, str]]:
    """(line from 0, text) of each document of a file, or only of those lines, in order."""
    decode = line_decoder().decode
    with gz.reading(documents) as file:
        wanted = count() if lines is None else iter(lines.tolist())
        number = next(wanted, None)
        for at, line in enumerate(file):
            if number is None:
                return
            if at == number:
                yield at, text_of(decode(line))
                number = next(wanted, None)


@cache
def line_decoder() -> msgspec.json.Decoder[Any]:
    """Decodes the text, or the messages, of a line alone: half the time of a search is decoding."""
    import msgspec

    message = msgspec.defstruct("Message", [("content", str)])
    fields: list[Any] = [("text", str | None, None), ("messages", list[message] | None, None)]  # type: ignore[valid-type]
    return msgspec.json.Decoder(msgspec.defstruct("Line", fields))


def text_of(line: Any) -> str:
    """The text of a document, or of all messages of a conversation."""
    if line.messages is not None:
        return "\n".join(message.content for message in line.messages)
    return line.text or ""
