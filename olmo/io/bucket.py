"""A place that files are put into: a bucket (s3, r2, weka, gs: by fsspec) or another folder.

    place = Bucket("s3://name/runs/a")
    place.put(path, "step10/model.pt")
    place.sizes()  # {"step10/model.pt": 1234}

A file is there whole or not at all.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from olmo.io.downloads import NotFound, TooLarge, check_size
from olmo.runtime.urls import check_no_secrets, redact, restore_secrets, stash_secrets

# Schemes that speak S3's protocol: R2_ENDPOINT_URL says where R2 is, R2_PROFILE whose keys count.
# S3 itself goes by its own AWS_… variables, and S3_PROFILE.
S3_SCHEMES = ("s3", "r2", "weka")
MAX_READ_BYTES = 256 * 2**20  # bytes that are read into memory


class Bucket:
    """Files by their names under a URL. All raise ValueError, one line, where they are refused."""

    def __init__(self, url: str) -> None:
        self.url = stash_secrets(url).rstrip("/")
        place = restore_secrets(self.url)
        scheme, is_url, rest = place.partition("://")
        # What was listed is not remembered: it is we who change it.
        options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
        if is_url and scheme in (*S3_SCHEMES, "gs"):
            check_no_secrets(self.url)
        if is_url and scheme in S3_SCHEMES:
            endpoint = os.environ.get(f"{scheme.upper()}_ENDPOINT_URL")
            if scheme != "s3" and endpoint is None:
                raise ValueError(
                    f"{self.url}: {scheme.upper()}_ENDPOINT_URL is not set; it says where that is"
                )
            profile = os.environ.get(f"{scheme.upper()}_PROFILE")
            options |= {"endpoint_url": endpoint, "profile": profile}
            place = f"s3://{rest}"
        with self._explain_errors(""):
            import fsspec

            self._fs, self._root = fsspec.core.url_to_fs(place, **options)
        self.folder = "file" in self._fs.protocol

    def sizes(self, below: str = "") -> dict[str, int]:
        """Bytes of each file there, or in its folder `below`, by its name in that."""
        folder = f"{self._root}/{below}".rstrip("/")
        with self._explain_errors(below):
            found = self._fs.find(folder, detail=True)
        return {path.removeprefix(f"{folder}/"): int(info["size"]) for path, info in found.items()}

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""
        try:
            with self._explain_errors(name):
                return int(self._fs.info(f"{self._root}/{name}")["size"])
        except NotFound:
            return None

    def put(self, path: Path, name: str) -> None:
        """Send a file, and look whether all of it came."""
        with self._explain_errors(name):
            if self.folder:
                target = Path(self._root, name)
                target.parent.mkdir(parents=True, exist_ok=True)
                draft = target.with_name(f".{uuid.uuid4().hex[:8]}")  # two may send one file
                try:
                    shutil.copyfile(path, draft)
                    os.replace(draft, target)
                finally:
                    draft.unlink(missing_ok=True)
            else:  # a bucket shows a file when all of it has come
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
            # A folder's copy knows no callback; there the file is what it was a moment ago.
            options = {} if self.folder else {"callback": _size_limit(f"{self.url}/{name}", size)}
            self._fs.get_file(f"{self._root}/{name}", str(path), **options)

    def read(self, name: str, max_bytes: int = MAX_READ_BYTES) -> bytes:
        """A small file's content; TooLarge for one of more than `max_bytes` bytes."""
        check_size(f"{self.url}/{name}", self.size(name) or 0, max_bytes)
        with self._explain_errors(name):
            return self._fs.cat_file(f"{self._root}/{name}")

    def remove(self, name: str) -> None:
        with self._explain_errors(name):
            self._fs.rm_file(f"{self._root}/{name}")

    @contextlib.contextmanager
    def _explain_errors(self, name: str) -> Iterator[None]:
        """What a place's client raises, as one line that begins with the place."""
        place = f"{self.url}/{name}".rstrip("/")
        try:
            yield
        except TooLarge:
            raise
        except ImportError as error:  # fsspec names the package that it lacks
            raise ValueError(f"{place}: {error}") from error
        except Exception as error:
            kind = NotFound if isinstance(error, FileNotFoundError) else ValueError
            reason = redact(next(iter(str(error).splitlines()), ""))
            raise kind(f"{place}: {type(error).__name__}: {reason}") from error


def _size_limit(name: str, max_bytes: int) -> Any:
    """What ends a transfer at the first block that goes beyond the size that was told."""
    from fsspec.callbacks import Callback

    class Bounded(Callback):  # type: ignore[misc]
        def set_size(self, size: int | None) -> None:
            self.judge(size or 0)

        def relative_update(self, inc: int = 1) -> None:
            self.value += inc
            self.judge(self.value)

        def judge(self, size: int) -> None:
            check_size(name, size, max_bytes)

    return Bounded()
