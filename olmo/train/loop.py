"""Training, from a config to its last checkpoint: set-up, then one turn after another."""

from __future__ import annotations

import gc
import signal
from collections.abc import Generator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from olmo.config import DistributedStrategy, TrainConfig
from olmo.data.batches import TrainLoader
from olmo.distributed.watchdog import Watchdog, report_progress
from olmo.distributed.world import join_world, leave_world
from olmo.eval.evaluators import run_evaluators
from olmo.io import sealed
from olmo.runtime.log import log, log_on_rank0_only
from olmo.runtime.process import EXIT_PAUSED, FINISHED_FILE, PAUSED_FILE
from olmo.train.meters import memory_metrics
from olmo.train.metrics_buffer import MetricsBuffer, Row
from olmo.train.profile import Profilers
from olmo.train.setup import Training, set_up
from olmo.train.signals import StopRequest
from olmo.train.state import TrainState, every
from olmo.train.step import Losses, clear_gradients, forward_backward
from olmo.train.traces import traced

# How long a paused run continues to upload its checkpoints, in seconds: it may be killed soon after
# the signal. The next start uploads the rest.
PATIENCE_S = 30.0


def train(cfg: TrainConfig) -> int:
    """Train as `cfg` says, which is not changed; the exit code (0 finished, 75 paused).

    Raises:
        ValueError, OSError: a wrong setting, or missing data; before training where possible.
        NotFinite: a gradient was NaN or infinite; weights and checkpoints are as before that step.
    """
    stop = StopRequest(Path(cfg.save_folder), cfg.time_limit)
    # A warning that time is up soon must not kill; SIGTERM may, until there is something to save.
    stop.listen(signal.SIGUSR1)
    single = cfg.distributed_strategy == DistributedStrategy.single
    world = join_world(cfg.hang_timeout, cfg.single if single else None)
    log_on_rank0_only(world.is_rank0)
    try:
        run = set_up(cfg, world)
        _before_first_step(run)
        if cfg.dry_run:
            log.info("dry run: everything is in place, nothing is trained")
            return 0
        return _train(run, stop)
    finally:
        leave_world(world)


def _before_first_step(run: Training) -> None:
    cfg, saver = run.cfg, run.saver
    asked = run.evaluates_first and not cfg.dry_run
    if asked and (metrics := run_evaluators(run.evaluators, run.model)):
        run.write(run.state.global_step, metrics)
    if cfg.force_save_unsharded or run.saves_first:
        saver.save("unsharded" if cfg.force_save_unsharded else None)
        saver.finish()
        saver.finish_upload()  # fails before training where the remote folder is not writable


def _train(run: Training, stop: StopRequest) -> int:
    """All turns, and what comes after the last: the exit code."""
    cfg, world, state, length, saver = run.cfg, run.world, run.state, run.length, run.saver
    stop.listen(signal.SIGTERM, signal.SIGUSR1)
    if cfg.gen1_gc_interval is not None:
        gc.disable()  # its pauses fall at the same step on every process
    exit_code, paused_by = 1, None
    buffer = MetricsBuffer(world)
    batches = _endless(run.loader, state, length.batch_size)
    profilers = Profilers(cfg, world.is_rank0)
    watchdog = Watchdog(world, cfg.hang_timeout)
    watchdog.start()
    run.model.train()
    try:
        while state.global_step < length.last_step and paused_by is None:
            with run.speed.waiting():
                batch = next(batches)
            step = state.advance(length.batch_size, length.tokens_per_step)
            run.indices.write(step, batch["index"].tolist())
            losses, metrics = train_step(run, batch)
            buffer.add(step, losses, run.failed, metrics, _known(run, batch), batch["index"])

            # Metrics arrive some steps later; evaluation and checkpoints wait for all of them.
            last = step == length.last_step
            evaluates = step == length.end or every(step, cfg.eval_interval)
            saves = saver.due(step)
            rows = buffer.fetch(run.write) if last or evaluates or saves else buffer.arrived()
            if rows:
                run.speed.step(len(rows), length.tokens_per_step)
                rows[-1][1].update(run.speed.metrics() | memory_metrics(world.device))
            if evaluates:
                rows[-1][1].update(run_evaluators(run.evaluators, run.model))
            stop_reason = _write(run, rows)
            if saves:
                run.flush()
                with watchdog.paused():
                    saver.save(saves)
            if evaluates or saves:
                run.speed.skip()
            if cfg.gen1_gc_interval and every(step, cfg.gen1_gc_interval):
                gc.collect(1)
            profilers.step()
            report_progress()
            stop_reason = stop_reason or stop.reason(look=world.is_rank0)
            # One collective per step, so that no process continues without the others.
            failed = saver.failed or buffer.failed
            if world.any(stop_reason is not None or failed) and not last:
                if world.any(saver.failed):
                    saver.give_up()
                if world.any(buffer.failed):
                    buffer.fetch(run.write)  # raises
                paused_by = world.gather_first(stop_reason) or "another process"
        watchdog.stop()
        if paused_by is not None:
            for row in buffer.fetch(run.write):
                run.write(*row)
            _pause(run, paused_by, stop)
            exit_code = EXIT_PAUSED
        else:
            exit_code = EXIT_PAUSED if state.global_step < length.end else 0
            _finish(run, exit_code)
        world.barrier()
        return exit_code
    finally:
        watchdog.stop()
        gc.enable()
        profilers.close()
        batches.close()
        run.close(exit_code)


