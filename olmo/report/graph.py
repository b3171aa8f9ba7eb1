"""The lineage of a checkpoint as a picture's data: stages, their actions, and what led to what."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from olmo.report.card import SOURCES
from olmo.store.lineage import find_parents
from olmo.store.naming import paths_in_store
from olmo.store.record import Record, output_files
from olmo.store.store import Store

# Facts of a stage that count something, in the order in which they are shown.
COUNTS = ("files", "lines", "documents", "heldout", "conversations", "tokens", "instances", "steps")
MAX_SHARES = 20  # sources whose share of the tokens is listed
MEAN = "averaged"  # the stage of a soup
TOKEN_STAGES = ("tokens", "instances", "download_tokens", "local_tokens")


@dataclass
class Action:
    """One action of a stage, as a row of its table."""

    record: Record
    name: str  # its path in the project, or what it was made from
    parents: list[tuple[int, int]] = field(default_factory=list)  # (stage, row) of its inputs

    @property
    def bytes(self) -> int:
        return sum(file["size"] for file in output_files(self.record))

    @property
    def seconds(self) -> float | None:
        return self.record.get("run", {}).get("wall_s")


@dataclass
class StageNode:
    """All actions of one stage."""

    name: str
    actions: list[Action] = field(default_factory=list)
    parents: set[int] = field(default_factory=set)  # stages that it was made from

    @property
    def counts(self) -> dict[str, int]:
        """The sums of what its records count; the links of a training count from its start."""
        add = max if self.name.startswith("training") else sum
        found = {name: [a.record["facts"].get(name) for a in self.actions] for name in COUNTS}
        counts = {name: [n for n in all_ if type(n) is int] for name, all_ in found.items()}
        return {name: add(numbers) for name, numbers in counts.items() if any(numbers)}

    @property
    def bytes(self) -> int:
        return sum(action.bytes for action in self.actions)

    @property
    def seconds(self) -> float:
        return sum(action.seconds or 0 for action in self.actions)

    @property
    def energy(self) -> float:
        """J, as far as it was measured."""
        found = (a.record.get("run", {}).get("machine_energy_j") for a in self.actions)
        return sum(joules or 0 for joules in found)

    @property
    def drops(self) -> dict[str, int]:
        """Documents that were left out, by reason; "not drawn" are those of `keep_one_in`."""
        found: Counter[str] = Counter()
        for action in self.actions:
            facts = action.record["facts"]
            found.update(facts.get("drops") or {})
            if "lines" in facts and "rows" in facts:
                found["not drawn (keep_one_in)"] += facts["lines"] - facts["rows"]
        return {reason: count for reason, count in found.most_common() if count}


@dataclass
class Graph:
    """The stages from the sources to the checkpoint, which is the last."""

    stages: list[StageNode]
    columns: list[list[int]]  # stages, by their distance to the checkpoint, the farthest first

    def tokens_by_source(self, trainings: set[str]) -> dict[str, int]:
        """The tokens of training by source file, or where there are many by its URL's folder.

        Args:
            trainings: keys of a run's actions; none is in the graph if it is not finished, whose
                graph is that of its tokens.
        """
        actions = [action for stage in self.stages for action in stage.actions]
        read_by = [action for action in actions if action.record["key"] in trainings]
        for action in read_by:  # grows in the loop: a mean is of trainings
            if action.record["action"]["stage"] == MEAN:
                read_by += [self.stages[i].actions[row] for i, row in action.parents]
        used = {parent for action in read_by for parent in action.parents}
        by_file: Counter[tuple[str, str]] = Counter()
        for i, stage in enumerate(self.stages):
            for row, action in enumerate(stage.actions):
                tokens = action.record["facts"].get("tokens")
                is_read = stage.name in TOKEN_STAGES and (not used or (i, row) in used)
                if is_read and tokens and not is_heldout(action.record):
                    by_file[self._source_of(action)] += tokens
        whole = {name for _, name in by_file}
        found: Counter[str] = Counter()
        for (group, name), tokens in by_file.items():
            found[name if len(whole) <= MAX_SHARES else group] += tokens
        most = dict(found.most_common(MAX_SHARES))
        if others := found.total() - sum(most.values()):
            most[f"{len(found) - len(most)} others"] = others
        return most

    def _source_of(self, action: Action) -> tuple[str, str]:
        """(folder, name) of the source file that a shard's tokens came from."""
        while True:
            params = action.record["action"]["params"]
            name = params.get("url") or params.get("name") or action.name
            is_source = action.record["action"]["stage"] in SOURCES
            inputs = action.record["action"]["inputs"]
            wanted = inputs.get("documents") or inputs.get("source") or inputs.get("files")
            parents = [self.stages[i].actions[row] for i, row in action.parents]
            came_from = [p for p in parents if wanted and wanted in outputs(p.record)]
            if is_source or "name" in params or not came_from:
                return (name.rpartition("/")[0] or name, name)
            action = came_from[0]


