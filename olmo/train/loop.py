"""Training, from a config to its last checkpoint: set-up, then the loop.

The state of a run is its weights, its optimizer's state and four numbers (`TrainState`). Everything
else follows from the config and the step, so that a run which stopped anywhere goes on with the
same bits.
"""

from __future__ import annotations

import gc
import math
import signal
from collections.abc import Generator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from olmo.checkpoint import layout
from olmo.checkpoint.read import load_optimizer_state, load_weights
from olmo.config import DistributedStrategy, SchedulerUnits, TrainConfig
from olmo.config.checks import check as check_config
from olmo.data.batches import TrainLoader, build_train_dataloader
from olmo.distributed.parallelize import is_fsdp, parallelize
from olmo.distributed.reduce import GradientReducer
from olmo.distributed.watchdog import Watchdog, report_progress
from olmo.distributed.world import World, join_world, leave_world
from olmo.eval.evaluators import build_evaluators, evaluate
from olmo.io import sealed
from olmo.model import OLMo
from olmo.optim.build import build_optimizer
from olmo.optim.master_weights import MasterWeights
from olmo.optim.optimizer import Optimizer
from olmo.optim.schedule import BoltOnWarmupScheduler, Scheduler, build_scheduler
from olmo.precision import msamp
from olmo.precision.backends import Float8Converter, convert_to_float8
from olmo.runtime.log import format_count, log, log_on_rank0_only
from olmo.runtime.process import FINISHED, MARKER
from olmo.train.meters import SpeedMeter, device_flops, memory_metrics
from olmo.train.metrics_buffer import MetricsBuffer
from olmo.train.profile import Profilers
from olmo.train.saving import Saver
from olmo.train.segments import begin_segment, data_facts
from olmo.train.signals import PAUSED, StopRequest
from olmo.train.sinks import Console, DataIndices, JsonLines, Sink, WeightsAndBiases
from olmo.train.start import (
    TrainState,
    check,
    duration,
    find_start,
    masks,
    origin_of_threads,
    whole_batches,
)
from olmo.train.step import clear_gradients, forward_backward, keep_freed_memory
from olmo.train.traces import traced

# How long a run that has paused goes on sending its checkpoints, in seconds. Whoever asked for the
# pause may give it no more; what is not sent then is sent by the next start.
PATIENCE_S = 30.0


def train(cfg: TrainConfig) -> int:
    """Train as `cfg` says, which is not changed; the exit code (0 finished, 75 paused).

    Raises:
        ValueError, OSError: what is not as it must be; before training starts where that is known.
        NotFinite: a gradient was NaN or infinite; weights and checkpoints are as before that step.
    """
    stop = StopRequest(Path(cfg.save_folder), cfg.time_limit)
    # A warning that time is up soon must not kill; SIGTERM may, until there is something to save.
    stop.listen(signal.SIGUSR1)
    single = cfg.distributed_strategy == DistributedStrategy.single
    world = join_world(cfg.hang_timeout, cfg.single if single else None)
    log_on_rank0_only(world.is_rank0)
    try:
        return _train(cfg, world, stop)
    finally:
        leave_world(world)


