"""An index of the store's records and names: who made and who used which content.

It is a cache, `index/lineage` in the store: an SQLite database, and its sha256. It is read into
memory, brought up to date and written as a whole, so processes on several machines need no lock,
and a store that cannot be written is indexed in memory. A folder whose mtime is the known one is
not read again. Any other is listed, and the files in it that are new or replaced are read.
"""

import hashlib
import os
import re
import sqlite3
import time
from collections.abc import Container, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from olmo.io import sealed
from olmo.io.sealed import Damaged
from olmo.runtime.bar import track
from olmo.runtime.log import log
from olmo.runtime.urls import redact
from olmo.store.lineage import input_digests
from olmo.store.naming import load_name
from olmo.store.record import Record, load_record, output_files
from olmo.store.store import Store

VERSION = 1  # of SCHEMA and of what is read from a record
SCHEMA = f"""
PRAGMA user_version = {VERSION};
CREATE TABLE folders (folder TEXT PRIMARY KEY, mtime INTEGER);
CREATE TABLE records (id INTEGER PRIMARY KEY, key BLOB UNIQUE, file INTEGER,
    stage TEXT, version INTEGER, started TEXT, wall_s REAL, cpu_s REAL, bytes INTEGER);
CREATE INDEX records_of_stage ON records (stage, version);
CREATE TABLE contents (id INTEGER PRIMARY KEY, digest BLOB UNIQUE);
CREATE TABLE made (content INTEGER, record INTEGER, PRIMARY KEY (content, record)) WITHOUT ROWID;
CREATE INDEX made_by ON made (record);
CREATE TABLE used (content INTEGER, record INTEGER, PRIMARY KEY (content, record)) WITHOUT ROWID;
CREATE INDEX used_by ON used (record);
CREATE TABLE origins (origin TEXT, short TEXT, record INTEGER);
CREATE INDEX origins_by_name ON origins (origin);
CREATE INDEX origins_by_short_name ON origins (short);
CREATE INDEX origins_of ON origins (record);
CREATE TABLE names (name BLOB PRIMARY KEY, file INTEGER, path TEXT, project TEXT, key BLOB,
    output TEXT);
CREATE INDEX names_of ON names (key);
CREATE INDEX names_by_path ON names (path);
"""
OF_RECORD = (("records", "id"), ("made", "record"), ("used", "record"), ("origins", "record"))
LINKS = "links"
# A folder that changed less than this before it was listed is listed again by the next process:
# another change in the same tick of the file system's clock would not change its mtime.
SETTLED_NS = 2 * 10**9
DIGEST_BYTES = 32
HEX = re.compile("[0-9a-f]{32}(?:[0-9a-f]{32})?")  # a name in links/, a record


@contextmanager
def open_index(store: Store) -> Iterator[sqlite3.Connection]:
    """The index of a store as it is now, a database in memory (see SCHEMA).

    Damaged records are restored from their copies, as elsewhere; those that cannot be, and damaged
    names, are left out with a warning.
    """
    path = store.root / "index" / "lineage"
    with closing(_load(path)) as db:
        if _update(db, store):
            db.commit()
            with suppress(OSError):  # the store cannot be written: the next process does it again
                _save(db, path)
        yield db


def _load(path: Path) -> sqlite3.Connection:
    """The saved index; an empty one, if it is missing, damaged, or of another version."""
    db = sqlite3.connect(":memory:")
    with suppress(OSError, sqlite3.Error, OverflowError):  # SQLite takes up to 1 GiB at once
        data = memoryview(path.read_bytes())
        body, digest = data[:-DIGEST_BYTES], data[-DIGEST_BYTES:]
        if hashlib.sha256(body).digest() == digest:
            db.deserialize(body)
            if db.execute("PRAGMA user_version").fetchone()[0] == VERSION:
                return db
    db.close()
    db = sqlite3.connect(":memory:")
    db.executescript(SCHEMA)
    return db


