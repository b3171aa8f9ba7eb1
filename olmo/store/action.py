"""Actions: a stage, its version, the parameters that change bytes, the digests of its inputs.

An action's key is the sha256 of these as canonical JSON. Paths, hosts, threads and times are not
part of it.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


def canonical_json(value: Any) -> bytes:
    """JSON that is the same for equal values: sorted keys, no spaces, UTF-8.

    Raises:
        ValueError: NaN, infinities, and types that JSON does not have.
    """
    _check_canonical(value, "action")
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode()


def _check_canonical(value: Any, where: str) -> None:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if not isinstance(name, str):
                raise ValueError(f"{where}: the key {name!r} is not a string")
            _check_canonical(inner, f"{where}.{name}")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            _check_canonical(inner, f"{where}[{index}]")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where}: {value} has no canonical form")
    elif not (value is None or isinstance(value, str | int | bool)):
        raise ValueError(f"{where}: a {type(value).__name__} has no canonical form: {value!r}")


@dataclass(frozen=True)
class Action:
    """A call of a stage; equal actions give equal bytes."""

    stage: str
    version: int
    params: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)  # name → digest, or a list of digests

    def as_dict(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "version": self.version,
            "params": self.params,
            "inputs": self.inputs,
        }

    @property
    def key(self) -> str:
        return hashlib.sha256(canonical_json(self.as_dict())).hexdigest()
