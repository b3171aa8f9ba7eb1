"""Downloads: resumable by http(s), else by the client of a URL's scheme (hf, s3, gs, …)."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olmo.io import sealed
from olmo.io.http_client import (
    TransientError,
    check_status,
    content_length,
    get_validator,
    is_http,
    request,
    to_public_url,
)
from olmo.io.sealed import Damaged
from olmo.runtime.urls import check_no_secrets, redact, stash_secrets

if TYPE_CHECKING:
    import requests
    from tenacity import RetryCallState, Retrying

BLOCK_BYTES = 1 << 20
MAX_FRUITLESS_ATTEMPTS = 6  # attempts in a row without a new byte
MAX_WAIT_S = 300.0  # of a Retry-After header
MIN_FREE_BYTES = 1 << 30  # left free on the disk (1 % of a small one) while a size is not known
HUB_DATASETS = "hf://datasets/"  # owner/name[@revision]/file
Progress = Callable[[int], None]  # called with the number of bytes that have just arrived


def ignore_progress(_: int) -> None:
    """The default Progress."""


# Errors of the own disk that a client of a remote store passes on.
LOCAL_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)


class TooLarge(ValueError):
    """A file has more bytes than `max_bytes`: at least `found`."""

    def __init__(self, name: str, max_bytes: int, found: int) -> None:
        super().__init__(f"{name}: expected {max_bytes:,} bytes at most, found {found:,} or more")
        self.max_bytes, self.found = max_bytes, found


class DiskFull(OSError):
    """A file has more bytes than the disk has room for.

    An OSError: no other mirror helps, and the file is not left out (a ValueError may be).
    """


def check_size(name: str, size: int, max_bytes: int | None, path: Path | None = None) -> None:
    """Check a file's size before it is written to `path`.

    Raises:
        TooLarge: it has more than `max_bytes`.
        DiskFull: the disk of `path` has no room for it.
    """
    if max_bytes is not None and size > max_bytes:
        raise TooLarge(name, max_bytes, size)
    if path is not None and size > (free := shutil.disk_usage(path.parent).free):
        raise DiskFull(
            f"{name}: the disk is full: {size:,} bytes do not fit on the disk of {path.parent}, of "
            f"which {free:,} are free; make room, or use another disk (OLMO_STORE)"
        )


def fetch(
    url: str,
    path: Path,
    part: Path,
    progress: Progress = ignore_progress,
    max_bytes: int | None = None,
) -> dict[str, Any]:
    """Download a file to `path`. Facts: its bytes, and by http how many were received.

    Stops at the first byte beyond `max_bytes`, and before the disk is full.

    http(s) resumes an interrupted download, of an earlier process too, from the folder `part`.
    hf://, s3://, gs:// and other schemes use their own clients.

    Raises:
        ValueError: the file is not available (TooLarge; NotFound by http); one line.
        OSError: `path` cannot be written (DiskFull).
    """
    url = to_public_url(stash_secrets(url))
    part.mkdir(parents=True, exist_ok=True)
    if is_http(url):
        return Download(url, part, progress, max_bytes).run(path)
    with explain_client_errors(url):
        cached = fetch_by_client(url, part, max_bytes)
    shutil.copyfile(cached, path)
    return {"bytes": path.stat().st_size}


@contextmanager
def explain_client_errors(url: str) -> Iterator[None]:
    """Raise a client's errors as a ValueError of one line that begins with the URL.

    Those of the own disk remain an OSError.
    """
    try:
        yield
    except (TooLarge, DiskFull):
        raise
    except Exception as error:  # each client has its own errors
        if isinstance(error, ImportError):
            raise ValueError(f"{url} needs a package: {error}") from error
        if isinstance(error, OSError) and error.errno in (*LOCAL_ERRORS, errno.EACCES):
            raise
        message = redact(" ".join(str(error).split()))  # some have several lines
        message = "not found" if message == url else message  # Google's client gives the URL alone
        raise ValueError(f"{url}: {type(error).__name__}: {message}") from error


def fetch_by_client(url: str, part: Path, max_bytes: int | None = None) -> Path:
    """Download a file by the client of its scheme; its path in that client's cache.

    The size is checked first, since these clients cannot be stopped.
    """
    check_no_secrets(url)
    if url.startswith(HUB_DATASETS):  # cached-path supports the hub's models only
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

        parts = url.removeprefix(HUB_DATASETS).split("/", 2)
        if len(parts) != 3:
            raise ValueError(f"expected {HUB_DATASETS}<owner>/<name>/<file>")
        owner, name, file = parts
        name, _, revision = name.partition("@")
        repository: dict[str, Any] = {"repo_type": "dataset", "revision": revision or None}
        size = get_hf_file_metadata(hf_hub_url(f"{owner}/{name}", file, **repository)).size
        check_size(url, size or 0, max_bytes, part)
        return Path(hf_hub_download(f"{owner}/{name}", file, cache_dir=part / "hub", **repository))
    from cached_path import cached_path
    from cached_path.schemes import get_scheme_client

    if not url.startswith("hf://"):  # of the hub's models cached-path reports no size
        check_size(url, get_scheme_client(url).get_size() or 0, max_bytes, part)
    return Path(cached_path(url, cache_dir=part / "cached-path"))


def make_retry(give_up: Callable[[RetryCallState], bool]) -> Retrying:
    """Calls a function again after a TransientError, with growing waits, until `give_up`."""
    from tenacity import Retrying, retry_if_exception_type
    from tenacity.wait import wait_exponential_jitter

    backoff = wait_exponential_jitter(multiplier=0.2, max=30, jitter=0.2)

    def wait(state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        wait_s = error.wait_s if isinstance(error, TransientError) else None
        return backoff(state) if wait_s is None else min(wait_s, MAX_WAIT_S)

    return Retrying(
        retry=retry_if_exception_type(TransientError), stop=give_up, wait=wait, reraise=True
    )


class Download:
    """One resumable http download.

    part/body           the bytes received so far
    part/progress.json  the server's validator (ETag, else Last-Modified) and size of the file
    """

    def __init__(
        self, url: str, part: Path, progress: Progress, max_bytes: int | None = None
    ) -> None:
        self.url = url
        self.max_bytes = max_bytes
        self.body = part / "body"
        self.metadata_path = part / "progress.json"
        self.progress = progress
        self.metadata: dict[str, Any] = {}
        if self.body.exists() and self.metadata_path.exists():
            with suppress(Damaged):  # then the download starts over
                self.metadata = sealed.load_file(self.metadata_path)
        if max_bytes is not None and self.size > max_bytes:
            self.reset()
        self.received = 0
        self.resumed = 0

    @property
    def size(self) -> int:
        return self.body.stat().st_size if self.metadata else 0

    def run(self, path: Path) -> dict[str, Any]:
        """Retry until the file is complete, then move it to `path`."""
        import requests

        largest, fruitless = self.size, 0

        def give_up(state: RetryCallState) -> bool:
            nonlocal largest, fruitless
            fruitless = 0 if self.size > largest else fruitless + 1
            largest = max(largest, self.size)
            return fruitless >= MAX_FRUITLESS_ATTEMPTS

        retry = make_retry(give_up)
        with requests.Session() as session:
            try:
                retry(self.attempt, session)
            except TransientError as error:
                raise ValueError(
                    f"{self.url}: {error}; gave up after {MAX_FRUITLESS_ATTEMPTS} attempts without "
                    f"a new byte. The {self.size:,} bytes that arrived are kept: see to the "
                    "network or correct the URL, then run the same command again"
                ) from error
        os.replace(self.body, path)
        self.metadata_path.unlink()
        return {
            "bytes": path.stat().st_size,
            "received": self.received,
            "resumed": self.resumed,
            "validator": self.metadata.get("validator"),
        }

    def attempt(self, session: requests.Session) -> None:
        """Request the missing bytes. Raises TransientError if some are missing afterwards."""
        have = self.size
        headers = {}
        if have:
            headers["Range"] = f"bytes={have}-"
            if self.metadata["validator"]:
                headers["If-Range"] = self.metadata["validator"]
        with request("GET", self.url, headers, session) as response:
            if self.accept(response, have):
                return
            self.receive(response)
        total = self.metadata["bytes"]
        if total is not None and self.size < total:
            raise TransientError(f"expected {total:,} bytes, found {self.size:,}")

    def accept(self, response: requests.Response, have: int) -> bool:
        """Check the headers and prepare the file for the body. True: the file is complete."""
        check_status(response, self.url)
        if response.status_code == 416:  # nothing after the `have` bytes
            total = response.headers.get("Content-Range", "").rpartition("/")[2]
            if total == str(have):
                return True
            self.reset()
            raise TransientError("the server has other bytes than those that arrived before")
        validator = get_validator(response)
        if response.status_code == 206:
            start, _, total = response.headers.get("Content-Range", "").partition("/")
            fits = start.startswith(f"bytes {have}-") and total in (
                "*",
                str(self.metadata["bytes"]),
            )
            if not fits or (validator or None) != self.metadata["validator"]:
                self.reset()
                raise TransientError("the file changed on the server between two attempts")
            self.resumed += 1
            return False
        self.metadata = {"validator": validator, "bytes": content_length(response)}
        self.body.write_bytes(b"")
        check_size(self.url, self.metadata["bytes"] or 0, self.max_bytes, self.body)
        sealed.write_atomic(self.metadata_path, sealed.dumps(self.metadata))
        return False

    def receive(self, response: requests.Response) -> None:
        """Append the body to the file."""
        with open(self.body, "ab") as file:
            size = file.tell()
            for block in response.raw.stream(BLOCK_BYTES, decode_content=False):
                size += len(block)
                try:
                    check_size(self.url, size, self.max_bytes)
                    self.check_room()
                    if self.metadata["bytes"] is not None and size > self.metadata["bytes"]:
                        raise TransientError(
                            f"the server sends more than the {self.metadata['bytes']:,} bytes"
                            " that it announced"
                        )
                except (TooLarge, DiskFull, TransientError):
                    file.truncate(0)
                    self.reset()
                    raise
                file.write(block)
                self.received += len(block)
                self.progress(len(block))

    def check_room(self) -> None:
        """Raises DiskFull if a file of unknown size is about to fill the disk."""
        disk = shutil.disk_usage(self.body.parent)
        if self.metadata["bytes"] is None and disk.free < min(MIN_FREE_BYTES, disk.total // 100):
            raise DiskFull(
                f"{self.url}: the disk of {self.body.parent} is almost full, and the server does "
                f"not send the file's size; {disk.free:,} bytes are free, and the partial download "
                "was removed. Make room, or use another disk (OLMO_STORE)"
            )

    def reset(self) -> None:
        """Forget the received bytes."""
        self.metadata = {}
        self.metadata_path.unlink(missing_ok=True)
