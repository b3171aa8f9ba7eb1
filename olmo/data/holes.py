"""Holes: tokens that a run reads and does not learn, since their labels are masked.

A file of holes has rows of three little-endian uint32: an instance, the first masked position in
it, and one past the last. The rows are sorted by instance.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

HOLES_DTYPE = np.dtype("<u4")


def make_holes(spans: Iterable[tuple[int, int]], length: int) -> np.ndarray:
    """The holes (H, 3) uint32 of spans of tokens: [first, end), in the instances laid end to end.

    Args:
        length: tokens of an instance.

    >>> make_holes([(6, 13)], 4).tolist()
    [[1, 2, 4], [2, 0, 4], [3, 0, 1]]
    """
    parts = [np.empty((0, 3), HOLES_DTYPE)]
    for first, end in spans:
        instances = np.arange(first // length, -(-end // length), dtype=np.int64)
        begins = np.maximum(first - instances * length, 0)
        ends = np.minimum(end - instances * length, length)
        parts.append(np.stack([instances, begins, ends], axis=1).astype(HOLES_DTYPE))
    rows = np.concatenate(parts)
    rows = rows[rows[:, 1] < rows[:, 2]]  # an empty span is no hole
    return rows[np.lexsort((rows[:, 1], rows[:, 0]))]


def write_holes(rows: np.ndarray, path: Path) -> None:
    """Write holes (H, 3)."""
    rows.astype(HOLES_DTYPE, copy=False).tofile(path)


def read_holes(path: str | Path) -> np.ndarray:
    """The holes of a file, (H, 3) uint32. Raises ValueError if it has no whole rows."""
    numbers = np.fromfile(path, HOLES_DTYPE)
    if len(numbers) % 3:
        raise ValueError(
            f"{path}: expected rows of 3 uint32 numbers, found {len(numbers)} numbers; give the "
            "file that `olmo skip` wrote"
        )
    return numbers.reshape(-1, 3)


def learned_tokens(
    holes: np.ndarray, instances: Sequence[int] | np.ndarray, length: int
) -> np.ndarray:
    """Which tokens of some instances are in no hole, (B, T) bool.

    Args:
        holes: (H, 3), sorted by instance.
        length: T.

    >>> learned_tokens(make_holes([(6, 13)], 4), [1, 0], 4).astype(int).tolist()
    [[1, 1, 0, 0], [1, 1, 1, 1]]
    """
    wanted = np.asarray(instances, np.int64)
    learned = np.ones((len(wanted), length), bool)
    begins = np.searchsorted(holes[:, 0], wanted, side="left")
    ends = np.searchsorted(holes[:, 0], wanted, side="right")
    for row, begin, end in zip(learned, begins.tolist(), ends.tolist(), strict=True):
        for _, first, last in holes[begin:end].tolist():
            row[first:last] = False
    return learned
