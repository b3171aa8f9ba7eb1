"""A second store: what was made once goes to others, who take only what they need.

    objects/<d2>/<sha256>     as in a store
    actions/<k2>/<key>.json
    names/<path>.json         what each human name stands for, by its path in the project, sealed:
                              {"key", "output", "ancestors": the actions that it came from}
    names.txt                 all of them, since a web server has no listing

It is a folder, a mounted path, a bucket (s3, r2, weka, gs; see olmo.io.bucket) or, to pull from,
http(s). Whoever writes to it may be anybody: what it names is checked (olmo.io.untrusted) before
anything is done here, and one bad digest, name or size means that nothing at all is taken.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from olmo.io import downloads, sealed, untrusted
from olmo.io.bucket import Bucket
from olmo.io.downloads import NotFound
from olmo.io.sealed import Damaged, hash_file
from olmo.runtime import urls
from olmo.runtime.log import log
from olmo.store import naming
from olmo.store.lineage import ancestors, records_by_content
from olmo.store.record import Record, check_record, output_files, parse_record
from olmo.store.store import Store

MAX_CONCURRENT = 16  # transfers; a bucket answers slowly, but many at a time
ATTEMPTS = 3  # at an object whose bytes arrive damaged
NAME_FIELDS = {"key", "output", "ancestors"}
MAX_JSON_BYTES = 256 * 2**20  # bytes of a record or a list of names
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class TransferStats:
    """What went over, and what was there already."""

    objects: int = 0
    bytes: int = 0
    existing: int = 0

    @classmethod
    def of(cls, sizes: Sequence[int | None]) -> TransferStats:
        """Of the bytes of each object, None for one that was there."""
        went = [size for size in sizes if size is not None]
        return cls(len(went), sum(went), len(sizes) - len(went))

    def __add__(self, other: TransferStats) -> TransferStats:
        return TransferStats(
            self.objects + other.objects, self.bytes + other.bytes, self.existing + other.existing
        )

    def __str__(self) -> str:
        return f"{self.objects:,} objects, {self.bytes:,} bytes; {self.existing:,} were there"


class Remote(Bucket):
    """The files of a second store, each by its name in it; by http they can be fetched only.

    Raises ValueError, one line, for what the place refuses.
    """

    def __init__(self, url: str) -> None:
        self.is_http = downloads.is_http(url)
        if self.is_http:
            self.url = urls.stash_secrets(url).rstrip("/")
        else:
            super().__init__(url)

    def get(self, name: str, path: Path, max_bytes: int | None = None) -> None:
        """Bring a file of `max_bytes` bytes at most here; NotFound where there is none."""
        if self.is_http:
            downloads.fetch(
                f"{self.url}/{quote(name)}", path, path.with_suffix(".part"), max_bytes=max_bytes
            )
        else:
            super().get(name, path, max_bytes)

    def names(self) -> list[str]:
        """The names that were pushed, from the files that say so."""
        files = sorted(self.sizes("names"))
        return [name.removesuffix(".json") for name in files if name.endswith(".json")]


def push_names(
    store: Store,
    remote: Remote,
    paths: Sequence[Path] = (),
    inputs: bool = False,
    verify: bool = False,
) -> TransferStats:
    """Send what human names stand for, and the records of all that it was made from.

    Args:
        paths: names that the store made, or folders of them; all of them where none is given.
        inputs: send also the contents that these were made from, back to the sources.
        verify: fetch and hash what is there already, and replace what is damaged.

    Raises:
        ValueError: a path that the store did not make or that lies outside the project; an
            object that is damaged here.
    """
    if remote.is_http:
        raise ValueError(f"{remote.url}: expected a folder or a bucket; http can be pulled from")
    made_by = records_by_content(store)
    names: dict[str, dict[str, Any]] = {}
    records: dict[str, Record] = {}
    wanted: dict[str, int] = {}
    for name, link in select_names(store, paths).items():
        record = store.record(link["key"])
        if record is None:
            raise ValueError(
                f"the record of {name} is damaged or gone from the store {store.root}; `olmo store "
                "verify`, then the command that made it, makes it anew"
            )
        line = [one for _, one in ancestors(store, record, made_by)]
        check_no_credentials(store, line)
        records |= {one["key"]: one for one in line}
        for one in line if inputs else line[:1]:
            wanted |= {file["sha256"]: file["size"] for file in output_files(one)}
        came_from = [one["key"] for one in line[1:]]
        names[name] = {"key": record["key"], "output": link["output"], "ancestors": came_from}

    with store.temp_folder() as folder:

        def send(item: tuple[str, int]) -> int | None:
            digest, size = item
            name = object_name(digest)
            there = remote.size(name) == size
            if there and (not verify or is_intact_there(remote, digest, size, folder)):
                return None
            if not store.is_intact(digest, size):
                raise ValueError(
                    f"object {digest[:12]}… is damaged or gone from {store.root}; run snakemake "
                    "again, which makes it anew"
                )
            remote.put(store.object_path(digest), name)
            # A bucket's protocol carries a checksum; of a folder, look at what was written.
            if remote.folder and not is_intact_there(remote, digest, size, folder):
                raise ValueError(f"{remote.url}/{name}: other bytes arrived than were sent")
            return size

        def send_name(name: str) -> None:
            draft = folder / uuid.uuid4().hex
            draft.write_text(sealed.dumps(names[name]))
            remote.put(draft, f"names/{name}.json")

        # Contents, then records, then names: what can be seen there is whole.
        moved = TransferStats.of(map_concurrently(send, wanted.items()))
        map_concurrently(lambda key: remote.put(store.record_path(key), record_name(key)), records)
        map_concurrently(send_name, names)
        (folder / "names.txt").write_text("".join(f"{name}\n" for name in remote.names()))
        remote.put(folder / "names.txt", "names.txt")
    return moved


def pull_names(
    store: Store, remote: Remote, patterns: Sequence[str] = (), inputs: bool = False
) -> tuple[list[str], TransferStats]:
    """Take what names stand for there, and make the names here; (the names, what came).

    Every object is hashed as it arrives, and fetched again where that is not its name. What is
    here already, and sound, is not fetched. All names and records are checked before the first
    object is.

    Args:
        patterns: paths in the project, `*` for many; all that is there where none is given.
        inputs: take also the contents that these were made from, back to the sources.

    Raises:
        ValueError: no such name there; an object that is damaged there; a name, a digest or a size
            that it must not have, and then nothing was taken.
        NondeterministicStage: the store here knows another content for the same action.
    """
    with store.temp_folder() as folder:
        names = match_names(remote, patterns, folder)
        links = dict(
            zip(names, map_concurrently(lambda n: read_name(remote, n, folder), names), strict=True)
        )
        check_names_free(store, names, remote.url)
        of_names = {link["key"] for link in links.values()}
        keys = of_names.union(*(link["ancestors"] for link in links.values()))
        records = map_concurrently(lambda key: read_record(remote, key, folder), sorted(keys))
        known = {record["key"]: record for record in records}
        for name, link in links.items():
            if link["output"] not in known[link["key"]]["outputs"]:
                raise ValueError(f"{remote.url}: the name {name} is no output of its record")
        contents: dict[str, int] = {}
        for record in records:
            here = object_sizes(store, record, remote.url)
            contents |= here if inputs or record["key"] in of_names else {}
        moved = fetch_objects(store, remote, contents, folder)
        # In the block still, of which `gc` knows: nothing of this has a name yet.
        for record in records:
            store.import_record(record)
        for name, link in links.items():
            naming.link_output(store, known[link["key"]], link["output"], Path(name))
    return names, moved


def fetch_objects(
    store: Store, remote: Remote, contents: Mapping[str, int], folder: Path
) -> TransferStats:
    """Bring contents, sha256 → size, that are not here yet, hashed as they arrive."""

    def take(item: tuple[str, int]) -> int | None:
        digest, size = item
        if store.is_intact(digest):  # whatever size is told of it elsewhere
            return None
        store.put(fetch_object(remote, digest, size, folder))
        return size

    return TransferStats.of(map_concurrently(take, contents.items()))


def select_names(store: Store, paths: Sequence[Path]) -> dict[str, dict[str, str]]:
    """The human names at or below these paths, by their place in the project."""
    project = Path.cwd()
    links = {Path(link["path"]): link for link in naming.live_names(store)}
    for path in paths:
        if not any(name.is_relative_to(os.path.abspath(path)) for name in links):
            raise ValueError(f"expected a name that the store {store.root} made, found {path}")
    below = [Path(os.path.abspath(path)) for path in paths] or [project]
    found = {n: link for n, link in links.items() if any(n.is_relative_to(one) for one in below)}
    if outside := [name for name in found if not name.is_relative_to(project)]:
        raise ValueError(f"expected names below {project}, found {outside[0]}; push from there")
    if not found:
        raise ValueError(f"the store {store.root} has made nothing below {project} yet")
    names = {name.relative_to(project).as_posix(): link for name, link in found.items()}
    for name in [name for name in names if name.partition("/")[0] not in untrusted.OUTPUT_FOLDERS]:
        if paths:
            untrusted.check_name(name, str(project))
        log.warning(
            f"{name} is not sent: names must lie below {', '.join(untrusted.OUTPUT_FOLDERS)}"
        )
        del names[name]
    return names


def check_no_credentials(store: Store, records: Iterable[Record]) -> None:
    """Raises ValueError for a record that was made when URLs were still written down whole."""
    for record in records:
        text = json.dumps(record)
        if urls.redact(text) != text:
            path = store.record_path(record["key"])
            raise ValueError(
                f"{path} holds a URL with a user, a password or a signature, and would be sent; "
                f"expected none: rm {path}, and run snakemake again, which makes it without"
            )


def match_names(remote: Remote, patterns: Sequence[str], folder: Path) -> list[str]:
    """The names there that patterns mean."""
    patterns = [os.path.normpath(pattern) for pattern in patterns]
    if patterns and not any(letter in "".join(patterns) for letter in "*?["):
        return patterns
    try:
        listed = folder / "names"
        remote.get("names.txt", listed, MAX_JSON_BYTES)
    except NotFound:
        raise ValueError(f"{remote.url}: expected a store that was pushed to, found none") from None
    names = listed.read_text(encoding="utf-8", errors="backslashreplace").splitlines()
    found = [n for n in names if not patterns or any(fnmatchcase(n, one) for one in patterns)]
    if not found:
        raise ValueError(f"{remote.url}: none of its {len(names)} names is like {patterns}")
    return [untrusted.check_name(name, f"{remote.url}/names.txt") for name in found]


def check_names_free(store: Store, names: Sequence[str], whose: str) -> None:
    """Raises ValueError where a name would lie elsewhere than names do, in the store or in what
    another name stands for, or would replace what is not ours.
    """
    asked = set(names)
    for name in names:
        path = Path(untrusted.check_name(name, whose))
        above = [parent for parent in path.parents if parent.name]
        within = [p for p in above if p.as_posix() in asked or naming.find_name(store, p)]
        if within or downloads.is_in_store(path.parent / "any"):
            raise ValueError(
                f"{whose}: the name {name} lies in {within[0] if within else 'a store'}; expected "
                "a place of its own"
            )
        if os.path.lexists(path) and naming.find_name(store, path) is None:
            raise ValueError(f"{path} is there and was not made by {store.root}; move it away")


def read_name(remote: Remote, name: str, folder: Path) -> dict[str, Any]:
    whose = f"{remote.url}/names/{name}.json"
    try:
        text = read_file(remote, f"names/{name}.json", folder)
        link = sealed.loads(text, whose)
    except NotFound:
        raise ValueError(f"{remote.url}: expected the name {name}, which was not pushed") from None
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


def read_record(remote: Remote, key: str, folder: Path) -> Record:
    whose = f"{remote.url}/{record_name(key)}"
    try:
        found = parse_record(read_file(remote, record_name(key), folder), whose)
    except NotFound:
        raise ValueError(f"{remote.url}: the record {key[:12]}… is gone; push again") from None
    except Damaged:
        raise Damaged(f"{whose}: the record was changed after it was written; push again") from None
    return check_record(found, key, whose)


def object_sizes(store: Store, record: Record, whose: str) -> dict[str, int]:
    """The contents of a record, sha256 → size; ValueError where one has another size here."""
    sizes: dict[str, int] = {}
    for file in output_files(record):
        digest, size = file["sha256"], file["size"]
        path = store.object_path(digest)
        differs = path.exists() and path.stat().st_size != size and store.is_intact(digest)
        if sizes.setdefault(digest, size) != size or differs:
            raise ValueError(
                f"{whose}: the record {record['key'][:12]}… says that {digest[:12]}… has "
                f"{size:,} bytes, which is not so"
            )
    return sizes


def read_file(remote: Remote, name: str, folder: Path) -> bytes:
    draft = folder / uuid.uuid4().hex
    remote.get(name, draft, MAX_JSON_BYTES)
    return draft.read_bytes()


def fetch_object(remote: Remote, digest: str, size: int, folder: Path) -> Path:
    """Fetch an object and hash it; again where the bytes are not those that its name says."""
    for _ in range(ATTEMPTS):
        draft = folder / uuid.uuid4().hex
        try:
            remote.get(object_name(digest), draft, size)
        except NotFound:
            raise ValueError(
                f"{remote.url}: object {digest[:12]}… is not there; it takes a push --inputs, or "
                "another push of what was pushed"
            ) from None
        if hash_file(draft) == digest:
            return draft
        log.warning(f"{remote.url}: object {digest[:12]}… arrived damaged; it is fetched again")
        draft.unlink()
    raise ValueError(
        f"{remote.url}/{object_name(digest)}: other bytes than its name says, {ATTEMPTS} times; "
        "mend it from a store that has it: olmo store push --verify"
    )


def is_intact_there(remote: Remote, digest: str, size: int, folder: Path) -> bool:
    """Whether an object there is what its name says."""
    draft = folder / uuid.uuid4().hex
    remote.get(object_name(digest), draft, size)
    same = hash_file(draft) == digest
    draft.unlink()
    return same


def object_name(digest: str) -> str:
    return f"objects/{digest[:2]}/{digest}"


def record_name(key: str) -> str:
    return f"actions/{key[:2]}/{key}.json"


def map_concurrently(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Call `function` for each item, several at once; the first error ends it."""
    with ThreadPoolExecutor(MAX_CONCURRENT) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
