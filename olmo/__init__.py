"""From a list of text files to a language-model checkpoint one can trust."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {"TrainConfig": "olmo.config", "ModelConfig": "olmo.config", "OLMo": "olmo.model"}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    # Looked up when asked for: `import olmo` costs nothing.
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'olmo' has no attribute '{name}'")
