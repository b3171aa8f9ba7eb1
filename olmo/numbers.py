"""Numbers at the edge: what no float holds, and what JSON has no word for."""

from __future__ import annotations

import json
import math
import re
from typing import Any

# As protobuf writes them in JSON, and as `float` reads them.
NOT_FINITE = {word: float(word) for word in ("Infinity", "-Infinity", "NaN")}
_STRINGS_AND_THESE = re.compile(r'"(?:[^"\\]|\\.)*"|-?Infinity|NaN')


def perplexity(loss: float) -> float:
    """e to the power of a loss in nats; inf where no float holds it, NaN of NaN.

    >>> perplexity(0.0), perplexity(1e4)
    (1.0, inf)
    """
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def to_json(value: Any, **options: Any) -> str:
    """`json.dumps`, but valid JSON of numbers that are not finite, too: they are words.

    >>> to_json({"loss": math.inf, "why": "NaN, as text"})
    '{"loss": "Infinity", "why": "NaN, as text"}'
    """
    text = json.dumps(value, **options)
    if not any(word in text for word in NOT_FINITE):
        return text
    return _STRINGS_AND_THESE.sub(lambda m: m[0] if m[0][0] == '"' else f'"{m[0]}"', text)


def from_json(text: str | bytes) -> Any:
    """What `to_json` wrote, with these numbers back: for what has no such words of its own.

    >>> from_json('{"loss": "Infinity", "of": "heldout"}')
    {'loss': inf, 'of': 'heldout'}
    """

    def back(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {k: NOT_FINITE.get(v, v) if isinstance(v, str) else v for k, v in pairs}

    return json.loads(text, object_pairs_hook=back)
