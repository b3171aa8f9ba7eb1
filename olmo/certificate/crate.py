"""The RO-Crate of a run: its documents, its sources and checkpoint, an action for each stage.

Plain JSON-LD: rocrate writes a folder of files of its own, and what is here has to be sorted and
the same each time. roc-validator validates it, in the tests, as a Process Run Crate.

Sources: https://w3id.org/ro/crate/1.1, https://w3id.org/ro/wfrun/process/0.5
"""

from __future__ import annotations

import hashlib
from typing import Any

from olmo.certificate.croissant import find_format
from olmo.certificate.documents import BUILDER
from olmo.certificate.history import History, Source, times_of
from olmo.report.card import SOURCES
from olmo.report.graph import StageNode
from olmo.report.html import hide_paths
from olmo.runtime.log import format_number

CRATE, PROCESS = "https://w3id.org/ro/crate/1.1", "https://w3id.org/ro/wfrun/process/0.5"
CONTEXT = [f"{CRATE}/context", {"sha256": "https://w3id.org/ro/terms/workflow-run#sha256"}]
FORMATS = {".json": "application/json", ".md": "text/markdown", ".sig": "application/json"}
Entity = dict[str, Any]


def state_crate(history: History, files: dict[str, str]) -> Entity:
    """The metadata; `files`: the names of the certificate's other documents → what they are."""
    stages = history.graph.stages
    actions = [describe_stage(history, number) for number in range(len(stages))]
    return {
        "@context": CONTEXT,
        "@graph": [
            {
                "@id": "ro-crate-metadata.json",
                "@type": "CreativeWork",
                "about": {"@id": "./"},
                "conformsTo": {"@id": CRATE},
            },
            describe_root(history, files, [action["@id"] for action in actions]),
            {
                "@id": PROCESS,
                "@type": "CreativeWork",
                "name": "Process Run Crate",
                "version": "0.5",
            },
            *describe_files(files),
            *actions,
            *describe_results(history),
            *describe_parties(history),
        ],
    }


def describe_root(history: History, files: dict[str, str], actions: list[str]) -> Entity:
    run = history.run
    web = [name for source in history.sources if (name := source_id(history, source))[0] != "#"]
    return {
        "@id": "./",
        "@type": "Dataset",
        "name": f"The certificate of {run}",
        "description": f"How the checkpoint {run} was made, and from what.",
        "identifier": history.content,
        "datePublished": times_of([history.record])[1] or "1970-01-01",
        "license": {"@id": "#licence"},
        "conformsTo": {"@id": PROCESS},
        "hasPart": refer([*files, *dict.fromkeys(web)]),
        "mentions": refer(actions),
        **({"author": who, "publisher": who} if (who := find_publisher(history)) else {}),
    }


def refer(names: list[str]) -> Entity | list[Entity]:
    """A reference, or several; one is no list, as RO-Crate recommends."""
    found = [{"@id": name} for name in names]
    return found[0] if len(found) == 1 else found


def find_publisher(history: History) -> Entity | None:
    """A reference to whoever releases the run, by the URL if it is one."""
    name = history.settings.publisher
    return {"@id": name if "://" in name else "#publisher"} if name else None


def describe_files(files: dict[str, str]) -> list[Entity]:
    return [
        {
            "@id": name,
            "@type": "File",
            "name": name,
            "description": what,
            "encodingFormat": FORMATS[name[name.rindex(".") :]],
        }
        for name, what in files.items()
    ]


def describe_results(history: History) -> list[Entity]:
    """Entities of the sources, of what the stages made, and of the checkpoint's files."""
    found: dict[str, Entity] = {}
    for source in history.sources:
        place = source_id(history, source)
        found[place] = {
            "@id": place,
            "@type": "CreativeWork" if place[0] == "#" else "File",
            "name": source.name,
            "sha256": source.sha256,
            "description": f"{source.origin or source.url}; licence: {source.licence}",
            "encodingFormat": find_format(source.url or source.name),
            **({"sdDatePublished": source.arrived} if source.arrived else {}),
            **({"contentSize": str(source.size)} if source.size is not None else {}),
        }
    for release in history.releases:
        for name, digest in release.digests.items():
            found[f"#{release.folder}/{name}"] = {
                "@id": f"#{release.folder}/{name}",
                "@type": "CreativeWork",
                "name": f"{release.folder}/{name}",
                "sha256": digest,
                "contentSize": str(release.sizes[name]),
            }
    for stage in history.graph.stages:
        if not is_source(stage) and not is_run(history, stage):
            found[result_id(stage)] = {
                "@id": result_id(stage),
                "@type": "CreativeWork",
                "name": f"what {hide_paths(stage.name)} made",
                "identifier": digest_of(stage),
                "contentSize": str(stage.bytes),
            }
    return list(found.values())


