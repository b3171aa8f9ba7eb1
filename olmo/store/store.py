"""The store: every artifact by its content, every stage run once.

    objects/<d2>/<sha256>     contents, read-only, never changed
    actions/<k2>/<key>.json   what was asked, what came out, how it went: the record, written last
    actions/<k2>/<key>.copy   the same once more, for when a byte of the record has changed
    drafts/                   files on their way in from another store
    work/<key>/               a stage's own folder while it runs; a training run's checkpoints
    leases/                   who runs what right now
    arriving/                 how downloads get on, for the line that tells of them
    links/                    the human names that point into the store: what `gc` keeps
    pins/                     actions that `gc` keeps whatever points to them
    unnamed/                  actions that are asked for and have no names yet: `gc` keeps them too
    quarantine/               contents that were not what their name says

An action (`olmo.store.action`) is what was asked, a content is what came out; `olmo.store.naming`
gives them the paths that people use. Consumers know an input by its content, not by the action
that made it: where an edit upstream ends in equal bytes, everything after it is found again.

Imports nothing of ours but `action`, `foreign`, `lease` and `sealed`.
"""

import errno
import hashlib
import json
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from olmo.io import sealed, untrusted
from olmo.io.sealed import Damaged, fsync_path
from olmo.runtime.log import log
from olmo.store.action import Action, canonical_json
from olmo.store.lease import lease, refresh_listing

# Objects up to this size are hashed again whenever they are used. Larger ones are, when their
# size or time of change is not as the store left it; `olmo store verify` hashes them all.
REHASH_MAX_BYTES = 256 * 2**20
OBJECT_MTIME_NS = (
    1_000_000_000 * 10**9
)  # the mtime of every object: 2001-09-09, older than any link
GC_LEASE = "gc"  # the lease of who removes what has no name
# The fields of a record that was written before records were sealed.
UNSEALED = {"key", "action", "content", "outputs", "facts", "conditions", "run"}


class CorruptObject(ValueError):
    """An object whose bytes are not what its name says."""


class NondeterministicStage(ValueError):
    """One action gave two contents: its stage is not deterministic."""