def _train(cfg: TrainConfig, world: World, stop: StopRequest) -> int:
    check_config(cfg)
    # --- what we run on ---
    if cfg.intra_op_threads is not None:
        torch.set_num_threads(cfg.intra_op_threads)
    if world.device.type == "cpu" and cfg.compile is not None:
        torch.use_deterministic_algorithms(True)
    elif world.device.type == "cpu":
        # The same, without importing the compiler to tell it so: seconds.
        torch.set_deterministic_debug_mode("error")
    if world.device.type == "cpu":
        keep_freed_memory()
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    log.info(f"device: {world.device} ({world.device_note}), processes: {world.size}")
    threads, origin = torch.get_num_threads(), origin_of_threads(cfg)
    log.info(f"CPU threads per process: {threads} ({origin}), torch {torch.__version__}")
    precision = cfg.precision or "fp32"
    dtype = str(cfg.autocast_precision).removeprefix("torch.")
    kept = "weights in bfloat16, masters" if cfg.master_weights else "weights"
    log.info(f"precision: {precision}, matrix products in {dtype}, {kept} and optimizer in float32")

    # --- the data ---
    batch_size, length = cfg.global_train_batch_size, cfg.model.max_sequence_length
    check(cfg, world)
    loader = build_train_dataloader(cfg, world_size=world.size, rank=world.rank)
    tokens_per_step = batch_size * length
    total_size = loader.dataset.total_size
    steps_per_epoch = total_size // batch_size
    if steps_per_epoch == 0:
        raise ValueError(
            f"the data has {len(loader.dataset.dataset)} instances of {length} tokens, less than "
            f"one step of global_train_batch_size={batch_size}"
        )
    instances = len(loader.dataset.dataset)
    log.info(f"data: {format_count(instances * length)} tokens, {instances} instances of {length}")
    micro = min(cfg.device_train_microbatch_size, batch_size // world.size)
    log.info(
        f"a step: {batch_size} instances = {format_count(tokens_per_step)} tokens, per process in "
        f"{-(-batch_size // world.size // micro)} microbatches of {micro}; "
        f"an epoch: {steps_per_epoch} steps"
    )

    evaluators = build_evaluators(cfg, world)

    # --- where the run was ---
    folder = Path(cfg.save_folder)
    checkpoint, position, resumed = find_start(cfg, world, folder)

    # --- the model ---
    torch.manual_seed(cfg.seed)
    model = OLMo(cfg.model.update_with(init_device="cpu"))
    attention = model.use_attention(world.device, cfg.autocast_precision, cfg.attention, masks(cfg))
    size, inner = map(format_count, (model.num_params(), model.num_params(include_embedding=False)))
    log.info(f"model: {size} parameters, {inner} outside embeddings")
    log.info(f"attention: {attention}")
    if cfg.cross_entropy is not None:
        model.cross_entropy = cfg.cross_entropy
        log.info(f"cross-entropy: {cfg.cross_entropy}")

    model.to(world.device)
    float8: Float8Converter | None = None
    if cfg.fp8 is not None:
        float8, how = convert_to_float8(model, cfg.fp8, world.device)
        log.info(f"fp8: {how}")
    log.info(f"parallelism: {parallelize(cfg, model, world)}")
    optimizer = build_optimizer(cfg, model)
    if checkpoint is not None:  # after sharding: each process reads its own share
        load_weights(model, checkpoint)
        log.info(f"weights: from {checkpoint.folder}")
    if cfg.use_msamp:
        model, optimizer = msamp.initialize(model, optimizer)
        if checkpoint is not None and checkpoint.optim is not None:
            raise ValueError(
                "use_msamp cannot go on with an optimizer's state; --reset_optimizer_state"
            )
    scheduler: Scheduler = build_scheduler(cfg)
    source = None if checkpoint is None else checkpoint.folder.absolute()
    if checkpoint is not None and checkpoint.optim is not None:
        load_optimizer_state(model, optimizer, checkpoint)
    elif checkpoint is not None and position.global_step > 0:
        warm = position.global_step
        scheduler = BoltOnWarmupScheduler.wrap(scheduler, warm, warm + int(cfg.scheduler.t_warmup))
        log.info(f"learning rate: a new warm-up from step {warm}, for the optimizer starts afresh")
    del checkpoint  # and its memory
    master_weights = MasterWeights(model, optimizer) if cfg.master_weights else None
    loader.dataset.start_index = position.global_train_examples_seen_this_epoch
    if loader.dataset.epoch != position.epoch:
        loader.dataset.reshuffle(position.epoch)
    max_steps, max_tokens = duration(cfg, position, tokens_per_step, total_size)
    if position.global_step > 0:
        _set_rates(cfg, optimizer, scheduler, position, max_steps, max_tokens)
    end = min(max_steps, cfg.stop_at or max_steps)
    last_step = end if cfg.stop_after is None else min(end, position.global_step + cfg.stop_after)
    to_go = max(last_step - position.global_step, 0)
    tokens_then = position.global_train_tokens_seen + to_go * tokens_per_step
    begun = position.global_train_examples_seen_this_epoch / batch_size
    epochs = max(position.epoch - (cfg.epoch or 0), 0) + (begun + to_go) / steps_per_epoch
    log.info(
        f"duration: steps {position.global_step + 1} to {last_step} "
        f"({format_count(tokens_then)} tokens, {epochs:.2f} epochs)"
    )

    # --- where metrics and checkpoints go ---
    saver = Saver(cfg, world, model, optimizer, position)
    sinks: list[Sink] = []
    if world.is_rank0:
        layout.sweep(folder)
        if cfg.save_overwrite and not cfg.dry_run:
            layout.remove_after(folder, position.global_step if resumed else -1, source)
        if not cfg.dry_run:
            for name in (FINISHED, MARKER):
                (folder / name).unlink(missing_ok=True)
            cfg.save(folder / "config.yaml")
        if position.global_step < last_step and not cfg.dry_run:
            other = None if resumed or not position.global_step else source
            data = data_facts(cfg, loader.dataset, position, other)
            begin_segment(folder, world, position.global_step, resumed, data)
        upto: float | None = position.global_step if resumed else None
        sinks = [
            JsonLines(folder, math.inf if cfg.dry_run else upto),
            Console(cfg.console_log_interval, last_step),
        ]
        if cfg.wandb is not None:
            sinks.append(WeightsAndBiases(cfg, resumed))
    if resumed:
        assert source is not None
        saver.resume(source)
    indices = DataIndices(cfg, world.rank, world.size, position.global_step if resumed else None)
    flops = model.num_fwd_flops + model.num_bck_flops
    peak = cfg.speed_monitor.gpu_flops_available or device_flops(world.device)
    window = cfg.speed_monitor.window_size
    per_token = {"palm": model.flops_per_token(), "causal": model.flops_per_token(causal=True)}
    speed = SpeedMeter(window, world.size, per_token, flops, peak)

    def write(step: int, metrics: dict[str, float]) -> None:
        for sink in sinks:
            sink.write(step, metrics)

    asked = cfg.eval_on_load if position.global_step else not resumed
    if asked and not cfg.dry_run and (first := evaluate(evaluators, model)):
        write(position.global_step, first)
    if cfg.force_save_unsharded or not (resumed or source or cfg.no_pre_train_checkpoint):
        saver.save("unsharded" if cfg.force_save_unsharded else None)
        saver.finish()
        saver.send()  # a place that takes nothing is known of before training
    if cfg.dry_run:
        log.info("dry run: everything is in place, nothing is trained")
        return 0

    # --- the loop ---
    stop.listen(signal.SIGTERM, signal.SIGUSR1)
    if cfg.gen1_gc_interval is not None:
        gc.disable()  # its pauses fall where we say, at the same step on every process
    paused: str | None = None
    exit_code = 1
    alone = world.size == 1 or is_fsdp(cfg, world)  # sharded: backward sums by itself
    holders = None if master_weights is None else master_weights.get_masters(model.parameters())
    reducer = None if alone else GradientReducer(model.parameters(), world, holders)
    failed = torch.zeros((), device=world.device)  # 1 from the first step that was not finite on
    numbers = MetricsBuffer(world)
    lowest_loss = float("inf")
    batches = _endless(loader, position, batch_size)
    profilers = Profilers(cfg, world.is_rank0)
    watchdog = Watchdog(world, cfg.hang_timeout)
    watchdog.start()
    model.train()
    try:
        while position.global_step < last_step and paused is None:
            batch = next(batches)
            position.global_step += 1
            position.global_train_examples_seen_this_epoch += batch_size
            position.global_train_tokens_seen += tokens_per_step
            step = position.global_step
            indices.write(step, batch["index"].tolist())

            clear_gradients(optimizer, cfg)
            watched = step in (cfg.module_outputs_save_steps or ()) and world.is_rank0
            with traced(model, folder / f"traces/step{step}") if watched else nullcontext():
                losses = forward_backward(model, batch, cfg, world.device, step, reducer)
            if reducer is not None:
                reducer.finish()
            details = _wants_details(cfg, step)
            found = optimizer.clip_grads_and_collect_metrics(step, details)
            if not details and (cfg.wandb is None or step % cfg.wandb.log_interval):
                # One norm a parameter and step is for Weights & Biases only.
                found = {k: v for k, v in found.items() if not k.startswith("grad/")}
            # Once a gradient is not finite nothing moves any more. That is known on the device;
            # we hear of it when the numbers arrive, and so before anything is saved.
            assert optimizer.found_inf is not None
            failed = torch.maximum(failed, optimizer.found_inf)
            optimizer.found_inf = failed
            _set_rates(cfg, optimizer, scheduler, position, max_steps, max_tokens)
            optimizer.step()
            if master_weights is not None:
                master_weights.copy_to_model()
            found |= optimizer.get_post_step_metrics(model)
            if float8 is not None:
                float8.after_step()

            known = speed.work(position.global_train_tokens_seen)
            for i, group in enumerate(optimizer.param_groups):
                known[f"optim/learning_rate_group{i}"] = float(group["lr"])
            if (mask := batch.get("instance_mask")) is not None:
                known["train/masked_instances_local_rank"] = float((~mask).sum())
            numbers.add(step, losses, failed, found, known, batch["index"])

            last = step == last_step
            evaluates = step == end or step % cfg.eval_interval == 0
            saves = saver.due(step)
            rows = numbers.fetch(write) if last or evaluates or saves else numbers.arrived()
            if rows:
                speed.step(len(rows), tokens_per_step)
                rows[-1][1].update(speed.metrics() | memory_metrics(world.device))
            if evaluates:
                rows[-1][1].update(evaluate(evaluators, model))
            reason: str | None = None
            for number, metrics in rows:
                write(number, metrics)
                loss = metrics["train/CrossEntropyLoss"]
                lowest_loss = min(lowest_loss, loss)
                limit = lowest_loss * (cfg.early_stopping_factor or float("inf"))
                if loss > limit and number > cfg.scheduler.t_warmup:
                    reason = f"early_stopping_factor: the loss {loss:.4f} is above {limit:.4f}"
            if saves:
                _flush(sinks, indices)
                with watchdog.paused():
                    saver.save(saves)
            if evaluates or saves:
                speed.skip()
            if cfg.gen1_gc_interval and step % cfg.gen1_gc_interval == 0:
                gc.collect(1)
            profilers.step()
            report_progress()
            # One question a step to all processes, so that none goes on without the others.
            reason = reason or stop.reason(look=world.is_rank0)
            if world.any(reason is not None or saver.failed or numbers.failed) and not last:
                if world.any(saver.failed):
                    saver.give_up()
                if world.any(numbers.failed):
                    numbers.fetch(write)  # raises
                paused = world.gather_first(reason) or "another process"
        watchdog.stop()
        if paused is not None and position.global_step:
            for row in numbers.fetch(write):
                write(*row)
            _flush(sinks, indices)
            where = saver.pause()
            saver.finish()
            log.info(f"paused at step {position.global_step} by {paused}, saved to {where}")
            if world.is_rank0:
                left = {"step": position.global_step, "by": paused, "checkpoint": str(where)}
                sealed.write(folder / MARKER, sealed.dumps(left))
                stop.met()
            saver.send(PATIENCE_S, needed=False)
            exit_code = PAUSED
        else:
            exit_code = PAUSED if position.global_step < end else 0
            reached = {"step": position.global_step, "checkpoint": saver.save().name}
            saver.finish()
            saver.send(needed=exit_code == 0)
            if exit_code == 0 and world.is_rank0:
                sealed.write(folder / FINISHED, sealed.dumps(reached))
        world.barrier()
        return exit_code
    finally:
        watchdog.stop()
        gc.enable()
        profilers.close()
        batches.close()
        indices.close()
        for sink in sinks:
            sink.close(exit_code)


def _endless(
    loader: TrainLoader, position: TrainState, batch_size: int
) -> Generator[dict[str, Any], None, None]:
    """Whole batches from `position` on, epoch after epoch, each shuffled anew.

    How many an epoch still has is counted from the place in it, over all processes: a run that
    goes on with another batch size may be anywhere in an epoch, and one process's share may have
    room for a batch that another's has not.
    """
    while True:
        yield from islice(loader, whole_batches(loader.dataset.total_size, position, batch_size))
        position.epoch += 1
        position.global_train_examples_seen_this_epoch = 0
        loader.dataset.start_index = 0
        loader.dataset.reshuffle(position.epoch)
        log.info(f"epoch {position.epoch} begins, in a new order")


def _set_rates(
    cfg: TrainConfig,
    optimizer: Optimizer,
    scheduler: Scheduler,
    position: TrainState,
    max_steps: int,
    max_tokens: int,
) -> None:
    """Learning rate of this update, and the clipping threshold of the next (OLMo's order)."""
    steps = cfg.scheduler.units == SchedulerUnits.steps
    now = position.global_step if steps else position.global_train_tokens_seen
    end = max_steps if steps else max_tokens
    ratio = scheduler.get_max_grad_norm_ratio(cfg.max_grad_norm_ratio, now, end)
    for group in optimizer.param_groups:
        group["lr"] = scheduler.get_lr(cfg.optimizer.learning_rate, now, end)
        group["max_grad_norm"] = scheduler.get_max_grad_norm(cfg.max_grad_norm, now, end)
        group["max_grad_norm_ratio"] = ratio


def _wants_details(cfg: TrainConfig, step: int) -> bool:
    """Whether each parameter's metrics are collected: for Weights & Biases, at their interval."""
    if cfg.wandb is None:
        return False
    interval = max(cfg.optimizer.metrics_log_interval or 1, cfg.wandb.log_interval)
    return step % interval == 0


def _flush(sinks: list[Sink], indices: DataIndices) -> None:
    """What was told of these steps is on disk before a checkpoint says they are done."""
    for sink in sinks:
        if isinstance(sink, JsonLines):
            sink.flush()
    indices.flush()
