"""Beginnings: the first bytes of a file that is elsewhere, without the rest of it."""

from __future__ import annotations

from dataclasses import dataclass

from olmo.io.bucket import Bucket
from olmo.io.downloads import (
    MAX_FRUITLESS_ATTEMPTS,
    Progress,
    explain_client_errors,
    ignore_progress,
    make_retry,
)
from olmo.io.http_client import (
    NotFound,
    TransientError,
    check_status,
    content_length,
    is_http,
    request,
    to_public_url,
)
from olmo.runtime.urls import stash_secrets


@dataclass(frozen=True)
class Beginning:
    """The first bytes of a file, and the bytes of the whole file; None: the server tells not."""

    content: bytes
    size: int | None


def fetch_beginning(url: str, count: int, progress: Progress = ignore_progress) -> Beginning:
    """The first `count` bytes of a file, or all if it has fewer; no more of it is read.

    By http, a byte range is requested; from a server that knows no ranges, the connection is closed
    after `count` bytes. Other schemes (s3, r2, gs, hf) use their own clients.

    Raises:
        ValueError: the file is not available, as `olmo.io.downloads.fetch` says it; one line.
    """
    url = to_public_url(stash_secrets(url))
    if is_http(url):
        try:
            found = make_retry(lambda state: state.attempt_number >= MAX_FRUITLESS_ATTEMPTS)(
                _request_beginning, url, count
            )
        except TransientError as error:
            raise ValueError(
                f"{url}: {error}; gave up after {MAX_FRUITLESS_ATTEMPTS} attempts: see to the "
                "network or correct the URL, then run the same command again"
            ) from error
    else:
        folder, _, name = url.rpartition("/")
        with explain_client_errors(url):
            bucket = Bucket(folder)
            size = bucket.size(name)
            if size is None:
                raise NotFound("there is no such file: check the address")
            found = Beginning(bucket.read_beginning(name, min(count, size)), size)
    progress(len(found.content))
    return found


def _request_beginning(url: str, count: int) -> Beginning:
    """One attempt. Raises TransientError if bytes are missing."""
    with request("GET", url, {"Range": f"bytes=0-{count - 1}"}) as response:
        check_status(response, url)
        if response.status_code == 416:  # of an empty file no byte can be requested
            return Beginning(b"", 0)
        size = content_length(response)
        if response.status_code == 206:
            span, _, total = response.headers.get("Content-Range", "").partition("/")
            if not span.startswith("bytes 0-"):
                raise TransientError(
                    f"expected bytes from 0 on, the server sent {span or 'others'}"
                )
            size = int(total) if total.isascii() and total.isdecimal() else None
        blocks, left = [], count
        while left and (block := response.raw.read(left, decode_content=False)):
            blocks.append(block)
            left -= len(block)
    content = b"".join(blocks)
    if size is not None and len(content) < min(count, size):
        raise TransientError(f"expected {min(count, size):,} bytes, found {len(content):,}")
    if size is not None and len(content) > size:
        raise TransientError(f"the server sends more than the {size:,} bytes that it announced")
    if size is None and len(content) < count:
        size = len(content)
    return Beginning(content, size)
