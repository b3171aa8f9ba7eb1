"""A remote folder: a bucket (s3, r2, weka, gs, by fsspec) or a folder of the file system.

    bucket = Bucket("s3://name/runs/a")
    bucket.put(path, "step10/model.pt")
    bucket.sizes()  # {"step10/model.pt": 1234}

Uploads are atomic.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from olmo.io.downloads import LOCAL_ERRORS, TooLarge, check_size
from olmo.io.http_client import NotFound
from olmo.runtime.urls import check_no_secrets, redact, restore_secrets, stash_secrets

# Schemes with S3's protocol. R2_ENDPOINT_URL is the address of R2, R2_PROFILE the profile with its
# credentials. S3 itself is configured by its own AWS_… variables, and S3_PROFILE.
S3_SCHEMES = ("s3", "r2", "weka")
MAX_READ_BYTES = 256 * 2**20  # of a file that is read into memory


class BucketError(ValueError):
    """The place fails, or refuses: whether a file is there, and sound, is not known."""


class Bucket:
    """Files by their names under a URL.

    Methods raise BucketError or NotFound, one line, for an error there, and OSError if
    a disk here fails.
    """

    def __init__(self, url: str) -> None:
        self.url = stash_secrets(url).rstrip("/")
        address = restore_secrets(self.url)
        scheme, is_url, rest = address.partition("://")
        # No cached listings: this process changes the files.
        options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
        if is_url and scheme in (*S3_SCHEMES, "gs"):
            check_no_secrets(self.url)
        if is_url and scheme in S3_SCHEMES:
            endpoint = os.environ.get(f"{scheme.upper()}_ENDPOINT_URL")
            if scheme != "s3" and endpoint is None:
                raise ValueError(
                    f"{self.url}: {scheme.upper()}_ENDPOINT_URL is not set; it must name the server"
                )
            profile = os.environ.get(f"{scheme.upper()}_PROFILE")
            options |= {"endpoint_url": endpoint, "profile": profile}
            address = f"s3://{rest}"
        with self._explain_errors(""):
            import fsspec

            self._fs, self._root = fsspec.core.url_to_fs(address, **options)
        self.folder = "file" in self._fs.protocol

    def make_folder(self) -> None:
        """Make the place, if it is a folder. Raises OSError where it cannot be made."""
        if self.folder:
            Path(self._root).mkdir(parents=True, exist_ok=True)

    def sizes(self, below: str = "") -> dict[str, int]:
        """Bytes of each file, by its name in the bucket's folder `below`."""
        folder = f"{self._root}/{below}".rstrip("/")
        with self._explain_errors(below):
            found = self._fs.find(folder, detail=True)
        return {path.removeprefix(f"{folder}/"): int(info["size"]) for path, info in found.items()}

    def size(self, name: str) -> int | None:
        """Bytes of a file; None if it does not exist."""
        try:
            with self._explain_errors(name):
                return int(self._fs.info(f"{self._root}/{name}")["size"])
        except NotFound:
            return None

    def put(self, path: Path, name: str) -> None:
        """Upload a file, and check the size of the upload."""
        with self._explain_errors(name):
            if self.folder:
                target = Path(self._root, name)
                target.parent.mkdir(parents=True, exist_ok=True)
                draft = target.with_name(
                    f".{uuid.uuid4().hex[:8]}"
                )  # two processes may upload one file
                try:
                    shutil.copyfile(path, draft)
                    os.replace(draft, target)
                finally:
                    draft.unlink(missing_ok=True)
            else:  # atomic by itself
                self._fs.put_file(str(path), f"{self._root}/{name}")
            expected = path.stat().st_size
        if (size := self.size(name)) != expected:
            raise ValueError(f"{self.url}/{name} has {size} bytes, expected {expected}")

    def get(self, name: str, path: Path, max_bytes: int | None = None) -> None:
        """Download a file.

        Raises:
            NotFound: no such file.
            TooLarge: it has more than `max_bytes`.
            DiskFull: the local disk has no room for it.
        """
        size = self.size(name) or 0
        check_size(f"{self.url}/{name}", size, max_bytes, path)
        with self._explain_errors(name):
            # A folder's copy has no callback; its file is not expected to grow meanwhile.
            options = {} if self.folder else {"callback": _size_limit(f"{self.url}/{name}", size)}
            self._fs.get_file(f"{self._root}/{name}", str(path), **options)

    def read(self, name: str, max_bytes: int = MAX_READ_BYTES) -> bytes:
        """The content of a small file. Raises NotFound; TooLarge above `max_bytes`."""
        check_size(f"{self.url}/{name}", self.size(name) or 0, max_bytes)
        with self._explain_errors(name):
            return self._fs.cat_file(f"{self._root}/{name}")

    def read_beginning(self, name: str, count: int) -> bytes:
        """The first `count` bytes of a file, or all if it has fewer. Raises NotFound."""
        with self._explain_errors(name):
            return self._fs.cat_file(f"{self._root}/{name}", start=0, end=count)

    def remove(self, name: str) -> None:
        with self._explain_errors(name):
            self._fs.rm_file(f"{self._root}/{name}")

    @contextlib.contextmanager
    def _explain_errors(self, name: str) -> Iterator[None]:
        """Raise the client's errors as BucketError or NotFound: a line, beginning with the URL."""
        url = f"{self.url}/{name}".rstrip("/")
        try:
            yield
        except TooLarge:
            raise
        except ImportError as error:  # fsspec names the missing package
            raise ValueError(f"{url}: {error}") from error
        except Exception as error:
            if isinstance(error, OSError) and error.errno in LOCAL_ERRORS:
                raise
            kind = NotFound if isinstance(error, FileNotFoundError) else BucketError
            reason = redact(next(iter(str(error).splitlines()), ""))
            raise kind(f"{url}: {type(error).__name__}: {reason}") from error


def _size_limit(name: str, max_bytes: int) -> Any:
    """A callback that ends a transfer at the first block beyond the announced size."""
    from fsspec.callbacks import Callback

    class Bounded(Callback):  # type: ignore[misc]
        def set_size(self, size: int | None) -> None:
            self.check(size or 0)

        def relative_update(self, inc: int = 1) -> None:
            self.value += inc
            self.check(self.value)

        def check(self, size: int) -> None:
            check_size(name, size, max_bytes)

    return Bounded()
