"""The loss of a model by its size and its tokens, and the interval of a prediction.

The law is that of Hoffmann et al. 2022 (arXiv:2203.15556) with one exponent for both terms,

    loss = E + A / N**g + B / D**g,

since the two that were measured are nearly equal (Besiroglu et al. 2024, arXiv:2404.10102: 0.35 and
0.37), and a ladder has few runs. Given g it is linear: g is searched on a grid, and the rest is
least squares, which has one minimum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

EXPONENTS = np.geomspace(0.01, 3.0, 100)
# The correlation of the deviations of two runs of one size, which share seed, trunk and settings.
# It is assumed, since a few sizes cannot tell it: with less of it the intervals are too wide, with
# more too narrow.
SHARED = 0.8


@dataclass(frozen=True)
class Point:
    """The last held-out loss of a run.

    Fields:
        size: the runs of one size share a trunk
        parameters: without embeddings
        loss: nats a token
    """

    size: str
    parameters: int
    tokens: int
    loss: float


@dataclass(frozen=True)
class Interval:
    """A predicted loss, and between what a new run's lies."""

    low: float
    loss: float
    high: float

    def contains(self, loss: float) -> bool:
        return self.low <= loss <= self.high


def count_numbers(runs: Sequence[tuple[int, int]]) -> int:
    """How many numbers the law of these runs has, (parameters, tokens) of each.

    They are g, E, A, and B if the runs are of more than one multiple.
    """
    ratios = [tokens / parameters for parameters, tokens in runs]
    return 4 if max(ratios) > 1.05 * min(ratios) else 3  # but for rounding


class Law:
    """The law that fits runs best.

    Fields:
        exponent, irreducible, of_parameters, of_tokens: g, E, A and B. B is 0 where the tokens are
            the same multiple of the parameters in all runs, and A has both terms.
        noise: standard deviation of a run's loss from the law, in nats

    Raises:
        ValueError: fewer runs than the law has numbers, or runs of one size only.
    """

    def __init__(self, points: Sequence[Point]) -> None:
        self.points = points
        self.sizes = np.array([point.parameters for point in points], dtype=np.float64)
        self.tokens = np.array([point.tokens for point in points], dtype=np.float64)
        numbers = count_numbers([(point.parameters, point.tokens) for point in points])
        self.has_tokens = numbers == 4
        self.freedom = len(points) - numbers
        self.groups = len({point.size for point in points})
        if self.freedom < 1 or self.groups < 2:
            raise ValueError(
                f"expected runs of at least two sizes, and more than {len(points) - self.freedom} "
                f"runs, as many as the law has numbers; found {len(points)} of {self.groups} sizes"
            )
        same = np.array([[float(a.size == b.size) for a in points] for b in points])
        shared = SHARED * same + (1 - SHARED) * np.eye(len(points))
        # Multiplied by it, all deviations have the same variance and no correlation.
        self.whiten = np.linalg.inv(np.linalg.cholesky(shared))
        self.losses = self.whiten @ np.array([point.loss for point in points])
        coarse = self._solve(EXPONENTS)[1]
        near = EXPONENTS[max(0, int(coarse.argmin()) - 1) :][:3]
        self.exponents = np.union1d(EXPONENTS, np.geomspace(near[0], near[-1], 40))
        self.found, self.squares, self.inverses = self._solve(self.exponents)
        self.best = int(self.squares.argmin())
        self.exponent = float(self.exponents[self.best])
        self.noise = float(np.sqrt(self.squares[self.best] / self.freedom))
        found = self.found[self.best] / self.exponent
        self.of_parameters = float(found[1] * self._middle(self.sizes))
        self.of_tokens = float(found[2] * self._middle(self.tokens)) if self.has_tokens else 0.0
        self.irreducible = float(self.found[self.best, 0] - found[1:].sum())

    def _middle(self, values: Floats) -> float:
        return float(np.exp(np.log(values).mean()) ** self.exponent)

    def _terms(self, exponents: Floats, sizes: Floats, tokens: Floats) -> Floats:
        """Of each exponent and run the terms of the linear part: (exponents, runs, terms).

        They are 1 and (x**-g - 1) / g, which is -log(x) for g = 0.
        """
        terms = [np.ones((len(exponents), len(sizes)))]
        for values, known in ((sizes, self.sizes), (tokens, self.tokens))[: 1 + self.has_tokens]:
            logs = np.log(values) - np.log(known).mean()
            terms.append(np.expm1(-exponents[:, None] * logs) / exponents[:, None])
        return np.stack(terms, axis=-1)

    def _solve(self, exponents: Floats) -> tuple[Floats, Floats, Floats]:
        """Of each exponent: coefficients, sum of squared deviations, inverse normal matrix."""
        terms = self.whiten @ self._terms(exponents, self.sizes, self.tokens)
        turned = terms.swapaxes(1, 2)
        inverses = np.linalg.pinv(turned @ terms).astype(np.float64)
        found = (inverses @ turned @ self.losses[:, None])[..., 0]
        deviations = self.losses - (terms @ found[..., None])[..., 0]
        return found, (deviations**2).sum(axis=1), inverses

    def loss(self, parameters: float, tokens: float) -> float:
        """The law's loss, in nats a token."""
        terms = self._terms(np.array([self.exponent]), np.array([parameters]), np.array([tokens]))
        return float(terms[0, 0] @ self.found[self.best])

    def predict(self, parameters: float, tokens: float, confidence: float) -> Interval:
        """The loss of one run of another size, and between what it lies at this confidence.

        The interval is of all losses that, put beside the runs as one more, would raise the least
        sum of squares by no more than Student's t allows. For a linear law that is the textbook's
        prediction interval. It has the deviation of the new run and the errors of all numbers of
        the law, and does not take the law for linear in g.
        """
        from scipy import stats

        # Runs of one size are not independent: no more degrees of freedom than sizes.
        quantile = float(stats.t.ppf((1 + confidence) / 2, min(self.freedom, self.groups)))
        allowed = self.squares[self.best] + (quantile * self.noise) ** 2 - self.squares
        terms = self._terms(self.exponents, np.array([parameters]), np.array([tokens]))[:, 0]
        losses = (terms * self.found).sum(axis=1)
        spread = 1 + np.einsum("gi,gij,gj->g", terms, self.inverses, terms)
        halves = np.sqrt(np.maximum(allowed, 0) * spread)
        low, high = ((losses + s * halves)[allowed >= 0] for s in (-1, 1))
        return Interval(float(low.min()), self.loss(parameters, tokens), float(high.max()))


def leave_out(points: Sequence[Point], confidence: float) -> list[tuple[Point, Interval]]:
    """Each run, and what the runs of the other sizes predict for it; [] if these are too few."""
    found = []
    for point in points:
        others = [other for other in points if other.size != point.size]
        try:
            law = Law(others)
        except ValueError:
            return []
        found.append((point, law.predict(point.parameters, point.tokens, confidence)))
    return found
