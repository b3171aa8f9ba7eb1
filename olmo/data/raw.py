"""Whether a file can be raw tokens: told from its first bytes and from its numbers.

A raw file says nothing of itself. What another kind begins with (a numpy header, gzip, …) is
certain, since as tokens these bytes are one beginning in millions. So is a number beyond the
vocabulary, and numbers of which all but every second (fourth) are 0 while those are many and of
many kinds. Where they are few it is not: a file may be mostly padding.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from olmo.io.file_kinds import PAGES

RAW, NUMPY = "raw numbers without a header", "a numpy file with a header"
HEADS = {
    b"\x93NUMPY": NUMPY,
    b"\x1f\x8b\x08": "gzip",
    b"PK\x03\x04": "a zip file",
    b"PAR1": "parquet",
    b"\x28\xb5\x2f\xfd": "zstd",
}
LEAST = 16  # numbers, before anything is concluded from them
KINDS = 8  # different ones, likewise
KNOWN = ("int64", "uint32", "uint16")  # in this order: where one fits, its parts may do so, too
LOOKED_AT = 1 << 20  # of a file; sorting more takes seconds


def refuse_other_kind(name: str, start: bytes, dtype: str, where: str = "") -> None:
    """Raises ValueError where a file's first bytes are those of another kind than raw `dtype`."""
    for head, kind in HEADS.items():
        if start.startswith(head):
            remedy = ""
            if kind == NUMPY:
                numbers = f"numpy.load({name!r}).astype({dtype!r}).tofile('raw.npy')"
                remedy = f"; write its numbers alone: {numbers}"
            raise ValueError(f"{where}{name}: expected {RAW}, found {kind}{remedy}")
    if start.lstrip().lower().startswith(PAGES):
        raise ValueError(f"{where}{name}: expected {RAW}, found a web page ({start[:64]!r}…)")


def wider_kind(tokens: np.ndarray, vocab_size: int) -> tuple[str, bool] | None:
    """As what wider numbers a file was stored that is read in parts, and whether that is certain.

    Args:
        tokens: as they are read, from the beginning of the file or of an instance.
        vocab_size: what a number stays below.
    """
    tokens = tokens[int(np.argmax(tokens != 0)) // 8 * 8 :]  # what precedes may be padding
    for name in KNOWN:
        if np.dtype(name).itemsize <= tokens.itemsize:
            continue
        numbers = _read_as(tokens, name)
        if len(numbers) < LEAST or not 0 <= numbers.min() <= numbers.max() < vocab_size:
            continue
        known = numbers[numbers != 0]
        if len(known) >= LEAST:
            certain = len(known) * 2 >= len(numbers) and len(np.unique(known)) >= KINDS
            return name, certain
    return None


def fitting_kind(tokens: np.ndarray, vocab_size: int) -> str | None:
    """As what other numbers all of them are below `vocab_size`, where as these they are not."""
    for name in KNOWN:
        numbers = _read_as(tokens, name)
        other = np.dtype(name).itemsize != tokens.itemsize and len(numbers) >= LEAST
        if other and 0 <= numbers.min() <= numbers.max() < vocab_size:
            return name
    return None


def _read_as(tokens: np.ndarray, name: str) -> np.ndarray[Any, np.dtype[Any]]:
    raw, width = tokens[:LOOKED_AT].view(np.uint8), np.dtype(name).itemsize
    return raw[: len(raw) // width * width].view(name)
