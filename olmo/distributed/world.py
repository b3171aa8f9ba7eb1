"""Processes that train together, and who this one is among them.

Sums over processes happen in an order that depends on nothing but their number, so that a run
that was interrupted goes on with the same bits.
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
from olmo.runtime.process import die_with_parent

T = TypeVar("T")

# How long a process waits for the others before it gives up. A dead one is noticed at once, by
# its closed connection; this is for a machine that is gone without a word, and for one that hangs
# where olmo.distributed.watchdog does not look: it looks first, and says more.
TIMEOUT = timedelta(minutes=10)
AFTER_WATCHDOG = timedelta(minutes=1)


@dataclass(frozen=True)
class World:
    """This process's place among those that train. All of them call its methods together."""

    rank: int  # among all, from 0 on
    local_rank: int  # on this machine: the number of its GPU
    size: int  # how many processes there are
    device: torch.device
    why: str  # the GPU's name, or why it is the CPU

    @property
    def is_rank0(self) -> bool:
        """Whether this is the process that writes and logs."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether it is so on any process."""
        if self.size == 1:
            return flag
        found = torch.tensor(int(flag))
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)

    def sum(self, value: Tensor) -> Tensor:
        """Over all processes; `value` stays as it is, so that it may be asked for again."""
        if self.size == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total

    def broadcast(self, value: T) -> T:
        """The first process's value, everywhere. For small plain objects."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather_first(self, value: T | None) -> T | None:
        """The value of the first process that has one, everywhere. For small plain objects."""
        if self.size == 1:
            return value
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return next((found for found in values if found is not None), None)

    def barrier(self) -> None:
        """Until all processes have come here."""
        if self.size > 1:
            dist.barrier()


def join_world(hang_timeout: float | None = None, alone: SingleGPUConfig | None = None) -> World:
    """This process's place: torchrun's, or alone. Opens the process group.

    `hang_timeout`: the watchdog's, in seconds. `alone` says on which device one process trains.

    Raises ValueError for a device that is not there.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    asked = None if alone is None else alone.get_device()
    if torch.cuda.is_available() and asked == torch.device("cpu"):
        device, why = asked, "single.device says so"
    elif torch.cuda.is_available():
        number = local_rank if asked is None or asked.index is None else asked.index
        device, why = torch.device("cuda", number), torch.cuda.get_device_name(number)
        torch.cuda.set_device(device)
    else:
        device, why = torch.device("cpu"), "torch sees no CUDA device"
    if size > 1:
        # Small things between hosts go by gloo, which does not wait for the device.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        limit = TIMEOUT if hang_timeout is None else timedelta(seconds=hang_timeout)
        dist.init_process_group(backend, timeout=max(limit, TIMEOUT) + AFTER_WATCHDOG)
    return World(rank, local_rank, size, device, why)


def leave_world(world: World) -> None:
    """Closes the process group."""
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


# Before there is a World, and for OLMo's users, who ask torch_util for these.


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

    FS_LOCAL_RANK says it; otherwise each node has its own file system, unless OLMO_SHARED_FS says
    that all share one.
    """
    shared = bool(os.environ.get("OLMO_SHARED_FS"))
    rank = get_global_rank() if shared else get_local_rank()
    return int(os.environ.get("FS_LOCAL_RANK") or rank)


def barrier() -> None:
    if is_distributed():
        dist.barrier()
