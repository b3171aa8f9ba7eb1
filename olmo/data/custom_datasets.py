"""Training data from the user's own code instead of token files."""

from __future__ import annotations

import importlib
from typing import Any

from olmo.config import TrainConfig


def build_custom_dataset(train_config: TrainConfig) -> Any:
    """The object that data.custom_dataset names: a sequence of items, the same at every call.

    Raises ValueError if its code cannot be imported.
    """
    custom = train_config.data.custom_dataset
    assert custom is not None
    module, name = custom.module, custom.name
    if module is None:
        module, name = extract_module_and_class(name)
    return import_object(name, module)(**(custom.args or {}))


def extract_module_and_class(name: str) -> tuple[str | None, str]:
    """Split a dotted name into its module, None where there is no dot, and its last part.

    >>> extract_module_and_class("reader.Chats")
    ('reader', 'Chats')
    """
    module, _, last = name.rpartition(".")
    return module or None, last


def import_object(name: str, module: str | None) -> Any:
    """Import `name` from `module`. Raises ValueError if either is missing."""

    if module is None:
        raise ValueError(
            f"data.custom_dataset: '{name}' has no module; set data.custom_dataset.module, or "
            "write the name with its module: package.module.Name"
        )
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"data.custom_dataset: no {name} in {module}: {error}") from error
