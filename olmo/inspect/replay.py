"""Run some steps of a finished run again and compare: is the record what the data and code give?"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from olmo.checkpoint import layout
from olmo.cluster.launch import Geometry, launch
from olmo.inspect.order import parse_steps
from olmo.inspect.run import TrainedRun
from olmo.runtime.log import log
from olmo.store.stage import current_store
from olmo.train.chain import STATE
from olmo.train.sinks import read_metrics

LOSS, NORM = "train/CrossEntropyLoss", "optim/total_grad_norm"


def replay(checkpoint: str, /, steps: str) -> None:
    """Train STEPS (as 5..9) of a finished run again, and compare with what its record says.

    CHECKPOINT is a run's name or its final folder. Begins at the last of the run's own checkpoints
    before these steps, or at its start, with as many processes as each step had. Where the machine
    is of the same kind the losses, the gradients' norms and, at the end of the run, the weights are
    equal to the bit; elsewhere the gap is told. A step that differs where none should is an error,
    and named.
    """
    from olmo.train.segments import (  # which imports torch
        merge_equal,
        segments,
        training_conditions,
    )

    run, asked = TrainedRun(checkpoint), parse_steps(steps)
    last_step = run.steps
    if last_step is None:
        raise ValueError(f"{checkpoint}: expected a final checkpoint with its record.json")
    if not (asked[0] >= 1 and asked[-1] <= last_step):
        raise ValueError(f"expected steps from 1 to {last_step}, found {steps}")
    recorded = read_step_metrics(Path(run.folder, "metrics.jsonl"))
    start, begin = find_start_checkpoint(Path(run.folder).parent / "run", asked[0])
    resumed: dict[str, Any] = {}  # else from its start: no weights, or those that it was given
    if begin is not None:
        resumed = {"load_path": str(begin)}
        resumed |= {"reset_trainer_state": False, "reset_optimizer_state": False}
    with tempfile.TemporaryDirectory() as folder:
        if begin is None and run.record and (given := run.record["action"]["inputs"].get("start")):
            resumed = {"load_path": str(link_initial_checkpoint(given, Path(folder, "start")))}
        place = run.cfg.update_with(
            save_folder=folder,
            save_overwrite=True,
            evaluators=[],
            eval_interval=last_step + 1,
            save_interval=None,
            save_interval_unsharded=last_step + 1,
            no_pre_train_checkpoint=True,
            wandb=None,
            **resumed,
        )
        log.info(f"steps {start + 1} to {asked[-1]}, from {begin or 'the start'}")
        pieces = merge_equal(run.segments, start, asked[-1])
        ends = [*(piece["after"] for piece in pieces[1:]), asked[-1]]
        for piece, end in zip(pieces, ends, strict=True):
            goes_on = piece["after"] > start  # with what the piece before it has saved
            alike = place.update_with(stop_at=end, try_load_latest_save=goes_on)
            alike.save(Path(folder, "given.yaml"))
            processes = piece["processes"]
            log.info(f"steps {piece['after'] + 1} to {end}: processes as then, {processes}")
            launch(Path(folder, "given.yaml"), Geometry(processes), place.intra_op_threads)
        again = read_step_metrics(Path(folder, "metrics.jsonl"))
        weights = max_weight_difference(run, Path(folder)) if asked[-1] == last_step else None

        here, there = training_conditions(segments(Path(folder))), training_conditions(pieces)

    differing = [
        step for step in asked if any(recorded[step][n] != again[step][n] for n in (LOSS, NORM))
    ]
    for step in asked:
        mark = "  differs" if step in differing else ""
        log.info(f"step {step}: loss {recorded[step][LOSS]!r}, again {again[step][LOSS]!r}{mark}")
    if weights is not None:
        log.info(f"weights: largest difference {weights:g}")
    if not differing and not weights:
        log.info(f"{len(asked)} steps, equal to the bit")
        return
    what = f"step {differing[0]}" if differing else "the weights"
    gap = max((abs(recorded[s][LOSS] - again[s][LOSS]) for s in differing), default=0.0)
    if here != there:
        log.info(f"first difference: {what}; the losses' largest gap {gap:.3g}")
        log.info(f"the run's conditions were {there}, and these are {here}")
        return
    raise ValueError(
        f"the first difference is {what} (losses differ by up to {gap:.3g}) under the run's own "
        "conditions: its data, its code or its record was changed since. `olmo store verify` looks "
        "at the data"
    )


def link_initial_checkpoint(digests: list[str], folder: Path) -> Path:
    """The checkpoint that a run was given to start from, by its files' digests, as a folder."""
    folder.mkdir()
    for digest, name in zip(digests, STATE, strict=False):
        if not (file := current_store().object_path(digest)).exists():
            raise ValueError(
                f"the checkpoint that the run started from ({digest[:12]}…) is not in the store "
                f"{current_store().root}; pull it, or run snakemake again"
            )
        (folder / name).symlink_to(file.absolute())
    return folder


def read_step_metrics(path: Path) -> dict[int, dict[str, Any]]:
    """A training step's row of metrics.jsonl, by its number."""
    return {row["step"]: row for row in read_metrics(path) if LOSS in row}


def find_start_checkpoint(folder: Path, first: int) -> tuple[int, Path | None]:
    """The last checkpoint of a run before step `first`: (its step, its folder), or the start."""
    for path in reversed(layout.list_checkpoints(folder, unsharded=True)):
        if 0 < (step := layout.parse_step(path) or 0) < first:
            return step, path.resolve()
    return 0, None


def max_weight_difference(run: TrainedRun, folder: Path) -> float:
    """The largest difference between a final checkpoint's weights and those that came out now."""
    import torch
    from safetensors.torch import load_file

    final = load_file(Path(run.folder, "model.safetensors"))
    now = torch.load(folder / "latest-unsharded/model.pt", weights_only=True)
    return max(float((final[name] - now[name]).abs().max()) for name in final)
