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
from olmo.runtime.urls import entrusted, public, refuse_secrets, whole

if TYPE_CHECKING:
    import requests

BLOCK = 1 << 20
CONNECT_S, STALL_S = 20, 60  # no connection, no byte for so long: the attempt failed
FRUITLESS = 6  # attempts in a row that bring not one new byte, until we give up
LONGEST_WAIT_S = 300.0  # however long a server asks us to wait
MARGIN = 1 << 30  # bytes of a disk, or a hundredth of it, that what has no known end leaves free
# Buckets whose contents are public by http as well, where no key is needed.
KEYLESS = {
    "r2://olmo-data/": "https://olmo-data.org/",
    "r2://olmo-checkpoints/": "https://olmo-checkpoints.org/",
}
HUB_DATASETS = "hf://datasets/"  # owner/name[@revision]/file
Progress = Callable[[int], None]  # called with the number of bytes that have just arrived


def unseen(_: int) -> None:
    """Progress that nobody looks at."""


class Passing(Exception):
    """A failure that may pass: the attempt is made again, after `wait_s` if the server said so."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class NotThere(ValueError):
    """The server has no such file, and says so."""


class TooLong(ValueError):
    """More bytes than belong there: at least `found`."""

    def __init__(self, name: str, most: int, found: int) -> None:
        super().__init__(f"{name}: expected {most:,} bytes at most, found {found:,} or more")
        self.most, self.found = most, found


class NoRoom(ValueError):
    """More bytes than the disk has room for."""


def refuse_too_long(name: str, size: int, most: int | None, path: Path | None = None) -> None:
    """Raises TooLong for more bytes than `most`, NoRoom for more than fit on the disk of `path`."""
    if most is not None and size > most:
        raise TooLong(name, most, size)
    if path is not None and size > (free := shutil.disk_usage(path.parent).free):
        raise NoRoom(
            f"{name}: the disk is full: {size:,} bytes do not fit on the disk of {path.parent}, of "
            f"which {free:,} are free; make room, or use another disk (OLMO_STORE)"
        )


def refuse_links(*places: Path) -> None:
    """Raises ValueError where a file, or a file in a folder, that is to be written lies in a store.

    A write goes through a link: it would change an object that must never change (and as root,
    whom no permission stops, it would not even be noticed).
    """
    for place in places:
        inner = place.iterdir() if place.is_dir() else ()
        if any(in_store(path) for path in (place, *inner)):
            raise ValueError(
                f"expected a place of your own to write to, found {place}, which the pipeline made "
                "of links into its store; name another one"
            )


def in_store(path: Path) -> bool:
    """Whether a path leads into a store, which is known by its folders; see olmo.store.store."""
    parents = Path(os.path.realpath(path)).parents
    return any((p / "objects").is_dir() and (p / "actions").is_dir() for p in parents)


def keyless(url: str) -> str:
    """The address that needs no credentials, where there is one: r2://olmo-data/… by https."""
    for root, place in KEYLESS.items():
        if url.startswith(root):
            return place + url.removeprefix(root)
    return url


def is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def fetch(
    url: str, path: Path, part: Path, progress: Progress = unseen, most: int | None = None
) -> dict[str, Any]:
    """Bring what `url` names to `path`. Facts: how many bytes, how many came over the net.

    It ends at the first byte beyond `most`, and before the disk is full.

    http and https resume where an attempt ended, also one of an earlier process: `part` is a
    folder that keeps what has arrived. hf://, s3://, gs:// and so on go through their clients.

    Raises ValueError, one line, when it is not available (NotThere, TooLong, NoRoom); OSError
    when it cannot be written.
    """
    url = keyless(entrusted(url))
    part.mkdir(parents=True, exist_ok=True)
    if is_http(url):
        return Download(url, part, progress, most).to(path)
    try:
        found = by_client(url, part, most)
    except (TooLong, NoRoom):
        raise
    except Exception as error:  # each scheme's client raises its own
        if isinstance(error, ImportError):
            raise ValueError(f"{url} needs a package: {error}") from error
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES):
            raise
        said = public(" ".join(str(error).split()))  # some speak in paragraphs
        said = "not found" if said == url else said  # Google's client has no more to say
        raise ValueError(f"{url}: {type(error).__name__}: {said}") from error
    shutil.copyfile(found, path)
    return {"bytes": path.stat().st_size}


