"""Token files: local ones mapped into memory, remote ones read by byte ranges over http.

A file of AI2's published data has gigabytes; one batch of it is a few kilobytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from glob import has_magic
from pathlib import Path
from typing import Any

import numpy as np

from olmo.config.enums import TokenType


def is_url(path: str | Path) -> bool:
    return "://" in str(path)


def file_sizes(paths: Sequence[str | Path]) -> list[int]:
    """Bytes of each file, in order. Raises FileNotFoundError for a missing one."""
    from_urls: dict[str, int | None] = {}
    if urls := sorted({str(path) for path in paths if is_url(path)}):
        from olmo.io.http_client import request_sizes

        from_urls = dict(zip(urls, request_sizes(urls), strict=True))
    found = []
    for path in paths:
        if is_url(path):
            size = from_urls[str(path)]
            if size is None:
                raise FileNotFoundError(f"no token file at {path}, or its server reports no size")
            found.append(size)
        elif Path(path).is_file():
            found.append(Path(path).stat().st_size)
        else:
            hint = f"; a pattern is written ${{path.glob:{path}}}" if has_magic(str(path)) else ""
            raise FileNotFoundError(f"no token file at {path}{hint}")
    return found


def token_itemsize(dtype: str) -> int:
    """Bytes of a token in a file. Raises ValueError for a dtype that token files do not have."""
    if dtype not in list(TokenType):
        raise ValueError(f"dtype: expected one of {', '.join(TokenType)}, found {dtype!r}")
    return np.dtype(dtype).itemsize


class ArrayFile:
    """An array of tokens, labels or indices without a header, local or at a URL, read by slices."""

    def __init__(self, path: str | Path, dtype: Any) -> None:
        self._dtype = np.dtype(dtype)
        self._mapped: np.ndarray | None = None
        self._url = str(path)
        if not is_url(path):
            # A plain array over the mapped bytes, since slicing np.memmap itself is slow. Half a
            # token at the end belongs to no instance.
            length = Path(path).stat().st_size // self._dtype.itemsize
            self._mapped = np.asarray(np.memmap(path, self._dtype, mode="r", shape=(length,)))

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens `start` … `stop` - 1, (stop - start,); fewer at the file's end."""
        if self._mapped is not None:
            return self._mapped[start:stop]
        from olmo.io.http_client import read_range

        width = self._dtype.itemsize
        return np.frombuffer(read_range(self._url, start * width, stop * width), self._dtype)
