"""How often the paired test of `olmo scores` is wrong, on the answers of two seeds of one run.

    uv run python bench/paired.py eval/olmo-tiny eval/olmo-tiny-seed-2

False alarms: questions are drawn with replacement, and a coin exchanges the two seeds' answers to
each, so that neither is better; a test at 5 % should find a difference in 5 % of the draws.
Coverage: questions are drawn from those of the two seeds as they are; an interval of 95 % should
contain the difference on all of them in 95 % of the draws. Each share has its own 95 % interval
(Wilson's, of the draws). Beside the interval of olmo.eval.paired: the plain normal one, Student's,
Bonett
and Price's adjusted one (of right and wrong answers only), and scipy's bootstraps.
"""

import argparse
import functools
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars
from scipy import stats

from olmo.eval.paired import paired_difference

Interval = tuple[float, float]


def ours(a: np.ndarray, b: np.ndarray) -> Interval:
    found = paired_difference(a, b)
    return found.low, found.high


def plain(a: np.ndarray, b: np.ndarray, student: bool = False) -> Interval:
    changes = b - a
    law = stats.t(len(a) - 1) if student else stats.norm
    half = float(law.ppf(0.975)) * changes.std(ddof=1) / len(a) ** 0.5
    return changes.mean() - half, changes.mean() + half


def bonett_price(a: np.ndarray, b: np.ndarray) -> Interval:
    """The normal one, as if each run knew one more answer that the other does not."""
    more = np.append(b - a, (1, -1))
    half = 1.96 * more.std() / len(more) ** 0.5
    return more.mean() - half, more.mean() + half


def bootstrap(a: np.ndarray, b: np.ndarray, method: str = "percentile") -> Interval:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of draws without a spread
        found = stats.bootstrap((b - a,), np.mean, n_resamples=999, method=method, rng=0)
    return found.confidence_interval


METHODS: dict[str, Callable[[np.ndarray, np.ndarray], Interval]] = {
    "ours": ours,
    "normal": plain,
    "Student": functools.partial(plain, student=True),
    "Bonett": bonett_price,
    "percentile": bootstrap,
    "BCa": functools.partial(bootstrap, method="BCa"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs=2, type=Path, help="folders eval/<run> of two seeds")
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--sizes", type=int, nargs="+", default=[20, 50, 200], help="questions")
    args = parser.parse_args()
    one, two = (polars.read_parquet(run / "questions.parquet") for run in args.runs)
    both = one.join(two, on=["scorer", "task", "metric", "question"]).filter(scorer="ours")
    print(f"{'metric':9} {'questions':>9}  {'method':10} {'false alarms':>22} {'coverage':>22}")
    for (metric,), pairs in both.partition_by("metric", as_dict=True, maintain_order=True).items():
        a, b = (pairs[name].to_numpy() for name in ("value", "value_right"))
        for size in args.sizes:
            rng = np.random.default_rng(size)
            alarms, covered = ({name: 0 for name in METHODS} for _ in range(2))
            for _ in range(args.resamples):
                drawn, swapped = rng.integers(len(a), size=size), rng.random(size) < 0.5
                x, y = a[drawn], b[drawn]
                for name, method in METHODS.items():
                    low, high = method(np.where(swapped, y, x), np.where(swapped, x, y))
                    alarms[name] += not low <= 0 <= high
                    low, high = method(x, y)
                    covered[name] += low <= (b - a).mean() <= high
            for name in METHODS:
                shares = (format_share(of[name], args.resamples) for of in (alarms, covered))
                print(f"{metric:9} {size:9}  {name:10} {' '.join(shares)}", flush=True)


def format_share(hits: int, of: int) -> str:
    low, high = stats.binomtest(hits, of).proportion_ci(method="wilson")
    return f"{hits / of:7.1%} [{low:.1%}, {high:.1%}]".rjust(22)


if __name__ == "__main__":
    main()
