"""Infinities and NaN: a perplexity that overflows, and JSON, which has no such numbers."""

from __future__ import annotations

import json
import math
from typing import Any

# The spelling of protobuf's JSON format; `float` reads it.
NON_FINITE = {word: float(word) for word in ("Infinity", "-Infinity", "NaN")}


def perplexity(loss: float) -> float:
    """exp(loss), of a loss in nats; inf if that overflows, NaN of NaN.

    >>> perplexity(0.0), perplexity(1e4)
    (1.0, inf)
    """
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def encode_non_finite(value: Any) -> Any:
    """A value for JSON, with infinities and NaN as strings.

    >>> encode_non_finite({"losses": [1.5, -math.inf, math.nan]})
    {'losses': [1.5, '-Infinity', 'NaN']}
    """
    if isinstance(value, float) and not math.isfinite(value):
        return {math.inf: "Infinity", -math.inf: "-Infinity"}.get(value, "NaN")
    if isinstance(value, dict):
        return {key: encode_non_finite(inner) for key, inner in value.items()}
    return (
        [encode_non_finite(inner) for inner in value] if isinstance(value, list | tuple) else value
    )


def to_json(value: Any, **options: Any) -> str:
    """`json.dumps`, but valid JSON (RFC 8259): infinities and NaN are strings."""
    return json.dumps(encode_non_finite(value), allow_nan=False, **options)


def from_json(text: str | bytes) -> Any:
    """Parse the output of `to_json`. The strings "NaN", "Infinity" and "-Infinity" become numbers.

    >>> from_json('{"loss": "Infinity", "of": "heldout"}')
    {'loss': inf, 'of': 'heldout'}
    """

    def back(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {k: NON_FINITE.get(v, v) if isinstance(v, str) else v for k, v in pairs}

    return json.loads(text, object_pairs_hook=back)
