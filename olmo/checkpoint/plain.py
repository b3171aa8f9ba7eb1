"""torch's files as data: tensors, numbers, text and containers of those. No pickled code runs."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import torch

# What OLMo's train.pt holds besides: paths of checkpoints, and the state of NumPy's generator, an
# array of uint32. NumPy 1 and 2 have different names for what makes an array.
_make_array = np.zeros(0).__reduce__()[0]
_OLMOS: list[Any] = [
    PosixPath,
    (PosixPath, "pathlib._local.PosixPath"),
    np.ndarray,
    np.dtype,
    type(np.dtype(np.uint32)),
    (_make_array, "numpy.core.multiarray._reconstruct"),
    (_make_array, "numpy._core.multiarray._reconstruct"),
]


@dataclass(frozen=True)
class Part:
    """A tensor that lies in a checkpoint and is not read yet."""

    key: str
    shape: torch.Size
    dtype: torch.dtype


def read(path: Path, mapped: bool = False) -> dict[str, Any]:
    """What torch.save wrote, on the CPU. Raises ValueError for code, and for a broken file.

    `mapped` tensors stay in the file until they are looked at, and are in memory once for all
    processes of a machine. They are for copying from: the file must stay as it is meanwhile.
    """
    try:
        mapped = mapped and zipfile.is_zipfile(path)  # torch before 1.6 wrote files of its own
        with torch.serialization.safe_globals(_OLMOS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        if "weights_only" in str(error).lower() or "WeightsUnpickler" in str(error):
            reason = "it holds pickled code or objects besides tensors, which are never run"
        else:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"cannot read {path}: {reason}") from error


def write(value: dict[str, Any], path: Path) -> None:
    """As torch.save does. Raises OSError where the disk is full."""
    with open(path, "wb") as file, disk_errors():
        torch.save(value, file)


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """torch says of a failed write that a position is unexpected; the reason is behind it."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
