"""In which type matrix products run."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from olmo.config import TrainConfig


def autocast(cfg: TrainConfig, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The context that matrix products run in: bf16 or fp16 where configured, on a CPU too."""
    dtype = cfg.autocast_precision
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)
