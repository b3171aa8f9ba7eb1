"""The store: every artifact by its content, every stage run once.

    objects/<d2>/<sha256>     contents, read-only, never changed
    actions/<k2>/<key>.json   the record of an action: inputs, outputs, cost; written last
    actions/<k2>/<key>.copy   a copy of the record, read if the record is damaged
    drafts/                   files that are being fetched from another store
    work/<key>/               the folder of a stage while it runs; a training run's checkpoints
    leases/                   which process runs which stage
    arriving/                 the progress of downloads
    links/                    the names: paths of projects that link to objects; `gc` keeps them
    pins/                     actions whose outputs `gc` keeps without a name
    unnamed/                  actions that were started and have no names yet; `gc` keeps them too
    quarantine/               damaged objects and records
    index/lineage             who made and who used which content (olmo.store.index); a cache

An action (olmo.store.action) is the request, a content is the result. olmo.store.naming gives
contents the paths that people use. A consumer's key contains the digests of its inputs, not the
actions that made them: where a change upstream gives equal bytes, everything after it is found.
"""

import errno
import hashlib
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from olmo.io import sealed
from olmo.io.sealed import Damaged, fsync_path, hash_file
from olmo.runtime.log import log
from olmo.store.action import Action
from olmo.store.lease import lease, refresh_listing
from olmo.store.record import (
    Record,
    content,
    digests_by_path,
    list_files,
    load_record,
    output_files,
)

# Objects up to this size are hashed at each use, larger ones only if their size or mtime changed
# since they were stored (a GB takes about a second). `olmo store verify` hashes them all.
REHASH_MAX_BYTES = 256 * 2**20
OBJECT_MTIME_NS = 1_000_000_000 * 10**9  # of every object: 2001-09-09, older than any link
GC_LEASE = "gc"  # held by `olmo store gc` while it removes objects


class CorruptObject(ValueError):
    """An object whose bytes do not match its name."""


class NondeterministicStage(ValueError):
    """One action gave two contents."""


