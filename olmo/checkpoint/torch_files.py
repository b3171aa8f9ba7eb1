"""torch.save's files, loaded as data: tensors, numbers, text, containers. No pickled code runs."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import torch

# OLMo's train.pt also contains paths of checkpoints and the state of NumPy's generator, an array of
# uint32. NumPy 1 and 2 have different names for the function that makes an array.
_make_array = np.zeros(0).__reduce__()[0]
_OLMO_GLOBALS: list[Any] = [
    PosixPath,
    (PosixPath, "pathlib._local.PosixPath"),
    np.ndarray,
    np.dtype,
    type(np.dtype(np.uint32)),
    (_make_array, "numpy.core.multiarray._reconstruct"),
    (_make_array, "numpy._core.multiarray._reconstruct"),
]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a sharded checkpoint that is not read yet."""

    key: str
    shape: torch.Size
    dtype: torch.dtype


def load_torch_file(path: Path, mapped: bool = False) -> dict[str, Any]:
    """Load to the CPU. Raises ValueError for pickled code, and for a broken file.

    `mapped` tensors stay in the file until they are read, and are in memory once for all processes
    of a machine. Copy from them; the file must not change meanwhile.
    """
    try:
        mapped = mapped and zipfile.is_zipfile(path)  # torch before 1.6 wrote no zip files
        with torch.serialization.safe_globals(_OLMO_GLOBALS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        if "weights_only" in str(error).lower() or "WeightsUnpickler" in str(error):
            reason = "it contains pickled code or objects, which are never run"
        else:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"cannot read {path}: {reason}") from error


def save_torch_file(value: dict[str, Any], path: Path) -> None:
    """As torch.save, but a full disk raises OSError."""
    with open(path, "wb") as file, reraise_disk_errors():
        torch.save(value, file)


@contextlib.contextmanager
def reraise_disk_errors() -> Iterator[None]:
    """Raise the OSError behind torch's RuntimeError about an unexpected position in the file."""

    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
