"""Lineage: what an artifact was made from, and how two actions differ."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from olmo.store.naming import record_of
from olmo.store.record import Record, output_files
from olmo.store.store import Store


def diff_actions(
    before: dict[str, Any], now: dict[str, Any], prefix: str = "", missing: str = "default"
) -> list[str]:
    """The fields in which two actions differ: "params.keep_one_in: 10 → 5".

    A field that only one has is `missing` in the other.
    """
    changed = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name, missing), now.get(name, missing)
        if isinstance(old, dict) or isinstance(new, dict):
            old, new = ({} if part == missing else part for part in (old, new))
        if isinstance(old, dict) and isinstance(new, dict):
            changed += diff_actions(old, new, f"{prefix}{name}.", missing)
        elif isinstance(old, list) and isinstance(new, list) and old != new:
            places = [i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b]
            size = f", {len(old)} → {len(new)} of them" if len(old) != len(new) else ""
            changed.append(f"{prefix}{name}: {len(places)} of {len(new)} changed{size}")
        elif old != new:
            changed.append(f"{prefix}{name}: {_abbreviate(old)} → {_abbreviate(new)}")
    return changed


def find_nearest(store: Store, action: dict[str, Any], besides: str = "") -> Record | None:
    """The known action of the same stage that differs in the fewest fields."""
    known = [
        record
        for record in store.records()
        if record["action"]["stage"] == action["stage"] and record["key"] != besides
    ]
    return min(known, key=lambda r: len(diff_actions(r["action"], action)), default=None)


def records_by_content(store: Store) -> dict[str, list[Record]]:
    """For each content in the store, the records of the actions that made it."""
    made: dict[str, list[Record]] = {}
    for record in store.records():
        for digest in {file["sha256"] for file in output_files(record)}:
            made.setdefault(digest, []).append(record)
    return made


def ancestors(
    store: Store, record: Record, made_by: dict[str, list[Record]] | None = None
) -> Iterator[tuple[int, Record]]:
    """The actions that an artifact was made from, back to its sources: (depth, record), each once.

    The first is `record` itself, at depth 0. `made_by` is the result of `records_by_content`, which
    reads every record: pass it when calling repeatedly.
    """
    made_by, seen = records_by_content(store) if made_by is None else made_by, {record["key"]}
    level, depth = [record], 0
    while level:
        found: list[Record] = []
        for record in level:
            yield depth, record
            for digests in record["action"]["inputs"].values():
                for digest in digests if isinstance(digests, list) else [digests]:
                    for parent in made_by.get(digest, []):
                        if parent["key"] not in seen:
                            seen.add(parent["key"])
                            found.append(parent)
        level, depth = found, depth + 1


def format_lineage(store: Store, path: Path) -> list[str]:
    """An artifact and everything it was made from, an indented line for each action."""
    lines = []
    for depth, record in ancestors(store, record_of(store, path)):
        action = record["action"]
        params = ", ".join(f"{k}={_abbreviate(v)}" for k, v in sorted(action["params"].items()))
        lines.append(f"{'  ' * depth}{action['stage']} {record['key'][:12]}… {params}".rstrip())
    return lines


def _abbreviate(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"
