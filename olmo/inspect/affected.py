"""`olmo store affected`: what descends from a bad artifact, and how it is made again.

A path, a source or a sha256 is bad bytes: whoever read them is affected, whichever action made
them. An action, a folder of names or a stage is bad work: whoever read what it made is affected,
but for those whose inputs a good action made, too, with the same bytes.
"""

import os
import shlex
import sqlite3
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from olmo.corpus.listing import read_listing
from olmo.inspect.subjects import Bad, find_bad, locate, makers_of
from olmo.runtime.log import format_bytes, format_duration, format_number
from olmo.runtime.urls import redact
from olmo.store.commands import pinned_keys
from olmo.store.index import find_descendants, open_index
from olmo.store.stage import current_store
from olmo.store.store import Store

COLUMNS = ("name", "stage", "when", "wall", "CPU", "size", "snakemake target", "")
TO_RIGHT = ("wall", "CPU", "size")
MAX_BAD = 5  # actions whose removal is printed


@dataclass
class Row:
    """An action and what it takes to run it again."""

    id: int
    key: str
    stage: str  # stage@version
    started: str
    wall_s: float
    cpu_s: float
    bytes: int
    note: str = ""
    paths: list[str] = field(default_factory=list)  # its names, absolute
    project: str = ""
    target: str = ""

    def cells(self, here: str) -> list[str]:
        name = show(self.paths[0], here) if self.paths else "(no path)"
        more = f" and {len(self.paths) - 1} more" * (len(self.paths) > 1)
        when = self.started[:16].replace("T", " ")
        costs = [format_duration(self.wall_s), format_duration(self.cpu_s)]
        size = format_bytes(self.bytes)
        return [name + more, self.stage, when, *costs, size, self.target, self.note]


def affected(subject: str, /) -> None:
    """Print what was made of SUBJECT, which is bad, its cost, and how to make it again.

    SUBJECT is a path of this project, a source's name, URL or local file, a sha256 or an action's
    key (a beginning is enough), or a stage, all versions or one, as tokens@1. An action whose
    inputs were also made, with the same bytes, by actions that are not affected is listed apart.
    The index of all records, in the store's `index`, is brought up to date first.

    Args:
        subject: what was found to be bad

    Example:
        olmo store affected data/stdlib/tokenizer.json
        olmo store affected documents@1
    """
    store, here = current_store(), os.getcwd()
    subject = redact(subject)
    with open_index(store) as db:
        bad = find_bad(db, store, subject)
        found, same = find_descendants(db, bad.records, bad.contents)
        makers = bad.records | makers_of(db, bad.contents) - found
        rows = read_rows(db, store, makers, "bad") + read_rows(db, store, found)
        used = feeds(db, {row.id for row in rows if row.target})
        same -= makers
        print(describe_bad(db, bad, makers, subject, len(found)))
        print_table(rows, here)
        if same:
            print(f"\nNot affected, since good actions made the same bytes, too: {len(same):,}")
            print_table(read_rows(db, store, same), here)
        if rows:
            print_commands(rows, used, store, here)


def describe_bad(
    db: sqlite3.Connection, bad: Bad, makers: set[int], subject: str, found: int
) -> str:
    """What is taken to be bad, who made it, and how many actions it led to."""
    parts = []
    if bad.records:
        parts.append(
            describe_one(db, "action", "stage || ' ' || lower(hex(key)) FROM records", bad.records)
        )
    if bad.contents:
        made = f", made by {format_number(len(makers), 'action')}" * bool(makers)
        parts.append(
            describe_one(db, "content", "lower(hex(digest)) FROM contents", bad.contents) + made
        )
    return f"{subject}: {'; '.join(parts)}. What was made of it: {format_number(found, 'action')}"


def describe_one(db: sqlite3.Connection, noun: str, columns: str, numbers: set[int]) -> str:
    """The action or content of an id, or how many they are."""
    if len(numbers) > 1:
        return format_number(len(numbers), noun)
    ((text,),) = db.execute(f"SELECT {columns} WHERE id = ?", tuple(numbers))
    return f"{noun} {text[:-52]}…"


def read_rows(
    db: sqlite3.Connection, store: Store, records: Iterable[int], note: str = ""
) -> list[Row]:
    """The rows of records: those with names first, by name, then by time."""
    # CROSS JOIN: SQLite keeps the order of the tables, and reads no table as a whole.
    db.execute("CREATE TEMP TABLE IF NOT EXISTS chosen (id INTEGER PRIMARY KEY)")
    db.execute("DELETE FROM chosen")
    db.executemany("INSERT INTO chosen VALUES (?)", [(number,) for number in records])
    query = (
        "SELECT id, key, stage || '@' || version, ifnull(started, ''), ifnull(wall_s, 0), "
        "ifnull(cpu_s, 0), bytes FROM chosen CROSS JOIN records USING (id)"
    )
    rows = {key: Row(number, key.hex(), *rest) for number, key, *rest in db.execute(query)}
    pinned, objects = set(pinned_keys(store)), str(store.root / "objects")
    query = (
        "SELECT record, lower(hex(digest)) FROM chosen CROSS JOIN made ON made.record = chosen.id "
        "CROSS JOIN contents ON contents.id = made.content"
    )
    gone = {
        number
        for number, digest in db.execute(query)
        if not os.path.exists(f"{objects}/{digest[:2]}/{digest}")
    }
    for row in rows.values():
        notes = [note, "pinned" * (row.key in pinned), "no objects" * (row.id in gone)]
        row.note = ", ".join(filter(None, notes))
    targets = Targets()
    query = (
        "SELECT path, project, key FROM chosen CROSS JOIN records USING (id) "
        "CROSS JOIN names USING (key)"
    )
    here = os.getcwd() + "/"
    names = [(locate(store, path), project, key) for path, project, key in db.execute(query)]
    for path, project, key in sorted(names, key=lambda name: (not name[0].startswith(here), name)):
        row = rows[key]
        row.paths.append(path)
        if not row.project:
            row.project = locate(store, project)
            row.target = targets.find(path, row.project)
    return sorted(rows.values(), key=lambda row: (not row.paths, row.paths, row.started))


