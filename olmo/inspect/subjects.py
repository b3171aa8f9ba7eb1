"""What a word names in the store: the subject of `olmo store affected`."""

import difflib
import os
import re
import sqlite3
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from olmo.corpus.listing import read_listing
from olmo.io.sealed import hash_file
from olmo.store.index import shorten, span
from olmo.store.naming import stored_path
from olmo.store.store import Store

MIN_DIGITS = 6  # of a prefix
EXPECTED = "a path, a source's name or URL, a sha256, an action's key, or a stage such as tokens@1"


@dataclass
class Bad:
    """What was found to be bad: ids of records and of contents in the index."""

    records: set[int] = field(default_factory=set)
    contents: set[int] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self.records or self.contents)

    def add(self, other: "Bad") -> None:
        self.records |= other.records
        self.contents |= other.contents


def find_bad(db: sqlite3.Connection, store: Store, subject: str) -> Bad:
    """The records or contents that a subject names.

    Raises:
        ValueError: it is malformed, unknown, or names several things.
    """
    if "@" in subject and re.fullmatch(r"[^/:]*", subject):
        return find_stage(db, subject)
    kinds = {
        "a path (./…)": find_path(db, store, subject),
        "a source (its path or URL)": find_source(db, store, subject),
    }
    if re.fullmatch(r"[a-z]\w*", subject):
        kinds["a stage (stage@version)"] = Bad(records=records_of_stage(db, subject))
    if re.fullmatch(f"[0-9a-f]{{{MIN_DIGITS},64}}", subject):
        kinds["a sha256 or a key (all 64 digits)"] = find_digits(db, subject)
    known = {kind: bad for kind, bad in kinds.items() if bad}
    if len(known) > 1:
        raise ValueError(f"{subject} is {' and '.join(known)}; name one as the brackets say")
    if not known:
        raise unknown_subject(db, store, subject)
    return next(iter(known.values()))


def find_stage(db: sqlite3.Connection, subject: str) -> Bad:
    """All actions of stage@version."""
    stage, _, version = subject.partition("@")
    if not re.fullmatch(r"[0-9]{1,9}", version) or not stage:
        raise ValueError(f"expected stage@version, as tokens@1, found {subject}")
    if records := records_of_stage(db, stage, int(version)):
        return Bad(records=records)
    query = "SELECT DISTINCT stage || '@' || version FROM records ORDER BY stage, version"
    known = [name for (name,) in db.execute(query)]
    near = [name for name in known if name.partition("@")[0] == stage]
    near = near or difflib.get_close_matches(subject, known, 1)
    hint = f"; it has {', '.join(near)}" if near else ""
    raise ValueError(f"expected a stage and a version in the store, found {subject}{hint}")


def records_of_stage(db: sqlite3.Connection, stage: str, version: int | None = None) -> set[int]:
    query = "SELECT id FROM records WHERE stage = ? AND version = ifnull(?, version)"
    return {number for (number,) in db.execute(query, (stage, version))}


def find_digits(db: sqlite3.Connection, digits: str) -> Bad:
    """The content or the action whose digest begins with these digits."""
    query = "SELECT {0}, id FROM {1} WHERE {0} BETWEEN ? AND ?"
    contents = db.execute(query.format("digest", "contents"), span(digits)).fetchall()
    records = db.execute(query.format("key", "records"), span(digits)).fetchall()
    if len(found := contents + records) > 1:
        both = " and ".join(f"{digest.hex()[: len(digits) + 6]}…" for digest, _ in found[:2])
        raise ValueError(f"{digits} begins {len(found):,} digests, such as {both}; add digits")
    return Bad({number for _, number in records}, {number for _, number in contents})


def find_source(db: sqlite3.Connection, store: Store, subject: str) -> Bad:
    """The records of a source, and what they made: by URL, file name, or name."""
    rows = db.execute("SELECT record, origin FROM origins WHERE origin = ?", (subject,)).fetchall()
    if not rows and "/" not in subject:
        query = "SELECT record, origin FROM origins WHERE short = ?"
        rows = db.execute(query, (shorten(subject),)).fetchall()
        rows = [row for row in rows if names_source(subject, row[1])]
    named = find_named_sources(db, store, subject) if "/" not in subject else []
    # A source that was downloaded has both.
    bad = Bad()
    for record, _ in rows:
        bad.add(Bad({record}, contents_of(db, record)))
    places = sorted({origin for _, origin in rows})
    for path, content in named:
        if content not in bad.contents:
            bad.add(Bad(contents={content}))
            places.append(path)
    if len(places) > 1 and "/" not in subject:
        raise ValueError(
            f"{subject} is the name of {len(places):,} sources, such as {places[0]} and "
            f"{places[1]}; give the path or URL of one"
        )
    return bad


