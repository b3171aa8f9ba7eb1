"""What the store's records know of a finished run: its files, its sources, the stages between."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from olmo.certificate.names import signature_of
from olmo.certificate.settings import CertificateConfig
from olmo.certificate.signature import UNSIGNED
from olmo.config import read_project_config
from olmo.config.yaml_io import list_ladder_runs
from olmo.inspect.run import suggest_runs
from olmo.io.sealed import hash_file
from olmo.report.card import CHECKPOINTS, LIBRARY, SOURCES, converted_files
from olmo.report.graph import Graph, build_graph
from olmo.report.html import hide_paths
from olmo.store.lineage import find_parents, input_digests, records_by_content
from olmo.store.naming import all_names
from olmo.store.record import Record, output_files, parse_record
from olmo.store.store import Store

NO_LICENCE = "NOASSERTION"  # of SPDX: it is stated that nothing is known
SHOWN = 3  # sources that an error names


@dataclass(frozen=True)
class Source:
    """A file that a run was made from, and that no stage of it made."""

    name: str  # data/<set>/sources/<file>, or what else is known of it; no path of this machine
    url: str  # "" for a local file
    sha256: str
    size: int | None  # bytes
    licence: str  # its SPDX identifier, another text, or NO_LICENCE
    owner: str  # the data set, or the run that starts from it
    kind: str  # the stage that it came by
    arrived: str  # when, in UTC; "" if not recorded
    origin: str  # where from, if not from the URL


@dataclass(frozen=True)
class Release:
    """A folder that is released: the checkpoint, or its export."""

    folder: str  # checkpoints/<run>/final
    record: Record
    digests: dict[str, str]  # path in it → sha256, of the files that are signed
    sizes: dict[str, int]

    @property
    def signature(self) -> str:
        """The name of the file with its signature."""
        return signature_of(self.folder)


@dataclass(frozen=True)
class History:
    """All that a certificate states of a run."""

    run: str
    record: Record
    releases: list[Release]  # the checkpoint first
    sources: list[Source]  # by owner and name
    records: list[Record]  # of all actions, the run's own among them
    graph: Graph
    settings: CertificateConfig

    @property
    def content(self) -> str:
        return self.record["content"]

    @property
    def owners(self) -> dict[str, list[Source]]:
        """The sources of each data set, and of each run that starts from a checkpoint."""
        found: dict[str, list[Source]] = {}
        for source in self.sources:
            found.setdefault(source.owner, []).append(source)
        return found

    @property
    def datasets(self) -> dict[str, list[Source]]:
        """The sources of each data set."""
        return {n: s for n, s in self.owners.items() if s[0].kind not in CHECKPOINTS}

    @functools.cached_property
    def ambiguous_urls(self) -> set[str]:
        """The URLs that gave different files at different times."""
        digests: dict[str, set[str]] = {}
        for source in self.sources:
            digests.setdefault(source.url, set()).add(source.sha256)
        return {url for url, found in digests.items() if len(found) > 1}

    @property
    def tools(self) -> dict[str, list[str]]:
        """The packages that its stages ran with, and their versions."""
        found: dict[str, set[str]] = {}
        for record in self.records:
            run, conditions = record.get("run", {}), record.get("conditions", {})
            tools = {**(run.get("tools") or {}), **{"python": run.get("python")}}
            if torch := conditions.get("torch"):
                tools["torch"] = torch
            for name, number in tools.items():
                if number:
                    found.setdefault(name, set()).add(str(hide_paths(number)))
        # A stage that trains records torch with its build, another one without.
        return {
            name: sorted(n for n in numbers if not any(o.startswith(f"{n}+") for o in numbers))
            for name, numbers in sorted(found.items())
        }

    @property
    def commits(self) -> dict[str, bool]:
        """The git commits that its stages ran from: commit → whether there were changes."""
        found: dict[str, bool] = {}
        for record in self.records:
            run = record.get("run", {})
            if commit := run.get("commit"):
                found[commit] = found.get(commit, False) or bool(run.get("commit_has_changes"))
        return dict(sorted(found.items()))


def times_of(records: Iterable[Record]) -> tuple[str, str]:
    """When the first of some actions began, and the last ended, in UTC; "" if not recorded."""
    begins, ends = [], []
    for record in records:
        run = record.get("run", {})
        if started := run.get("started"):
            begin = datetime.fromisoformat(started)
            begins.append(begin)
            ends.append(begin + timedelta(seconds=run.get("wall_s") or 0))
    if not begins:
        return "", ""
    first, last = min(begins), max(ends)
    return tuple(t.strftime("%Y-%m-%dT%H:%M:%SZ") for t in (first, last))  # type: ignore[return-value]


def read_history(run: str, settings: CertificateConfig, store: Store) -> History:
    """What is known of a run.

    Raises:
        ValueError: it is not finished, a file is not that of its record, or a licence is missing.
    """
    check_licence(settings)
    places = [f"checkpoints/{run}/final"] + [f"hf/{run}"] * settings.export
    releases = [read_release(run, place) for place in places]
    record = releases[0].record
    made_by = records_by_content(store)
    records = find_actions(record, made_by)
    if copies := find_copies(run, [*records.values()], store):
        made_by = {d: [m for m in made if m["key"] not in copies] for d, made in made_by.items()}
        records = find_actions(record, made_by)
    ordered = sorted(records.values(), key=lambda one: (times_of([one])[0], one["key"]))
    return History(
        run=run,
        record=record,
        releases=releases,
        sources=find_sources(run, ordered, settings.licences, store),
        records=ordered,
        graph=build_graph(store, [record], made_by),
        settings=settings,
    )


def find_actions(record: Record, made_by: dict[str, list[Record]]) -> dict[str, Record]:
    """An action and all before it, by their keys."""
    parents = find_parents(record, made_by).values()
    return {one["key"]: one for found in parents for one in found} | {record["key"]: record}


def check_licence(settings: CertificateConfig) -> None:
    """Raises ValueError if the run's licence is not set, or one is no text of one line."""
    stated = {"licence": settings.licence} if settings.licence else {}
    for name, text in (stated | {f"licences.{o}": t for o, t in settings.licences.items()}).items():
        if not text.strip() or not text.isprintable():
            raise ValueError(
                f"config/config.yaml: certificate.{name}: expected an identifier of SPDX, or "
                f"{NO_LICENCE} to state that it is not known, found {text!r}; write one"
            )
    if not settings.licence:
        raise ValueError(
            "config/config.yaml: expected the licence of what is released, found none; set "
            "certificate: {licence: Apache-2.0}, or another identifier of SPDX"
        )


