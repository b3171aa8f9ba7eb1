"""Which of many candidates move a number, when only the effect of a whole group can be measured.

Groups are halved (Dorfman 1943; Hwang 1972): a group without an effect is done with after one test.
Halves are of equal weight, not of equal size, so a strong suspect is soon alone.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain, count

Group = list[list[int]]  # candidates by step; of a step the most suspicious first


@dataclass
class Search:
    """What a search has found."""

    effects: dict[int, float] = field(default_factory=dict)  # of the candidates tested alone
    spent: int = 0
    tests: int = 0
    is_complete: bool = True  # the budget was enough


def find_guilty(
    groups: Sequence[Group],
    effect: Callable[[list[int]], float],
    cost: Callable[[list[int]], int],
    score: Callable[[int], float],
    *,
    threshold: float,
    suspicious: float,
    budget: int,
) -> Search:
    """Halve groups, those of the largest effect first, until the guilty are alone.

    A group whose effect is not above `threshold` is set aside, but for one that has a candidate
    whose `score` is above `suspicious`: what the others of its group do may hide its effect. Such a
    group comes after those with an effect. If an effect of a group is never smaller than that of
    its parts, and the budget is enough, all whose effect is above the threshold are found.

    Args:
        groups: where the search begins; each is tested as a whole
        effect: of a group, measured
        cost: of that measurement, in the unit of `budget`
    """
    search, number = Search(), count()
    heap: list[tuple[bool, float, int, Group]] = []

    def test(group: Group) -> None:
        members = list(chain(*group))
        if search.spent + cost(members) > budget:
            search.is_complete = False
            return
        search.spent += cost(members)
        search.tests += 1
        found = effect(members)
        highest = max(map(score, members))
        if len(members) == 1:
            search.effects[members[0]] = found
        elif found > threshold:
            heapq.heappush(heap, (False, -found, next(number), group))
        elif highest > suspicious:
            heapq.heappush(heap, (True, -highest, next(number), group))

    for group in groups:
        if group:
            test(group)
    while heap:
        for half in halve(heapq.heappop(heap)[-1], score):
            test(half)
    return search


def halve(group: Group, score: Callable[[int], float]) -> tuple[Group, Group]:
    """Two parts of about equal weight, 1 + score² summed: between steps, or within a single one.

    >>> halve([[1, 2], [3]], float), halve([[9, 1, 2, 3]], float)
    (([[1, 2]], [[3]]), ([[9]], [[1, 2, 3]]))
    """
    parts: Group = group if len(group) > 1 else [[one] for one in group[0]]
    weights = [sum(1 + score(one) ** 2 for one in part) for part in parts]
    at = min(range(1, len(parts)), key=lambda n: abs(sum(weights[:n]) - sum(weights[n:])))
    first, last = parts[:at], parts[at:]
    return (first, last) if len(group) > 1 else ([list(chain(*first))], [list(chain(*last))])