def hash_file(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


Record = dict[str, Any]


class Store:
    """A folder that holds every artifact by its content.

    Args:
        root: the folder; made when the first object is put.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.abspath(root))

    def create(self) -> None:
        """Make the store's folder. Raises ValueError where it cannot be written."""
        with self.explain_write_errors():
            self.root.mkdir(parents=True, exist_ok=True)
            if not os.access(self.root, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self.root))

    # --- contents ---------------------------------------------------------------------------

    def object_path(self, digest: str) -> Path:
        return self.root / "objects" / digest[:2] / digest

    def put(self, path: Path) -> dict[str, Any]:
        """Move a file into the store; returns {"sha256", "size"}.

        The object appears under its name whole or not at all, also when the power fails.
        """
        if path.stat().st_uid != os.geteuid():  # its owner began what we finish, and alone may seal
            mine = path.with_name(f".{uuid.uuid4().hex}")
            shutil.copyfile(path, mine)
            os.replace(mine, path)
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
        """Whether a path leads to one of this store's objects."""
        folder = Path(os.path.realpath(path)).parent.parent
        return folder == Path(os.path.realpath(self.root)) / "objects"

    def digest(self, path: Path) -> str:
        """The sha256 of a file. Free for a link into the store: it is the object's name.

        Raises:
            Corrupt: the object is not what its name says; it is in quarantine now.
            ValueError: there is no such file.
        """
        target = Path(os.path.realpath(path))
        if self.is_object(path):
            if not self.is_intact(target.name):
                raise CorruptObject(
                    f"{path} points to {target.name[:12]}…, which is damaged or gone from the "
                    f"store {self.root}; run the same command again and it is made anew"
                )
            return target.name
        if not target.is_file():
            raise ValueError(f"expected a file at {path}, found {_describe_file(target)}")
        return hash_file(target)

    def is_intact(self, digest: str, size: int | None = None) -> bool:
        """Whether an object is here and is what its name says; if not, it goes to quarantine."""
        path = self.object_path(digest)
        try:
            found = path.stat()
        except FileNotFoundError:
            refresh_listing(path.parent)  # another machine may have just put it there
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
            if found.st_mtime_ns != OBJECT_MTIME_NS:  # touched, or copied here by other means
                with suppress(PermissionError):  # another's: it is hashed again next time
                    os.utime(path, ns=(OBJECT_MTIME_NS, OBJECT_MTIME_NS))
            return not wrong_size  # else it is who asks that is wrong
        self.quarantine(path, f"its {found.st_size:,} bytes are not what its name says")
        return False

    def quarantine(self, path: Path, reason: str) -> None:
        """Put a file that is not what its name says out of the way, for whoever wants to see it."""
        cell = self.root / "quarantine" / f"{path.name}.{uuid.uuid4().hex[:8]}"
        cell.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.replace(path, cell)
        except FileNotFoundError:  # another process has found it too
            return
        log.warning(f"store: {path.name[:12]}… is set aside: {reason}; moved to {cell}")

    # --- actions ----------------------------------------------------------------------------

    def record_path(self, key: str) -> Path:
        return self.root / "actions" / key[:2] / f"{key}.json"

    def record(self, key: str) -> Record | None:
        """What is known of an action; None if it never ended, or nothing sound is left of it.

        A damaged record goes to quarantine and is written anew from its copy; without one the
        action runs again.
        """
        path = self.record_path(key)
        try:
            return load_record(path.read_bytes(), key)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno != errno.ESTALE:  # another machine has just written it anew
                raise
            return self.record(key)
        except Damaged:
            self.quarantine(path, "a damaged record")
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
        """The record of an action all of whose outputs are here and sound."""
        record = self.record(key)
        if record is None:
            return None
        sound = [self.is_intact(file["sha256"], file["size"]) for file in output_files(record)]
        return record if all(sound) else None

    def run(self, action: Action, build: Callable[[Path], Mapping[str, Any]]) -> Record:
        """The record of `action`: found, or made by `build`, once, however many ask.

        Args:
            build: called with the action's work folder, which it may find as an earlier attempt
                left it. Makes the outputs in its folder `outputs`, one file or folder a name,
                and returns what else the record is to hold: "facts", "aside" (names of files
                that belong to an output but not to its content: timings, plots), "conditions"
                (what may change the bytes without being part of the action: world size, device).

        Raises:
            NondeterministicStage: an earlier run, under equal conditions, gave other bytes.
        """
        key = action.key
        with self.explain_write_errors():
            if (record := self.lookup(key)) is not None:
                return record
            with lease(self.root / "leases", key, self._waiting(action)):
                # Whoever held it before us, on another machine, may have written the record.
                refresh_listing(self.record_path(key).parent)
                if (record := self.lookup(key)) is not None:
                    return record
                return self._build(action, build)

    def _build(self, action: Action, build: Callable[[Path], Mapping[str, Any]]) -> Record:
        work = self.root / "work" / action.key
        outputs = work / "outputs"
        shutil.rmtree(outputs, ignore_errors=True)  # an attempt that was cut off
        outputs.mkdir(parents=True)
        try:
            extra = dict(build(work))
        except BaseException:
            shutil.rmtree(outputs, ignore_errors=True)
            raise
        aside = set(extra.pop("aside", ()))
        put = {path.name: self._put_output(path, aside) for path in sorted(outputs.iterdir())}
        record = {
            "key": action.key,
            "action": action.as_dict(),
            "content": content(put),
            "outputs": put,
            "facts": extra.pop("facts", {}),
            "conditions": extra.pop("conditions", {}),
            **extra,
        }
        self._compare(record)
        self._write_record(record)
        outputs.rmdir()
        if not any(work.iterdir()):
            work.rmdir()
        return record

    def _put_output(self, path: Path, aside: set[str]) -> dict[str, Any]:
        """Put a file, or a folder's files: {"sha256", "size"} or {"files": …, "aside": …}."""
        if path.is_file():
            return self.put(path)
        tree: dict[str, Any] = {"files": {}, "aside": {}}
        for file in sorted(inner for inner in path.rglob("*") if inner.is_file()):
            name = file.relative_to(path).as_posix()
            tree["aside" if name in aside else "files"][name] = self.put(file)
        shutil.rmtree(path)
        return tree

    def _compare(self, record: Record) -> None:
        """The alarm: one action, two contents."""
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
        before, now = _contents_by_path(known), _contents_by_path(record)
        differing = sorted(n for n in before.keys() | now.keys() if before.get(n) != now.get(n))
        raise NondeterministicStage(
            f"{what} gave two contents for one action; differing: {', '.join(differing)}. "
            "Expected equal bytes from equal inputs: its stage is not deterministic, or its code "
            "changed without a new VERSION. The earlier record stands; both contents are in "
            f"{self.root}/objects. To accept the new one: rm {self.record_path(record['key'])}"
        )

    def import_record(self, record: Record) -> None:
        """Take another store's record of an action whose contents are here, or may come later.

        Raises:
            ValueError: its parts are not of one piece.
            NondeterministicStage: another content is known for it here, under equal conditions.
        """
        whose = f"the record {record['key'][:12]}…"
        asked = Action(**untrusted.check_record(record, record["key"], whose)["action"])
        if asked.key != record["key"] or content(record["outputs"]) != record["content"]:
            raise ValueError(f"{whose} was changed after it was written")
        self._compare(record)
        if self.record(record["key"]) is None:
            self._write_record(record)

    @contextmanager
    def protect_from_gc(self, key: str) -> Iterator[None]:
        """Keep what an action makes, or made, from `gc`: for the block, in which it gets its names.

        If the process is killed in it, until somebody names it: the same command, asked again.
        """
        mark = self.root / "unnamed" / key
        with self.explain_write_errors():
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
            fsync_path(mark.parent)
        if self._wait_for_gc():
            mark.touch()  # which it may have taken for a failed one's
        try:
            yield
        except Exception:
            if self.record_path(key).exists():
                raise  # it ended, but has no name
            mark.unlink(missing_ok=True)
            raise
        mark.unlink(missing_ok=True)

    def _wait_for_gc(self) -> bool:
        """Wait for `gc`, if it runs. If it begins later, it sees our mark or lease."""
        if not any((self.root / "leases").glob(f"{GC_LEASE}.*")):
            return False
        with lease(self.root / "leases", GC_LEASE, lambda _: log.info("store: gc runs; waiting")):
            return True

    @contextmanager
    def temp_folder(self) -> Iterator[Path]:
        """A folder of one's own on the store's disk, gone with the block."""
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
        """Say what to do where the disk is full or the store may not be written."""
        try:
            yield
        except OSError as error:
            if error.filename is not None and not self._is_inside(error.filename):
                raise  # an input that may not be read, another disk
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                free = shutil.disk_usage(self.root).free
                raise ValueError(
                    f"the disk is full ({free:,} bytes free under {self.root}): {error}. Nothing "
                    "half-written was kept; make room (`olmo store gc`), then run the same again"
                ) from error
            refused = (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR)
            if error.errno in refused or not self.root.is_dir():
                raise ValueError(
                    f"the store {self.root} cannot be written: {error}. Expected a folder that "
                    "this user may write to; name one with OLMO_STORE=<folder>"
                ) from error
            raise

    def _is_inside(self, path: str | bytes | int) -> bool:
        if isinstance(path, int):  # an open file's number
            return True
        return Path(os.path.abspath(os.fsdecode(path))).is_relative_to(self.root)


