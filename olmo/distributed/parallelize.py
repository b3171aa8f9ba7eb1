"""How a model is spread over the processes: recomputed, sharded, compiled."""

from __future__ import annotations

import os
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from olmo.config import (
    ActivationCheckpointingStrategy,
    DistributedStrategy,
    FSDPConfig,
    FSDPPrecision,
    FSDPWrapStrategy,
    ShardingStrategy,
    TrainConfig,
)
from olmo.distributed.world import World
from olmo.model import OLMo


def parallelize(cfg: TrainConfig, model: OLMo, world: World) -> str:
    """Spread the model over the processes, in place; what was done, in words.

    The order matters: recompute inside a block first, then shard, block by block and the rest
    last, then compile what came of it. Names of parameters stay as they are.
    """
    done = []
    if cfg.activation_checkpointing is not None:
        chosen = _recomputed(cfg.activation_checkpointing, cfg.model.n_layers)
        for i, block in enumerate(model.blocks()):
            if i in chosen:
                recompute = partial(checkpoint, block.forward, use_reentrant=False)
                block.forward = recompute  # type: ignore[method-assign]
        done.append(f"{len(chosen)} of {cfg.model.n_layers} blocks recomputed in backward")
    if world.size == 1:
        done.append("one process")
    elif is_sharded(cfg, world):
        done.append(_shard(cfg, model, world))
    else:
        done.append(f"{world.size} replicas, gradients averaged (ddp)")
    if cfg.compile is not None:
        tuned = cfg.compile.coordinate_descent_tuning
        model.compile(
            mode=cfg.compile.mode,
            fullgraph=cfg.compile.fullgraph,
            backend=cfg.compile.backend,
            # Sizes are known before the first step; a last microbatch that is smaller is compiled
            # by itself. Kernels for any size, as torch makes when it meets a second, are slower.
            dynamic=bool(cfg.compile.dynamic),
            options={"coordinate_descent_tuning": True} if tuned else None,
        )
        done.append(f"compiled ({cfg.compile.mode or 'default'} mode, {cfg.compile.backend})")
    return ", ".join(done)


def is_sharded(cfg: TrainConfig, world: World) -> bool:
    """Whether parameters are split over processes, rather than kept whole by each."""
    if world.size == 1 or cfg.distributed_strategy != DistributedStrategy.fsdp:
        return False
    return cfg.fsdp is None or cfg.fsdp.sharding_strategy != ShardingStrategy.NO_SHARD


def _recomputed(strategy: ActivationCheckpointingStrategy, n_layers: int) -> set[int]:
    """Blocks whose activations are computed again in backward instead of kept."""
    kinds = ActivationCheckpointingStrategy
    one_in = {kinds.one_in_two: 2, kinds.one_in_three: 3, kinds.one_in_four: 4,
              kinds.one_in_eight: 8}  # fmt: skip
    all_but_one_in = {kinds.two_in_three: 3, kinds.three_in_four: 4}
    if strategy in one_in:
        return {i for i in range(n_layers) if i % one_in[strategy] == 0}
    if strategy in all_but_one_in:
        return {i for i in range(n_layers) if i % all_but_one_in[strategy] != 0}
    return set(range(n_layers))


def _shard(cfg: TrainConfig, model: OLMo, world: World) -> str:
    """FSDP2, on a line of processes or (HSDP) a grid of replicas of the line."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    fsdp = cfg.fsdp or FSDPConfig()
    kind, replicas = world.device.type, 1
    hybrid = (ShardingStrategy.HYBRID_SHARD, ShardingStrategy._HYBRID_SHARD_ZERO2)
    if fsdp.sharding_strategy in hybrid:
        hosts = world.size // int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
        replicas = fsdp.hybrid_sharding_num_model_replicas or hosts
        if world.size % replicas:
            raise ValueError(
                f"fsdp.hybrid_sharding_num_model_replicas={replicas} does not divide "
                f"{world.size} processes"
            )
    if replicas > 1:
        grid = (replicas, world.size // replicas)
        mesh = init_device_mesh(kind, grid, mesh_dim_names=("replicate", "shard"))
        words = f"{replicas} replicas, each sharded over {grid[1]} processes (HSDP)"
    else:
        mesh = init_device_mesh(kind, (world.size,), mesh_dim_names=("shard",))
        words = f"sharded over {world.size} processes (FSDP2)"

    policy = MixedPrecisionPolicy()
    if fsdp.precision is not None and cfg.autocast_precision != torch.float32:
        low = cfg.autocast_precision
        reduced = low if fsdp.precision == FSDPPrecision.pure else torch.float32
        policy = MixedPrecisionPolicy(low, reduced)
        words += f", gathered in {low}, gradients reduced in {reduced}"
    keeps = (ShardingStrategy.SHARD_GRAD_OP, ShardingStrategy._HYBRID_SHARD_ZERO2)
    reshard = fsdp.sharding_strategy not in keeps
    for part in _wrapped(fsdp.wrapping_strategy, model):
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    return words.replace("torch.", "")


def _wrapped(strategy: FSDPWrapStrategy | None, model: OLMo) -> list[nn.Module]:
    """What is gathered on its own; everything else goes with the root.

    The head reads a tied embedding from outside it, so that embedding and head stay with the
    root whatever the strategy says.
    """
    kinds = FSDPWrapStrategy
    blocks: list[nn.Module] = list(model.blocks())
    one_in = {kinds.one_in_two: 2, kinds.one_in_three: 3, kinds.one_in_four: 4,
              kinds.one_in_five: 5}  # fmt: skip
    if strategy is None:
        return []
    if strategy in (kinds.by_block_group, kinds.by_block_group_and_size):
        if "block_groups" not in model.transformer:
            raise ValueError(
                f"fsdp.wrapping_strategy={strategy} needs model.block_group_size above 1"
            )
        return list(model.transformer["block_groups"])
    return blocks[:: one_in.get(strategy, 1)]
