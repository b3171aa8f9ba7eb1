"""The paired test beside scipy's bootstrap, on the answers of two seeds of olmo-tiny.

two_seeds.csv: the 200 questions of stdlib_docstrings, each with both checkpoints' scores (of
olmo-tiny, and with seed=2 data.seed=2), as eval/<run>/questions.parquet had them on 2026-12-01.
"""

import math
from pathlib import Path

import numpy as np
import polars
import pytest
from scipy import stats

from olmo.eval.paired import (
    Difference,
    combine,
    estimate_difference,
    estimate_ratio,
    holm,
    paired_difference,
    with_interval,
)
from olmo.eval.questions import digest_question, score_suite

METRICS = ("acc", "len_norm", "bpb")
FILE = Path(__file__).with_name("two_seeds.csv")


def answers(metric: str) -> tuple[np.ndarray, np.ndarray]:
    frame = polars.read_csv(FILE)
    return frame[metric].to_numpy(), frame[f"{metric}_2"].to_numpy()


def near(found: Difference, low: float, high: float, share: float) -> None:
    """Both ends are within a share of the interval's width."""
    assert [found.low, found.high] == pytest.approx([low, high], abs=share * (high - low))


@pytest.mark.parametrize("metric", METRICS)
def test_against_a_bootstrap(metric: str) -> None:
    before, after = answers(metric)
    expected = stats.bootstrap(
        (before, after),
        lambda a, b, axis: np.mean(b, axis=axis) - np.mean(a, axis=axis),
        paired=True,
        method="percentile",
        rng=0,
    )
    found = paired_difference(before, after)
    assert found.questions == 200
    assert found.value == pytest.approx(after.mean() - before.mean())
    near(found, *expected.confidence_interval, share=0.03 if metric == "bpb" else 0.2)
    # Of right and wrong answers wider, as bench/paired.py shows it must be.
    rel = 0.03 if metric == "bpb" else 0.3
    assert found.stderr == pytest.approx(expected.standard_error, rel=rel)
    # What two independent sets of questions would need is wider by far.
    apart = math.hypot(before.std(ddof=1), after.std(ddof=1)) / math.sqrt(200)
    assert found.stderr < 0.5 * apart


def test_mcnemars_test_and_tangos_interval() -> None:
    """Of 50 questions one run alone knows 5, the other alone none: limits beside a fine search."""
    before, after = np.zeros(50), np.zeros(50)
    after[:5] = 1
    found = paired_difference(before, after)
    assert found.p == pytest.approx(float(stats.chi2.sf(25 / 5, 1)))  # McNemar 1947
    for limit in (found.low, found.high):
        # The likeliest share of questions that only the first knows, by a search of its own.
        shares = np.linspace(max(0.0, -limit), (1 - limit) / 2, 200_001)[1:-1]
        likely = 5 * np.log(shares + limit) + 45 * np.log1p(-2 * shares - limit)
        share = shares[int(np.argmax(likely))]
        error = math.sqrt(50 * (2 * share + limit - limit**2))
        assert abs(5 - 50 * limit) / error == pytest.approx(1.96, abs=2e-3)


def test_students_own_test() -> None:
    before, after = answers("bpb")
    expected = stats.ttest_rel(after[:9], before[:9])
    found = paired_difference(before[:9], after[:9])
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval()))


@pytest.mark.parametrize("metric", METRICS)
def test_false_alarms_of_two_seeds(metric: str) -> None:
    """A coin exchanges the seeds' answers to each question: then neither is better."""
    before, after = answers(metric)
    rng = np.random.default_rng(22)
    alarms = 0
    for _ in range(200):
        drawn, swapped = rng.integers(200, size=200), rng.random(200) < 0.5
        x, y = before[drawn], after[drawn]
        found = paired_difference(np.where(swapped, y, x), np.where(swapped, x, y))
        alarms += found.p < 0.05
        assert (found.p < 0.05) == (not found.low <= 0 <= found.high)
    low, high = stats.binomtest(alarms, 200).proportion_ci(method="wilson")
    assert low <= 0.05 <= high, f"{alarms} of 200"


def test_few_right_answers_leave_an_interval() -> None:
    """Of 20 questions none tells the runs apart: that is no proof that they are equal."""
    same = paired_difference([0, 1] * 10, [0, 1] * 10)
    assert same.value == 0 and same.p == 1 and 0.15 < same.high < 0.17
    assert same.low == pytest.approx(-same.high)
    # The same scores of another kind are one checkpoint twice.
    twice = paired_difference([0.25, 1] * 10, [0.25, 1] * 10)
    assert (twice.value, twice.low, twice.high, twice.p) == (0, 0, 0, 1)
    shifted = paired_difference([0.25, 1.5] * 10, [0.5, 1.75] * 10)
    assert (shifted.low, shifted.high, shifted.p) == (0.25, 0.25, 0)
    alone = paired_difference([0.25], [0.5])
    assert alone.value == 0.25 and math.isnan(alone.low) and math.isnan(alone.p)
    for none in ([], [math.nan]):
        with pytest.raises(ValueError, match=r"expected finite scores of at least one question"):
            paired_difference(none, none)


