"""A link of a chain without training: the state that an earlier run saved at that very step.

A run that was not cut still has some of its checkpoints in its work folder, and a link of a run
that was cut elsewhere has its last one. One at the link's last step has the link's bytes, if data,
order, start and settings up to that step are equal.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from olmo.checkpoint import layout
from olmo.config import TrainConfig
from olmo.io import sealed
from olmo.runtime.log import log
from olmo.runtime.numbers import to_json
from olmo.runtime.process import SEGMENTS_FILE
from olmo.store.record import Record
from olmo.store.store import Store
from olmo.train.chain import STATE, identity_until
from olmo.train.segments import read_segments
from olmo.train.sinks import METRICS, read_metrics

STAGE = "training"
GIVEN = "given.yaml"  # the config that the trainer was given, in the work folder


def attempt_folder(store: Store, key: str) -> Path:
    """The work folder of a training action."""
    return store.root / "work" / key / "attempt"


def saved_steps(store: Store, record: Record) -> dict[int, Path]:
    """Step → checkpoint that a finished run, or one of its links, still has."""
    folder = attempt_folder(store, record["key"])
    return {layout.parse_step(path) or 0: path for path in layout.list_checkpoints(folder)}


def find_saved(
    store: Store, inputs: Mapping[str, Any], settings: Mapping[str, Any], until: int
) -> Path | None:
    """A checkpoint at step `until` of a finished run that was the same up to there; None if none.

    Args:
        inputs, settings: of the link's action.
    """
    records = list(finished_runs(store))
    links = {linked_state(record): record for record in records}
    for record in records:
        saved = saved_steps(store, record)
        if until not in saved:
            continue
        # Not of GIVEN, which also says where this attempt began: a run's start, a link.
        cfg = TrainConfig.new(**record["action"]["params"]["settings"])
        if identity_until(cfg, until) == settings and begin_alike(record, inputs, cfg, links):
            layout.verify_checkpoint(saved[until])
            return saved[until]
    return None


def linked_state(record: Record) -> tuple[str, ...]:
    """The digests of what another link continues, of a training's checkpoint."""
    files = record["outputs"].get("final", {}).get("files", {})
    return tuple(files.get(name, {}).get("sha256", "") for name in STATE)


def begin_alike(
    record: Record,
    inputs: Mapping[str, Any],
    cfg: TrainConfig,
    links: Mapping[tuple[str, ...], Record],
) -> bool:
    """Whether a training, and one with these inputs, go back to the same data, order and weights.

    The links that either continues may end at other steps: each is a state of the same run, if it
    was trained on the same and by the same settings.

    Args:
        cfg: of `record`
        links: trainings by their `linked_state`
    """
    if (theirs := record["action"]["inputs"]) == inputs:
        return True
    begun = [{name: i for name, i in one.items() if name != "after"} for one in (inputs, theirs)]
    if begun[0] != begun[1]:
        return False
    for after in (inputs.get("after"), theirs.get("after")):
        while after is not None:
            action = links[tuple(after)]["action"] if tuple(after) in links else None
            if action is None or (until := action["params"].get("until")) is None:
                return False
            before = {name: i for name, i in action["inputs"].items() if name != "after"}
            is_same = action["params"]["settings"] == identity_until(cfg, until)
            if before != begun[0] or not is_same:
                return False
            after = action["inputs"].get("after")
    return True


def finished_runs(store: Store) -> Iterator[Record]:
    """The records of training actions whose work folders are still there."""
    for given in sorted(store.root.glob(f"work/*/attempt/{GIVEN}")):
        record = store.record(given.parent.parent.name)
        if record is not None and record["action"]["stage"] == STAGE:
            yield record


def all_metrics(store: Store, attempt: Path) -> list[dict[str, Any]]:
    """The metrics of a finished training, those of the links that it continues too."""
    record = store.record(attempt.parent.name)
    aside = record["outputs"]["final"].get("aside", {}) if record else {}
    whole = aside.get(METRICS, {}).get("sha256")
    path = attempt / METRICS
    if whole is not None and store.object_path(whole).exists():
        path = store.object_path(whole)
    return read_metrics(path)


def take_over(store: Store, checkpoint: Path, attempt: Path, after: int = 0) -> None:
    """Make a run's folder one that was interrupted at this checkpoint of another run.

    The checkpoint comes last, so that an interrupted call is repeated.

    Args:
        after: the step of the link that the run continues.
    """
    step, origin = layout.parse_step(checkpoint) or 0, checkpoint.parent
    log.info(f"steps 1 to {step}: taken over from {origin}, which trained the same")
    if (origin / "data-indices").is_dir():  # the trainer cuts them
        shutil.copytree(origin / "data-indices", attempt / "data-indices", dirs_exist_ok=True)
    rows = [row for row in all_metrics(store, origin) if after < row["step"] <= step]
    (attempt / METRICS).write_text("".join(to_json(row) + "\n" for row in rows))
    segments = [segment for segment in read_segments(origin) if segment["after"] < step]
    sealed.write_atomic(attempt / SEGMENTS_FILE, sealed.dump_lines(segments))
    partial = layout.partial_path(attempt / checkpoint.name)
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(checkpoint, partial, copy_function=os.link)  # checkpoints are never changed
    layout.publish_folder(partial, attempt / checkpoint.name)
