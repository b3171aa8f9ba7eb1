"""Bytes from elsewhere: resumable downloads, sizes, and the schemes that name places.

A URL's secrets are put back here, where its server is asked, and nowhere else: olmo.runtime.urls.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olmo.io import sealed
from olmo.io.sealed import Damaged
from olmo.runtime.urls import check_no_secrets, redact, restore_secrets, stash_secrets

if TYPE_CHECKING:
    import requests

BLOCK_BYTES = 1 << 20
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 20, 60  # no connection, no byte for so long: the attempt failed
MAX_FRUITLESS_ATTEMPTS = 6  # attempts in a row that bring not one new byte, until we give up
MAX_WAIT_S = 300.0  # however long a server asks us to wait
MIN_FREE_BYTES = (
    1 << 30
)  # bytes of a disk, or a hundredth of it, that what has no known end leaves free
# Buckets whose contents are public by http as well, where no key is needed.
PUBLIC_MIRRORS = {
    "r2://olmo-data/": "https://olmo-data.org/",
    "r2://olmo-checkpoints/": "https://olmo-checkpoints.org/",
}
HUB_DATASETS = "hf://datasets/"  # owner/name[@revision]/file
Progress = Callable[[int], None]  # called with the number of bytes that have just arrived


def ignore_progress(_: int) -> None:
    """Progress that nobody looks at."""


class TransientError(Exception):
    """A failure that may pass: the attempt is made again, after `wait_s` if the server said so."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class NotFound(ValueError):
    """The server has no such file, and says so."""


class TooLarge(ValueError):
    """More bytes than belong there: at least `found`."""

    def __init__(self, name: str, max_bytes: int, found: int) -> None:
        super().__init__(f"{name}: expected {max_bytes:,} bytes at most, found {found:,} or more")
        self.max_bytes, self.found = max_bytes, found


class DiskFull(ValueError):
    """More bytes than the disk has room for."""


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


def check_not_in_store(*places: Path) -> None:
    """Raises ValueError where a file, or a file in a folder, that is to be written lies in a store.

    A write goes through a link: it would change an object that must never change (and as root,
    whom no permission stops, it would not even be noticed).
    """
    for place in places:
        inner = place.iterdir() if place.is_dir() else ()
        if any(is_in_store(path) for path in (place, *inner)):
            raise ValueError(
                f"expected a place of your own to write to, found {place}, which the pipeline made "
                "of links into its store; name another one"
            )


def is_in_store(path: Path) -> bool:
    """Whether a path leads into a store, which is known by its folders; see olmo.store.store."""
    parents = Path(os.path.realpath(path)).parents
    return any((p / "objects").is_dir() and (p / "actions").is_dir() for p in parents)


def to_public_url(url: str) -> str:
    """The address that needs no credentials, where there is one: r2://olmo-data/… by https."""
    for root, place in PUBLIC_MIRRORS.items():
        if url.startswith(root):
            return place + url.removeprefix(root)
    return url


def is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def fetch(
    url: str,
    path: Path,
    part: Path,
    progress: Progress = ignore_progress,
    max_bytes: int | None = None,
) -> dict[str, Any]:
    """Bring what `url` names to `path`. Facts: how many bytes, how many came over the net.

    It ends at the first byte beyond `max_bytes`, and before the disk is full.

    http and https resume where an attempt ended, also one of an earlier process: `part` is a
    folder that keeps what has arrived. hf://, s3://, gs:// and so on go through their clients.

    Raises ValueError, one line, when it is not available (NotFound, TooLarge, DiskFull); OSError
    when it cannot be written.
    """
    url = to_public_url(stash_secrets(url))
    part.mkdir(parents=True, exist_ok=True)
    if is_http(url):
        return Download(url, part, progress, max_bytes).run(path)
    try:
        found = fetch_by_client(url, part, max_bytes)
    except (TooLarge, DiskFull):
        raise
    except Exception as error:  # each scheme's client raises its own
        if isinstance(error, ImportError):
            raise ValueError(f"{url} needs a package: {error}") from error
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES):
            raise
        said = redact(" ".join(str(error).split()))  # some speak in paragraphs
        said = "not found" if said == url else said  # Google's client has no more to say
        raise ValueError(f"{url}: {type(error).__name__}: {said}") from error
    shutil.copyfile(found, path)
    return {"bytes": path.stat().st_size}


