"""Lineage: what an artifact was made from, and how two actions differ."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from olmo.store.naming import paths_in_store, record_of
from olmo.store.record import Record, output_files
from olmo.store.store import Store

MAX_INPUTS = 3  # that `explain` shows of a list


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
    parents = find_parents(record, records_by_content(store) if made_by is None else made_by)
    level, depth, seen = [record], 0, {record["key"]}
    while level:
        found: list[Record] = []
        for one in level:
            yield depth, one
            for parent in parents[one["key"]]:
                if parent["key"] not in seen:
                    seen.add(parent["key"])
                    found.append(parent)
        level, depth = found, depth + 1


def find_parents(record: Record, made_by: dict[str, list[Record]]) -> dict[str, list[Record]]:
    """For the key of an action and of each of its ancestors: the actions that made its inputs.

    Several actions may have made one content, and some of them from what was made of it: an export
    has the tokenizer that its run's data was encoded with. So the parents of an action are those
    that can be made without it: its rank, the most actions in a row before it, is above theirs.
    """
    candidates: dict[str, list[Record]] = {}
    waiting = [record]
    for one in waiting:  # grows in the loop
        if one["key"] not in candidates:
            makers = (made_by.get(digest, []) for digest in input_digests(one))
            by_key = {parent["key"]: parent for found in makers for parent in found}
            by_key.pop(one["key"], None)
            candidates[one["key"]] = list(by_key.values())
            waiting += by_key.values()
    ranks = rank_actions({one["key"]: one for one in waiting}, made_by)
    parents: dict[str, list[Record]] = {}
    reached = [record]
    for one in reached:  # grows in the loop
        if (key := one["key"]) not in parents:
            before = [p for p in candidates[key] if ranks[p["key"]] < ranks[key]]
            parents[key] = drop_chance_makers(one, before)
            reached += parents[key]
    return parents


def drop_chance_makers(record: Record, makers: list[Record]) -> list[Record]:
    """The makers without those that made some of an input's files, where one made these and more.

    A checkpoint that a training continues is several files. Runs of other sizes have the same
    train.json at the same step, and no part in it.
    """
    made = {maker["key"]: {file["sha256"] for file in output_files(maker)} for maker in makers}
    kept: set[str] = set()
    for one in record["action"]["inputs"].values():
        digests = set(one if isinstance(one, list) else [one])
        shares = {key: part for key, found in made.items() if (part := digests & found)}
        holders: dict[str, list[set[str]]] = {}
        for part in shares.values():
            for digest in part:
                holders.setdefault(digest, []).append(part)
        for key, part in shares.items():
            if not any(part < other for other in holders[min(part)]):
                kept.add(key)
    return [maker for maker in makers if maker["key"] in kept]


def rank_actions(known: dict[str, Record], made_by: dict[str, list[Record]]) -> dict[str, int]:
    """For each action the round in which it could be made, if all were made as early as possible.

    An action waits for those of its inputs that another one makes. Where actions wait for one
    another, as copies of one file do, the first of them that was started goes first.
    """
    needs: dict[str, set[str]] = {}
    used_by: dict[str, list[str]] = {}
    for key, record in known.items():
        digests = set(input_digests(record))
        needs[key] = {d for d in digests if any(m["key"] != key for m in made_by.get(d, []))}
        for digest in needs[key]:
            used_by.setdefault(digest, []).append(key)
    ranks: dict[str, int] = {}
    while len(ranks) < len(known):
        left = [key for key in known if key not in ranks]
        ready = [key for key in left if not needs[key]]
        if not ready:
            ready = [min(left, key=lambda key: known[key].get("run", {}).get("started", ""))]
        ranks |= dict.fromkeys(ready, len(set(ranks.values())))
        for digest in {file["sha256"] for key in ready for file in output_files(known[key])}:
            for key in used_by.pop(digest, ()):
                needs[key].discard(digest)
    return ranks


def input_digests(record: Record) -> list[str]:
    """The digests of an action's inputs."""
    inputs = record["action"]["inputs"].values()
    return [d for one in inputs for d in (one if isinstance(one, list) else [one])]


def format_lineage(store: Store, path: Path) -> list[str]:
    """An artifact and everything it was made from, an indented line for each action."""
    paths, lines = paths_in_store(store), []
    for depth, record in ancestors(store, record_of(store, path)):
        params = [
            text for text in flatten(record["action"]["params"]) if "." not in text.split(":")[0]
        ]
        made = f"{'  ' * depth}{describe_record(record, paths)}"
        lines.append("  ".join([made, *([", ".join(params)] if params else [])]))
    return lines


def describe_record(record: Record, paths: Mapping[str, str]) -> str:
    """An action by its path, stage and time; `paths` as of `paths_in_store`."""
    started = record.get("run", {}).get("started", "an unknown time")
    when = started[:16].replace("T", " ")
    return f"{paths.get(record['key'], '(no path)')}  {record['action']['stage']}, {when}"


def explain(store: Store, path: Path) -> list[str]:
    """What made an artifact, and how that differs from the nearest action; parameters, inputs."""
    record, paths = record_of(store, path), paths_in_store(store)
    action, paths[record["key"]] = record["action"], str(path)
    lines = [describe_record(record, paths), "", "differs from"]
    if (other := find_nearest(store, action, besides=record["key"])) is None:
        lines[-1] = "no other action of this stage is known"
    else:
        lines[-1] += f" {describe_record(other, paths)}, in"
        lines += [f"  {change}" for change in diff_actions(other["action"], action)]
    lines += ["", f"version {action['version']}, parameters"]
    lines += [f"  {text}" for text in flatten(action["params"])] or ["  none"]
    lines += ["", "inputs"]
    for name, digests in sorted(action["inputs"].items()):
        digests = digests if isinstance(digests, list) else [digests]
        shown = [paths.get(digest, f"{digest[:12]}…") for digest in digests[:MAX_INPUTS]]
        more = [f"… {len(digests):,} in all"] * (len(digests) > MAX_INPUTS)
        lines.append(f"  {name}: {', '.join(shown + more)}")
    return [*lines, "", f"all digests: {os.path.relpath(store.record_path(record['key']))}"]


def flatten(params: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The values of nested parameters: "model.d_model: 128"."""
    lines = []
    for name, value in sorted(params.items()):
        if isinstance(value, dict):
            lines += flatten(value, f"{prefix}{name}.")
        else:
            lines.append(f"{prefix}{name}: {_abbreviate(value)}")
    return lines


def _abbreviate(value: Any) -> str:
    text = str(value)
    if len(text) > 40 and isinstance(value, list):
        return f"{len(value)} of them"
    return text if len(text) <= 40 or "://" in text else f"{text[:12]}…"
