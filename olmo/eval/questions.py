"""What makes two questions the same, and suites: one number of several tasks."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

OURS, HARNESS = "ours", "lm-eval"  # scorers
Row = dict[str, Any]


def digest_question(requests: Iterable[Sequence[Any]], answer: Any) -> str:
    """16 hex digits of what a model is asked and of the right answer.

    Runs with other subsets, orders or tokenizers have the same digest for the same question.

    Args:
        requests: (context, continuation) of each option; of a generation (prompt, settings)
    """
    asked = json.dumps([[list(request) for request in requests], answer], default=str)
    return hashlib.sha256(asked.encode()).hexdigest()[:16]


class Part(NamedTuple):
    """A task in a suite, which adds `weight` · (value − chance) / (1 − chance)."""

    scorer: str
    task: str
    metric: str
    value: float
    chance: float
    weight: float  # all of a suite's sum to 1

    @property
    def scale(self) -> float:
        """What the suite's number changes by if the task's does by 1."""
        return self.weight / (1 - self.chance)


def score_suite(name: str, members: Sequence[Row], scores: Sequence[Row]) -> Row:
    """The row of a suite in results.json, with its `parts`.

    Each member counts the same. Of a pattern of tasks, the mean over them is one member.

    Args:
        members: rows with task (or a pattern), metric, scorer and chance
        scores: rows of results.json

    Raises ValueError for a member without a score, or for a score that counts twice.
    """
    parts: list[tuple[Part, Row]] = []
    for member in members:
        found = [
            row
            for row in scores
            if (row["scorer"], row["metric"]) == (member["scorer"], member["metric"])
            and fnmatch.fnmatchcase(row["task"], member["task"])
        ]
        if not found:
            known = [f"{row['scorer']} {row['task']} {row['metric']}" for row in scores]
            raise ValueError(
                f"suites.{name}: expected a score {member['metric']} of {member['task']} by "
                f"{member['scorer']}, found {', '.join(known[:8]) or 'no scores'}"
                f"{' …' if len(known) > 8 else ''}; name what `choices` and `harness` measure"
            )
        weight = 1 / len(members) / len(found)
        parts += [
            (Part(**(member | {"task": row["task"], "value": row["value"], "weight": weight})), row)
            for row in found
        ]
    twice = [str(key) for key, n in Counter(part[:3] for part, _ in parts).items() if n > 1]
    if twice:
        raise ValueError(
            f"suites.{name}: expected each score in one member, found {twice[0]} in several; "
            "correct their names or patterns"
        )
    errors = [part.scale * (math.nan if (e := row["stderr"]) is None else e) for part, row in parts]
    stderr = math.hypot(*errors)
    is_centred = any(part.chance for part, _ in parts)
    return {
        "scorer": "suite",
        "task": name,
        "metric": "centered score" if is_centred else "mean score",
        "value": sum(part.scale * (part.value - part.chance) for part, _ in parts),
        "stderr": None if math.isnan(stderr) else stderr,
        "documents": sum(row["documents"] or 0 for _, row in parts),
        "parts": [part._asdict() for part, _ in parts],
    }
