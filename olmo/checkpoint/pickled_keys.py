"""OLMo's own safetensors files: a key is base64 of a pickled (path, whether the value is pickled).

The unpickler here imports nothing, so that a file yields plain values only.
"""

from __future__ import annotations

import base64
import binascii
import io
import pickle
from collections.abc import Mapping
from typing import Any

from torch import Tensor


class _PlainUnpickler(pickle.Unpickler):
    """Numbers, text, tuples, lists and dictionaries; nothing that needs an import."""

    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"the file would import {module}.{name}, which is not allowed")


def is_encoded_key(key: str) -> bool:
    """Whether a key is a pickle in base64 rather than a parameter's name."""
    try:
        return base64.urlsafe_b64decode(key).startswith(b"\x80")
    except (binascii.Error, ValueError):
        return False


def decode_state(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The nested dictionary that the keys' paths describe. Raises ValueError for other objects."""
    nested: dict[str, Any] = {}
    for key, value in tensors.items():
        path, pickled = _load(base64.urlsafe_b64decode(key))
        *parents, last = path
        parent = nested
        for name in parents:
            parent = parent.setdefault(name, {})
        parent[last] = _load(value.numpy().tobytes()) if pickled else value
    return nested


def _load(data: bytes) -> Any:
    try:
        return _PlainUnpickler(io.BytesIO(data)).load()
    except (pickle.UnpicklingError, EOFError, IndexError, TypeError) as error:
        raise ValueError(f"expected a pickle of plain values, found {error}") from error
