"""Token files cut into instances, without torch: all that `olmo inspect` and `seen` need.

A file has bytes // (bytes per token * chunk_size) instances. The remainder of each file is dropped:
an instance never spans two files.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from olmo.config import DataConfig, TrainConfig
from olmo.config.checks import check_data
from olmo.data.files import ArrayFile, file_sizes, is_url


class InstanceFiles:
    """The instances of `chunk_size` tokens of raw token files, in the order of `paths`.

    Args:
        label_mask_paths: raw bool files of the same length, one for each.
    """

    def __init__(
        self,
        *paths: str | Path,
        chunk_size: int = 1024,
        memmap_dtype: type[np.integer[Any]] = np.uint16,
        label_mask_paths: Sequence[str | Path] | None = None,
    ) -> None:
        if not paths:
            raise ValueError("At least one path is required")
        if label_mask_paths and len(label_mask_paths) != len(paths):
            raise ValueError(
                "There must be the same number of 'label_mask_paths' as there are 'paths'"
            )
        self.paths = paths
        self.chunk_size = chunk_size
        self.dtype = memmap_dtype
        self.label_mask_paths = list(label_mask_paths) if label_mask_paths else None
        self._remote = any(is_url(path) for path in paths)
        self._ends: list[int] | None = None  # of each file, in instances
        self._files: dict[tuple[int, bool], ArrayFile] = {}  # by (file, is a mask)

    @property
    def offsets(self) -> list[tuple[int, int]]:
        """(first instance, one past the last) of each file."""
        if self._ends is None:
            width = np.dtype(self.dtype).itemsize * self.chunk_size
            lengths = [size // width for size in file_sizes(self.paths)]
            if self.label_mask_paths is not None:
                masks = [size // self.chunk_size for size in file_sizes(self.label_mask_paths)]
                for path, length, mask_path, mask in zip(
                    self.paths, lengths, self.label_mask_paths, masks, strict=True
                ):
                    if mask != length:
                        raise ValueError(
                            f"masking file '{mask_path}' should be the same size as '{path}'"
                        )
            self._ends = list(itertools.accumulate(lengths))
        return list(zip([0, *self._ends[:-1]], self._ends, strict=True))

    def __len__(self) -> int:
        return self.offsets[-1][1] if self._ends is None else self._ends[-1]

    def locate(self, index: int) -> tuple[int, int]:
        """The file of an instance, and its row in that file."""
        n = len(self)
        position = index if index >= 0 else n + index
        if not 0 <= position < n:
            raise IndexError(f"{index} is out of bounds for dataset of size {n}")
        assert self._ends is not None
        file = bisect.bisect_right(self._ends, position)
        return file, position - (self._ends[file - 1] if file else 0)

    def _tokens(self, file: int, row: int, mask: bool = False) -> np.ndarray:
        """An instance's tokens, or its label mask, as stored: (T,)."""
        tokens = self._files.get((file, mask))
        if tokens is None:
            path = (
                self.label_mask_paths[file] if mask and self.label_mask_paths else self.paths[file]
            )
            tokens = self._files[file, mask] = ArrayFile(path, np.bool_ if mask else self.dtype)
        return tokens.read(row * self.chunk_size, (row + 1) * self.chunk_size)

    def read_ids(self, places: Sequence[tuple[int, int]]) -> np.ndarray:
        """The tokens (B, T) int64 of instances by (file, row)."""
        ids = np.empty((len(places), self.chunk_size), np.int64)
        if self._remote:
            # Each request waits for the network: send them together.
            with ThreadPoolExecutor(min(len(places), 32)) as threads:
                ids[:] = list(threads.map(lambda place: self._tokens(*place), places))
        else:
            for b, (file, row) in enumerate(places):
                ids[b] = self._tokens(file, row)
        return ids

    @property
    def fingerprint(self) -> str:
        """A digest of the token files' names, sizes and order."""
        names = [Path(path).name for path in self.paths]
        named = [self.chunk_size, *zip(names, self.offsets, strict=True)]
        return hashlib.sha256(json.dumps(named).encode()).hexdigest()[:16]


def list_token_files(data: DataConfig) -> list[tuple[str, dict[str, Any]]]:
    """The token files of a config with their metadata: `data.paths`, or `data.datasets` by label.

    Raises ValueError if both are set, or neither.
    """
    check_data(data)
    if data.paths:
        return [(path, {"path": path}) for path in data.paths]
    if data.datasets:
        return [(p, {"label": k}) for k in sorted(data.datasets) for p in data.datasets[k]]
    raise ValueError(
        "data.paths: expected token files, or data.datasets with some, found neither; set "
        "--data.paths=[tokens.npy], or train with the pipeline, which fills them in"
    )


def open_instance_files(cfg: TrainConfig) -> InstanceFiles:
    """The token files of a training config, as instances of the model's max_sequence_length."""
    return InstanceFiles(
        *(path for path, _ in list_token_files(cfg.data)),
        chunk_size=cfg.model.max_sequence_length,
        memmap_dtype=cfg.data.effective_memmap_dtype,
        label_mask_paths=cfg.data.label_mask_paths,
    )