def _save(db: sqlite3.Connection, path: Path) -> None:
    """Replace the saved index. It is not synced: after a power failure its digest tells."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in sealed.find_drafts(path.parent, path.name):
        if time.time() - left.stat().st_mtime > 3600:  # of a killed process
            left.unlink(missing_ok=True)
    draft = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    body = db.serialize()
    try:
        with draft.open("wb") as file:
            file.write(body)
            file.write(hashlib.sha256(body).digest())
        os.replace(draft, path)
    except BaseException:
        with suppress(OSError):
            draft.unlink()
        raise


def _update(db: sqlite3.Connection, store: Store) -> bool:
    """Read what changed in the store since; whether anything did."""
    known = dict(db.execute("SELECT folder, mtime FROM folders"))
    settled = time.time_ns() - SETTLED_NS
    mtimes: dict[str, int] = {}  # before the folders are listed
    with suppress(FileNotFoundError):
        mtimes = {f"actions/{p.name}": p.stat().st_mtime_ns for p in _subfolders(store)}
    with suppress(FileNotFoundError):
        mtimes[LINKS] = (store.root / LINKS).stat().st_mtime_ns
    changed = sorted(f for f in known.keys() | mtimes.keys() if known.get(f) != mtimes.get(f))
    for folder in track(changed, "indexing records"):
        update = _update_names if folder == LINKS else _update_records
        is_complete = update(db, store, folder)
        mtime = mtimes.get(folder)
        if mtime is None:
            db.execute("DELETE FROM folders WHERE folder = ?", (folder,))
        else:
            mtime = mtime if is_complete and mtime < settled else -1
            db.execute("REPLACE INTO folders VALUES (?, ?)", (folder, mtime))
    return bool(changed)


def span(digits: str) -> tuple[bytes, bytes]:
    """The first and the last digest that begin with these hexadecimal digits."""
    return bytes.fromhex(digits.ljust(64, "0")), bytes.fromhex(digits.ljust(64, "f"))


def _subfolders(store: Store) -> Iterator[Path]:
    """The folders of records."""
    for entry in os.scandir(store.root / "actions"):
        if len(entry.name) == 2 and entry.is_dir():
            yield Path(entry.path)


def _list_files(folder: Path, known: Container[str], suffix: str = "") -> dict[str, int]:
    """Stem → a number that changes if the file is replaced, of the files that are named by hex.

    Of known stems the form is not checked again: with 100,000 files that is time.
    """
    found: dict[str, int] = {}
    try:
        place = os.open(folder, os.O_RDONLY)  # stat of a name in it is faster than of a path
    except FileNotFoundError:
        return found
    try:
        with os.scandir(place) as entries:
            for entry in entries:
                stem = entry.name.removesuffix(suffix)
                if stem + suffix != entry.name or not (stem in known or HEX.fullmatch(stem)):
                    continue
                try:
                    stat = entry.stat()
                except FileNotFoundError:  # moved meanwhile
                    continue
                found[stem] = hash((stat.st_mtime_ns, stat.st_size, stat.st_ino))
    finally:
        os.close(place)
    return found


def _update_records(db: sqlite3.Connection, store: Store, folder: str) -> bool:
    """Index the records of a folder that are new or replaced; whether all could be read."""
    rows = db.execute(
        "SELECT key, file, id FROM records WHERE key BETWEEN ? AND ?", span(folder[-2:])
    )
    known = {key.hex(): (file, number) for key, file, number in rows}
    files = _list_files(store.root / folder, known, ".json")
    for key, (file, number) in known.items():
        if files.get(key) != file:
            for table, column in OF_RECORD:
                db.execute(f"DELETE FROM {table} WHERE {column} = ?", (number,))
    is_complete = True
    for key, file in files.items():
        if key in known and known[key][0] == file:
            continue
        record = _read_record(store, key)
        if record is None:
            is_complete = False
        else:
            _add_record(db, record, file)
    return is_complete


def _read_record(store: Store, key: str) -> Record | None:
    path = store.record_path(key)
    with suppress(Damaged, OSError):
        return load_record(path.read_bytes(), key)
    with suppress(OSError):  # it cannot be moved to quarantine
        return store.record(key)
    log.warning(f"store: the record {path} cannot be read and is left out; run olmo store verify")
    return None


def _add_record(db: sqlite3.Connection, record: Record, file: int) -> None:
    action, run, outputs = record["action"], record.get("run", {}), output_files(record)
    costs = (run.get("started"), run.get("wall_s"), run.get("cpu_s"))
    size = sum(output["size"] for output in outputs)
    key = bytes.fromhex(record["key"])
    row = (key, file, action["stage"], action["version"], *costs, size)
    marks = ", ".join("?" * (1 + len(row)))
    number = db.execute(f"INSERT INTO records VALUES ({marks})", (None, *row)).lastrowid
    digests = {"made": {output["sha256"] for output in outputs}, "used": set(input_digests(record))}
    for table, found in digests.items():
        contents = [bytes.fromhex(digest) for digest in found]
        values = [(digest,) for digest in contents]
        db.executemany("INSERT OR IGNORE INTO contents (digest) VALUES (?)", values)
        pairs = [(number, digest) for digest in contents]
        insert = f"INSERT INTO {table} SELECT id, ? FROM contents WHERE digest = ?"
        db.executemany(insert, pairs)
    origins = [(origin, shorten(origin), number) for origin in list_origins(record)]
    db.executemany("INSERT INTO origins VALUES (?, ?, ?)", origins)


def list_origins(record: Record) -> set[str]:
    """The URLs and file names that a record's content came from, without secrets."""
    params, facts = record["action"]["params"], record["facts"]
    found: list[Any] = [params.get("url"), facts.get("url"), facts.get("from")]
    if record["action"]["stage"] == "given_tokenizer":
        found.append(params.get("name"))  # elsewhere it names what is made
    found += params["names"] if isinstance(params.get("names"), list) else []
    return {redact(origin) for origin in found if isinstance(origin, str) and origin}


