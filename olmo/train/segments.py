"""What a run was computed on, one line for each start and resume: <save_folder>/segments.jsonl.

    {"after": 0, "processes": 2, "device": "AVX512", "threads": 1, "torch": "2.13.0", …}
    {"after": 8, "processes": 1, …}      from step 9 on

The bits of a checkpoint depend on these, but an action's key does not contain them. So two contents
of one run are an alarm only where all segments are equal. The last line seals the file; a damaged
one counts as {"after": 0, "damaged": true}.

A segment also says which instances its steps saw (`data_facts`): a resume may have another batch
size, seed or data, and train_data/global_indices.npy has the order of the newest epoch only.
"""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olmo.config import TrainConfig
from olmo.io import sealed
from olmo.io.sealed import Damaged
from olmo.runtime.log import log
from olmo.runtime.process import SEGMENTS_FILE
from olmo.train.sinks import METRICS, read_metrics

if TYPE_CHECKING:
    from olmo.data.batches import OrderedDataset
    from olmo.distributed.world import World
    from olmo.train.state import TrainState

DECIDES_BITS = ("processes", "nodes", "device", "threads", "torch", "damaged")


def begin_segment(
    folder: Path, world: World, step: int, resumed: bool, data: dict[str, Any]
) -> None:
    """Append the segment of the steps after `step`, with its `data` (`data_facts`).

    Removes segments without remaining steps: those that began here or later, and all of them
    if another run starts in this folder.
    """
    import torch  # here: `olmo inspect` reads segments without it

    path = folder / SEGMENTS_FILE
    kept = [s for s in read_segments(folder) if resumed and s["after"] < step]
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
            f"{' and '.join(what[n] for n in other)} changed since the last segment; the run "
            f"continues at instance {data['examples']} of the new order"
        )
    if resumed and (trained := read_last_trained_step(folder)) > step:
        here["again_to"] = trained
        log.info(f"steps {step + 1} to {trained} are trained again and replace the earlier ones")
    sealed.write_atomic(path, sealed.dump_lines([*kept, here]), alone=True)


def data_facts(
    cfg: TrainConfig, dataset: OrderedDataset, state: TrainState, source: Path | None
) -> dict[str, Any]:
    """What decides which instances the steps from `state` on see.

    Args:
        source: the checkpoint of another run that this one starts from.
    """
    facts = {
        "batch": cfg.global_train_batch_size,
        "epoch": state.epoch,
        "examples": state.global_train_examples_seen_this_epoch,
        "seed": cfg.data_seed,
        "drop_last": cfg.data.drop_last,
        "instances": len(dataset.dataset),
        "files": getattr(dataset.dataset, "fingerprint", None),  # a custom data set has none
    }
    if cfg.data.order_path is not None:  # by its name: its folder is this machine's
        facts["order"] = Path(cfg.data.order_path).name
        facts["order_epoch"] = cfg.epoch or 0
    return facts | ({} if source is None else {"from": str(source)})


def read_last_trained_step(folder: Path) -> int:
    """The last step that was ever trained in this folder, saved or not; 0: none."""
    steps = [segment.get("again_to", 0) for segment in read_segments(folder)]
    if (path := folder / METRICS).exists():
        steps += [row["step"] for row in read_metrics(path)[-1:]]
    return max(steps, default=0)


def read_segments(folder: Path) -> list[dict[str, Any]]:
    """The segments with remaining steps, in order."""
    path = folder / SEGMENTS_FILE
    try:
        return sealed.load_lines(path.read_bytes(), path) if path.exists() else []
    except Damaged as error:
        log.warning(f"{error}; what the run was computed on so far is unknown")
        return [{"after": 0, "damaged": True}]


def merge_equal(found: list[dict[str, Any]], after: int, last: int) -> list[dict[str, Any]]:
    """The segments of steps `after` + 1 to `last`; consecutive equal ones become one."""
    merged: list[dict[str, Any]] = []
    for i, segment in enumerate(found):
        end = found[i + 1]["after"] if i + 1 < len(found) else last
        if end <= after or segment["after"] >= last:
            continue
        deciding = {name: segment[name] for name in DECIDES_BITS if name in segment}
        if not merged or {**merged[-1], "after": 0} != {**deciding, "after": 0}:
            merged.append(deciding | {"after": max(segment["after"], after)})
    return merged


def training_conditions(found: list[dict[str, Any]]) -> dict[str, Any]:
    """What decides the bits: the last segment's fields and, where they differ, the `earlier` ones.

    A run that was resumed under equal conditions has those of an uninterrupted run.
    """
    if not found:
        return {}
    merged = merge_equal(found, -1, found[-1]["after"] + 1)
    last = {name: value for name, value in merged[-1].items() if name != "after"}
    if len(merged) == 1:
        return last
    return last | {"after": merged[-1]["after"], "earlier": merged[:-1]}
