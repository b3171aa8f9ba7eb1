"""The order in which a run reads its instances: OLMo's, to the bit.

The stored order is the shuffle alone, n numbers for n instances. Padding to a multiple of the world
size, or cutting the tail, happens when training (`fit_to_world_size`), so that one stored order
serves every world size.
"""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import numpy as np

# Raw little-endian numbers, no header: what OLMo calls global_indices.npy.
ORDER_DTYPE = np.dtype("<u4")


def global_indices(n: int, seed: int, epoch: int = 0, shuffle: bool = True) -> np.ndarray:
    """The indices 0 … n-1 in the order of one epoch, (n,) uint32.

    Each epoch is shuffled by PCG64(seed + epoch). It takes 4 bytes an instance.

    Raises ValueError if there are too many instances for uint32, or for this machine's memory.
    """
    check_size(n, n * ORDER_DTYPE.itemsize)
    indices = np.arange(n, dtype=ORDER_DTYPE)
    if shuffle:
        np.random.Generator(np.random.PCG64(seed + epoch)).shuffle(indices)
    return indices


def check_size(n: int, needed: int) -> None:
    """Check that an order of the instances 0 … n-1 can be made, which needs so much memory.

    Raises ValueError if they are too many for uint32, or it is more memory than is free here.
    """
    limit, free = np.iinfo(np.uint32).max, available_memory()
    if not 0 <= n < limit:
        raise ValueError(
            f"an order is stored as uint32 and has at most {limit - 1} instances, not {n}"
        )
    if free is not None and needed > free:
        raise ValueError(
            f"the order of {n:,} instances needs {needed:,} bytes of memory, and {free:,} are free "
            "here. Make it on a machine with more: the file is the same wherever it is made"
        )


def available_memory(
    proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """Bytes that a process can still allocate: the machine's, or less in a container or a job.

    None where the kernel does not report it (not Linux). The page cache counts as free.
    """
    try:
        meminfo = dict(line.split(":") for line in (proc / "meminfo").read_text().splitlines())
        free = int(meminfo["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return None
    with contextlib.suppress(OSError):
        own = cgroup / (proc / "self/cgroup").read_text().rpartition("::/")[2].strip()
        for group in (own, *own.parents):  # a group's limit holds for the groups in it
            with contextlib.suppress(OSError, ValueError):  # "max" means no limit
                limit, used = (
                    int((group / f"memory.{name}").read_text()) for name in ("max", "current")
                )
                lines = (group / "memory.stat").read_text().splitlines()
                stat = dict(line.split() for line in lines)
                free = min(free, limit - used + int(stat.get("inactive_file", 0)))
    return free


def total_size(n: int, world_size: int, drop_last: bool) -> int:
    """n padded, or cut with drop_last, so that every process reads equally many instances."""
    if drop_last and n % world_size:
        return math.ceil((n - world_size) / world_size) * world_size
    return math.ceil(n / world_size) * world_size


def fit_to_world_size(indices: np.ndarray, world_size: int, drop_last: bool) -> np.ndarray:
    """Cut the tail, or repeat the order from its start, so that `world_size` divides the length.

    drop_last cuts to a multiple of the world size, not of the batch size: so does OLMo.
    """
    total = total_size(len(indices), world_size, drop_last)
    return indices[:total] if total <= len(indices) else np.resize(indices, total)


def invert_order(indices: np.ndarray) -> np.ndarray:
    """The position of each instance in an order, (n,) uint32: the inverse permutation.

    Raises ValueError for an order in which an instance repeats or is left out: a mixture's.
    """
    numbers, positions = np.arange(len(indices), dtype=ORDER_DTYPE), np.zeros_like(indices)
    is_permutation = not len(indices) or int(indices.max()) < len(indices)
    if is_permutation:
        positions[indices] = numbers
        is_permutation = np.array_equal(positions[indices], numbers)
    if not is_permutation:
        raise ValueError(
            "expected an order with each instance once, found a mixture's, in which an instance "
            "has several positions or none; olmo seen shows the steps of a document"
        )
    return positions


def write_order(indices: np.ndarray, path: str | Path) -> None:
    """Write raw little-endian uint32."""
    indices.astype(ORDER_DTYPE, copy=False).tofile(path)


write = write_order  # the name by which tests/golden/test_stage_versions.py imports it


def read_order(path: str | Path, n: int | None = None) -> np.ndarray:
    """A stored order, memory-mapped, (n,) uint32. Raises ValueError if it has not `n` numbers."""
    size = Path(path).stat().st_size
    if size % ORDER_DTYPE.itemsize or (n is not None and size != n * ORDER_DTYPE.itemsize):
        expected = "a whole number of" if n is None else n
        raise ValueError(
            f"{path}: expected {expected} uint32 numbers, found {size} bytes; the order belongs to "
            "other data, or to another max_sequence_length; make it again, or give another one"
        )
    if size == 0:
        return np.empty(0, ORDER_DTYPE)
    return np.memmap(path, mode="r", dtype=ORDER_DTYPE)


def parse_steps(text: str) -> range:
    """Parse steps as a user writes them: "5", or "5..9" with both ends.

    >>> list(parse_steps("5..7")), list(parse_steps("3"))
    ([5, 6, 7], [3])
    """
    first, dots, last = text.partition("..")
    if not (first.isdecimal() and (last.isdecimal() or not dots)):
        raise ValueError(f"expected steps as 5 or 5..9, found {text!r}")
    if not (steps := range(int(first), int(last or first) + 1)):
        raise ValueError(f"expected the earlier step first, as 5..9, found {text!r}")
    return steps
