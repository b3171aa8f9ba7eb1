"""The difference of two runs on the same questions: interval, p-value, least detectable effect.

Two runs answer the same questions, so what makes a question hard is hard for both. The difference
of each question does not contain it, and its mean has a smaller error than two means have apart
(Miller 2024, Adding Error Bars to Evals, arXiv:2411.00640, section 4.2).

Shapes: N questions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95
POWER = 0.8


class Estimate(NamedTuple):
    """A mean over questions, before an interval is made of it."""

    value: float
    variance: float
    freedom: float  # degrees of freedom of `variance`; inf: it is not estimated from a spread
    questions: int
    # What the adjustment for few right and wrong answers adds to both.
    moved: float = 0.0
    widened: float = 0.0


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
    """The mean difference, before an interval is made of it: for `combine`.

    Of right and wrong answers (0 and 1) the variance is Bonett and Price's (2012, Adjusted Wald
    confidence interval for a difference of binomial proportions based on paired data): as if each
    run knew one more answer that the other does not. Without it no interval is left where few
    questions tell the runs apart (bench/paired.py). Otherwise it is that of the differences, with
    Student's t.
    """
    before, after = _check(reference), _check(other)
    changes = after - before
    n, value = len(changes), float(np.mean(changes))
    if np.isin((before, after), (0, 1)).all():
        more = np.append(changes, (1.0, -1.0))
        plain, adjusted = float(np.var(changes)) / n, float(np.var(more)) / (n + 2)
        moved = float(np.mean(more)) - value
        return Estimate(value, plain, math.inf, n, moved, adjusted - plain)
    variance = float(np.var(changes, ddof=1)) / n if n > 1 else math.nan
    return Estimate(value, variance, n - 1, n)


def estimate_ratio_difference(reference: ArrayLike, other: ArrayLike, sizes: ArrayLike) -> Estimate:
    """Σ other / Σ sizes − Σ reference / Σ sizes, as of nats and bytes of N documents.

    The variance is the first-order one of a ratio: that of changeᵢ − ratio · sizeᵢ (Cochran 1977,
    Sampling Techniques, section 6.3).
    """
    changes, weights = _check(other) - _check(reference), _check(sizes)
    n, ratio = len(changes), float(changes.sum() / weights.sum())
    rest = (changes - ratio * weights) / weights.mean()
    variance = float(np.sum(rest**2)) / (n - 1) / n if n > 1 else math.nan
    return Estimate(ratio, variance, n - 1, n)


def combine(parts: Sequence[Estimate], weights: Sequence[float]) -> Estimate:
    """A weighted sum of independent estimates, as of a suite's tasks.

    The degrees of freedom are Welch and Satterthwaite's. The adjustment is that of the task where
    it weighs most: one more answer for each run, not one in each task.
    """
    pairs = list(zip(parts, weights, strict=True))
    variances = [w * w * part.variance for part, w in pairs]
    total = sum(variances)
    spread = sum(v * v / part.freedom for v, (part, _) in zip(variances, pairs, strict=True) if v)
    most, weight = max(pairs, key=lambda pair: pair[1] ** 2 * pair[0].widened)
    return Estimate(
        sum(w * part.value for part, w in pairs),
        total,
        total * total / spread if spread else math.inf,
        sum(part.questions for part in parts),
        weight * most.moved,
        weight**2 * most.widened,
    )


def with_interval(found: Estimate) -> Difference:
    """The interval, the p-value and the least detectable effect of an estimate.

    detectable = (quantile of 1 − α/2 + quantile of POWER) · standard error: Miller's section 5.
    """
    from scipy import stats

    value, variance, freedom, questions, moved, widened = found
    centre, stderr = value + moved, math.sqrt(variance + widened)
    if math.isnan(stderr):
        return Difference(value, math.nan, math.nan, math.nan, math.nan, math.nan, questions)
    law: Any = stats.norm if math.isinf(freedom) else stats.t(freedom)
    tail = float(law.ppf((1 + CONFIDENCE) / 2))
    # Without a spread, every question changed by the same amount.
    distance = abs(centre) / stderr if stderr else math.inf if centre else 0.0
    return Difference(
        value,
        stderr,
        centre - tail * stderr,
        centre + tail * stderr,
        float(2 * law.sf(distance)),
        (tail + float(law.ppf(POWER))) * stderr,
        questions,
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) p-values: below α for none of the true null hypotheses, in 1 − α of all cases.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
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
