"""The processes that train together, and this process's rank among them.

The order of a sum over processes depends on their number alone, so that an interrupted run
continues with the same bits.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from olmo.config import SingleGPUConfig
from olmo.runtime.process import die_with_parent, has_launcher

T = TypeVar("T")

# Limit of a collective operation. It is reached when a machine goes away without closing its
# connections (a dead process is noticed at once, by its closed connection), or when a process hangs
# outside the watchdog's view. The watchdog's report has the stacks, so its limit comes first.
TIMEOUT = timedelta(minutes=10)
AFTER_WATCHDOG = timedelta(minutes=1)


@dataclass(frozen=True)
class World:
    """This process's rank and device. Its methods are collective: all processes call them."""

    rank: int  # among all processes, from 0
    local_rank: int  # on this machine, from 0: the index of its GPU
    size: int  # number of processes
    device: torch.device
    device_note: str  # the GPU's name, or why the device is the CPU

    @property
    def is_rank0(self) -> bool:
        """Whether this is the process that writes and logs."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on at least one process."""
        if self.size == 1:
            return flag
        result = torch.tensor(int(flag))
        dist.all_reduce(result, dist.ReduceOp.MAX)
        return bool(result)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes; `value` itself is not changed."""
        if self.size == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on all processes. For small picklable objects."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather_first(self, value: T | None) -> T | None:
        """The value of the lowest rank that has one, on all processes. For small objects."""
        if self.size == 1:
            return value
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return next((v for v in values if v is not None), None)

    def barrier(self) -> None:
        """Wait until all processes have called this."""
        if self.size > 1:
            dist.barrier()


def join_world(hang_timeout: float | None = None, alone: SingleGPUConfig | None = None) -> World:
    """Read this process's rank from torchrun's environment, and open the process group.

    Args:
        hang_timeout: the watchdog's limit, in seconds.
        alone: the device, where a single process trains.

    Raises:
        ValueError: the device does not exist.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if has_launcher():
        die_with_parent()
    configured = None if alone is None else alone.get_device()
    if torch.cuda.is_available() and configured == torch.device("cpu"):
        device, note = configured, "set by single.device"
    elif torch.cuda.is_available():
        number = local_rank if configured is None or configured.index is None else configured.index
        device, note = torch.device("cuda", number), torch.cuda.get_device_name(number)
        torch.cuda.set_device(device)
    else:
        device, note = torch.device("cpu"), "torch sees no CUDA device"
    if size > 1:
        # CPU tensors and objects are sent by gloo, which does not wait for the GPU.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        limit = TIMEOUT if hang_timeout is None else timedelta(seconds=hang_timeout)
        dist.init_process_group(backend, timeout=max(limit, TIMEOUT) + AFTER_WATCHDOG)
    return World(rank, local_rank, size, device, note)


def leave_world(world: World) -> None:
    """Close the process group."""
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


# OLMo's functions (olmo.torch_util): for its users, and for code that runs without a World.


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def get_global_rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def get_local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK") or 0)


def get_fs_local_rank() -> int:
    """The rank among the processes that share a file system.

    It is FS_LOCAL_RANK where that is set. Otherwise each node is taken to have a file system of its
    own, or all one if OLMO_SHARED_FS is set.
    """
    shared = bool(os.environ.get("OLMO_SHARED_FS"))
    rank = get_global_rank() if shared else get_local_rank()
    return int(os.environ.get("FS_LOCAL_RANK") or rank)


def barrier() -> None:
    if is_distributed():
        dist.barrier()