def shorten(origin: str) -> str:
    """A source's name: the last part of its URL or path, without suffixes.

    >>> shorten("https://host/a/part-0.json.gz?id=7")
    'part-0'
    """
    path = urlparse(origin).path if "://" in origin else origin
    return path.rstrip("/").rpartition("/")[2].partition(".")[0]


def _update_names(db: sqlite3.Connection, store: Store, folder: str) -> bool:
    """Index the names of links/ that are new or replaced; whether all could be read."""
    known = {name.hex(): file for name, file in db.execute("SELECT name, file FROM names")}
    files = _list_files(store.root / folder, known)
    gone = [(bytes.fromhex(name),) for name, _ in known.items() - files.items()]
    db.executemany("DELETE FROM names WHERE name = ?", gone)
    is_complete = True
    for name, file in sorted(files.items() - known.items()):
        try:
            found = load_name(store.root / folder / name)
        except (Damaged, OSError):
            log.warning(f"store: the name {folder}/{name} cannot be read; run olmo store verify")
            is_complete = False
            continue
        where = (found["path"], found.get("project", ".."))
        row = (bytes.fromhex(name), file, *where, bytes.fromhex(found["key"]), found["output"])
        db.execute("INSERT INTO names VALUES (?, ?, ?, ?, ?, ?)", row)
    return is_complete


# --- what descends from what ----------------------------------------------------------------


def find_descendants(
    db: sqlite3.Connection, records: set[int], contents: set[int]
) -> tuple[set[int], set[int]]:
    """The records that descend from bad ones; and those that need not.

    A record descends from a bad one if it used a content that a bad record, or a descendant, made;
    or a bad content, whoever made that. It need not where each such content that it used was also
    made by a record that is not bad and descends from none: its bytes are what good inputs give.

    Args:
        records: ids of the bad records.
        contents: ids of the bad contents.
    """
    db.executescript(
        """
        DROP TABLE IF EXISTS bad; DROP TABLE IF EXISTS reached; DROP TABLE IF EXISTS tainted;
        CREATE TEMP TABLE bad (record INTEGER, content INTEGER);
        """
    )
    db.executemany("INSERT INTO bad VALUES (?, NULL)", [(number,) for number in records])
    db.executemany("INSERT INTO bad VALUES (NULL, ?)", [(number,) for number in contents])
    db.executescript(
        """
        CREATE TEMP TABLE reached AS WITH RECURSIVE found (id) AS (
            SELECT record FROM bad WHERE record IS NOT NULL
            UNION SELECT used.record FROM bad CROSS JOIN used ON used.content = bad.content
            UNION SELECT used.record FROM found CROSS JOIN made ON made.record = found.id
                CROSS JOIN used ON used.content = made.content
        ) SELECT id FROM found;
        CREATE TEMP TABLE tainted AS
            SELECT DISTINCT content FROM made WHERE record IN (SELECT id FROM reached)
            UNION SELECT content FROM bad WHERE content IS NOT NULL;
        """
    )
    reached = {number for (number,) in db.execute("SELECT id FROM reached")}
    makers = db.execute("SELECT content, record FROM tainted CROSS JOIN made USING (content)")
    uses = db.execute("SELECT content, record FROM tainted CROSS JOIN used USING (content)")
    good = _find_good(reached, makers.fetchall(), uses.fetchall(), records, contents)
    return reached - good - records, good


def _find_good(
    reached: set[int],
    makers: list[tuple[int, int]],
    uses: list[tuple[int, int]],
    bad_records: set[int],
    bad_contents: set[int],
) -> set[int]:
    """The reached records whose inputs all come from good records, too.

    What can be made from good records is found step by step, from those that are not reached: so
    an export, which has the tokenizer that it was made from, does not vouch for that tokenizer.
    """
    made: dict[int, list[int]] = {}  # record → contents
    waiting: dict[int, int] = dict.fromkeys(reached - bad_records, 0)  # record → inputs to come
    used_by: dict[int, list[int]] = {}  # content → records
    for content, record in makers:
        made.setdefault(record, []).append(content)
    for content, record in uses:
        if record in waiting:
            waiting[record] += 1
            used_by.setdefault(content, []).append(record)
    good: set[int] = set()
    ready = [record for record in made if record not in reached]
    done = set(bad_contents)
    for record in ready:  # grows in the loop
        for content in made.get(record, ()):
            if content not in done:
                done.add(content)
                for user in used_by.get(content, ()):
                    waiting[user] -= 1
                    if not waiting[user]:
                        good.add(user)
                        ready.append(user)
    return good
