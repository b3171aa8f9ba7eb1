"""Token files: local ones mapped into memory, remote ones read by byte ranges over http.

A file of AI2's published data has gigabytes; one batch of it is a few kilobytes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from glob import has_magic
from pathlib import Path
from typing import Any

import numpy as np

from olmo.config.enums import TokenType

TRIES = 5  # of one range; the wait doubles from half a second


def is_url(path: str | Path) -> bool:
    return "://" in str(path)


def file_sizes(paths: Sequence[str | Path]) -> list[int]:
    """Bytes of each file, in order. Raises FileNotFoundError for a missing one."""
    from_urls: dict[str, int | None] = {}
    if urls := sorted({str(path) for path in paths if is_url(path)}):
        from olmo.io.downloads import request_sizes

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


def bytes_per_token(dtype: str) -> int:
    """Raises ValueError for a dtype that token files do not have."""
    if dtype not in list(TokenType):
        raise ValueError(f"dtype: expected one of {', '.join(TokenType)}, found {dtype!r}")
    return np.dtype(dtype).itemsize


class TokenFile:
    """A raw array without a header, local or at a URL, read by slices."""

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
        width = self._dtype.itemsize
        return np.frombuffer(_read_range(self._url, start * width, stop * width), self._dtype)


def _read_range(url: str, start: int, stop: int) -> bytes:
    """Bytes `start` … `stop` - 1 of a URL. Raises ValueError after TRIES failures."""
    import requests
    import urllib3

    from olmo.io.downloads import is_http, to_public_url
    from olmo.runtime.urls import restore_secrets, stash_secrets

    url = stash_secrets(url)
    address = to_public_url(url)
    if not is_http(address):
        raise ValueError(f"token files are read from local paths or http(s), not from {url}")
    wait, reason = 0.5, ""
    for _ in range(TRIES):
        try:
            span = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
            with requests.get(
                restore_secrets(address), headers=span, timeout=30, stream=True
            ) as response:
                if response.status_code == 206:
                    content: bytes = response.raw.read(stop - start + 1, decode_content=False)
                    if len(content) <= stop - start:
                        return content
                    raise ValueError(f"{url}: expected {stop - start:,} bytes at most, found more")
                if response.status_code < 500:
                    raise ValueError(
                        f"{url}: expected a part of the file (206), the server answered "
                        f"{response.status_code}; download the file and give its path"
                    )
                reason = f"the server answered {response.status_code}"
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            reason = type(error).__name__
        time.sleep(wait)
        wait *= 2
    raise ValueError(f"{url}: {reason}, {TRIES} times in a row")
