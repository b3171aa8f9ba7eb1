"""OLMo's functions for seeds, ranks and document boundaries.

Our trainer seeds each generator where it uses it, and takes its rank from `World`.
"""

from __future__ import annotations

import random

import numpy as np
import torch

from olmo.distributed.world import barrier as barrier
from olmo.distributed.world import get_fs_local_rank as get_fs_local_rank
from olmo.distributed.world import get_global_rank as get_global_rank
from olmo.distributed.world import get_local_rank as get_local_rank
from olmo.distributed.world import get_world_size as get_world_size
from olmo.distributed.world import is_distributed as is_distributed


def seed_all(seed: int) -> None:
    """Seed the generators of Python, numpy and torch on all devices; ValueError beyond 32 bits."""
    seed = int(seed)
    if not 0 <= seed <= 2**32 - 1:
        raise ValueError(f"expected a seed from 0 to 2**32 - 1, found {seed}")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def get_cumulative_document_lengths(doc_lens: torch.Tensor) -> torch.Tensor:
    """Document boundaries in a batch laid end to end, (documents + 1,) int32, from 0.

    `doc_lens` is (B, most documents), each row padded with zeros.
    """
    ends = doc_lens[doc_lens != 0].cumsum(0, dtype=torch.int32)
    return torch.cat([ends.new_zeros(1), ends])