def test_the_detectable_difference_is_detected_in_four_of_five_cases() -> None:
    before, after = answers("bpb")
    spread = after - before - (after - before).mean()
    least = paired_difference(before, before + spread).detectable
    rng = np.random.default_rng(0)
    hits = sum(
        paired_difference(np.zeros(200), spread[rng.integers(200, size=200)] + least).p < 0.05
        for _ in range(400)
    )
    assert 0.74 < hits / 400 < 0.86


def test_a_suite_against_a_bootstrap() -> None:
    """Of two tasks of right and wrong answers, and one of another kind, with weights."""
    tasks = [answers("acc"), tuple(x[:150] for x in answers("len_norm")), answers("bpb")]
    weights = (0.5, 0.4, -0.1)
    rng = np.random.default_rng(1)
    draws = np.zeros(4000)
    for (before, after), weight in zip(tasks, weights, strict=True):
        drawn = rng.integers(len(before), size=(4000, len(before)))
        draws += weight * (after - before)[drawn].mean(axis=1)
    parts = [estimate_difference(*task) for task in tasks]
    found = with_interval(combine(parts, weights))
    assert found.questions == 550
    assert found.value == pytest.approx(draws.mean(), abs=1e-3)
    near(found, *np.quantile(draws, (0.025, 0.975)), share=0.15)
    alone, same = with_interval(combine(parts[:1], [1.0])), paired_difference(*tasks[0])
    assert (alone.low, alone.high) == pytest.approx((same.low, same.high))


def test_false_alarms_of_a_suite() -> None:
    """Of tasks of 40 questions each, whose answers a coin exchanges."""
    before, after = (x.reshape(5, 40) for x in answers("len_norm"))
    rng = np.random.default_rng(3)
    alarms = 0
    for _ in range(200):
        swapped = rng.random((5, 40)) < 0.5
        x, y = np.where(swapped, after, before), np.where(swapped, before, after)
        parts = [estimate_difference(*pair) for pair in zip(x, y, strict=True)]
        alarms += with_interval(combine(parts, [0.2] * 5)).p < 0.05
    low, high = stats.binomtest(alarms, 200).proportion_ci(method="wilson")
    assert low <= 0.05 <= high, f"{alarms} of 200"


def test_a_ratio_against_a_bootstrap() -> None:
    """Bits per byte of documents of many lengths."""
    rng = np.random.default_rng(2)
    sizes = rng.lognormal(6, 1, 80).astype(int) + 1
    before = sizes * rng.normal(1.2, 0.2, 80)
    after = before * rng.normal(0.97, 0.03, 80)
    expected = stats.bootstrap(
        (before, after, sizes),
        lambda a, b, n, axis: (b.sum(axis=axis) - a.sum(axis=axis)) / n.sum(axis=axis),
        paired=True,
        rng=0,
    )
    found = with_interval(estimate_ratio(after - before, sizes))
    assert found.value == pytest.approx(after.sum() / sizes.sum() - before.sum() / sizes.sum())
    near(found, *expected.confidence_interval, share=0.12)
    mean = paired_difference(before, after)  # with equal sizes a ratio is a mean
    equal = with_interval(estimate_ratio(after - before, np.ones(80)))
    assert equal == pytest.approx(tuple(mean))


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    unknown, known = holm([math.nan, 0.01])
    assert math.isnan(unknown) and known == 0.01
    assert holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]


def test_a_question_is_its_text() -> None:
    asked = [("context", " a"), ("context", " b")]
    same = digest_question(iter(asked), 1)
    assert same == digest_question([list(request) for request in asked], 1)
    others = [digest_question(asked, 0), digest_question(asked[::-1], 1)]
    others += [digest_question([("context a", ""), *asked[1:]], 1)]
    assert len({same, *others}) == 4


def score(task: str, value: float, stderr: float | None = 0.1) -> dict[str, object]:
    row = {"scorer": "lm-eval", "task": task, "metric": "acc", "value": value}
    return {**row, "stderr": stderr, "documents": 10}


def member(task: str, chance: float = 0.0) -> dict[str, object]:
    return {"scorer": "lm-eval", "task": task, "metric": "acc", "chance": chance}


def test_a_suite_is_the_mean_of_its_members() -> None:
    scores = [score("a", 0.5), score("b::x", 0.2), score("b::y", 0.6)]
    found = score_suite("both", [member("a", 0.25), member("b::*")], scores)
    assert found["value"] == pytest.approx(((0.5 - 0.25) / 0.75 + (0.2 + 0.6) / 2) / 2)
    assert found["stderr"] == pytest.approx(math.hypot(0.1 / 0.75, 0.05, 0.05) / 2)
    assert (found["metric"], found["documents"]) == ("centered score", 30)
    assert [(p["task"], p["weight"]) for p in found["parts"]] == [
        ("a", 0.5),
        ("b::x", 0.25),
        ("b::y", 0.25),
    ]
    assert score_suite("s", [member("a")], [score("a", 0.5, None)])["stderr"] is None
    with pytest.raises(ValueError, match=r"suites.s: expected a score acc of c by lm-eval, found "):
        score_suite("s", [member("c")], scores)