def describe_stage(history: History, number: int) -> Entity:
    """A stage as one action: what it read, what it made, when."""
    stage, stages = history.graph.stages[number], history.graph.stages
    records = [action.record for action in stage.actions]
    started, finished = times_of(records)
    counts = ", ".join(f"{count:,} {name}" for name, count in stage.counts.items())
    read = [one for parent in sorted(stage.parents) for one in results_of(history, stages[parent])]
    energy = f", {stage.energy:.0f} J" * bool(stage.energy)
    return {
        "@id": f"#action-{hide_paths(stage.name).replace(' ', '-')}",
        "@type": "CreateAction",
        "name": hide_paths(stage.name),
        "description": f"{format_number(len(records), 'action')}, {stage.seconds:.1f} s{energy}"
        + f"; {counts}" * bool(counts),
        "instrument": {"@id": "#olmo"},
        "actionStatus": "http://schema.org/CompletedActionStatus",
        **({"agent": who} if (who := find_publisher(history)) else {}),
        # As the profile wants them: with an offset, and without Z.
        **({"startTime": started[:-1] + "+00:00"} if started else {}),
        **({"endTime": finished[:-1] + "+00:00"} if finished else {}),
        **({"object": refer(read)} if read else {}),
        "result": refer(results_of(history, stage)),
    }


def results_of(history: History, stage: StageNode) -> list[str]:
    """The identifiers of what a stage made: the sources, the checkpoint's files, or one for all."""
    if is_run(history, stage):
        folder = history.releases[0]
        return [f"#{folder.folder}/{name}" for name in folder.digests]
    if is_source(stage):
        kinds = {action.record["action"]["stage"] for action in stage.actions}
        own = [s for s in history.sources if s.kind in kinds]
        return list(dict.fromkeys(source_id(history, source) for source in own))
    return [result_id(stage)]


def source_id(history: History, source: Source) -> str:
    """The identifier of a source: its URL, if that names one file."""
    is_one = source.url and source.url not in history.ambiguous_urls
    return source.url if is_one else f"#{source.sha256}"


def is_source(stage: StageNode) -> bool:
    return stage.actions[0].record["action"]["stage"] in SOURCES


def is_run(history: History, stage: StageNode) -> bool:
    return any(action.record["key"] == history.record["key"] for action in stage.actions)


def result_id(stage: StageNode) -> str:
    return f"#result-{hide_paths(stage.name).replace(' ', '-')}"


def digest_of(stage: StageNode) -> str:
    """A sha256 of the contents of a stage's actions, in the order of its table."""
    contents = "\n".join(action.record["content"] for action in stage.actions)
    return f"sha256:{hashlib.sha256(contents.encode()).hexdigest()}"


def describe_parties(history: History) -> list[Entity]:
    """The program, the licence, and who releases it."""
    settings, commits = history.settings, list(history.commits)
    entities: list[Entity] = [
        {
            "@id": "#olmo",
            "@type": "SoftwareApplication",
            "name": "olmo",
            "identifier": BUILDER,
            "version": commits[-1] if commits else "unknown",
            "softwareRequirements": [f"{n} {', '.join(v)}" for n, v in history.tools.items()],
        },
        {
            "@id": "#licence",
            "@type": "CreativeWork",
            "name": settings.licence,
            "description": f"The licence {settings.licence}, by its SPDX identifier.",
        },
    ]
    if who := find_publisher(history):
        place = {"url": settings.publisher} if "#" not in who["@id"] else {}
        entities.append(who | {"@type": "Organization", "name": settings.publisher} | place)
    return entities
