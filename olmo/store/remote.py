"""A remote store: artifacts that are pushed once and pulled by others, each only what it needs.

    objects/<d2>/<sha256>     as in a store
    actions/<k2>/<key>.json
    names/<path>.json         what a name stands for, by its path in the project; sealed:
                              {"key", "output", "ancestors": keys of the actions that it came from}
    names.txt                 the list of all names, since a web server gives none

It is a folder, a mounted path, a bucket (s3, r2, weka, gs; see olmo.io.bucket) or, to pull from,
http(s). It is not trusted: its names, digests and sizes are checked (olmo.io.untrusted) before
anything is written here, and if one is invalid nothing is taken.
"""

from __future__ import annotations

import json
import os
import tempfile
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from olmo.io import downloads, http_client, sealed, untrusted
from olmo.io.bucket import MAX_READ_BYTES, Bucket
from olmo.io.http_client import NotFound
from olmo.io.sealed import Damaged, hash_file
from olmo.runtime import urls
from olmo.runtime.bar import track
from olmo.runtime.log import log
from olmo.store import naming
from olmo.store.lineage import ancestors, records_by_content
from olmo.store.record import Record, check_record, output_files, parse_record
from olmo.store.store import Store

MAX_CONCURRENT = 16  # transfers at once: a bucket's latency is high, its bandwidth too
ATTEMPTS = 3  # to download an object whose bytes arrive damaged
NAME_FIELDS = {"key", "output", "ancestors"}
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class TransferStats:
    """Objects and bytes that were transferred, and objects that existed already."""

    objects: int = 0
    bytes: int = 0
    existing: int = 0

    @classmethod
    def of(cls, sizes: Sequence[int | None]) -> TransferStats:
        """From the bytes of each object, None for one that existed."""
        sent = [size for size in sizes if size is not None]
        return cls(len(sent), sum(sent), len(sizes) - len(sent))

    def __add__(self, other: TransferStats) -> TransferStats:
        return TransferStats(
            self.objects + other.objects, self.bytes + other.bytes, self.existing + other.existing
        )

    def __str__(self) -> str:
        return f"{self.objects:,} objects, {self.bytes:,} bytes; {self.existing:,} were there"


class Remote(Bucket):
    """The files of a remote store by name; over http they can be read only.

    Raises ValueError, one line, for errors of the server or the bucket.
    """

    def __init__(self, url: str) -> None:
        self.is_http = http_client.is_http(url)
        if self.is_http:
            self.url = urls.stash_secrets(url).rstrip("/")
        else:
            super().__init__(url)

    def get(self, name: str, path: Path, max_bytes: int | None = None) -> None:
        """Download a file, as Bucket.get."""
        if self.is_http:
            url = f"{self.url}/{quote(name)}"
            downloads.fetch(url, path, path.with_suffix(".part"), max_bytes=max_bytes)
        else:
            super().get(name, path, max_bytes)

    def read(self, name: str, max_bytes: int = MAX_READ_BYTES) -> bytes:
        """The content of a small file, as Bucket.read."""
        if not self.is_http:
            return super().read(name, max_bytes)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "file")
            self.get(name, path, max_bytes)
            return path.read_bytes()

    def names(self) -> list[str]:
        """The names that were pushed."""
        files = sorted(self.sizes("names"))
        return [name.removesuffix(".json") for name in files if name.endswith(".json")]