class Targets:
    """Which target of snakemake makes a path of a project."""

    def __init__(self) -> None:
        self._listings: dict[str, dict[str, str]] = {}  # data set → its files → their listing

    def find(self, path: str, project: str) -> str:
        """The target, relative to the project; "" for a path that is not in it."""
        if not path.startswith(project + "/"):
            return ""
        target = path.removeprefix(project + "/")
        top, *parts = target.split("/")
        if top == "data" and len(parts) > 1:
            dataset = f"{project}/data/{parts[0]}"
            if dataset not in self._listings:
                self._listings[dataset] = read_listed_files(Path(dataset))
            batch = self._listings[dataset].get(path)
            return f"data/{parts[0]}/{batch}" if batch else target
        if top == "checkpoints" and parts[1:2] == ["samples"]:
            return f"report/{parts[0]}.html"
        if top == "checkpoints" and parts[1:2] == ["answers"]:
            return f"eval/{parts[0]}"
        return target


def read_listed_files(dataset: Path) -> dict[str, str]:
    """The files that the listings of a data set name, and their folders: path → listing."""
    found: dict[str, str] = {}
    for listing in (*dataset.glob("*/[0-9]*.tsv"), *dataset.glob("*/all.tsv")):
        with suppress(ValueError):  # another table, or a damaged one
            for entry in read_listing([listing]):
                path, target = f"{dataset}/{entry.path}", listing.relative_to(dataset).as_posix()
                found |= {
                    path: target,
                    os.path.dirname(path): target,
                }  # a stage may make the folder
    return found


def feeds(db: sqlite3.Connection, records: Iterable[int]) -> set[int]:
    """Those of the records whose outputs another one of them used."""
    db.execute("DELETE FROM chosen")
    db.executemany("INSERT INTO chosen VALUES (?)", [(number,) for number in records])
    query = (
        "SELECT DISTINCT made.record FROM chosen CROSS JOIN made ON made.record = chosen.id "
        "CROSS JOIN used USING (content) CROSS JOIN chosen AS user ON user.id = used.record "
        "WHERE made.record != used.record"
    )
    return {number for (number,) in db.execute(query)}


# --- for people -----------------------------------------------------------------------------


def show(path: str, here: str) -> str:
    """A path, relative if it is below `here`."""
    return path.removeprefix(here + "/")


def print_table(rows: list[Row], here: str) -> None:
    """The rows, and their sums."""
    wall = format_duration(sum(row.wall_s for row in rows))
    cpu = format_duration(sum(row.cpu_s for row in rows))
    size = format_bytes(sum(row.bytes for row in rows))
    table = [list(COLUMNS), *(row.cells(here) for row in rows)]
    table.append([format_number(len(rows), "action"), "", "", wall, cpu, size, "", ""])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table if rows else ():
        cells = [
            cell.rjust(width) if title in TO_RIGHT else cell.ljust(width)
            for title, cell, width in zip(COLUMNS, line, widths, strict=True)
        ]
        print("  ".join(cells).rstrip())


def print_commands(rows: list[Row], used: set[int], store: Store, here: str) -> None:
    """How to make all rows again: their last targets; before that, what to remove."""
    bad = [row for row in rows if row.note.startswith("bad")]
    print("\nTo make them again:")
    if bad and len(bad) <= MAX_BAD:
        paths = [path for row in bad for path in row.paths if os.path.lexists(path)]
        paths = [*(str(store.record_path(row.key)) for row in bad), *paths]
        print(f"  rm -rf {shlex.join(show(path, here) for path in paths)}")
    elif bad:
        print(
            f"  remove the paths and records of the {len(bad):,} bad ones, or snakemake keeps them"
        )
    last: dict[str, dict[str, None]] = {}  # project → targets, in order
    for row in rows:
        if row.target and row.id not in used:
            last.setdefault(row.project, {})[row.target] = None
    for project, targets in sorted(last.items()):
        go = "" if project == here else f"cd {shlex.quote(project)} && "
        print(f"  {go}uv run snakemake --cores 2 {shlex.join(targets)}")
    if unnamed := sum(not row.target for row in rows):
        print(f"  {format_number(unnamed, 'action')} without a path: made elsewhere, or replaced")
