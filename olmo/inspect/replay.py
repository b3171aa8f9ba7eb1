"""Trains some steps of a finished run again, and checks that data and code give its record."""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from olmo.checkpoint import layout
from olmo.cluster.launch import Geometry, launch
from olmo.config import TrainConfig
from olmo.data.order import parse_steps
from olmo.inspect.history import list_links
from olmo.inspect.run import TrainedRun
from olmo.runtime.log import log
from olmo.store.stage import current_store
from olmo.train.chain import STATE
from olmo.train.segments import merge_equal, read_segments, training_conditions
from olmo.train.sinks import read_metrics

LOSS, NORM = "train/CrossEntropyLoss", "optim/total_grad_norm"


def replay(checkpoint: str, /, steps: str) -> None:
    """Train some steps of a finished run again, and compare them with its record.

    Training starts at the run's last checkpoint before these steps, or at its start, with the
    number of processes that each step had. On a machine of the same kind the losses, the gradient
    norms and, at the end of the run, the weights are equal to the bit, and the first step that
    differs is an error. Elsewhere the largest difference is reported.

    Args:
        checkpoint: name of a run, or its final folder
        steps: first and last step: 5..9

    Example:
        olmo replay olmo-tiny --steps 5..9
    """
    run, chosen = TrainedRun(checkpoint), parse_steps(steps)
    last_step = run.steps
    if last_step is None:
        raise ValueError(f"{checkpoint}: expected a final checkpoint with its record.json")
    if not (chosen[0] >= 1 and chosen[-1] <= last_step):
        raise ValueError(f"expected steps from 1 to {last_step}, found {steps}")
    recorded = read_step_metrics(Path(run.folder, "metrics.jsonl"))
    with tempfile.TemporaryDirectory() as folder:
        start, place = find_start_checkpoint(run, chosen[0], Path(folder, "start"))
        parts = merge_equal(run.segments, start, chosen[-1])
        log.info(f"steps {start + 1} to {chosen[-1]}, from {place or 'the start'}")
        train_again(run, start, place, parts, chosen[-1], Path(folder))
        again = read_step_metrics(Path(folder, "metrics.jsonl"))
        weights = max_weight_difference(run, Path(folder)) if chosen[-1] == last_step else None
        here, there = training_conditions(read_segments(Path(folder))), training_conditions(parts)

    differing = [
        step for step in chosen if any(recorded[step][n] != again[step][n] for n in (LOSS, NORM))
    ]
    for step in chosen:
        mark = "  differs" if step in differing else ""
        log.info(f"step {step}: loss {recorded[step][LOSS]!r}, again {again[step][LOSS]!r}{mark}")
    if weights is not None:
        log.info(f"weights: largest difference {weights:g}")
    if not differing and not weights:
        log.info(f"{len(chosen)} steps, equal to the bit")
        return
    what = f"step {differing[0]}" if differing else "the weights"
    gap = max((abs(recorded[s][LOSS] - again[s][LOSS]) for s in differing), default=0.0)
    if here != there:
        log.info(f"first difference: {what}; the losses' largest gap {gap:.3g}")
        log.info(f"the run's conditions were {there}, and these are {here}")
        return
    raise ValueError(
        f"the first difference is {what} (losses differ by up to {gap:.3g}) under the run's own "
        "conditions: its data, its code or its record changed since. `olmo store verify` checks "
        "the data"
    )


def train_again(
    run: TrainedRun,
    start: int,
    start_folder: Path | None,
    parts: list[dict[str, Any]],
    last: int,
    folder: Path,
) -> None:
    """Train the steps `start` + 1 to `last` of a run in `folder`, from one of its checkpoints.

    `parts` are its segments of these steps; each has its own number of processes.
    """
    cfg = build_replay_config(run, start_folder, folder)
    ends = [*(part["after"] for part in parts[1:]), last]
    for part, end in zip(parts, ends, strict=True):
        resumes = part["after"] > start  # from the checkpoint that the previous part saved
        part_cfg = cfg.update_with(stop_at=end, try_load_latest_save=resumes)
        part_cfg.save(folder / "given.yaml")
        processes = part["processes"]
        log.info(f"steps {part['after'] + 1} to {end}: world size {processes}, as in the run")
        launch(folder / "given.yaml", Geometry(processes), cfg.intra_op_threads)


