"""OLMo's own safetensors files: keys are base64 of a pickled (path, whether the value is pickled).

Decoded by an unpickler that knows no names at all, so that only plain values can come out.
"""

from __future__ import annotations

import base64
import binascii
import io
import pickle
from collections.abc import Mapping
from typing import Any

from torch import Tensor


class _Plain(pickle.Unpickler):
    """Numbers, text, tuples, lists, dictionaries; nothing that has to be looked up."""

    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"the file asks for {module}.{name}, which is not run")


def is_encoded(key: str) -> bool:
    """Whether a key is a pickle in base64 rather than a parameter's name."""
    try:
        return base64.urlsafe_b64decode(key).startswith(b"\x80")
    except (binascii.Error, ValueError):
        return False


def decode(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The nested dictionary that the keys' paths describe.

    Raises ValueError for what is not plain.
    """
    nested: dict[str, Any] = {}
    for key, value in tensors.items():
        path, pickled = _load(base64.urlsafe_b64decode(key))
        *parents, last = path
        place = nested
        for name in parents:
            place = place.setdefault(name, {})
        place[last] = _load(value.numpy().tobytes()) if pickled else value
    return nested


def _load(data: bytes) -> Any:
    try:
        return _Plain(io.BytesIO(data)).load()
    except (pickle.UnpicklingError, EOFError, IndexError, TypeError) as error:
        raise ValueError(f"a key or value is no plain pickle: {error}") from error