def names_source(subject: str, origin: str) -> bool:
    """Whether a name, with or without suffixes, is that of a URL or a file."""
    return subject == shorten(origin) or subject == origin.partition("?")[0].rpartition("/")[2]


def find_named_sources(db: sqlite3.Connection, store: Store, subject: str) -> list[tuple[str, int]]:
    """(path, content) of data/<set>/sources/<subject>.… in this project."""
    folder = stored_path(store, Path.cwd() / "data")
    found = []
    for path, key, output in db.execute(
        "SELECT path, key, output FROM names WHERE path >= ? AND path < ? "
        "AND path LIKE '%/sources/%'",
        (f"{folder}/", f"{folder}0"),
    ).fetchall():
        if names_source(subject, path):
            bad = find_output(db, store, path, key.hex(), output)
            shown = os.path.relpath(locate(store, path))
            found += [(shown, content) for content in bad.contents]
    return found


def find_path(db: sqlite3.Connection, store: Store, subject: str) -> Bad:
    """What a path of this project stands for: a file's bytes, a listing's, a folder's action."""
    if not subject or "://" in subject:
        return Bad()
    path = Path(os.path.abspath(subject))
    if store.is_object(path):  # it need not exist any more
        return find_digests(db, [Path(os.path.realpath(path)).name])
    if path.name == "record.json" and path.is_symlink():
        path = path.parent
    if path.is_file():
        if path.suffix == ".tsv":
            with suppress(ValueError):
                return find_digests(db, [entry.sha256 for entry in read_listing([path])])
        return find_digests(db, [hash_file(path)])
    stored = stored_path(store, path)
    query = "SELECT path, key, output FROM names WHERE path = ? OR path >= ? AND path < ?"
    bad = Bad()
    for name, key, output in db.execute(query, (stored, f"{stored}/", f"{stored}0")).fetchall():
        bad.add(find_output(db, store, name, key.hex(), output))
    return bad


def find_output(db: sqlite3.Connection, store: Store, path: str, key: str, output: str) -> Bad:
    """What a name stands for: the bytes of a file, or the action of a folder."""
    if (record := store.record(key)) is None:
        raise ValueError(
            f"the record of {locate(store, path)} is missing or damaged; run `olmo "
            "store verify`, then the command that made it"
        )
    made = record["outputs"][output]
    if "files" in made:
        row = db.execute("SELECT id FROM records WHERE key = ?", (bytes.fromhex(key),)).fetchone()
        return Bad(records={row[0]} if row else set())
    return find_digests(db, [made["sha256"]])


def find_digests(db: sqlite3.Connection, digests: Iterable[str]) -> Bad:
    """The contents with these digests, as far as the store has made or used them."""
    query = "SELECT id FROM contents WHERE digest = ?"
    rows = [db.execute(query, (bytes.fromhex(digest),)).fetchone() for digest in digests]
    return Bad(contents={row[0] for row in rows if row})


def contents_of(db: sqlite3.Connection, record: int) -> set[int]:
    query = "SELECT content FROM made WHERE record = ?"
    return {content for (content,) in db.execute(query, (record,))}


def makers_of(db: sqlite3.Connection, contents: Iterable[int]) -> set[int]:
    query = "SELECT record FROM made WHERE content = ?"
    return {record for content in contents for (record,) in db.execute(query, (content,))}


def unknown_subject(db: sqlite3.Connection, store: Store, subject: str) -> ValueError:
    """The error for a subject that names nothing, with the most similar one that does."""
    if os.path.isfile(subject):
        return ValueError(
            f"{subject}: expected bytes that an action in {store.root} made or used, found "
            f"{hash_file(Path(subject))[:12]}…, which none did; give its "
            "source's name, or the sha256 that it had"
        )
    paths = [os.path.relpath(locate(store, p)) for (p,) in db.execute("SELECT path FROM names")]
    others = "SELECT DISTINCT stage FROM records UNION SELECT origin FROM origins"
    known = paths + [name for (name,) in db.execute(others)]
    near = difflib.get_close_matches(subject, known, 1, cutoff=0.0)
    hint = f"; the nearest is {near[0]}" if near else "; run snakemake first"
    return ValueError(f"expected {EXPECTED}, known to {store.root}, found {subject}{hint}")


def locate(store: Store, path: str) -> str:
    """The absolute path of one as in links/."""
    return os.path.normpath(os.path.join(store.root, path))