def push_names(
    store: Store,
    remote: Remote,
    paths: Sequence[Path] = (),
    inputs: bool = False,
    verify: bool = False,
) -> TransferStats:
    """Send the outputs of names, and the records of all actions that they came from.

    Args:
        paths: names of the store, or folders of them; empty for all names of the project.
        inputs: also send the contents that the outputs were made from, back to the sources.
        verify: download and hash the objects that exist there, and replace damaged ones.

    Raises:
        ValueError: the store did not make a path, or it lies outside the project; an object here
            is damaged.
        OSError: the remote store is a folder that cannot be made.
    """
    if remote.is_http:
        raise ValueError(f"{remote.url}: expected a folder or a bucket; http can be pulled from")
    made_by = records_by_content(store)
    names: dict[str, dict[str, Any]] = {}
    records: dict[str, Record] = {}
    sizes: dict[str, int] = {}  # of the objects to send, by sha256
    for name, link in select_names(store, paths).items():
        record = store.record(link["key"])
        if record is None:
            raise ValueError(
                f"the record of {name} is damaged or missing in the store {store.root}; run `olmo "
                "store verify`, then the command that made it"
            )
        lineage = [ancestor for _, ancestor in ancestors(store, record, made_by)]  # itself first
        check_no_credentials(store, lineage)
        records |= {r["key"]: r for r in lineage}
        for r in lineage if inputs else lineage[:1]:
            sizes |= {file["sha256"]: file["size"] for file in output_files(r)}
        keys = [r["key"] for r in lineage[1:]]
        names[name] = {"key": record["key"], "output": link["output"], "ancestors": keys}

    remote.make_folder()
    with store.temp_folder() as folder:

        def send(item: tuple[str, int]) -> int | None:
            digest, size = item
            name = object_name(digest)
            exists = remote.size(name) == size
            if exists and (not verify or is_intact_there(remote, digest, size, folder)):
                return None
            if not store.is_intact(digest, size):
                raise ValueError(
                    f"object {digest[:12]}… is damaged or missing in {store.root}; run snakemake "
                    "again, which remakes it"
                )
            remote.put(store.object_path(digest), name)
            # A bucket's protocol has a checksum; a file in a folder is read back.
            if remote.folder and not is_intact_there(remote, digest, size, folder):
                raise ValueError(
                    f"{remote.url}/{name}: the bytes there differ from those that were sent"
                )
            return size

        def send_name(name: str) -> None:
            draft = folder / uuid.uuid4().hex
            draft.write_text(sealed.dumps(names[name]))
            remote.put(draft, f"names/{name}.json")

        # Contents, then records, then names: a name that can be seen is complete.
        stats = TransferStats.of(map_concurrently(send, sizes.items(), "sending objects"))

        def put_record(key: str) -> None:
            remote.put(store.record_path(key), record_name(key))

        map_concurrently(put_record, records, "sending records")
        map_concurrently(send_name, names, "sending names")
        (folder / "names.txt").write_text("".join(f"{name}\n" for name in remote.names()))
        remote.put(folder / "names.txt", "names.txt")
    return stats


def pull_names(
    store: Store, remote: Remote, patterns: Sequence[str] = (), inputs: bool = False
) -> tuple[list[str], TransferStats]:
    """Download the outputs of names, and link the names here; (the names, the transfer).

    Objects that exist here are not downloaded. Each download is hashed, and repeated if its bytes
    are damaged. All names and records are checked before the first object is downloaded.

    Args:
        patterns: paths in the project, `*` for many; empty for all names there.
        inputs: also download the contents that the outputs were made from, back to the sources.

    Raises:
        ValueError: a name is missing there, or an object is damaged there; a name, digest or size
            is invalid: then nothing was taken.
        NondeterministicStage: this store has another content for the same action.
    """
    names = match_names(remote, patterns)
    found = map_concurrently(partial(read_name, remote), names, "reading names")
    links = dict(zip(names, found, strict=True))
    check_names_free(store, names, remote.url)
    named = {link["key"] for link in links.values()}
    keys = named.union(*(link["ancestors"] for link in links.values()))
    records = map_concurrently(partial(read_record, remote), sorted(keys), "reading records")
    by_key = {record["key"]: record for record in records}
    for name, link in links.items():
        if link["output"] not in by_key[link["key"]]["outputs"]:
            raise ValueError(f"{remote.url}: the name {name} is no output of its record")
    contents: dict[str, int] = {}
    for record in records:
        sizes = object_sizes(store, record, remote.url)
        contents |= sizes if inputs or record["key"] in named else {}
    with store.temp_folder() as folder:
        stats = fetch_objects(store, remote, contents, folder)
        # Still in the block, for which `gc` waits: the objects have no names yet.
        for record in records:
            store.import_record(record)
        for name, link in links.items():
            naming.link_output(store, by_key[link["key"]], link["output"], Path(name))
    return names, stats


