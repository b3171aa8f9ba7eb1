"""Detects token files of another format or dtype, by their first bytes and their numbers.

A raw file has no header that says its dtype. Another format's magic bytes (numpy, gzip, …) are
certain: by chance, one token file in millions begins with them. A number beyond the vocabulary is
certain, too. A wider dtype shows where all but every second (fourth) number are 0; that is certain
if the others are many and distinct, and a guess if not, since a file may be mostly padding.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from olmo.io.file_types import HTML_STARTS

RAW, NUMPY = "raw numbers without a header", "a numpy file with a header"
MAGIC_BYTES = {
    b"\x93NUMPY": NUMPY,
    b"\x1f\x8b\x08": "gzip",
    b"PK\x03\x04": "a zip file",
    b"PAR1": "parquet",
    b"\x28\xb5\x2f\xfd": "zstd",
}
MIN_NUMBERS = 16  # with fewer, nothing is concluded
MIN_DISTINCT = 8  # likewise
CANDIDATES = (
    "int64",
    "uint32",
    "uint16",
)  # widest first: the parts of a fitting number may fit, too
MAX_SAMPLE = 1 << 20  # tokens of a file; sorting more takes seconds


def check_is_raw(name: str, start: bytes, dtype: str, where: str = "") -> None:
    """Raise ValueError if `start`, a file's first bytes, shows another format than raw `dtype`."""
    for magic, kind in MAGIC_BYTES.items():
        if start.startswith(magic):
            remedy = ""
            if kind == NUMPY:
                command = f"numpy.load({name!r}).astype({dtype!r}).tofile('raw.npy')"
                remedy = f"; write its numbers alone: {command}"
            raise ValueError(f"{where}{name}: expected {RAW}, found {kind}{remedy}")
    if start.lstrip().lower().startswith(HTML_STARTS):
        raise ValueError(f"{where}{name}: expected {RAW}, found a web page ({start[:64]!r}…)")


def guess_wider_dtype(tokens: np.ndarray, vocab_size: int) -> tuple[str, bool] | None:
    """The wider dtype that a file was probably stored in, and whether that is certain; or None.

    Args:
        tokens: the beginning of the file or of an instance, as it is read now.
        vocab_size: every token id is below it.
    """
    tokens = tokens[int(np.argmax(tokens != 0)) // 8 * 8 :]  # skips padding
    for name in CANDIDATES:
        if np.dtype(name).itemsize <= tokens.itemsize:
            continue
        numbers = _read_as(tokens, name)
        if len(numbers) < MIN_NUMBERS or not 0 <= numbers.min() <= numbers.max() < vocab_size:
            continue
        nonzero = numbers[numbers != 0]
        if len(nonzero) >= MIN_NUMBERS:
            is_dense = len(nonzero) * 2 >= len(numbers)
            return name, is_dense and len(np.unique(nonzero)) >= MIN_DISTINCT

    return None


def find_fitting_dtype(tokens: np.ndarray, vocab_size: int) -> str | None:
    """The dtype of another width in which all ids are below `vocab_size`; None if there is none."""
    for name in CANDIDATES:
        numbers = _read_as(tokens, name)
        is_other = np.dtype(name).itemsize != tokens.itemsize and len(numbers) >= MIN_NUMBERS
        if is_other and 0 <= numbers.min() <= numbers.max() < vocab_size:
            return name
    return None


def _read_as(tokens: np.ndarray, name: str) -> np.ndarray[Any, np.dtype[Any]]:
    raw, width = tokens[:MAX_SAMPLE].view(np.uint8), np.dtype(name).itemsize
    return raw[: len(raw) // width * width].view(name)
