"""The difference of two runs on the same questions: interval, p-value, least detectable effect.

Two runs answer the same questions, so what makes a question hard is hard for both. The difference
of each question does not contain it, and its mean has a smaller error than two means have apart
(Miller 2024, Adding Error Bars to Evals, arXiv:2411.00640, section 4.2).

Shapes: N questions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95
POWER = 0.8


class Estimate(NamedTuple):
    """A mean difference over questions, or a ratio, for `combine` and `with_interval`."""

    value: float
    below: float  # to the interval's lower end
    above: float  # to its upper end
    plain: float  # to both ends of the interval that only the questions' spread gives
    p: float  # two-sided
    freedom: float  # degrees of freedom; inf: the normal distribution
    questions: int


class Difference(NamedTuple):
    """A mean difference with its error. NaN: one question alone has no error."""

    value: float
    stderr: float
    low: float
    high: float
    """The interval has 0 in it if and only if `p` is above 1 − CONFIDENCE."""

    p: float  # two-sided
    detectable: float
    """The least true difference that such questions find in POWER of all cases."""

    questions: int


def paired_difference(reference: ArrayLike, other: ArrayLike) -> Difference:
    """Mean of `other` − `reference`, scores (N,) of the same questions in the same order.

    Raises ValueError for no questions, or for scores that are not finite.
    """
    return with_interval(estimate_difference(reference, other))


def estimate_difference(reference: ArrayLike, other: ArrayLike) -> Estimate:
    """The mean difference, for `combine`.

    Of right and wrong answers (0 and 1) the test is McNemar's, and the interval Tango's (1998,
    Equivalence test and confidence interval for the difference in proportions for the paired-sample
    design), which has the same answer. It is an interval even where no question tells the runs
    apart, and the others are not (bench/paired.py). Other scores have Student's paired ones.
    """
    before, after = _check(reference), _check(other)
    changes = after - before
    if np.isin((before, after), (0, 1)).all():
        better, worse = int((changes > 0).sum()), int((changes < 0).sum())
        return _compare_right_answers(better, worse, len(changes))
    n, value = len(changes), float(np.mean(changes))
    variance = float(np.var(changes, ddof=1)) / n if n > 1 else math.nan
    return _estimate(value, variance, n)


def estimate_ratio(amounts: ArrayLike, sizes: ArrayLike) -> Estimate:
    """Σ amounts / Σ sizes, as of nats and bytes of N documents; of nats' changes, a difference.

    The variance is the first-order one of a ratio: that of amountᵢ − ratio · sizeᵢ (Cochran 1977,
    Sampling Techniques, section 6.3).
    """
    sums, weights = _check(amounts), _check(sizes)
    n, ratio = len(sums), float(sums.sum() / weights.sum())
    rest = (sums - ratio * weights) / weights.mean()
    variance = float(np.sum(rest**2)) / (n - 1) / n if n > 1 else math.nan
    return _estimate(ratio, variance, n)


def combine(parts: Sequence[Estimate], weights: Sequence[float]) -> Estimate:
    """A weighted sum of independent estimates, as of a suite's tasks.

    The distances to the intervals' ends add like standard errors do. Of what an interval is wider
    than the plain one, since few questions changed, only the task's counts for which it is most:
    in all tasks together many have changed, and 22 such additions would hide a difference.
    """
    pairs = list(zip(parts, weights, strict=True))
    value = sum(w * part.value for part, w in pairs)
    plain = math.hypot(*(w * part.plain for part, w in pairs))

    def add(ends: Sequence[float]) -> float:
        wider = max(
            w * w * (end**2 - part.plain**2) for end, (part, w) in zip(ends, pairs, strict=True)
        )
        return math.sqrt(max(0.0, plain**2 + wider))

    below = add([part.below if w > 0 else part.above for part, w in pairs])
    above = add([part.above if w > 0 else part.below for part, w in pairs])
    p = _two_sided(value, (below if value > 0 else above) / _quantile(), math.inf)
    return Estimate(value, below, above, plain, p, math.inf, sum(one.questions for one in parts))


def with_interval(found: Estimate) -> Difference:
    """The interval and the least detectable effect of an estimate.

    stderr is half the interval in units of its quantile; detectable = (quantile of 1 − α/2 +
    quantile of POWER) · stderr (Miller 2024, section 5).
    """
    stderr = (found.below + found.above) / 2 / _quantile(found.freedom)
    return Difference(
        found.value,
        stderr,
        found.value - found.below,
        found.value + found.above,
        found.p,
        (_quantile(found.freedom) + _quantile(found.freedom, POWER)) * stderr,
        found.questions,
    )


def _estimate(value: float, variance: float, n: int) -> Estimate:
    """Student's interval and test of a mean over n questions."""
    if math.isnan(variance):
        nan = math.nan
        return Estimate(value, nan, nan, nan, nan, math.inf, n)
    stderr = math.sqrt(variance)
    half = _quantile(n - 1) * stderr
    return Estimate(value, half, half, half, _two_sided(value, stderr, n - 1), n - 1, n)


def _compare_right_answers(better: int, worse: int, n: int) -> Estimate:
    """McNemar's test and Tango's interval, of n questions of which so many changed."""
    from scipy.optimize import brentq

    value, limit = (better - worse) / n, _quantile()

    def distance(true: float) -> float:
        """In standard errors, if `true` is the difference: its likeliest share of worse ones."""
        b = (2 * n - better + worse) * true - better - worse
        share = (math.sqrt(b * b + 8 * n * worse * true * (1 - true)) - b) / (4 * n)
        error = math.sqrt(max(0.0, n * (2 * share + true * (1 - true))))
        return n * (value - true) / error if error else 0.0

    edge = 1 - 1e-9
    is_low, is_high = distance(-edge) > limit, distance(edge) < -limit
    low = brentq(lambda true: distance(true) - limit, -edge, value) if is_low else -1.0
    high = brentq(lambda true: distance(true) + limit, value, edge) if is_high else 1.0
    p = _two_sided(better - worse, math.sqrt(better + worse), math.inf)
    plain = limit * math.sqrt(max(0.0, better + worse - n * value**2)) / n
    return Estimate(value, value - low, high - value, plain, p, math.inf, n)


def _two_sided(value: float, stderr: float, freedom: float) -> float:
    """The p-value; without a spread every question changed by the same amount."""
    from scipy import special

    distance = abs(value) / stderr if stderr else math.inf if value else 0.0
    lower = special.ndtr if math.isinf(freedom) else functools.partial(special.stdtr, freedom)
    return float(2 * lower(-distance))


def _quantile(freedom: float = math.inf, share: float = (1 + CONFIDENCE) / 2) -> float:
    from scipy import special

    if math.isinf(freedom):
        return float(special.ndtri(share))
    return float(special.stdtrit(freedom, share))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) p-values: below α for none of the true null hypotheses, in 1 − α of all cases.

    A p-value that is NaN stays one, and is not counted.
    """
    order = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    adjusted, highest = [math.nan] * len(p_values), 0.0
    for rank, (p, i) in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p))
        adjusted[i] = highest
    return adjusted


def _check(scores: ArrayLike) -> NDArray[np.float64]:
    found = np.asarray(scores, dtype=np.float64)
    if not len(found) or not np.isfinite(found).all():
        raise ValueError(
            f"expected finite scores of at least one question, found {len(found)} with "
            f"{int((~np.isfinite(found)).sum())} that are not finite"
        )
    return found
