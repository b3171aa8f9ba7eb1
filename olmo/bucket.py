"""A place that files are put into: a bucket (s3, r2, weka, gs: by fsspec) or another folder.

    place = Bucket("s3://name/runs/a")
    place.put(path, "step10/model.pt")
    place.sizes()  # {"step10/model.pt": 1234}

A file is there whole or not at all. Imports nothing of ours.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Schemes that speak S3's protocol: R2_ENDPOINT_URL says where R2 is, R2_PROFILE whose keys count.
# S3 itself goes by its own AWS_… variables, and S3_PROFILE.
S3_LIKE = ("s3", "r2", "weka")


class Bucket:
    """Files by their names under a URL. All raise ValueError, one line, where they are refused."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        scheme, is_url, rest = self.url.partition("://")
        # What was listed is not remembered: it is we who change it.
        options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
        if is_url and scheme in S3_LIKE:
            endpoint = os.environ.get(f"{scheme.upper()}_ENDPOINT_URL")
            if scheme != "s3" and endpoint is None:
                raise ValueError(
                    f"{url}: {scheme.upper()}_ENDPOINT_URL is not set; it says where that is"
                )
            profile = os.environ.get(f"{scheme.upper()}_PROFILE")
            options |= {"endpoint_url": endpoint, "profile": profile}
            self.url = f"s3://{rest}"
        with self._told(""):
            import fsspec

            self._fs, self._root = fsspec.core.url_to_fs(self.url, **options)

    def sizes(self) -> dict[str, int]:
        """Bytes of each file there, by name."""
        with self._told(""):
            found = self._fs.find(self._root, detail=True)
        root = self._root.rstrip("/") + "/"
        return {path.removeprefix(root): int(info["size"]) for path, info in found.items()}

    def put(self, path: Path, name: str) -> None:
        """Send a file, and look whether all of it came."""
        target = f"{self._root}/{name}"
        with self._told(name):
            if "file" in self._fs.protocol:  # a bucket shows a file when all of it has come
                self._fs.makedirs(os.path.dirname(target), exist_ok=True)
                self._fs.put_file(str(path), f"{target}.partial")
                self._fs.mv(f"{target}.partial", target)
            else:
                self._fs.put_file(str(path), target)
            size, expected = self._fs.info(target)["size"], path.stat().st_size
        if size != expected:
            raise ValueError(f"{self.url}/{name} has {size} bytes, expected {expected}")

    def get(self, name: str, path: Path) -> None:
        """Fetch a file."""
        with self._told(name):
            self._fs.get_file(f"{self._root}/{name}", str(path))

    def read(self, name: str) -> bytes:
        """A small file's content."""
        with self._told(name):
            return self._fs.cat_file(f"{self._root}/{name}")

    def remove(self, name: str) -> None:
        with self._told(name):
            self._fs.rm_file(f"{self._root}/{name}")

    @contextlib.contextmanager
    def _told(self, name: str) -> Iterator[None]:
        """What a place's client raises, as one line that begins with the place."""
        place = f"{self.url}/{name}".rstrip("/")
        try:
            yield
        except ImportError as error:  # fsspec names the package that it lacks
            raise ValueError(f"{place}: {error}") from error
        except Exception as error:
            reason = next(iter(str(error).splitlines()), "")
            raise ValueError(f"{place}: {type(error).__name__}: {reason}") from error
