"""From a config to a run that is ready for its first step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from olmo.checkpoint import layout
from olmo.checkpoint.read import load_optimizer_state, load_weights
from olmo.config import SchedulerUnits, TrainConfig
from olmo.data.batches import TrainLoader, build_train_dataloader
from olmo.distributed.parallelize import is_fsdp, parallelize
from olmo.distributed.reduce import GradientReducer
from olmo.distributed.world import World
from olmo.eval.evaluators import Evaluator, build_evaluators
from olmo.model import OLMo
from olmo.optim.build import build_optimizer
from olmo.optim.master_weights import MasterWeights
from olmo.optim.optimizer import Optimizer
from olmo.optim.schedule import BoltOnWarmupScheduler, Scheduler, build_scheduler
from olmo.precision import msamp
from olmo.precision.converters import Float8Converter, convert_to_float8
from olmo.runtime.log import format_count, log
from olmo.runtime.process import FINISHED_FILE, PAUSED_FILE
from olmo.train.meters import SpeedMeter, device_flops
from olmo.train.resume import Start, find_start
from olmo.train.saver import Saver
from olmo.train.segments import begin_segment, data_facts
from olmo.train.sinks import (
    Console,
    DataIndices,
    JsonLines,
    Sink,
    Tensorboard,
    Trackio,
    WeightsAndBiases,
)
from olmo.train.state import RunLength, TrainState
from olmo.train.step import keep_freed_memory
from olmo.train.validate import choose_mask_type, validate


@dataclass
class Training:
    """A run that is set up: what its steps compute with, and where their results go."""

    cfg: TrainConfig
    world: World
    state: TrainState
    length: RunLength
    loader: TrainLoader
    evaluators: list[Evaluator]
    model: OLMo
    optimizer: Optimizer
    scheduler: Scheduler
    float8: Float8Converter | None
    master_weights: MasterWeights | None
    reducer: GradientReducer | None  # None: one process, or FSDP, whose backward reduces
    saver: Saver
    sinks: list[Sink]  # empty on all ranks but 0
    indices: DataIndices
    speed: SpeedMeter
    failed: Tensor  # () on the device: 1 from the first step on whose gradient was not finite
    evaluates_first: bool  # before the first step
    saves_first: bool
    lowest_loss: float = field(default=math.inf)

    @property
    def folder(self) -> Path:
        return Path(self.cfg.save_folder)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Metrics of a step, to every sink."""
        for sink in self.sinks:
            sink.write(step, metrics)

    def flush(self) -> None:
        """Metrics and indices of these steps are on disk before a checkpoint that has them."""
        for sink in self.sinks:
            if isinstance(sink, JsonLines):
                sink.flush()
        self.indices.flush()

    def set_rates(self) -> None:
        """Learning rate of this update, and the clipping threshold of the next (OLMo's order)."""
        cfg, state, scheduler = self.cfg, self.state, self.scheduler
        in_steps = cfg.scheduler.units == SchedulerUnits.steps
        now = state.global_step if in_steps else state.global_train_tokens_seen
        end = self.length.max_steps if in_steps else self.length.max_tokens
        ratio = scheduler.get_max_grad_norm_ratio(cfg.max_grad_norm_ratio, now, end)
        for group in self.optimizer.param_groups:
            group["lr"] = scheduler.get_lr(cfg.optimizer.learning_rate, now, end)
            group["max_grad_norm"] = scheduler.get_max_grad_norm(cfg.max_grad_norm, now, end)
            group["max_grad_norm_ratio"] = ratio

    def close(self, exit_code: int) -> None:
        self.indices.close()
        for sink in self.sinks:
            sink.close(exit_code)