def build_replay_config(run: TrainedRun, start_folder: Path | None, folder: Path) -> TrainConfig:
    """The run's config, to train steps after a checkpoint, or from its start, again in `folder`."""
    initial: dict[str, Any] = {}  # by default the run's start, without a checkpoint
    if start_folder is not None:
        initial = {"load_path": str(start_folder)}
        initial |= {"reset_trainer_state": False, "reset_optimizer_state": False}
    elif run.record and (digests := run.record["action"]["inputs"].get("start")):
        initial = {"load_path": str(link_checkpoint(digests, folder / "initial"))}
    never = (run.steps or 0) + 2
    return run.cfg.update_with(
        save_folder=str(folder),
        save_overwrite=True,
        evaluators=[],
        eval_interval=never,
        save_interval=None,
        save_interval_unsharded=never,
        no_pre_train_checkpoint=True,
        remote_save_folder=None,
        module_outputs_save_steps=None,
        **dict.fromkeys(("wandb", "trackio", "tensorboard")),
        **initial,
    )


def link_checkpoint(digests: list[str], folder: Path) -> Path:
    """Link the files of a checkpoint, by digest, into a folder."""
    folder.mkdir()
    for digest, name in zip(digests, STATE, strict=False):
        if not (file := current_store().object_path(digest)).exists():
            raise ValueError(
                f"{name} of the checkpoint that the run started from or passed ({digest[:12]}…) is "
                f"not in the store {current_store().root}; pull it, or run snakemake again"
            )
        (folder / name).symlink_to(file.absolute())
    return folder


def read_step_metrics(path: Path) -> dict[int, dict[str, Any]]:
    """The rows of metrics.jsonl that have a training loss, by step."""
    return {row["step"]: row for row in read_metrics(path) if LOSS in row}


def find_start_checkpoint(run: TrainedRun, first: int, folder: Path) -> tuple[int, Path | None]:
    """Step and folder of a run's last checkpoint before step `first`; (0, None) without one.

    That is one of its own, a link of its chain, which `folder` is made for, or the checkpoint that
    it continues.

    Raises ValueError if a link is no longer in the store, or if the run began after `first`.
    """
    own = Path(run.folder).parent / "run" if run.record else run.run_folder
    found: list[tuple[int, Path | list[str] | None]] = [
        (layout.parse_step(path) or 0, path.resolve())
        for path in layout.list_checkpoints(own, unsharded=True)
    ]
    for link, before in pairwise(list_links(current_store(), run.record)):
        found.append((before["facts"]["steps"], link["action"]["inputs"]["after"]))
    began = min((segment["after"] for segment in run.segments), default=0)
    if began == 0:
        found.append((0, None))
    elif run.cfg.load_path is not None and Path(run.cfg.load_path).exists():
        found.append((began, Path(run.cfg.load_path).resolve()))
    earlier = [one for one in found if one[0] < first and (one[0] > 0 or one[1] is None)]
    if not earlier:
        raise ValueError(
            f"{run.where}: expected a checkpoint before step {first} to train it again from, found "
            f"none, since the run continues another from step {began}; give that run, or a later "
            "step"
        )
    step, place = max(earlier, key=lambda one: one[0])
    return step, link_checkpoint(place, folder) if isinstance(place, list) else place


def max_weight_difference(run: TrainedRun, folder: Path) -> float:
    """The largest absolute difference between a final checkpoint's weights and the new ones."""
    import torch
    from safetensors.torch import load_file

    final = load_file(Path(run.folder, "model.safetensors"))
    now = torch.load(folder / "latest-unsharded/model.pt", weights_only=True)
    return max(float((final[name] - now[name]).abs().max()) for name in final)
