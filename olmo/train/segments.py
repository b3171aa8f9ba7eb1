"""What a run was computed on, each time it was begun or taken up: <save_folder>/segments.jsonl.

    {"after": 0, "processes": 2, "device": "AVX512", "threads": 1, "torch": "2.13.0", …}
    {"after": 8, "processes": 1, …}      from step 9 on

Bits depend on it, and what is asked for does not hold it. Two contents of one run are an alarm
only where it is the same from the first step to the last. The last line has the seal of all; of a
damaged file nothing is known: {"after": 0, "damaged": true}.

So does what its steps see: the config may have another batch size, seed or data the next time, and
train_data/global_indices.npy is that of the newest epoch (`data_facts`, olmo.inspect.history).
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from olmo.config import TrainConfig
from olmo.data.batches import OrderedDataset
from olmo.data.memmap import MemMapDataset
from olmo.distributed.world import World
from olmo.io import sealed
from olmo.io.sealed import Damaged
from olmo.runtime.log import log
from olmo.runtime.process import SEGMENTS_FILE
from olmo.train.sinks import METRICS, read_metrics
from olmo.train.state import TrainState

DECIDES_BITS = ("processes", "nodes", "device", "threads", "torch", "damaged")


def begin_segment(
    folder: Path, world: World, step: int, resumed: bool, data: dict[str, Any]
) -> None:
    """Write down what the steps after `step` are computed on, and on which `data` (`data_facts`).

    Forgets segments of which no step is left: those that began here or later, or all unless it
    is the folder's own run that goes on.
    """
    path = folder / SEGMENTS_FILE
    kept = [s for s in segments(folder) if resumed and s["after"] < step]
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", 1))
    cuda = world.device.type == "cuda"
    here = {
        "after": step,
        "processes": world.size,
        "device": world.device_note if cuda else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        # NCCL sums along the paths that it finds between nodes; gloo by rank alone.
        **({"nodes": nodes} if cuda else {}),
        "python": platform.python_version(),
        "host": platform.node(),
        "hosts": nodes,
        "restart": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)),
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **data,
    }
    if kept and (other := [n for n in ("files", "seed") if kept[-1].get(n, data[n]) != data[n]]):
        what = {"files": "the token files", "seed": "the seed of their order"}
        log.warning(
            f"{' and '.join(what[n] for n in other)}: not those of the steps before; the run goes "
            f"on at instance {data['examples']} of their order all the same"
        )
    if resumed and (trained := last_trained(folder)) > step:
        here["again_to"] = trained
        log.info(
            f"steps {step + 1} to {trained} were trained before; they are again, and that counts"
        )
    sealed.write_atomic(path, sealed.dump_lines([*kept, here]), alone=True)


def data_facts(
    cfg: TrainConfig, dataset: OrderedDataset, position: TrainState, source: Path | None
) -> dict[str, Any]:
    """What decides which instances the steps from a position on see.

    `source` is the checkpoint of another run that goes on here, whose steps these are not.
    """
    facts = {
        "batch": cfg.global_train_batch_size,
        "epoch": position.epoch,
        "examples": position.global_train_examples_seen_this_epoch,
        "seed": cfg.data_seed,
        "drop_last": cfg.data.drop_last,
        "instances": len(dataset.dataset),
        "files": fingerprint(dataset.dataset),
    }
    if cfg.data.order_path is not None:  # by its name: its folder is this machine's
        facts["order"] = Path(cfg.data.order_path).name
        facts["order_epoch"] = cfg.epoch or 0
    return facts | ({} if source is None else {"from": str(source)})


def fingerprint(dataset: Any) -> str | None:
    """Of which token files in which order the instances are; None of a data set of one's own."""
    if not isinstance(dataset, MemMapDataset):
        return None
    names = [Path(path).name for path in dataset.paths]
    named = [dataset.chunk_size, *zip(names, dataset.offsets, strict=True)]
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()[:16]


def last_trained(folder: Path) -> int:
    """The furthest step that was trained here, whatever became of it; 0: none."""
    steps = [segment.get("again_to", 0) for segment in segments(folder)]
    if (path := folder / METRICS).exists():
        steps += [row["step"] for row in read_metrics(path)[-1:]]
    return max(steps, default=0)


def segments(folder: Path) -> list[dict[str, Any]]:
    """All that were begun and of which steps are left, in order."""
    path = folder / SEGMENTS_FILE
    try:
        return sealed.load_lines(path.read_bytes(), path) if path.exists() else []
    except Damaged as error:
        log.warning(f"{error}; what the run was computed on until now is not known")
        return [{"after": 0, "damaged": True}]


def begun_alike(found: list[dict[str, Any]], after: int, last: int) -> list[dict[str, Any]]:
    """A run's segments of the steps from `after` + 1 to `last`, consecutive equal ones as one."""
    alike: list[dict[str, Any]] = []
    for i, segment in enumerate(found):
        end = found[i + 1]["after"] if i + 1 < len(found) else last
        if end <= after or segment["after"] >= last:
            continue
        deciding = {name: segment[name] for name in DECIDES_BITS if name in segment}
        if not alike or {**alike[-1], "after": 0} != {**deciding, "after": 0}:
            alike.append(deciding | {"after": max(segment["after"], after)})
    return alike


def conditions(found: list[dict[str, Any]]) -> dict[str, Any]:
    """What of a run's segments decides bits: the last one's and, where they differ, the `earlier`.

    A run that was interrupted and went on alike has the conditions of one that was not.
    """
    if not found:
        return {}
    merged = begun_alike(found, -1, found[-1]["after"] + 1)
    last = {name: value for name, value in merged[-1].items() if name != "after"}
    if len(merged) == 1:
        return last
    return last | {"after": merged[-1]["after"], "earlier": merged[:-1]}