def set_up(cfg: TrainConfig, world: World) -> Training:
    """Everything up to the first step, in the order in which a mistake costs least time.

    Raises:
        ValueError, OSError: with the remedy (validate, find_start, and the parts themselves).
    """
    _set_up_torch(cfg, world)
    validate(cfg, world)
    loader = build_train_dataloader(cfg, world_size=world.size, rank=world.rank)
    _report_data(cfg, world, loader)
    evaluators = build_evaluators(cfg, world)
    start = find_start(cfg, world)
    state, resumed = start.state, start.resumed
    source = None if start.checkpoint is None else start.checkpoint.folder.absolute()

    model, float8 = _build_model(cfg, world)
    optimizer, scheduler, model = _build_optimizer(cfg, model, start)
    masters = MasterWeights(model, optimizer) if cfg.master_weights else None
    needs_reducer = world.size > 1 and not is_fsdp(cfg, world)
    holders = None if masters is None else masters.get_masters(model.parameters())
    reducer = GradientReducer(model.parameters(), world, holders) if needs_reducer else None

    loader.dataset.start_index = state.global_train_examples_seen_this_epoch
    if loader.dataset.epoch != state.epoch:
        loader.dataset.reshuffle(state.epoch)
    length = RunLength.of(cfg, state, loader.dataset.total_size)
    _check_mixture(cfg, state, length, loader.dataset.total_size)
    _report_length(cfg, state, length, loader.dataset.total_size)

    saver = Saver(cfg, world, model, optimizer, state)
    sinks: list[Sink] = []
    if world.is_rank0:
        sinks = _open_folder(cfg, world, loader, start, source, length)
    if resumed:
        assert source is not None
        saver.resume(source)
    per_token = {"palm": model.flops_per_token(), "causal": model.flops_per_token(causal=True)}
    run = Training(
        cfg=cfg,
        world=world,
        state=state,
        length=length,
        loader=loader,
        evaluators=evaluators,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        float8=float8,
        master_weights=masters,
        reducer=reducer,
        saver=saver,
        sinks=sinks,
        indices=DataIndices(cfg, world.rank, world.size, state.global_step if resumed else None),
        speed=SpeedMeter(
            cfg.speed_monitor.window_size,
            world.size,
            per_token,
            model.num_fwd_flops + model.num_bck_flops,
            cfg.speed_monitor.gpu_flops_available or device_flops(world.device),
        ),
        failed=torch.zeros((), device=world.device),
        evaluates_first=cfg.eval_on_load if state.global_step else not resumed,
        saves_first=not (resumed or source or cfg.no_pre_train_checkpoint),
    )
    if state.global_step > 0:
        run.set_rates()
    return run


def _set_up_torch(cfg: TrainConfig, world: World) -> None:
    """Threads, and determinism where it costs nothing (CPU); says what the run computes on."""
    if cfg.intra_op_threads is not None:
        torch.set_num_threads(cfg.intra_op_threads)
    if world.device.type == "cpu" and cfg.compile is not None:
        torch.use_deterministic_algorithms(True)
    elif world.device.type == "cpu":
        # The same without an import of the compiler, which takes seconds.
        torch.set_deterministic_debug_mode("error")
    if world.device.type == "cpu":
        keep_freed_memory()
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    log.info(
        f"device: {world.device} ({world.device_note}), processes: {world.size}, "
        f"CPU threads of each: {torch.get_num_threads()}"
    )
    dtype = str(cfg.autocast_precision).removeprefix("torch.")
    weights = "weights in bfloat16, master weights" if cfg.master_weights else "weights"
    log.info(
        f"precision: {cfg.precision or 'fp32'}, matrix products in {dtype}, {weights} and "
        "optimizer in float32"
    )


def _report_data(cfg: TrainConfig, world: World, loader: TrainLoader) -> None:
    """Raises ValueError for data that is less than one step."""
    batch_size, length = cfg.global_train_batch_size, cfg.model.max_sequence_length
    instances = len(loader.dataset.dataset)
    steps_per_epoch = loader.dataset.total_size // batch_size
    if steps_per_epoch == 0:
        raise ValueError(
            f"the data has {instances} instances of {length} tokens, less than one step of "
            f"global_train_batch_size={batch_size}"
        )
    per_process, microbatch = batch_size // world.size, cfg.device_train_microbatch_size
    how = f", per process {describe_microbatches(per_process, microbatch)}"
    log.info(
        f"data: {instances:,} instances of {length}, {format_count(instances * length)} tokens; "
        f"a step: {batch_size} instances, {format_count(batch_size * length)} tokens"
        f"{how if microbatch < per_process else ''}"
    )


def describe_microbatches(instances: int, size: int) -> str:
    """How a process splits its instances of a step.

    >>> describe_microbatches(8, 4), describe_microbatches(8, 3), describe_microbatches(8, 16)
    ('in 2 microbatches of 4', 'in 3 microbatches, of 3, 3 and 2', 'in 1 microbatch of 8')
    """
    size = min(size, instances)
    full, rest = divmod(instances, size)
    if not rest:
        return f"in {full} microbatch{'es' * (full > 1)} of {size}"
    sizes = ", ".join([str(size)] * full) if full < 4 else f"{full} of {size}"
    return f"in {full + 1} microbatches, of {sizes} and {rest}"