def load_record(text: bytes, key: str) -> Record:
    """The record of the action `key`, from the bytes of its file.

    Raises:
        Damaged: they are not as they were written, or another action's.
    """
    record = parse_record(text, f"the record {key[:12]}…")
    if record["key"] != key:
        raise Damaged(f"expected the record of {key[:12]}…, found another action's")
    return record


def parse_record(text: bytes, name: str | Path) -> Record:
    """A record from the bytes of its file. Raises Damaged."""
    try:
        return sealed.loads(text, name)
    except Damaged:
        if (record := _parse_unsealed(text)) is None:
            raise
        return record


def _parse_unsealed(text: bytes) -> Record | None:
    """A record from before records were sealed, if what of it can be computed again agrees."""
    try:
        record: Record = json.loads(text)
        asked = Action(**record["action"]).key
        whole = (asked, content(record["outputs"])) == (record["key"], record["content"])
        return record if whole and set(record) <= UNSEALED else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def output_files(record: Record) -> list[dict[str, Any]]:
    """Every file of an action's outputs, those aside too: {"sha256", "size"}."""
    return [
        file
        for output in record["outputs"].values()
        for file in (
            [*output["files"].values(), *output["aside"].values()]
            if "files" in output
            else [output]
        )
    ]


def content(outputs: Mapping[str, Any]) -> str:
    """The digest of what came out; what lies aside (plots, timings) is not in it."""
    names = _contents_by_path({"outputs": outputs})
    return hashlib.sha256(canonical_json(names)).hexdigest()


def _contents_by_path(record: Mapping[str, Any]) -> dict[str, str]:
    names: dict[str, str] = {}
    for name, output in record["outputs"].items():
        if "files" in output:
            names |= {f"{name}/{inner}": f["sha256"] for inner, f in output["files"].items()}
        else:
            names[name] = output["sha256"]
    return names


def _describe_file(path: Path) -> str:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "nothing"
    return "a folder" if stat.S_ISDIR(mode) else "no regular file"


def utc_now() -> str:
    """The time as records write it: UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
