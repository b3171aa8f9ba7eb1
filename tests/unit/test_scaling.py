"""The law of loss by size and tokens: a planted one is found, intervals hold as often as said."""

import numpy as np
import pytest

from olmo.report import scaling
from olmo.report.scaling import Law, Point, leave_out

SIZES, MULTIPLES, NEXT = (9_000, 18_000, 41_000, 74_000), (8, 12, 20), 131_000
NOISE = 0.01  # nats
Exponents = tuple[float, float]  # of parameters, of tokens
EQUAL: Exponents = (0.35, 0.35)


def planted(parameters: float, tokens: float, exponents: Exponents = EQUAL) -> float:
    of_parameters, of_tokens = exponents
    return 1.7 + 1.2 * (parameters / 4e4) ** -of_parameters + (tokens / 5e5) ** -of_tokens


def draw(
    shared: float, rng: np.random.Generator, noise: float = NOISE, exponents: Exponents = EQUAL
) -> list[Point]:
    """Runs by the planted law; `shared` is the correlation of the deviations of a size's runs."""
    points = []
    for size in SIZES:
        of_size = rng.normal()
        for multiple in MULTIPLES:
            deviation = np.sqrt(shared) * of_size + np.sqrt(1 - shared) * rng.normal()
            loss = planted(size, size * multiple, exponents) + noise * deviation
            points.append(Point(str(size), size, size * multiple, loss))
    return points


def test_a_planted_law_is_found() -> None:
    law = Law(draw(0, np.random.default_rng(0), noise=0.0))
    assert law.exponent == pytest.approx(0.35, rel=0.05)
    assert law.irreducible == pytest.approx(1.7, abs=0.05)
    assert law.of_parameters == pytest.approx(1.2 * 4e4**law.exponent, rel=0.05)
    assert law.of_tokens == pytest.approx(5e5**law.exponent, rel=0.05)
    assert law.loss(NEXT, 20 * NEXT) == pytest.approx(planted(NEXT, 20 * NEXT), abs=0.001)
    interval = law.predict(NEXT, 20 * NEXT, 0.9)
    assert interval.low <= interval.loss <= interval.high < interval.low + 0.02


@pytest.mark.parametrize(
    ("shared", "exponents", "least", "most"),
    [
        (scaling.SHARED, EQUAL, 0.86, 0.98),  # as assumed
        (0.0, EQUAL, 0.92, 1.0),  # independent runs: too wide
        (scaling.SHARED, (0.34, 0.28), 0.86, 1.0),  # two exponents, those of Hoffmann et al.
    ],
    ids=["as-assumed", "independent", "two-exponents"],
)
@pytest.mark.slow
def test_the_interval_holds_as_often_as_it_says(
    shared: float, exponents: Exponents, least: float, most: float
) -> None:
    rng = np.random.default_rng(1)
    held = []
    for _ in range(200):
        law = Law(draw(shared, rng, exponents=exponents))
        new = planted(NEXT, 20 * NEXT, exponents) + NOISE * rng.normal()
        held.append(law.predict(NEXT, 20 * NEXT, 0.9).contains(new))
    assert least <= np.mean(held) <= most


def test_a_linear_law_has_the_textbook_s_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the exponent known and independent deviations it is that of regression."""
    from scipy import stats

    monkeypatch.setattr(scaling, "EXPONENTS", np.array([0.35]))
    monkeypatch.setattr(scaling, "SHARED", 0.0)
    points = draw(0, np.random.default_rng(2))
    found = Law(points).predict(NEXT, 20 * NEXT, 0.9)
    terms = np.array([[1, p.parameters**-0.35, p.tokens**-0.35] for p in points])
    losses, new = (
        np.array([p.loss for p in points]),
        np.array([1, NEXT**-0.35, (20 * NEXT) ** -0.35]),
    )
    fit, squares, *_ = np.linalg.lstsq(terms, losses)
    noise = np.sqrt(squares[0] / 8)  # 12 runs, four numbers with the exponent
    half = stats.t.ppf(0.95, 4) * noise * np.sqrt(1 + new @ np.linalg.inv(terms.T @ terms) @ new)
    assert (found.low, found.high) == pytest.approx((new @ fit - half, new @ fit + half), abs=1e-6)


def test_one_multiple_leaves_one_term() -> None:
    points = [Point(str(n), n, 20 * n, planted(n, 20 * n)) for n in SIZES]
    law = Law(points)
    assert not law.has_tokens and law.of_tokens == 0
    assert law.loss(NEXT, 20 * NEXT) == pytest.approx(planted(NEXT, 20 * NEXT), abs=0.01)
    with pytest.raises(ValueError, match=r"more than 3 runs.*found 3 of 3 sizes"):
        Law(points[:3])


def test_runs_of_one_size_have_no_law() -> None:
    points = [Point("s", 9_000, 9_000 * k, planted(9_000, 9_000 * k)) for k in range(5, 15)]
    with pytest.raises(ValueError, match=r"at least two sizes.*found 10 of 1 sizes"):
        Law(points)


def test_each_size_is_predicted_by_the_others() -> None:
    points = draw(0, np.random.default_rng(0), noise=1e-4)
    found = leave_out(points, 0.9)
    assert [point for point, _ in found] == points
    assert all(i.loss == pytest.approx(p.loss, abs=0.01) for p, i in found)
    # A size that is off is seen by the others, and does not widen its own interval.
    points[-1] = Point(points[-1].size, points[-1].parameters, points[-1].tokens, 9.0)
    point, interval = leave_out(points, 0.9)[-1]
    assert not interval.contains(point.loss) and interval.high - interval.low < 0.1
    assert leave_out(points[:6], 0.9) == []
