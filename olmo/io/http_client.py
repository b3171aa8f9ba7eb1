"""HTTP: requests with one treatment of secrets, timeouts, encodings and failures."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

from olmo.runtime.urls import redact, restore_secrets, stash_secrets

if TYPE_CHECKING:
    import requests

CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 20, 60  # without a connection, without a byte
RANGE_TIMEOUT_S, RANGE_ATTEMPTS = 30, 5  # of a byte range; the wait doubles from half a second
# Buckets whose contents are public by http as well, where no credentials are needed.
PUBLIC_MIRRORS = {
    "r2://olmo-data/": "https://olmo-data.org/",
    "r2://olmo-checkpoints/": "https://olmo-checkpoints.org/",
}


class TransientError(Exception):
    """A failure that may pass; retry after `wait_s` seconds if the server asked for it."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class NotFound(ValueError):
    """The server answered that there is no such file."""


def is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def to_public_url(url: str) -> str:
    """The https address of a file in a public bucket (r2://olmo-data/…); other URLs as they are."""
    for bucket, address in PUBLIC_MIRRORS.items():
        if url.startswith(bucket):
            return address + url.removeprefix(bucket)
    return url


@contextmanager
def request(
    method: str,
    url: str,
    headers: Mapping[str, str] | None = None,
    session: requests.Session | None = None,
    timeout_s: tuple[float, float] | None = None,
) -> Iterator[requests.Response]:
    """Send a request; the block reads the body from the response.

    `url` is redacted (olmo.runtime.urls): its secrets are added here alone. The body is requested
    uncompressed: some servers call the compression of a .gz file a Content-Encoding.

    Raises:
        ValueError: the address is malformed or redirects in a circle.
        TransientError: the connection failed, in the block too.
    """
    import requests
    import urllib3

    try:
        with (session or requests).request(
            method,
            restore_secrets(url),
            headers={"Accept-Encoding": "identity", **(headers or {})},
            allow_redirects=True,
            stream=True,
            timeout=timeout_s or (CONNECT_TIMEOUT_S, READ_TIMEOUT_S),
        ) as response:
            yield response
    except requests.TooManyRedirects as error:
        raise ValueError(f"{url}: the server redirects in a circle") from error
    except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema) as error:
        raise ValueError(f"{url}: not a valid address: {redact(str(error))}") from error
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise TransientError(f"the connection failed: {root_cause(error)}") from error


def check_status(response: requests.Response, url: str) -> None:
    """Raises ValueError for a final error status (NotFound: no such file), else TransientError."""
    status = response.status_code
    answer = f"the server answered {status} {response.reason or ''}".rstrip()
    if status in (200, 206, 416):
        return
    if status in (408, 425, 429) or status >= 500:
        raise TransientError(answer, parse_retry_after(response.headers.get("Retry-After")))
    remedy = {
        401: "it wants credentials",
        403: "access is refused: check the address, or ask its owner for access",
        404: "there is no such file: check the address",
        410: "the file was taken away",
    }
    kind = NotFound if status in (404, 410) else ValueError
    raise kind(f"{url}: {answer}; {remedy.get(status, 'expected 200')}")


def parse_retry_after(value: str | None) -> float | None:
    """Seconds to wait, from a Retry-After header: seconds or a date (RFC 9110, 10.2.3)."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None


def get_validator(response: requests.Response) -> str | None:
    """The header that identifies this version of the file: ETag, else Last-Modified.

    A weak ETag does not: it allows for other bytes (RFC 9110, 8.8.1).
    """
    tag = response.headers.get("ETag")
    return tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified")


def content_length(response: requests.Response) -> int | None:
    """Content-Length; None if it is missing or no number."""
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isascii() and length.isdecimal() and len(length) < 19 else None


def root_cause(error: BaseException) -> str:
    """The innermost error; requests and urllib3 wrap it several times."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return redact(f"{type(error).__name__}: {error}")


def request_sizes(urls: Iterable[str], threads: int = 16) -> list[int | None]:
    """Bytes of each file by a HEAD request; None where the server does not report them."""
    import requests

    def request_size(url: str) -> int | None:
        try:
            with request("HEAD", to_public_url(stash_secrets(url)), session=session) as response:
                return content_length(response) if response.ok else None
        except (TransientError, ValueError):
            return None

    with requests.Session() as session, ThreadPoolExecutor(threads) as pool:
        return list(pool.map(request_size, urls))


def read_range(url: str, start: int, stop: int) -> bytes:
    """Bytes `start` … `stop` - 1 of a file. Raises ValueError after RANGE_ATTEMPTS failures."""
    url = stash_secrets(url)
    address = to_public_url(url)
    if not is_http(address):
        raise ValueError(f"token files are read from local paths or http(s), not from {url}")
    span = {"Range": f"bytes={start}-{stop - 1}"}
    wait, reason = 0.5, ""
    for _ in range(RANGE_ATTEMPTS):
        try:
            with request("GET", address, span, timeout_s=(RANGE_TIMEOUT_S,) * 2) as response:
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
        except TransientError as error:
            reason = str(error)
        time.sleep(wait)
        wait *= 2
    raise ValueError(f"{url}: {reason}, {RANGE_ATTEMPTS} times in a row")