def fetch_by_client(url: str, part: Path, max_bytes: int | None = None) -> Path:
    """Bring a file by the client of its scheme; where it lies in that client's cache.

    These clients are asked for its size first: they cannot be stopped.
    """
    check_no_secrets(url)
    if url.startswith(HUB_DATASETS):  # cached-path knows only the hub's models
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

        parts = url.removeprefix(HUB_DATASETS).split("/", 2)
        if len(parts) != 3:
            raise ValueError(f"expected {HUB_DATASETS}<owner>/<name>/<file>")
        owner, name, file = parts
        name, _, revision = name.partition("@")
        there: dict[str, Any] = {"repo_type": "dataset", "revision": revision or None}
        told = get_hf_file_metadata(hf_hub_url(f"{owner}/{name}", file, **there)).size
        check_size(url, told or 0, max_bytes, part)
        return Path(hf_hub_download(f"{owner}/{name}", file, cache_dir=part / "hub", **there))
    from cached_path import cached_path
    from cached_path.schemes import get_scheme_client

    if not url.startswith("hf://"):  # which is a hub's model; its files are those of a repository
        check_size(url, get_scheme_client(url).get_size() or 0, max_bytes, part)
    return Path(cached_path(url, cache_dir=part / "cached-path"))


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
            with suppress(Damaged):  # else what has arrived is of no use
                self.metadata = sealed.load_file(self.metadata_path)
        if max_bytes is not None and self.size > max_bytes:
            self.reset()
        self.received = 0
        self.resumed = 0

    @property
    def size(self) -> int:
        return self.body.stat().st_size if self.metadata else 0

    def run(self, path: Path) -> dict[str, Any]:
        """Attempt until the whole is here, then move it to `path`."""
        import requests
        from tenacity import RetryCallState, Retrying, retry_if_exception_type
        from tenacity.wait import wait_exponential_jitter

        largest, fruitless = self.size, 0

        def give_up(state: RetryCallState) -> bool:
            nonlocal largest, fruitless
            fruitless = 0 if self.size > largest else fruitless + 1
            largest = max(largest, self.size)
            return fruitless >= MAX_FRUITLESS_ATTEMPTS

        def wait(state: RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            asked = error.wait_s if isinstance(error, TransientError) else None
            return backoff(state) if asked is None else min(asked, MAX_WAIT_S)

        backoff = wait_exponential_jitter(multiplier=0.2, max=30, jitter=0.2)
        again = Retrying(
            retry=retry_if_exception_type(TransientError), stop=give_up, wait=wait, reraise=True
        )
        with requests.Session() as session:
            try:
                again(self.attempt, session)
            except TransientError as error:
                raise ValueError(
                    f"{self.url}: {error}; gave up after {MAX_FRUITLESS_ATTEMPTS} attempts without "
                    f"a new byte. The {self.size:,} bytes that arrived are kept: run the same "
                    "command again"
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
        """Ask for what is missing; returns when all is here, raises Passing when not yet."""
        import requests
        import urllib3

        have = self.size
        headers = {"Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
            if self.metadata["validator"]:
                headers["If-Range"] = self.metadata["validator"]
        try:
            with session.get(
                restore_secrets(self.url),
                headers=headers,
                stream=True,
                timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S),
            ) as response:
                if self.accept(response, have):
                    return
                self.receive(response)
        except requests.TooManyRedirects as error:
            raise ValueError(f"{self.url}: the server redirects in a circle") from error
        except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema) as error:
            said = redact(str(error))
            raise ValueError(f"{self.url}: not an address that can be asked: {said}") from error
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            raise TransientError(f"the connection failed: {root_cause(error)}") from error
        total = self.metadata["bytes"]
        if total is not None and self.size < total:
            raise TransientError(f"expected {total:,} bytes, found {self.size:,}")

    def accept(self, response: requests.Response, have: int) -> bool:
        """Judge an answer's head and ready the file for its body. True: nothing is missing."""
        check_status(response, self.url)
        if response.status_code == 416:  # we asked for what lies after the end
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
        with open(self.body, "ab") as file:
            # As sent: some servers call a .gz file's own compression a Content-Encoding.
            size = file.tell()
            for block in response.raw.stream(BLOCK_BYTES, decode_content=False):
                size += len(block)
                try:
                    check_size(self.url, size, self.max_bytes)
                    self.check_room()
                    if self.metadata["bytes"] is not None and size > self.metadata["bytes"]:
                        raise TransientError(
                            f"the server sends more than the {self.metadata['bytes']:,} bytes"
                            " that it told"
                        )
                except (TooLarge, DiskFull, TransientError):
                    file.truncate(0)
                    self.reset()
                    raise
                file.write(block)
                self.received += len(block)
                self.progress(len(block))

    def check_room(self) -> None:
        """Raises DiskFull where what has no known end is about to fill the disk."""
        disk = shutil.disk_usage(self.body.parent)
        if self.metadata["bytes"] is None and disk.free < min(MIN_FREE_BYTES, disk.total // 100):
            raise DiskFull(
                f"{self.url}: the disk of {self.body.parent} is almost full, and the server does "
                f"not tell where the file ends; {disk.free:,} bytes are free, and what had arrived "
                "was removed. Make room, or use another disk (OLMO_STORE)"
            )

    def reset(self) -> None:
        """Start over: what has arrived is of no use."""
        self.metadata = {}
        self.metadata_path.unlink(missing_ok=True)


def check_status(response: requests.Response, url: str) -> None:
    """Raises ValueError for an answer that is final, Passing for one that may change."""
    status = response.status_code
    said = f"the server answered {status} {response.reason or ''}".rstrip()
    if status in (200, 206, 416):
        return
    if status in (408, 425, 429) or status >= 500:
        raise TransientError(said, parse_retry_after(response.headers.get("Retry-After")))
    remedy = {
        401: "it wants credentials",
        403: "access is refused: check the address, or ask its owner for access",
        404: "there is no such file: check the address",
        410: "the file was taken away",
    }
    kind = NotFound if status in (404, 410) else ValueError
    raise kind(f"{url}: {said}; {remedy.get(status, 'expected 200')}")


def parse_retry_after(value: str | None) -> float | None:
    """Seconds to wait by a Retry-After header, which holds seconds or a date."""
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
    """What names this version of the file; a weak ETag does not vouch for single bytes."""
    tag = response.headers.get("ETag")
    return tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified")


def root_cause(error: BaseException) -> str:
    """The innermost cause in a few words: the libraries wrap it many times over."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return redact(f"{type(error).__name__}: {error}")


def content_length(response: requests.Response) -> int | None:
    """Content-Length; None where there is none, or no number."""
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isascii() and length.isdecimal() and len(length) < 19 else None


def request_sizes(urls: Iterable[str], threads: int = 16) -> list[int | None]:
    """Bytes of each file as its server tells them, without fetching; None where it does not."""
    import requests

    def ask_size(url: str) -> int | None:
        try:
            with session.head(
                restore_secrets(to_public_url(stash_secrets(url))),
                allow_redirects=True,
                headers={"Accept-Encoding": "identity"},
                timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S),
            ) as response:
                return content_length(response) if response.ok else None
        except requests.RequestException:
            return None

    with requests.Session() as session, ThreadPoolExecutor(threads) as pool:
        return list(pool.map(ask_size, urls))