def licence_error(run: str, sources: Mapping[str, str]) -> ValueError:
    """The error for sources, by their names, whose owners' licences are not known."""
    names = list(sources)
    more = f" and {len(names) - SHOWN:,} more" * (len(names) > SHOWN)
    wanted = ", ".join(f"{owner}: …" for owner in dict.fromkeys(sources.values()))
    return ValueError(
        f"{run}: expected a licence of each source, found none of "
        f"{', '.join(names[:SHOWN])}{more}; set certificate: {{licences: {{{wanted}}}}} in "
        f"config/config.yaml to identifiers of SPDX, or to {NO_LICENCE} to state that it is not "
        "known"
    )


def read_release(run: str, place: str) -> Release:
    """A folder that the store made, its files compared with their record."""
    path = Path(place, "record.json")
    if not path.exists():
        if place.startswith("hf/"):
            raise ValueError(
                f"expected the export {place}, found none; uv run snakemake --cores 2 {place}"
            )
        raise ValueError(f"expected a run that is finished, found no {place}; {suggest_runs(run)}")
    record = parse_record(path.read_bytes(), path)
    found = next(o for o in record["outputs"].values() if "files" in o)
    files: dict[str, dict[str, Any]] = {**found["files"], **found["aside"]}
    for name, file in files.items():
        digest = hash_file(Path(place, name)) if Path(place, name).is_file() else "no file"
        if digest != file["sha256"]:
            raise ValueError(
                f"{place}/{name}: expected sha256 {file['sha256']} by its record, found {digest}; "
                "run olmo store verify, then the command that made it"
            )
    return Release(
        place,
        record,
        {name: file["sha256"] for name, file in sorted(files.items()) if name not in UNSIGNED},
        {name: file["size"] for name, file in files.items()},
    )


def find_sources(
    run: str, records: list[Record], licences: Mapping[str, str], store: Store
) -> list[Source]:
    """The files that no stage made, each with its licence.

    Raises:
        ValueError: a licence is neither recorded nor set, with the first sources of these.
    """
    owners, used = find_owners(store), list_owners(run)
    made = {digest for one in records for digest in digests_of(one)}
    found: dict[tuple[str, str], Source] = {}
    for record in records:
        if record["action"]["stage"] not in SOURCES:
            continue
        of = converted_files(record)
        if of and not set(of) - made:  # what was fetched and then converted is one source
            continue
        for name, owner in choose_owners(owners.get(record["key"], []), used):
            licence = record["facts"].get("licence") or licences.get(owner, "")
            for source in describe_source(record, name, owner, licence):
                found.setdefault((source.owner, source.sha256), source)
    sources = sorted(found.values(), key=lambda one: (one.owner, one.name, one.sha256))
    if unknown := {s.url or s.name: s.owner for s in sources if not s.licence}:
        raise licence_error(run, unknown)
    return sources


