"""Checkpoints: OLMo's folder layout, written whole or not at all, and the pipeline's final one."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "save_unsharded": "save",
    "load": "read",
    "load_model": "read",
    "Checkpoint": "read",
    "convert": "conversion",
    "export": "final",
    "checkpoints": "layout",
    "verify": "layout",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"olmo.checkpoint.{_HOME[name]}"), name)
    raise AttributeError(f"module 'olmo.checkpoint' has no attribute '{name}'")
