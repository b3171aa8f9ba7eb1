"""OLMo's names for seeds, ranks and where documents end.

The trainer itself seeds what it draws, where it draws it, and knows its rank from `World`.
"""

from __future__ import annotations

import os
import random

import numpy as np
import torch
import torch.distributed as dist


def seed_all(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators, on all devices."""
    seed = int(seed)
    if not 0 <= seed <= 2**32 - 1:
        raise ValueError(f"a seed is a number from 0 to 2**32 - 1, found {seed}")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


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


def get_cumulative_document_lengths(doc_lens: torch.Tensor) -> torch.Tensor:
    """Where documents begin and end in a batch laid end to end, (documents + 1,) int32.

    `doc_lens` is (B, most documents), each row padded with zeros.
    """
    ends = doc_lens[doc_lens != 0].cumsum(0, dtype=torch.int32)
    return torch.cat([ends.new_zeros(1), ends])