def build_graph(store: Store, records: list[Record], made_by: dict[str, list[Record]]) -> Graph:
    """The lineage of a checkpoint's action, or of all inputs of one that is not finished.

    Args:
        made_by: of `records_by_content`.
    """
    paths = paths_in_store(store)
    parents_of: dict[str, list[Record]] = {}
    for record in records:
        parents_of |= find_parents(record, made_by)
    known = {one["key"]: one for found in (records, *parents_of.values()) for one in found}
    nodes: dict[str, StageNode] = {}
    for record in known.values():
        action = Action(record, describe(record, paths))
        name = stage_name(record, action.name)
        nodes.setdefault(name, StageNode(name)).actions.append(action)
    stages = list(nodes.values())
    place: dict[str, tuple[int, int]] = {}
    for i, node in enumerate(stages):
        node.actions.sort(key=lambda action: (action.name, action.record["key"]))
        place |= {action.record["key"]: (i, row) for row, action in enumerate(node.actions)}
    for i, node in enumerate(stages):
        for action in node.actions:
            parents = parents_of[action.record["key"]]
            action.parents = sorted(place[one["key"]] for one in parents)
            node.parents |= {stage for stage, _ in action.parents if stage != i}
    columns = layer(stages)
    return Graph(stages, columns)


def layer(stages: list[StageNode]) -> list[list[int]]:
    """Stages in columns: each stands before what is made from it."""
    depths = [0] * len(stages)
    for _ in stages:  # enough for the longest way; two stages may be each other's, of other files
        for i, node in enumerate(stages):
            for parent in node.parents:
                depths[parent] = min(max(depths[parent], depths[i] + 1), len(stages) - 1)
    farthest = sorted(set(depths), reverse=True)
    return [[i for i, depth in enumerate(depths) if depth == wanted] for wanted in farthest]


def stage_name(record: Record, name: str) -> str:
    """The node of an action: its stage; the training of each run is one, with its links."""
    stage: str = record["action"]["stage"]
    if stage != "training":
        return stage
    parts = name.split("/")
    return f"training: {parts[1] if parts[0] == 'checkpoints' else record['facts']['run_name']}"


def describe(record: Record, paths: dict[str, str]) -> str:
    """A name for an action: its path in this project, or its file or URL."""
    params = record["action"]["params"]
    path = paths.get(record["key"], "")
    if path.startswith(("/", "..")):  # of another project
        path = ""
    return path or params.get("url") or params.get("name") or record["content"][:12]


def is_heldout(record: Record) -> bool:
    """Whether a token shard has documents that were held out."""
    return record["action"]["params"].get("split") == "heldout"


def outputs(record: Record) -> set[str]:
    """The digests of an action's outputs."""
    return {file["sha256"] for file in output_files(record)}


def public_source(action: Action) -> dict[str, Any]:
    """What is known of where a source is from: url, sha256 and licence; "" if not recorded."""
    record = action.record
    facts, params = record["facts"], record["action"]["params"]
    digest = facts.get("sha256") or params.get("library") or ""
    if not digest:
        files = list(output_files(record))
        digest = files[0]["sha256"] if len(files) == 1 else ""
    return {
        "url": facts.get("url") or params.get("url") or "",
        "sha256": digest,
        "licence": facts.get("licence") or "",
    }
