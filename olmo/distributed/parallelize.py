"""Activation checkpointing, sharding (FSDP2) and torch.compile, applied to a built model.

The model itself contains no word of any of them. docs/architecture.md lists all code that changes
the model from outside, in order.
"""

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

# Strategies, of checkpointing and of FSDP, that take every nth block, or all but every nth.
ONE_IN = {"one_in_two": 2, "one_in_three": 3, "one_in_four": 4, "one_in_five": 5, "one_in_eight": 8}
ALL_BUT_ONE_IN = {"two_in_three": 3, "three_in_four": 4}


def parallelize(cfg: TrainConfig, model: OLMo, world: World) -> str:
    """Change the model in place; returns a description for the log, empty if nothing was changed.

    The order matters: first checkpointing inside each block, then sharding, block by block and the
    root last, then compilation of the result. Names of parameters do not change.
    """
    done = []
    if cfg.activation_checkpointing is not None:
        checkpointed = _checkpointed_blocks(cfg.activation_checkpointing, cfg.model.n_layers)
        for i, block in enumerate(model.blocks()):
            if i in checkpointed:
                # Not checkpoint_wrapper: a wrapper would change the parameters' names.
                forward = partial(checkpoint, block.forward, use_reentrant=False)
                block.forward = forward  # type: ignore[method-assign]
        done.append(f"{len(checkpointed)} of {cfg.model.n_layers} blocks recomputed in backward")
    if is_fsdp(cfg, world):
        done.append(_shard(cfg, model, world))
    elif world.size > 1:
        done.append(f"{world.size} replicas, gradients averaged (ddp)")
    if cfg.compile is not None:
        tuning = cfg.compile.coordinate_descent_tuning
        model.compile(
            mode=cfg.compile.mode,
            fullgraph=cfg.compile.fullgraph,
            backend=cfg.compile.backend,
            # Static shapes: a smaller last microbatch is compiled separately. With torch's default
            # (None) a second shape would make it recompile for any size, with slower kernels.
            dynamic=bool(cfg.compile.dynamic),
            options={"coordinate_descent_tuning": True} if tuning else None,
        )
        done.append(f"compiled ({cfg.compile.mode or 'default'} mode, {cfg.compile.backend})")
    return ", ".join(done)


def is_fsdp(cfg: TrainConfig, world: World) -> bool:
    """Whether parameters are sharded over processes, rather than replicated."""
    if world.size == 1 or cfg.distributed_strategy != DistributedStrategy.fsdp:
        return False
    return cfg.fsdp is None or cfg.fsdp.sharding_strategy != ShardingStrategy.NO_SHARD


def _checkpointed_blocks(strategy: ActivationCheckpointingStrategy, n_layers: int) -> set[int]:
    """Indices of the blocks whose activations are recomputed in backward instead of kept."""
    if strategy in ONE_IN:
        return set(range(0, n_layers, ONE_IN[strategy]))
    kept = range(0, n_layers, ALL_BUT_ONE_IN[strategy]) if strategy in ALL_BUT_ONE_IN else ()
    return set(range(n_layers)).difference(kept)


def _shard(cfg: TrainConfig, model: OLMo, world: World) -> str:
    """Apply FSDP2 (Zhao et al. 2023, arXiv:2304.11277; `fully_shard`), or HSDP: replicas, each
    sharded over its own processes. Returns a description for the log.

    Raises:
        ValueError: the number of replicas does not divide that of processes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    fsdp = cfg.fsdp or FSDPConfig()
    replicas = 1
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
        mesh = init_device_mesh(world.device.type, grid, mesh_dim_names=("replicate", "shard"))
        description = f"{replicas} replicas, each sharded over {grid[1]} processes (HSDP)"
    else:
        mesh = init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
        description = f"sharded over {world.size} processes (FSDP2)"

    policy = MixedPrecisionPolicy()
    if fsdp.precision is not None and cfg.autocast_precision != torch.float32:
        low = cfg.autocast_precision
        reduced = low if fsdp.precision == FSDPPrecision.pure else torch.float32
        policy = MixedPrecisionPolicy(low, reduced)
        description += f", gathered in {low}, gradients reduced in {reduced}"
    # ZeRO-2: parameters stay gathered between forward and backward, which costs memory and saves an
    # all-gather.
    zero2 = (ShardingStrategy.SHARD_GRAD_OP, ShardingStrategy._HYBRID_SHARD_ZERO2)
    reshard = fsdp.sharding_strategy not in zero2
    for part in _fsdp_units(fsdp.wrapping_strategy, model):
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    return description.replace("torch.", "")


def _fsdp_units(strategy: FSDPWrapStrategy | None, model: OLMo) -> list[nn.Module]:
    """Modules whose parameters are gathered on their own; the root gathers all others.

    Embedding and head always stay with the root: a tied head reads the embedding's weight without
    calling the embedding, so an embedding of its own would not be gathered then.
    """
    if strategy is None:
        return []
    if strategy in (FSDPWrapStrategy.by_block_group, FSDPWrapStrategy.by_block_group_and_size):
        return list(model.transformer["block_groups"])
    blocks: list[nn.Module] = list(model.blocks())
    return blocks[:: ONE_IN.get(strategy, 1)]
