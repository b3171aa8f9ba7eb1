"""How often the interval of a ladder's prediction holds, by draws from known laws.

    python bench/ladder.py [--draws 400] [--confidence 0.9]

Four sizes and three lengths predict a run of a fifth, as those of the ladder `tiny`. The deviations
of runs from the law are normal, with 0.02 nats; those of a size have a correlation.
"""

import argparse

import numpy as np

from olmo.report.scaling import Law, Point

SIZES, MULTIPLES, NEXT = (18_432, 27_648, 41_472, 73_728), (8, 12, 20), 131_072
NOISE = 0.02  # nats
LAWS = {"0.35, 0.35": (0.35, 0.35), "0.34, 0.28": (0.34, 0.28), "0.5, 0.25": (0.5, 0.25)}


def loss(parameters: int, tokens: int, exponents: tuple[float, float]) -> float:
    of_parameters, of_tokens = exponents
    return 1.7 + 1.2 * (parameters / 4e4) ** -of_parameters + (tokens / 5e5) ** -of_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--confidence", type=float, default=0.9)
    given = parser.parse_args()
    print("| exponents of N, D | correlation | within | median width |\n|---|---|---|---|")
    for name, exponents in LAWS.items():
        for shared in (0.0, 0.5, 0.8, 0.95):
            rng, held, widths = np.random.default_rng(0), [], []
            for _ in range(given.draws):
                points = []
                for size in SIZES:
                    of_size = np.sqrt(shared) * rng.normal()
                    for multiple in MULTIPLES:
                        deviation = of_size + np.sqrt(1 - shared) * rng.normal()
                        known = loss(size, size * multiple, exponents)
                        points.append(
                            Point(str(size), size, size * multiple, known + NOISE * deviation)
                        )
                new = loss(NEXT, 20 * NEXT, exponents) + NOISE * rng.normal()
                interval = Law(points).predict(NEXT, 20 * NEXT, given.confidence)
                held.append(interval.contains(new))
                widths.append(interval.high - interval.low)
            print(f"| {name} | {shared} | {np.mean(held):.3f} | {np.median(widths):.3f} |")


if __name__ == "__main__":
    main()
