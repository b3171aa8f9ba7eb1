"""Processes: who we are among them, how the model is spread over them, how gradients meet.

Sums over processes happen in an order that depends on nothing but their number, so that a run
that was interrupted goes on with the same bits.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from olmo.config import DistributedStrategy, TrainConfig
from olmo.process import die_with_parent

T = TypeVar("T")

# How long a process waits for the others before it gives up. A dead one is noticed at once, by
# its closed connection; this is for one that hangs.
TIMEOUT = timedelta(minutes=10)

# Gradients travel together in pieces of about this many bytes.
BUCKET_BYTES = 32 * 2**20


@dataclass(frozen=True)
class World:
    rank: int
    local_rank: int
    size: int
    device: torch.device
    why: str

    @property
    def first(self) -> bool:
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether it is so on any process."""
        if self.size == 1:
            return flag
        found = torch.tensor(int(flag))
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)

    def sum(self, value: Tensor) -> Tensor:
        """Over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def tell_all(self, value: T) -> T:
        """The first process's value, everywhere. For small plain objects."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()


def join_world() -> World:
    """This process's place: torchrun's, or alone. Opens the process group."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    if torch.cuda.is_available():
        device, why = torch.device("cuda", local_rank), torch.cuda.get_device_name(local_rank)
        torch.cuda.set_device(device)
    else:
        device, why = torch.device("cpu"), "torch sees no CUDA device"
    if size > 1:
        # Small things between hosts go by gloo, which does not wait for the device.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT)
    return World(rank, local_rank, size, device, why)


def leave_world(world: World) -> None:
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def parallelize(cfg: TrainConfig, model: nn.Module, world: World) -> str:
    """Spread the model over the processes, in place; what was done, in words.

    The order matters: recompute inside a block first, then shard blocks, then compile.
    """
    strategy = cfg.distributed_strategy
    if world.size == 1:
        done = "one process, no sharding"
    elif strategy == DistributedStrategy.ddp:
        done = f"{world.size} replicas, gradients averaged (ddp)"
    else:
        raise ValueError(
            f"distributed_strategy={strategy} with {world.size} processes is not there yet; "
            "use --distributed_strategy=ddp"
        )
    if cfg.compile is not None:
        options: dict[str, Any] = cfg.compile.asdict()
        model.compile(**options)
        done += f", compiled ({cfg.compile.mode or 'default'} mode, {cfg.compile.backend})"
    return done


def average_gradients(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Make each gradient the mean over processes, in place."""
    if world.size == 1:
        return
    bucket: list[Tensor] = []
    size = 0
    for parameter in parameters:
        if parameter.grad is None:
            continue
        bucket.append(parameter.grad)
        size += parameter.grad.nbytes
        if size >= BUCKET_BYTES:
            _average(bucket, world)
            bucket, size = [], 0
    if bucket:
        _average(bucket, world)


def _average(gradients: list[Tensor], world: World) -> None:
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    flat /= world.size
    parts = flat.split([g.numel() for g in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