def find_copies(run: str, records: list[Record], store: Store) -> set[str]:
    """The keys of sources that are others' copies of files which the run has by its own names.

    Another data set of the store may have the same file from elsewhere.
    """
    owners, used = find_owners(store), list_owners(run)
    own: set[str] = set()
    others: list[Record] = []
    for one in records:
        if one["action"]["stage"] not in SOURCES:  # it made them, and did not pass them on
            own |= digests_of(one) - set(input_digests(one))
        elif any(owner in used for _, owner in owners.get(one["key"], [])):
            own |= digests_of(one)
        else:
            others.append(one)
    return {one["key"] for one in others if digests_of(one) <= own}


def digests_of(record: Record) -> set[str]:
    """The digests of what an action made."""
    return {file["sha256"] for file in output_files(record)}


def find_owners(store: Store) -> dict[str, list[tuple[str, str]]]:
    """For each action the names of its outputs in this project: (path, data set or run)."""
    found: dict[str, list[tuple[str, str]]] = {}
    for _, name in all_names(store):
        path = os.path.relpath(name["path"])
        parts = path.split(os.sep)
        if parts[0] in ("data", "checkpoints") and len(parts) > 2:
            found.setdefault(name["key"], []).append((path, parts[1]))
    return found


def list_owners(run: str) -> list[str]:
    """The data sets of a run and of those it was made from, and these runs."""
    config = read_project_config()
    runs, soups = config.get("runs") or {}, config.get("soups") or {}
    ladders = config.get("ladders") or {}
    of_ladders = {
        one: ladders[name] for name in ladders for one in list_ladder_runs({name: ladders[name]})
    }
    runs = {**runs, **of_ladders}
    found: list[str] = []
    waiting = [run]
    for name in waiting:  # grows in the loop
        waiting += [one for one in soups.get(name, []) if one not in waiting]
        settings = runs.get(name) or {}
        found += [settings.get("dataset") or name, name]
        if (base := settings.get("start_from")) and base not in waiting:
            waiting.append(base)
    return list(dict.fromkeys(found))


def choose_owners(names: list[tuple[str, str]], used: list[str]) -> list[tuple[str, str]]:
    """Of the names of a source, that of each of the run's own data sets; else any one."""
    first = {owner: (path, owner) for path, owner in sorted(names, reverse=True)}
    own = [first[owner] for owner in used if owner in first]
    return own or sorted(first.values())[:1] or [("", used[0])]


def describe_source(record: Record, name: str, owner: str, licence: str) -> list[Source]:
    """The files of one source."""
    facts, params, stage = record["facts"], record["action"]["params"], record["action"]["stage"]
    outputs, arrived = record["outputs"], times_of([record])[1]
    origin = "a local file"
    if stage == "fetched_checkpoint":  # whose files we wrote from those
        origin = hide_paths(facts["from"])
    if stage in LIBRARY:
        origin = f"the standard library of {facts['implementation']} {facts['python']}"

    def source(name: str, url: str, digest: str, size: int | None) -> Source:
        shown, place, known = hide_paths(name), hide_paths(url), "" if url else origin
        return Source(shown, place, digest, size, licence, owner, stage, arrived, known)

    if stage in LIBRARY:
        folder = next(iter(outputs.values()))["files"]
        return [
            source(f"{name}/{path}", "", file["sha256"], file["size"])
            for path, file in folder.items()
            if path.endswith(".gz")
        ]
    if stage in CHECKPOINTS:
        files = outputs["checkpoint"]["files"]
        return [
            source(f"{name}/{path}", "", file["sha256"], file["size"])
            for path, file in files.items()
        ]
    if of := converted_files(record):
        return [
            source(f"{os.path.dirname(name)}/{os.path.basename(n)}", "", digest, None)
            for n, digest in zip(params["names"], of, strict=True)
        ]
    url = facts.get("url") or params.get("url") or ""
    [file] = [o for o in outputs.values() if "sha256" in o]
    # Of a file that was converted on its way, what arrived.
    given = next((d for d in record["action"]["inputs"].values() if isinstance(d, str)), None)
    digest = facts.get("sha256") or given or file["sha256"]
    size = file["size"] if digest == file["sha256"] else None
    return [source(name or url or f"sha256:{digest}", url, digest, size)]