def by_client(url: str, part: Path, most: int | None = None) -> Path:
    """Bring a file by the client of its scheme; where it lies in that client's cache.

    These clients are asked for its size first: they cannot be stopped.
    """
    refuse_secrets(url)
    if url.startswith(HUB_DATASETS):  # cached-path knows only the hub's models
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

        parts = url.removeprefix(HUB_DATASETS).split("/", 2)
        if len(parts) != 3:
            raise ValueError(f"expected {HUB_DATASETS}<owner>/<name>/<file>")
        owner, name, file = parts
        name, _, revision = name.partition("@")
        there: dict[str, Any] = {"repo_type": "dataset", "revision": revision or None}
        told = get_hf_file_metadata(hf_hub_url(f"{owner}/{name}", file, **there)).size
        refuse_too_long(url, told or 0, most, part)
        return Path(hf_hub_download(f"{owner}/{name}", file, cache_dir=part / "hub", **there))
    from cached_path import cached_path
    from cached_path.schemes import get_scheme_client

    if not url.startswith("hf://"):  # which is a hub's model; its files are those of a repository
        refuse_too_long(url, get_scheme_client(url).get_size() or 0, most, part)
    return Path(cached_path(url, cache_dir=part / "cached-path"))


class Download:
    """One http download: the bytes that have arrived, and what tells whether they still fit.

    part/body      the bytes so far
    part/told.json what the server said of them: its validator (ETag, else Last-Modified), the size
    """

    def __init__(self, url: str, part: Path, progress: Progress, most: int | None = None) -> None:
        self.url = url
        self.most = most
        self.body = part / "body"
        self.told_path = part / "told.json"
        self.progress = progress
        self.told: dict[str, Any] = {}
        if self.body.exists() and self.told_path.exists():
            with suppress(Damaged):  # else what has arrived is of no use
                self.told = sealed.read(self.told_path)
        if most is not None and self.size > most:
            self.forget()
        self.received = 0
        self.resumed = 0

    @property
    def size(self) -> int:
        return self.body.stat().st_size if self.told else 0

    def to(self, path: Path) -> dict[str, Any]:
        """Attempt until the whole is here, then move it to `path`."""
        import requests
        from tenacity import RetryCallState, Retrying, retry_if_exception_type
        from tenacity.wait import wait_exponential_jitter

        most, fruitless = self.size, 0

        def give_up(state: RetryCallState) -> bool:
            nonlocal most, fruitless
            fruitless = 0 if self.size > most else fruitless + 1
            most = max(most, self.size)
            return fruitless >= FRUITLESS

        def wait(state: RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            asked = error.wait_s if isinstance(error, Passing) else None
            return backoff(state) if asked is None else min(asked, LONGEST_WAIT_S)

        backoff = wait_exponential_jitter(multiplier=0.2, max=30, jitter=0.2)
        again = Retrying(
            retry=retry_if_exception_type(Passing), stop=give_up, wait=wait, reraise=True
        )
        with requests.Session() as session:
            try:
                again(self.attempt, session)
            except Passing as error:
                raise ValueError(
                    f"{self.url}: {error}; gave up after {FRUITLESS} attempts without a new byte. "
                    f"The {self.size:,} bytes that arrived are kept: run the same command again"
                ) from error
        os.replace(self.body, path)
        self.told_path.unlink()
        return {
            "bytes": path.stat().st_size,
            "received": self.received,
            "resumed": self.resumed,
            "validator": self.told.get("validator"),
        }

    def attempt(self, session: requests.Session) -> None:
        """Ask for what is missing; returns when all is here, raises Passing when not yet."""
        import requests
        import urllib3

        have = self.size
        headers = {"Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
            if self.told["validator"]:
                headers["If-Range"] = self.told["validator"]
        try:
            with session.get(
                whole(self.url), headers=headers, stream=True, timeout=(CONNECT_S, STALL_S)
            ) as response:
                if self.begin(response, have):
                    return
                self.receive(response)
        except requests.TooManyRedirects as error:
            raise ValueError(f"{self.url}: the server redirects in a circle") from error
        except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema) as error:
            said = public(str(error))
            raise ValueError(f"{self.url}: not an address that can be asked: {said}") from error
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            raise Passing(f"the connection failed: {reason(error)}") from error
        total = self.told["bytes"]
        if total is not None and self.size < total:
            raise Passing(f"expected {total:,} bytes, found {self.size:,}")

    def begin(self, response: requests.Response, have: int) -> bool:
        """Judge an answer's head and ready the file for its body. True: nothing is missing."""
        refuse_status(response, self.url)
        if response.status_code == 416:  # we asked for what lies after the end
            total = response.headers.get("Content-Range", "").rpartition("/")[2]
            if total == str(have):
                return True
            self.forget()
            raise Passing("the server has other bytes than those that arrived before")
        validator = validator_of(response)
        if response.status_code == 206:
            start, _, total = response.headers.get("Content-Range", "").partition("/")
            fits = start.startswith(f"bytes {have}-") and total in ("*", str(self.told["bytes"]))
            if not fits or (validator or None) != self.told["validator"]:
                self.forget()
                raise Passing("the file changed on the server between two attempts")
            self.resumed += 1
            return False
        self.told = {"validator": validator, "bytes": length_of(response)}
        self.body.write_bytes(b"")
        refuse_too_long(self.url, self.told["bytes"] or 0, self.most, self.body)
        sealed.write(self.told_path, sealed.dumps(self.told))
        return False

    def receive(self, response: requests.Response) -> None:
        with open(self.body, "ab") as file:
            # As sent: some servers call a .gz file's own compression a Content-Encoding.
            size = file.tell()
            for block in response.raw.stream(BLOCK, decode_content=False):
                size += len(block)
                try:
                    refuse_too_long(self.url, size, self.most)
                    self.leave_room()
                    if self.told["bytes"] is not None and size > self.told["bytes"]:
                        raise Passing(
                            f"the server sends more than the {self.told['bytes']:,} bytes"
                            " that it told"
                        )
                except (TooLong, NoRoom, Passing):
                    file.truncate(0)
                    self.forget()
                    raise
                file.write(block)
                self.received += len(block)
                self.progress(len(block))

    def leave_room(self) -> None:
        """Raises NoRoom where what has no known end is about to fill the disk."""
        disk = shutil.disk_usage(self.body.parent)
        if self.told["bytes"] is None and disk.free < min(MARGIN, disk.total // 100):
            raise NoRoom(
                f"{self.url}: the disk of {self.body.parent} is almost full, and the server does "
                f"not tell where the file ends; {disk.free:,} bytes are free, and what had arrived "
                "was removed. Make room, or use another disk (OLMO_STORE)"
            )

    def forget(self) -> None:
        """Start over: what has arrived is of no use."""
        self.told = {}
        self.told_path.unlink(missing_ok=True)


def refuse_status(response: requests.Response, url: str) -> None:
    """Raises ValueError for an answer that is final, Passing for one that may change."""
    status = response.status_code
    said = f"the server answered {status} {response.reason or ''}".rstrip()
    if status in (200, 206, 416):
        return
    if status in (408, 425, 429) or status >= 500:
        raise Passing(said, retry_after(response.headers.get("Retry-After")))
    remedy = {
        401: "it wants credentials",
        403: "access is refused: check the address, or ask its owner for access",
        404: "there is no such file: check the address",
        410: "the file was taken away",
    }
    kind = NotThere if status in (404, 410) else ValueError
    raise kind(f"{url}: {said}; {remedy.get(status, 'expected 200')}")


def retry_after(value: str | None) -> float | None:
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


def validator_of(response: requests.Response) -> str | None:
    """What names this version of the file; a weak ETag does not vouch for single bytes."""
    tag = response.headers.get("ETag")
    return tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified")


def reason(error: BaseException) -> str:
    """The innermost cause in a few words: the libraries wrap it many times over."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return public(f"{type(error).__name__}: {error}")


def length_of(response: requests.Response) -> int | None:
    """Content-Length; None where there is none, or no number."""
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isascii() and length.isdecimal() and len(length) < 19 else None


def sizes(urls: Iterable[str], threads: int = 16) -> list[int | None]:
    """Bytes of each file as its server tells them, without fetching; None where it does not."""
    import requests

    def ask_size(url: str) -> int | None:
        try:
            with session.head(
                whole(keyless(entrusted(url))),
                allow_redirects=True,
                headers={"Accept-Encoding": "identity"},
                timeout=(CONNECT_S, STALL_S),
            ) as response:
                return length_of(response) if response.ok else None
        except requests.RequestException:
            return None

    with requests.Session() as session, ThreadPoolExecutor(threads) as pool:
        return list(pool.map(ask_size, urls))