def fetch_objects(
    store: Store, remote: Remote, contents: Mapping[str, int], folder: Path
) -> TransferStats:
    """Download the contents (sha256 → size) that this store lacks."""

    def fetch_missing(item: tuple[str, int]) -> int | None:
        digest, size = item
        if store.is_intact(digest):  # the size is the remote's claim
            return None
        store.put(fetch_object(remote, digest, size, folder))
        return size

    return TransferStats.of(map_concurrently(fetch_missing, contents.items(), "fetching objects"))


def select_names(store: Store, paths: Sequence[Path]) -> dict[str, dict[str, str]]:
    """The names at or below these paths, by their path in the project."""
    project = Path.cwd()
    links = {Path(link["path"]): link for link in naming.live_names(store)}
    for path in paths:
        if not any(name.is_relative_to(os.path.abspath(path)) for name in links):
            raise naming.unknown_name_error(store, path)
    roots = [Path(os.path.abspath(path)) for path in paths] or [project]
    found = {n: link for n, link in links.items() if any(n.is_relative_to(r) for r in roots)}
    if outside := [name for name in found if not name.is_relative_to(project)]:
        raise ValueError(f"expected names below {project}, found {outside[0]}; push from there")
    if not found:
        raise ValueError(f"the store {store.root} has made nothing below {project} yet")
    names = {name.relative_to(project).as_posix(): link for name, link in found.items()}
    for name in [name for name in names if name.partition("/")[0] not in untrusted.OUTPUT_FOLDERS]:
        if paths:
            untrusted.check_name(name, str(project))
        log.warning(
            f"{name} is not sent: names must be below {', '.join(untrusted.OUTPUT_FOLDERS)}"
        )
        del names[name]
    return names


def check_no_credentials(store: Store, records: Iterable[Record]) -> None:
    """Raises ValueError for a record with credentials in a URL; old versions wrote them down."""
    for record in records:
        text = json.dumps(record)
        if urls.redact(text) != text:
            path = store.record_path(record["key"])
            raise ValueError(
                f"{path} contains a URL with a user, a password or a signature, and would be sent; "
                f"expected none: rm {path}, and run snakemake again, which writes it without"
            )


def match_names(remote: Remote, patterns: Sequence[str]) -> list[str]:
    """The names there that match the patterns; all names without a pattern."""
    patterns = [os.path.normpath(pattern) for pattern in patterns]
    if patterns and not any(letter in "".join(patterns) for letter in "*?["):
        return patterns
    try:
        content = remote.read("names.txt")
    except NotFound:
        raise ValueError(f"{remote.url}: expected a store that was pushed to, found none") from None
    names = content.decode(errors="backslashreplace").splitlines()
    found = [n for n in names if not patterns or any(fnmatchcase(n, p) for p in patterns)]
    if not found:
        raise ValueError(f"{remote.url}: none of its {len(names)} names matches {patterns}")
    return [untrusted.check_name(name, f"{remote.url}/names.txt") for name in found]


def check_names_free(store: Store, names: Sequence[str], whose: str) -> None:
    """Raises ValueError if a name would be outside of the folders of names, in a store or in
    another name's folder, or would replace a file that the store did not make.
    """
    all_names = set(names)
    for name in names:
        path = Path(untrusted.check_name(name, whose))
        above = [parent for parent in path.parents if parent.name]
        within = [p for p in above if p.as_posix() in all_names or naming.find_name(store, p)]
        if within or naming.is_in_store(path.parent / "any"):
            raise ValueError(
                f"{whose}: the name {name} is within {within[0] if within else 'a store'}; "
                "expected a separate path"
            )
        if os.path.lexists(path) and naming.find_name(store, path) is None:
            raise ValueError(f"{path} exists and was not made by {store.root}; move it away")


