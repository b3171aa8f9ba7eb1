"""The order of a mixture: how many instances of each group of files, which, and when.

An ordinary order has each instance once. A mixture's takes of each group what its share asks for:
some instances never, others several times. Its shares are exact to one instance at the end,
and close to that on the way, since each group's instances are spread evenly.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from olmo.data.order import ORDER_DTYPE


def token_shares(
    weights: Sequence[float], sizes: Sequence[int], temperature: float | None = None
) -> np.ndarray:
    """The share of tokens of each group, (G,) float64 with the sum 1.

    It is the group's weight; with a temperature T, the weight times size^(1/T) (mT5,
    arXiv:2010.11934: its alpha is 1/T). So T = 1 makes a weight a factor of upsampling, and a
    larger T brings the groups closer together.

    >>> token_shares([3, 1], [10, 1000]).tolist()
    [0.75, 0.25]
    >>> token_shares([1, 1], [100, 10000], temperature=2).round(3).tolist()
    [0.091, 0.909]
    """
    shares = np.array(weights, np.float64)
    if temperature is not None:
        largest = max(sizes)  # so that no power overflows
        shares *= (np.array(sizes, np.float64) / largest) ** (1 / temperature)
    return shares / shares.sum()


def count_instances(shares: np.ndarray, total: int) -> np.ndarray:
    """Whole instances of each group, (G,) int64 with the sum `total`: none is off by one.

    >>> count_instances(np.array([0.5, 0.3, 0.2]), 7).tolist()
    [4, 2, 1]
    """
    exact = shares * total
    counts = np.floor(exact).astype(np.int64)
    by_remainder = np.argsort(counts - exact, kind="stable")
    counts[by_remainder[: total - counts.sum()]] += 1
    return counts


def mix_instances(
    groups: Sequence[np.ndarray], counts: Sequence[int], used: np.ndarray, seed: Sequence[int]
) -> np.ndarray:
    """The order of a mixture, uint32: `counts[g]` instances of `groups[g]`, spread evenly.

    Of a group those come first that were used least; among equals chance decides. The k-th of c
    instances of a group comes at a random time in the k-th of c equal parts of the whole.

    Args:
        groups: the instances of each group.
        used: how often each instance was used before, (n,); it is updated.
        seed: decides the order.
    """
    drawn, times = [], []
    for number, (group, count) in enumerate(zip(groups, counts, strict=True)):
        random = np.random.Generator(np.random.PCG64([*seed, number]))
        drawn.append(draw(group, count, used, random))
        times.append((np.arange(count) + random.random(count)) / max(count, 1))
    return np.concatenate(drawn)[np.argsort(np.concatenate(times), kind="stable")]


def draw(
    group: np.ndarray, count: int, used: np.ndarray, random: np.random.Generator
) -> np.ndarray:
    """`count` instances of a group, the least used first, uint32; `used` (n,) is updated."""
    drawn = [np.empty(0, ORDER_DTYPE)]
    while count:
        times = used[group]
        found = random.permutation(group[times == times.min()])[:count]
        used[found] += 1
        drawn.append(found.astype(ORDER_DTYPE))
        count -= len(found)
    return np.concatenate(drawn)