class Store:
    """A folder with every artifact by its content.

    Args:
        root: the folder; it is created with the first object.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.abspath(root))

    def create(self) -> None:
        """Create the store's folder. Raises OSError if it is not writable."""
        with self.explain_write_errors():
            self.root.mkdir(parents=True, exist_ok=True)
            if not os.access(self.root, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self.root))

    # --- contents ---------------------------------------------------------------------------

    def object_path(self, digest: str) -> Path:
        return self.root / "objects" / digest[:2] / digest

    def put(self, path: Path) -> dict[str, Any]:
        """Move a file into the store; returns {"sha256", "size"}.

        Atomic, also if the power fails: the file is synced before it gets its name.
        """
        if path.stat().st_uid != os.geteuid():  # only the owner may change its mode and mtime
            copy = path.with_name(f".{uuid.uuid4().hex}")
            shutil.copyfile(path, copy)
            os.replace(copy, path)
        with path.open("rb+") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        size = path.stat().st_size
        target = self.object_path(digest)
        if not self.is_intact(digest, size):
            target.parent.mkdir(parents=True, exist_ok=True)
            path.chmod(0o444)
            os.utime(path, ns=(OBJECT_MTIME_NS, OBJECT_MTIME_NS))
            os.replace(path, target)
            fsync_path(target.parent)
        else:
            path.unlink()
        return {"sha256": digest, "size": size}

    def is_object(self, path: Path) -> bool:
        """Whether a path is, or links to, an object of this store."""
        folder = Path(os.path.realpath(path)).parent.parent
        return folder == Path(os.path.realpath(self.root / "objects"))

    def digest(self, path: Path) -> str:
        """The sha256 of a file; for a link to an object its name, without hashing a large one.

        Raises:
            CorruptObject: the object is damaged or missing.
            ValueError: no regular file at `path`.
        """
        target = Path(os.path.realpath(path))
        if self.is_object(path):
            if not self.is_intact(target.name):
                raise CorruptObject(
                    f"{path} points to {target.name[:12]}…, which is damaged or missing in the "
                    f"store {self.root}; run the same command again to make it again"
                )
            return target.name
        if not target.is_file():
            raise ValueError(f"expected a file at {path}, found {_describe_file(target)}")
        return hash_file(target)

    def is_intact(self, digest: str, size: int | None = None) -> bool:
        """Whether an object exists and matches its name and `size`; a damaged one is moved away."""
        path = self.object_path(digest)
        try:
            found = path.stat()
        except FileNotFoundError:
            refresh_listing(path.parent)  # another machine may have just stored it
            try:
                found = path.stat()
            except FileNotFoundError:
                return False
        wrong_size = size is not None and found.st_size != size
        if (
            not wrong_size
            and found.st_size > REHASH_MAX_BYTES
            and found.st_mtime_ns == OBJECT_MTIME_NS
        ):
            return True
        if hash_file(path) == digest:
            if found.st_mtime_ns != OBJECT_MTIME_NS:  # touched, or copied here by other tools
                with suppress(PermissionError):  # another user's: it is hashed again next time
                    os.utime(path, ns=(OBJECT_MTIME_NS, OBJECT_MTIME_NS))
            return not wrong_size  # if wrong, it is the caller's size
        self.quarantine(path, f"its {found.st_size:,} bytes do not match its name")
        return False

    def describe(self, file: Path) -> str:
        """An object or a record by a path of any project that needs it, and the start of its name.

        `file` is its place in the store, where it need not exist any more.
        """
        wanted, makers = file.stem, set[tuple[str, str]]()
        if file.parent.parent == self.root / "objects":
            for record in self.records():
                for output, made in record["outputs"].items():
                    if wanted in {one["sha256"] for one in list_files(made)}:
                        makers.add((record["key"], output))
        for link in sorted((self.root / "links").glob("[0-9a-f]" * 32)):
            with suppress(Damaged):
                name = sealed.loads(link.read_bytes(), link)
                if name["key"] == wanted or (name["key"], name["output"]) in makers:
                    path = os.path.normpath(self.root / name["path"])
                    is_here = path.startswith(os.getcwd() + os.sep)
                    return f"{os.path.relpath(path) if is_here else path} ({wanted[:12]}…)"
        return f"{wanted[:12]}…"

    def quarantine(self, path: Path, reason: str) -> None:
        """Move a damaged object, record or name to quarantine/, where it can be inspected."""
        target = self.root / "quarantine" / f"{path.name}.{uuid.uuid4().hex[:8]}"
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.replace(path, target)
        except FileNotFoundError:  # another process has moved it
            return
        log.warning(f"store: {self.describe(path)} is damaged ({reason}) and was moved to {target}")

    # --- actions ----------------------------------------------------------------------------

    def record_path(self, key: str) -> Path:
        return self.root / "actions" / key[:2] / f"{key}.json"

    def record(self, key: str) -> Record | None:
        """The record of an action; None if it has not ended, or if record and copy are damaged.

        A damaged record is quarantined and restored from its copy.
        """
        path = self.record_path(key)
        try:
            return load_record(path.read_bytes(), key)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno != errno.ESTALE:  # another machine has just replaced it
                raise
            return self.record(key)
        except Damaged:
            self.quarantine(path, "the record does not match its seal")
        try:
            record = load_record(self._copy_path(key).read_bytes(), key)
        except (FileNotFoundError, Damaged):
            return None
        self._write_record(record)
        return record

    def _copy_path(self, key: str) -> Path:
        return self.record_path(key).with_suffix(".copy")

    def records(self) -> Iterator[Record]:
        for path in sorted((self.root / "actions").glob("??/*.json")):
            if (record := self.record(path.stem)) is not None:
                yield record

    def lookup(self, key: str) -> Record | None:
        """The record of an action if all files of its outputs are intact."""
        record = self.record(key)
        if record is None:
            return None
        # A list, not a generator: all damaged files go to quarantine at once.
        intact = [self.is_intact(file["sha256"], file["size"]) for file in output_files(record)]
        return record if all(intact) else None

    def run(self, action: Action, build: Callable[[Path], Mapping[str, Any]]) -> Record:
        """The record of `action`: found in the store, or made by one call of `build`.

        Processes that need the same action wait for the one that builds it.

        Args:
            build: called with the action's work folder, which may hold files of an earlier
                attempt. It makes the outputs in the subfolder `outputs`, one file or folder for
                each name, and returns the record's "facts", "conditions" and "run", and
                "not_in_content": paths of files in output folders that the content does not cover
                (timings, plots).

        Raises:
            NondeterministicStage: an earlier run, under equal conditions, gave other bytes.
        """
        key = action.key
        with self.explain_write_errors():
            if (record := self.lookup(key)) is not None:
                return record
            with lease(self.root / "leases", key, self._waiting(action)):
                # The previous holder, on another machine, may have written the record.
                refresh_listing(self.record_path(key).parent)
                if (record := self.lookup(key)) is not None:
                    return record
                return self._build(action, build)

    def _build(self, action: Action, build: Callable[[Path], Mapping[str, Any]]) -> Record:
        work = self.root / "work" / action.key
        outputs = work / "outputs"
        shutil.rmtree(outputs, ignore_errors=True)  # of an interrupted attempt
        outputs.mkdir(parents=True)
        try:
            result = build(work)
        except BaseException:
            shutil.rmtree(outputs, ignore_errors=True)
            raise
        aside = set(result.get("not_in_content", ()))
        put = {path.name: self._put_output(path, aside) for path in sorted(outputs.iterdir())}
        record = Record(
            key=action.key,
            action=action.as_dict(),
            content=content(put),
            outputs=put,
            facts=result.get("facts", {}),
            conditions=result.get("conditions", {}),
        )
        if "run" in result:
            record["run"] = result["run"]
        self._check_deterministic(record)
        self._write_record(record)
        outputs.rmdir()
        if not any(work.iterdir()):
            work.rmdir()
        return record

    def _put_output(self, path: Path, aside: set[str]) -> dict[str, Any]:
        """Store a file ({"sha256", "size"}) or a folder's files ({"files": …, "aside": …})."""
        if path.is_file():
            return self.put(path)
        tree: dict[str, Any] = {"files": {}, "aside": {}}
        for file in sorted(inner for inner in path.rglob("*") if inner.is_file()):
            name = file.relative_to(path).as_posix()
            tree["aside" if name in aside else "files"][name] = self.put(file)
        shutil.rmtree(path)
        return tree

    def _check_deterministic(self, record: Record) -> None:
        """Compare with the known record of the same action. Raises NondeterministicStage."""
        known = self.record(record["key"])
        if known is None or known["content"] == record["content"]:
            return
        what = f"{record['action']['stage']} ({record['key'][:12]}…)"
        if known["conditions"] != record["conditions"]:
            log.warning(
                f"store: {what} gave other bytes than before, under other conditions: "
                f"{known['conditions']} then, {record['conditions']} now"
            )
            return
        before, now = digests_by_path(known["outputs"]), digests_by_path(record["outputs"])
        differing = sorted(n for n in before.keys() | now.keys() if before.get(n) != now.get(n))
        raise NondeterministicStage(
            f"{what} gave two contents for one action; differing: {', '.join(differing)}. "
            "Expected equal bytes from equal inputs: its stage is not deterministic, or its code "
            "changed without a new version. The earlier record is kept; both contents are in "
            f"{self.root}/objects. To accept the new one: rm {self.record_path(record['key'])}"
        )

    def import_record(self, record: Record) -> None:
        """Store another store's record, which olmo.store.record.check_record has checked.

        Raises:
            NondeterministicStage: the action has another content here, under equal conditions.
        """
        self._check_deterministic(record)
        if self.record(record["key"]) is None:
            self._write_record(record)

    @contextmanager
    def protect_from_gc(self, key: str) -> Iterator[None]:
        """Keep an action's outputs from `gc` in the block, in which they get their names.

        If the process is killed in it, they are kept until the same command has run again.
        """
        mark = self.root / "unnamed" / key
        with self.explain_write_errors():
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
            fsync_path(mark.parent)
        if self._wait_for_gc():
            mark.touch()  # `gc` removes marks of actions that have no record
        try:
            yield
        except Exception:
            if self.record_path(key).exists():
                raise  # it ended and has no name yet: the mark stays
            mark.unlink(missing_ok=True)
            raise
        mark.unlink(missing_ok=True)

    def _wait_for_gc(self) -> bool:
        """Wait while `gc` runs; whether it did. A `gc` that starts later sees our mark or lease."""
        if not any((self.root / "leases").glob(f"{GC_LEASE}.*")):
            return False
        with lease(self.root / "leases", GC_LEASE, lambda _: log.info("store: gc runs; waiting")):
            return True

    @contextmanager
    def temp_folder(self) -> Iterator[Path]:
        """A new folder on the store's disk for the block; `gc` does not run meanwhile."""
        with self.explain_write_errors(), lease(self.root / "leases", f"draft-{uuid.uuid4().hex}"):
            self._wait_for_gc()
            folder = self.root / "drafts" / uuid.uuid4().hex
            folder.mkdir(parents=True)
            try:
                yield folder
            finally:
                shutil.rmtree(folder)

    def _write_record(self, record: Record) -> None:
        text, key = sealed.dumps(record, 1), record["key"]
        sealed.write_atomic(self._copy_path(key), text, read_only=True)
        sealed.write_atomic(self.record_path(key), text, read_only=True)

    def _waiting(self, action: Action) -> Callable[[dict[str, Any]], None]:
        return lambda holder: log.info(
            f"store: {action.stage} ({action.key[:12]}…) is being made by process "
            f"{holder.get('pid')} on {holder.get('host')}; waiting"
        )

    @contextmanager
    def explain_write_errors(self) -> Iterator[None]:
        """Add a remedy to the OSError of a full disk or a store that is not writable."""
        try:
            yield
        except OSError as error:
            if error.errno is None:
                raise  # it has its remedy
            files = [name for name in (error.filename, error.filename2) if name is not None]
            if files and not any(map(self._is_inside, files)):
                raise  # an unreadable input, another disk
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                free = shutil.disk_usage(self.root).free
                raise OSError(
                    f"the disk is full ({free:,} bytes free under {self.root}): {error}. Nothing "
                    "half-written was kept; make room (`olmo store gc`), then run the same again"
                ) from error
            refused = (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR)
            if error.errno in refused or not self.root.is_dir():
                raise OSError(
                    f"the store {self.root} cannot be written: {error}. Expected a folder that "
                    "this user may write to; name one with OLMO_STORE=<folder>"
                ) from error
            raise

    def _is_inside(self, path: str | bytes | int) -> bool:
        if isinstance(path, int):  # a file descriptor
            return True
        return Path(os.path.abspath(os.fsdecode(path))).is_relative_to(self.root)


def _describe_file(path: Path) -> str:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "nothing"
    return "a folder" if stat.S_ISDIR(mode) else "no regular file"


def utc_now() -> str:
    """The time as records write it: UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
