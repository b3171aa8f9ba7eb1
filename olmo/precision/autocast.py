"""Mixed precision: the dtype that matrix products run in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from olmo.config import TrainConfig


def autocast_context(cfg: TrainConfig, device: torch.device) -> AbstractContextManager[Any]:
    """The autocast context for cfg.precision: bfloat16 or float16, on a CPU too, or none (fp32)."""
    dtype = cfg.autocast_precision
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)
