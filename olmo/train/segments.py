"""What a run was computed on, each time it was begun or taken up: <save_folder>/segments.jsonl.

    {"after": 0, "processes": 2, "device": "AVX512", "threads": 1, "torch": "2.13.0", …}
    {"after": 8, "processes": 1, …}      from step 9 on

Bits depend on it, and what is asked for does not hold it. Two contents of one run are an alarm
only where it is the same from the first step to the last. The last line has the seal of all; of a
damaged file nothing is known: {"after": 0, "damaged": true}.
"""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from olmo import sealed
from olmo.log import warn
from olmo.process import SEGMENTS
from olmo.sealed import Damaged
from olmo.train.parallel import World

DECIDES_BITS = ("processes", "nodes", "device", "threads", "torch", "damaged")


def begin_segment(folder: Path, world: World, step: int, resumed: bool) -> None:
    """Write down what the steps after `step` are computed on.

    Forgets segments of which no step is left: those that began here or later, or all unless it
    is the folder's own run that goes on.
    """
    path = folder / SEGMENTS
    kept = [s for s in segments(folder) if resumed and s["after"] < step]
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", 1))
    cuda = world.device.type == "cuda"
    here = {
        "after": step,
        "processes": world.size,
        "device": world.why if cuda else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        # NCCL sums along the paths that it finds between nodes; gloo by rank alone.
        **({"nodes": nodes} if cuda else {}),
        "python": platform.python_version(),
        "host": platform.node(),
        "hosts": nodes,
        "restart": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)),
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    sealed.write(path, sealed.dump_lines([*kept, here]))


def segments(folder: Path) -> list[dict[str, Any]]:
    """All that were begun and of which steps are left, in order."""
    path = folder / SEGMENTS
    try:
        return sealed.load_lines(path.read_bytes(), path) if path.exists() else []
    except Damaged as error:
        warn(f"{error}; what the run was computed on until now is not known")
        return [{"after": 0, "damaged": True}]


def conditions(found: list[dict[str, Any]]) -> dict[str, Any]:
    """What of a run's segments decides bits: the last one's and, where they differ, the `earlier`.

    A run that was interrupted and went on alike has the conditions of one that was not.
    """
    if not found:
        return {}
    merged: list[dict[str, Any]] = []
    for segment in found:
        deciding = {name: segment[name] for name in DECIDES_BITS if name in segment}
        if merged and {**merged[-1], "after": 0} == {**deciding, "after": 0}:
            continue
        merged.append(deciding | {"after": segment["after"]})
    last = {name: value for name, value in merged[-1].items() if name != "after"}
    if len(merged) == 1:
        return last
    return last | {"after": merged[-1]["after"], "earlier": merged[:-1]}