def _build_model(cfg: TrainConfig, world: World) -> tuple[OLMo, Float8Converter | None]:
    """On its device, spread over the processes. Weights are drawn on the CPU, from cfg.seed, so
    that they do not depend on the device; then 8-bit products, then sharding or replication."""
    torch.manual_seed(cfg.seed)
    model = OLMo(cfg.model.update_with(init_device="cpu"))
    mask = choose_mask_type(cfg)
    attention = model.use_attention(world.device, cfg.autocast_precision, cfg.attention, mask)
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
    if how := parallelize(cfg, model, world):
        log.info(f"parallelism: {how}")
    return model, float8


def _build_optimizer(
    cfg: TrainConfig, model: OLMo, start: Start
) -> tuple[Optimizer, Scheduler, OLMo]:
    """With the checkpoint's weights and state, which each process reads its own share of. MS-AMP
    replaces model and optimizer."""
    optimizer, scheduler = build_optimizer(cfg, model), build_scheduler(cfg)
    checkpoint, step = start.checkpoint, start.state.global_step
    if checkpoint is not None:
        load_weights(model, checkpoint)
        log.info(f"weights: from {checkpoint.folder}")
    if cfg.use_msamp:
        model, optimizer = msamp.initialize(model, optimizer)
        if checkpoint is not None and checkpoint.optim is not None:
            raise ValueError(
                "use_msamp cannot load an optimizer's state; give --reset_optimizer_state"
            )
    if checkpoint is not None and checkpoint.optim is not None:
        load_optimizer_state(model, optimizer, checkpoint)
    elif checkpoint is not None and step > 0:
        scheduler = BoltOnWarmupScheduler.wrap(scheduler, step, step + int(cfg.scheduler.t_warmup))
        log.info(f"learning rate: a new warm-up from step {step}, for the optimizer starts afresh")
    start.checkpoint = None  # frees its memory
    return optimizer, scheduler, model


def _check_mixture(cfg: TrainConfig, state: TrainState, length: RunLength, total_size: int) -> None:
    """Raises ValueError for a run that is longer than the order of its mixture."""
    left, to_go = state.batches_left(total_size, length.batch_size), length.end - state.global_step
    if cfg.data.mixture and to_go > left:
        raise ValueError(
            f"{cfg.data.order_path}: expected {to_go} more steps of {length.batch_size} instances, "
            f"found {left}, since a mixture has no second epoch; make the order longer, or the run "
            "shorter (max_duration)"
        )


def _report_length(cfg: TrainConfig, state: TrainState, length: RunLength, total_size: int) -> None:
    to_go = max(length.last_step - state.global_step, 0)
    if not to_go:
        log.info(f"duration: nothing to do, all {state.global_step} steps are done")
        return
    tokens = state.global_train_tokens_seen + to_go * length.tokens_per_step
    begun = state.global_train_examples_seen_this_epoch / length.batch_size
    steps_per_epoch = total_size // length.batch_size
    epochs = max(state.epoch - (cfg.epoch or 0), 0) + (begun + to_go) / steps_per_epoch
    log.info(
        f"duration: steps {state.global_step + 1} to {length.last_step} "
        f"({format_count(tokens)} tokens, {epochs:.2f} epochs)"
    )


def _open_folder(
    cfg: TrainConfig,
    world: World,
    loader: TrainLoader,
    start: Start,
    source: Path | None,
    length: RunLength,
) -> list[Sink]:
    """The run's folder, cleared of what this start replaces; the sinks of its metrics."""
    folder, state, resumed = Path(cfg.save_folder), start.state, start.resumed
    step = state.global_step
    layout.remove_leftovers(folder)
    if cfg.save_overwrite and not cfg.dry_run:
        layout.remove_later_checkpoints(folder, step if resumed else -1, source)
    if not cfg.dry_run:
        for name in (FINISHED_FILE, PAUSED_FILE):
            (folder / name).unlink(missing_ok=True)
        cfg.save(folder / "config.yaml")
    if step < length.last_step and not cfg.dry_run:
        other_run = None if resumed or not step else source
        data = data_facts(cfg, loader.dataset, state, other_run)
        begin_segment(folder, world, step, resumed, data)
    kept: float | None = step if resumed else None
    sinks: list[Sink] = [
        JsonLines(folder, math.inf if cfg.dry_run else kept),
        Console(cfg.console_log_interval, length.last_step),
    ]
    if cfg.wandb is not None:
        sinks.append(WeightsAndBiases(cfg, resumed))
    if cfg.trackio is not None:
        sinks.append(Trackio(cfg, resumed))
    if cfg.tensorboard is not None:
        sinks.append(Tensorboard(cfg, step if resumed else None))
    return sinks
