"""Text to batches: sources, documents, tokens, their order, and what training reads."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "MemMapDataset": "memmap",
    "build_memmap_dataset": "memmap",
    "DataCollator": "batches",
    "IterableDataset": "batches",
    "build_train_dataloader": "batches",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    # Looked up when asked for, so that reading documents does not import torch.
    if name in _HOME:
        return getattr(importlib.import_module(f"olmo.data.{_HOME[name]}"), name)
    raise AttributeError(f"module 'olmo.data' has no attribute '{name}'")