def read_name(remote: Remote, name: str) -> dict[str, Any]:
    """What a name there stands for: {"key", "output", "ancestors"}, checked."""
    whose = f"{remote.url}/names/{name}.json"
    try:
        text = remote.read(f"names/{name}.json")
        link = sealed.loads(text, whose)
    except NotFound:
        raise ValueError(
            f"{remote.url}: expected the name {name}, which was not pushed; push it there, in the "
            f"project that has it: olmo store push {remote.url} {name}"
        ) from None
    except Damaged as error:
        if (unsealed := _unsealed_name(text)) is None:
            raise Damaged(f"{error}; push again") from None
        link = unsealed
    if set(link) != NAME_FIELDS or not isinstance(link["ancestors"], list):
        raise ValueError(f"{whose}: expected key, output and ancestors, found none; push again")
    for key in (link.get("key"), *link["ancestors"]):
        untrusted.check_digest(key, whose)
    untrusted.check_part(link.get("output"), whose)
    return link


def _unsealed_name(text: bytes) -> dict[str, Any] | None:
    """A name that was pushed before names were sealed."""
    try:
        link = json.loads(text)
        return link if set(link) == NAME_FIELDS else None
    except (ValueError, TypeError, RecursionError):
        return None


def read_record(remote: Remote, key: str) -> Record:
    """The record of an action there, checked."""
    whose = f"{remote.url}/{record_name(key)}"
    try:
        found = parse_record(remote.read(record_name(key)), whose)
    except NotFound:
        raise ValueError(f"{remote.url}: the record {key[:12]}… is missing; push again") from None
    except Damaged:
        raise Damaged(f"{whose}: the record was changed after it was written; push again") from None
    return check_record(found, key, whose)


def object_sizes(store: Store, record: Record, whose: str) -> dict[str, int]:
    """The objects of a record, sha256 → size. Raises ValueError if one has another size here."""
    sizes: dict[str, int] = {}
    for file in output_files(record):
        digest, size = file["sha256"], file["size"]
        path = store.object_path(digest)
        differs = path.exists() and path.stat().st_size != size and store.is_intact(digest)
        if sizes.setdefault(digest, size) != size or differs:
            raise ValueError(
                f"{whose}: the record {record['key'][:12]}… says that {digest[:12]}… has "
                f"{size:,} bytes, found another size"
            )
    return sizes


def fetch_object(remote: Remote, digest: str, size: int, folder: Path) -> Path:
    """Download an object to a file in `folder` and hash it; again if its bytes are damaged."""
    for _ in range(ATTEMPTS):
        draft = folder / uuid.uuid4().hex
        try:
            remote.get(object_name(digest), draft, size)
        except NotFound:
            raise ValueError(
                f"{remote.url}: object {digest[:12]}… is missing; push it with --inputs, or "
                "push the same names again"
            ) from None
        if hash_file(draft) == digest:
            return draft
        log.warning(f"{remote.url}: object {digest[:12]}… arrived damaged; downloading it again")
        draft.unlink()
    raise ValueError(
        f"{remote.url}/{object_name(digest)}: its bytes do not match its name, {ATTEMPTS} times; "
        "repair it from a store that has it: olmo store push --verify"
    )


def is_intact_there(remote: Remote, digest: str, size: int, folder: Path) -> bool:
    """Whether an object there matches its name: it is downloaded and hashed."""
    draft = folder / uuid.uuid4().hex
    remote.get(object_name(digest), draft, size)
    same = hash_file(draft) == digest
    draft.unlink()
    return same


def object_name(digest: str) -> str:
    return f"objects/{digest[:2]}/{digest}"


def record_name(key: str) -> str:
    return f"actions/{key[:2]}/{key}.json"


def map_concurrently(
    function: Callable[[Item], Result], items: Iterable[Item], what: str
) -> list[Result]:
    """Call `function` for each item, MAX_CONCURRENT at once; the first error stops it.

    A terminal shows a bar, and `what` is done.
    """
    with ThreadPoolExecutor(MAX_CONCURRENT) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in track(futures, what)]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