def train_step(run: Training, batch: dict[str, Any]) -> tuple[Losses, dict[str, Tensor]]:
    """One update of the weights: this process's losses, and the optimizer's metrics.

    Args:
        batch: `input_ids` (B, T), `index` (B,) and what else the loader gives, on the host.

    Once a gradient is not finite no weight moves any more. Only the device knows it at first; the
    host learns it with the metrics, and so before anything is saved.
    """
    cfg, optimizer, step = run.cfg, run.optimizer, run.state.global_step
    clear_gradients(optimizer, cfg)
    is_traced = step in (cfg.module_outputs_save_steps or ()) and run.world.is_rank0
    with traced(run.model, run.folder / f"traces/step{step}") if is_traced else nullcontext():
        losses = forward_backward(run.model, batch, cfg, run.world.device, step, run.reducer)
    if run.reducer is not None:
        run.reducer.finish()
    per_parameter = _wants_details(cfg, step)
    metrics = optimizer.clip_grads_and_collect_metrics(step, per_parameter)
    if not per_parameter and (cfg.wandb is None or not every(step, cfg.wandb.log_interval)):
        # One norm a parameter and step is for Weights & Biases only.
        metrics = {k: v for k, v in metrics.items() if not k.startswith("grad/")}
    assert optimizer.found_inf is not None
    run.failed = torch.maximum(run.failed, optimizer.found_inf)
    optimizer.found_inf = run.failed
    run.set_rates()
    optimizer.step()
    if run.master_weights is not None:
        run.master_weights.copy_to_model()
    metrics |= optimizer.get_post_step_metrics(run.model)
    if run.float8 is not None:
        run.float8.after_step()
    return losses, metrics


def _known(run: Training, batch: dict[str, Any]) -> dict[str, float]:
    """The metrics of a step that the host knows without asking the device."""
    known = run.speed.work(run.state.global_train_tokens_seen)
    for i, group in enumerate(run.optimizer.param_groups):
        known[f"optim/learning_rate_group{i}"] = float(group["lr"])
    if (mask := batch.get("instance_mask")) is not None:
        known["train/masked_instances_local_rank"] = float((~mask).sum())
    return known


def _write(run: Training, rows: list[Row]) -> str | None:
    """Write the metrics of steps; why to stop early (early_stopping_factor), or None."""
    reason = None
    for step, metrics in rows:
        run.write(step, metrics)
        loss = metrics["train/CrossEntropyLoss"]
        run.lowest_loss = min(run.lowest_loss, loss)
        limit = run.lowest_loss * (run.cfg.early_stopping_factor or float("inf"))
        if loss > limit and step > run.cfg.scheduler.t_warmup:
            reason = f"early_stopping_factor: the loss {loss:.4f} is above {limit:.4f}"
    return reason


def _pause(run: Training, by: str, stop: StopRequest) -> None:
    """Save, and leave word for the launcher."""
    run.flush()
    folder = run.saver.pause()
    run.saver.finish()
    step = run.state.global_step
    log.info(f"paused at step {step} by {by}, saved to {folder}")
    if run.world.is_rank0:
        paused = {"step": step, "by": by, "checkpoint": str(folder)}
        sealed.write_atomic(run.folder / PAUSED_FILE, sealed.dumps(paused))
        stop.clear()
    run.saver.finish_upload(PATIENCE_S, required=False)


def _finish(run: Training, exit_code: int) -> None:
    """The last checkpoint of this start, and of the run where it ends here."""
    finished = {"step": run.state.global_step, "checkpoint": run.saver.save().name}
    run.saver.finish()
    run.saver.finish_upload(required=exit_code == 0)
    if exit_code == 0 and run.world.is_rank0:
        sealed.write_atomic(run.folder / FINISHED_FILE, sealed.dumps(finished))


def _endless(
    loader: TrainLoader, state: TrainState, batch_size: int
) -> Generator[dict[str, Any], None, None]:
    """Whole batches from `state` on, epoch after epoch, each shuffled again."""
    while True:
        # The loader alone is not enough: after a resume with another batch size one process's share
        # of an epoch may have one batch more than another's.
        yield from islice(loader, state.batches_left(loader.dataset.total_size, batch_size))
        state.begin_epoch(state.epoch + 1)
        loader.dataset.start_index = 0
        loader.dataset.reshuffle(state.epoch)
        log.info(f"epoch {state.epoch} begins, in a new order")


def _wants_details(cfg: TrainConfig, step: int) -> bool:
    """Whether each parameter's metrics are collected: for Weights & Biases, at their interval."""
    if cfg.wandb is None:
        return False
    interval = max(cfg.optimizer.metrics_log_interval or 1, cfg.wandb.log_interval)
    return every(step, interval)
