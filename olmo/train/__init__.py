"""The trainer: `torchrun --nproc_per_node=N -m olmo.train CONFIG [--key=value]`."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "train":
        from olmo.train.loop import train

        return train
    raise AttributeError(f"module 'olmo.train' has no attribute '{name}'")
